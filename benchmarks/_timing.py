"""Time that can be compared: everything in turns in one run, medians, against what the machine can do at most."""

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

from lcx import config

config.setup_jax()  # before jax is imported: programs are kept, and no accelerator is sought where there is none

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402


def on_device(compiled, *args) -> Callable[[int], float]:
    """n -> seconds for n calls. They are queued, so that what a launch costs is hidden behind the one before it."""

    def run(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


def in_turns(
    runs: dict[str, Callable[[int], float]], *, rounds: int, seconds: float, slow: float = math.inf
) -> dict[str, float]:
    """Median seconds a call. A, B, C, A, B, C, ...; each turn lasts about `seconds`, or one call if that is longer.

    What takes more than `slow` seconds the first time is not run again: that time is its result.
    """
    times = {name: [run(1)] for name, run in runs.items()}  # also the warm-up
    calls = {name: max(1, min(1000, math.ceil(seconds / first))) for name, (first,) in times.items()}
    repeated = {name: run for name, run in runs.items() if times[name][0] <= slow}
    times.update({name: [] for name in repeated})
    for _ in range(rounds):
        for name, run in repeated.items():
            times[name].append(run(calls[name]) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def ceilings() -> dict[str, float]:
    """What this machine reaches: bytes/s of a copy that no cache holds, FLOP/s of one large matrix product."""
    accelerator = jax.default_backend() != "cpu"
    size = 2**30 if accelerator else 2**28  # bytes
    side, dtype = (8192, "bfloat16") if accelerator else (1536, "float32")
    x = jnp.ones(size // 4, jnp.float32)
    a = jnp.ones((side, side), dtype)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    runs = {"copy": on_device(copy, x), "product": on_device(product, a)}
    times = in_turns(runs, rounds=5, seconds=0.1)
    return {
        "copy_bytes_per_second": 2 * size / times["copy"],
        "product_flops_per_second": 2 * side**3 / times["product"],
        "product_dtype": dtype,
    }


def device_name() -> str:
    """For a file name: nvidia_h200, tpu_v5_lite, cpu."""
    kind = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else "cpu"
    return kind.lower().replace(" ", "_")


def machine() -> dict:
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "commit": commit,
    }


def growth(by_length: dict[int, float]) -> float | None:
    """The exponent p of time ~ T^p between the shortest and the longest T, from seconds per token."""
    if len(by_length) < 2:
        return None
    a, b = min(by_length), max(by_length)
    return 1 + math.log(by_length[b] / by_length[a]) / math.log(b / a)
