"""What jax reads from the environment when it is imported."""

from __future__ import annotations

import glob
import importlib.util
import os
import re

# Device files of NVIDIA, the same in WSL, AMD, TPUs up to v4, later TPUs.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")


def setup_jax() -> None:
    """Sets defaults for jax. Must run before jax is imported; leaves alone what the user has set.

    - Compiled programs are kept in JAX_COMPILATION_CACHE_DIR (default ~/.cache/lcx/xla), small ones too: a
      second run starts in a fraction of the time.
    - With more CPU devices than cores (meshes tried on a laptop) collectives wait for each other for ever on
      too small a thread pool, whose size is NPROC.
    - libtpu may be there only to compile with (the extra aot). Where no accelerator is in sight, jax is told so:
      it would find out by itself, but not without pages of warnings.
    """
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lcx", "xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(os.environ.get("JAX_NUM_CPU_DEVICES") or (forced[-1] if forced else 1))
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(max(32, 4 * devices)))
    if importlib.util.find_spec("libtpu") and not any(glob.glob(f"/dev/{name}") for name in ACCELERATORS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
