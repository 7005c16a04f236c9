"""Evaluate checkpoints: loss by position, perplexity, retrieval, RULER, or what a .gin file lists; compare several.

Examples:
  python -m lcx.evaluate --checkpoint=path/to/a --checkpoint=path/to/b --suite=long --output=/tmp/eval
  python -m lcx.evaluate --checkpoint=/tmp/run --output=/tmp/eval
  python -m lcx.evaluate --checkpoint=/tmp/run --output=/tmp/eval --evals=passkey,perplexity \\
      --gin.Passkey.trials=5 --gin.Perplexity.windows='(1024, 4096)'
  python -m lcx.evaluate --checkpoint=path/to/hf_folder --output=/tmp/eval --context_length=16384 \\
      --rope_scaling='{"rope_type": "yarn", "factor": 4.0}' --gin_file=configs/eval/long_context.gin \\
      --dataset=held_out.txt

Writes results.json, plots and report.html to the output folder; of several checkpoints, to a folder in it for each, and
one report about all. A checkpoint is a workdir, one step of it, or a folder in Hugging Face format; --adapter merges a
PEFT adapter (LoRA) into it. The same command goes on where an earlier one was stopped: answers of the same weights to
the same prompts are kept in the output folder.
"""

import argparse
import re
import sys

from lcx import config
from lcx.config.common_flags import DTYPE, add_format, add_processes, add_reading
from lcx.config.flags import hint

EVALS = {
    "loss_by_position": "LossByPosition",
    "perplexity": "Perplexity",
    "long_ppl": "LongPPL",
    "passkey": "Passkey",
    "needle_grid": "NeedleGrid",
    "published_needle": "PublishedNeedle",
    "key_value": "KeyValue",
    "recall": "Recall",
    "ruler": "Ruler",
    "long_documents": "LongDocuments",
    "cost": "Cost",
    "sequence_likelihood": "SequenceLikelihood",
    "variant_effects": "VariantEffects",
}
DEFAULT = "loss_by_position,perplexity"
SUITES = {
    "short": DEFAULT,
    "retrieval": "passkey,needle_grid,key_value",
    "ruler": "ruler",
    "long": f"{DEFAULT},long_ppl,passkey,needle_grid,key_value,ruler,cost",
}


class Suite(argparse.Action):
    """Lists the evaluations of a suite like --evals does, so that --gin.Passkey.trials and the like apply to them."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.suite = value
        setattr(namespace, f"{config.BINDS}evaluate.evals", references(SUITES[value]))


def main(argv=None) -> int:
    parser = config.parser(__doc__, imports=True)
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        metavar="PATH",
        help="a model to evaluate: a path, or org/name on the hub; may be repeated to compare several",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        action=Suite,
        choices=SUITES,
        help="a set of evaluations in place of those of a .gin file; long: all that need no further files",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for results.json and report.html"
    )
    parser.add_argument(
        "--dataset",
        metavar="PATH",
        help="text to read all of: a file, glob or folder (default: the held-out part of what the checkpoint was "
        "trained on)",
    )
    parser.add_argument("--dtype", metavar="NAME", help=DTYPE)
    add_reading(parser)
    add_format(parser)
    parser.add_argument(
        "--only_part",
        choices=("window", "linear"),
        help="for a linearized model: evaluate only this part of its attention",
    )
    what.add_argument(
        "--evals",
        dest=f"{config.BINDS}evaluate.evals",
        type=references,
        metavar="NAME,...",
        help=f"what to measure, of {', '.join(EVALS)}, or module:Class of your own (default: {DEFAULT}); "
        "--gin.Passkey.trials=5 and the like set their parameters",
    )
    parser.add_argument("--name", help="label of this model in results and plots")
    # The first makes all names known, so that a setting of an evaluation that does not run is said to have no effect.
    defaults = [("evaluate.evals", references(names)) for names in (",".join(EVALS), DEFAULT)]
    add_processes(parser)
    return config.run(parser, "lcx.evaluator:evaluate", argv, defaults=defaults)


def references(names: str) -> str:
    """`passkey,my_module:Mine` -> `(@lcx.evals.passkey.Passkey(), @my_module.Mine(),)`, as gin writes it."""
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        module, colon, own = name.partition(":")
        if not colon and name not in EVALS:
            near = hint(name, EVALS) or f"; expected {', '.join(EVALS)}, or module:Class of your own"
            raise argparse.ArgumentTypeError(f"{name!r} is no evaluation{near}")
        if colon and not re.fullmatch(r"\w+(\.\w+)*:[A-Za-z_]\w*", name):
            raise argparse.ArgumentTypeError(f"{name!r} is no evaluation of your own; expected module:Class")
        found.append(f"@{module}.{own}()" if colon else f"@lcx.evals.{name}.{EVALS[name]}()")
    if not found:
        raise argparse.ArgumentTypeError(f"no evaluation is named; expected some of {', '.join(EVALS)}")
    return f"({', '.join(found)},)"


if __name__ == "__main__":
    sys.exit(main())
