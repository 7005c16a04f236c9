"""What the compiler says about Evo 2 7B on a million bases of one sequence, for one GPU that is not at hand.

    python benchmarks/evo2_plan.py [--letters 1048576] [--topologies h100:1,h200:1] [--output benchmarks/results/evo2_plan.json]

Compiles the programs of `lcx.score` and `lcx.embed` for a sequence in pieces: a forward pass over one piece with the
state that the earlier ones left, whose peak is that of the whole sequence. Needs the extra `aot`.
"""

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from kernels_pallas import aot  # noqa: E402
from lcx import activations, pieces  # noqa: E402
from lcx.evals.support import scoring  # noqa: E402
from lcx.ops.cross_entropy import token_nll  # noqa: E402
from lcx.parameters import abstract_params  # noqa: E402
from lcx.planning import topology as topologies  # noqa: E402
from lcx.rope import Rope  # noqa: E402
from lcx.striped_hyena import striped_hyena  # noqa: E402

MODEL = striped_hyena(  # configs/models/evo2_7b.gin
    pattern="SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*",
    hidden_size=4096,
    intermediate_size=11264,
    num_heads=32,
    se_groups=256,
    mr_groups=256,
    max_position_embeddings=1048576,
    rope=Rope(rope_type="linear", factor=128.0, original_max_position_embeddings=8192),
    dtype="bfloat16",
)

PARAMS = abstract_params(MODEL, dtype=jnp.bfloat16)


def structs(tree, mesh):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def lowered(job, letters, piece, mesh):
    params = structs(PARAMS, mesh)
    slots = -(-letters // piece) * piece
    state = structs(jax.eval_shape(lambda: pieces.empty_state(MODEL, 1, slots, letters)), mesh)
    row = structs(jax.ShapeDtypeStruct((1, piece), np.int32), mesh)
    if job == "score":
        return scoring._score.lower(MODEL, token_nll, params, state, row, row, None, None), params, state
    points = tuple(activations.points(MODEL, ["blocks.28.mlp.l3"]).values())
    counted = structs(jax.ShapeDtypeStruct((1, piece), bool), mesh)
    last = structs(jax.ShapeDtypeStruct((1,), np.int32), mesh)
    rest = dict(tokens=row, positions=row, segment_ids=row, counted=counted, last=last)
    return activations.piece.lower(MODEL, points, "mean", params, state, **rest), params, state


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=1048576)
    parser.add_argument("--piece", type=int, default=16384)
    parser.add_argument("--topologies", default="h200:1")
    parser.add_argument("--jobs", default="score,embed")
    args = parser.parse_args()
    for name in args.topologies.split(","):
        place = topologies.find(name)
        mesh = aot._one(name.partition(":")[0])
        for job in args.jobs.split(","):
            with jax.set_mesh(mesh), aot.uncached():
                low, params, state = lowered(job, args.letters, args.piece, mesh)
                memory = low.compile().memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            print(json.dumps(dict(job=job, topology=name, peak=peak / 2**30, params=size(params) / 2**30, state=size(state) / 2**30, temp=memory.temp_size_in_bytes / 2**30, memory=place.chip.memory / 2**30)), flush=True)


if __name__ == "__main__":
    main()
