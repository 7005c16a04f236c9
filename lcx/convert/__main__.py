"""Convert checkpoints between lcx, Hugging Face folders (hf), and savanna and vortex (Evo 2).

The source is never changed, and the destination appears whole or not at all. Memory stays far below the size
of the checkpoint.

Examples:
  python -m lcx.convert --src=path/to/hf_folder --dst=/tmp/llama --dst_format=lcx
  python -m lcx.convert --src=/tmp/run --dst=/tmp/llama_64k --dst_format=hf --dtype=bfloat16
  python -m lcx.convert --src=path/to/hf_folder --dst=/tmp/longer --dst_format=hf \\
      --rope_scaling='{"rope_type": "yarn", "factor": 4.0}'
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
        help="a Hugging Face folder, an lcx workdir, a folder or .pt file of Evo 2",
    )
    parser.add_argument("--dst", required=True, metavar="PATH", help="the folder to write")
    parser.add_argument("--dst_format", required=True, metavar="FORMAT", help="lcx, hf, savanna or vortex")
    parser.add_argument(
        "--src_format",
        metavar="FORMAT",
        help="lcx, hf, savanna, savanna_legacy (roles in blocks) or vortex; found out by default",
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
    return config.run(parser, "lcx.convert.command:convert", argv)


if __name__ == "__main__":
    sys.exit(main())
