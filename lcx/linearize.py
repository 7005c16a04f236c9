"""Linearization: replaces Attention by LinearAttention in a pretrained model and keeps all pretrained weights.

    model, params = Linearize(window=64)(model, params, key)

The new parameters (feature maps, window factors) are initialised by the mixer. Attention transfer trains them
(objectives.attention_transfer), then LoRA fine-tuning recovers the remaining quality (LoLCATS, Zhang et al. 2024, arXiv
2410.10254). Layers listed in `keep_softmax` keep their softmax attention.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from lcx import mixers
from lcx import model as model_lib
from lcx.errors import UserError, naming_flags
from lcx.mixers.attention import Attention
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.linearized import LinearizedAttention
from lcx.mixers.published_lolcats import PublishedLinearAttention
from lcx.model import Block, Decoder, Layers

log = logging.getLogger(__name__)

_SHARED = (
    *("num_heads", "num_kv_heads", "head_dim", "rope", "qkv_bias", "o_bias"),
    *("qk_norm", "norm_eps", "norm", "scale"),
)


@dataclasses.dataclass(frozen=True)
class Linearize:
    """Which layers to linearize, and how. The other settings and their defaults are those of
    mixers.linearized.LinearizedAttention.

    Attributes:
      published_quirks: use PublishedLinearAttention instead of LinearAttention: it reproduces the authors' code,
        mistakes included (mixers.published_lolcats).
      keep_softmax: layers that keep their softmax attention, counted from 0.
    """

    window: int | None = LinearizedAttention.window
    window_kind: str = LinearizedAttention.window_kind
    window_factor: float = LinearizedAttention.window_factor
    feature_map: str = LinearizedAttention.feature_map
    feature_dim: int = LinearizedAttention.feature_dim
    full_space: bool = LinearizedAttention.full_space
    feature_bias: bool = LinearizedAttention.feature_bias
    skip: bool = LinearizedAttention.skip
    adapter: int | None = LinearizedAttention.adapter
    feature_init: str = LinearizedAttention.feature_init
    tied: bool = LinearizedAttention.tied
    affine: bool = LinearizedAttention.affine
    published_quirks: bool = False
    keep_softmax: tuple[int, ...] = ()

    def model(self, model: Decoder) -> Decoder:
        """The linearized model, without parameters.

        Raises:
          UserError: inconsistent settings, nothing to linearize, or a window as long as the model's context.
        """
        blocks = [layer.block for layer in model_lib.layers(model)]
        self._check_effect()
        unknown = [layer for layer in self.keep_softmax if not 0 <= layer < len(blocks)]
        if unknown:
            raise UserError(
                f"Linearize.keep_softmax has layer {unknown[0]}, expected 0 to {len(blocks) - 1}; change it"
            )
        if not any(isinstance(block.mixer, Attention) for block in blocks) and linear_layers(model):
            raise UserError("nothing to linearize: the model is already linear; remove Trainer.linearize")
        other = [layer for layer in self.keep_softmax if not isinstance(blocks[layer].mixer, Attention)]
        if other:
            raise UserError(
                f"Linearize.keep_softmax has layer {other[0]}, whose mixer is {type(blocks[other[0]].mixer).__name__}, "
                "expected softmax attention: remove the layer from keep_softmax"
            )
        if already := linear_layers(model):
            log.warning("layers %s are already linear: Linearize leaves them unchanged", already)
        # Equal blocks map to one object, which keeps comparing stages cheap.
        make = functools.cache(self._linear)
        new = tuple(
            make(block) if i not in self.keep_softmax and isinstance(block.mixer, Attention) else block
            for i, block in enumerate(blocks)
        )
        held = self._held
        if held is not None and held >= model.max_position_embeddings:
            raise UserError(
                f"Linearize.window {self.window} holds the model's whole context of {model.max_position_embeddings} "
                f"tokens ({held} keys if {self.window_kind}), so that nothing would be linear: set a smaller window"
            )
        if list(new) == blocks:
            others = dict.fromkeys(mixers.kind(block.mixer) for block in blocks if block.mixer is not None)
            names = ", ".join(name for name in others if name != "Attention")
            raise UserError(
                "nothing to linearize: the model has no Attention outside Linearize.keep_softmax"
                + (f", and {names} has no linear form here" if names else "")
            )
        return model.clone(stages=model_lib.stages_of(new), parent=None)

    @property
    def _held(self) -> int | None:
        """The largest number of keys in a window; None without one."""
        return None if self.window is None else self.window * (2 if self.window_kind == "terraced" else 1)

    def check_rows(self, seq_len: int) -> None:
        """Raises UserError if rows of this length have every key in the window."""
        if self._held is not None and seq_len <= self._held:
            raise UserError(
                f"Trainer.seq_len {seq_len} is not beyond the {self._held} keys that a {self.window_kind} window of "
                f"{self.window} holds: nothing would be linear; raise Trainer.seq_len or lower Linearize.window"
            )

    def _linear(self, block: Block) -> Block:
        softmax = block.mixer
        for name in ("softcap", "sinks", "chunked", "temperature", "keys_as_values", "value_norm"):
            if getattr(softmax, name):
                raise UserError(
                    f"Attention.{name} is {getattr(softmax, name)}, which linear attention does not have: list these"
                    " layers in Linearize.keep_softmax"
                )
        other = ("keep_softmax", "published_quirks")
        own = [field.name for field in dataclasses.fields(self) if field.name not in other]
        kind = PublishedLinearAttention if self.published_quirks else LinearAttention
        mixer = kind(
            **{name: getattr(softmax, name) for name in _SHARED},
            **{name: getattr(self, name) for name in own},
            softmax_window=softmax.window,
            parent=None,
        )
        mixer.check()
        if self.feature_init == "identity" and self.feature_dim > mixer.head_dim:
            raise UserError(
                f"Linearize.feature_dim {self.feature_dim} with feature_init 'identity' is above the head size "
                f"{mixer.head_dim}: the features beyond it would be 0 for every token; lower feature_dim to it, or set "
                "feature_init = 'uniform'"
            )
        return block.clone(mixer=mixer, parent=None)

    def _check_effect(self) -> None:
        """Raises UserError for a setting that has no effect because of another one."""
        without = {
            "affine": self.affine and self.window is None and "window = None",
            "feature_bias": self.feature_bias and self.adapter is not None and "an adapter",
            "skip": self.skip and self.adapter is not None and "an adapter",
            "feature_init": self.feature_init != "uniform" and self.adapter is not None and "an adapter",
        }
        for name, cause in without.items():
            if cause:
                found = f"Linearize.{name} {getattr(self, name)!r} has no effect with {cause}"
                raise UserError(f"{found}: leave one of the two out")

    def __call__(self, model: Decoder, params: Any, key: Array) -> tuple[Decoder, Any]:
        """(the linearized model, its parameters), on the current mesh.

        Weights that stay at their place in the tree are shared with `params`, not copied.

        Raises:
          UserError: see `model`.
        """
        new = self.model(model)
        return new, relaid(model, params, new, fresh=initial(new, key))


def softmax_model(model: Decoder) -> Decoder:
    """The model with each linear attention replaced by softmax attention, in the same stages."""

    def softmax(mixer):
        if not isinstance(mixer, LinearizedAttention):
            return mixer
        shared = {name: getattr(mixer, name) for name in _SHARED}
        return Attention(**shared, window=mixer.softmax_window, parent=None)

    return model_lib.map_mixers(model, softmax)


def linear_layers(model: Decoder | Layers) -> list[int]:
    """The indices of the layers with linear attention, counted from 0."""
    depth = model_lib.layers(model)
    return [i for i, layer in enumerate(depth) if isinstance(layer.block.mixer, LinearizedAttention)]


def check_linear(model: Decoder | Layers, *, seq_len: int, where: str | None) -> None:
    """Checks what a stage after attention transfer needs: linear attention, and rows long enough to use it.

    Args:
      seq_len: tokens per row.
      where: the source of the model, named in the message.

    Raises:
      UserError: the model was never linearized, or all windows hold every key of a row.
    """
    linear = [
        layer.block.mixer
        for layer in model_lib.layers(model)
        if isinstance(layer.block.mixer, LinearizedAttention)
    ]
    if not linear:
        raise UserError(
            f"Trainer.expects_linear: {where} has no linear attention, expected a linearized model: run stage 1 first "
            "(attention transfer) and set Trainer.init_from to its workdir, or set Trainer.linearize"
        )
    if all(mixer.held is not None and seq_len <= mixer.held for mixer in linear):
        raise UserError(linear[0].too_short(seq_len))


@naming_flags("only_part")
def ablated(model: Decoder, keep: str) -> Decoder:
    """The model with only one part of its hybrid layers: "window", or "linear" (which then sees all keys).

    A hybrid can score well on short texts through its window alone (arXiv 2510.05901); this ablation measures the
    contribution of each part.

    Raises:
      UserError: an unknown name, or a model without hybrid layers.
    """
    changes: dict[str, dict[str, Any]] = {"window": {"linear": False}, "linear": {"window": None}}
    if keep not in changes:
        raise UserError(f"only_part is {keep!r}, expected one of {', '.join(changes)}")

    def one(mixer):
        hybrid = isinstance(mixer, LinearizedAttention) and mixer.window is not None
        return mixer.clone(parent=None, **changes[keep]) if hybrid else mixer

    new = model_lib.map_mixers(model, one)
    if new == model:
        raise UserError(f"only_part {keep!r}: the model has no linear attention with a window: leave out only_part")
    return new


def initial(model: Decoder | Layers, key: Array) -> dict[str, Array]:
    """path -> initial value, float32, of each parameter that only linear attention has."""
    flat = flatten_dict(model_lib.abstract_params(model, mesh=_mesh()), sep="/")
    wanted = {path: leaf for path, leaf in flat.items() if is_new(path)}

    def init(key):  # under jit, parameters that are not returned are never computed
        params = model_lib.plain_init(model, key)
        return {path: flatten_dict(params, sep="/")[path].astype(jnp.float32) for path in wanted}

    out = None if _mesh() is None else {path: leaf.sharding for path, leaf in wanted.items()}
    return jax.jit(init, out_shardings=out)(key)


def is_new(path: str) -> bool:
    return "/feature_map_" in path or path.endswith("/window_factors")


def relaid(
    model: Decoder,
    params: Any,
    new: Decoder,
    *,
    fresh: dict[str, Array],
    layers: Sequence[int] | None = None,
) -> Any:
    """The parameters of `model`, rearranged into the stages of `new`.

    Args:
      fresh: path -> parameters of `new` that `model` does not have.
      layers: the layer of `model` for each layer of `new`; None: all layers, in order.
    """
    old, laid = model_lib.layers(model), model_lib.layers(new)
    chosen = range(len(laid)) if layers is None else layers
    source = {(at.path, at.repeat): old[layer] for at, layer in zip(laid, chosen, strict=True)}
    flat, out = flatten_dict(params, sep="/"), {}
    for path, leaf in flatten_dict(model_lib.abstract_params(new, mesh=_mesh()), sep="/").items():
        block, name = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        if path in fresh:
            out[path] = fresh[path]
        elif (block, 0) not in source:  # embeddings, the final norm
            out[path] = flat[path]
        else:
            rows = [source[block, i] for i in range(leaf.shape[0])]
            out[path] = _stacked([(flat[f"{row.path}/{name}"], row.repeat) for row in rows], leaf)
    return unflatten_dict(out, sep="/")


def _stacked(rows: list[tuple[Array, int]], leaf: jax.ShapeDtypeStruct) -> Array:
    """Stacks rows, each given as (array, index); returns the array itself, uncopied, if they are exactly its rows."""
    first = rows[0][0]
    if all(x is first for x, _ in rows) and [row for _, row in rows] == list(range(first.shape[0])):
        return first
    pick = jax.jit(
        lambda pieces, numbers: jnp.stack([x[i] for x, i in zip(pieces, numbers, strict=True)]),
        static_argnums=1,
        out_shardings=leaf.sharding,
    )
    return pick([x for x, _ in rows], tuple(row for _, row in rows))


def _mesh():
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh
