"""The parameters of a model: random initialisation, abstract shapes, counts, and checks of parameters from users."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array

from lcx import mlps, sharding
from lcx.errors import UserError
from lcx.layers import initialization, of_shapes
from lcx.mixers import macs_per_token as mixer_macs_per_token

Shape = tuple[int, ...]
_EMBEDDING = "embed/embedding"
Model = Any  # model.Decoder or model.Layers, which import this file


# Tracing the model is slow, and starting a run needs its shapes several times. A folder that fits no family is compared
# with a model of each.
@functools.lru_cache(maxsize=64)
def _abstract_boxed(model: Model):
    with of_shapes():
        return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


def _init(model: Model, key: Array) -> Any:
    with initialization(getattr(model, "initialization", "normal")):
        return model.init(key, model.example())["params"]


def plain_init(model: Model, key: Array) -> Any:
    """Random parameters without Flax's boxes; meant to be called inside jit or eval_shape."""
    return nn.meta.unbox(_init(model, key))


def abstract_params(model: Model, *, mesh: Mesh | None = None, dtype: Any = None) -> Any:
    """Tree of ShapeDtypeStruct of a model's parameters, without allocating anything.

    Args:
      mesh: None: without shardings.
      dtype: None: as the model initialises them.
    """
    boxed = _abstract_boxed(model)
    shardings = None if mesh is None else sharding.tree_shardings(boxed, mesh)
    plain = nn.meta.unbox(boxed)
    if dtype is not None:
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), plain)
    if shardings is None:
        return plain
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings)


def param_shardings(model: Model, mesh: Mesh) -> Any:
    """Tree of NamedSharding for the model's parameters on a mesh."""
    return sharding.tree_shardings(_abstract_boxed(model), mesh)


def init_params(model: Model, key: Array, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Any:
    """Random parameters of the given dtype; with a mesh, created directly in their shards."""
    if mesh is None:
        return _initializer(model, None, jnp.dtype(dtype))(key)
    with jax.set_mesh(mesh):
        return _initializer(model, mesh, jnp.dtype(dtype))(key)


@functools.lru_cache(maxsize=16)
def _initializer(model: Model, mesh: Mesh | None, dtype: jnp.dtype) -> Callable[[Array], Any]:
    """The compiled function from a key to the parameters."""

    def init(key):
        return jax.tree.map(lambda x: x.astype(dtype), plain_init(model, key))

    # It mostly runs once, so on a CPU it is not worth optimizing: compiling takes longer than drawing the numbers.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = {} if mesh is None else {"out_shardings": param_shardings(model, mesh)}
    return jax.jit(init, compiler_options=options, **shardings)


def num_params(model: Model) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(model)))


def flops_per_token(
    model: Model, seq_len: int, trained: Mapping[str, int] | None = None, *, local: bool = False
) -> float:
    """Model FLOPs per token of training (forward and backward) for its matrix products, without recomputation.

    These are 6 per weight of a matrix product (the input embedding is a lookup and does not count), plus those of the
    mixers. An MLP that uses only part of its weights for a token defines its own count (`lcx.mlps`). Causal attention
    with N heads of size H takes 6 H N for each visible key and each of its two products; there are (seq_len + 1) / 2
    visible keys on average, fewer with a sliding window.

    A frozen weight has no gradient of its own, and takes 4; where nothing below it trains, no gradient is passed
    through it either, and it takes 2. "Below" goes by the model's stages.

    Args:
      trained: {path: number of values} of what trains, low-rank matrices included; None: all weights of the model.
      local: no gradient passes from layer to layer (attention transfer), so frozen weights take 2.

    Raises:
      UserError: a mixer of the model does not define what a token costs, or an MLP defines it wrongly.
    """
    sizes = {path: math.prod(shape) for path, shape in leaf_shapes(model).items()}
    trained = sizes if trained is None else trained
    lowest = min(map(_height, trained), default=math.inf)
    costs = {}
    for path, size in sizes.items():
        if path == _EMBEDDING and not model.tie_word_embeddings:
            continue
        through = not local and (path == _EMBEDDING or _height(path) >= lowest)  # a tied embedding is the head too
        costs[path] = size * (6.0 if path in trained else 4.0 if through else 2.0)
    total = sum(costs.values()) + sum(6.0 * size for path, size in trained.items() if path not in sizes)
    for s, stage in enumerate(model.stages):
        passed = 6.0 if s >= lowest else 2.0
        for b, block in enumerate(stage.pattern):
            total += stage.repeat * passed * mixer_macs_per_token(block.mixer, seq_len)
            macs = mlps.macs_per_token(block.mlp, model.hidden_size)
            if macs is not None:  # in place of one per weight
                own = f"stages_{s}/block_{b}/mlp/"
                counted = sum(size for path, size in sizes.items() if path.startswith(own))
                spent = sum(cost for path, cost in costs.items() if path.startswith(own))
                total += stage.repeat * macs * (spent / counted if counted else passed) - spent
    return total


def _height(path: str) -> float:
    """Where a weight is between the embedding, -1, the stages by number, and what follows them."""
    if found := re.match(r"stages_(\d+)/", path):
        return int(found[1])
    return -1 if path.startswith("embed/") else math.inf


@functools.lru_cache(maxsize=64)  # tracing the model is slow
def leaf_shapes(model: Model) -> Mapping[str, Shape]:
    """path -> shape of every parameter: "stages_0/block_0/mixer/q_proj/kernel"."""
    flat = flatten_dict(abstract_params(model), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def leaf_paths(tree: Any) -> list[str]:
    """The path of each leaf of a pytree, "params/stages_0/block_0/mixer/q_proj/kernel", in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def plain(params: Any) -> dict[str, Any]:
    """The params as nested dicts of arrays, without Flax's boxes, FrozenDict or the {"params": ...} of model.init.

    Raises:
      UserError: it is not a tree of floating point arrays, or it contains other collections.
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
                f"params hold {', '.join(others)} in addition to params: pass params['params'] (with LoRA, the "
                "result of lcx.lora.merge(params, lora))"
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


def fitting(model: Model, params: Any) -> dict[str, Any]:
    """The params as `plain` returns them, checked against the model.

    Raises:
      UserError: as in `plain`, or parameters are missing, unexpected or of the wrong shape.
    """
    params = plain(params)
    check(model, {path: tuple(x.shape) for path, x in flatten_dict(params, sep="/").items()}, "params")
    return params


def check(model: Model, found: Mapping[str, Shape], where: str) -> None:
    """Raises UserError if parameters are missing, unexpected or of another shape than the model's.

    Args:
      found: path -> shape, as from `leaf_shapes`.
      where: for the message: where they come from.
    """
    expected = leaf_shapes(model)
    wrong = sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))
    if wrong:
        listing = ", ".join(
            f"{path} is {found.get(path, 'missing')}, expected {expected.get(path, 'nothing')}"
            for path in wrong[:4]
        )
        raise UserError(f"{where}: the parameters do not fit the model in {len(wrong)} places: {listing}")


def chosen(model: Model, params: Any) -> dict[str, Any]:
    """The parameters of the model, taken from a tree that may contain others as well."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: flat[path] for path in leaf_shapes(model)}, sep="/")
