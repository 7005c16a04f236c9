"""One layer of a decoder: norms, a mixer, an MLP, and how they are added to the residual stream.

What the families of pretrained models do differently here are fields with values; `docs/concepts/blocks.md` lists them.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from lcx import mixers, sharding
from lcx.errors import UserError
from lcx.layers import Norm

NORMS = ("before", "after", "both")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer or the MLP may be None, which leaves out its norms too.

    Returns the mixer's new cache, or what is to be appended to it.

    Attributes:
      norm: which normalisation; see layers.Norm.
      norms: where. "before": f(norm(x)). "after": norm(f(x)), as in OLMo 2. "both": norm(f(norm(x))), as in Gemma 2.
        The parameters of a norm before are `mixer_norm` and `mlp_norm`, after `mixer_post_norm` and `mlp_post_norm`.
      parallel: mixer and MLP both read x, and x + mixer(norm(x)) + mlp(norm(x)) comes out (GPT-NeoX). Otherwise the MLP
        reads what the mixer was added to.
      shared_norm: in a parallel block, `mixer_norm` is the norm before the MLP too (Cohere, Phi-2).
      residual_multiplier: of what mixer and MLP add to x (Granite).
    """

    mixer: nn.Module | None
    mlp: nn.Module | None
    norm_eps: float = 1e-5
    norm: Norm = Norm()
    norms: str = "before"
    parallel: bool = False
    shared_norm: bool = False
    residual_multiplier: float = 1.0

    @nn.compact
    def __call__(self, x, *, positions, segment_ids, cache=None):
        x = sharding.constrain(x, sharding.BATCH_AXES, "context", None)
        before, normed = x, x
        if self.mixer is not None:
            normed = self._normed(x, "mixer_norm", "after")
            y, cache = mixers.mix(
                self.mixer, normed, positions=positions, segment_ids=segment_ids, cache=cache
            )
            x = x + self._added(y, "mixer_post_norm")
        if self.mlp is not None:
            if not self.shared_norm:
                normed = self._normed(before if self.parallel else x, "mlp_norm", "after")
            takes = getattr(self.mlp, "takes_segment_ids", False)
            y = self.mlp(normed, **({"segment_ids": segment_ids} if takes else {}))
            x = x + self._added(y, "mlp_post_norm")
        return x, cache

    @nn.nowrap
    def _normed(self, x: Float[Array, "B T D"], name: str, unless: str) -> Float[Array, "B T D"]:
        """x after the norm of this name; x itself where norms is `unless`."""
        return x if self.norms == unless else self.norm(x.shape[-1], self.norm_eps, name=name)(x)

    @nn.nowrap
    def _added(self, y: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
        """What mixer or MLP adds to the residual stream."""
        y = self._normed(y, name, "before")
        return y if self.residual_multiplier == 1 else y * self.residual_multiplier

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for settings that are unknown or do not fit each other."""
        if self.mixer is None and self.mlp is None:
            raise UserError("Block has mixer None and mlp None, expected one of them: leave the block out")
        if self.norms not in NORMS:
            raise UserError(
                f"Block.norms is {self.norms!r}, expected one of {', '.join(NORMS)}: change Block.norms"
            )
        if not math.isfinite(self.residual_multiplier):
            raise UserError(
                f"Block.residual_multiplier is {self.residual_multiplier}, expected a finite number: change it"
            )
        if self.shared_norm:
            without = {
                "parallel = False": not self.parallel,
                "norms = 'after'": self.norms == "after",
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
    """The first setting of a module that is not at its default, as "Block.norms = 'after'"; "" if there is none.

    A checkpoint format that cannot say a setting must refuse a model that changes it. This finds such settings, also
    those that a later version adds.

    Args:
      known: the names, separated by spaces, of the settings that the format does say.
    """
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name not in (*known.split(), "parent", "name") and value != field.default:
            return f"{type(module).__name__}.{field.name} = {value!r}"
    return ""
