#!/usr/bin/env bash
# Compares a small StripedHyena 2 (SE, MR, LI, attention) with a Llama of equally many parameters on a genome: both are
# trained on the same region with the same recipe, and scored on a region that neither has seen.
#   bash scripts/reproduce_striped_hyena.sh --fasta=/path/to/genome.fna.gz [--output=DIR] [--size=small|large]
#       [--steps=N] [--rates="1e-3 3e-3 1e-2"] [--seeds="0 1 2"] [--letters=N] [-- FLAGS OF lcx.train]
# The last tenth of the letters is held out, and its first --letters of them (65536) are scored. Each model uses the
# learning rate of --rates with the lowest loss, for the first seed, on the last 2% of the rest: text that is neither
# trained on nor reported. Then it is trained with the other seeds. Run the same command again to resume a stopped
# run. Writes results.json and perplexity.png into --output (runs/striped_hyena_vs_llama).
# Takes 9 min 45 s on one core of an Intel Xeon for ten training runs and six evaluations, without a compilation cache.
# --size=large is for a GPU, and the default on a machine with one; we have not run it.
set -euo pipefail
fasta="" out=runs/striped_hyena_vs_llama size="" steps="" rates="1e-3 3e-3 1e-2" seeds="0 1 2" letters=65536
while [ $# -gt 0 ]; do
  case "$1" in
    --fasta=*) fasta="${1#*=}" ;;
    --output=*) out="${1#*=}" ;;
    --size=*) size="${1#*=}" ;;
    --steps=*) steps="${1#*=}" ;;
    --rates=*) rates="${1#*=}" ;;
    --seeds=*) seeds="${1#*=}" ;;
    --letters=*) letters="${1#*=}" ;;
    --) shift; break ;;
    *) echo "lcx: unknown argument $1; known ones are at the top of $0" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$fasta" ] || { echo "lcx: --fasta is missing: pass --fasta=/path/to/genome.fna.gz" >&2; exit 2; }
case "$fasta" in /*) ;; *) fasta="$PWD/$fasta" ;; esac
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac
. "$(dirname "$0")/_env.sh"
use_venv
if [ -z "$size" ]; then
  size=small
  if [ -z "${JAX_PLATFORMS:-}" ] && command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then size=large; fi
fi
suffix="${size/small/}"
suffix="${suffix:+_$suffix}"
# Small tensors keep one core busy each: virtual devices share the rows of a batch.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
if [ "$cores" -ge 4 ]; then cores=4; elif [ "$cores" -eq 3 ]; then cores=2; fi
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-$cores}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/xla}"  # seeds share a program
# The recipes warm up for 15 steps, of 120 in the small one; a shorter run for the same eighth.
length=()
if [ -n "$steps" ]; then length=("--gin.STEPS=$steps"); fi
if [ -n "$steps" ] && [ "$steps" -lt 120 ]; then length+=("--gin.AdamW.warmup_steps=$((steps / 8))"); fi
claim "$out"

train() {  # MODEL RATE SEED [FLAGS]
  local folder="$out/$1/rate$2_seed$3" start=$SECONDS
  [ -e "$folder/done" ] && return
  run python -m lcx.train --gin_file="configs/pretrain/genome/$1$suffix.gin" --workdir="$folder" \
    --gin.FASTA="'$out/train.fa'" --gin.AdamW.learning_rate="$2" --gin.Trainer.seed="$3" \
    ${length[@]+"${length[@]}"} "${@:4}"
  echo $((SECONDS - start)) >> "$folder/seconds"
  touch "$folder/done"
}

evaluate() {  # CHECKPOINT NAME
  [ -s "$1/eval/results.json" ] && return
  run python -m lcx.evaluate --checkpoint="$1" --output="$1/eval" --name="$2" --gin_file=configs/eval/sequences.gin \
    --gin.FASTA="'$out/held_out.fa'"
}

compare="benchmarks/striped_hyena_vs_llama.py"
run python "$compare" split --fasta="$fasta" --output="$out" --letters="$letters"
first="${seeds%% *}"
for rate in $rates; do
  for model in striped_hyena llama; do train "$model" "$rate" "$first" "$@"; done
done
for seed in $seeds; do
  for model in striped_hyena llama; do
    rate=$(python "$compare" rate --output="$out" --model="$model" --seed="$first" --rates="$rates")
    train "$model" "$rate" "$seed" "$@"
    evaluate "$out/$model/rate${rate}_seed$seed" "$model, seed $seed"
  done
done
run python "$compare" table --output="$out" --rates="$rates" --seeds="$seeds"
