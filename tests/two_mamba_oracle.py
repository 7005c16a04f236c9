"""The published 2Mamba models: their saved numbers, and their parameters in the layout of ours."""

import numpy as np


def load(reference, name: str) -> dict[str, np.ndarray]:
    with np.load(reference / "reference" / "two_mamba" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def triangular(expanded: np.ndarray, head_dim: int, block: int = 16) -> np.ndarray:
    """The last axis from our blocks of 16 rows to the published upper triangle, row by row.

    In a block's first 16 columns both orders of a product stand with factor 1 each, in the triangle one with sqrt 2.
    """
    places, factors, offset = {}, {}, 0
    for at in range(0, head_dim, block):
        for m in range(at, min(at + block, head_dim)):
            for n in range(at, head_dim):
                if m <= n:
                    places[m, n] = offset
                    factors[m, n] = 2**0.5 if m < n < at + block else 1.0
                offset += 1
    order = [(m, n) for m in range(head_dim) for n in range(m, head_dim)]
    return expanded[..., [places[i] for i in order]] * np.array([factors[i] for i in order])


def mixer_params(saved: dict[str, np.ndarray], num_heads: int, head_dim: int) -> dict:
    """Parameters (or gradients) of TwoMamba from those of one published self_attn, names without their prefix."""
    shape = (num_heads, head_dim)

    def linear(name, *out, bias=False):
        kernel = {"kernel": saved[f"{name}.weight"].T.reshape(-1, *out)}
        return kernel | ({"bias": saved[f"{name}.bias"].reshape(out)} if bias else {})

    params = {
        "qkv_proj": linear("qkv_proj", 3, *shape),
        "o_proj": {"kernel": saved["o_proj.weight"].T.reshape(*shape, -1)},
    }
    if "conv1d.weight" in saved:  # correlation order there: the last tap multiplies the current token
        params["conv_kernel"] = saved["conv1d.weight"][:, 0, ::-1].reshape(3, *shape, -1)
        params["conv_bias"] = saved["conv1d.bias"].reshape(3, *shape)
    for name, ours in (("A_mask_proj", "forget_proj"), ("dt_proj", "dt_proj")):
        if f"{name}.weight" in saved:
            params[ours] = linear(name, num_heads)
    if "z_gate_proj.weight" in saved:
        params["gate_proj"] = linear("z_gate_proj", *shape, bias=True)
    if "out_norm.weight" in saved:
        params["out_norm"] = {"scale": saved["out_norm.weight"]}
    return params | {name: saved[name] for name in ("A_log", "D") if name in saved}


def softmax_params(saved: dict[str, np.ndarray], num_heads: int, head_dim: int) -> dict:
    """Parameters (or gradients) of Attention: rotated pairs go from neighbours to halves, in q and in k alike."""
    pairs = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    q, k, v = saved["qkv_proj.weight"].reshape(3, num_heads, head_dim, -1)
    kernels = {"q_proj": q[:, pairs], "k_proj": k[:, pairs], "v_proj": v}
    params = {name: {"kernel": np.moveaxis(w, -1, 0)} for name, w in kernels.items()}
    return params | {"o_proj": {"kernel": saved["o_proj.weight"].T.reshape(num_heads, head_dim, -1)}}


def model_params(saved: dict[str, np.ndarray], kind: str, mixer) -> dict:
    """The parameters ("param") or gradients ("grad") of a saved model, as a Decoder of one stage has them.

    `mixer`: from the names and arrays of one layer's self_attn to the parameters of our mixer.
    """
    arrays = {key.partition("/")[2]: x for key, x in saved.items() if key.startswith(f"{kind}/")}
    depth = 1 + max(int(key.split(".")[2]) for key in arrays if key.startswith("model.layers."))

    def layer(i):
        prefix = f"model.layers.{i}."
        own = {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
        attn = {key.removeprefix("self_attn."): x for key, x in own.items() if key.startswith("self_attn.")}
        return {
            "mixer": mixer(attn),
            "mixer_norm": {"scale": own["input_layernorm.weight"]},
            "mlp_norm": {"scale": own["post_attention_layernorm.weight"]},
            "mlp": {
                name: {"kernel": own[f"mlp.{name}.weight"].T}
                for name in ("gate_proj", "up_proj", "down_proj")
            },
        }

    return {
        "embed": {"embedding": arrays["model.embed_tokens.weight"]},
        "lm_head": {"embedding": arrays["lm_head.weight"]},
        "final_norm": {"scale": arrays["model.norm.weight"]},
        "stages_0": {"block_0": stacked([layer(i) for i in range(depth)])},
    }


def stacked(trees: list):
    """Trees of arrays -> one tree, the layers in front."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: stacked([tree[key] for tree in trees]) for key in first}
    return np.stack(trees)
