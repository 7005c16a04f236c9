"""Draws the pictures of docs/ into docs/img: RoPE scaling from lcx/rope.py, the context wall from the table of results,
rows in pieces from benchmarks/results.

    python scripts/draw_docs.py

The curves are computed by the functions that training uses.
"""

import dataclasses
import functools
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from pieces_figures import NAMES as MODELS

from lcx.rope import Rope

IMAGES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "img"
HEAD_DIM, WINDOW, FACTOR = 128, 4096, 8.0
BASE = Rope(rope_theta=10000.0, original_max_position_embeddings=WINDOW)
# fmt: off
TYPES = {
    "linear": {}, "ntk": {}, "yarn": {}, "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# fmt: on
STYLES = dict(zip(TYPES, ("--", ":", "-", "-.")))
RC = {
    "svg.hashsalt": "lcx", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "figure.facecolor": "white",
}  # fmt: skip


def scaled(name: str) -> Rope:
    return dataclasses.replace(BASE, rope_type=name, factor=FACTOR, **TYPES[name])


def frequencies(rope: Rope, length: int = WINDOW) -> np.ndarray:
    return np.asarray(rope.frequencies(HEAD_DIM, length)[0], np.float64)


def draw_factors(axes) -> None:
    """By how much each type slows each pair down."""
    pairs, plain = np.arange(HEAD_DIM // 2), frequencies(BASE)
    for name in TYPES:
        axes.plot(pairs, plain / frequencies(scaled(name)), STYLES[name], label=name)
    turns = WINDOW * plain / (2 * np.pi)
    for count in (32, 1):
        at = np.interp(-count, -turns, pairs)
        axes.axvline(at, color="0.6", lw=0.8)
        label = f"{count} turns" if count > 1 else "1 turn"
        axes.annotate(f"{label}\nin the window", (at, FACTOR * 0.52), xytext=(3, 0), textcoords="offset points",
                      fontsize=7, color="0.35")  # fmt: skip
    axes.set(xlabel="pair of dimensions j (fast to slow)", ylabel="slowed down by", ylim=(0, FACTOR * 1.08))
    axes.set_title(f"Head of {HEAD_DIM}, window {WINDOW}, factor {FACTOR:g}", fontsize=9)
    axes.legend(fontsize=8, loc=(0.03, 0.45))


def draw_angles(axes) -> None:
    """The angle of one slow pair by position: what is outside the trained range without scaling, and inside with."""
    pair = 52
    positions = np.linspace(0, WINDOW * FACTOR, 200)
    for name, rope, style in (
        ("unscaled", BASE, "k-"), *((name, scaled(name), STYLES[name]) for name in ("linear", "yarn")),
    ):  # fmt: skip
        axes.plot(positions / WINDOW, positions * frequencies(rope)[pair], style, label=name)
    seen = WINDOW * frequencies(BASE)[pair]
    axes.axhspan(0, seen, color="C2", alpha=0.15, lw=0)
    axes.annotate("angles seen in pretraining", (FACTOR, seen), xytext=(0, 4), ha="right", fontsize=7,
                  textcoords="offset points", color="C2")  # fmt: skip
    axes.set(xlabel="position / window", ylabel="angle (radians)", xlim=(0, FACTOR), ylim=(0, None))
    axes.set_title(f"Angle of the slow pair j = {pair}", fontsize=9)
    axes.legend(fontsize=8, loc="upper left")


def draw_dynamic(axes) -> None:
    """The types whose frequencies depend on the length of the text."""
    rope, pairs = scaled("ntk"), np.arange(HEAD_DIM // 2)
    rope = dataclasses.replace(rope, rope_type="dynamic")
    plain = frequencies(BASE)
    for length, style in ((4096, "-"), (8192, "--"), (16384, "-."), (32768, ":")):
        axes.plot(pairs, plain / frequencies(rope, length), style, label=f"text of {length} tokens")
    axes.set(xlabel="pair of dimensions j (fast to slow)", ylabel="slowed down by", yscale="log")
    axes.set_title(f"dynamic, window {WINDOW}, factor {FACTOR:g}", fontsize=9)
    axes.legend(fontsize=8, loc="upper left")


def wall_table() -> tuple[list[str], dict[str, list[float]]]:
    """The columns and rows of the table that the picture of the wall shows, from the page that states them."""
    page = (
        (IMAGES.parent / "results" / "extension.md").read_text().partition("## The same model, fine-tuned")[2]
    )
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in rows[0]]
    return columns, {name: [float(x) for x in values] for name, *values in rows[2:]}


def draw_wall(axes) -> None:
    columns, rows = wall_table()
    width = 0.38
    for i, (name, values) in enumerate(rows.items()):
        bars = axes.bar(
            np.arange(len(values)) + (i - 0.5) * width, values, width, color=("0.6", "C2")[i], label=name
        )
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    axes.axvline(1.5, color="0.3", lw=0.8, ls="--")
    axes.annotate("end of the trained window", (1.5, 4.2), xytext=(-4, 0), textcoords="offset points", ha="right",
                  fontsize=8, color="0.3")  # fmt: skip
    axes.set_xticks(range(len(columns)), columns)
    axes.set(xlabel="position (tokens)", ylabel="nats per token", ylim=(0, 4.9))
    axes.set_title("A 0.9M Llama with a window of 256, held-out stories", fontsize=9)
    axes.legend(fontsize=8, loc="center left")


def draw_pieces(axes, field: str, label: str) -> None:
    """A field of pieces_cpu.json by the length of the row: whole (dashed) and in pieces."""
    result = json.loads((IMAGES.parents[1] / "benchmarks" / "results" / "pieces_cpu.json").read_text())
    for color, model in enumerate(dict.fromkeys(row["model"] for row in result["rows"])):
        for cut, style, way in ((False, "--", "whole"), (True, "-", "in pieces")):
            rows = [row for row in result["rows"] if row["model"] == model and (row["piece"] is not None) == cut]
            points = sorted((row["T"], row[field]) for row in rows)
            name = f"{MODELS[model]}, {way}"
            axes.plot(*zip(*points), style, color=f"C{color}", marker=".", ms=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="T (tokens of the row)", ylabel=label, yscale="log")
    axes.legend(fontsize=7)


PICTURES = {
    "pieces_memory": functools.partial(draw_pieces, field="peak_resident_mib", label="peak of the process (MiB)"),
    "pieces_time": functools.partial(draw_pieces, field="seconds", label="seconds of a step"),
    "rope_factors": draw_factors,
    "rope_angles": draw_angles,
    "rope_dynamic": draw_dynamic,
    "wall": draw_wall,
}


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(RC):
        for name, draw in PICTURES.items():
            figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
            draw(axes)
            figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
