"""Named activations of any model, taken from a forward pass in pieces.

A point is written as a path of modules, counted in layers from 0 (-1 is the last):

    layers.5                  the residual stream after layer 5 (also just 5)
    layers.5.input            the residual stream before layer 5, before its norm
    layers.5.after_mixer      the residual stream between mixer and MLP
    layers.5.mixer            what the mixer adds to the residual stream; layers.5.mlp: what the MLP adds
    layers.5.mlp.down_proj    the output of any module inside; with .input at the end, what it reads
    embed, final_norm         the embedded tokens; the output of the final norm

The names of vortex (blocks.5.mlp.l3), transformers (model.layers.5.self_attn) and Megatron (decoder.layers.5) are
translated.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.errors import UserError
from lcx.layers import of_shapes
from lcx.model import Decoder, layers

COLLECTION = "activations"
POOLS = ("mean", "last", "max", "none")
_LAYER = re.compile(r"(?:(?:layers|blocks|h)\.)?(-?\d+)(?:\.(.+))?")
_PREFIX = re.compile(r"^(?:model\.|decoder\.|backbone\.|transformer\.)+")
_INSIDE = {
    # vortex
    "pre_norm": "mixer_norm",
    "post_norm": "mlp_norm",
    "mlp.l1": "mlp.gate_proj",
    "mlp.l2": "mlp.up_proj",
    "mlp.l3": "mlp.down_proj",
    "projections": "mixer.in_proj",
    "out_filter_dense": "mixer.out_proj",
    "inner_mha_cls": "mixer",
    "inner_mha_cls.out_proj": "mixer.o_proj",
    # transformers and Megatron
    "self_attn": "mixer",
    "self_attn.o_proj": "mixer.o_proj",
    "self_attention": "mixer",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mlp_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "after_mixer": "mlp_norm.input",
}
_OUTSIDE = {
    "embedding_layer": "embed",
    "embed_tokens": "embed",
    "word_embeddings": "embed",
    "norm": "final_norm",
    "final_layernorm": "final_norm",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """An activation: the input or output of the module at `path`, of copy `repeat` of its stage (None: it has one)."""

    path: tuple[str, ...]
    repeat: int | None
    of_input: bool


def points(model: Decoder, names: Sequence[str | int]) -> dict[str, Point]:
    """The points of these names, in their order.

    Raises:
      UserError: a name that is none, or a module that the model does not have.
    """
    if isinstance(names, str | int) or not names:
        names = [names] if isinstance(names, str | int) and names != "" else []
    if not names:
        raise UserError("layers is empty, expected names such as layers.5 or blocks.28.mlp.l3: change setting layers")
    twice = next((str(name) for name in names if [str(one) for one in names].count(str(name)) > 1), None)
    if twice is not None:
        raise UserError(f"layers has {twice!r} twice, expected each name once: change setting layers")
    known = _modules(model)
    return {str(name): _point(model, str(name), known) for name in names}


def _point(model: Decoder, name: str, known: frozenset[tuple[str, ...]]) -> Point:
    text = _PREFIX.sub("", name.strip())
    of_input = text.endswith(".input")
    found = _LAYER.fullmatch(text)
    if found is None:
        outside = _OUTSIDE.get(text.removesuffix(".input"), text.removesuffix(".input"))
        path = (outside,)
        if path not in known:
            raise UserError(_unknown(name, "embed, final_norm and layers.N", known, ()))
        return Point(path, None, of_input)
    number, inside = int(found.group(1)), found.group(2) or ""
    depth = model.num_layers
    if not -depth <= number < depth:
        raise UserError(f"layers has {name!r}, and the model has the layers 0 to {depth - 1}: change setting layers")
    layer = layers(model)[number]
    inside = _INSIDE.get(inside, inside)
    of_input = inside.endswith("input")
    inside = inside.removesuffix("input").removesuffix(".")
    inside = _INSIDE.get(inside, inside)
    path = (*layer.path.split("/"), *(inside.split(".") if inside else ()))
    if path not in known:
        raise UserError(_unknown(name, "modules such as", known, tuple(layer.path.split("/"))))
    return Point(path, layer.repeat, of_input)


def _unknown(name: str, what: str, known: frozenset[tuple[str, ...]], within: tuple[str, ...]) -> str:
    inside = sorted(".".join(path[len(within) :]) for path in known if path[: len(within)] == within and within)
    listing = f" {', '.join(filter(None, inside))}"[:300] if within else ""
    return f"layers has {name!r}, which the model does not have; it has {what}{listing}: change setting layers"


@functools.lru_cache(maxsize=8)
def _modules(model: Decoder) -> frozenset[tuple[str, ...]]:
    """The paths of all modules that are called."""
    found = set()

    def record(call, args, kwargs, context):
        if context.method_name == "__call__":
            found.add(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(record), of_shapes():
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return frozenset(found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def piece(
    model: Decoder,
    wanted: tuple[Point, ...],
    pool: str,
    params: Any,
    state: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    last: Int[Array, " B"],
) -> tuple[tuple[Float[Array, "B ..."], ...], Any]:
    """(the activations at the points, the state after this piece).

    Activations are float32 [B, F]: their sum ("mean") or largest value ("max") over the tokens that are `counted`, or
    those of token `last`; or, with pool "none", [B, T, F] in the model's dtype.

    Args:
      state: before the piece; None for a row that is one piece.
      last: the index of a token in the piece; -1 if it is in another.
    """
    paths = {(point.path, point.of_input) for point in wanted}

    def capture(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            for of_input in (False, True):
                if (context.module.path, of_input) in paths:
                    value = args[0] if of_input else out
                    value = value[0] if isinstance(value, tuple) else value
                    value = pooled(value, pool, counted, last)
                    name = "input" if of_input else "output"
                    context.module.sow(COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return out

    with nn.intercept_methods(capture):
        (_, state), found = model.apply(
            {"params": params},
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=state,
            method="hidden",
            mutable=[COLLECTION],
        )
    return tuple(_taken(found[COLLECTION], point) for point in wanted), state


def pooled(x: Array, pool: str, counted: Array, last: Array) -> Array:
    """[B, T, ...] -> what `piece` returns of it for this pool."""
    x = x.reshape(*x.shape[:2], -1)
    if pool == "none":
        return x
    x = x.astype(jnp.float32)
    if pool == "last":
        return jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    if pool == "max":
        return jnp.max(jnp.where(counted[..., None], x, -jnp.inf), axis=1)
    return jnp.sum(jnp.where(counted[..., None], x, 0), axis=1)


def _taken(found: Mapping[str, Any], point: Point) -> Array:
    for name in point.path:
        found = found[name]
    value: Any = found["input" if point.of_input else "output"]
    return value if point.repeat is None else value[point.repeat]
