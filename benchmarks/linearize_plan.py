"""The memory per device, disk and hours needed to linearize a Llama, computed from shapes; nothing is allocated.

Examples:
  python benchmarks/linearize_plan.py                                   Llama 3.1 8B, 70B and 405B on H100s of 80 GB
  python benchmarks/linearize_plan.py --size 70b --layers_per_block 5 --devices 8 --tokens 20e6 --seq_len 2048

Each row traces both stages (jax.eval_shape of the gradient; transfer on the largest block), so the planned programs
are known to be valid. Memory: the weights as the trainer holds them (trained ones in float32, others in bfloat16 as
published), gradients and moments of the trained ones, and the activations that remat = 'full' keeps, divided over the
devices (fsdp); the working memory of one layer is not included.
Hours: FLOPs of the model at --mfu of --peak_tflops; the teacher and the student both run.
"""

import argparse
import json
import math

import jax
import jax.numpy as jnp

from lcx import model as model_lib
from lcx import objectives
from lcx.linearize import Linearize, is_new
from lcx.lora import LoRA
from lcx.model import Decoder, Layers, llama
from lcx.optim import AdamW, leaf_paths
from lcx.training import residual_store
from lcx.training.step import all_trains, kept, moving

SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_layers": 126, "num_heads": 128},
}
PLANS = (  # (size, layers per block or None for all at once, devices)
    ("8b", None, 1),
    ("8b", None, 8),
    ("70b", None, 8),
    ("70b", 5, 8),
    ("405b", None, 64),
    ("405b", 9, 8),
    ("405b", 3, 8),
)


def model_of(size: str) -> Decoder:
    return llama(
        vocab_size=128256, num_kv_heads=8, max_position_embeddings=131072, dtype="bfloat16", **SIZES[size]
    )


def nbytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def as_published(weights: dict, trains) -> dict:
    stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights["params"])
    return {**weights, "params": kept(weights["params"], trains["params"], stored)}


def batch_of(model: Decoder | Layers, rows: int, seq_len: int) -> dict:
    ids = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    batch = {name: ids for name in ("tokens", "labels", "segment_ids", "positions")}
    batch["loss_weights"] = jax.ShapeDtypeStruct((rows, seq_len), jnp.float32)
    if isinstance(model, Layers):
        batch["residual"] = jax.ShapeDtypeStruct((rows, seq_len, model.hidden_size), jnp.bfloat16)
        del batch["tokens"]
    return batch


def stage(model: Decoder | Layers, objective, trains, weights, rows: int, seq_len: int) -> dict:
    """The bytes of one stage, from tracing its step."""
    moved = moving(weights, trains)
    optimizer = AdamW(warmup_steps=0).build(moved, 1)
    state = jax.eval_shape(optimizer.init, moved)
    batch = batch_of(model, rows, seq_len)
    jax.eval_shape(lambda w, b: jax.grad(lambda w: objective(model, w, b)[0])(w), weights, batch)
    depth = len(model_lib.layers(model))
    return {
        "weights": nbytes(weights),
        "trained_parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(moved)),
        "optimizer_and_gradients": nbytes(state) + nbytes(moved),
        "kept_activations": depth * rows * seq_len * model.hidden_size * 2,
    }


def plan(size: str, layers_per_block: int | None, devices: int, args) -> dict:
    model = model_of(size).clone(remat="full", parent=None)
    linear = Linearize(feature_init="identity").model(model)
    depth = model.num_layers
    part = linear if layers_per_block is None else model_lib.part(linear, 0, min(layers_per_block, depth))
    weights = {"params": model_lib.abstract_params(part)}
    trains = AdamW(trainable="feature_map_|window_factors").trains(weights)
    weights = as_published(weights, trains)
    rows = args.batch_size // args.accumulation
    first = stage(part, objectives.attention_transfer, trains, weights, rows, args.seq_len)
    pairs = LoRA(rank=8).abstract(linear)
    both = {"params": model_lib.abstract_params(linear), "lora": pairs}
    both = as_published(both, all_trains(both))
    second = stage(linear, objectives.next_token, all_trains(both), both, rows, args.seq_len)
    blocks = 1 if layers_per_block is None else -(-depth // layers_per_block)
    steps = math.ceil(args.tokens / (args.batch_size * args.seq_len))
    stream = residual_store.Layout(steps * args.batch_size, args.seq_len, model.hidden_size, "bfloat16")
    # forward of teacher and student; backward of the student's feature maps is small compared with them
    flops = model_lib.flops_per_token(model, args.seq_len) / 3
    fresh = sum(
        math.prod(x.shape)
        for path, x in zip(leaf_paths(both["params"]), jax.tree.leaves(both["params"]), strict=True)
        if is_new(path)
    )
    rate = devices * args.peak_tflops * 1e12 * args.mfu
    per_device = {
        name: sum(number for key, number in numbers.items() if key != "trained_parameters") / devices
        for name, numbers in (("transfer", first), ("lora", second))
    }
    return {
        "size": size,
        "parameters": model_lib.num_params(model),
        "new_parameters": fresh,
        "layers_per_block": layers_per_block,
        "blocks": blocks,
        "devices": devices,
        "transfer": first,
        "lora": second,
        "gb_per_device": {name: round(x / 1e9, 1) for name, x in per_device.items()},
        "input_bytes": 0 if layers_per_block is None else blocks * stream.num_bytes,
        # checkpoints: one per block, one being written, and the full model; or one kept and one being written
        "checkpoint_bytes": 2 * nbytes(both["params"]) + (0 if layers_per_block is None else nbytes(weights)),
        "hours": {
            "transfer": round(args.tokens * flops * (1 if blocks == 1 else 2) / rate / 3600, 1),
            "lora": round(args.tokens * flops * 2 / rate / 3600, 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="one size; default: a table of all")
    parser.add_argument("--layers_per_block", type=int, metavar="K", help="None: all layers at once")
    parser.add_argument("--devices", type=int, default=8, metavar="N")
    parser.add_argument("--tokens", type=float, default=20.5e6, help="tokens of each stage")
    parser.add_argument("--seq_len", type=int, default=1024, metavar="T")
    parser.add_argument("--batch_size", type=int, default=8, metavar="ROWS")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N")
    parser.add_argument(
        "--peak_tflops", type=float, default=989.0, help="peak of a device in bfloat16; default: H100"
    )
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--output", metavar="FILE.json")
    args = parser.parse_args()
    plans = PLANS if args.size is None else ((args.size, args.layers_per_block, args.devices),)
    found = []
    columns = "model, layers a block, devices, GB a device: transfer, LoRA, "
    columns += "disk: inputs, checkpoints, hours: transfer, LoRA"
    print("| " + columns.replace(",", " |") + " |")
    print("|---" * len(columns.split(",")) + "|")
    for size, layers, devices in plans:
        row = plan(size, layers, devices, args)
        found.append(row)
        cells = (
            *(size, f"{layers or 'all'} ({row['blocks']})", devices, *row["gb_per_device"].values()),
            *(residual_store.size(row[f"{name}_bytes"]) for name in ("input", "checkpoint")),
            *row["hours"].values(),
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"settings": vars(args), "plans": found}, file, indent=1)


if __name__ == "__main__":
    main()
