"""Parameters that a user brings: the arrays that belong to a model, however they are wrapped, or a clear error."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx import model as model_lib
from lcx.errors import UserError
from lcx.model import Decoder, Layers

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=16)  # it traces the model
def leaf_shapes(model: Decoder | Layers) -> Mapping[str, Shape]:
    """path -> shape of every parameter: "stages_0/block_0/mixer/q_proj/kernel"."""
    flat = flatten_dict(model_lib.abstract_params(model), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def plain(params: Any) -> dict[str, Any]:
    """A tree of dicts and arrays: without Flax's boxes, its FrozenDict, and the {"params": ...} that model.init gives.

    Raises:
      UserError: it is no tree of arrays, or holds other collections too.
    """
    if isinstance(params, FrozenDict):
        params = unfreeze(params)
    if not isinstance(params, Mapping):
        raise UserError(
            f"params are a {type(params).__name__}, expected the tree that lcx.load or model.init gives"
        )
    if "params" in params:
        others = sorted(str(name) for name in set(params) - {"params", "losses"})
        if others:
            raise UserError(
                f"params hold {', '.join(others)} beside params: pass params['params'] (with pairs, what "
                "lcx.lora.merge(params, lora) gives)"
            )
        return plain(params["params"])
    flat = flatten_dict(nn.meta.unbox(params))
    for path, leaf in flat.items():
        name = "/".join(map(str, path))
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise UserError(f"params: {name} is a {type(leaf).__name__}, expected an array")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"params: {name} is {leaf.dtype}, expected floating point numbers")
    return unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def fitting(model: Decoder | Layers, params: Any) -> dict[str, Any]:
    """`plain`, for this model.

    Raises:
      UserError: see `plain`; parameters are missing, unexpected or of another shape.
    """
    params = plain(params)
    check(model, {path: tuple(x.shape) for path, x in flatten_dict(params, sep="/").items()}, "params")
    return params


def check(model: Decoder | Layers, found: Mapping[str, Shape], where: str) -> None:
    """Raises UserError when parameters are missing, unexpected or of another shape than the model's."""
    expected = leaf_shapes(model)
    wrong = sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))
    if wrong:
        listing = ", ".join(
            f"{path} is {found.get(path, 'missing')}, expected {expected.get(path, 'nothing')}"
            for path in wrong[:4]
        )
        raise UserError(f"{where}: the parameters do not fit the model in {len(wrong)} places: {listing}")


def chosen(model: Decoder | Layers, params: Any) -> dict[str, Any]:
    """The parameters that the model has, out of a tree that may hold more."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: flat[path] for path in leaf_shapes(model)}, sep="/")
