"""Phi-3: fused q, k, v and fused gate, up projections, and different rotary settings.

self_attn.qkv_proj.weight   q, k and v concatenated along axis 0
mlp.gate_up_proj.weight     gate and up concatenated along axis 0
"""

import dataclasses

from lcx.convert.hf.llama_like import LlamaLike
from lcx.convert.hf.rope_parameters import ORIGINAL, RopeDialect
from lcx.errors import UserError
from lcx.rope import Rope


@dataclasses.dataclass(frozen=True)
class Phi3Rope(RopeDialect):
    """Only `default` and `longrope`, with partial rotation of each head; the original window is at the top level."""

    types: tuple[str, ...] | None = ("default", "longrope")
    partial: bool = True
    original_window: int | None = 4096  # the default of transformers' Phi3Config

    def type_of(self, name, given):
        # Older Phi-3 files call it "yarn"; long_factor distinguishes it from actual YaRN.
        return "longrope" if name == "yarn" and given.get("long_factor") else super().type_of(name, given)

    def written(self, rope, head_dim):
        """Expresses a scaling that does not depend on the length as longrope with equal short and long factors."""
        if rope.rope_type in ("default", "longrope"):
            return rope
        if rope.rope_type in ("dynamic", "proportional") or callable(rope.rope_type):
            raise UserError(
                f"rope_type {rope.rope_type!r} cannot be written for model_type 'phi3', which has default and "
                "longrope; save with format 'lcx'"
            )
        plain = Rope(rope_theta=rope.rope_theta, partial_rotary_factor=rope.partial_rotary_factor)
        inv_freq, attention_scaling = rope.frequencies(head_dim, 1)
        ratios = plain.frequencies(head_dim, 1)[0].astype("float64") / inv_freq.astype("float64")
        if rope.original_max_position_embeddings is None:
            raise UserError(
                f"rope_type {rope.rope_type!r} is written as longrope for model_type 'phi3', which needs "
                "original_max_position_embeddings; set it"
            )
        return Rope(
            rope_type="longrope",
            rope_theta=rope.rope_theta,
            partial_rotary_factor=rope.partial_rotary_factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
            factor=rope.factor,
            attention_factor=float(attention_scaling),
            short_factor=tuple(map(float, ratios)),
            long_factor=tuple(map(float, ratios)),
        )

    def spelled(self, keys, rope, window):
        new = keys["rope_parameters"]
        if new["rope_type"] != "longrope":
            return keys | {ORIGINAL: rope.original_max_position_embeddings or window}
        implied = window / keys[ORIGINAL]
        if new.get("factor", implied) != implied or "attention_factor" in new:
            return keys
        # transformers 4 accepts exactly these three keys, and derives the factor from the two windows.
        factors = {name: new[name] for name in ("short_factor", "long_factor")}
        return keys | {"rope_scaling": {"type": "longrope"} | factors}


PHI3 = LlamaLike(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    norm_eps=1e-5,
    windows="uniform",
    fused=(("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))),
    writes_head_dim=False,
    rope=Phi3Rope(),
    rereads=True,
)
