"""Checks the documents of a source for short length, repetition, truncation and end-of-document markers in the text."""

import argparse
import sys

from lcx.data.dataset import Dataset
from lcx.data.sources import FORMATS, ON_BAD_LINE
from lcx.errors import UserError


def main() -> int:
    """Prints the report; the exit status is 1 when a document has a problem, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m lcx.data", description=__doc__, allow_abbrev=False)
    parser.add_argument("--source", required=True, help='file, folder, glob, or "stdlib"')
    parser.add_argument(
        "--tokenizer", default="bytes", help='"bytes", a tokenizer file, or a folder with one'
    )
    parser.add_argument(
        "--format", help=f"{', '.join(FORMATS)}; by default from the content of each file, else from its name"
    )
    parser.add_argument(
        "--text_field", default="text", help="field of a JSON object, column of a table (default: text)"
    )
    parser.add_argument(
        "--on_bad_line",
        default="error",
        choices=ON_BAD_LINE,
        help="for a row that cannot be read: stop with an error, or skip and count it (default: error)",
    )
    parser.add_argument("--separator", help='splits text files into documents, e.g. "<|endoftext|>"')
    parser.add_argument(
        "--chat_template", help="a .jinja file for rows with messages; by default the tokenizer's template"
    )
    parser.add_argument(
        "--min_length", type=int, default=8192, help="report documents with fewer tokens (default: 8192)"
    )
    arguments = parser.parse_args()
    settings = {k: v for k, v in vars(arguments).items() if k != "min_length"}
    try:
        dataset = Dataset(**settings)
        report, remarks = dataset.check(min_length=arguments.min_length), dataset.remarks()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report, *remarks, sep="\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
