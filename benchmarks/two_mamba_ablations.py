"""The steps of scripts/reproduce_two_mamba.sh --ablations besides training and reports.

runs     prints a line for each run: its folder, its model, its flags, separated by tabs
figures  prints a line for each figure of which runs are there: its name, its title, their folders
table    reads what the runs wrote; prints where the paper's order holds, writes ablations.json and the pictures
draw     draws the pictures of --result, a file that `table` wrote

Which runs and figures there are: two_mamba_figures.py. A run has the first seed; how far apart two runs must be is told
by the three seeds of the study.
"""

import argparse
import itertools
import json
import math
import pathlib

import numpy as np
from two_mamba_figures import FIGURES, SIZES, runs
from two_mamba_study import curve

Point = tuple[int, float]  # tokens of training, held-out loss


def noise(study: dict) -> float:
    """Standard deviation of the difference of two models with one seed, from the models and seeds of the study.

    What is left of each loss without the means of its model and of its seed; all models of a seed see the same rows.
    """
    models = [m["runs"] for m in study["models"].values() if m["runs"]]
    seeds = [seed for seed in study["seeds"] if all(seed in runs for runs in models)]
    losses = np.array([[runs[seed][-1][1] for seed in seeds] for runs in models])
    if min(losses.shape) < 2:
        return float("nan")
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    return float(np.sqrt(2 * np.sum(rest**2) / ((losses.shape[0] - 1) * (losses.shape[1] - 1))))


def verdict(paper: float, ours: float, spread: float) -> str:
    """Of two differences between the same two models: whether the second shows what the first does."""
    if not abs(ours) > 2 * spread:
        return "open"
    return "holds" if (paper > 0) == (ours > 0) else "reversed"


def pairs(lines: list[dict], spread: float) -> list[dict]:
    """Each pair of runs of which the paper too has losses, first the one with the lower loss there."""
    known = sorted((line for line in lines if line["paper"] and line["loss"]), key=lambda line: line["paper"])
    found = []
    for low, high in itertools.combinations(known, 2):
        there, here = high["paper"] - low["paper"], high["loss"] - low["loss"]
        names = {"lower": low["label"], "higher": high["label"]}
        both = {"paper": round(there, 4), "ours": round(here, 4), "verdict": verdict(there, here, spread)}
        found.append(names | both)
    return found


def curves(output: pathlib.Path, study: dict) -> dict[str, list[Point]]:
    """Run -> its held-out losses, of the runs that are done; those of the study are of its first seed."""
    found = {}
    for figure in FIGURES:
        for line in figure.lines:
            folder = output / "ablations" / line.run
            if line.in_study:
                points = study["models"][line.model]["runs"].get(study["seeds"][0])
            else:
                points = curve(folder) if (folder / "done").exists() else None
            if points:
                found[line.run] = points
    return found


def table(output: pathlib.Path) -> dict:
    study = json.loads((output / "results.json").read_text())
    found, spread = curves(output, study), noise(study)
    figures = []
    for figure in FIGURES:
        lines = [
            {"label": line.label, "run": line.run, "paper": line.paper, "loss": found[line.run][-1][1]}
            for line in figure.lines
            if line.run in found
        ]
        if len(lines) > 1:
            about = {"name": figure.name, "graph": figure.graph, "title": figure.title}
            figures.append({**about, "lines": lines, "pairs": pairs(lines, spread)})
    result = {
        "what": "the ablations of the 2Mamba paper, one seed",
        "missing": sorted({line.run for figure in FIGURES for line in figure.lines} - found.keys()),
        "noise": spread,
        "runs": found,
        "figures": figures,
    }
    (output / "ablations.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def told(result: dict) -> str:
    apart = f"two runs differ if their losses are more than {2 * result['noise']:.3f} apart"
    if math.isnan(result["noise"]):
        apart = "one seed does not tell how far apart two losses must be: no order is decided (--seeds)"
    lines = [apart]
    for figure in result["figures"]:
        counts = [sum(pair["verdict"] == name for pair in figure["pairs"]) for name in ("holds", "reversed", "open")]
        lines.append(f"\n{figure['title']}: of {sum(counts)} pairs {counts[0]} as in the paper, {counts[1]} reversed")
        for line in figure["lines"]:
            paper = "" if line["paper"] is None else f"{line['paper']:.4f}"
            lines.append(f"  {line['label']:42}{line['loss']:8.3f}{paper:>10}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ pictures


def draw_curves(axes, figure: dict, found: dict[str, list[Point]]) -> None:
    """Held-out loss against tokens, the legend in the order of the last losses."""
    from lcx.evals.support import figures

    lines = sorted(figure["lines"], key=lambda line: -line["loss"])
    styles = figures.styles({line["label"]: {} for line in lines})
    for line in lines:
        label = f"{line['label']}: {line['loss']:.3f}"
        axes.plot(*zip(*found[line["run"]], strict=True), **styles[line["label"]], label=label)
    axes.set(xlabel="tokens of training", ylabel="held-out loss (nats per token)")
    axes.set_title(figure["title"])
    axes.legend(fontsize="small")


def draw_orders(axes, result: dict) -> None:
    """Our differences against those of the paper, of all pairs; between the dashed lines they are open."""
    colours = {"holds": "C0", "reversed": "C1", "open": "C6"}
    every = [pair for figure in result["figures"] for pair in figure["pairs"]]
    for name, colour in colours.items():
        own = {(pair["paper"], pair["ours"]) for pair in every if pair["verdict"] == name}  # once if in two figures
        if own:
            axes.plot(*zip(*sorted(own), strict=True), "o", color=colour, ms=5, label=f"{name}: {len(own)}")
    for sign in (-2, 2):
        axes.axhline(sign * result["noise"], color="C6", ls="--", lw=1)
    axes.set(xlabel="difference in the paper (nats per token)", ylabel="difference here (nats per byte)")
    axes.set_title("Differences of the losses of two models")
    axes.legend()


def pictures(folder: pathlib.Path, result: dict) -> None:
    """two_mamba_ablation_NAME.svg of each figure, and two_mamba_orders.svg."""
    from lcx.reporting.pictures import picture

    for figure in result["figures"]:
        drawn = picture(lambda axes, figure=figure: draw_curves(axes, figure, result["runs"]), form="svg")
        (folder / f"two_mamba_ablation_{figure['name']}.svg").write_bytes(drawn)
    drawn = picture(lambda axes: draw_orders(axes, result), form="svg")
    (folder / "two_mamba_orders.svg").write_bytes(drawn)


# ------------------------------------------------------------------------------------------------ commands


def print_runs(size: str, updates: int | None, texts: list[str]) -> None:
    for name, (model, *flags) in runs(SIZES[size], updates or SIZES[size].updates, texts).items():
        print(f"ablations/{name}", model, *flags, sep="\t")


def print_figures(output: pathlib.Path) -> None:
    seed = json.loads((output / "results.json").read_text())["seeds"][0]
    for figure in FIGURES:
        folders = [
            output / (f"text/{line.model}_{seed}" if line.in_study else f"ablations/{line.run}")
            for line in figure.lines
        ]
        done = [str(folder) for folder in folders if (folder / "done").exists()]
        if len(done) > 1:
            print(figure.name, figure.title, *done, sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("runs", "figures", "table", "draw"))
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder of the runs, or of the pictures")
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--updates", type=int, help="of a run; None: as the configuration has")
    parser.add_argument("--other_text", action="append", default=[], help="a second and a third text")
    parser.add_argument("--result", type=pathlib.Path, help="of draw")
    flags = parser.parse_args()
    if flags.what == "runs":
        print_runs(flags.size, flags.updates, flags.other_text)
    elif flags.what == "figures":
        print_figures(flags.output)
    elif flags.what == "draw":
        pictures(flags.output, json.loads(flags.result.read_text()))
    else:
        result = table(flags.output)
        pictures(flags.output, result)
        print(told(result))


if __name__ == "__main__":
    main()
