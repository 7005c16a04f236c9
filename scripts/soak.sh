#!/usr/bin/env bash
# Disturbs training runs of 1, 2 and 4 processes on this machine, one fault a minute, and prints a table: what happened,
# whether the final parameters equal those of an undisturbed run to the bit, and the goodput.
#   bash scripts/soak.sh                                    60 faults, about an hour and a half
#   bash scripts/soak.sh --faults=200                       a night
#   bash scripts/soak.sh --faults=6 --every=8 --processes=2
# scripts/soak.py --help explains the faults.
set -euo pipefail
. "$(dirname "$0")/_env.sh"
use_venv dev
exec python scripts/soak.py "$@"
