"""Writes a model of two layers whose random weights hold a rough induction head, from which training starts.

    python scripts/recall_start.py --output=runs/recall/start [--seed=0]

From fully random weights the head forms late: after 4 million tokens the model still guessed among the values that it
had seen. Here the first layer, whose sliding window is two tokens, copies the code of the token before into the second
half of the residual stream; the second layer looks for its own token there, in the slowly turning pairs of RoPE, and
copies the token that it finds. Noise of the usual initialisation lies over all of it, and training changes all weights.
"""

import argparse
import pathlib

from lcx import config

config.setup_jax()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from lcx.convert.api import save  # noqa: E402
from lcx.llama import llama  # noqa: E402
from lcx.model import init_params  # noqa: E402

WIDTH, HALF, HEADS, WINDOW = 64, 32, 2, 128
NOISE = 0.1  # of the usual initialisation
SHARP = 3.0  # of queries and keys
COPY = 0.4  # of what is found, for each head


def started(seed: int):
    """(model, params)"""
    model = llama(
        vocab_size=258,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_layers=2,
        num_heads=HEADS,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        layer_windows=(2, None),
    )
    params = jax.tree.map(np.array, init_params(model, jax.random.key(seed)))
    codes = np.random.default_rng(seed).normal(size=(258, HALF))
    params["embed"]["embedding"] *= NOISE
    params["embed"]["embedding"][:, :HALF] += codes / np.linalg.norm(codes, axis=1, keepdims=True)
    first, second = params["stages_0"]["block_0"], params["stages_0"]["block_1"]
    for block in (first, second):
        block["mlp"]["down_proj"]["kernel"] *= NOISE
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            block["mixer"][name]["kernel"] *= NOISE
    same = np.eye(HALF)
    first["mixer"]["v_proj"]["kernel"][0, :HALF, 0] += same
    first["mixer"]["o_proj"]["kernel"][0, 0, :, HALF:] += same / np.sqrt(
        WIDTH
    )  # undoes the scale of the norm
    slow = np.r_[
        8:16, 24:32
    ]  # the features of a head that RoPE turns by less than 1.3 radians over the window
    for head in range(HEADS):
        part = SHARP * np.eye(HALF)[:, 16 * head : 16 * head + 16]
        query, key = (second["mixer"][name]["kernel"][0][:, head] for name in ("q_proj", "k_proj"))
        query[:HALF, slow] += part
        key[HALF:, slow] += part
        key[:HALF, slow] -= part / 2  # the first layer saw the token itself, too
        second["mixer"]["v_proj"]["kernel"][0, :HALF, head] += same
        second["mixer"]["o_proj"]["kernel"][0, head, :, :HALF] += COPY * same
    return model, params


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not pathlib.Path(args.output).exists():
        save(args.output, *started(args.seed), format="lcx")


if __name__ == "__main__":
    main()
