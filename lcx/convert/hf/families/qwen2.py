"""Qwen2 and Qwen2.5: biases on q, k and v; sliding windows in some layers."""

from lcx.convert.hf.llama_like import LlamaLike

QWEN2 = LlamaLike(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    num_kv_heads=32,
    sliding_window=4096,
    biases="qkv",
    windows="by_layer",
    writes_head_dim=False,
)
