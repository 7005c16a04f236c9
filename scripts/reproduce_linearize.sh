#!/usr/bin/env bash
# Linearizes a pretrained model in both stages, and compares the losses, memory and speed with those of the softmax model:
# held-out loss far beyond twice the window, the window and the linear part alone, the same without attention transfer,
# the softmax model with the same fine-tuning, size of the state, and decoding speed from 256 to 16K tokens.
#   LCX_REFERENCE=FOLDER bash scripts/reproduce_linearize.sh      the 0.9M Llama and the stories of that folder
#   bash scripts/reproduce_linearize.sh --model HF_FOLDER --text FILE [--workdir DIR] [--steps N] [--seq_len N]
#                                       [--rope_scaling JSON] [--length N] [-- FLAGS of lcx.train]
# Run it again to resume a stopped run. Takes 28 minutes on one core of an Intel Xeon. Stages 1 and 2 take --steps each; the
# model without transfer takes twice as many, so that both see equally many tokens.
set -euo pipefail
invoked="$PWD"
. "$(dirname "$0")/_env.sh"
reference="${LCX_REFERENCE:+$(cd "$invoked" && cd "$LCX_REFERENCE" && pwd)}"
model="${reference:+$reference/data/weights/babyllama105/hf}"
text="${reference:+$reference/data/text/tinystories_train_2MiB.txt}"
out=runs/linearize steps=120 seq_len=1024 length=1024
rope_scaling='{"rope_type": "yarn", "factor": 4.0}'
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$invoked" "$1" ;; esac; }
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model="$(absolute "$2")" ;;
    --text) text="$(absolute "$2")" ;;
    --workdir) out="$(absolute "$2")" ;;
    --steps) steps="$2" ;;
    --seq_len) seq_len="$2" ;;
    --length) length="$2" ;;
    --rope_scaling) rope_scaling="$2" ;;
    --) shift; break ;;
    *) echo "reproduce_linearize.sh: unknown flag $1; expected --model --text --workdir --steps --seq_len --length --rope_scaling" >&2; exit 2 ;;
  esac
  shift 2
done
if [ -z "$model" ] || [ -z "$text" ]; then
  echo "reproduce_linearize.sh: no model or text; set LCX_REFERENCE, or --model HF_FOLDER --text FILE" >&2
  exit 2
fi
use_venv
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-2}"
claim "$out"

scaled=(--gin.Trainer.rope_scaling="$rope_scaling")
[ -n "$rope_scaling" ] || scaled=()
extra=("$@")

train() {  # NAME CONFIG MODEL STEPS [FLAGS]
  run python -m lcx.train --gin_file="configs/linearize/$2.gin" --workdir="$out/$1" --gin.MODEL="'$3'" \
    --gin.TEXT="'$text'" --gin.TOKENIZER="'$model'" --gin.SEQ_LEN="$seq_len" --gin.Trainer.steps="$4" \
    --gin.Trainer.checkpoint_every="$4" --gin.Trainer.batch_size=8 "${@:5}" "${extra[@]}"
}

evaluate() {  # NAME CHECKPOINT LABEL [FLAGS]
  [ -s "$out/eval/$1/results.json" ] && [ -s "$out/eval/$1/report.html" ] && return
  run python -m lcx.evaluate --gin_file=configs/eval/linearize.gin --checkpoint="$2" --output="$out/eval/$1" \
    --name="$3" --gin.TEXT="'$text'" --gin.TOKENIZER="'$model'" --gin.LENGTHS="($length,)" "${@:4}"
}

scaling=(--rope_scaling="$rope_scaling")
[ -n "$rope_scaling" ] || scaling=()

evaluate softmax "$model" "softmax" "${scaling[@]}"
train transfer tinystories_transfer "$model" "$steps" "${scaled[@]}"
evaluate transfer "$out/transfer" "transfer"
train lora tinystories_lora "$out/transfer" "$steps"
evaluate lora "$out/lora" "transfer, LoRA"
evaluate window_only "$out/lora" "its window alone" --only_part=window
evaluate linear_only "$out/lora" "its linear part alone" --only_part=linear
train softmax_lora tinystories_lora "$model" "$steps" "${scaled[@]}"
evaluate softmax_lora "$out/softmax_lora" "softmax, LoRA"
train no_transfer tinystories_no_transfer "$model" "$((2 * steps))" "${scaled[@]}"
evaluate no_transfer "$out/no_transfer" "LoRA without transfer"
run python benchmarks/linearized.py --softmax "$out/softmax_lora" --linear "$out/lora" --results "$out/eval" \
  --output "$out/linearize.json"
run python -m lcx.report --results "$out"/eval/{softmax,softmax_lora,transfer,lora,no_transfer,window_only,linear_only} \
  --output="$out" --overwrite --title="Linear attention in place of softmax"
echo "Figures: $out/linearize.json and linearize.svg; the curves: $out/report.html"
