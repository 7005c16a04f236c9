"""The collective operations of a compiled program, read from its HLO."""

import dataclasses
import re

import numpy as np

KINDS = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclasses.dataclass
class Collective:
    kind: str
    shapes: list[tuple[int, ...]]
    loop: bool  # in the body of a loop
    devices: int  # that take part; 1 is no communication at all
    floating: bool  # moves numbers; the others are ids and positions

    @property
    def elements(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)


def collectives(text: str) -> list[Collective]:
    """The collective operations in compiled HLO."""
    found, computation = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = line
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            shapes = [tuple(map(int, filter(None, dims.split(",")))) for _, dims in arrays]
            alone = re.search(r"replica_groups=\{(\{\d+\},?)+\}", line)
            loop = not computation.startswith("ENTRY")
            floating = any(dtype.startswith(("f", "bf")) for dtype, _ in arrays)
            found.append(Collective(match[2], shapes, loop, 1 if alone else 2, floating))
    return found
