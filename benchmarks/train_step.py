"""The time of a whole training step by row length: attention and the mixers of this library that replace it.

    python benchmarks/train_step.py [--models llama,linearized,two_mamba,striped_hyena] [--width small|1b]
                                    [--lengths 1024,...] [--tokens N] [--rounds 3] [--output FILE.json]

Four decoders of one width, depth and vocabulary: Llama; the same with linear attention and a softmax window of 64 in
every layer (LoLCATS); the same with 2Mamba; StripedHyena 2 (its own pattern, one layer in seven is attention). The step
is the trainer's: forward, backward, AdamW, on `--tokens` random tokens for every row length. It prints for each T:
tokens/s, model FLOPs (lcx.model.flops_per_token) as a share of the speed of a large matrix product on this machine
(measured first), and XLA's count of the peak memory of the step: weights, optimizer state, activations. `growth` is p
in time ~ T^p at a fixed number of rows.

Rows of other lengths and models stay in the file, so that one length can be measured at a time.

On a CPU: float32, small models that take turns. On an accelerator: bfloat16 activations, 1.2B parameters, T from 8K to
1M, one model after the other. Writes benchmarks/results/train_step_<device>.json and .svg by default.
"""

import argparse
import json
import os

import harness
import jax
import numpy as np

from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.two_mamba import TwoMamba
from lcx.optim import AdamW
from lcx.striped_hyena import striped_hyena
from lcx.training import step as train_step

HERE = os.path.dirname(os.path.abspath(__file__))
ON_CPU = jax.default_backend() == "cpu"
WIDTHS = {
    "tiny": {"hidden": 32, "intermediate": 64, "heads": 2, "kv_heads": 1, "layers": 7, "vocab": 256},
    "small": {"hidden": 256, "intermediate": 704, "heads": 4, "kv_heads": 2, "layers": 7, "vocab": 4096},
    "1b": {"hidden": 2048, "intermediate": 8192, "heads": 16, "kv_heads": 8, "layers": 14, "vocab": 32768},
}
PATTERN = "SDH*SDH"  # Evo 2 7B has four patterns like this one


def llama(width: dict, **shared) -> model_lib.Decoder:
    return model_lib.llama(
        vocab_size=width["vocab"],
        hidden_size=width["hidden"],
        intermediate_size=width["intermediate"],
        num_layers=width["layers"],
        num_heads=width["heads"],
        num_kv_heads=width["kv_heads"],
        tie_word_embeddings=True,
        **shared,
    )


def linearized(width: dict, **shared) -> model_lib.Decoder:
    def mixer(old):
        return LinearAttention(
            old.num_heads, old.num_kv_heads, old.head_dim, old.rope, feature_dim=old.head_dim, parent=None
        )

    return model_lib.map_mixers(llama(width, **shared), mixer)


def two_mamba(width: dict, **shared) -> model_lib.Decoder:
    return model_lib.map_mixers(
        llama(width, **shared), lambda old: TwoMamba(old.num_heads, old.head_dim, parent=None)
    )


def hyena(width: dict, pattern: str = PATTERN, **shared) -> model_lib.Decoder:
    return striped_hyena(
        pattern=pattern * (width["layers"] // len(pattern)),
        hidden_size=width["hidden"],
        intermediate_size=width["intermediate"],
        num_heads=width["heads"],
        se_groups=width["hidden"] // 16,
        mr_groups=width["hidden"] // 16,
        vocab_size=width["vocab"],
        **shared,
    )


MODELS = {"llama": llama, "linearized": linearized, "two_mamba": two_mamba, "striped_hyena": hyena}


class Step:
    """The trainer's compiled step of one model at one T; each call advances its state."""

    def __init__(self, name: str, width: dict, *, B: int, T: int, dtype: str, remat: str):
        mesh = sharding.make_mesh(fsdp=1, data=1, tensor=1, devices=jax.devices()[:1])
        self.model = MODELS[name](width, max_position_embeddings=T, dtype=dtype, remat=remat)
        self.tokens = B * T
        schedule = AdamW(1e-4, "constant", warmup_steps=0, weight_decay=0.1)
        with jax.set_mesh(mesh):
            shapes = {"params": model_lib.abstract_params(self.model, mesh=mesh)}
            optimizer = schedule.build(train_step.moving(shapes), 1000)
            abstract = train_step.abstract_state(shapes, optimizer, mesh)
            step = train_step.make_step(
                self.model,
                optimizer,
                objectives.next_token,
                schedule.learning_rates(1000),
                accumulation=1,
                abstract=abstract,
            )
            rng = np.random.default_rng(0)
            tokens = rng.integers(0, width["vocab"], (B, T), np.int32)
            batch = {
                "tokens": tokens,
                "labels": np.roll(tokens, -1, axis=1),
                "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
                "segment_ids": np.ones((B, T), np.int32),
                "loss_weights": np.ones((B, T), np.float32),
            }
            self.batch = sharding.shard_batch(batch, mesh)
            self.compiled = step.lower(abstract, self.batch, np.int32(0)).compile()
            weights = {"params": model_lib.init_params(self.model, jax.random.key(0), mesh=mesh)}
            self.state = {**weights, "opt_state": train_step.init_opt_state(optimizer, weights, abstract)}
        memory = self.compiled.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.loss = float("nan")

    def run(self, calls: int) -> float:
        def step(calls):
            for _ in range(calls):
                self.state, metrics = self.compiled(self.state, self.batch, np.int32(0))
            self.loss = metrics["loss"]
            return self.loss

        return harness.on_device(step, calls)(1)


def measure(names: list[str], T: int, args) -> list[dict]:
    """The rows of these models at one T, in turns."""
    B = max(1, args.tokens // T)
    steps: dict[str, Step] = {}
    for name in names:
        try:
            step = Step(name, WIDTHS[args.width], B=B, T=T, dtype=args.dtype, remat=args.remat)
            if not ON_CPU:  # out of memory shows in the first step
                step.run(1)
        except jax.errors.JaxRuntimeError as error:  # out of memory
            print(f"T={T} {name}: {str(error)[:200]}", flush=True)
            continue
        steps[name] = step
    run = harness.Run(f"T = {T}", threads={"lcx": harness.jax_threads()})
    sides = {name: step.run for name, step in steps.items()}
    times = run.turns(sides, rounds=args.rounds, seconds=args.seconds).medians()
    rows = []
    for name, step in steps.items():
        flops = model_lib.flops_per_token(step.model, T) * step.tokens
        rows.append(
            {
                "model": name,
                "T": T,
                "B": B,
                "seconds": round(times[name], 5),
                "tokens_per_second": round(step.tokens / times[name], 1),
                "model_flops_share": round(
                    flops / times[name] / args.ceilings["product_flops_per_second"], 4
                ),
                "peak_mib": round(step.bytes / 2**20, 1),
                "parameters": model_lib.num_params(step.model),
                "loss": round(float(step.loss), 4),
                "quiet": run.quiet,
                "watch": run.watch(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def others(args, names: list[str]) -> list[dict]:
    """The rows of the file that are not measured now: other lengths or models, each with its record."""
    if not os.path.exists(args.output):
        return []
    with open(args.output) as file:
        rows = json.load(file)["rows"]
    lengths = [int(T) for T in args.lengths.split(",")]
    return [r for r in rows if "quiet" in r and not (r["T"] in lengths and r["model"] in names)]


def plot(rows: list[dict], path: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {
        "tokens_per_second": "tokens/s",
        "model_flops_share": "model FLOPs / peak product",
        "peak_mib": "MiB",
    }
    fig, axes = plt.subplots(1, 3, figsize=(14, 4))
    for ax, (key, label) in zip(axes, columns.items(), strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == name]
            ax.plot([row["T"] for row in mine], [row[key] for row in mine], marker="o", ms=3, label=name)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens in a row")
        ax.set_ylabel(label)
    axes[0].legend(fontsize=8)
    fig.suptitle(title)
    fig.tight_layout()
    fig.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [1024, 4096, 16384] if ON_CPU else [2**n for n in range(13, 21)]
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--width", default="small" if ON_CPU else "1b", choices=WIDTHS)
    parser.add_argument("--lengths", default=",".join(map(str, lengths)))
    parser.add_argument(
        "--tokens", type=int, default=16384 if ON_CPU else 65536, help="B = tokens / T, at least 1"
    )
    parser.add_argument("--dtype", default="float32" if ON_CPU else "bfloat16", help="of activations")
    parser.add_argument("--remat", default="dots" if ON_CPU else "full")
    parser.add_argument("--rounds", type=int, default=2 if ON_CPU else 5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--output", help="benchmarks/results/train_step_<device>.json; - for none")
    parser.add_argument("--plot", help="default: next to the output; - for none")
    args = parser.parse_args()
    name = f"train_step_{harness.device_name()}.json"
    args.output = args.output or os.path.join(HERE, "results", name)
    args.plot = args.plot or (args.output.replace(".json", ".svg") if args.output != "-" else "-")
    return args


def main() -> None:
    args = parse()
    run = harness.Run("a training step (AdamW) against T", threads={"lcx": harness.jax_threads()})
    args.ceilings = harness.ceilings(run)
    names = args.models.split(",")
    rows = others(args, names)
    for T in map(int, args.lengths.split(",")):
        for group in [names] if ON_CPU else [[name] for name in names]:
            rows += measure(group, T, args)
    growth = {
        name: harness.growth({r["T"]: r["seconds"] / r["T"] / r["B"] for r in rows if r["model"] == name})
        for name in names
    }
    print(json.dumps({"growth": growth}))
    run.write(
        args.output,
        ceilings=args.ceilings,
        width=WIDTHS[args.width],
        settings={key: getattr(args, key) for key in ("dtype", "remat", "tokens", "rounds")},
        growth=growth,
        rows=rows,
    )
    if args.plot != "-":
        title = f"{harness.machine()['device']}, {args.width}, {args.tokens} tokens a step"
        plot(rows, args.plot, title)


if __name__ == "__main__":
    main()
