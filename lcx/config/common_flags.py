"""Flags that several commands share."""

import argparse
from typing import Any

from lcx.config.flags import PROCESSES, json_object

DTYPE = "float32, bfloat16 or float16 (default: as stored)"


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and how it is loaded: arguments of lcx.load."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a workdir, a folder or file of weights, or the name of a model on the hub (org/name, org/name@revision)",
    )
    parser.add_argument("--dtype", metavar="NAME", help=DTYPE)
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What is done to a model while it is loaded: a longer context, adapters, the precision of some projections."""
    parser.add_argument("--rope_scaling", type=json_object, metavar="JSON", help="RoPE scaling to apply first")
    parser.add_argument("--context_length", type=int, metavar="N", help="context window in tokens")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="FOLDER",
        help="folder of a PEFT adapter (LoRA) to merge; may be repeated to add several",
    )
    parser.add_argument(
        "--input_projections",
        choices=("fp8", "plain"),
        help="of Evo 2's Hyena layers (default: as the checkpoint says)",
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="format of the checkpoint, as --src_format of lcx.convert: a name, or module:NAME of your own "
        "(default: detected from the files)",
    )


def add_sequences(parser: argparse.ArgumentParser, *, regions: str) -> None:
    """How sequences of nucleotides are read and scored.

    Args:
      regions: the help of --regions.
    """
    parser.add_argument("--regions", metavar="FILE.bed", help=regions)
    parser.add_argument("--window", type=int, metavar="N", help="tokens at a time (default: the model's window)")
    parser.add_argument("--both_strands", action="store_true", help="the mean of both strands")
    parser.add_argument(
        "--tag", metavar="TEXT", help="text before every window that is not scored, such as '|d__Bacteria;...|'"
    )
    parser.add_argument(
        "--keep_case", action="store_true", help="leave lower-case letters as they are (default: upper case)"
    )
    parser.add_argument("--tokens_per_batch", type=int, metavar="N", help="tokens per forward pass (default: 16384)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")


def add_processes(parser: argparse.ArgumentParser, *, saves: bool = False) -> None:
    """Several processes, each with its own devices: fields of multihost.join.Processes.

    Args:
      saves: whether the command saves its progress when SIGTERM asks it to stop.
    """
    parser.set_defaults(**{f"{PROCESSES}saves": saves})
    group = parser.add_argument_group(
        "several processes", "The same command in each; TPU pods, SLURM and Open MPI need no flag."
    )

    def add(flag: str, **settings: Any) -> None:
        group.add_argument(flag, dest=f"{PROCESSES}{flag[2:]}", **settings)

    explained = "join the other processes, which JAX finds, or do not (default: join if the environment names others)"
    add("--distributed", action=argparse.BooleanOptionalAction, help=explained)
    add("--hosts", metavar="A,B,...", help="all hosts, the same list on each: one process per host, the first leads")
    add("--coordinator_address", metavar="HOST:PORT", help="address of process 0 (JAX_COORDINATOR_ADDRESS)")
    add("--num_processes", type=int, metavar="N", help="number of processes (JAX_NUM_PROCESSES)")
    explained = "index of this process, from 0 (JAX_PROCESS_ID, JOB_COMPLETION_INDEX)"
    add("--process_id", type=int, metavar="I", help=explained)
    explained = "how long to wait at the start for processes that have not come (default: 300)"
    add("--join_timeout", type=float, metavar="SECONDS", help=explained)
    explained = "a process that is silent for so long is gone, which ends all others (default: 30)"
    add("--heartbeat_timeout", type=float, metavar="SECONDS", help=explained)
    if saves:
        explained = "a training step that takes so long hangs, which ends all processes (default: 600)"
        add("--step_timeout", type=float, metavar="SECONDS", help=explained)
