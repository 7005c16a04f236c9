"""The memory of a run: whether the training state fits, from shapes alone; and giving back what is no longer used."""

import contextlib
import ctypes
import gc
import math
import os
from typing import Any

import jax

from lcx.errors import UserError


def check_fits(abstract: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the arrays of a training state are larger than the memory of the devices that hold them.

    This is a lower bound: activations, gradients and the compiler's temporary buffers need additional memory.

    Args:
      abstract: tree of jax.ShapeDtypeStruct with shardings.
      mesh: the mesh that the arrays will be placed on.
    """
    device = mesh.local_devices[0]
    needed = sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves(abstract))
    if device.platform == "cpu":  # several CPU devices of one process share the host's memory
        needed, available, where = needed * len(mesh.local_devices), _host_memory(), "this machine"
    else:
        available, where = (device.memory_stats() or {}).get("bytes_limit"), f"each {device.device_kind}"
    if available is not None and needed > available:
        found = f"the weights and the optimizer's state take {needed / 1e9:,.1f} GB"
        raise UserError(
            f"{found}, and {where} has {available / 1e9:,.1f} GB of memory: use a smaller model or a mesh with more "
            "devices, or train fewer of the weights"
        )


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None  # not every operating system reports it


def give_back() -> None:
    """Returns freed memory to the system, where the C library keeps it (glibc).

    XLA's compiler frees several hundred MB when it is done. Without this, they stay resident throughout the run.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
