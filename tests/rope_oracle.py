"""transformers as the oracle of the RoPE tests: its configurations and its frequencies."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is transformers: pip install -e '.[torch]'")
pytest.importorskip("transformers", reason="the oracle is transformers: pip install -e '.[torch]'")
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3 import modeling_phi3

KEY = "original_max_position_embeddings"


def hf_frequencies(config, length=None):
    """(inv_freq, A) of transformers. Its default type is Phi-3's, the one that knows partial rotary."""
    name = config.rope_parameters["rope_type"]
    if name == "default":
        inv_freq, scaling = modeling_phi3.Phi3RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[name](config, None, seq_len=length)
    return inv_freq.numpy(), scaling


def hf_config(parameters, head_dim, window):
    """A Llama whose rope_parameters are these (a copy: transformers writes into them)."""
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=window,
        rope_parameters=dict(parameters),
    )


def assert_same(found, expected):
    (inv_freq, scaling), (hf_inv_freq, hf_scaling) = found, expected
    assert np.asarray(inv_freq).dtype == np.float32
    np.testing.assert_allclose(np.asarray(inv_freq), hf_inv_freq, rtol=5e-6, atol=0)
    assert abs(scaling - hf_scaling) < 1e-6
