"""Chooses the implementation of an operator: the one named, or the fastest valid one for this platform and shape.

The names mean the same for every operator:

    reference   the definition, quadratic or step by step
    xla         chunked, in plain JAX: portable, differentiable, in linear time where the operator allows it
    triton      our Pallas kernel for GPUs, through Triton
    mosaic      our Pallas kernel for Hopper GPUs, through Mosaic GPU: where jax has no Triton any more, or by its name
    tpu         our Pallas kernel for TPUs
"""

import functools
import logging
import os
import pathlib
import re

import jax

from lcx.errors import UserError

log = logging.getLogger("lcx")


def platform() -> str:
    """cpu, gpu or tpu: the platform of the current mesh (which may be another machine's, see aot.py), else jax's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def shares_cores() -> bool:
    """Whether one device has several cores of a CPU: then an operation should be large enough to be divided."""
    if platform() != "cpu":
        return False
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    return cores >= 2 * jax.local_device_count()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16; False where the system does not tell."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def choose(operator: str, implementation: str | None, obstacles: dict[str, str | None]) -> str:
    """The name of the implementation to run.

    Args:
      operator: the operator's name, for messages.
      implementation: the name that the user set; None for the fastest valid one.
      obstacles: every implementation, fastest first, with None or the reason why it cannot run here:
        ``{"triton": on("gpu"), "xla": None, "reference": None}``.

    Raises:
      UserError: an unknown name, or the name of an implementation that cannot run here.
    """
    if implementation is None:
        name = next(name for name, obstacle in obstacles.items() if obstacle is None)
        _say(operator, name, platform())
        return name
    if implementation not in obstacles:
        expected = ", ".join(repr(name) for name in obstacles)
        raise UserError(f"{operator} implementation {implementation!r}: expected one of {expected}, or None")
    if obstacles[implementation] is not None:
        raise UserError(
            f"{operator} implementation {implementation!r}: {obstacles[implementation]}; "
            "leave implementation at None for the fastest that runs"
        )
    return implementation


def on(*platforms: str) -> str | None:
    """None on one of these platforms, otherwise the obstacle as text."""
    here = platform()
    return None if here in platforms else f"needs a {' or '.join(platforms)}, found {here}"


def kernels(target: str) -> str | None:
    """None if our Pallas kernels for "gpu" (through Triton), "mosaic" or "tpu" run here, otherwise the obstacle."""
    if obstacle := on("gpu" if target == "mosaic" else target):
        return obstacle
    from kernels_pallas import backends

    if target == "mosaic" and (obstacle := backends.no_hopper(_device_kind())):
        return obstacle
    return backends.missing(target)


def _device_kind() -> str:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0].device_kind if device is None else device.device_kind


@functools.cache
def _say(operator: str, name: str, where: str) -> None:
    log.info("%s: %s on %s", operator, name, where)
