"""How parameters and batches are distributed over devices: one mesh with four axes, and one table of rules.

Parameters have logical axis names (set in ``layers.py`` and the mixers), and RULES maps each name to a mesh axis.
Moving a model to another number of devices therefore only requires another mesh: a checkpoint is restored straight
into the new shardings.

    data      replicates the model and splits the batch
    fsdp      splits parameters and optimizer state, gathered layer by layer for use; also splits the batch
    context   splits the sequence axis T
    tensor    splits heads, channels of convolutions, MLP width, experts and vocabulary
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lcx.errors import UserError
from lcx.wording import quantity

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | None], ...] = (
    ("layers", None),  # the axis of stacked layers, which lax.scan iterates over, is not split
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("channels", "tensor"),  # of a convolution
    ("groups", "tensor"),  # groups of channels that share a filter
    ("experts", "tensor"),
    ("mlp", "tensor"),  # of experts too, if their number is not divisible
    ("embed", "fsdp"),
    ("latent", "fsdp"),
    ("head_dim", None),
    ("norm", None),
)


def make_mesh(*, data: int = 1, fsdp: int = -1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Mesh with axes (data, fsdp, context, tensor) of type Auto. One size may be -1: all remaining devices.

    Args:
      devices: None: all devices of all processes.

    Raises:
      UserError: a size is not positive, or the product of the sizes is not the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    devices = jax.devices() if devices is None else list(devices)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"mesh sizes {sizes}: expected positive numbers and at most one -1; change MeshShape"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        needed = f"a multiple of {known} devices" if free else quantity(known, "device")
        raise UserError(f"mesh {sizes} needs {needed}, found {len(devices)}; change MeshShape")
    shape, types = tuple(sizes[axis] for axis in AXES), (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)
    except NotImplementedError:
        # Some axis can only be a part of an axis of the torus, such as 16 of 8 x 8. jax tries that on v5e alone.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes, for use in a configuration. One may be -1: all remaining devices."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def build(self, devices=None) -> Mesh:
        return make_mesh(**dataclasses.asdict(self), devices=devices)


def _mesh_axis(name: str | None) -> str | None:
    rules = dict(RULES)
    if name is not None and name not in rules:
        raise UserError(
            f"a parameter names its axis {name!r}, expected one of {', '.join(rules)}, or None: whole on every device"
        )
    return None if name is None else rules[name]


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axis names.

    An axis is not split if its size is not divisible by that of the mesh axis, or if an earlier axis of the array
    already uses the same mesh axis.
    """
    taken, out = set[str](), list[str | None]()
    for name, size in zip(names, shape, strict=True):
        axis = _mesh_axis(name)
        if axis is None or axis in taken or mesh.shape[axis] == 1 or size % mesh.shape[axis]:
            out.append(None)
        else:
            taken.add(axis)
            out.append(axis)
    return PartitionSpec(*out)


def tree_shardings(boxed, mesh: Mesh):
    """Tree of NamedSharding for a tree of abstract leaves; leaves that are not nn.Partitioned are replicated."""

    def one(leaf):
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, spec(leaf.names, leaf.unbox().shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches [B, T]: rows over (data, fsdp), tokens over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads the index-th of `count` equal blocks of the rows of every batch.

    Processes that share rows (because `context` or `tensor` extends over several processes) read the same block.

    Raises:
      UserError: the rows of this process's devices do not form such a block.
    """
    parts = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    mine = [
        i for i, devices in enumerate(parts) if any(d.process_index == jax.process_index() for d in devices)
    ]
    size = max(len(mine), 1)
    if not mine or len(parts) % size or mine[0] % size or mine[-1] - mine[0] + 1 != size:
        raise UserError(
            f"mesh {dict(mesh.shape)}: process {jax.process_index()} holds parts {mine[:9]} of {len(parts)} of a "
            "batch, expected a block as large as every other process's; change the mesh sizes"
        )
    return mine[0] // size, len(parts) // size


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded_rows(rows: int, mesh: Mesh) -> int:
    """Rows of a batch [B, T] with those of padding that `shard_batch` adds, so that every device has as many."""
    return -(-rows // row_parts(mesh)) * row_parts(mesh)


def micro_batch_count(rows: int, accumulation: int, parts: int) -> int:
    """The number of micro-batches of a batch: at least `accumulation`, or as many as there are rows for every device.

    Args:
      rows: of the batch, a multiple of `parts`.
      accumulation: the number that was asked for.
      parts: devices that the rows are divided over.
    """
    own = rows // parts
    most = -(-rows // (accumulation * parts))  # rows of a device in a micro-batch
    return next(count for count in range(1, own + 1) if own % count == 0 and own // count <= most)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays on the mesh, from the rows of this process (see `process_rows`) with all their tokens.

    Rows that do not divide over the devices of the process are followed by zeros, which are padding without weight.
    """
    sharding, (_, count) = batch_sharding(mesh), process_rows(mesh)

    def one(x: np.ndarray) -> jax.Array:
        if missing := _missing_rows(x, mesh, count):
            x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * count, *x.shape[1:]))

    return {key: one(x) for key, x in batch.items()}


def _missing_rows(x: np.ndarray, mesh: Mesh, processes: int) -> int:
    """Of the rows of one of so many processes: how many are missing for its devices to have as many each."""
    return -x.shape[0] % (row_parts(mesh) // processes)


def abstract_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of what `shard_batch` makes of a batch."""
    sharding, (_, count) = batch_sharding(mesh), process_rows(mesh)

    def one(x: np.ndarray) -> jax.ShapeDtypeStruct:
        rows = (x.shape[0] + _missing_rows(x, mesh, count)) * count
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding)

    return {key: one(x) for key, x in batch.items()}


def axis_size(axis: str) -> int:
    """Number of devices along an axis of the current mesh (jax.set_mesh); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Constrains the axes of an array to mesh axes; without a mesh (jax.set_mesh), and in an island, does nothing.

    An axis whose size is not divisible by the number of devices is not split.

    Args:
      axes: for each axis of x a mesh axis, a tuple of mesh axes, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return x
    if jax.sharding.AxisType.Manual in mesh.axis_types:
        return x
    sizes = [
        math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())) for axis in axes
    ]
    fitting = (
        axis if size % parts == 0 else None for axis, size, parts in zip(axes, x.shape, sizes, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def gathered(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter all-gathered over fsdp, for use in a layer. Cast it first, so that the narrower dtype is sent."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    kept = tuple(None if _mesh_axis(name) == "fsdp" else name for name in names)
    return jax.lax.with_sharding_constraint(x, spec(kept, x.shape, mesh))


def repeat_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """Repeats kv heads if there are fewer of them than `tensor` devices: [B, T, K, H] -> [B, T, tensor, H]; else x.

    Each device then holds the kv head of its own query heads, so that an island does not have to gather them.
    """
    parts, heads = axis_size("tensor"), x.shape[2]
    if heads % parts == 0 or parts % heads or num_heads % parts:
        return x
    return jnp.repeat(constrain(x, BATCH_AXES, "context", None, None), parts // heads, axis=2)


def whole_rows(axes):
    """The same PartitionSpecs without "time": each device of `context` gets whole rows, which are gathered."""

    def one(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(None if name == "time" else name for name in spec))

    return jax.tree.map(one, axes, is_leaf=_is_spec)


def splits_time(seq_len: int) -> bool:
    """Whether an island splits rows of `seq_len` tokens over `context`: at least a token for each of its devices."""
    return 1 < axis_size("context") <= seq_len


def head_axes(num_heads: int) -> tuple[str, ...]:
    """The mesh axes over which the heads of a cache are divided: `tensor`, and `context` if that divides them as well.

    A cache that every device of `context` held as a whole would be most of the memory of a long row.
    """
    parts = axis_size("context")
    divides = parts > 1 and num_heads % (axis_size("tensor") * parts) == 0
    return ("tensor", "context") if divides else ("tensor",)


def by_token(x: jax.Array) -> jax.Array:
    """Heads [B, T, N, H] with T divided over `context`, and N over `tensor`; a T too short for that stays as it is.

    Said where heads divided over `context` begin and end, so that these arrays are sent (all-to-all), and the compiler
    does not gather the wider activations before the projections instead.
    """
    return constrain(x, BATCH_AXES, "context", "tensor", None) if splits_time(x.shape[1]) else x


def island(fn, arrays, axes, out, *, heads: tuple[str, ...] = ("tensor",)):
    """fn(arrays), run by each device on its own shards (shard_map); without a mesh, a plain call.

    Args:
      fn: a function of one tree of arrays. If T is split, it is called with the keyword argument mesh_axis="context"
        and gets consecutive parts of the rows; what it needs of other parts it sends itself, with the functions of
        ops/shards.py. If no spec names "time", every device of `context` gets whole rows: the compiler gathers them.
      arrays: the tree; None for an array that is absent. With "time", a dict that may have "segment_ids" [B, T].
      axes: a tree of PartitionSpecs with the same structure, or a prefix of it. Their names are "rows" (split over data
        and fsdp), "time" (T, split over context), "heads" (heads or channels, over `heads`) and None (replicated).
      out: the PartitionSpecs of the result.
      heads: mesh axes; with "context" among them, no spec may name "time".

    If "rows" or "heads" are not divisible by the number of their devices in some array, they are replicated instead,
    in all arrays. If T is not divisible, rows are padded at the end, with segment id 0; see also `splits_time`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(arrays)
    T = max(_sizes("time", arrays, axes), default=0)
    split = splits_time(T)
    if split:
        fn = functools.partial(fn, mesh_axis="context")
        arrays, axes = _filled_up(arrays, axes, T)
    devices = {"rows": BATCH_AXES, "heads": heads}
    uneven = {
        name
        for name, used in devices.items()
        if any(size % math.prod(mesh.shape[axis] for axis in used) for size in _sizes(name, arrays, axes))
    }
    # shard_map sums gradients over the mesh axes that a spec does not name. Naming the axes of size 1 avoids that sum.
    single = tuple(axis for axis in ("context", "tensor") if mesh.shape[axis] == 1)
    named = {
        "rows": (*BATCH_AXES, *single),
        "heads": tuple(axis for axis in heads if axis not in single) or None,
        "time": "context" if split else None,
    }

    def place(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(None if name is None or name in uneven else named[name] for name in spec))

    in_specs, out_specs = (jax.tree.map(place, tree, is_leaf=_is_spec) for tree in (axes, out))
    results = jax.shard_map(fn, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)(arrays)
    return jax.tree.map(lambda s, x: _resized(s, x, T), out, results, is_leaf=_is_spec) if split else results


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def _sizes(name: str, arrays, axes) -> list[int]:
    """The sizes of all axes of this name."""
    found = list[int]()

    def look(spec: PartitionSpec, subtree) -> None:
        for x in jax.tree.leaves(subtree):
            found.extend(size for own, size in zip(spec, x.shape, strict=False) if own == name)

    jax.tree.map(look, axes, arrays, is_leaf=_is_spec)
    return found


def _filled_up(arrays, axes, T: int):
    """Arrays and axes with T filled up with padding to a multiple of the devices of `context`."""
    size = -(-T // axis_size("context")) * axis_size("context")
    if size == T:
        return arrays, axes
    if arrays.get("segment_ids") is None:
        rows = _sizes("rows", arrays, axes)[0]
        ids = jnp.ones((rows, T), jnp.int32)
        arrays, axes = arrays | {"segment_ids": ids}, axes | {"segment_ids": PartitionSpec("rows", "time")}
    return jax.tree.map(lambda s, x: _resized(s, x, size), axes, arrays, is_leaf=_is_spec), axes


def _resized(spec: PartitionSpec, tree, size: int):
    """Arrays with the axis "time" padded with zeros, or cut, to this size."""
    if "time" not in spec:
        return tree
    axis = tuple(spec).index("time")

    def one(x: jax.Array) -> jax.Array:
        more = [(0, max(size - n, 0) if i == axis else 0) for i, n in enumerate(x.shape)]
        return jax.lax.slice_in_dim(jnp.pad(x, more) if any(map(any, more)) else x, 0, size, axis=axis)

    return jax.tree.map(one, tree)
