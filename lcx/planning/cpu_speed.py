"""How fast this machine's CPUs are, measured where a plan needs it: no data sheet states what jax reaches on them."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.ops.product import product
from lcx.planning.topology import Chip

_ROWS = 1024  # of a product: as many as a small training step has tokens
_COPIED_BYTES = 1 << 27  # more than any cache holds
_SECONDS = 0.2  # for each of the two, after compilation
_FEWEST = 3


@functools.cache
def measured(devices: int, dtype: str) -> Chip:
    """One of so many CPU devices, which share this machine's cores and its memory's bandwidth.

    The products are of matrices in `dtype` as layers compute them. Takes a second, once in a process. Other work on the
    machine makes it slower: the best of several tries counts.
    """
    matrix = jnp.ones((_ROWS, _ROWS), dtype)
    products = jax.jit(lambda x, step: (product(x, matrix) * (1 / _ROWS)).astype(dtype))
    flops = 2.0 * _ROWS**3 / _best(products, matrix)
    copy = jax.jit(lambda x, step: x + step, donate_argnums=0)
    bandwidth = 2.0 * _COPIED_BYTES / _best(copy, jnp.zeros(_COPIED_BYTES // 4, jnp.float32))
    share = bandwidth / devices
    # What one device sends, another one reads: through the same memory.
    return Chip("this machine's CPU", 0, flops / devices, share, share / 2, share / 2)


def _best(step: Callable[..., Any], x: Any) -> float:
    """Seconds of the fastest of several calls, each of which takes what the one before it gave."""
    one = jnp.ones((), x.dtype)
    x = jax.block_until_ready(step(x, one))
    times, end = [], time.perf_counter() + _SECONDS
    while len(times) < _FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        x = jax.block_until_ready(step(x, one))
        times.append(time.perf_counter() - start)
    return min(times)
