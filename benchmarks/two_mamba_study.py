"""The steps of scripts/reproduce_two_mamba.sh besides training and evaluation.

recall   writes rows of associative recall to train on, as conversations whose answers are the values
table    reads what the runs wrote; prints a table, writes results.json and four pictures
"""

import argparse
import json
import math
import pathlib
import statistics

import harness
import numpy as np

LABELS = {
    "softmax": "softmax",
    "two_mamba": "2Mamba",
    "two_mamba_e": "2Mamba-E",
    "mamba": "Mamba-2, one head",
    "mamba_heads": "Mamba-2, all heads",
    "linear": "linear",
}
#: Ids of the rows of recall: keys and values are printable bytes, the filler is a space.
IDS = {"first_id": 33, "vocabulary": 32, "filler": 32}
LENGTH, PAIRS, ROWS = 32, (2, 4), 16_000  # of each number of pairs
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
FORMS = harness.RESULTS / "second_order_forms_cpu.json"


def recall(folder: pathlib.Path) -> None:
    """recall.jsonl and recall.jinja; the seeds are not those of the evaluation."""
    from lcx.evals.recall import Recall

    made = []
    for count in PAIRS:
        tokens, places = Recall(rows=ROWS, pairs=count, seed=count, **IDS).made(LENGTH, 258)
        made += [conversation(row, np.sort(at)) for row, at in zip(tokens, places, strict=True)]
    order = np.random.default_rng(0).permutation(len(made))
    (folder / "recall.jinja").write_text(TEMPLATE)
    (folder / "recall.jsonl").write_text("".join(json.dumps({"messages": made[i]}) + "\n" for i in order))


def conversation(row: np.ndarray, places: np.ndarray) -> list[dict[str, str]]:
    """A row of ids below 128 as messages; what stands at the sorted `places` is said by the assistant."""
    text, start, turns = "".join(map(chr, row.tolist())), 0, []
    for place in places.tolist():
        turns += [
            {"role": "user", "content": text[start:place]},
            {"role": "assistant", "content": text[place]},
        ]
        start = place + 1
    return turns + [{"role": "user", "content": text[start:]}] * (start < len(text))


# ------------------------------------------------------------------------------------------------ results


def lines_of(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """(tokens, held-out loss) at every evaluation of a run that is done."""
    lines = lines_of(workdir)
    batch = next(line["tokens"] for line in lines if "tokens" in line)
    evaluated = [line for line in lines if "eval_loss" in line]
    last = max(line["step"] for line in lines)
    if not evaluated or evaluated[-1]["step"] < last:
        raise SystemExit(f"lcx: {workdir} was stopped in its last evaluation: remove it, and run the script again")
    return [(int(line["step"] * batch), line["eval_loss"]) for line in evaluated]


def evaluation(folder: pathlib.Path, name: str) -> dict | None:
    path = folder / "results.json"
    return json.loads(path.read_text())["evaluations"].get(name) if path.exists() else None


def about(output: pathlib.Path, name: str, seeds: list[str]) -> dict:
    """What is there of one model: only runs that are done count."""
    runs = {}
    for seed in seeds:
        folder = output / "text" / f"{name}_{seed}"
        if (folder / "done").exists():
            runs[seed] = curve(folder)
    last = [points[-1][1] for points in runs.values()]
    position = evaluation(output / "position" / name, "loss_by_position")
    recalled = evaluation(output / "recalled" / name, "recall")
    trained = output / "recall" / name
    return {
        "label": LABELS[name],
        "runs": runs,
        "loss_mean": statistics.mean(last) if last else None,
        "loss_sd": statistics.stdev(last) if len(last) > 1 else None,
        "parameters": position["model"]["num_params"] if position else None,
        "position": position["lengths"][-1]["curve"] if position else None,
        "recall_loss": curve(trained) if (trained / "done").exists() else None,
        "recall": recalled["table"] if recalled else None,
    }


def table(output: pathlib.Path, seeds: list[str]) -> dict:
    models = {name: about(output, name, seeds) for name in LABELS}
    result = {"what": "mixers of the 2Mamba paper on the same tokens", "seeds": seeds, "models": models}
    (output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def told(result: dict) -> str:
    head = f"{'':20}{'parameters':>11}{'seeds':>6}{'held-out loss':>20}   recall, by length"
    rows = [head]
    for model in result["models"].values():
        mean, spread = model["loss_mean"], model["loss_sd"]
        loss = "" if mean is None else f"{mean:.3f}" + ("" if spread is None else f" +- {spread:.3f}")
        recalled = " ".join(f"{n}: {x:g}%" for n, x in (model["recall"] or {}).items())
        rows.append(
            f"{model['label']:20}{model['parameters'] or '':>11}{len(model['runs']):>6}{loss:>20}   {recalled}"
        )
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------ pictures


def draw_tokens(axes, result: dict) -> None:
    """The mean of the seeds, and between the lowest and the highest of them."""
    for i, model in enumerate(result["models"].values()):
        if not model["runs"]:
            continue
        tokens = [point[0] for point in next(iter(model["runs"].values()))]
        losses = np.array([[loss for _, loss in points] for points in model["runs"].values()])
        axes.fill_between(tokens, losses.min(0), losses.max(0), color=f"C{i}", alpha=0.15, lw=0)
        axes.plot(tokens, losses.mean(0), marker="o", ms=4, color=f"C{i}", label=model["label"])
    axes.set(xlabel="tokens of training", ylabel="held-out loss (nats per byte)")
    axes.set_title("Loss against tokens")
    axes.legend()


def draw_position(axes, result: dict) -> None:
    for i, model in enumerate(result["models"].values()):
        if model["position"]:
            points = [
                (math.sqrt(max(p["start"], 1) * p["end"]), p["nll"]) for p in model["position"] if p["start"] >= 16
            ]
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=f"C{i}", label=model["label"])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens)", ylabel="held-out loss (nats per byte)")
    axes.set_title("Loss against position")
    axes.legend()


def draw_recall(axes, result: dict) -> None:
    """The counterpart of the paper's heat map of the needle test: values recalled, a row for each model."""
    from lcx.evals.support import grids

    cells = [
        grids.cell([share / 100], length=int(length), model=model["label"])
        for model in result["models"].values()
        for length, share in (model["recall"] or {}).items()
    ]
    words = {"xlabel": "row (tokens)", "ylabel": "", "title": "Values recalled (%)"}
    grids.heat_maps(axes, {"": {"cells": cells}}, across="length", down="model", **words)


def draw_forms(axes, records: list[dict]) -> None:
    """Tokens per second, forward and backward, of one head of 64 whose decay forgets nothing."""
    for i, (form, label) in enumerate({"tiles": "quadratic (tiles)", "states": "chunked (states)"}.items()):
        rows = [r for r in records if (r["form"], r["decay"], r["H"]) == (form, "slow", 64)]
        rows.sort(key=lambda row: row["T"])
        xs, ys = [r["T"] for r in rows], [r["T"] / r["seconds"] for r in rows]
        axes.plot(xs, ys, marker="o", ms=4, color=f"C{i}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="context (tokens)", ylabel="tokens per second of one CPU core")
    axes.set_title("2Mamba's operator, forward and backward")
    axes.legend()


def pictures(output: pathlib.Path, result: dict) -> None:
    from lcx.reporting.pictures import picture

    drawn = {"loss_by_tokens": draw_tokens}
    if any(model["position"] for model in result["models"].values()):
        drawn["loss_by_position_of_all"] = draw_position
    if any(model["recall"] for model in result["models"].values()):
        drawn["recall_of_all"] = draw_recall
    for name, draw in drawn.items():
        (output / f"{name}.svg").write_bytes(picture(lambda axes, draw=draw: draw(axes, result), form="svg"))
    records = json.loads(FORMS.read_text())["records"]
    (output / "throughput.svg").write_bytes(picture(lambda axes: draw_forms(axes, records), form="svg"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("recall", "table"))
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the folder of the runs")
    parser.add_argument("--seeds", type=str.split, default=["0"])
    flags = parser.parse_args()
    if flags.what == "recall":
        recall(flags.output)
        return
    result = table(flags.output, flags.seeds)
    pictures(flags.output, result)
    print(told(result))


if __name__ == "__main__":
    main()
