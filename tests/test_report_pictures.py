"""The plots of a report: axes, colours, lines and labels."""

import dataclasses
import json

import pytest
from test_report import axes_of, facts, passkeys, perplexities

from lcx import report
from lcx.checkpoint import model_json
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.passkey import Passkey
from lcx.evals.perplexity import Perplexity
from lcx.evals.support import figures
from lcx.reporting import pictures, training


def test_perplexity_plots():
    one = {"a": perplexities("default", {1024: 40.0}), "b": perplexities("yarn x4", {1024: 2.4})}
    axes = axes_of(Perplexity(), one)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["40  (window 1024)", "2.4  (window 1024)"]
    assert "perplexity per byte" in axes.get_xlabel() and axes.get_xscale() == "log"
    several = {"a": perplexities("default", {256: 3.0, 1024: 40.0}), "b": perplexities("yarn x4", {256: 2.4})}
    axes = axes_of(Perplexity(), several)
    assert list(next(line for line in axes.lines if line.get_label() == "a").get_xdata()) == [256, 1024]
    axes_of(Perplexity(), {"a": perplexities("default", {1024: None})})  # an overflow is null in JSON


def test_passkey_plot():
    axes = axes_of(
        Passkey(), {"a": passkeys("default", [1, 0.5, 0.1]), "b": passkeys("yarn x4", [1, 1, 0.9])}
    )
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["a (k_max 300)", "b (k_max 300)"]
    assert list(axes.lines[0].get_ydata()) == [100, 50, 10]
    assert any(set(line.get_ydata()) == {20} for line in axes.lines)  # the threshold
    rates = {"a": [1, 0.5, 0.0], "b": [1, 1, 0.9], "c": [0, 0, 0]}
    axes = axes_of(Passkey(), {label: passkeys("yarn x4", rate) for label, rate in rates.items()})
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{label} (k_max 300)" for label in rates
    ]
    cells = [(bar.get_x(), bar.get_width(), round(bar.get_alpha(), 2)) for bar in axes.patches[:3]]
    assert cells == [(0, 30, 1.0), (30, 30, 0.53), (60, 30, 0.06)]


def test_styles_tell_models_apart():
    def style(**ropes):
        return figures.styles({label: {"model": facts(rope)} for label, rope in ropes.items()})

    tuned = style(a="default", b="linear x4", c="yarn x4", a2="default", b2="linear x4", c2="yarn x4")
    assert all(tuned[k]["color"] == tuned[f"{k}2"]["color"] for k in "abc")
    assert [tuned[k]["linestyle"] for k in ("a", "a2")] == ["--", "-"]
    assert len({s["color"] for s in tuned.values()}) == 3
    same = style(a="yarn x4", b="yarn x4", c="yarn x4")
    assert len({s["color"] for s in same.values()}) == 3 and {s["linestyle"] for s in same.values()} == {"-"}
    factors = style(a="yarn x4", b="yarn x8", c="default")
    assert len({s["color"] for s in factors.values()}) == 3
    assert (
        figures.styles({"x": {}, "y": {}})["x"]["color"] != figures.styles({"x": {}, "y": {}})["y"]["color"]
    )


def brightness(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_contrast(dark):
    """WCAG asks for 3 : 1 between a graphic and its background."""
    page = figures.theme(dark=dark)["axes.facecolor"]
    for color in figures.DARK if dark else figures.LIGHT:
        low, high = sorted((brightness(color), brightness(page)))
        assert (high + 0.05) / (low + 0.05) >= 3, color


@pytest.mark.parametrize("narrow", [False, True])
def test_every_axis_has_numbers(narrow):
    """Also where no power of two, or no round number, is in sight."""

    def ticks(draw, least=2):
        drawn = []
        pictures.picture(lambda axes: (draw(axes), drawn.append(axes)), narrow=narrow)
        low, high = drawn[0].get_xlim()
        shown = [t.get_text() for t in drawn[0].get_xticklabels() if low <= t.get_position()[0] <= high]
        assert all(shown) and least <= len(shown) <= (8 if narrow else 15)
        return shown

    for first, last in ((100, 120), (1, 2), (1, 100_000), (7, 7)):
        curves = {"run": [{"step": step, "loss": 1.0} for step in sorted({first, (first + last) // 2, last})]}
        shown = ticks(lambda axes, curves=curves: training.draw(axes, curves, {}), least=1 if first == last else 2)
        assert all(float(text) == int(float(text)) for text in shown)
    for low, high in ((300, 500), (8, 1 << 20), (1000, 1001)):

        def draw(axes, low=low, high=high):
            axes.plot([low, high], [1, 2])
            figures.position_axis(axes, "tokens")

        ticks(draw)
    assert [figures.short(value) for value in (512, 4096, 32768, 1 << 20, 0.5)] == [
        "512",
        "4096",
        "32K",
        "1M",
        "0.5",
    ]


def test_no_two_lines_look_alike():
    """Not in grey either, up to eight models; with more, colour, dashes and markers are different together."""
    ropes = ["default", "yarn x4", "linear x4", "yarn x4", "default", "dynamic x4", "yarn x4", "llama3 x8"]
    for kinds in (ropes, ["default"] * 8, ropes * 2, ["yarn x4"] * 14):
        looks = figures.styles({f"{i}": {"model": facts(rope)} for i, rope in enumerate(kinds)}).values()
        assert len({tuple(look.values()) for look in looks}) == len(kinds)
        if len(kinds) == 8:
            assert len({look["marker"] for look in looks}) == 8


def test_pictures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.picture(lambda axes: axes.plot([1, 2]), dark=True)
    assert dict(matplotlib.rcParams) == before


def test_every_evaluation_can_be_found_again():
    """The report draws with the class that results.json names."""
    for task in (LossByPosition(lengths=(8,)), Perplexity(windows=(64, 128), stride=16), Passkey(trials=3)):
        assert model_json.from_json(json.loads(json.dumps(model_json.to_json(task)))) == task
        assert dataclasses.is_dataclass(task) and task.__dataclass_params__.frozen
