"""Kills one process of a training run at a random call of a random function, again and again.

    python scripts/soak_moments.py --processes=2 --faults=40 --output=FILE.json

scripts/soak.py draws a time; most of a run's time is spent in its steps. Here the moment is drawn by what the process
does: first a file of lcx, Orbax, grain or jax's code for several processes, then a function that is called in it, then
one of its calls. So start-up, comparing hosts, reading data, restoring, steps, evaluations, saves and the end are each
hit about equally often, at a moment that does not depend on the speed of the machine.

After each fault all other processes must end within a minute, with status 75 and one line that begins with `error:`,
and without a traceback. The same command starts again, with the next fault; a run that comes to its end must equal the
undisturbed one to the bit, and the next one begins anew. With --halt, one fault in eight is a SIGSTOP.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import soak

HERE = pathlib.Path(__file__).parent
STATUS = 75
LAST = 9
CHANGES = """
trainer.Trainer.eval_every = 3
trainer.Trainer.keep_checkpoints = 2
"""
RUN_S = 900  # for a whole run


@dataclasses.dataclass(frozen=True)
class Moment:
    """A signal at so many-th call of a function in one of the processes; or, with `count`, the file to count into."""

    process: int = 0
    function: str = ""
    call: int = 0
    signal: int = int(signal.SIGKILL)
    count: str | None = None


class World(soak.World):
    """The processes of a run with moments for some of them."""

    def __init__(self, folder: pathlib.Path, workdir: pathlib.Path, count: int, moments: list[Moment], stop_at: int):
        self._files = {}
        for moment in moments:
            self._files[moment.process] = folder / f"moment-{moment.process}.json"
            self._files[moment.process].write_text(json.dumps(dataclasses.asdict(moment)))
        super().__init__(folder / "soak.gin", workdir, count, f"--gin.Trainer.stop_at={stop_at}")

    def program(self, process: int) -> list[str]:
        file = self._files.get(process)
        return super().program(process) if file is None else [sys.executable, str(HERE / "soak_victim.py"), str(file)]


def census(folder: pathlib.Path, count: int) -> dict[int, dict[str, int]]:
    """{process: {function: calls}} of a run that is stopped in the middle, and goes on; it is the undisturbed one."""
    calls: dict[int, collections.Counter[str]] = {i: collections.Counter() for i in range(count)}
    for stop_at in (LAST // 2, LAST):
        files = [folder / f"count-{i}.json" for i in range(count)]
        moments = [Moment(i, count=str(file)) for i, file in enumerate(files)]
        world = World(folder, folder / "undisturbed", count, moments, stop_at)
        if not world.ended(RUN_S) or any(world.statuses()):
            world.kill()
            raise SystemExit(f"the undisturbed run failed: {world.said(0)[-3000:]}")
        for i, file in enumerate(files):
            calls[i] |= collections.Counter(json.loads(file.read_text()))  # the larger number of calls
    return {i: dict(found) for i, found in calls.items()}


def drawn(calls: dict[int, dict[str, int]], rng: random.Random, halt: bool, only: str) -> Moment:
    process = rng.randrange(len(calls))
    by_file = collections.defaultdict(list)
    for function in sorted(calls[process]):
        if only in function:
            by_file[function.partition(":")[0]].append(function)
    function = rng.choice(by_file[rng.choice(sorted(by_file))])
    number = signal.SIGSTOP if halt and rng.random() < 0.125 else signal.SIGKILL
    return Moment(process, function, rng.randint(1, calls[process][function]), int(number))


def struck(world: World, moment: Moment) -> soak.Outcome | None:
    """What the fault did; None if the moment did not come."""
    victim, start = world.processes[moment.process], time.monotonic()
    others = [process for process in world.processes if process is not victim]
    while not _is_struck(victim) and victim.poll() is None and time.monotonic() - start < RUN_S:
        time.sleep(0.02)
    outcome, start = soak.Outcome("kill" if moment.signal == signal.SIGKILL else "halt"), time.monotonic()
    while any(process.poll() is None for process in others) and time.monotonic() - start < soak.END_WITHIN_S:
        time.sleep(0.02)
    outcome.seconds = time.monotonic() - start
    alive = sum(process.poll() is None for process in others)
    ended = victim.poll()
    world.kill()
    if ended == 0 and not any(world.statuses()):
        return None
    for i, process in enumerate(world.processes):
        if process is victim and ended in (None, -signal.SIGKILL):
            continue
        said = world.said(i)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if alive or process.returncode != STATUS or len(lines) != 1 or "Traceback" in said:
            outcome.wrong += f"process {i}: status {process.returncode}, {said[-3000:]}\n"
    return outcome


def say(moment: Moment, outcome: soak.Outcome) -> None:
    where = f"process {moment.process} at call {moment.call} of {moment.function}"
    wrong = f"; WRONG: {outcome.wrong}" if outcome.wrong else ""
    print(f"{outcome.kind} of {where}: all ended within {outcome.seconds:.1f} s{wrong}", flush=True)


def _is_struck(process) -> bool:
    """Whether a process was killed, or is stopped."""
    if process.poll() is not None:
        return process.returncode == -signal.SIGKILL
    try:
        return pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, metavar="N")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--halt", action="store_true", help="also SIGSTOP")
    parser.add_argument("--only", default="", metavar="TEXT", help="functions whose file:name contains this")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to which the results are added")
    flags = parser.parse_args(argv)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="lcx-moments-"))
    text = soak.GIN.format(folder=folder, width=32, twice=64, checkpoint_every=3)
    (folder / "soak.gin").write_text(text.replace("log_every = 50", "log_every = 1") + CHANGES)
    os.environ["LCX_CACHE"] = str(folder / "lcx-cache")
    begun = time.monotonic()
    calls = census(folder, flags.processes)
    undisturbed = time.monotonic() - begun
    expected = soak.fingerprints(folder / "undisturbed", LAST)
    rng, outcomes, ended = random.Random(flags.seed), list[soak.Outcome](), 0
    equal, workdir = True, folder / "disturbed"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while ended < flags.faults:
            moment = drawn(calls, rng, flags.halt, flags.only)
            outcome = struck(World(folder, workdir, flags.processes, [moment], LAST), moment)
            if outcome is not None:
                outcomes.append(outcome)
                say(moment, outcome)
            if soak.steps_of(workdir)[-1:] == [LAST]:
                equal &= soak.fingerprints(workdir, LAST) == expected
                ended = len(outcomes)
                print(f"{ended} faults: {'equal to the bit' if equal else 'DIFFERENT'}", flush=True)
                shutil.rmtree(workdir)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not find the results half written
        print("stopped; the faults since the last run that came to its end do not count", flush=True)
    outcomes = outcomes[:ended]
    row = soak.Row(flags.processes, flags.seed, 0, LAST, outcomes, undisturbed, time.monotonic() - begun, equal)
    if flags.output:
        soak.add(flags.output, row)
    shutil.rmtree(folder)
    return int(not equal or any(one.wrong for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
