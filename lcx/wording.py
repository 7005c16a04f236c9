"""Numbers in messages."""


def quantity(number: object, noun: str, plural: str | None = None) -> str:
    """`1 document`, `12 documents`, `1.2 million documents`; `plural` for a noun that takes no s."""
    return f"{number} {noun if str(number) == '1' else plural or noun + 's'}"


def counted(number: int) -> str:
    """A count, exact below 10,000 and else in three digits: 9984, 12.3 thousand, 1.24 million, 8.03 billion."""
    rounded = number if number < 10_000 else float(f"{number:.3g}")  # 999,999 is 1 million, not 1e+03 thousand
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if rounded >= size:
            return f"{rounded / (1e3 if word == 'thousand' else size):.3g} {word}"
    return str(number)


def duration(seconds: float) -> str:
    """9s, 2m48s, 5h03m"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
