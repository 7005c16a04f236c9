"""Train, fine-tune or extend a model as described by a .gin file.

Examples:
  python -m lcx.train --gin_file=configs/quickstart.gin --workdir=/tmp/run
  python -m lcx.train --gin_file=configs/extend/yarn.gin --workdir=/tmp/run --gin.Trainer.steps=20

Writes config.gin, checkpoints/ and metrics.jsonl to the workdir. If the workdir already holds a run, it is resumed from
its newest intact checkpoint. Ctrl-C and SIGTERM save a checkpoint before the run stops.

For several processes, each with its own devices, run the same command in each with --distributed. On TPU pods and under
SLURM the processes find each other. Elsewhere pass their addresses, as here for two processes on one machine:
  python -m lcx.train ... --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id=0 &
  python -m lcx.train ... --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id=1
"""

import sys

from lcx import config


def main(argv=None) -> int:
    parser = config.parser(__doc__)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder that the run writes to and is resumed from"
    )
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="join the processes of this TPU pod or SLURM job"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process_id", type=int, metavar="I", help="index of this process, from 0")
    config.keep_freed_memory()
    return config.run(parser, "lcx.trainer:train", argv)


if __name__ == "__main__":
    sys.exit(main())
