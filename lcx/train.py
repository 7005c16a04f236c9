"""Train, fine-tune or extend a model as described by a .gin file.

Examples:
  python -m lcx.train --gin_file=configs/quickstart.gin --workdir=/tmp/run
  python -m lcx.train --gin_file=configs/extend/yarn.gin --workdir=/tmp/run --gin.Trainer.steps=20

Writes config.gin, checkpoints/ and metrics.jsonl to the workdir. If the workdir already holds a run, it is resumed from
its newest intact checkpoint. Ctrl-C and SIGTERM save a checkpoint before the run stops.

For several processes, each with its own devices, run the same command in each. On TPU pods and under SLURM (srun) and
Open MPI they find each other; on plain hosts list them all with --hosts. For two processes on one machine:
  python -m lcx.train ... --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id=0 &
  python -m lcx.train ... --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id=1
"""

import sys

from lcx import config
from lcx.config.common_flags import add_processes


def main(argv=None) -> int:
    parser = config.parser(__doc__)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder that the run writes to and is resumed from"
    )
    add_processes(parser, saves=True)
    return config.run(parser, "lcx.trainer:train", argv)


if __name__ == "__main__":
    sys.exit(main())
