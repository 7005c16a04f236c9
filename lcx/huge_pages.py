"""Pages of 2 MB for the memory of a command that computes on a CPU: a training step takes up to 14% less time.

XLA's CPU programs get their temporary memory from the C library at each call, and give it back after it. With pages of
4 KB the kernel then clears and maps tens of thousands of pages in a step. glibc asks for large pages only if its
tunable says so when a process starts, so the command starts itself again with it, before anything is imported.
"""

import os
import pathlib
import signal
import sys

TUNABLES, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_COMMANDS = ("train", "evaluate", "score", "embed", "variants", "generate", "serve", "lm_eval")
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def use() -> None:
    """In `python -m lcx.<command>`, starts the same command again if it needs the tunable and does not have it.

    Nothing happens on a machine with accelerators unless JAX_PLATFORMS is cpu, where the kernel gives large pages to
    all (or to none), with another C library than glibc 2.35 or later, or if the tunable is set already, to any value.
    """
    flags = sys.orig_argv
    module = flags[flags.index("-m") + 1 : flags.index("-m") + 2] if "-m" in flags else []
    if sys.argv[:1] != ["-m"] or not module or module[0] not in {f"lcx.{name}" for name in _COMMANDS}:
        return
    if {"-h", "--help"} & set(flags) or not sys.executable or not wanted(os.environ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return
    # Ctrl-C waits until the new process can end with one line (startup.guard), where the line above lets it through.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.execve(sys.executable, [sys.executable, *flags[1:]], with_tunable(os.environ))


def wanted(environment: os._Environ | dict[str, str]) -> bool:
    """Whether a process with this environment would compute on a CPU whose kernel gives large pages when asked."""
    if SETTING in environment.get(TUNABLES, "") or _glibc() < (2, 35):
        return False
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms != "cpu" and (platforms or any(os.path.exists(device) for device in _ACCELERATORS)):
        return False
    try:
        return "[madvise]" in _KERNEL.read_text()
    except OSError:
        return False


def with_tunable(environment: os._Environ | dict[str, str]) -> dict[str, str]:
    tunables = [*filter(None, [environment.get(TUNABLES)]), f"{SETTING}=1"]
    return {**environment, TUNABLES: ":".join(tunables)}


def _glibc() -> tuple[int, ...]:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else (0,)
    except (AttributeError, OSError, ValueError):  # not a system with glibc
        return (0,)
