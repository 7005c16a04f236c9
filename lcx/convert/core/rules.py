"""The rules engine: how the tensors of a foreign checkpoint correspond to the parameters of an lcx model.

Each family (one file each) provides a table of rules. A rule states that a foreign tensor is the concatenation, along
axis 0, of certain parts. A part is one parameter of the lcx tree in a certain layout; for parameters that a scanned
stage stacks, a part is one repeat. The engine applies the table in both directions, checks that it accounts for every
tensor on both sides, and reads only the requested rows. Layouts only move elements, so both directions are bit-exact.

Trees are flat here: {"stages_0/block_0/mixer/q_proj/kernel": array or shape}.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lcx.convert.files.tensor_io import FLOAT_DTYPES, TensorInfo, TensorSource
from lcx.errors import UserError
from lcx.rope_fields import shown

Shape = tuple[int, ...]
Index = tuple[slice, ...]
Key = int | tuple[int, int] | None  # the index of a part on the leading axes of its parameter


class Layout(Protocol):
    """How an array of the lcx tree is laid out in a foreign tensor. Shapes are those of one repeat."""

    def foreign_shape(self, shape: Shape) -> Shape: ...

    def to_foreign(self, array: np.ndarray) -> np.ndarray: ...

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts some or all of the foreign rows to the lcx array of this shape."""
        ...

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        """The foreign rows that cover `index`: (first row, last row + 1, shape of their `to_lcx`, index into it)."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The identical array on both sides: embeddings [V, D], norm scales [D]."""

    def foreign_shape(self, shape: Shape) -> Shape:
        return shape

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return array

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return rows.reshape(shape)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        if not shape:
            return 0, 1, shape, index
        start, stop, _ = index[0].indices(shape[0])
        return start, stop, (stop - start, *shape[1:]), (slice(None), *index[1:])


@dataclasses.dataclass(frozen=True)
class Flat:
    """A bias: [heads, head_dim] in lcx, [heads * head_dim] in the foreign tensor."""

    def foreign_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1)

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return rows.reshape(shape)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        start, stop, _ = index[0].indices(shape[0])
        inner = math.prod(shape[1:])
        return start * inner, stop * inner, (stop - start, *shape[1:]), (slice(None), *index[1:])


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transpose as a new contiguous array. Copies in blocks of rows, three times faster than numpy's own copy."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, matrix.shape[0], 64):
        result[:, start : start + 64] = matrix[start : start + 64].T
    return result


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A linear map: [in..., out...] in lcx, [out, in] (torch's layout) in the foreign tensor.

    Attributes:
      in_axes: how many leading axes of the lcx array are inputs: 1 for [D, N, H], 2 for [N, H, D].
    """

    in_axes: int = 1

    def foreign_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.in_axes :]), math.prod(shape[: self.in_axes])

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        rows, columns = self.foreign_shape(array.shape)
        return transpose(array.reshape(columns, rows))

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return transpose(rows).reshape(shape)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        axis = self.in_axes
        start, stop, _ = index[axis].indices(shape[axis])
        inner = math.prod(shape[axis + 1 :])
        shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
        return start * inner, stop * inner, shape, (*index[:axis], slice(None), *index[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Taps:
    """Filters: [..., K] in lcx, the current token's tap first; [filters, 1, K] in the foreign tensor, that tap last."""

    def foreign_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[:-1]), 1, shape[-1]

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[..., ::-1]).reshape(self.foreign_shape(array.shape))

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return rows[..., ::-1].reshape(shape)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        start, stop, _ = index[0].indices(shape[0])
        inner = math.prod(shape[1:-1])
        return start * inner, stop * inner, (stop - start, *shape[1:]), (slice(None), *index[1:])


@dataclasses.dataclass(frozen=True)
class PerHead:
    """Per-head values: [N] or [N, F] in lcx; [1, N, 1, 1 or F] (broadcasts with [B, N, T, F]) in the foreign tensor."""

    def foreign_shape(self, shape: Shape) -> Shape:
        return 1, shape[0], 1, *(shape[1:] or (1,))

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.foreign_shape(array.shape))

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return rows.reshape(shape)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        return 0, 1, shape, index


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter (or one repeat of a stacked one) inside a foreign tensor.

    Attributes:
      item: index on the parameter's own first axis, if each of its items is a tensor elsewhere, as an expert may be.
    """

    path: str
    layout: Layout
    repeat: int | None = None
    item: int | None = None

    @property
    def key(self) -> "Key":
        """Where it is in the parameter: an index of the leading axes."""
        return self.repeat if self.item is None or self.repeat is None else (self.repeat, self.item)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The foreign tensor `name` is the concatenation of `parts` along axis 0.

    With `block`, the parts have the same number of rows and are interleaved instead: `block` rows of each part in turn
    (q, k and v of one head, then those of the next). With `shape`, the tensor's numbers are those of these rows in
    another shape, of which one size may be -1.
    """

    name: str
    parts: tuple[Part, ...]
    block: int | None = None
    shape: Shape | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Location of one parameter (or one repeat of it): rows [start, stop) of a foreign tensor.

    If the parts are interleaved in blocks, rows are counted as if the parts were concatenated.
    """

    name: str
    start: int
    stop: int
    layout: Layout
    block: int | None = None


class Table:
    """Rules for one model, checked against the shapes of its parameters.

    Args:
      rules: one per foreign tensor.
      shapes: path -> shape of every parameter of the model (stacked ones with their leading repeat axis).

    Raises:
      UserError: a parameter is covered by no rule, or by two (the model does not belong to this family).
    """

    def __init__(self, rules: Sequence[Rule], shapes: Mapping[str, Shape]):
        self.rules = {rule.name: rule for rule in rules}
        self.shapes = dict(shapes)
        self.places: dict[str, dict[Key, Place]] = {path: {} for path in shapes}
        self.foreign_shapes: dict[str, Shape] = {}
        self.columns: dict[str, Shape] = {}  # of a row, as the rule counts rows
        if len(self.rules) != len(rules):
            raise UserError(
                "the rules name a tensor twice: " + _listing(_twice([rule.name for rule in rules]))
            )
        for rule in rules:
            self.foreign_shapes[rule.name] = self._place(rule)
        uncovered = [path for path in shapes if not self._is_covered(path)]
        if uncovered:
            raise UserError(
                "this format has no place for the parameters "
                + _listing(uncovered)
                + "; choose another --dst_format "
                "or another model_type"
            )

    def _place(self, rule: Rule) -> Shape:
        start, columns = 0, None
        for part in rule.parts:
            if part.path not in self.shapes:
                raise UserError(
                    f"the tensor {rule.name!r} needs the parameter {part.path!r}, which the model lacks"
                )
            shape = part.layout.foreign_shape(self.slice_shape(part))
            if columns is not None and columns != shape[1:]:
                raise UserError(f"the parts of {rule.name!r} have different rows: {columns} and {shape[1:]}")
            columns, stop = shape[1:], start + (shape[0] if shape else 1)
            places = self.places[part.path]
            if part.key in places:
                raise UserError(f"the rules store {part.path!r} twice, the second time in {rule.name!r}")
            places[part.key] = Place(rule.name, start, stop, part.layout, rule.block)
            start = stop
        self.columns[rule.name] = columns or ()
        if rule.shape is not None:
            known, total = math.prod(size for size in rule.shape if size != -1), start * math.prod(columns or ())
            return tuple(total // known if size == -1 else size for size in rule.shape)
        return (start, *(columns or ())) if shape else ()

    def _is_covered(self, path: str) -> bool:
        places, shape = self.places[path], self.shapes[path]
        if None in places:
            return True
        expected: Iterable[Key] = range(shape[0] if shape else 0)
        if any(isinstance(key, tuple) for key in places):
            expected = itertools.product(range(shape[0]), range(shape[1]))
        return set(places) == set(expected)

    def slice_shape(self, part: Part) -> Shape:
        """Shape of the part's array: without the repeat axis if it is one repeat of a stacked parameter."""
        return self.shapes[part.path][_depth(part.key) :]

    def check_source(
        self, source: Mapping[str, TensorInfo], *, harmless: Sequence[str] = (), against: str = "config.json"
    ) -> list[str]:
        """Compares a checkpoint with the table, and returns the names of tensors that may be skipped.

        Args:
          source: name -> dtype and shape of the checkpoint's tensors.
          harmless: regular expressions of names of tensors that carry no parameter.
          against: what the model was derived from, for error messages.

        Raises:
          UserError: lists missing and unexpected tensors, or those of the wrong shape or dtype.
        """
        missing = [name for name in self.rules if name not in source]
        extra = [name for name in source if name not in self.rules]
        skipped = [name for name in extra if any(re.fullmatch(pattern, name) for pattern in harmless)]
        unexpected = [name for name in extra if name not in skipped]
        problems = []
        if missing:
            problems.append(f"{len(missing)} missing: {_listing(missing)}")
        if unexpected:
            problems.append(f"{len(unexpected)} unexpected: {_listing(unexpected)}")
        if problems:
            raise UserError(
                f"the tensors do not match {against} ({'; '.join(problems)}); expected exactly the "
                f"model's {len(self.rules)} tensors"
            )
        wrong = [name for name, shape in self.foreign_shapes.items() if source[name].shape != shape]
        if wrong:
            listing = [
                f"{name} is {source[name].shape}, expected {self.foreign_shapes[name]}" for name in wrong
            ]
            raise UserError(
                f"{len(wrong)} tensors do not have the shape that {against} implies: {_listing(listing)}"
            )
        not_floats = [name for name in self.rules if source[name].dtype not in FLOAT_DTYPES.values()]
        if not_floats:
            listing = [f"{name} is {source[name].dtype}" for name in not_floats]
            raise UserError(f"expected float32, bfloat16 or float16 tensors: {_listing(listing)}")
        return skipped

    def leaf_dtype(self, source: Mapping[str, TensorInfo], path: str) -> np.dtype:
        """The stored dtype of a parameter; the wider one if its layers differ."""
        dtypes = {source[place.name].dtype for place in self.places[path].values()}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def foreign_dtype(self, leaves: Mapping[str, TensorInfo], name: str) -> np.dtype:
        """The dtype of a foreign tensor to write; float32 if its parts differ."""
        dtypes = {leaves[part.path].dtype for part in self.rules[name].parts}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read_leaf(self, source: TensorSource, path: str, key: Key, index: Index) -> np.ndarray:
        """Reads one slice of a parameter (or of one repeat), from the smallest range of foreign rows that covers it."""
        place = self.places[path][key]
        shape = self.shapes[path][_depth(key) :]
        first, last, made, rest = place.layout.rows(shape, index)
        if place.block is None:
            rows = self._read_rows(source, place.name, place.start + first, place.start + last)
        else:
            rows = self._alternating_rows(source, place, first, last)
        return place.layout.to_lcx(rows, made)[rest]

    def _read_rows(self, source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, as its rule counts them."""
        shape = self.rules[name].shape
        if shape is None:
            return source.read(name, start, stop)
        size, columns = math.prod(self.foreign_shapes[name][1:]), self.columns[name]  # of a stored row, and of a rule's
        low, high = start * math.prod(columns), stop * math.prod(columns)
        first = low // size
        numbers = source.read(name, first, -(-high // size)).reshape(-1)[low - first * size : high - first * size]
        return numbers.reshape(stop - start, *columns)

    def _alternating_rows(self, source: TensorSource, place: Place, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a part that is interleaved in blocks with its sibling parts."""
        block, size = place.block or 1, place.stop - place.start
        # Of every `phases` consecutive blocks, one belongs to each part; this part's are those at position `phase`.
        shape = self.foreign_shapes[place.name]
        total = math.prod(shape) // math.prod(self.columns[place.name])
        phases, phase = total // size, place.start // size
        low, high = first // block, -(-last // block)
        rows = self._read_rows(source, place.name, low * block * phases, high * block * phases)
        own = rows.reshape(high - low, phases, block, *rows.shape[1:])[:, phase]
        return own.reshape(-1, *rows.shape[1:])[first - low * block : last - low * block]

    def read(self, source: TensorSource, path: str, index: Index) -> np.ndarray:
        """Reads one slice of a parameter, with its repeats stacked on the leading axis."""
        return self.assembled(path, index, lambda key, rest: self.read_leaf(source, path, key, rest))

    def assembled(self, path: str, index: Index, read: Callable[[Key, Index], np.ndarray]) -> np.ndarray:
        """One slice of a parameter from slices of its parts; `read(key, index)` returns that of one part."""
        depth = _depth(next(iter(self.places[path])))
        if depth == 0:
            return read(None, index)
        axes = [range(*index[axis].indices(self.shapes[path][axis])) for axis in range(depth)]
        keys: Iterable[Key] = axes[0] if depth == 1 else itertools.product(axes[0], axes[1])
        slices = _alike([read(key, index[depth:]) for key in keys])
        if len(slices) == 1 and depth == 1:
            return slices[0][None]
        return np.stack(slices).reshape(*map(len, axes), *slices[0].shape)

    def foreign_parts(self, name: str, read: Callable[[str, Any], np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the foreign arrays of a tensor's parts, in order; `read(path, key)` returns a part's lcx array."""
        rule = self.rules[name]
        parts = (part.layout.to_foreign(read(part.path, part.key)) for part in rule.parts)
        if rule.block is None:
            yield from parts
            return
        blocks = _alike([rows.reshape(-1, 1, rule.block, *rows.shape[1:]) for rows in parts])
        yield np.concatenate(blocks, axis=1).reshape(self.foreign_shapes[name])

    def to_foreign(self, tree: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts a flat tree of arrays (parameters or their gradients) to all foreign tensors."""

        def read(path: str, key: Key) -> np.ndarray:
            return np.asarray(tree[path] if key is None else tree[path][key])

        foreign = {}
        for name, shape in self.foreign_shapes.items():
            parts = [np.atleast_1d(part) for part in self.foreign_parts(name, read)]
            foreign[name] = np.concatenate(parts).reshape(shape)
        return foreign


def _alike(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays in one dtype; float32 if theirs differ, because numpy has none for float16 and bfloat16."""
    return arrays if len({x.dtype for x in arrays}) == 1 else [x.astype(np.float32) for x in arrays]


def _depth(key: Key) -> int:
    """How many leading axes a key indexes."""
    return 0 if key is None else len(key) if isinstance(key, tuple) else 1


def renamed(rules: Sequence[Rule], names: Mapping[str, str]) -> list[Rule]:
    """The same rules with renamed tensors; `names` maps regular expressions to their `re.sub` replacements."""
    found = []
    for rule in rules:
        name = rule.name
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        found.append(dataclasses.replace(rule, name=name))
    return found


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _listing(names: Sequence[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (
        ", ".join(name if name.isprintable() and len(name) < 200 else shown(name) for name in names[:limit])
        + rest
    )
