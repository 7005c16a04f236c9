"""Extends and linearizes a model that retrieves within its window, and measures how far each result retrieves.

    python scripts/recall_study.py --base=WORKDIR --text=long.jsonl --output=DIR [--steps=40] [--seed=0]
    python scripts/recall_study.py --collect DIR/recall.json ... --output=FILE.json

The base is a run of configs/pretrain/recall.gin. Writes DIR/recall.json: for each variant the share of values recalled
by length and by distance; --collect puts those of several seeds into one file. Trained variants are runs in DIR, and
are not trained again. `scripts/train_recall.sh` does all of it.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Iterator

from lcx import config

config.setup_jax()

from lcx import linearize, lora, objectives  # noqa: E402
from lcx.convert.api import load  # noqa: E402
from lcx.data import Dataset  # noqa: E402
from lcx.errors import UserError  # noqa: E402
from lcx.evals.recall import Recall  # noqa: E402
from lcx.optim import AdamW  # noqa: E402
from lcx.sharding import MeshShape  # noqa: E402
from lcx.trainer import Trainer  # noqa: E402
from lcx.version import __version__  # noqa: E402

FACTOR, LENGTH = 4, 512  # the base has a window of 128 tokens
SCALINGS = {
    "PI": {"rope_type": "linear", "factor": float(FACTOR)},
    "YaRN": {"rope_type": "yarn", "factor": float(FACTOR)},
    "ABF": {"rope_type": "default", "rope_theta": 500000.0},
}
TEACHER = "YaRN"  # of the linearized model
# As configs/eval/recall.gin: all 16 keys, queries anywhere in the row.
TASK = Recall(
    lengths=(64, 128, 256, 512), pairs=16, rows=64, filler=32, first_id=65, vocabulary=32, power=1.0
)
WINDOW = 16  # of the linearized model: terraced, 16 to 31 tokens are seen with softmax


def trainer(
    args: argparse.Namespace,
    init_from: str,
    steps: int,
    learning_rate: float,
    *,
    trainable: str | None = None,
    **changes,
) -> Trainer:
    return Trainer(
        init_from=init_from,
        data=Dataset(
            args.text,
            tokenizer="bytes",
            packing="first_fit",
            add_bos=False,
            add_eos=False,
            eval_fraction=0.02,
        ),
        steps=steps,
        batch_size=8,
        seq_len=LENGTH,
        optimizer=AdamW(
            learning_rate=learning_rate, schedule="cosine", weight_decay=0.0, trainable=trainable
        ),
        mesh=MeshShape(data=-1, fsdp=1),
        seed=args.seed,
        log_every=20,
        eval_batches=4,
        checkpoint_every=steps,
        **changes,
    )


def trained(args: argparse.Namespace, name: str, *given, **changes) -> str:
    """The workdir of a run, which is resumed if it is there."""
    folder = pathlib.Path(args.output) / name
    trainer(args, *given, **changes).run(str(folder))
    return str(folder)


def measured(model, params) -> dict:
    result = TASK(model, params, None)
    print(f"  {result['summary']}", file=sys.stderr, flush=True)
    places = ("length", "score", "low", "high", "samples")
    return {
        "by_length": [{name: cell[name] for name in places} for cell in result["cells"]],
        "by_distance": result["by_distance"],
    }


def study(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """(variant, what was measured), one after the other."""

    def measure(name: str, path: str, part: str | None = None, **given) -> tuple[str, dict]:
        model, params = load(path, **given)
        print(name, file=sys.stderr)
        return name, measured(model if part is None else linearize.ablated(model, part), params)

    yield measure("unscaled", args.base)
    for name, scaling in SCALINGS.items():
        yield measure(name, args.base, rope_scaling=scaling, context_length=LENGTH)
    longer = {"context_length": LENGTH}
    teacher = trained(args, TEACHER, args.base, args.steps, 1e-3, rope_scaling=SCALINGS[TEACHER], **longer)
    yield measure(f"{TEACHER}, trained", teacher)
    transfer = trained(
        args,
        "transfer",
        teacher,
        2 * args.steps,
        1e-2,
        trainable="feature_map_|window_factors",
        linearize=linearize.Linearize(
            window=WINDOW, feature_dim=32, keep_softmax=(0,)
        ),  # layer 0 sees two tokens
        objective=objectives.attention_transfer,
    )
    yield measure("linearized, transfer alone", transfer)
    yield measure("linearized, transfer alone, its window alone", transfer, part="window")
    yield measure("linearized, transfer alone, its linear part alone", transfer, part="linear")
    lowered = lora.LoRA(rank=8, alpha=16.0)
    tuned = trained(args, "lora", transfer, 2 * args.steps, 1e-3, expects_linear=True, lora=lowered)
    yield measure("linearized", tuned)
    yield measure("linearized, its window alone", tuned, part="window")
    yield measure("linearized, its linear part alone", tuned, part="linear")
    for name, scaling in (SCALINGS | {"unscaled": {"rope_type": "default"}}).items():
        if name != TEACHER:
            path = trained(args, name, args.base, args.steps, 1e-3, rope_scaling=scaling, **longer)
            yield measure(f"{name}, trained", path)


def collect(paths: list[str], output: str) -> None:
    """Puts the results of several seeds into one file."""
    seeds = sorted(
        (json.loads(pathlib.Path(path).read_text()) for path in paths), key=lambda one: one["seed"]
    )
    result = {
        "what": "associative recall of a small model, extended and linearized, with several seeds",
        "command": "bash scripts/train_recall.sh",
        "task": dataclasses.asdict(TASK),
        "versions": {"jax": importlib.metadata.version("jax"), "lcx": __version__},
        "seeds": seeds,
    }
    path = pathlib.Path(output)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", nargs="+", metavar="FILE")
    parser.add_argument("--base", metavar="WORKDIR")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--output", required=True, metavar="PATH")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.output)
        return 0
    if not (args.base and args.text):
        parser.error("--base and --text are needed")
    path, found = pathlib.Path(args.output) / "recall.json", dict[str, dict]()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.json")
    try:
        for name, measurement in study(args):
            found[name] = measurement
            result = {
                "seed": args.seed,
                "steps": args.steps,
                "length": LENGTH,
                "window": WINDOW,
                "variants": found,
            }
            partial.write_text(json.dumps(result, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    partial.replace(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
