"""Compares a linearized model with its softmax model: losses, size of the state, and decoding speed.

Examples:
  python benchmarks/linearized.py --softmax runs/linearize/softmax_lora --linear runs/linearize/lora \
    --results runs/linearize/eval --output runs/linearize/linearize.json
  python benchmarks/linearized.py --softmax HF_FOLDER --transformers HF_FOLDER --output decoding.json

--results is a folder of lcx.evaluate outputs, as written by scripts/reproduce_linearize.sh: softmax, softmax_lora,
transfer, lora, no_transfer, window_only, linear_only. Decoding: a token at a time after a context of each length, both
models in turns in one run, medians; memory is what each keeps per sequence. Without --linear the softmax model is
linearized as it stands, untrained: its speed does not depend on its numbers. --transformers HF_FOLDER (extras
dev,torch) decodes that softmax model with transformers and torch in the same turns.
"""

import argparse
import json
import pathlib
import sys

import harness
import jax
import jax.numpy as jnp
import workers

import lcx
from lcx import model as lcx_model
from lcx.errors import UserError
from lcx.linearize import Linearize

LENGTHS = (256, 1024, 4096, 8192, 16384, 32768, 65536)
STEPS = 16  # tokens per call, which amortise the cost of a launch
TITLES = {
    "softmax": "softmax model",
    "softmax_lora": "softmax model, LoRA",
    "transfer": "linear, transfer alone",
    "lora": "linear, transfer and LoRA",
    "no_transfer": "linear, LoRA without transfer",
    "window_only": "its window alone",
    "linear_only": "its linear part alone",
}


def decoder(model, params, length: int):
    """(compiled n tokens -> logits, arguments, bytes of the cache per sequence) after `length` tokens."""
    cache = model.init_cache(1, length + STEPS)

    def filled(path, x):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else path[-1].name
        if name == "index":
            return jnp.full_like(x, length)
        return jnp.ones_like(x) if name == "segment_ids" else x + jnp.asarray(0.01, x.dtype).astype(x.dtype)

    cache = jax.tree_util.tree_map_with_path(filled, cache)

    def steps(params, token, cache):
        def one(carry, _):
            token, cache = carry
            x, cache = model.apply({"params": params}, token, cache=cache, method="hidden")
            logits = x[:, -1] @ model.head(params).T
            return (jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32), cache), None

        return jax.lax.scan(one, (token, cache), None, length=STEPS)[0][0]

    args = params, jnp.ones((1, 1), jnp.int32), cache
    return jax.jit(steps).lower(*args).compile(), args, sum(x.nbytes for x in jax.tree.leaves(cache))


class Side(workers.Library):
    """lcx's models, or transformers', in its own process."""

    def load(self, paths: dict[str, str], peer: str | None) -> None:
        if self.lcx:
            self.models = {name: lcx.load(path, dtype="float32") for name, path in paths.items()}
            self.models.setdefault("linear", untrained(*self.models["softmax"]))
            return
        import torch
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(peer, dtype=torch.float32).eval()

    def prepare(self, length: int) -> dict[str, int]:
        """Fills the caches; {model: bytes of its cache}."""
        self.length, sizes = length, {}
        if self.lcx:
            self.runs = {}
            for name, model in self.models.items():
                step, args, sizes[name] = decoder(*model, length)
                self.runs[name] = harness.on_device(step, *args)
        return sizes

    def steps(self, name: str = "transformers") -> None:
        """STEPS tokens after `length`, transformers with its own cache."""
        if self.lcx:
            self.runs[name](1)
            return
        import torch

        token = torch.ones((1, 1), dtype=torch.long)
        with torch.no_grad():
            for _ in range(STEPS):
                out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)

    def fill(self) -> None:
        """A cache of transformers with `length` tokens in it, which a turn then extends."""
        if self.lcx:
            return
        import torch
        import transformers

        config, self.cache = self.model.config, transformers.DynamicCache()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, self.length, head_dim)
        for layer in range(config.num_hidden_layers):
            self.cache.update(torch.full(shape, 0.01), torch.full(shape, 0.01), layer)


class Filled(harness.Asked):
    """Transformers' steps, each turn of STEPS tokens after a cache that is filled anew outside of the time."""

    def __call__(self, n: int) -> float:
        return sum((self.child.ask({"do": "fill"}), super(Filled, self).__call__(1))[1] for _ in range(n))


def untrained(model, params):
    """The model with linear attention in place of softmax, as configs/linearize/tinystories_transfer.gin starts it."""
    head_dim = lcx_model.layers(model)[0].block.mixer.head_dim
    linear = Linearize(window=32, feature_dim=head_dim, feature_init="identity").model(model)
    return linear, lcx_model.init_params(linear, jax.random.key(0))


def decoding(
    run: harness.Run, sides: workers.Sides, names: tuple[str, ...], lengths: tuple[int, ...], rounds: int
) -> list[dict]:
    rows, peers = [], {name: x for name, x in sides.processes.items() if name != "lcx"}
    for length in lengths:
        sizes = sides.ask("prepare", length=length)["lcx"]
        runs = {name: sides.processes["lcx"].side({"do": "steps", "name": name}) for name in names}
        runs |= {name: Filled(x, {"do": "steps"}) for name, x in peers.items()}
        turns = run.turns(runs, rounds=rounds, seconds=0.3)
        times = {name: turns.seconds(name) for name in names}
        if peers:
            times["transformers"] = turns.seconds(workers.faster(turns, "transformers"))
        row = {"length": length, "cache_bytes": sizes}
        row["tokens_per_second"] = {name: STEPS / seconds for name, seconds in times.items()}
        row["speed_ratio"] = min(t for name, t in times.items() if name != "linear") / times["linear"]
        rows.append(row)
        print(
            f"{length:6d} tokens:",
            *(f"{n} {r:.0f} tok/s" for n, r in row["tokens_per_second"].items()),
            flush=True,
        )
    return rows


def losses(folder: pathlib.Path) -> dict[str, dict]:
    """name -> the buckets of its loss by position."""
    found = {}
    for name in TITLES:
        path = folder / name / "results.json"
        if not path.is_file():
            raise UserError(
                f"no {path}: expected what lcx.evaluate writes; run scripts/reproduce_linearize.sh"
            )
        result = json.loads(path.read_text())["evaluations"]["loss_by_position"]["lengths"][-1]
        keys = ("nll", "standard_error", "tokens", "length", "last_quarter", "buckets")
        found[name] = {key: result[key] for key in keys}
    return found


def gap_closed(found: dict[str, dict]) -> dict[str, float]:
    """By position, the share of the loss gap to softmax with the same LoRA that attention transfer closes."""

    def share(of):
        lost, won = of("no_transfer") - of("softmax_lora"), of("no_transfer") - of("lora")
        return won / lost

    parts = {"all": share(lambda name: found[name]["nll"])}
    for i, bucket in enumerate(found["lora"]["buckets"]):
        parts[f"{bucket['start']}-{bucket['end']}"] = share(
            lambda name, i=i: found[name]["buckets"][i]["nll"]
        )
    return parts


def table(found: dict[str, dict]) -> str:
    buckets = [f"{b['start']}-{b['end']}" for b in found["softmax"]["buckets"]]
    lines = ["| | all | " + " | ".join(buckets) + " |", "|---" * (len(buckets) + 2) + "|"]
    for name, result in found.items():
        numbers = [result["nll"], *(b["nll"] for b in result["buckets"])]
        lines.append(f"| {TITLES[name]} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")
    return "\n".join(lines)


def draw(results: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from lcx.evals.support import figures

    with pyplot.rc_context(figures.theme(dark=False)):
        figure, axes = pyplot.subplots(1, 3 if "losses" in results else 2, figsize=(15, 4.4))
        rows = results["decoding"]
        lengths = [row["length"] for row in rows]
        for unit, panel in (("tokens_per_second", axes[-2]), ("cache_bytes", axes[-1])):
            for i, name in enumerate(rows[0][unit]):
                values = [row[unit][name] / (1 if unit == "tokens_per_second" else 2**20) for row in rows]
                panel.plot(lengths, values, color=f"C{i}", marker="o", label=name)
            figures.position_axis(panel, "context (tokens)")
            figures.log_axis(panel, "y")
            figures.legend(panel, list(rows[0][unit]))
        axes[-2].set_title("decoding, tokens per second")
        axes[-1].set_title("kept per sequence, MiB")
        if "losses" in results:
            for i, (name, result) in enumerate(results["losses"].items()):
                buckets = result["buckets"]
                x = [max(1, (b["start"] + b["end"]) / 2) for b in buckets]
                axes[0].plot(
                    x, [b["nll"] for b in buckets], color=f"C{i % 7}", marker="o", label=TITLES[name]
                )
            figures.position_axis(axes[0], "position (tokens)")
            axes[0].set_title("held-out loss, nats per token")
            axes[0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--softmax", required=True, metavar="PATH", help="checkpoint of the softmax model")
    parser.add_argument("--linear", metavar="PATH", help="checkpoint of the linear model")
    parser.add_argument("--results", metavar="DIR", help="folder of evaluations to compare")
    parser.add_argument("--output", required=True, metavar="FILE.json")
    parser.add_argument(
        "--transformers", metavar="HF_FOLDER", help="also decode this model with transformers"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    args = parser.parse_args()
    try:
        results: dict = {}
        if args.results:
            results["losses"] = losses(pathlib.Path(args.results))
            results["share_of_gap_closed"] = gap_closed(results["losses"])
        paths = {"softmax": args.softmax} | ({"linear": args.linear} if args.linear else {})
        kinds = ("lcx", "transformers") if args.transformers else ("lcx",)
        with workers.started(__file__, kinds) as sides:
            sides.ask("load", paths=paths, peer=args.transformers)
            run = harness.Run("decoding a token at a time after a context; in turns, medians", threads=sides.threads)
            results["decoding"] = decoding(run, sides, ("linear", "softmax"), tuple(args.lengths), args.rounds)
    except UserError as error:
        print(f"linearized.py: {error}", file=sys.stderr)
        return 1
    faster = [row["length"] for row in results["decoding"] if row["speed_ratio"] > 1]
    results["linear_is_faster_from"] = min(faster, default=None)
    output = pathlib.Path(args.output)
    run.write(output, **results)
    draw(results, output.with_suffix(".svg"))
    if "losses" in results:
        print(table(results["losses"]))
        print("share of the gap closed by transfer:", results["share_of_gap_closed"])
    print("linear decodes faster from", results["linear_is_faster_from"], "tokens on")
    return 0


if __name__ == "__main__":
    sys.exit(workers.serve(Side) if workers.asked() else main())
