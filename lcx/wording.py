"""Numbers in messages."""


def quantity(number: object, noun: str, plural: str | None = None) -> str:
    """`1 document`, `12 documents`, `1.2 million documents`; `plural` for a noun that takes no s."""
    return f"{number} {noun if str(number) == '1' else plural or noun + 's'}"
