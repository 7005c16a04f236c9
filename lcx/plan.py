"""Says what a training run needs, before there is hardware: does it fit, what is large, how long does it take.

Examples:
  python -m lcx.plan --gin_file=configs/quickstart.gin --topology=cpu:2
  python -m lcx.plan --gin_file=configs/extend/yarn.gin --topology=v5p:4x4x4 --gin.MODEL="'path/to/hf_folder'" \\
      --gin.TEXT="'text'" --gin.CONTEXT_LENGTH=131072
  python -m lcx.plan --gin_file=configs/pretrain/two_mamba.gin --topology=h200:8 --json

Compiles the training step of the .gin file ahead of time for devices that need not exist: TPU slices (v5e:16x16,
v5p:4x4x4, v6e:4x4), GPUs (h100:8, h200:8; hosts of 8) or this machine's CPUs (cpu:2). TPUs and GPUs need the extra
`aot` (Linux on x86). No data and no weights are read; of a Hugging Face model, a folder with config.json is enough.
Prints memory, the largest arrays and the settings that shrink them, FLOPs, what devices send each other, and a time
from a roofline with its assumptions. Exits with 0 if the step fits and with 1 if it does not.
"""

import sys

from lcx import config


def main(argv=None) -> int:
    parser = config.parser(__doc__)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="the devices: v5e:16x16, v5p:4x4x4, v6e:4x4, h100:8, h200:8, cpu:2",
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--longest",
        action="store_true",
        help="also search for the longest rows that fit (compiles several times)",
    )
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=12,
        metavar="COUNT",
        help="plan other meshes, remat, accumulation and pieces of the same training (12 of them, or so many) and list "
        "those that fit, fastest first",
    )
    parser.add_argument(
        "--search_seconds",
        type=float,
        metavar="SECONDS",
        help="with --search: begin no further plan after so many seconds",
    )
    return config.run(
        parser, "lcx.planning.command:plan", argv, bindings_of="lcx.trainer:train"
    )


if __name__ == "__main__":
    sys.exit(main())
