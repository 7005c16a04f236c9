#!/usr/bin/env bash
# Trains a probe on embeddings: a linear map or a small MLP that predicts a label of each sequence.
#   bash scripts/train_probe.sh --checkpoint=PATH --fasta=PATH --labels=FILE.tsv --layers=NAMES --output=DIR
#       [--hidden=N] [--steps=N] [--seed=N] [--pool=mean|last|max] [-- FLAGS OF lcx.embed]
# The labels are separated by tabs, with the columns record and label: numbers (regression) or words (classification).
# A fifth of the records is held out. Writes embeddings.npz and results.json into --output; existing embeddings are used.
set -euo pipefail
checkpoint="" fasta="" labels="" layers="" out="" hidden=0 steps=500 seed=0 pool=mean
while [ $# -gt 0 ]; do
  case "$1" in
    --checkpoint=*) checkpoint="${1#*=}" ;;
    --fasta=*) fasta="${1#*=}" ;;
    --labels=*) labels="${1#*=}" ;;
    --layers=*) layers="${1#*=}" ;;
    --output=*) out="${1#*=}" ;;
    --hidden=*) hidden="${1#*=}" ;;
    --steps=*) steps="${1#*=}" ;;
    --seed=*) seed="${1#*=}" ;;
    --pool=*) pool="${1#*=}" ;;
    --) shift; break ;;
    *) echo "lcx: unknown argument $1; known ones are at the top of $0" >&2; exit 2 ;;
  esac
  shift
done
for name in checkpoint fasta labels layers out; do
  [ -n "${!name}" ] || { echo "lcx: --${name/out/output} is missing: the top of $0 lists the flags" >&2; exit 2; }
done
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
[ ! -e "$checkpoint" ] || checkpoint="$(absolute "$checkpoint")"
fasta="$(absolute "$fasta")" labels="$(absolute "$labels")" out="$(absolute "$out")"
. "$(dirname "$0")/_env.sh"
use_venv
claim "$out"
if [ ! -e "$out/embeddings.npz" ]; then
  run python -m lcx.embed --checkpoint="$checkpoint" --fasta="$fasta" --layers="$layers" --pool="$pool" \
    --output="$out/embeddings.npz" "$@"
fi
run python scripts/train_probe.py --embeddings="$out/embeddings.npz" --labels="$labels" --output="$out/results.json" \
  --hidden="$hidden" --steps="$steps" --seed="$seed"
