"""One layer of a decoder: norms, a mixer, an MLP, and how they are added to the residual stream.

The differences between families of pretrained models are fields of Block; `docs/concepts/blocks.md` lists them.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lcx import mixers, sharding
from lcx.errors import UserError, check_not_negative
from lcx.layers import Norm, named_param
from lcx.mlps.tiles import in_tiles
from lcx.remat import BLOCK_INPUT

NORMS = ("before", "after", "both")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). The mixer or the MLP may be None; its norms are then omitted too.

    A call returns x [B, T, D] and the mixer's new cache, or the entries to append to it (mixers.mix).

    Attributes:
      norm: the kind of normalisation; see layers.Norm.
      norms: where the norms are, for f the mixer or the MLP. "before": f(norm(x)). "after": norm(f(x)), as in OLMo 2.
        "both": norm(f(norm(x))), as in Gemma 2. The norms before f are called `mixer_norm` and `mlp_norm`, those after
        it `mixer_post_norm` and `mlp_post_norm`.
      parallel: mixer and MLP both read x, and the result is x + mixer(norm(x)) + mlp(norm(x)) (GPT-NeoX). Otherwise the
        MLP reads the sum of x and the mixer's output.
      shared_norm: in a parallel block, `mixer_norm` also serves as the norm before the MLP (Cohere, Phi-2).
      mlp_norms: where the norms of the MLP are, if not where `norms` says (Gemma 4 with experts).
      output_scale: whether the block's result is multiplied by a number, `output_scale`, that is stored with the
        weights and not trained: it has no gradient, and is 1 in a new model (Gemma 4).
      residual_multiplier: factor on the outputs of mixer and MLP before they are added to x (Granite).
      mlp_in_tiles: whether the MLP takes the tokens of long rows in tiles, which the backward pass recomputes one by
        one; not one that sows losses, or has statistics over all tokens (mixtures of experts). Decoder.remat "host"
        implies it.
    """

    mixer: nn.Module | None
    mlp: nn.Module | None
    norm_eps: float = 1e-5
    norm: Norm = Norm()
    norms: str = "before"
    parallel: bool = False
    shared_norm: bool = False
    residual_multiplier: float = 1.0
    mlp_norms: str | None = None
    output_scale: bool = False
    mlp_in_tiles: bool = False

    @nn.compact
    def __call__(self, x, *, positions, segment_ids, cache=None):
        x = sharding.constrain(x, sharding.BATCH_AXES, "context", None)
        x = checkpoint_name(x, BLOCK_INPUT)
        before, normed = x, x
        if self.mixer is not None:
            normed = self._normed(x, "mixer_norm", self.norms != "after")
            y, cache = mixers.mix(
                self.mixer, normed, positions=positions, segment_ids=segment_ids, cache=cache
            )
            x = x + self._added(y, "mixer_post_norm", self.norms != "before")
        if self.mlp is not None:
            norms = self.mlp_norms or self.norms
            if not self.shared_norm:
                normed = self._normed(before if self.parallel else x, "mlp_norm", norms != "after")
            takes = getattr(self.mlp, "takes_segment_ids", False)
            if self.mlp_in_tiles and not takes:
                y = in_tiles(self.mlp, normed)
            else:
                y = self.mlp(normed, **({"segment_ids": segment_ids} if takes else {}))
            x = x + self._added(y, "mlp_post_norm", norms != "before")
        if self.output_scale:
            scale = named_param(self, "output_scale", nn.initializers.ones, (None,), (1,))
            x = x * jax.lax.stop_gradient(scale).astype(x.dtype)
        return x, cache

    @nn.nowrap
    def _normed(self, x: Float[Array, "B T D"], name: str, there: bool) -> Float[Array, "B T D"]:
        """x normalised by the norm called `name`; x unchanged if it is not there."""
        return self.norm(x.shape[-1], self.norm_eps, name=name)(x) if there else x

    @nn.nowrap
    def _added(self, y: Float[Array, "B T D"], name: str, there: bool) -> Float[Array, "B T D"]:
        """The term that the mixer or the MLP adds to the residual stream."""
        y = self._normed(y, name, there)
        return y if self.residual_multiplier == 1 else y * self.residual_multiplier

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for unknown or inconsistent settings."""
        if self.mixer is None and self.mlp is None:
            raise UserError("Block has mixer None and mlp None, expected one of them: leave the block out")
        for name, value in (("norms", self.norms), ("mlp_norms", self.mlp_norms or self.norms)):
            if value not in NORMS:
                raise UserError(
                    f"Block.{name} is {value!r}, expected one of {', '.join(NORMS)}: change Block.{name}"
                )
        if self.residual_multiplier == 0 or not math.isfinite(
            self.residual_multiplier
        ):  # 0: blocks do nothing
            raise UserError(
                f"Block.residual_multiplier is {self.residual_multiplier}, expected a finite number other than 0: "
                "change it"
            )
        check_not_negative("Block", norm_eps=self.norm_eps)
        if self.shared_norm:
            without = {
                "parallel = False": not self.parallel,
                "norms = 'after'": self.norms == "after",
                "mlp_norms": self.mlp_norms is not None,
                "mixer = None": self.mixer is None,
                "mlp = None": self.mlp is None,
            }
            for setting, there in without.items():
                if there:
                    raise UserError(
                        f"Block.shared_norm has no meaning with {setting}: expected a parallel block with norms before "
                        "a mixer and an MLP; set shared_norm = False"
                    )


def changed(module: Any, known: str) -> str:
    """The first setting outside `known` that is not at its default, as "Block.norms = 'after'"; "" if there is none.

    A checkpoint format that cannot express a setting must reject a model that changes it. This finds such settings,
    including any that a later version adds.

    Args:
      known: the names of the settings that the format can express, separated by spaces.
    """
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name not in (*known.split(), "parent", "name") and value != field.default:
            return f"{type(module).__name__}.{field.name} = {value!r}"
    return ""
