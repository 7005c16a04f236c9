"""Qwen3: norms on q and k, heads of a size of their own."""

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
