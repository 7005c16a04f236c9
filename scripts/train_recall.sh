#!/usr/bin/env bash
# Trains a small model that retrieves within its window of 128 tokens, extends it to 512 and linearizes it, with several
# seeds, and measures how far each result still retrieves (docs/results/recall.md).
#   bash scripts/train_recall.sh [--workdir=DIR] [--seeds="0 1 2"] [--output=benchmarks/results/recall_cpu.json]
# The pretrained model is the same for all seeds; they are those of the text and of its order in what follows.
# Run it again to resume a stopped run; a seed that is done is not run again.
set -euo pipefail
invoked="$PWD" out=runs/recall seeds="0 1 2" output=""
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$invoked" "$1" ;; esac; }
while [ $# -gt 0 ]; do
  case "$1" in
    --workdir=*) out="$(absolute "${1#*=}")" ;;
    --seeds=*) seeds="${1#*=}" ;;
    --output=*) output="$(absolute "${1#*=}")" ;;
    *) echo "lcx: unknown argument $1; known ones are at the top of $0" >&2; exit 2 ;;
  esac
  shift
done
. "$(dirname "$0")/_env.sh"
use_venv
claim "$out"
text() {  # NAME LENGTH DOCUMENTS SEED
  [ -s "$out/$1.jsonl" ] ||
    run python scripts/recall_text.py --output="$out/$1.jsonl" --length="$2" --documents="$3" --seed="$4"
}
text short 128 40000 0
run python scripts/recall_start.py --output="$out/start"
run python -m lcx.train --gin_file=configs/pretrain/recall.gin --workdir="$out/base" --gin.MODEL="'$out/start'" \
  --gin.TEXT="'$out/short.jsonl'"
for seed in $seeds; do
  [ ! -s "$out/$seed/recall.json" ] || continue
  text "long$seed" 512 8000 "$((seed + 1))"
  run python scripts/recall_study.py --base="$out/base" --text="$out/long$seed.jsonl" --output="$out/$seed" --seed="$seed"
done
run python scripts/recall_study.py --collect "$out"/*/recall.json --output="${output:-$out/recall_cpu.json}"
