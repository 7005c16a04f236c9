"""Writes one HTML page about evaluated models and training runs: what was found in words, plots, tables.

Examples:
  python -m lcx.report --workdir=/tmp/run --output=/tmp/report
  python -m lcx.report --results /tmp/eval_unscaled /tmp/eval_yarn /tmp/eval_yarn_tuned --output=/tmp/report
  python -m lcx.report --results=/tmp/eval --workdir=/tmp/run --output=/tmp/report --title='YaRN, 4 x 256 tokens'

--results: folders written by `python -m lcx.evaluate`, in the order in which they should appear. --workdir: training
runs whose loss curves are drawn. At least one of the two is needed. The page, report.html, is a single file that
contains its plots; each plot is also written to the same folder as a PNG file. Files that exist there are replaced only
with --overwrite.
"""

import sys

from lcx import config, moved


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False)
    parser.add_argument(
        "--results", nargs="+", action="extend", metavar="DIR", help="folders with results.json"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for report.html and the plots")
    parser.add_argument(
        "--workdir", nargs="+", action="extend", metavar="DIR", help="training runs whose loss is drawn"
    )
    parser.add_argument("--title", metavar="TEXT", help="title of the page")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in the folder")
    return config.run(parser, "lcx.reporting.report:build", argv)


__getattr__ = moved.names_of(__name__)


if __name__ == "__main__":
    sys.exit(main())
