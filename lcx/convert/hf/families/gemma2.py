"""Gemma 2: norms before and after, weights stored as their difference from 1, soft caps, every second layer slides."""

import dataclasses
import math

from lcx.convert.hf.layered import Layered
from lcx.convert.hf.values import cap, number
from lcx.layers import Norm

NORMS = (
    ("input_layernorm", "mixer_norm"),
    ("post_attention_layernorm", "mixer_post_norm"),
    ("pre_feedforward_layernorm", "mlp_norm"),
    ("post_feedforward_layernorm", "mlp_post_norm"),
)


@dataclasses.dataclass(frozen=True)
class Gemma(Layered):
    """What Gemma 2 and Gemma 3 have in common.

    Attributes:
      caps: the defaults of attn_logit_softcapping and final_logit_softcapping.
    """

    model_type: str = "gemma2"
    architecture: str = "Gemma2ForCausalLM"
    own: frozenset[str] = frozenset({
        "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
        "sliding_window_pattern", "use_bidirectional_attention",
    })  # fmt: skip
    fixed: tuple = (("use_bidirectional_attention", (None, False)),)
    period: int | None = 2
    norm_names: tuple = NORMS
    activation: tuple[str, str] = ("hidden_activation", "gelu_pytorch_tanh")
    biases: str = "config"
    num_kv_heads: int | None = 4
    head_dim: int | None = 256
    sliding_window: int | None = 4096
    tied: bool = True
    caps: tuple[float | None, float | None] = (50.0, 30.0)

    def attention(self, config):
        scale = number(config, "query_pre_attn_scalar", 256) ** -0.5
        shared = {"scale": scale, "softcap": cap(config, "attn_logit_softcapping", self.caps[0])}
        return shared | ({"norm": Norm(offset=1.0)} if self.qk_norm else {})

    def block(self, config):
        return {"norms": "both", "norm": Norm(offset=1.0)}

    def decoder(self, config):
        return {
            "norm": Norm(offset=1.0),
            "embedding_multiplier": math.sqrt(config["hidden_size"]),
            "logit_softcap": cap(config, "final_logit_softcapping", self.caps[1]),
        }

    def own_keys(self, model, depth):
        mixer = depth[0].block.mixer
        scalar = mixer.head_dim if mixer.scale is None else 1 / mixer.scale**2
        return {
            "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
            "attn_logit_softcapping": mixer.softcap,
            "final_logit_softcapping": model.logit_softcap,
        }


GEMMA2 = Gemma()
