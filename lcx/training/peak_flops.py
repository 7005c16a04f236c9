"""What the machine could do: the peak that model FLOP utilisation (MFU) is measured against."""

import functools
import time

import jax
import jax.numpy as jnp

# Dense matrix products, FLOP/s per device in bfloat16, from the makers' data sheets; matched as substrings.
PEAKS = (
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v4", 275e12),
)


def peak_flops() -> float:
    """FLOP/s of all devices together: bfloat16 data sheet values, or, where there are none, a measured float32 product.

    Forced host devices share the cores, so the measured value counts once.
    """
    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS:
        if name in kind:
            return peak * jax.device_count()
    hosts = max(jax.process_count(), 1)
    return _measured() * (hosts if jax.default_backend() == "cpu" else jax.device_count())


@functools.cache
def _measured(size: int = 1024, seconds: float = 0.3) -> float:
    """The best of what fits into so many seconds: other work on the machine only ever slows a product down."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
