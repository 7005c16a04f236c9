"""Converts pytrees to the flat form that a checkpoint stores, and back.

A tree becomes {"a/b/c": array}. Tuple positions and field names become strings, so an optimizer state can still be
restored after a change of its container types. Subtrees without arrays (None, optax.EmptyState) are not stored; they
are taken from the tree passed to restore. Typed PRNG keys are stored as their key data and the name of their
implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.checkpoint.fingerprint import fingerprint, partial
from lcx.checkpoint.folder import Damaged, Entry, few, read_record
from lcx.errors import UserError

_SMALL = 1 << 20  # elements; numpy takes a few milliseconds for so many

Tree = Any  # a pytree of arrays or of jax.ShapeDtypeStruct


def flatten(tree: Tree) -> dict[str, Any]:
    """{"a/b/c": leaf}, in the order of the leaves. Raises ValueError for an empty name or one with '/' or '.' in it."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        if not names or any(not name or set(name) & set("/.") for name in names):
            raise ValueError(
                f"cannot store a leaf under {names}; names must not be empty nor contain '/' or '.'"
            )
        flat["/".join(names)] = leaf
    return flat


def to_stored(item: str, tree: Tree) -> tuple[dict[str, Any], dict[str, Entry]]:
    """({key: jax or numpy array}, {key: Entry}) of a tree; fingerprints are computed on the devices of the arrays.

    Raises UserError for 64-bit host arrays, which jax would silently narrow to 32 bits on restore.
    """
    arrays, impls = {}, {}
    for key, leaf in flatten(tree).items():
        arrays[key], impls[key] = _storable(f"{item}/{key}", leaf)
    sums = _fingerprints(arrays)
    entries = {
        key: Entry(tuple(x.shape), jnp.dtype(x.dtype).name, sums[key], impls[key])
        for key, x in arrays.items()
    }
    return arrays, entries


def from_stored(tree: Tree, arrays: Mapping[str, jax.Array], entries: Mapping[str, Entry]) -> Tree:
    """Puts stored arrays into the structure of the abstract tree and turns key data back into typed PRNG keys."""
    leaves = []
    for key, leaf in flatten(tree).items():
        x = arrays[key]
        leaves.append(jax.random.wrap_key_data(x, impl=entries[key].key_impl) if is_prng_key(leaf) else x)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def stored_structs(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """{key: ShapeDtypeStruct to read} for an abstract tree: key data for typed keys, and a sharding for every leaf."""
    structs = {}
    for key, leaf in flatten(tree).items():
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
            jax.local_devices()[0]
        )
        plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        plain = jax.eval_shape(jax.random.key_data, plain) if is_prng_key(leaf) else plain
        structs[key] = jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)
    return structs


def as_stored(tree: Tree, step_dir: Any, item: str = "params") -> Tree:
    """The abstract tree with the dtypes that a step stores. Leaves that the step does not have are unchanged."""
    entries = read_record(step_dir).arrays[item]
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(entries[key].dtype), sharding=leaf.sharding)
        if key in entries
        else leaf
        for key, leaf in flatten(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def misfits(tree: Tree, entries: Mapping[str, Entry]) -> str:
    """How a stored item differs from an abstract tree (the first few keys); "" if it fits."""
    wanted = stored_structs(tree)
    problems = []
    if missing := [key for key in wanted if key not in entries]:
        problems.append(f"missing {few(missing)}")
    if unexpected := [key for key in entries if key not in wanted]:
        problems.append(f"unexpected {few(unexpected)}")
    other = []
    for key, leaf in flatten(tree).items():
        if key not in entries:
            continue
        found, expected = entries[key], wanted[key]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype.name):
            other.append(
                f"{key} is {found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)}"
            )
        elif is_prng_key(leaf) and found.key_impl and _key_dtype(found.key_impl) != leaf.dtype:
            other.append(f"{key} is a {found.key_impl} key, not {leaf.dtype}")
    if other:
        problems.append(few(other, limit=2))
    return "; ".join(problems)


def verify(item: str, arrays: Mapping[str, jax.Array], entries: Mapping[str, Entry]) -> None:
    """Raises Damaged, naming the arrays whose values differ from those that were saved."""
    sums = _fingerprints(arrays)
    if bad := [f"{item}/{key}" for key in arrays if sums[key] != entries[key].fingerprint]:
        raise Damaged(f"{few(bad)} {'does' if len(bad) == 1 else 'do'} not match the saved fingerprint")


def is_prng_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_dtype(impl: str) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def _storable(name: str, leaf: Any) -> tuple[Any, str | None]:
    if isinstance(leaf, jax.Array):
        return (
            (jax.random.key_data(leaf), str(jax.random.key_impl(leaf))) if is_prng_key(leaf) else (leaf, None)
        )
    array = np.asarray(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else jnp.asarray(leaf)
    if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        raise UserError(
            f"cannot save {name} as {array.dtype}; expected a 32-bit type (or set JAX_ENABLE_X64=1)"
        )
    return array, None


def _fingerprints(arrays: Mapping[str, Any]) -> dict[str, int]:
    """The fingerprint of each array. All device computations are dispatched before the first result is awaited.

    Small arrays of a CPU are read by numpy: that takes less time than compiling a program for each of their shapes.
    """

    def of(x: Any) -> Any:
        if isinstance(x, jax.Array):
            on_host = x.is_fully_addressable and jax.default_backend() == "cpu"
            if x.size > _SMALL or not on_host:
                return fingerprint(x)
        return partial(np.asarray(x))

    sums = {key: of(x) for key, x in arrays.items()}
    return {key: int(total) for key, total in jax.device_get(sums).items()}
