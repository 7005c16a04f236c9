"""Reads a compiled program (XLA's HLO text after scheduling): its arrays, and how often each instruction runs."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}
# dtype[sizes]{minor to major:T(first tile) what follows}
_ARRAY = re.compile(
    r"\b(pred|bf16|[sufc]\d+(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([\d,]*)(?::(?:T\(([\d,]+)\))?([^}]*))?\})?"
)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the program.

    Attributes:
      nbytes: of its numbers.
      held: bytes in the memory of the device: with what the tiles of a TPU's layout add; 0 in a TPU's vector memory
        and in the host's.
      on_host: whether it is in the memory of the host.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    held: int
    on_host: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `results` are its arrays, flattened; `text` is what follows its opening parenthesis."""

    name: str
    op: str
    results: tuple[Array, ...]
    text: str
    is_root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.results)

    @property
    def held(self) -> int:
        return sum(array.held for array in self.results)

    @property
    def operands(self) -> list[str]:
        """Names of the operands, where the text names them."""
        return re.findall(r"%([\w.\-]+)", self.text.partition(")")[0])

    @property
    def op_name(self) -> str:
        """Where it comes from in the Python program, as jax names it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction in its place: how often one step runs it, and whether it is a part of a fusion."""

    instruction: Instruction
    times: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each a list of instructions.

    Attributes:
      entry: the name of the main computation.
      unknown_loops: loops whose number of iterations the compiler does not state; they are counted once.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @property
    def unknown_loops(self) -> int:
        loops = {
            run.instruction.name: run.instruction for run in self.runs() if run.instruction.op == "while"
        }
        return sum(self.trips(loop) is None for loop in loops.values())

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body: as the compiler says, or as its condition `i < constant` does."""
        if (known := _TRIPS.search(loop.text)) is not None:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        body = self.computations.get(condition[1], []) if condition else []
        test = next((one for one in body if one.is_root), None)
        if test is None or test.op != "compare" or "direction=LT" not in test.text:
            return None
        constants = {one.name: one.text.partition(")")[0] for one in body if one.op == "constant"}
        bound = constants.get(test.operands[-1], "") if test.operands else ""
        return int(bound) if bound.isdigit() else None

    def root(self, name: str) -> Instruction:
        body = self.computations[name]
        return next((one for one in body if one.is_root), body[-1])

    def runs(self) -> Iterator[Run]:
        """Every instruction that a step runs, those inside loops, branches and fusions too."""
        yield from self._runs(self.entry, 1, False)

    def _runs(self, name: str, times: int, fused: bool) -> Iterator[Run]:
        for one in self.computations.get(name, ()):
            yield Run(one, times, fused)
            if one.op in ("while", "call", "conditional", "fusion", "async-start"):
                repeats = self.trips(one) if one.op == "while" else 1
                for called in _called(one):
                    yield from self._runs(called, times * (repeats or 1), fused or one.op == "fusion")


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if (found := _COMPUTATION.match(line)) is not None:
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif (found := _INSTRUCTION.match(line)) is not None:
            root, name, shape, op, rest = found.groups()
            current.append(Instruction(name, op, arrays(shape), rest, bool(root)))
    return Program(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays in a type such as `(f32[8,128]{1,0:T(8,128)}, s32[])`."""
    found = []
    for dtype, dims, layout, tile, rest in _ARRAY.findall(text):
        shape = tuple(map(int, filter(None, dims.split(","))))
        bits = _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]))
        held = 0 if "S(" in rest else math.prod(_padded(shape, layout, tile)) * bits // 8
        found.append(Array(dtype, shape, math.prod(shape) * bits // 8, held, "S(5)" in rest))
    return tuple(found)


def _padded(shape: tuple[int, ...], layout: str, tile: str) -> list[int]:
    """The sizes of the axes, filled up to whole tiles."""
    sizes = list(shape)
    if tile and layout and shape:
        order = [
            int(axis) for axis in layout.split(",")
        ]  # the axis whose elements are next to each other first
        for axis, size in zip(order, [int(size) for size in tile.split(",")][::-1], strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
    return sizes


def _called(one: Instruction) -> list[str]:
    names = [name for kind, name in _CALLED.findall(one.text) if kind != "to_apply" or one.op == "call"]
    branches = _BRANCHES.search(one.text)
    return names + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])
