"""Time that can be compared: the sides take turns, and the machine is watched meanwhile.

    run = harness.Run("a training step", threads={"lcx": harness.jax_threads(), "torch": {"threads": 2}})
    turns = run.turns({"lcx": harness.calls(ours), "torch": peer.side({"run": "step"})}, rounds=7)
    row = {"ms": 1e3 * turns.seconds("lcx"), "speed_over_torch": turns.ratio("torch", "lcx")}
    run.write("benchmarks/results/step_cpu.json", rows=[row])

A side is a function n -> seconds for n calls: `calls(fn)` and `on_device(compiled, *args)` make one from a callable of
this process, `Child.side(request)` from a process that lives as long as the benchmark and times itself (workers.py has
processes for whole sides). One call of each warms up; then every round calls each side once, A B, B A, A B, ..., and
the ratio is taken within each round.

What every file of results holds (`Run.record`): the machine, versions, commit, thread counts of each side, the load
before, and the CPU seconds that *other* processes used during the turns: all that the machine was busy, less this
process and its children, and what a child used while it was not its turn, such as threads that spin. Above 5% of the
machine's CPUs, or 15% in one measurement, the file says `"quiet": false`, and scripts/docs_figures.py refuses to quote
it. Compile, load and warm up outside of `turns`; what is timed without turns goes into `with run.watched():`.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lcx import config

config.setup_jax()  # before jax is imported: programs are kept, and no accelerator is sought where there is none

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

Side = Callable[[int], float]
HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
# What others may use of the machine's CPUs: overall, and in any one measurement (one below 1 s counts as 1 s).
OVERALL, IN_ONE = 0.05, 0.15
PAUSE = 0.02  # seconds between two sides: torch's threads spin for some milliseconds after their last work
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "numpy"),
    *("torch", "transformers", "flash-linear-attention", "triton"),
)


# ------------------------------------------------------------------------------------------------------------ sides


def calls(fn: Callable[[], object]) -> Side:
    """A side that calls `fn`, which returns when its work is done."""

    def run(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            fn()
        return time.perf_counter() - start

    return run


def on_device(compiled, *args) -> Side:
    """A side of jax. Calls are queued, so that what a launch costs is hidden behind the one before it."""

    def run(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


class Child:
    """A process that answers a line of JSON with the line "answer " + JSON, for as long as it lives.

    `stderr` as for subprocess; None shows what the process says there.
    """

    def __init__(
        self, *command: str, env: dict[str, str] | None = None, stderr: int | None = subprocess.DEVNULL
    ):
        self.process = subprocess.Popen(
            command,
            env=os.environ | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self.alive = True

    def ask(self, request: dict):
        """Its answer, or None if it has died (its reasons are its own)."""
        if not self.alive:
            return None
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith("answer "):
                    return json.loads(line[7:])
        self.alive = False
        return None

    def side(self, request: dict) -> "Asked":
        """A side that asks for {**request, "calls": n}; the answer is the seconds."""
        return Asked(self, request)

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A side in another process."""

    child: Child
    request: dict

    def __call__(self, n: int) -> float:
        seconds = self.child.ask({**self.request, "calls": n})
        return math.nan if seconds is None else seconds


# ------------------------------------------------------------------------------------------------ watching the machine


@dataclasses.dataclass(frozen=True)
class Sample:
    """CPU seconds since the start of the machine.

    Attributes:
      busy: of the whole machine, what a hypervisor took away included; None if the system does not tell.
      own: of a process and its descendants; those that have ended are counted by their parents.
      others: every other process: {(pid, when it started): (name, seconds)}.
    """

    busy: float | None
    own: float
    others: dict[tuple[int, str], tuple[str, float]]


def sample(root: int | None = None, proc: str | os.PathLike = "/proc") -> Sample | None:
    """The machine now, seen from the process `root` (this one unless given); None where there is no /proc."""
    tick, processes = os.sysconf("SC_CLK_TCK"), {}
    try:
        entries = [int(name) for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return None
    for pid in entries:
        with contextlib.suppress(OSError):  # it has just ended
            text = pathlib.Path(proc, str(pid), "stat").read_text()
            name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            processes[pid] = (name, int(fields[1]), sum(map(int, fields[11:15])) / tick, fields[19])
    own = {root or os.getpid()}
    while more := {pid for pid, (_, parent, *_) in processes.items() if parent in own} - own:
        own |= more
    try:
        user, nice, system, _, _, *rest = map(int, pathlib.Path(proc, "stat").read_text().split()[1:9])
        busy: float | None = (user + nice + system + sum(rest)) / tick
    except (OSError, ValueError):
        busy = None
    return Sample(
        busy,
        sum(processes[pid][2] for pid in own if pid in processes),
        {(pid, start): (name, used) for pid, (name, _, used, start) in processes.items() if pid not in own},
    )


def beside(before: Sample, after: Sample) -> tuple[float, dict[str, float]]:
    """(CPU seconds of others between two samples, those of the three busiest by name)."""
    by_name: Counter[str] = Counter()
    for key, (name, seconds) in after.others.items():
        by_name[name] += seconds - before.others.get(key, (name, 0.0))[1]
    total = sum(x[1] for x in after.others.values()) - sum(x[1] for x in before.others.values())
    if before.busy is not None and after.busy is not None:  # also knows of processes that came and went
        total = max(total, after.busy - before.busy - (after.own - before.own))
    return max(total, 0.0), {name: used for name, used in by_name.most_common(3) if used >= 0.05}


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, by its own clock; 0 where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return sum(map(int, text[text.rindex(")") + 2 :].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def quiet(watch: dict, cpus: int) -> bool:
    """Whether others left the machine alone, by the numbers of `Run.watch`."""
    used, worst = watch["other_cpu_seconds"], watch["other_cpus_at_most"]
    if used is None or worst is None:
        return False
    return used <= OVERALL * cpus * max(watch["seconds"], 1.0) and worst <= IN_ONE * cpus


# -------------------------------------------------------------------------------------------------------- a benchmark


@dataclasses.dataclass(frozen=True)
class Turns:
    """Seconds a call: {side: a number for each round}."""

    times: dict[str, list[float]]

    def seconds(self, name: str) -> float:
        return statistics.median(self.times[name])

    def medians(self) -> dict[str, float]:
        return {name: self.seconds(name) for name in self.times}

    def ratio(self, a: str, b: str) -> dict[str, float]:
        """Of the time of `a` over that of `b` in the same round: above 1, b is faster.

        A side that ran once, as it is slow, is compared with every round of the other.
        """
        ratios = self._ratios(a, b)
        return {
            "median": round(statistics.median(ratios), 3),
            "min": round(ratios[0], 3),
            "max": round(ratios[-1], 3),
        }

    def interval(self, a: str, b: str) -> list[float]:
        """[low, high] that hold the median of `ratio` with a probability of at least 95%, from the order of the rounds.

        Raises ValueError if there are fewer than 6 rounds, which cannot tell.
        """
        ratios = self._ratios(a, b)
        chances = [math.comb(len(ratios), k) / 2 ** len(ratios) for k in range(len(ratios) + 1)]
        cut = max((k for k in range(len(ratios) // 2) if sum(chances[: k + 1]) <= 0.025), default=None)
        if cut is None:
            raise ValueError(f"{len(ratios)} rounds; expected at least 6")
        return [round(ratios[cut], 3), round(ratios[-1 - cut], 3)]

    def _ratios(self, a: str, b: str) -> list[float]:
        rounds = max(len(self.times[a]), len(self.times[b]))
        times = (x * rounds if len(x) == 1 else x for x in (self.times[a], self.times[b]))
        return sorted(x / y for x, y in zip(*times, strict=True))


class Run:
    """One benchmark: what is measured, with which threads, and what went on beside it."""

    def __init__(self, what: str, *, threads: dict[str, dict], root: int | None = None):
        self.what, self.threads, self.root = what, threads, root
        self.load = os.getloadavg()[0]
        self.sections: list[dict] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[Counter[str]]:
        """Counts what others do meanwhile; {name: CPU seconds} that are put into the result count like theirs."""
        before, start, idle = sample(self.root), time.perf_counter(), Counter[str]()
        yield idle
        wall, after = time.perf_counter() - start, sample(self.root)
        section: dict = {"seconds": wall, "other": None, "busiest": {}}
        if before and after:
            section["other"], section["busiest"] = beside(before, after)
            section["other"] += sum(idle.values())
            section["busiest"] |= {name: used for name, used in idle.items() if used >= 0.05}
        cpus = os.cpu_count() or 1
        section["quiet"] = section["other"] is not None and section["other"] <= IN_ONE * cpus * max(wall, 1.0)
        self.sections.append(section)

    def turns(
        self, sides: dict[str, Side], *, rounds: int, seconds: float = 0.0, slow: float = math.inf
    ) -> Turns:
        """Every turn lasts about `seconds`, or one call if that is longer.

        What takes more than `slow` seconds the first time is not run again: that time is its result.
        """
        with self.watched() if slow < math.inf else contextlib.nullcontext():
            first = {name: run(1) for name, run in sides.items()}  # also the warm-up
        often = {name: max(1, min(1000, math.ceil(seconds / max(first[name], 1e-9)))) for name in sides}
        names = [name for name in sides if first[name] <= slow]
        times: dict[str, list[float]] = {name: [] if name in names else [first[name]] for name in sides}
        with self.watched() as idle:
            for number in range(rounds):
                for name in names if number % 2 == 0 else names[::-1]:
                    time.sleep(PAUSE)
                    with _idle_apart_from(sides, name, idle):
                        times[name].append(sides[name](often[name]) / often[name])
        return Turns(times)

    @property
    def quiet(self) -> bool:
        return quiet(self.watch(), os.cpu_count() or 1)

    def watch(self) -> dict:
        """What others did during all measurements; null where the system does not tell."""
        others = [section["other"] for section in self.sections]
        known = bool(others) and None not in others
        busiest: Counter[str] = Counter()
        for section in self.sections:
            busiest.update(section["busiest"])
        worst = (
            max((x["other"] / max(x["seconds"], 1.0) for x in self.sections), default=0.0) if known else None
        )
        return {
            "load_before": round(self.load, 2),
            "seconds": round(sum(section["seconds"] for section in self.sections), 1),
            "other_cpu_seconds": round(sum(others), 2) if known else None,
            "other_cpus_at_most": round(worst, 3) if worst is not None else None,
            "busiest_others": {name: round(used, 2) for name, used in busiest.most_common(3)},
        }

    def record(self) -> dict:
        return {
            "what": self.what,
            "quiet": self.quiet,
            "watch": self.watch(),
            "created": time.strftime("%Y-%m-%d"),
            "threads": self.threads,
            "machine": machine(),
            "versions": versions(),
        }

    def write(self, path: str | os.PathLike, **fields) -> None:
        """The record and `fields` as JSON, a line for each member of a list of objects; "-" is no file."""
        if str(path) != "-":
            write(path, self.record() | fields)
        if not self.quiet:
            print(f"not quiet, not to be quoted: {json.dumps(self.watch())}", flush=True)


@contextlib.contextmanager
def _idle_apart_from(sides: dict[str, Side], turn: str, idle: Counter[str]) -> Iterator[None]:
    """Adds the CPU seconds of every process whose turn it is not."""
    own = sides[turn].child if isinstance(sides[turn], Asked) else None
    waiting = {
        side.child.process.pid: f"{name}, waiting"
        for name, side in sides.items()
        if isinstance(side, Asked) and side.child is not own
    }
    before = {pid: cpu_seconds(pid) for pid in waiting}
    yield
    for pid, name in waiting.items():
        idle[name] += cpu_seconds(pid) - before[pid]


def write(path: str | os.PathLike, result: dict) -> None:
    part = pathlib.Path(f"{path}.part")
    part.write_text(re.sub(r"(\[|, )(?=\{)", r"\1\n", json.dumps(result)) + "\n")
    part.replace(path)


# ---------------------------------------------------------------------------------------------------------- the machine


def jax_threads() -> dict[str, int]:
    """What jax uses here: virtual devices of a CPU share its threads."""
    return {"devices": jax.local_device_count(), "threads": len(os.sched_getaffinity(0))}


def device_name() -> str:
    """For a file name: nvidia_h200, tpu_v5_lite, cpu."""
    kind = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else "cpu"
    return kind.lower().replace(" ", "_")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()

    names = re.findall(r"model name\s*: (.*)", _text("/proc/cpuinfo")) or [platform.machine()]
    memory = re.findall(r"MemTotal:\s*(\d+)", _text("/proc/meminfo")) or [0]
    sources = ("../lcx", "../kernels_pallas", "../benchmarks/*.py")
    changed = git("status", "--porcelain", "--", *sources)
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": f"{names[0].strip()}, {os.cpu_count()} cores",
        "memory_gib": round(int(memory[0]) / 2**20),
        "malloc_pages": malloc_pages(os.environ),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
    }


def malloc_pages(environment: Mapping[str, str]) -> str:
    return "2 MB" if "malloc.hugetlb=1" in environment.get("GLIBC_TUNABLES", "") else "4 KB"


def _text(path: str) -> str:
    return pathlib.Path(path).read_text() if os.path.exists(path) else ""


def ceilings(run: Run) -> dict[str, float]:
    """What this machine reaches: bytes/s of a copy that no cache holds, FLOP/s of one large matrix product."""
    accelerator = jax.default_backend() != "cpu"
    size = 2**30 if accelerator else 2**28  # bytes
    side, dtype = (8192, "bfloat16") if accelerator else (1536, "float32")
    x = jnp.ones(size // 4, jnp.float32)
    a = jnp.ones((side, side), dtype)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    sides = {"copy": on_device(copy, x), "product": on_device(product, a)}
    turns = run.turns(sides, rounds=5, seconds=0.1)
    return {
        "copy_bytes_per_second": 2 * size / turns.seconds("copy"),
        "product_flops_per_second": 2 * side**3 / turns.seconds("product"),
        "product_dtype": dtype,
    }


def growth(by_length: dict[int, float]) -> float | None:
    """The exponent p of time ~ T^p between the shortest and the longest T, from seconds per token."""
    if len(by_length) < 2:
        return None
    a, b = min(by_length), max(by_length)
    return 1 + math.log(by_length[b] / by_length[a]) / math.log(b / a)
