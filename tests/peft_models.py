"""Bases of transformers and adapters of the peft package, tiny and random, and what each computes."""

import json
import warnings

import numpy as np
import peft as peft_package
import pytest
import torch
import transformers

import lcx

V = 258
TOKENS = np.random.default_rng(0).integers(0, V, (2, 24))
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),  # with biases on q, k, v
    "phi3": lambda: transformers.Phi3Config(**SIZES | {"eos_token_id": 2}, original_max_position_embeddings=32),
}


def write_bases(folder):
    """A folder of each configuration, biases and norms away from 0 and 1."""
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        hf_model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for key, x in hf_model.named_parameters():
                if "bias" in key or "norm" in key:
                    x.add_(0.1 * torch.randn_like(x))
        hf_model.save_pretrained(folder / name)
    return folder


def hf_base(folder, **changes):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)


def hf_logits(hf_model):
    with torch.no_grad():
        return hf_model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def logits(model, params):
    return np.asarray(lcx.logits(model, params, TOKENS))


def write_adapter(base, folder, **settings):
    """An adapter of the peft package with everything that trains moved; its logits."""
    torch.manual_seed(1)
    config = peft_package.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_model = peft_package.get_peft_model(hf_base(base), config)
        with torch.no_grad():
            for _, x in hf_model.named_parameters():
                if x.requires_grad:
                    x.add_(torch.randn_like(x) * 0.1)
        hf_model.save_pretrained(str(folder))
    return hf_logits(hf_model)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(name="bases", scope="module")
def bases_fixture(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(name="plain", scope="module")
def plain_fixture(bases, tmp_path_factory):
    """An adapter of `llama`: pairs of q_proj and v_proj."""
    folder = tmp_path_factory.mktemp("plain") / "a"
    write_adapter(bases / "llama", folder, target_modules=["q_proj", "v_proj"])
    return folder
