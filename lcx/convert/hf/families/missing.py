"""What lcx has no counterpart for, in published families that are asked for: named where their folders are refused."""

_DELTA, _MAMBA = "the gated delta rule", "layers of Mamba between those of attention"
_INDEXER, _THREE = "attention to keys that an indexer chooses", "positions in three dimensions"
#: model_type -> a feature that it cannot be computed without
MISSING = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _DELTA),
    "olmo_hybrid": _DELTA,
    "kimi_linear": "the delta rule with a decay for each channel",
    **dict.fromkeys(("bamba", "granitemoehybrid", "jamba", "nemotron_h", "zamba2"), _MAMBA),
    "falcon_h1": "attention and Mamba side by side in a layer",
    **dict.fromkeys(("lfm2", "lfm2_moe"), "gated short convolutions"),
    "minimax": "lightning attention",
    **dict.fromkeys(("deepseek_v32", "deepseek_v4", "glm_moe_dsa"), _INDEXER),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _THREE),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "embeddings for each layer, and layers that use keys of others"),
    "longcat_flash": "experts that return what they get",
    "phimoe": "the choice of experts by SparseMixer",
    "apertus": "the activation function xIELU",
}  # fmt: skip
