"""Continue a prompt and print the text as it is generated.

Examples:
  python -m lcx.generate --checkpoint=/tmp/run --prompt='def main():' --max_new_tokens=200
  python -m lcx.generate --checkpoint=path/to/hf_folder --prompt='Once upon a time' --temperature=0.8 --seed=1
  python -m lcx.generate --checkpoint=path/to/hf_folder --chat --prompt='What is a long context good for?'
  python -m lcx.generate --checkpoint=path/to/hf_folder --adapter=path/to/peft_adapter --prompt='Once upon a time'
"""

import argparse
import sys

from lcx import config
from lcx.config.common_flags import add_format, add_processes, add_reading


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    parser.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="sample among the most likely tokens whose probabilities add up to P",
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="sample among the K most likely tokens")
    parser.add_argument(
        "--allowed", metavar="LETTERS", help="generate only these characters, such as ACGT (each a token)"
    )
    parser.add_argument(
        "--num_samples", type=int, metavar="N", help="continue the prompt N times (with --temperature above 0)"
    )
    parser.add_argument("--output", metavar="FILE.fa", help="write the sequences, prompt included, as FASTA")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False, imports=True)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a workdir, a Hugging Face folder, or the name of a model on the hub (org/name, org/name@revision)",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--chat", action="store_true", help="format the prompt as a user's turn with the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument(
        "--chat_template", metavar="PATH", help="with --chat: another template, a .jinja file or a name"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="stop after this many tokens (default: 256, or fewer where the model's window ends before)",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--add_bos",
        action=argparse.BooleanOptionalAction,
        help="whether BOS precedes the prompt (default: as the tokenizer does)",
    )
    add_reading(parser)
    add_format(parser)
    add_processes(parser)
    return config.run(parser, "lcx.terminal:stream_text", argv)


if __name__ == "__main__":
    sys.exit(main())
