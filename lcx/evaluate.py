"""Evaluate checkpoints: loss by position, perplexity, retrieval, RULER, or what a .gin file lists; compare several.

Examples:
  python -m lcx.evaluate --checkpoint=path/to/a --checkpoint=path/to/b --suite=long --output=/tmp/eval
  python -m lcx.evaluate --checkpoint=/tmp/run --output=/tmp/eval
  python -m lcx.evaluate --checkpoint=path/to/hf_folder --output=/tmp/eval --context_length=16384 \\
      --rope_scaling='{"rope_type": "yarn", "factor": 4.0}' --gin_file=configs/eval/long_context.gin \\
      --gin.TEXT="'held_out.txt'" --gin.TOKENIZER="'path/to/hf_folder'"

Writes results.json, plots and report.html to the output folder; of several checkpoints, to a folder in it for each, and
one report about all. A checkpoint is a workdir, one step of it, or a folder in Hugging Face format; --adapter merges a
PEFT adapter (LoRA) into it. The same command goes on where an earlier one was stopped: answers of the same weights to
the same prompts are kept in the output folder.
"""

import sys

from lcx import config


def main(argv=None) -> int:
    parser = config.parser(__doc__, imports=True)
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        metavar="PATH",
        help="a model to evaluate: a path, or org/name on the hub; may be repeated to compare several",
    )
    parser.add_argument(
        "--suite",
        choices=("short", "retrieval", "ruler", "long"),
        help="a set of evaluations in place of those of a .gin file; long: all that need no further files",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for results.json and report.html"
    )
    parser.add_argument(
        "--rope_scaling", type=config.json_object, metavar="JSON", help="RoPE scaling to apply first"
    )
    parser.add_argument("--context_length", type=int, metavar="N", help="context window in tokens")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="FOLDER",
        help="folder of a PEFT adapter (LoRA) to merge; may be repeated to add several",
    )
    parser.add_argument(
        "--only_part",
        choices=("window", "linear"),
        help="for a linearized model: evaluate only this part of its attention",
    )
    parser.add_argument("--name", help="label of this model in results and plots")
    return config.run(parser, "lcx.evaluator:evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
