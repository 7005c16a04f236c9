#!/usr/bin/env bash
# What an accelerator says of this library, in 8 minutes: kernels against their definitions, against others' and against
# the roofline, then whole training steps; see accelerator.py, whose flags it takes.
#
#   bash benchmarks/accelerator.sh                       a machine with an NVIDIA driver or a TPU, and Python >= 3.11
#   WHEELS=$PWD/wheels bash benchmarks/accelerator.sh    without a network, after this on a machine of the same kind:
#                       pip download -d wheels ".[gpu]" setuptools wheel torch flash-linear-attention
#   MINUTES=3 bash benchmarks/accelerator.sh             after that nothing new begins; installing does not count
#
# Start it again after anything that stops it: what is done stays done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c "import jax, flax, gin" 2>/dev/null; then
    extra=$([ -e /dev/accel0 ] || [ -e /dev/vfio/0 ] && echo tpu || echo gpu)
    "$python" -m venv .venv-accelerator
    python=$PWD/.venv-accelerator/bin/python
    offline=${WHEELS:+--no-index --find-links=$WHEELS}
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet $offline -e ".[$extra]"
    for peer in torch flash-linear-attention; do # one that is not there is left out of the table
        # shellcheck disable=SC2086
        "$python" -m pip install --quiet $offline $peer || echo "without $peer"
    done
fi

end=$((SECONDS + 60 * ${MINUTES:-8}))
while true; do
    status=0
    "$python" benchmarks/accelerator.py --seconds=$((end - SECONDS)) "$@" || status=$?
    case $status in
        75 | 134 | 136 | 137 | 139 | 142) ;; # in a new process: asked for, or after a crash, a kill or a hang
        *) exit "$status" ;;
    esac
done
