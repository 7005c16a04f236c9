#!/usr/bin/env bash
# Compares the mixers of the 2Mamba paper (arXiv 2602.17363) at a small size: softmax, 2Mamba, 2Mamba-E, Mamba-2 with the
# paper's single head and with all heads, and linear attention, with equally many parameters, on the same tokens.
#   bash scripts/reproduce_two_mamba.sh [--text=GLOB] [--tokenizer=NAME] [--output=DIR] [--size=cpu|gpu] [--seeds="0 1 2"]
#       [--steps=N] [--recall_steps=N] [--ablations] [--other_text=GLOB ...] [-- FLAGS OF lcx.train]
# The text is the source of Python's standard library unless --text names another. Each model is trained on it with each
# seed, then on associative recall with the first seed: --steps updates on text, --recall_steps on recall. The flags after --
# go to every training; of them, TEXT, TOKENIZER, SEQ_LEN and STEPS to those on text alone, since recall has its own rows.
# Writes results.json and pictures of the loss against tokens and against position, and of recall, into --output
# (runs/two_mamba_study), and a report with lcx.report.
# --ablations also trains, with the first seed, what the paper's other graphs compare: norms, convolutions, parts of Mamba-2,
# sizes, longer rows, more updates, and up to two --other_text (such as stdlib). Writes ablations.json, a picture of each
# graph, and a report of each below figures/.
# Run the same command again to resume a stopped run. Time and results: docs/results/two_mamba.md.
# --size=gpu trains on 262M tokens for each model and seed, and needs --text and --tokenizer; we have not run it.
set -euo pipefail
text="'stdlib'" tokenizer="" out=runs/two_mamba_study size=cpu seeds="0 1 2" steps="" recall_steps="" ablations="" other=()
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
while [ $# -gt 0 ]; do
  case "$1" in
    --text=*) text="'$(absolute "${1#*=}")'" ;;
    --tokenizer=*) tokenizer="$(absolute "${1#*=}")" ;;
    --output=*) out="${1#*=}" ;;
    --size=*) size="${1#*=}" ;;
    --seeds=*) seeds="${1#*=}" ;;
    --steps=*) steps="${1#*=}" ;;
    --recall_steps=*) recall_steps="${1#*=}" ;;
    --ablations) ablations=yes ;;
    --other_text=stdlib) other+=("$1") ;;
    --other_text=*) other+=("--other_text=$(absolute "${1#*=}")") ;;
    --) shift; break ;;
    *) echo "lcx: unknown argument $1; known ones are at the top of $0" >&2; exit 2 ;;
  esac
  shift
done
case "$size" in
  cpu) mamba_mlp=64 ;;   # Mamba-2's projections are larger: an MLP with which all models have equally many parameters
  gpu) mamba_mlp=1104 ;;
  *) echo "lcx: --size=$size, expected cpu or gpu" >&2; exit 2 ;;
esac
if [ "$size" = gpu ] && { [ -z "$tokenizer" ] || [ "$text" = "'stdlib'" ]; }; then
  echo "lcx: --size=gpu needs a larger text: set --text and --tokenizer" >&2; exit 2
fi
out="$(absolute "$out")"
. "$(dirname "$0")/_env.sh"
use_venv
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/xla}"  # seeds share a program
models="softmax two_mamba two_mamba_e mamba mamba_heads linear"
study=configs/pretrain/two_mamba_study
first="${seeds%% *}"
claim "$out"

config_of() {
  case "$1" in
    two_mamba) echo configs/pretrain/two_mamba/squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2.gin ;;
    two_mamba_e) echo configs/pretrain/two_mamba/exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2.gin ;;
    mamba_heads) echo "$study/mamba_heads.gin" ;;
    *) echo "configs/pretrain/two_mamba/$1.gin" ;;
  esac
}

train() {  # FOLDER MODEL SEED [FLAGS]
  local folder="$out/$1" flags=()
  [ -e "$folder/done" ] && return
  case "$2" in mamba*) flags+=("--gin.Mlp.intermediate_size=$mamba_mlp") ;; esac
  run python -m lcx.train --gin_file="$(config_of "$2")" --gin_file="$study/$size.gin" --workdir="$folder" \
    --gin.Trainer.seed="$3" ${flags[@]+"${flags[@]}"} "${@:4}"
  touch "$folder/done"
}

data=("--gin.TEXT=$text")
[ -z "$tokenizer" ] || data+=("--gin.TOKENIZER='$tokenizer'")
length=()
[ -z "$steps" ] || length+=("--gin.STEPS=$steps")
on_recall=()
for flag in "$@"; do
  case "$flag" in
    --gin.TEXT=* | --gin.TOKENIZER=* | --gin.SEQ_LEN=* | --gin.STEPS=*) ;;
    *) on_recall+=("$flag") ;;
  esac
done
[ -z "$recall_steps" ] || on_recall+=("--gin.STEPS=$recall_steps")

for seed in $seeds; do
  for model in $models; do
    train "text/${model}_$seed" "$model" "$seed" "${data[@]}" ${length[@]+"${length[@]}"} "$@"
  done
  [ "$seed" = "$first" ] || continue
  for model in $models; do  # by position, up to four times the length of training
    [ -s "$out/position/$model/results.json" ] || run python -m lcx.evaluate --checkpoint="$out/text/${model}_$seed" \
      --output="$out/position/$model" --name="$model" --evals=loss_by_position
  done
  if [ "$size" = cpu ]; then
    [ -s "$out/recall.jsonl" ] || run python benchmarks/two_mamba_study.py recall --output="$out"
    for model in $models; do
      train "recall/$model" "$model" "$seed" --gin_file="$study/recall.gin" --gin.TEXT="'$out/recall.jsonl'" \
        --gin.Dataset.chat_template="'$out/recall.jinja'" ${on_recall[@]+"${on_recall[@]}"}
      [ -s "$out/recalled/$model/results.json" ] || run python -m lcx.evaluate --checkpoint="$out/recall/$model" \
        --output="$out/recalled/$model" --name="$model" --evals=recall --gin.Recall.lengths="(32, 64, 128)" \
        --gin.Recall.pairs=4 --gin.Recall.first_id=33 --gin.Recall.vocabulary=32 --gin.Recall.filler=32 \
        --gin.Recall.rows=256
    done
  fi
done
run python benchmarks/two_mamba_study.py table --output="$out" --seeds="$seeds"
results=("$out"/position/*/)
[ "$size" != cpu ] || results+=("$out"/recalled/*/)
run python -m lcx.report --results "${results[@]}" --workdir "$out"/text/*_"$first" --output="$out" --overwrite \
  --title="Mixers of the 2Mamba paper"

[ -n "$ablations" ] || exit 0
plan=("--output=$out" "--size=$size" ${other[@]+"${other[@]}"})
[ -z "$steps" ] || plan+=("--updates=$steps")
python benchmarks/two_mamba_ablations.py runs "${plan[@]}" > "$out/ablations.tsv"
while IFS=$'\t' read -r -u 3 -a words; do
  train "${words[0]}" "${words[1]}" "$first" "${data[@]}" ${length[@]+"${length[@]}"} "$@" "${words[@]:2}"
done 3< "$out/ablations.tsv"
run python benchmarks/two_mamba_ablations.py table --output="$out"
python benchmarks/two_mamba_ablations.py figures --output="$out" > "$out/figures.tsv"
while IFS=$'\t' read -r -u 3 -a words; do
  run python -m lcx.report --workdir "${words[@]:2}" --output="$out/figures/${words[0]}" --overwrite --title="${words[1]}"
done 3< "$out/figures.tsv"
