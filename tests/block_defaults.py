"""Five models whose settings are at their defaults: what they compute, and what a checkpoint says of them.

`recorded/block_defaults.json` and `.npz` hold the answers from before Block had norms after its parts, residual
multipliers and the like. `python tests/block_defaults.py FOLDER` writes the answers of the code as it is.
"""

import functools
import hashlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx.checkpoint import model_json
from lcx.linearize import Linearize
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.two_mamba import TwoMamba
from lcx.model import Block, Decoder, Mlp, Stage, abstract_params, llama
from lcx.ops.cross_entropy import cross_entropy
from lcx.rope import Rope
from lcx.striped_hyena import striped_hyena

RECORDED = pathlib.Path(__file__).parent / "recorded" / "block_defaults"
SIZES = dict(vocab_size=31, hidden_size=16, max_position_embeddings=64)
TOKENS = np.random.default_rng(0).integers(1, 31, (2, 12)).astype(np.int32)
SEGMENTS = np.array([[1] * 12, [1] * 5 + [2] * 5 + [0] * 2], np.int32)
POSITIONS = np.array([[*range(12)], [*range(5), *range(5), 0, 0]], np.int32)


def _decoder(mixer, mlp) -> Decoder:
    blocks = (Block(mixer, mlp, parent=None),)
    return Decoder(
        **SIZES, stages=(Stage(blocks, 2),), tie_word_embeddings=True, dtype="bfloat16", parent=None
    )


def models() -> dict[str, Decoder]:
    softmax = llama(
        **SIZES,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        rope=Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        layer_windows=(None, 5, 5),
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        remat="full",
    )
    untied = llama(**SIZES, intermediate_size=24, num_layers=2, num_heads=2)
    return {
        "llama": softmax,
        "linear_attention": Linearize(window=2, feature_dim=4, keep_softmax=(1,)).model(untied),
        "striped_hyena": striped_hyena(
            **SIZES,
            pattern="SDH*",
            intermediate_size=24,
            num_heads=2,
            se_groups=4,
            mr_groups=4,
            rope=Rope(rope_theta=1e4),
        ),
        "two_mamba": _decoder(TwoMamba(num_heads=2, head_dim=8, parent=None), Mlp(24, parent=None)),
        "mamba2": _decoder(Mamba2(num_heads=2, head_dim=8, state_dim=4, parent=None), None),
    }


def params_of(model: Decoder) -> dict:
    """Numbers that follow from the order of the paths alone: scales near 1, all else near 0."""
    flat = flatten_dict(abstract_params(model), sep="/")
    made = {}
    for i, path in enumerate(sorted(flat)):
        values = np.random.default_rng(i).normal(size=flat[path].shape)
        made[path] = jnp.asarray(path.endswith("scale") + 0.2 * values, jnp.float32)
    return unflatten_dict(made, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def answers(model: Decoder, params: dict) -> tuple[jax.Array, jax.Array, dict]:
    """(logits, the sum of the losses, its gradient)."""
    batch = {"tokens": TOKENS, "labels": np.roll(TOKENS, -1, axis=1), "loss_weights": SEGMENTS != 0}
    places = {"positions": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEGMENTS)}
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params):
        """And the logits, of the same forward pass: each program costs seconds to compile."""
        x, _ = model.apply({"params": params}, batch["tokens"], **places, method="hidden")
        total = cross_entropy(x, model.head(params), batch["labels"], batch["loss_weights"].astype(jnp.float32))
        return total, model.apply({"params": params}, x, method=lambda model, x: model.head_module().logits(x))

    (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, value, gradient


def described(model: Decoder) -> dict:
    """What must stay to the letter: what a checkpoint says of the model, and its parameters in their order."""
    flat = flatten_dict(abstract_params(model), sep="/")
    return {"model": model_json.to_json(model), "params": {path: list(x.shape) for path, x in flat.items()}}


def probe(x: np.ndarray) -> float:
    """One number that changes with every element of x and with their order."""
    return float(np.vdot(x, np.cos(np.arange(x.size)).reshape(x.shape)))


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()


def main(folder: pathlib.Path) -> None:
    descriptions, arrays = {}, {}
    for name, model in models().items():
        logits, loss, gradient = jax.tree.map(np.asarray, answers(model, params_of(model)))
        flat = flatten_dict(gradient, sep="/")
        arrays |= {f"{name}/logits": logits, f"{name}/loss": loss}
        arrays[f"{name}/gradient"] = np.array([probe(x) for x in flat.values()])
        descriptions[name] = described(model) | {"sha256": _digest(logits, loss, *flat.values())}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "block_defaults.npz", **arrays)
    (folder / "block_defaults.json").write_text(json.dumps(descriptions, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
