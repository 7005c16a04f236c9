"""Convert checkpoints between lcx, Hugging Face folders (hf), savanna and vortex (Evo 2), LoLCATS and PEFT.

The source is never changed. The destination folder appears only once it is complete. Tensors are streamed, so
memory use stays far below the size of the checkpoint.

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

import argparse
import os
import sys

from lcx import config
from lcx.config.common_flags import add_processes
from lcx.convert import formats


def main(argv=None) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here needs, or should occupy, an accelerator
    parser = config.parser(__doc__, gin=False, imports=True)
    parser.add_argument(
        "--src",
        required=True,
        metavar="PATH",
        help="a Hugging Face folder, the name of a model on the hub (org/name, org/name@revision), an lcx workdir, or "
        "an Evo 2 checkpoint (a folder or a .pt file)",
    )
    parser.add_argument("--dst", required=True, metavar="PATH", help="the folder to write")
    parser.add_argument(
        "--dst_format",
        required=True,
        metavar="FORMAT",
        help=f"{formats.help_lines(writing=True)}; or module:NAME of your own Format object",
    )
    parser.add_argument(
        "--src_format",
        metavar="FORMAT",
        help=f"{formats.help_lines(writing=False)}; detected from the files by default",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; as stored by default")
    parser.add_argument(
        "--rope_scaling",
        type=config.json_object,
        metavar="JSON",
        help="RoPE scaling to apply, in the form of Hugging Face's rope_scaling",
    )
    parser.add_argument("--context_length", type=int, metavar="N", help="the new context window in tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint at --dst")
    _add_options(parser)
    _add_adapters(parser)
    _add_lolcats(parser)
    add_processes(parser)
    return config.run(parser, "lcx.convert.command:convert", argv)


class _Option(argparse.Action):
    """Collects the formats' options in one dict; the destination format rejects those it does not have."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.options = {
            **(getattr(namespace, "options", None) or {}),
            self.option_strings[0][2:]: values,
        }


def _add_options(parser) -> None:
    """Adds one flag per writing option of any format."""
    for name, field in {k: v for format in formats.FORMATS for k, v in format.options().items()}.items():
        default = "" if field.default is None else f" (default {field.default})"
        parser.add_argument(
            f"--{name}",
            dest="options",
            action=_Option,
            type=str if field.default is None else type(field.default),
            metavar=field.metadata["metavar"],
            help=field.metadata["help"] + default,
        )


def _add_adapters(parser) -> None:
    """Adds the flag for PEFT adapters, which are merged into the model."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="FOLDER",
        help="a PEFT adapter (LoRA) for the model at --src, merged into it; may be repeated, the updates are summed",
    )


def _add_lolcats(parser) -> None:
    """Adds the flags for LoLCATS files that belong to a Hugging Face folder."""
    parser.add_argument(
        "--feature_maps", metavar="PATH", help="LoLCATS X_distill.pt for the Hugging Face folder --src"
    )
    parser.add_argument("--lora", metavar="PATH", help="LoLCATS X_ft.pt, merged into the model")
    parser.add_argument(
        "--attention",
        type=lambda text: config.json_object(text) if text.lstrip().startswith("{") else text,
        metavar="PATH|JSON",
        help="the settings of --feature_maps under their published names, or a .yaml or .json file that holds them",
    )
    parser.add_argument(
        "--lora_alpha", type=float, metavar="X", help="alpha of --lora (default: twice the rank)"
    )
    parser.add_argument(
        "--published_quirks",
        action="store_true",
        help="reproduce the published code exactly, including its mistakes",
    )


if __name__ == "__main__":
    sys.exit(main())
