"""Figures on the screen: counts, and the progress of evaluations."""

import pytest

from lcx.evals.support import progress
from lcx.wording import counted, quantity


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (9_999, "9999"), (10_000, "10 thousand"), (12_345, "12.3 thousand")),
        *((999_499, "999 thousand"), (999_500, "1 million"), (1_236_000, "1.24 million")),
        *((999_600_000, "1 billion"), (8_030_261_248, "8.03 billion"), (10**13, "10 trillion")),
    ],
)
def test_counts_have_three_digits(number, text):
    assert counted(number) == text
    assert quantity(counted(1), "token") == "1 token" and quantity(text, "token").endswith(" tokens")


def test_progress_is_a_line_from_time_to_time(monkeypatch, capsys):
    """In the log of a job there is no bar, and an evaluation of an hour said nothing."""
    clock = iter([0.0, 25.0, 40.0, 50.0, 90.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("perplexity", 100_000, "tokens", initial=20_000) as shown:
        for number in (10_000, 30_000, 10_000, 30_000):  # after 25, 40, 50 and 90 seconds; the last completes it
            shown.update(number)
    assert capsys.readouterr().err == "perplexity: 60% of 100 thousand tokens, 20s left\n"


def test_the_time_left_leaves_out_the_compilation(monkeypatch, capsys):
    """A first batch of 2% after 160 s of compiling was "2h12m left" of an evaluation that took ten more seconds."""
    clock = iter([0.0, 160.0, 191.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("perplexity", 100_000, "tokens") as shown:
        shown.update(2_000)
        shown.update(62_000)
    assert capsys.readouterr().err.splitlines() == [
        "perplexity: 2% of 100 thousand tokens",
        "perplexity: 64% of 100 thousand tokens, 18s left",
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with progress.progress("variants", None, "variants") as shown:
        shown.update(3)
    assert "variants: " in capsys.readouterr().err
