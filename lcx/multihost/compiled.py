"""Every host keeps its compiled programs.

jax lets process 0 alone write to its cache of compiled programs, for folders that all hosts share. In a folder on each
host's own disk the other hosts never find anything, and compile the training step again at every start. On CPUs not
even a shared folder helps, as the programs of each process have names of their own.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

log = logging.getLogger("lcx")


def keep_on_every_host() -> None:
    """From now on, this process writes the programs that it compiles to jax's cache, whichever process it is.

    Only where several processes may write the same file: on CPUs it is not the same one, and otherwise jax locks a
    folder that has a size limit, as lcx's own has (lcx/config/environment.py). In buckets, in other folders, and with a
    jax that has other names for these functions, process 0 writes alone, as ever.
    """
    try:
        import jax
        from jax._src import compilation_cache, compiler, distributed

        write: Any = compiler._cache_write
        put = compilation_cache.put_executable_and_time
        settings: Any = jax.config
        folder, limit = settings.jax_compilation_cache_dir, settings.jax_compilation_cache_max_size
        least = settings.jax_persistent_cache_min_compile_time_secs
    except (ImportError, AttributeError):
        return
    by_lock = limit != -1 or jax.default_backend() == "cpu"
    if not folder or "://" in folder or not by_lock or getattr(write, "on_every_host", False):
        return

    @functools.wraps(write)
    def everywhere(key: str, seconds: float, name: str, backend: Any, program: Any, *callbacks: Any) -> None:
        write(key, seconds, name, backend, program, *callbacks)  # jax 0.12 has no callbacks here
        if distributed.global_state.process_id == 0 or any(callbacks) or seconds < least:
            return
        try:
            put(key, name, program, backend, int(seconds))
        except Exception as error:  # as for process 0: the next start compiles again
            log.warning("the program %s is not kept in %s: %s", name, folder, error)

    everywhere.on_every_host = True  # type: ignore[attr-defined]
    compiler._cache_write = everywhere  # type: ignore[assignment]
