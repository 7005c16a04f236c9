"""Compiled programs that were planned before: what the compiler said of them, by the program that it was given.

The key is the program itself before compilation, so that a change of a setting, of lcx or of a library cannot bring
back an old answer; only the compiler's work is saved. Where a file cannot be read, the program is compiled again.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import zlib

KEPT = 100  # files; the oldest go
COMPILERS = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says.

    Attributes:
      peak: bytes of arguments, results, temporary arrays and the program.
      host: bytes of arrays that wait in the memory of the host.
      text: HLO; None if it refused the program because it does not fit.
    """

    peak: int
    host: int
    text: str | None


def key(program: str, topology: str) -> str:
    """Of a program as jax lowers it, for these devices and the installed compilers."""
    about = [program, topology, os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")]
    for name in COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about.append(f"{name} {importlib.metadata.version(name)}")
    return hashlib.sha256("\0".join(about).encode()).hexdigest()


def read(key: str) -> Compiled | None:
    """What was written under this key; None if nothing was, or it is damaged."""
    try:
        found = json.loads(gzip.decompress((_folder() / f"{key}.json.gz").read_bytes()))
        return Compiled(int(found["peak"]), int(found["host"]), found["text"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return None


def write(key: str, compiled: Compiled) -> None:
    """Keeps it, if the folder can be written to."""
    with contextlib.suppress(OSError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{key}.{os.getpid()}.new"
        new.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 1))
        new.replace(folder / f"{key}.json.gz")
        for old in sorted(folder.glob("*.json.gz"), key=os.path.getmtime)[:-KEPT]:
            old.unlink()


def _folder() -> pathlib.Path:
    """Beside jax's cache of compiled programs, see config.setup_jax."""
    beside = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/lcx/xla")
    return pathlib.Path(beside).parent / "plans"
