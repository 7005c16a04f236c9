"""Which form of an operator runs: the one named, or the fastest that is valid on this platform and shape.

The names mean the same for every operator:

    reference   the definition, quadratic or step by step
    xla         chunked, in plain JAX: runs anywhere, differentiates, linear where the mathematics is
    triton      our Pallas kernel for GPUs, through Triton
    tpu         our Pallas kernel for TPUs
"""

import functools
import logging

import jax

from lcx.errors import UserError

log = logging.getLogger("lcx")


def platform() -> str:
    """One of cpu, gpu, tpu: that of the mesh that is set (also another machine's, to compile ahead), else jax's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def choose(operator: str, implementation: str | None, obstacles: dict[str, str | None]) -> str:
    """The name of the form to run.

    Args:
      obstacles: every form of the operator, the fastest first, with None or the reason why it cannot run here:
        ``{"triton": on("gpu"), "xla": None, "reference": None}``.

    Raises:
      UserError: an unknown name, or one with an obstacle.
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
    """None on one of these platforms, else the obstacle in words."""
    here = platform()
    return None if here in platforms else f"needs a {' or '.join(platforms)}, found {here}"


@functools.cache
def _say(operator: str, name: str, where: str) -> None:
    log.info("%s: %s on %s", operator, name, where)
