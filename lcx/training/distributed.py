"""Runs one program over several processes: a TPU pod, the nodes of a cluster, or a few processes on one machine."""

import jax

from lcx.errors import UserError, first_line


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes. Call it before anything else uses the devices.

    On TPU pods and under SLURM all three arguments can be None: JAX finds them in the environment.

    Args:
      coordinator_address: "host:port" of process 0, the same for all processes.
      num_processes: how many processes there are in total.
      process_id: the index of this process, from 0.

    Raises:
      UserError: the coordinator cannot be reached, or the other processes do not join in time.
    """
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        line = first_line(error)
        raise UserError(
            f"the processes did not find each other: {line[:300]}; outside of TPU pods and SLURM set "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id"
        ) from None
