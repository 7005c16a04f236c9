"""Checks the documents of a source for short length, repetition, truncation and end-of-document markers in the text.

Examples:
  python -m lcx.data --source='/path/to/books/*.txt' --tokenizer=/path/to/hf_folder
  python -m lcx.data --source=stories.jsonl --text_field=story --min_length=0

The exit status is 1 if a document has a problem.
"""

import argparse
import sys

from lcx import config
from lcx.data.sources import FORMATS, ON_BAD_LINE


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False)
    parser.add_argument("--source", required=True, metavar="PATH", help='file, folder, glob, or "stdlib"')
    parser.add_argument(
        "--tokenizer", metavar="PATH", help='"bytes" (the default), a tokenizer file, or a folder with one'
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; by default from the content of each file, else from its name",
    )
    parser.add_argument(
        "--text_field", metavar="NAME", help="field of a JSON object, column of a table (default: text)"
    )
    parser.add_argument(
        "--on_bad_line",
        choices=ON_BAD_LINE,
        help="for a row that cannot be read: stop with an error, or skip and count it (default: error)",
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help='splits text files into documents, e.g. "<|endoftext|>"'
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="whether rows are conversations (default: those with messages are)",
    )
    parser.add_argument(
        "--chat_template",
        metavar="PATH",
        help="a .jinja file for rows with messages; by default the tokenizer's template",
    )
    parser.add_argument(
        "--min_length", type=int, metavar="N", help="report documents with fewer tokens (default: 8192)"
    )
    return config.run(parser, "lcx.data.command:check", argv)


if __name__ == "__main__":
    sys.exit(main())
