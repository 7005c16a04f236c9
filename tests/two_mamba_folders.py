"""Folders as the published 2Mamba trainer writes them, with the weights of its saved models."""

import json

import numpy as np
import safetensors.numpy
from two_mamba_oracle import load

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.49.0",
    "use_cache": True,
    "vocab_size": 97,
}


def tensors_of(saved):
    """The state dict of a saved model: its parameters, and the masks that all but two attention types register."""
    found = {key.removeprefix("param/"): x for key, x in saved.items() if key.startswith("param/")}
    length = CONFIG["max_position_embeddings"]
    for name in list(found):
        if name.endswith("self_attn.qkv_proj.weight") and not any("rotary_emb" in key for key in found):
            mask = ~np.tril(np.ones((length, length), bool))
            found[name.replace("qkv_proj.weight", "attn_mask")] = mask[None, None]
    return found


def make(reference, folder, name, *, config=None, tensors=None):
    """Writes the saved model of this attention_type; returns the folder, and what the file of saved numbers holds."""
    saved = load(reference, f"model_{name}")
    folder.mkdir(parents=True)
    state = tensors_of(saved)
    if tensors is not None:
        tensors(state)
    safetensors.numpy.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"attention_type": name} | (config or {})))
    return folder, saved
