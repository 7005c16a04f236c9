"""Delayed scaling of FP8 projections in training: what a run keeps beside the weights, and its update after a step.

Each projection in FP8 (layers.Linear.fp8) has an entry in the state's item "fp8", at the path of the projection:

    history         [L, 16, 3]  largest magnitudes of its inputs, weights and gradients in the last steps
    gradient_scale  [L]         the scale of its gradients

The scales of inputs and weights are its parameter `fp8_scales`. All are those of Transformer Engine's DelayedScaling
(ops.fp8.next_scales). The rows of a step's micro-batches and pieces count as one step. A scale that is not stored
begins at 1, a history that is not stored at 0, as there.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lcx import parameters, sharding
from lcx.ops import fp8
from lcx.ops.fp8 import COLLECTION
from lcx.wording import quantity

SCALES = "fp8_scales"


def abstract(model: Any, mesh: Mesh) -> dict[str, Any]:
    """{"fp8": tree of shapes}, replicated over the mesh; {} for a model without projections in FP8."""
    flat = dict[str, tuple[int, ...]]()
    for path, shape in parameters.leaf_shapes(model).items():
        owner, _, leaf = path.rpartition("/")
        if leaf == SCALES:
            flat[f"{owner}/history"] = (shape[0], fp8.HISTORY, 3)
            flat[f"{owner}/gradient_scale"] = (shape[0],)
    place = sharding.replicated(mesh)
    tree = {path: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for path, shape in flat.items()}
    return {COLLECTION: unflatten_dict(tree, sep="/")} if tree else {}


def begun(state: Mapping[str, Any], like: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The state with its item "fp8", if it needs one that it does not have.

    Args:
      like: the abstract state.
      stored: {path: array} of what a checkpoint holds of the item; a missing array begins as described above.
    """
    if COLLECTION not in like or COLLECTION in state:
        return dict(state)

    def placed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        start = np.ones if path.endswith("gradient_scale") else np.zeros
        value = np.asarray(stored.get(path, start(leaf.shape, leaf.dtype)), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    flat = {path: placed(path, leaf) for path, leaf in flatten_dict(like[COLLECTION], sep="/").items()}
    params = {
        path: jnp.where(x > 0, x, 1.0).astype(x.dtype) if path.endswith(SCALES) else x
        for path, x in flatten_dict(state["params"], sep="/").items()
    }
    return {**state, "params": unflatten_dict(params, sep="/"), COLLECTION: unflatten_dict(flat, sep="/")}


def of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state that a step records in: {"fp8": ...}, or {}."""
    return {COLLECTION: state[COLLECTION]} if COLLECTION in state else {}


def statement(like: Mapping[str, Any]) -> str:
    """One line for the start of a run whose abstract state has the item."""
    rates = [leaf for path, leaf in flatten_dict(like[COLLECTION], sep="/").items() if path.endswith("gradient_scale")]
    count = quantity(sum(leaf.shape[0] for leaf in rates), "projection")
    return f"FP8: {count}, with scales from the largest magnitudes of the last {fp8.HISTORY} steps"


def after_step(
    params: Mapping[str, Any], before: Mapping[str, Any], recorded: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The parameters with their next scales, and the next {"fp8": ...}.

    Args:
      before: from `of`.
      recorded: its gradient, whose histories hold in row 0 what the step has recorded.
    """
    if not before:
        return params, {}
    weights, old = flatten_dict(params, sep="/"), flatten_dict(before[COLLECTION], sep="/")
    seen, new = flatten_dict(recorded[COLLECTION], sep="/"), dict(old)
    for path, history in old.items():
        owner, _, leaf = path.rpartition("/")
        if leaf == "history":
            mine, gradient = f"{owner}/{SCALES}", f"{owner}/gradient_scale"
            scales = jnp.concatenate([weights[mine].astype(jnp.float32), old[gradient][..., None]], axis=-1)
            scales, new[path] = fp8.next_scales(scales, history, seen[path][..., 0, :])
            weights[mine], new[gradient] = scales[..., :2].astype(weights[mine].dtype), scales[..., 2]
    return unflatten_dict(weights, sep="/"), {COLLECTION: unflatten_dict(new, sep="/")}
