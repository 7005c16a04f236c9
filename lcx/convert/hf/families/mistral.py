"""Mistral: one sliding window for all layers, or no window."""

from lcx.convert.hf.llama_like import LlamaLike

MISTRAL = LlamaLike(
    model_type="mistral",
    architecture="MistralForCausalLM",
    num_kv_heads=8,
    sliding_window=4096,
    windows="uniform",
)
