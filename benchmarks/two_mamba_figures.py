"""The runs and figures of scripts/reproduce_two_mamba.sh --ablations: a counterpart of each graph of the 2Mamba paper.

A figure compares runs of one seed on the same text. `paper` is the held-out loss there, in nats per token, after 90,000
updates (390,000 in graph 11) at the small size and rows of 2048, unless the figure's title says otherwise.
"""

import dataclasses
import re
from collections.abc import Callable

from two_mamba_study import LABELS

OUT = "linear__output_norm"
TAIL = "A_mask_type_neg_softplus__in_conv_k_2"
MAMBA_2S = f"{OUT}__{TAIL}__dt_on_values"
SQUARED_DT, EXP_DT = (f"{score}__sm_norm__{TAIL}__dt_on_values" for score in ("squared", "exp"))
SCALED = ("softmax", "two_mamba", "two_mamba_e", "mamba")


@dataclasses.dataclass(frozen=True)
class Size:
    """What the study's configuration of that name (cpu.gin, gpu.gin) has."""

    hidden: int
    heads: int
    layers: int
    row: int
    batch: int
    updates: int


#: (size, updates, other texts) -> flags of lcx.train, of gin.
Change = Callable[[Size, int, list[str]], list[str]]

SIZES = {"cpu": Size(64, 2, 2, 256, 16, 120), "gpu": Size(512, 8, 8, 2048, 16, 8000)}
EVALUATIONS = 3  # of each run


@dataclasses.dataclass(frozen=True)
class Line:
    """A run of a figure: a model, by its name in the study or its attention_type, and what changes (of CHANGES)."""

    label: str
    model: str
    paper: float | None = None
    change: str = ""

    @property
    def run(self) -> str:
        return f"{self.model}_{self.change}" if self.change else self.model

    @property
    def in_study(self) -> bool:
        """Whether the script trains it without --ablations."""
        return self.model in LABELS and not self.change


@dataclasses.dataclass(frozen=True)
class Figure:
    """`graph`: the number of its counterpart among the graphs of the published repository."""

    name: str
    graph: str
    title: str
    lines: tuple[Line, ...]


def wider(times: float) -> Change:
    """As many times the width, the heads and the layers."""

    def flags(size: Size, updates: int, texts: list[str]) -> list[str]:
        hidden, heads, layers = (round(times * x) for x in (size.hidden, size.heads, size.layers))
        return [f"Decoder.hidden_size={hidden}", f"HEADS={heads}", f"Stage.repeat={layers}"]

    return flags


def longer_rows(times: int) -> Change:
    """Rows as many times as long, of which a batch has fewer: the tokens of an update stay the same."""
    return lambda size, updates, texts: [
        f"SEQ_LEN={times * size.row}",
        f"Trainer.batch_size={size.batch // times}",
    ]


def more_updates(times: int) -> Change:
    return lambda size, updates, texts: [
        f"STEPS={times * updates}",
        f"Trainer.eval_every={times * updates // EVALUATIONS}",
    ]


def other_text(number: int) -> Change:
    return lambda size, updates, texts: [f"TEXT={texts[number]!r}"] if number < len(texts) else []


def both(*changes: Change) -> Change:
    return lambda size, updates, texts: [flag for change in changes for flag in change(size, updates, texts)]


CHANGES: dict[str, Change] = {
    "": lambda size, updates, texts: [],
    "rows_2": longer_rows(2),
    "rows_4": longer_rows(4),
    "wider_1.5": wider(1.5),
    "wider_2": wider(2),
    "wider_1.5_rows_2": both(wider(1.5), longer_rows(2)),
    "wider_1.5_rows_4": both(wider(1.5), longer_rows(4)),
    "longer_4": more_updates(4),
    "other_1": other_text(0),
    "other_2": other_text(1),
}


def of(change: str, **paper: float | None) -> tuple[Line, ...]:
    """Models of the study with the same change."""
    return tuple(Line(LABELS[name], name, loss, change) for name, loss in paper.items())


FIGURES = (
    Figure(
        "base", "1", "Softmax, Mamba-2, linear attention", of("", softmax=2.7305, mamba=2.8793, linear=3.0277)
    ),
    Figure(
        "norm",
        "2",
        "How linear attention is normalised",
        (
            Line("sum of the scores, ReLU", "linear", 3.0277),
            Line("RMSNorm of the output, ReLU", f"{OUT}__ReLU", 3.0590),
            Line("RMSNorm of the output", OUT, 3.1341),
        ),
    ),
    Figure(
        "conv",
        "3",
        "Width of the convolution",
        (
            Line("none", OUT, 3.1341),
            Line("2", f"{OUT}__in_conv_k_2", 2.9278),
            Line("3", f"{OUT}__in_conv_k_3", 2.9100),
            Line("4", f"{OUT}__in_conv_k_4", 2.9021),
            Line("2, SiLU", f"{OUT}__in_conv_k_2__silu", 2.9035),
            Line("3, SiLU", f"{OUT}__in_conv_k_3__silu", 2.8932),
            Line("4, SiLU", f"{OUT}__in_conv_k_4__silu", 2.8882),
        ),
    ),
    Figure(
        "parts",
        "4",
        "Linear attention with one part more",
        (
            Line("none", OUT, 3.1341),
            Line("convolution of width 2", f"{OUT}__in_conv_k_2", 2.9278),
            Line("decay of Mamba-2", f"{OUT}__A_mask_type_discretize", 2.9843),
            Line("softplus decay", f"{OUT}__A_mask_type_neg_softplus", 2.8842),
            Line("step on the values", f"{OUT}__dt_on_values", 3.0573),
            Line("residual D", f"{OUT}__D_res", 3.1062),
            Line("gate Z", f"{OUT}__Z_out_gate", 3.1347),
        ),
    ),
    Figure(
        "buildup",
        "5",
        "From linear attention to Mamba-2S",
        (
            Line("linear, RMSNorm", OUT, 3.1341),
            Line("and convolution", f"{OUT}__in_conv_k_2", 2.9278),
            Line("and decay of Mamba-2", f"{OUT}__A_mask_type_discretize__in_conv_k_2", 2.8022),
            Line("or softplus decay", f"{OUT}__{TAIL}", 2.7749),
            Line("and step on the values: Mamba-2S", MAMBA_2S, 2.7596),
            Line("Mamba-2, one head", "mamba", 2.8793),
        ),
    ),
    Figure(
        "redundant",
        "6",
        "Parts that Mamba-2S does without",
        (
            Line("Mamba-2S", MAMBA_2S, 2.7596),
            Line("and SiLU", f"{MAMBA_2S}__silu", 2.7649),
            Line("and residual D", f"{MAMBA_2S}__D_res", 2.7605),
            Line("and gate Z", f"{MAMBA_2S}__Z_out_gate", 2.7814),
        ),
    ),
    Figure(
        "squared",
        "7",
        "From Mamba-2S to 2Mamba, and softmax",
        (
            Line("Mamba-2S", MAMBA_2S, 2.7596),
            Line("squared", f"squared__output_norm__{TAIL}__dt_on_values"),
            Line("squared, sum of the scores", SQUARED_DT, 2.7268),
            Line("and no step on the values: 2Mamba", "two_mamba"),
            Line("softmax", "softmax", 2.7305),
        ),
    ),
    Figure(
        "rows_2",
        "8.2",
        "Rows twice as long (there 4096)",
        of("rows_2", softmax=2.7341, two_mamba=2.7359, two_mamba_e=None, mamba=2.8816),
    ),
    Figure(
        "rows_4",
        "8.3",
        "Rows four times as long (there 8192)",
        of("rows_4", softmax=2.7565, two_mamba=2.7461, two_mamba_e=None, mamba=2.9005),
    ),
    Figure(
        "wider",
        "8.4, 10.1",
        "1.5 times the width and layers (there medium)",
        of("wider_1.5", softmax=2.6058, two_mamba=2.6201, two_mamba_e=2.5896, mamba=2.7489),
    ),
    Figure(
        "wider_2",
        "8.4, 10.1",
        "Twice the width and layers (not there)",
        of("wider_2", softmax=None, two_mamba=None, two_mamba_e=None, mamba=None),
    ),
    Figure(
        "wider_rows_2",
        "8.5, 10.2",
        "1.5 times the width and layers, rows twice as long (there medium, 4096)",
        of("wider_1.5_rows_2", softmax=2.6205, two_mamba=2.6311, two_mamba_e=2.6033, mamba=2.7661),
    ),
    Figure(
        "wider_rows_4",
        "8.6, 10.3",
        "1.5 times the width and layers, rows four times as long (there medium, 8192)",
        of("wider_1.5_rows_4", softmax=2.6742, two_mamba=2.6824, two_mamba_e=2.6588, mamba=2.8113),
    ),
    Figure(
        "exp",
        "10.1",
        "Squared and exponential scores, and the step on the values",
        (
            Line("2Mamba-E", "two_mamba_e"),
            Line("2Mamba-E, step on the values", EXP_DT),
            Line("2Mamba", "two_mamba"),
            Line("2Mamba, step on the values", SQUARED_DT),
        ),
    ),
    Figure(
        "instability",
        "9",
        "Exponential scores, rows four times as long (there medium, 8192)",
        (
            Line("2Mamba-E", "two_mamba_e", 2.6588, "rows_4"),
            Line("2Mamba-E, step on the values", EXP_DT, 2.7634, "rows_4"),
        ),
    ),
    Figure(
        "longer",
        "11",
        "Four times the updates (there medium, 8192)",
        of("longer_4", softmax=2.3347, two_mamba=2.3402, mamba=2.4491),
    ),
    Figure(
        "other_1",
        "12",
        "Another text (there the Pile, medium)",
        of("other_1", softmax=2.4723, two_mamba=2.4987, mamba=2.6459),
    ),
    Figure(
        "other_2",
        "13",
        "A third text (there SlimPajama, medium)",
        of("other_2", softmax=2.7686, two_mamba=2.7948, mamba=2.9432),
    ),
)


def mlp_width(model: str, size: Size, change: str) -> int | None:
    """Of a wider model; None for the script's own.

    The projections of Mamba-2 with one head are larger than the others': this is the width with which it has as many
    parameters as they have with twice the model's width.
    """
    found = re.match(r"wider_([\d.]+)", change)
    if found is None:
        return None
    hidden = round(float(found[1]) * size.hidden)
    return round((7 * hidden - 257) / 3) if model == "mamba" else 2 * hidden


def runs(size: Size, updates: int, texts: list[str]) -> dict[str, list[str]]:
    """Folder -> the model and the flags of lcx.train of every run but those of the study itself, each once."""
    found: dict[str, list[str]] = {}
    for figure in FIGURES:
        for line in figure.lines:
            flags = CHANGES[line.change](size, updates, texts)
            if line.in_study or (line.change and not flags):  # that of a text that is not given
                continue
            width = mlp_width(line.model, size, line.change)
            flags += [] if width is None else [f"Mlp.intermediate_size={width}"]
            found[line.run] = [line.model, *(f"--gin.{flag}" for flag in flags)]
    return found
