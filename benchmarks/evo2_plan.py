"""What the compiler says about Evo 2 7B on a million bases of one sequence, for one GPU that need not be at hand.

    python benchmarks/evo2_plan.py [--letters 1048576] [--topologies h200:1] [--output FILE.json]

Compiles the programs of `lcx.score` for one long sequence in pieces, in both orders. "pieces": one piece through all
layers, with the keys and values of all of them (lcx/pieces.py). "layers": one layer over all pieces, with the residual
stream of the sequence and the keys and values of that layer (lcx/layer_order.py), which is what `lcx.score` and
`lcx.embed` do at this length; its peak is that of its largest program. The weights of all layers count in both. Needs
the extra `aot`; minutes on 2 cores.
"""

import argparse
import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from kernels_pallas import aot  # noqa: E402
from lcx import layer_order, pieces  # noqa: E402
from lcx.evals.support import scoring  # noqa: E402
from lcx.model import Decoder, layers  # noqa: E402
from lcx.ops.cross_entropy import token_nll  # noqa: E402
from lcx.parameters import abstract_params  # noqa: E402
from lcx.planning import topology as topologies  # noqa: E402
from lcx.rope import Rope  # noqa: E402
from lcx.striped_hyena import striped_hyena  # noqa: E402

PIECE = scoring.TOKENS_PER_BATCH


def evo2_7b(letters: int) -> Decoder:
    """The sizes of configs/models/evo2_7b.gin."""
    return striped_hyena(
        pattern="SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*",
        hidden_size=4096,
        intermediate_size=11264,
        num_heads=32,
        se_groups=256,
        mr_groups=256,
        max_position_embeddings=letters,
        rope=Rope(rope_type="linear", factor=128.0, original_max_position_embeddings=8192),
        dtype="bfloat16",
    )


def placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def peak(lowered: Any) -> int:
    """Bytes of arguments, results that are not written over them, temporary arrays and the program."""
    memory = lowered.compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def in_pieces(model: Decoder, params: Any, state: Any, mesh: jax.sharding.Mesh) -> int:
    row = placed(jax.ShapeDtypeStruct((1, PIECE), np.int32), mesh)
    params, state = placed((params, state), mesh)
    return peak(scoring._score.lower(model, token_nll, params, state, row, row, None, None))


def by_layers(model: Decoder, params: Any, letters: int, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """The peak while a layer of each kind runs, with the weights of all layers."""
    x, rope_length = placed(
        (jax.ShapeDtypeStruct((1, letters, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((), np.int32)), mesh
    )
    found: dict[str, int] = {}
    for layer in layers(model):
        name = f"{type(layer.block.mixer).__name__}, {layer.block.mlp.activation}"
        if name in found:
            continue
        stage, block = layer.path.split("/")
        weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params[stage][block])
        row = {"positions": None, "segment_ids": None}
        lowered = layer_order._layer.lower(layer.block, PIECE, (), "none", placed(weights, mesh), x, row, rope_length)
        found[name] = peak(lowered) + nbytes(params)
        print(name, f"{found[name] / 2**30:.1f} GiB", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=1 << 20)
    parser.add_argument("--topologies", default="h200:1")
    parser.add_argument("--orders", default="pieces,layers")
    parser.add_argument("--output", default=os.path.join(HERE, "results", "evo2_plan.json"))
    args = parser.parse_args()
    model = evo2_7b(args.letters)
    params = abstract_params(model, dtype=jnp.bfloat16)
    state = jax.eval_shape(lambda: pieces.empty_state(model, 1, args.letters, args.letters))
    assert layer_order.saves(model, 1, args.letters)
    rows = []
    for name in args.topologies.split(","):
        place = topologies.find(name)
        row = {"topology": name, "letters": args.letters, "piece": PIECE, "memory_bytes": place.chip.memory}
        row |= {"weights_bytes": nbytes(params), "state_bytes": nbytes(state)}
        mesh = aot._one(name.partition(":")[0])
        with jax.set_mesh(mesh), aot.uncached():
            if "pieces" in args.orders:
                row["pieces_bytes"] = in_pieces(model, params, state, mesh)
            if "layers" in args.orders:
                row["layers_bytes"] = by_layers(model, params, args.letters, mesh)
        rows.append(row)
        print(json.dumps(row), flush=True)
        with open(args.output, "w") as file:
            json.dump({"what": "Evo 2 7B, likelihood of one sequence", "rows": rows}, file)
            file.write("\n")


if __name__ == "__main__":
    main()
