#!/usr/bin/env bash
# Runs the tests: makes .venv if absent, installs, runs pytest with the arguments given here.
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh --fast               a verdict in a few minutes: the files listed in FAST below
#   bash scripts/test.sh tests/test_rope.py   one file
# The whole suite is two pytest runs: the number of virtual CPU devices is fixed when jax starts, and tests/eight_devices
# needs eight. More devices than cores need a larger thread pool, or their collectives deadlock.
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
# A test keeps about one core busy. A worker runs the tests of a file together; idle workers steal from busy ones.
workers="${LCX_TEST_WORKERS:-$(python -c 'import os; print(min(len(os.sched_getaffinity(0)), 8))')}"
FAST=(test_adapters test_adapters_train test_chat test_chat_data test_config test_config_types test_convert_files
  test_convert_names test_convert_rules test_convert_windows test_data_batches test_data_corpus test_data_formats
  test_data_packing test_data_special_tokens test_data_tokenizer_classes test_extend test_hub test_imports
  test_metrics test_ops_cross_entropy test_optim test_parameters test_rope test_train_step)
if [ "${1:-}" = --fast ]; then
  files=("${FAST[@]/#/tests/}")
  exec python -m pytest -q -n "$workers" --dist worksteal "${files[@]/%/.py}" "${@:2}"
fi
if [ $# -gt 0 ]; then
  exec python -m pytest -q "$@"
fi
# Beside the workers, since neither of the two runs keeps all cores busy: tests wait for disks and other processes.
eight="$(mktemp)"
XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8" NPROC=32 python -m pytest -q tests/eight_devices > "$eight" 2>&1 &
beside=$!
trap 'kill "$beside" 2> /dev/null || true; rm -f "$eight"' EXIT
status=0
python -m pytest -q -n "$workers" --dist worksteal --ignore=tests/eight_devices || status=$?
echo "eight devices"
wait "$beside" || status=$?
cat "$eight"
exit "$status"
