"""Train, fine-tune or extend a model, as a .gin file describes it.

Examples:
  python -m lcx.train --gin_file=configs/quickstart.gin --workdir=/tmp/run
  python -m lcx.train --gin_file=configs/extend/yarn.gin --workdir=/tmp/run --gin.Trainer.steps=20

The workdir gets config.gin, checkpoints/ and metrics.jsonl. If it already holds a run, that run goes on where
its last good checkpoint left it; Ctrl-C or SIGTERM saves first.
"""

import sys

from lcx import config


def main(argv=None) -> int:
    parser = config.parser(__doc__)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run is kept, and resumed from"
    )
    return config.run(parser, "lcx.trainer:train", argv)


if __name__ == "__main__":
    sys.exit(main())
