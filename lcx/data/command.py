"""What `python -m lcx.data` does: checks the documents of a source and prints what it found."""

from typing import Any

from lcx.data.dataset import Dataset
from lcx.errors import named, naming

_FLAGS = ("source", "tokenizer", "format", "text_field", "on_bad_line", "separator", "chat", "chat_template")
_NAMES: dict[str, str | None] = {f"Dataset.{name}": f"--{name}" for name in _FLAGS}
_NAMES |= {"Dataset.cache_dir": None, "min_length": "--min_length"}


@naming(_NAMES)
def check(*, min_length: int = 8192, **settings: Any) -> int:
    """Prints the report on the documents of Dataset(**settings); returns the exit status, 1 if there is an issue."""
    dataset = Dataset(**settings)
    report = dataset.check(min_length=min_length)
    print(report, *(named(line, _NAMES) for line in dataset.remarks()), sep="\n")
    return 0 if report.ok else 1
