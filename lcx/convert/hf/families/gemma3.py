"""Gemma 3, text: Gemma 2 with norms on q and k, five sliding layers for each full one, and a rope for each kind."""

from lcx.convert.hf.families.gemma2 import Gemma

GEMMA3 = Gemma(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    period=6,
    qk_norm=True,
    theta=1_000_000.0,
    local_theta=10_000.0,
    caps=(None, None),
    # transformers has the first key, and does not cap scores.
    fixed=(*Gemma.fixed, ("attn_logit_softcapping", (None,))),
)
