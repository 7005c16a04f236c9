"""Convert checkpoints between lcx, Hugging Face folders (hf), savanna and vortex (Evo 2), LoLCATS and PEFT.

The source is never changed, and the destination appears whole or not at all. Memory stays far below the size
of the checkpoint.

Examples:
  python -m lcx.convert --src=path/to/hf_folder --dst=/tmp/llama --dst_format=lcx
  python -m lcx.convert --src=/tmp/run --dst=/tmp/llama_64k --dst_format=hf --dtype=bfloat16
  python -m lcx.convert --src=path/to/hf_folder --dst=/tmp/longer --dst_format=hf \\
      --rope_scaling='{"rope_type": "yarn", "factor": 4.0}'
  python -m lcx.convert --src=path/to/hf_folder --feature_maps=X_distill.pt --lora=X_ft.pt --dst=/tmp/linear \\
      --dst_format=lcx
  python -m lcx.convert --src=runs/lora --dst=out/adapter --dst_format=peft
  python -m lcx.convert --src=path/to/hf_folder --adapter=path/to/peft_adapter --dst=/tmp/merged --dst_format=hf
  python -m lcx.convert --src=evo2_7b.pt --dst=/tmp/evo2_mp8 --dst_format=savanna --model_parallel=8
"""

import os
import sys

from lcx import config


def main(argv=None) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here needs, or should occupy, an accelerator
    parser = config.parser(__doc__, gin=False)
    parser.add_argument(
        "--src",
        required=True,
        metavar="PATH",
        help="a Hugging Face folder, the name of a model on the hub (org/name, org/name@revision), an lcx workdir, a "
        "folder or .pt file of Evo 2",
    )
    parser.add_argument("--dst", required=True, metavar="PATH", help="the folder to write")
    parser.add_argument(
        "--dst_format",
        required=True,
        metavar="FORMAT",
        help="lcx, hf, savanna, vortex, lolcats; of a run with LoRA also peft (an adapter of what it trained) and "
        "lolcats_files (what lies on a Hugging Face folder)",
    )
    parser.add_argument(
        "--src_format",
        metavar="FORMAT",
        help="lcx, hf, savanna, savanna_legacy (roles in blocks), these with _fp32 (float32 weights of DeepSpeed's "
        "optimizer states), vortex or lolcats; found out by default",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; as stored by default")
    parser.add_argument(
        "--rope_scaling",
        type=config.json_object,
        metavar="JSON",
        help="RoPE scaling to apply, as Hugging Face writes it",
    )
    parser.add_argument("--context_length", type=int, metavar="N", help="the new context window in tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --dst")
    parser.add_argument(
        "--max_shard_bytes", type=int, metavar="N", help="largest safetensors file (default 5e9)"
    )
    parser.add_argument(
        "--model_parallel", type=int, metavar="N", help="files that share the tensors of savanna (default 1)"
    )
    _add_adapters(parser)
    _add_lolcats(parser)
    return config.run(parser, "lcx.convert.command:convert", argv)


def _add_adapters(parser) -> None:
    """PEFT adapters, in and out."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="FOLDER",
        help="a PEFT adapter (LoRA) of the model at --src, merged into it; repeat it, updates add up",
    )
    parser.add_argument(
        "--base_model",
        metavar="NAME",
        help="what a peft adapter names as its base, a path or a name on the hub (default: what the run started from)",
    )


def _add_lolcats(parser) -> None:
    """What LoLCATS files on a Hugging Face folder need."""
    parser.add_argument("--feature_maps", metavar="PATH", help="X_distill.pt of LoLCATS, on the folder --src")
    parser.add_argument("--lora", metavar="PATH", help="X_ft.pt of LoLCATS, merged into the model")
    parser.add_argument(
        "--attention",
        type=lambda text: config.json_object(text) if text.lstrip().startswith("{") else text,
        metavar="PATH|JSON",
        help="the settings of --feature_maps by their published names, or the .yaml or .json of them",
    )
    parser.add_argument("--lora_alpha", type=float, metavar="X", help="of --lora (default twice the rank)")
    parser.add_argument(
        "--published_quirks",
        action="store_true",
        help="compute as the published code does, mistakes included",
    )


if __name__ == "__main__":
    sys.exit(main())
