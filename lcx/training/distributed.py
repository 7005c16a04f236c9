"""One program over several processes: a TPU pod, the nodes of a cluster, or a few on one machine."""

import jax

from lcx.errors import UserError, first_line


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; before anything else touches the devices.

    On TPU pods and under SLURM all three are found in the environment.

    Args:
      coordinator_address: "host:port" of process 0, the same for all.

    Raises:
      UserError: the others cannot be found or do not come.
    """
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        line = first_line(error)
        raise UserError(
            f"the processes did not find each other: {line[:300]}; outside of TPU pods and SLURM set "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id"
        ) from None
