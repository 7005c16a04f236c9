# Sourced by the other scripts: `use_venv dev,torch` changes to the repository's root, creates .venv there if it is absent,
# installs missing packages, and puts it on PATH. PYTHON=/path/to/python picks the interpreter of a new .venv,
# LCX_EXTRAS=gpu adds extras. `claim FOLDER` makes a folder and refuses one that another script writes to.
# `run COMMAND ...` prints a command before it runs it.
# shellcheck shell=bash

use_venv() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
  local extras hash have="" python
  _wait_for_turn
  [ -x .venv/bin/python ] || _make_venv || return 1
  python="$PWD/.venv/bin/python"
  hash="$({ pwd; cat pyproject.toml constraints.txt; } | cksum)"
  # The stamp holds the hash of the requirements and the extras that are installed.
  if [ -f .venv/lcx-installed ] && [ "$(head -n 1 .venv/lcx-installed)" = "$hash" ]; then
    have="$(tail -n 1 .venv/lcx-installed)"
  fi
  extras="$(printf '%s' "$have,${1:-},${LCX_EXTRAS:-}" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -s -d , -)"
  if [ "${extras:-,}" != "$have" ]; then
    echo "lcx: installing into .venv (${extras:-no extras}; a few minutes the first time)" >&2
    rm -f .venv/lcx-installed
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt \
      -e ".${extras:+[$extras]}" || { echo "lcx: the install failed, see above" >&2; return 1; }
    printf '%s\n%s\n' "$hash" "${extras:-,}" > .venv/lcx-installed
  fi
  exec 9<&-
  export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
}

_wait_for_turn() {  # of two scripts that start at once, one installs; `use_venv` gives the turn back
  exec 9< .
  if command -v flock > /dev/null && ! flock -n 9; then
    echo "lcx: another script is preparing .venv: waiting for it" >&2
    flock 9
  fi
}

_make_venv() {
  local python="${PYTHON:-python3}"
  command -v "$python" > /dev/null || {
    echo "lcx: there is no $python, expected Python >= 3.11: set PYTHON=/path/to/python3" >&2
    return 1
  }
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    echo "lcx: found $("$python" --version 2>&1), expected Python >= 3.11: set PYTHON=/path/to/python3" >&2
    return 1
  fi
  echo "lcx: making .venv with $("$python" --version)" >&2
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "lcx: $python cannot make a virtual environment (Debian: apt install python3-venv)" >&2
    return 1
  }
}

run() {  # prints each public command, then runs it
  printf '\n$' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  "$@"
}

claim() {  # each command has a lock of its own, but between two commands the other script would go on in their place
  mkdir -p "$1" || return 1
  exec 8> "$1/.script-lock"
  if command -v flock > /dev/null && ! flock -n 8; then
    echo "lcx: another script is writing to $1: wait for it to end, or choose another folder" >&2
    return 1
  fi
}
