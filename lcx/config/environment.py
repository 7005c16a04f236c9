"""Defaults for the environment variables that jax reads when it is imported."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import sys
import time

from lcx.config.flags import hint
from lcx.errors import UserError, first_line

# Device files of NVIDIA GPUs, NVIDIA GPUs under WSL, AMD GPUs, TPUs up to v4, later TPUs.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")

CACHE_BYTES = 2 << 30
MOST_CPU_DEVICES = 4096


def setup_jax() -> None:
    """Sets defaults for jax. Must run before jax is imported. Variables that the user has set are not changed.

    - All compiled programs, including small ones, are cached in JAX_COMPILATION_CACHE_DIR (default ~/.cache/lcx/xla),
      so a second run starts in a fraction of the time. The default folder keeps JAX_COMPILATION_CACHE_MAX_SIZE bytes
      (default 2 GiB; -1: no limit, 0: no cache) of what was used last. Several processes may use it at once.
    - With more CPU devices than cores (a mesh tried out on a laptop), collectives deadlock if the thread pool is too
      small. NPROC sets its size.
    - libtpu and the CUDA plugin may be installed only for ahead-of-time compilation (the extra `aot`). If there is no
      accelerator, jax is told to use the CPU; it would find that out by itself, but only after pages of warnings.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lcx", "xla")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
        _drop_unfinished(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = 1
    with contextlib.suppress(ValueError):  # not a number: jax refuses it, and `blamed` names it
        devices = int(os.environ.get("JAX_NUM_CPU_DEVICES") or (forced[-1] if forced else 1))
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(max(32, 4 * devices)))
    compilers = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(importlib.util.find_spec(name) for name in compilers) and not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def blamed(error: Exception) -> str | None:
    """One line if jax has refused the value of an environment variable; None for any other exception."""
    text = first_line(error)
    if not any(sign in text for sign in ("JAX flag", "initialize backend", "for environment 'JAX_")):
        return None
    for name, value in os.environ.items():
        if name == "JAX_PLATFORMS" and value == "cpu":  # which every jax has: something else is wrong
            continue
        if name.startswith("JAX_") and value and re.search(rf"['\"]{re.escape(value)}['\"]", text):
            return f"{name} is {value!r}, which jax refuses ({text}): change or unset {name}"
    return None


def check() -> None:
    """Raises UserError for a number of CPU devices that cannot be; jax would take it, and stop or hang later."""
    given = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    number = re.fullmatch(r"\s*([+-]?\d+)\s*", given)  # jax refuses other texts, and `blamed` names them
    if number and int(number[1]) != -1 and not 1 <= int(number[1]) <= MOST_CPU_DEVICES:  # -1: not set
        raise UserError(f"JAX_NUM_CPU_DEVICES is {given}, expected 1 to {MOST_CPU_DEVICES}: change or unset it")


def misspelt() -> list[str]:
    """One line for each variable that jax does not know, but whose name is close to one that it knows.

    jax ignores such a variable. Those with other names may belong to another program.
    """
    jax = sys.modules.get("jax")
    if jax is None:
        return []
    known = [name.upper() for name in getattr(jax.config, "values", {}) if name.startswith("jax_")]
    return [
        f"{name} has no effect: jax does not know it{hint(name, known, cutoff=0.85)}"
        for name in os.environ
        if name.startswith("JAX_") and name not in known and hint(name, known, cutoff=0.85)
    ]


def has_accelerator() -> bool:
    """Whether this machine has a GPU or TPU, by its device files."""
    return any(glob.glob(f"/dev/{name}") for name in ACCELERATORS)


def _drop_unfinished(cache: str) -> None:
    """Removes programs without a time of use: jax cannot store anything beside one while the size is limited.

    A process that was killed leaves them behind, and so does a cache that had no limit before.
    """
    for path in glob.glob(os.path.join(glob.escape(cache), "*-cache")):
        with contextlib.suppress(OSError):  # another process has removed it
            recent = time.time() - os.stat(path).st_mtime < 60  # another process may be about to finish it
            if not recent and not os.path.exists(path.removesuffix("-cache") + "-atime"):
                os.remove(path)
