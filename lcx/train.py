"""Train, fine-tune or extend a model, as a .gin file describes it.

Examples:
  python -m lcx.train --gin_file=configs/quickstart.gin --workdir=/tmp/run
  python -m lcx.train --gin_file=configs/extend/yarn.gin --workdir=/tmp/run --gin.Trainer.steps=20

The workdir gets config.gin, checkpoints/ and metrics.jsonl. If it already holds a run, that run goes on where
its last good checkpoint left it; Ctrl-C or SIGTERM saves first.

Several processes, each with its own devices: the same command in each, with --distributed. TPU pods and SLURM say who
they are; anywhere else (two processes on one machine, here):
  python -m lcx.train ... --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id=0 &
  python -m lcx.train ... --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id=1
"""

import sys

from lcx import config


def main(argv=None) -> int:
    parser = config.parser(__doc__)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run is kept, and resumed from"
    )
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="join them; the environment says who they are"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 is; by hand")
    group.add_argument("--num_processes", type=int, metavar="N")
    group.add_argument("--process_id", type=int, metavar="I", help="from 0")
    return config.run(parser, "lcx.trainer:train", argv)


if __name__ == "__main__":
    sys.exit(main())
