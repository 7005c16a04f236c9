"""The ways from Pallas to a GPU, of which a jax may have one, the other or both, and why one is not to be had.

jax deprecates Triton from 0.11 on. A jax without it has `triton = None` here: the kernels through Triton can then be
imported but do not run, and those through Mosaic GPU take their place.
"""

import re

import jax

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None  # type: ignore[assignment]

FIRST_MOSAIC = (0, 11)  # layouts are inferred, and a CPU interprets wgmma and TMA
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # what has wgmma: neither Ampere nor Blackwell


def missing(platform: str) -> str | None:
    """Why kernels for this platform ("gpu": through Triton, "mosaic", "tpu") do not run with this jax, or None."""
    if platform == "gpu" and triton is None:
        return f"jax {jax.__version__} has no Triton backend; expected a jax before its removal, or 'mosaic'"
    if platform == "mosaic" and jax.__version_info__ < FIRST_MOSAIC:
        wanted = ".".join(map(str, FIRST_MOSAIC))
        return f"needs jax >= {wanted}, found {jax.__version__} (Python 3.12 and later have newer ones)"
    return None


def no_hopper(device_kind: str) -> str | None:
    """Why the kernels through Mosaic GPU do not run on this GPU, or None."""
    return None if HOPPER.search(device_kind) else f"needs a Hopper GPU (H100, H200), found {device_kind}"
