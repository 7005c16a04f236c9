#!/usr/bin/env bash
# Runs lcx on a TPU pod slice: create it, ship this tree, run a command on every host, follow it, stop it.
#
#   scripts/launch/tpu_pod.sh create --name=NAME --zone=ZONE --type=v5p-64 [--version=RUNTIME] [--spot]
#   scripts/launch/tpu_pod.sh ship   --name=NAME --zone=ZONE [--bucket=BUCKET]
#   scripts/launch/tpu_pod.sh run    --name=NAME --zone=ZONE -- python -m lcx.train --distributed --gin_file=... ...
#   scripts/launch/tpu_pod.sh logs   --name=NAME --zone=ZONE [--worker=0]
#   scripts/launch/tpu_pod.sh stop   --name=NAME --zone=ZONE
#   scripts/launch/tpu_pod.sh delete --name=NAME --zone=ZONE
#
# --dry-run prints the gcloud commands instead of running them. --spot: cheaper, and may be taken away at any time.
# --version: the software of the hosts; known for v5p, v5e (v5litepod-16) and v6e.
# `ship` installs what is committed here, with the TPU extra, into ~/lcx on every host (with uv, since the hosts' own
# Python may be too old), and with --bucket mounts gs://BUCKET as ~/bucket: all hosts must see the same --workdir. `run`
# starts the command in the background, and again if it fails (10 times in all, but not after a mistake in its
# settings): a run resumes from its checkpoint. It refuses while an earlier one has not ended. `stop` sends SIGTERM, after
# which a run saves and ends.
set -euo pipefail

usage() {
  sed -n '4,9s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

fail() {
  echo "error: $1" >&2
  exit 2
}

command=${1:-}
[ $# -gt 0 ] && shift
name='' zone='' type='' version='' bucket='' worker=0 spot=() dry_run=false to_run=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=true ;;
    --)
      shift
      to_run=("$@")
      break
      ;;
    *) fail "unknown argument $1, expected --NAME=VALUE, and the command to run after --" ;;
  esac
  shift
done

case $command in create | ship | run | logs | stop | delete) ;; *) usage ;; esac
[ -n "$name" ] || fail "--name is not set, expected the name of the slice"
[ -n "$zone" ] || fail "--zone is not set, expected a zone such as us-east5-a"
bucket=${bucket#gs://} bucket=${bucket%/}
case $bucket in */*) fail "--bucket is $bucket, expected the name of a bucket without a folder" ;; esac

gcloud_() {
  if $dry_run; then
    printf '%q ' gcloud compute tpus tpu-vm "$@"
    echo
  else
    gcloud compute tpus tpu-vm "$@"
  fi
}

on() { # on WORKER COMMAND: a shell command on one host, or on all of them
  gcloud_ ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

case $command in
  create)
    [ -n "$type" ] || fail "--type is not set, expected an accelerator type such as v5p-64"
    case $type in
      v5p-*) known=v2-alpha-tpuv5 ;;
      v5litepod-*) known=v2-alpha-tpuv5-lite ;;
      v6e-*) known=v2-alpha-tpuv6e ;;
      *) known= ;;
    esac
    version=${version:-$known}
    [ -n "$version" ] || fail "--version is not set, and it is not known for --type=$type: expected a TPU software version"
    gcloud_ create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"} # bash 3 has no empty arrays
    ;;
  ship)
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    archive=$(mktemp -d)/lcx.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    git -C "$root" rev-parse HEAD > /dev/null 2>&1 || fail "$root is no clone with git, of which ship copies what is committed"
    [ -z "$(git -C "$root" status --porcelain)" ] || echo "note: what is not committed in $root is not shipped" >&2
    git -C "$root" archive --format=tar.gz -o "$archive" HEAD
    gcloud_ scp "$archive" "$name:lcx.tar.gz" --zone="$zone" --worker=all
    on all 'mkdir -p lcx && tar -xzf lcx.tar.gz -C lcx && cd lcx &&
      python3 -m pip install -q --user uv && { test -x .venv/bin/python || python3 -m uv venv -q --seed --python 3.11 .venv; } &&
      .venv/bin/pip install -q -c constraints.txt -e ".[tpu,buckets,parquet,hub]"'
    if [ -n "$bucket" ]; then
      on all "command -v gcsfuse >/dev/null || {
          echo 'install gcsfuse first: cloud.google.com/storage/docs/gcsfuse-install' >&2; exit 1; }
        mkdir -p bucket && { mountpoint -q bucket || gcsfuse --implicit-dirs $(printf '%q' "$bucket") bucket; }"
    fi
    ;;
  run)
    [ ${#to_run[@]} -gt 0 ] || fail "there is no command, expected it after --"
    line=$(printf '%q ' "${to_run[@]}")
    # Each host writes its process id, so that `stop` reaches the run and nothing else. `stop` may come at any time.
    inner="cd ~/lcx && . .venv/bin/activate && for attempt in 1 2 3 4 5 6 7 8 9 10; do
      test -e ~/lcx.stop && break
      $line 9>&- & run=\$!; echo \$run > ~/lcx.pid; test -e ~/lcx.stop && kill -TERM \$run
      wait \$run; status=\$?; rm -f ~/lcx.pid
      case \$status in 0 | 2) break ;; esac; test -e ~/lcx.stop && break; sleep 20; done"
    # shellcheck disable=SC2016 # expanded on the hosts
    alone='exec 9> lcx.lock
      flock -n 9 || { echo "error: an earlier run goes on on $(hostname): stop it, and wait for its end" >&2; exit 1; }'
    on all "$alone; rm -f lcx.stop; nohup bash -c $(printf '%q' "$inner") > lcx.log 2>&1 < /dev/null &"
    printf 'follow it with: %q logs --name=%q --zone=%q\n' "$0" "$name" "$zone" >&2
    ;;
  logs) on "$worker" 'tail -n 100 -F lcx.log' ;;
  stop)
    # shellcheck disable=SC2016 # expanded on the hosts
    on all 'touch lcx.stop; test -e lcx.pid && kill -TERM "$(cat lcx.pid)" 2>/dev/null; true'
    ;;
  delete) gcloud_ delete "$name" --zone="$zone" --quiet ;;
esac
