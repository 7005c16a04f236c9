"""Tokens per second of decoding, and bytes of the state or cache, against the context: the mixers of the 2Mamba paper.

    python benchmarks/two_mamba_decode.py [--contexts 256,1024,4096,16384,65536] [--rounds 3] [--output FILE.json]
    python benchmarks/two_mamba_decode.py --draw FILE.json        only the picture, docs/img/two_mamba_decode.svg

One row, float32, four layers of width 256 with four heads of 64. A step decodes one token after `context` others, whose
state or cache is filled with numbers of no meaning: no prompt is read, so that long contexts cost no time. Beside the
measured bytes are those of the published `use_efficient` mode for 2Mamba by formula: it reads the prompt with scores of
all pairs, 4 L^2 bytes for each head of one layer at least, under masks of L^2 bytes in each layer, before it has the
state that it decodes with.
"""

import argparse
import json
import pathlib

import harness

SIZES = {"vocab_size": 1024, "hidden_size": 256, "layers": 4, "heads": 4, "head_dim": 64, "mlp": 512}
SQUARE = "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2"
EXP = "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2"
LABELS = {"two_mamba": "2Mamba", "two_mamba_e": "2Mamba-E", "softmax": "softmax", "mamba2": "Mamba-2, all heads"}
ROOM = 64  # slots after the context
PICTURE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "img" / "two_mamba_decode.svg"


def mixers() -> dict:
    from lcx.mixers.mamba2 import Mamba2
    from lcx.mixers.two_mamba import published

    heads = {"num_heads": SIZES["heads"], "head_dim": SIZES["head_dim"]}
    found = {"two_mamba": published(SQUARE, **heads), "two_mamba_e": published(EXP, **heads)}
    return found | {"softmax": published("softmax", **heads), "mamba2": Mamba2(**heads, conv_size=2, parent=None)}


def decoder(mixer):
    from lcx.model import Block, Decoder, Mlp, Stage

    block = Block(mixer=mixer, mlp=Mlp(SIZES["mlp"], parent=None), parent=None)
    stages = (Stage((block,), SIZES["layers"]),)
    return Decoder(SIZES["vocab_size"], SIZES["hidden_size"], stages, max_position_embeddings=1 << 17, parent=None)


def full(cache, context: int):
    """The cache as it is after `context` tokens, but for the numbers in it."""
    import jax
    import jax.numpy as jnp

    def one(path, leaf):
        name = getattr(path[-1], "key", None)
        if name == "index":
            return jnp.full_like(leaf, context)
        if name == "segment_ids":
            return jnp.broadcast_to((jnp.arange(leaf.shape[-1]) < context).astype(leaf.dtype), leaf.shape)
        return leaf

    return jax.tree_util.tree_map_with_path(one, cache)


def side(mixer, context: int) -> tuple[harness.Side, int]:
    """(a side that decodes one token, the bytes of the cache)."""
    import jax
    import jax.numpy as jnp

    from lcx.model import init_params

    model = decoder(mixer)
    params = init_params(model, jax.random.key(0))
    cache = full(model.init_cache(1, context + ROOM), context)

    def step(params, cache, token):
        x, cache = model.apply(
            {"params": params}, token, positions=jnp.full((1, 1), context), cache=cache, method="hidden"
        )
        return x @ params["lm_head"]["embedding"].T, cache

    held = {"cache": cache}
    token = jnp.ones((1, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, token).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    def decode() -> None:
        logits, held["cache"] = compiled(params, held["cache"], token)
        jax.block_until_ready(logits)

    return harness.calls(decode), size


def efficient_bytes(context: int, layers: int = SIZES["layers"], heads: int = SIZES["heads"]) -> int:
    """Of the published mode for 2Mamba while it reads a prompt, at least.

    Its states: D (H + 1) numbers for each head, D = H (H + 1) / 2, and the last 3 H inputs of the convolution. A mask
    of a byte for each pair of positions in every layer. Scores of all pairs in one layer, float32.
    """
    size = SIZES["head_dim"]
    expanded = size * (size + 1) // 2
    state = 4 * layers * heads * (expanded * (size + 1) + 3 * size)
    return state + layers * context**2 + 4 * heads * context**2


def draw(result: dict) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    speed, memory = figure.subplots(1, 2)
    for name, label in LABELS.items():
        rows = [row for row in result["rows"] if row["mixer"] == name]
        contexts = [row["context"] for row in rows]
        speed.plot(contexts, [row["tokens_per_second"] for row in rows], marker="o", ms=4, label=label)
        memory.plot(contexts, [row["cache_bytes"] / 1e6 for row in rows], marker="o", ms=4, label=label)
    rows = [row for row in result["rows"] if row["mixer"] == "two_mamba"]
    formula = [row["published_efficient_bytes"] / 1e6 for row in rows]
    memory.plot([row["context"] for row in rows], formula, "k:", label="2Mamba, published mode (formula)")
    for axes, text in ((speed, "tokens per second, one row"), (memory, "state or cache (MB)")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context (tokens)")
        axes.set_title(text, fontsize=10)
        axes.grid(alpha=0.25)
    memory.legend(fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="256,1024,4096,16384,65536")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(harness.RESULTS / "two_mamba_decode_cpu.json"))
    parser.add_argument("--draw", metavar="FILE.json")
    flags = parser.parse_args()
    if flags.draw:
        draw(json.loads(pathlib.Path(flags.draw).read_text()))
        return
    run = harness.Run("decoding with the mixers of the 2Mamba paper", threads={"lcx": harness.jax_threads()})
    rows = []
    for context in map(int, flags.contexts.split(",")):
        made = {name: side(mixer, context) for name, mixer in mixers().items()}
        turns = run.turns({name: one for name, (one, _) in made.items()}, rounds=flags.rounds)
        for name, (_, size) in made.items():
            row = {"mixer": name, "context": context, "tokens_per_second": 1 / turns.seconds(name)}
            row["cache_bytes"] = size
            if name == "two_mamba":
                row["published_efficient_bytes"] = efficient_bytes(context)
            rows.append(row)
            print(json.dumps(row), flush=True)
        run.write(flags.output, sizes=SIZES, rows=rows)
    draw({"rows": rows})


if __name__ == "__main__":
    main()
