"""Disturbs training runs of several process counts and checks that nothing is lost; bash scripts/soak.sh runs it.

For each process count an undisturbed run trains for as long as the faults will take, and is stopped by SIGTERM. Then
the same run is disturbed, every --every seconds by one of these, until it has done the same number of steps:

    kill   one process gets SIGKILL: the others must end with one line and a status other than 0
    halt   one process gets SIGSTOP, as a host that loses its network: likewise (with several processes)
    term   one process gets SIGTERM: all must save the same step and end with status 0
    disk   no process can write files of more than 4 KB for a while: the run must go on; only if its last checkpoint is
           due in that time, it must end with one line that says that it was not written (RLIMIT_FSIZE)
    flip   all processes get SIGKILL, and one bit of the newest checkpoint is inverted: an older one must be used

With --bucket the workdir of the disturbed run is in a bucket of a server on 127.0.0.1 (scripts/soak_bucket.py), and two
faults are added:

    bucket for a while the server answers every request with 503, or after a second: the run must go on
    lost   all processes get SIGKILL, and the folder on this machine is removed: the bucket must be enough to go on

After each fault that ends the processes, the same command starts again. At the end the fingerprints of all arrays must
equal those of the undisturbed run. Goodput: the seconds of the undisturbed run over those of the disturbed one, both
with starts and compilations. If the whole machine is stopped meanwhile (a laptop that sleeps), all processes miss the
heartbeats of the others: they are started again, and that is counted apart.

The results state the load of the machine at each fault, these processes included. With other work beside them what
happened and the equality of parameters are as valid as ever; goodput and the seconds are not.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import soak_bucket

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAULTS = ("kill", "term", "flip", "disk", "halt")
IN_BUCKETS = ("bucket", "lost")
HEARTBEAT_S = 20  # of silence, until a process counts as lost
END_WITHIN_S = 60  # after a fault, for all other processes to end
STOPPED_S = 8  # between two looks of this script: it was stopped, and with it the whole machine
ENDED_FULL = ("error: checkpoint of step", "error: not all of the run is in")  # where the disk is full at the end
GIN = """
from __gin__ import dynamic_registration
from lcx import data
from lcx import model
from lcx import optim
from lcx import sharding
from lcx import trainer

trainer.train.job = @trainer.Trainer()
trainer.Trainer.mesh = @sharding.MeshShape()
trainer.Trainer.model = @model.llama()
trainer.Trainer.data = @data.Dataset()
trainer.Trainer.optimizer = @optim.AdamW()
trainer.Trainer.steps = 1000000
trainer.Trainer.batch_size = 8
trainer.Trainer.seq_len = 64
trainer.Trainer.log_every = 50
trainer.Trainer.checkpoint_every = {checkpoint_every}
trainer.Trainer.eval_batches = 1
optim.AdamW.learning_rate = 1e-3
optim.AdamW.warmup_steps = 20
optim.AdamW.schedule = 'constant'
data.Dataset.source = 'stdlib'
data.Dataset.cache_dir = '{folder}/cache'
model.llama.vocab_size = 258
model.llama.hidden_size = {width}
model.llama.intermediate_size = {twice}
model.llama.num_layers = 2
model.llama.num_heads = 4
model.llama.num_kv_heads = 2
model.llama.max_position_embeddings = 64
"""


@dataclasses.dataclass
class Outcome:
    """What a fault did: seconds until all processes had ended (None: they went on), and what went wrong.

    `load` is the machine's in the minute before the fault: processes that wanted to run, for each core.
    """

    kind: str
    seconds: float | None = None
    wrong: str = ""
    load: float = dataclasses.field(default_factory=lambda: round(os.getloadavg()[0] / (os.cpu_count() or 1), 1))


@dataclasses.dataclass
class Row:
    """One pair of runs, the undisturbed one and the disturbed one."""

    processes: int
    seed: int
    every: float
    steps: int
    outcomes: list[Outcome]
    undisturbed_seconds: float
    disturbed_seconds: float
    equal: bool  # the fingerprints of all arrays of the last checkpoint
    bucket: bool = False  # whether the disturbed run's workdir was in one
    heartbeat: int = HEARTBEAT_S


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is kept: its --workdir, the folder on this machine, and the bucket's server if it is in one."""

    given: str
    folder: pathlib.Path
    bucket: soak_bucket.Bucket | None = None


class World:
    """The processes of one run. `heartbeat` is their --heartbeat_timeout."""

    heartbeat = HEARTBEAT_S

    def __init__(self, gin_file: pathlib.Path, workdir: str | pathlib.Path, count: int, *flags: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
        self.processes = []
        self.stopped = False  # whether the whole machine has been
        self._looked = time.monotonic()
        self._said: list[list[str]] = [[] for _ in range(count)]
        self._readers = []
        for i, lines in enumerate(self._said):
            several = [address, f"--num_processes={count}", f"--process_id={i}"]
            several.append(f"--heartbeat_timeout={self.heartbeat}")
            command = [*self.program(i), f"--gin_file={gin_file}", f"--workdir={workdir}", *flags]
            process = subprocess.Popen(
                command + (several if count > 1 else ["--no-distributed"]),
                env=_environment(),
                stdout=subprocess.PIPE,  # and not a file, which would be full with the disk
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.processes.append(process)
            self._readers.append(threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True))
            self._readers[-1].start()

    def program(self, process: int) -> list[str]:
        """What this process runs, up to its flags."""
        return [sys.executable, "-m", "lcx.train"]

    def running(self) -> bool:
        now = time.monotonic()
        self.stopped |= now - self._looked > STOPPED_S
        self._looked = now
        return any(process.poll() is None for process in self.processes)

    def ended(self, seconds: float) -> bool:
        """Whether all processes end within this time."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.running()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def statuses(self) -> list[int]:
        return [process.wait() for process in self.processes]

    def said(self, i: int) -> str:
        """What a process has printed. Call it when it has ended."""
        self._readers[i].join(10)
        return "".join(self._said[i])


def _environment() -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1".strip()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags}


def steps_of(workdir: pathlib.Path) -> list[int]:
    from lcx.checkpoint.folder import committed_steps

    return committed_steps(workdir / "checkpoints")


def fingerprints(workdir: pathlib.Path, step: int) -> dict[str, dict[str, int]]:
    """{item: {array: fingerprint}} of a checkpoint, as its record has them; restoring verified them."""
    from lcx.checkpoint import read_record

    arrays = read_record(workdir / "checkpoints" / str(step)).arrays
    return {item: {name: entry.fingerprint for name, entry in entries.items()} for item, entries in arrays.items()}


def wait_for_step(world: World, workdir: pathlib.Path, beyond: int, *, least: int = 1, seconds: float = 900) -> bool:
    """Waits until a checkpoint beyond this step is there, and `least` in all; False if the processes end first."""
    deadline = time.monotonic() + seconds
    while len(found := steps_of(workdir)) < least or found[-1] <= beyond:
        if not world.running():
            return False
        if time.monotonic() > deadline:
            world.kill()
            raise SystemExit(f"no checkpoint within {seconds} s: {world.said(0)[-2000:]}")
        time.sleep(0.05)
    return True


def disturb(kind: str, world: World, place: Place, rng: random.Random) -> Outcome:
    victim = rng.randrange(len(world.processes))
    outcome, start = Outcome(kind), time.monotonic()
    if kind == "disk":
        _full_disk(world, rng.uniform(3, 8))
        if not world.running() and any(world.statuses()):
            errors = [line for line in world.said(0).splitlines() if line.startswith("error: ")]
            if len(errors) != 1 or not errors[0].startswith(ENDED_FULL):
                outcome.wrong = f"the run ended: {world.said(0)[-500:]}"
        return outcome
    if kind == "bucket":
        assert place.bucket is not None
        place.bucket.storm(rng)
        world.ended(rng.uniform(3, 8))
        place.bucket.weather = ""
        if not world.running() and any(world.statuses()):
            outcome.wrong = f"the run ended: {world.said(0)[-500:]}"
        return outcome
    if kind in ("flip", "lost"):
        world.kill()
        if kind == "flip":
            _flip(place.folder, rng)
        else:
            shutil.rmtree(place.folder)
        return dataclasses.replace(outcome, seconds=0.0)
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "halt": signal.SIGSTOP}[kind]
    os.kill(world.processes[victim].pid, number)
    others = [process for i, process in enumerate(world.processes) if i != victim or kind == "term"]
    while any(process.poll() is None for process in others) and time.monotonic() - start < END_WITHIN_S:
        time.sleep(0.02)
    outcome.seconds = time.monotonic() - start
    alive = sum(process.poll() is None for process in others)
    world.kill()
    statuses = world.statuses()
    if alive and outcome.seconds > END_WITHIN_S + STOPPED_S:
        return Outcome("stopped")  # and this script with it, past the time that it gives the others
    if alive:
        outcome.wrong = f"{alive} processes went on for {END_WITHIN_S} s"
    elif kind == "term" and any(statuses):
        outcome.wrong = f"statuses {statuses}: {world.said(victim)[-500:]}"
    elif kind != "term":
        for i in set(range(len(statuses))) - {victim}:
            lines = [line for line in world.said(i).splitlines() if line.startswith("error: ")]
            if not statuses[i] or len(lines) != 1:
                outcome.wrong = f"process {i}: status {statuses[i]}, lines {lines}"
    return outcome


def _full_disk(world: World, seconds: float) -> None:
    """Lets no process write files of more than 4 KB for a while."""
    for full in (True, False):
        for process in world.processes:
            if process.poll() is None:
                hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096 if full else hard, hard))
        if full:
            world.ended(seconds)


def _flip(workdir: pathlib.Path, rng: random.Random) -> None:
    """Inverts one bit in a random file of the newest checkpoint; arrays are more likely than documents, by size."""
    folder = workdir / "checkpoints" / str(steps_of(workdir)[-1])
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    path = rng.choices(files, [path.stat().st_size for path in files])[0]
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def undisturbed(gin_file: pathlib.Path, workdir: pathlib.Path, count: int, seconds: float) -> tuple[int, float]:
    """(steps, seconds) of a run that is stopped by SIGTERM so many seconds after its first checkpoint."""
    start = time.monotonic()
    world = World(gin_file, workdir, count)
    if wait_for_step(world, workdir, 0):
        world.ended(seconds)
        if world.running():
            os.kill(world.processes[-1].pid, signal.SIGTERM)
        if world.ended(END_WITHIN_S) and not any(world.statuses()):
            return steps_of(workdir)[-1], time.monotonic() - start
    world.kill()
    if not world.stopped:
        raise SystemExit(f"the undisturbed run failed: {world.said(0)[-2000:]}")
    print("the machine was stopped: the undisturbed run starts again", flush=True)
    shutil.rmtree(workdir, ignore_errors=True)
    return undisturbed(gin_file, workdir, count, seconds)


def disturbed(
    gin_file: pathlib.Path,
    place: Place,
    count: int,
    *,
    last: int,
    every: float,
    plan: list[str],
    rng: random.Random,
) -> tuple[list[Outcome], float]:
    """(what the faults did, seconds) of a run to the same step."""
    outcomes, start, flag = [], time.monotonic(), f"--gin.Trainer.stop_at={last}"
    due, newest = start + every, 0
    world = World(gin_file, place.given, count, flag)
    while plan:
        newest = max([newest, *steps_of(place.folder)])  # a folder that was removed is first filled from the bucket
        # Every start gets on, so that the run comes to its end; two checkpoints, so that one may be damaged.
        going = wait_for_step(world, place.folder, newest, least=2)
        if not going or world.ended(max(0.0, due - time.monotonic() + rng.uniform(-0.2, 0.2) * every)):
            if not (world.stopped and any(world.statuses())):
                break
            outcomes.append(Outcome("stopped"))
            _say(count, outcomes[-1])
            world = World(gin_file, place.given, count, flag)
            continue
        if last in steps_of(place.folder):
            break  # all is done: what follows could not be lost
        outcomes.append(disturb(plan.pop(0), world, place, rng))
        due = max(due + every, time.monotonic())
        _say(count, outcomes[-1])
        if not world.running():
            world = World(gin_file, place.given, count, flag)
    while not world.ended(3600) or any(world.statuses()):
        world.kill()
        if world.stopped:
            outcomes.append(Outcome("stopped"))
            world = World(gin_file, place.given, count, flag)
            continue
        raise SystemExit(f"the run did not come to its end: {world.said(0)[-2000:]}")
    return outcomes, time.monotonic() - start


def _say(count: int, outcome: Outcome) -> None:
    took = "" if outcome.seconds is None else f", all ended within {outcome.seconds:.1f} s"
    print(f"{count} x {outcome.kind}{took}{'; WRONG: ' if outcome.wrong else ''}{outcome.wrong}", flush=True)


def copied_from(bucket: str, folder: pathlib.Path, step: int) -> pathlib.Path:
    """A workdir with what the bucket holds of this step; every array of it is read and checked."""
    from lcx.buckets import client
    from lcx.checkpoint import read_record
    from lcx.checkpoint.slices import StepReader

    start = f"checkpoints/{step}/"
    names = [name for name in client.listing(bucket) if name.startswith(start)]
    client.download(bucket, [(name, folder / name) for name in names])
    for item in read_record(folder / start).arrays:
        reader = StepReader(folder / start, item)
        for path in reader.arrays:
            reader.verify(path)
    return folder


def table(rows: list[Row]) -> str:
    """The results as two Markdown tables."""
    lines = ["| processes | faults | steps | undisturbed | disturbed | goodput | parameters |", "|---" * 7 + "|"]
    for row in rows:
        before, after = row.undisturbed_seconds, row.disturbed_seconds
        equal = "equal to the bit" if row.equal else "DIFFERENT"
        lines.append(
            f"| {row.processes} | {len(row.outcomes)} | {row.steps} | {before:.0f} s | {after:.0f} s "
            f"| {before / after:.0%} | {equal} |"
        )
    lines += ["", "| processes | fault | times | as expected | all ended after (median, longest) |", "|---" * 5 + "|"]
    for row in rows:
        of_kind = collections.defaultdict(list)
        for outcome in row.outcomes:
            of_kind[outcome.kind].append(outcome)
        for kind, found in sorted(of_kind.items()):
            seconds = [one.seconds for one in found if one.seconds is not None]
            took = f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s" if seconds else "the run went on"
            good = sum(not one.wrong for one in found)
            lines.append(f"| {row.processes} | {kind} | {len(found)} | {good} | {took} |")
    return "\n".join(lines)


def add(file: pathlib.Path, row: Row) -> None:
    """Adds a pair of runs to the results in a file."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    text = ",\n  ".join(json.dumps(one) for one in [*rows, dataclasses.asdict(row)])
    whole = file.with_name(f"{file.name}.tmp")
    whole.write_text(f'{{"rows": [\n  {text}\n]}}\n')
    whole.replace(file)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60, metavar="N", help="over all process counts (default: 60)")
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="between faults (default: 60)")
    parser.add_argument("--processes", default="1,2,4", metavar="N,...", help="process counts (default: 1,2,4)")
    parser.add_argument("--kinds", metavar="KIND,...", help="of faults (default: all that apply)")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the model (default: 64)")
    parser.add_argument("--checkpoint_every", type=int, default=50, metavar="STEPS", help="(default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=HEARTBEAT_S,
        metavar="SECONDS",
        help="of silence, until a process counts as lost; on a busy machine less is too little (default: %(default)s)",
    )
    parser.add_argument("--folder", metavar="DIR", help="where to work, kept (default: a temporary folder, removed)")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to which the results are added")
    parser.add_argument("--bucket", action="store_true", help="the disturbed run's workdir is in a bucket")
    flags = parser.parse_args(argv)
    World.heartbeat = flags.heartbeat
    if unknown := set((flags.kinds or "kill").split(",")) - {*FAULTS, *(IN_BUCKETS if flags.bucket else ())}:
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of the faults listed above, or needs --bucket")
    with soak_bucket.running() if flags.bucket else contextlib.nullcontext() as bucket:
        return soak(flags, bucket)


def soak(flags: argparse.Namespace, bucket: soak_bucket.Bucket | None) -> int:
    counts = [int(count) for count in flags.processes.split(",")]
    folder = pathlib.Path(flags.folder or tempfile.mkdtemp(prefix="lcx-soak-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    gin_file = folder / "soak.gin"
    sizes = {"width": flags.width, "twice": 2 * flags.width, "checkpoint_every": flags.checkpoint_every}
    gin_file.write_text(GIN.format(folder=folder, **sizes))
    os.environ["LCX_CACHE"] = str(folder / "lcx-cache")
    rng, rows = random.Random(flags.seed), list[Row]()
    for i, count in enumerate(counts):
        faults = flags.faults // len(counts) + (i < flags.faults % len(counts))
        kinds = [kind for kind in FAULTS + (IN_BUCKETS if bucket else ()) if kind != "halt" or count > 1]
        kinds = [kind for kind in kinds if kind in (flags.kinds or ",".join(kinds)).split(",")]
        plan = [kinds[j % len(kinds)] for j in range(faults)]
        rng.shuffle(plan)
        last, before = undisturbed(gin_file, folder / f"{count}-undisturbed", count, (faults + 0.5) * flags.every)
        place = _place(folder / f"{count}-disturbed", bucket)
        outcomes, after = disturbed(gin_file, place, count, last=last, every=flags.every, plan=plan, rng=rng)
        at_end = copied_from(place.given, folder / f"{count}-copied", last) if bucket else place.folder
        same = fingerprints(folder / f"{count}-undisturbed", last) == fingerprints(at_end, last)
        settings = {"bucket": bucket is not None, "heartbeat": flags.heartbeat}
        rows.append(Row(count, flags.seed, flags.every, last, outcomes, before, after, same, **settings))
        if flags.output:
            add(flags.output, rows[-1])
        print(f"\n{table(rows)}\n", flush=True)
    if flags.folder is None:
        shutil.rmtree(folder)
    return int(any(not row.equal or any(one.wrong for one in row.outcomes) for row in rows))


def _place(folder: pathlib.Path, bucket: soak_bucket.Bucket | None) -> Place:
    if bucket is None:
        return Place(str(folder), folder)
    from lcx.buckets import copies

    url = f"{bucket.url}/{folder.name}"
    return Place(url, copies.cache(url, "workdirs"), bucket)


if __name__ == "__main__":
    sys.exit(main())
