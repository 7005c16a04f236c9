"""Trains a probe on embeddings that `python -m lcx.embed` wrote, and scores it on held-out sequences.

    python scripts/train_probe.py --embeddings=embeddings.npz --labels=labels.tsv --output=results.json [--hidden=64]
"""

import argparse
import csv
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcx.errors import UserError

HELD_OUT, WEIGHT_DECAY, LEARNING_RATE = 0.2, 1e-2, 1e-2


def read(embeddings: str, labels: str) -> tuple[np.ndarray, list[str]]:
    """([rows, F], labels) of the sequences that have a label; windows of one sequence are averaged.

    Raises:
      UserError: a file is not what it should be, or no sequence has a label.
    """
    with open(labels, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or not {"record", "label"} <= rows[0].keys():
        raise UserError(f"{labels} has no columns record and label, separated by tabs: change --labels")
    known = {row["record"]: row["label"] for row in rows}
    with np.load(embeddings) as found:
        points = [name for name in found.files if name not in ("record", "start", "stop")]
        names = [str(name) for name in found["record"]]
        x = np.concatenate([found[point] for point in points], axis=1)
    sums: dict[str, list[np.ndarray]] = {}
    for name, row in zip(names, x, strict=True):
        sums.setdefault(name, []).append(row)
    # records are named FILE:RECORD; the labels may leave the file out
    wanted = {name: known.get(name, known.get(name.partition(":")[2])) for name in sums}
    chosen = [name for name, label in wanted.items() if label is not None]
    if len(chosen) < 5:
        raise UserError(f"{len(chosen)} of {len(sums)} sequences have a label in {labels}, expected at least 5")
    print(f"{len(chosen)} of {len(sums)} sequences have a label", file=sys.stderr)
    return np.stack([np.mean(sums[name], axis=0) for name in chosen]), [str(wanted[name]) for name in chosen]


def numbers(labels: list[str]) -> np.ndarray | None:
    """The labels as numbers; None if they are words."""
    try:
        return np.array([float(label) for label in labels], np.float32)
    except ValueError:
        return None


def fit(x: np.ndarray, y: np.ndarray, classes: int, *, hidden: int, steps: int, seed: int):
    """The function from features to outputs: logits of `classes`, or (classes 0) a number."""
    sizes = [x.shape[1], *([hidden] if hidden else []), classes or 1]
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    params = [
        (jax.random.normal(key, (a, b)) * a**-0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]

    def apply(params, x):
        for i, (w, b) in enumerate(params):
            x = x @ w + b
            x = jax.nn.gelu(x) if i < len(params) - 1 else x
        return x

    def loss(params):
        out = apply(params, x)
        if classes:
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        return jnp.mean((out[:, 0] - y) ** 2)

    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((params, optimizer.init(params)))
    return lambda new: np.asarray(apply(params, new))


def probe(x: np.ndarray, labels: list[str], *, hidden: int, steps: int, seed: int) -> dict:
    """Trains on four fifths of the rows and scores the others."""
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(order, [max(1, round(HELD_OUT * len(x)))])
    mean, spread = x[train].mean(0), x[train].std(0) + 1e-6
    x = ((x - mean) / spread).astype(np.float32)
    y = numbers(labels)
    found = {"train": len(train), "held_out": len(test), "features": x.shape[1], "hidden": hidden, "seed": seed}
    if y is not None:
        center, scale = y[train].mean(), y[train].std() + 1e-9
        predict = fit(x[train], (y[train] - center) / scale, 0, hidden=hidden, steps=steps, seed=seed)
        error = ((predict(x[test])[:, 0] * scale + center - y[test]) ** 2).mean()
        r2 = 1 - error / max(((y[test] - y[test].mean()) ** 2).mean(), 1e-12)
        chance = 1 - ((center - y[test]) ** 2).mean() / max(((y[test] - y[test].mean()) ** 2).mean(), 1e-12)
        return {"kind": "regression", "r2": float(r2), "r2_of_the_mean": float(chance), **found}
    names = sorted(set(labels))
    ids = np.array([names.index(label) for label in labels])
    predict = fit(x[train], ids[train], len(names), hidden=hidden, steps=steps, seed=seed)
    accuracy = (predict(x[test]).argmax(1) == ids[test]).mean()
    frequent = (np.bincount(ids[train]).argmax() == ids[test]).mean()
    scores = {"accuracy": float(accuracy), "accuracy_of_the_most_frequent": float(frequent)}
    return {"kind": "classification", **scores, "classes": names, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        result = probe(*read(args.embeddings, args.labels), hidden=args.hidden, steps=args.steps, seed=args.seed)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pathlib.Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
