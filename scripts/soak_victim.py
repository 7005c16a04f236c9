"""Runs lcx.train, and sends this process a signal when a function is called: scripts/soak_moments.py starts it.

    python scripts/soak_victim.py MOMENT.json --gin_file=...

MOMENT.json holds {"function": "lcx/trainer.py:Trainer.run", "call": 3, "signal": 9, "count": null}: SIGKILL at the
third call. If "count" is a file, the calls of each function are counted instead, and written to it at the end.

Calls are counted from the moment at which the processes begin to join each other, and at least one other process knows
of this one: before that, a process that is gone cannot be told from one that still starts.
"""

import atexit
import collections
import json
import os
import pathlib
import runpy
import sys
import threading
from types import CodeType, FrameType

from lcx.multihost import join as multihost
from lcx.multihost import rollcall

# Where a process is in the middle of something that involves the others: lcx itself, and the parts of libraries that
# save, restore and wait for other processes.
COUNTED = (
    *("lcx/", "orbax/checkpoint/", "grain/_src/python/"),
    *("jax/experimental/multihost_utils", "jax/_src/distributed"),
)


def name(code: CodeType) -> str | None:
    """ "lcx/trainer.py:Trainer.run" for a function that is counted."""
    for part in COUNTED:
        if (at := code.co_filename.rfind(f"/{part}")) >= 0:
            return f"{code.co_filename[at + 1 :]}:{code.co_qualname}"
    return None


def count_into(path: str):
    counts: collections.Counter[CodeType] = collections.Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            counts[frame.f_code] += 1

    def write() -> None:
        found: collections.Counter[str] = collections.Counter()
        for code, calls in list(counts.items()):
            if (function := name(code)) is not None:
                found[function] += calls
        pathlib.Path(path).write_text(json.dumps(found))

    atexit.register(write)
    return count


def end_at(function: str, call: int, number: int):
    file, _, wanted = function.partition(":")
    left = [call]

    def end(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_qualname == wanted and name(frame.f_code) == function:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

    return end


def main() -> None:
    moment = json.loads(pathlib.Path(sys.argv.pop(1)).read_text())
    if moment["count"] is not None:
        hook = count_into(moment["count"])
    else:
        hook = end_at(moment["function"], moment["call"], moment["signal"])
    join = multihost.join

    def look_and_join(*arguments) -> None:
        assert rollcall._part is not None
        rollcall._part.known.wait()
        threading.setprofile(hook)
        sys.setprofile(hook)
        join(*arguments)

    multihost.join = look_and_join
    runpy.run_module("lcx.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
