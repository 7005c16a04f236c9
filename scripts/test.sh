#!/usr/bin/env bash
# Runs the tests: makes .venv if absent, installs, runs pytest with the arguments given here.
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh tests/test_rope.py   one file
# LCX_REFERENCE=FOLDER adds the tests that need reference weights, texts and tokenizers; the rest need no download.
set -euo pipefail
if [ -n "${LCX_REFERENCE:-}" ]; then
  LCX_REFERENCE="$(cd "$LCX_REFERENCE" && pwd)"
  export LCX_REFERENCE
fi
. "$(dirname "$0")/_env.sh"
use_venv dev,torch
# Compiled programs are kept between runs: most of the time of these tests is compilation.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/xla-cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.05 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
exec python -m pytest -q "$@"
