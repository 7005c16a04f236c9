#!/usr/bin/env bash
# The context wall and its removal, on this machine, in minutes: pretrains a tiny byte-level Llama at 256 tokens on the
# source of Python's standard library, extends it to 1024 with YaRN, with position interpolation (PI) and unscaled,
# fine-tunes each for 40 steps, evaluates the loss by position, and draws one report.
#   bash scripts/quickstart.sh [WORKDIR]      default runs/quickstart; run it again to resume
# Needs Python >= 3.11 and pip; downloads nothing but packages. About 6 minutes on 2 cores after the install.
set -euo pipefail
. "$(dirname "$0")/_env.sh"
case "${1:-/}" in /*) ;; *) set -- "$PWD/$1" ;; esac
use_venv
# Small tensors keep one core busy each: two to four virtual devices share the rows of a batch.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
if [ "$cores" -ge 4 ]; then cores=4; elif [ "$cores" -eq 3 ]; then cores=2; fi
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-$cores}"
out="${1:-runs/quickstart}"
claim "$out"

evaluate() {  # NAME CHECKPOINT [FLAGS]
  local folder="$out/eval/$1"
  [ -s "$folder/results.json" ] && [ -s "$folder/report.html" ] && return
  run python -m lcx.evaluate --gin_file=configs/eval/quickstart.gin --checkpoint="$2" --output="$folder" "${@:3}"
}

start=$SECONDS
run python -m lcx.train --gin_file=configs/quickstart.gin --workdir="$out/base"

# Without training: what each scaling does to the pretrained model.
for type in default linear yarn; do
  name=unscaled; scaling='{"rope_type": "default"}'
  [ "$type" = default ] || { name=$type; scaling="{\"rope_type\": \"$type\", \"factor\": 4.0}"; }
  [ "$type" = linear ] && name=pi
  label="${name/pi/PI}"; label="${label/yarn/YaRN}"
  evaluate "${name}_untrained" "$out/base" --rope_scaling="$scaling" --context_length=1024 --name="$label, untrained"
  run python -m lcx.train --gin_file=configs/extend/quickstart.gin --workdir="$out/$name" \
    --gin.BASE="'$out/base'" --gin.Trainer.rope_scaling="$scaling"
  evaluate "$name" "$out/$name" --name="$label, 40 steps"
done

run python -m lcx.report --results "$out"/eval/{unscaled_untrained,pi_untrained,yarn_untrained,unscaled,pi,yarn} \
  --workdir "$out"/{base,unscaled,pi,yarn} --output="$out" --overwrite --title="From 256 to 1024 tokens"
echo
echo "Took $((SECONDS - start)) s. Open $out/report.html; the picture alone is $out/loss_by_position.png"
echo "Your own model: python -m lcx.train --gin_file=configs/extend/yarn.gin --help, and docs/tutorials/extend.md"
