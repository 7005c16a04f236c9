"""Findings in words: numbers with their uncertainty, and which models differ by more than that."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Measured = tuple[float, float | None]  # a mean and its standard error; None: unknown
_Z = 1.96  # standard errors on each side of a 95% interval
INTERVAL = "± is a 95% interval"


def with_error(value: Measured) -> str:
    """`1.31 ± 0.02`: a mean and half the width of its 95% interval, if that is known."""
    mean, error = value
    half = None if error is None else _Z * error
    digits = 3 if half is not None and half < 0.01 else 2
    text = f"{mean:.{digits}f}" if abs(mean) < 1000 else f"{mean:.4g}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def differ(a: Measured, b: Measured) -> bool:
    """Whether two means differ by more than the 95% interval of their difference, as if they were independent.

    Models that read the same text err together, so this finds too few differences rather than too many. Without a
    known error no difference counts as found.
    """
    if a[1] is None or b[1] is None:
        return False
    return abs(a[0] - b[0]) > _Z * math.hypot(a[1], b[1])


def same_tokens(results: Iterable[Mapping[str, Any]]) -> bool:
    """Whether all results count the same tokens, so that their values per token can be compared.

    Results that do not record their tokenizer are taken to differ if their tokens differ in length by more than 5%.
    """
    results = list(results)
    if len({result.get("unit") for result in results}) > 1:
        return False
    known = {result.get("tokenizer_id") for result in results}
    if None not in known:
        return len(known) == 1
    lengths = [result["bytes_per_token"] for result in results if result.get("bytes_per_token")]
    return not lengths or max(lengths) < 1.05 * min(lengths)


def ranked(values: Mapping[str, Measured], *, what: str, unit: str, also: str | None = None) -> str:
    """Who has the lowest and who the highest value, and who cannot be told apart from the lowest.

    Args:
      values: of each model.
      what: is measured, as in "loss".
      unit: of the values, after the number.
      also: a model whose value is named wherever it stands in between.
    """
    best = min(values, key=lambda k: values[k][0])
    worst = max(reversed(list(values)), key=lambda k: values[k][0])  # of equal ones the last, so that it is not `best`
    alike = [k for k in values if k != best and not differ(values[k], values[best])]
    low, high = (f"{with_error(values[k])} {unit}" for k in (best, worst))
    if len(alike) == len(values) - 1:
        why = (
            "the uncertainty is not known"
            if any(v[1] is None for v in values.values())
            else "within the uncertainty"
        )
        return f"no difference in {what} is established ({why}): from {low} (“{best}”) to {high} (“{worst}”)"
    text = f"“{best}” has the lowest {what}, {low}"
    if alike:
        text += f" ({listed(quoted(alike))} cannot be told apart from it)"
    if also is not None and also not in (best, worst):
        text += f"; “{also}” has {with_error(values[also])}"
    return f"{text}; “{worst}” has the highest, {high}"


def quoted(names: Iterable[str]) -> list[str]:
    """The names of models in quotation marks, because they may contain commas."""
    return [f"“{name}”" for name in names]


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a, b and c`; long lists are cut."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
