"""Qwen3: norms on q and k; head_dim is independent of hidden_size / num_heads."""

from lcx.convert.hf.llama_like import LlamaLike

QWEN3 = LlamaLike(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    num_kv_heads=32,
    head_dim=128,
    sliding_window=4096,
    biases="config",
    windows="by_layer",
    qk_norm=True,
)
