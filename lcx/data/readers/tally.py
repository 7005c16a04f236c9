"""Counts what was skipped, chosen or replaced while reading, for the report at the start of a run."""

import dataclasses

from lcx.errors import UserError

ON_BAD_LINE = ("error", "skip")


@dataclasses.dataclass
class Tally:
    """Counts for one pass over a source.

    Attributes:
      on_bad_line: "error" raises at the first row that cannot be read, "skip" counts it.
      empty: documents that were null, empty or only white space.
      empty_files: files without any document.
      bad: rows that were skipped; `first_bad` is the error of the first one.
      replaced: rows with unpaired surrogates, which were replaced.
      remarks: other messages, each reported once.
    """

    on_bad_line: str = "error"
    empty: int = 0
    empty_files: int = 0
    bad: int = 0
    first_bad: str = ""
    replaced: int = 0
    remarks: dict[str, None] = dataclasses.field(default_factory=dict)

    def bad_row(self, error: UserError) -> None:
        """Raises the error, or counts it."""
        if self.on_bad_line != "skip":
            raise error
        self.first_bad = self.first_bad or str(error)
        self.bad += 1

    def remark(self, line: str) -> None:
        self.remarks[line] = None

    def lines(self) -> list[str]:
        """The messages, one per line; empty if everything was read unchanged."""
        said = list(self.remarks)
        if self.empty:
            said.append(f"{_counted(self.empty, 'empty document')} skipped (null, or only white space)")
        if self.empty_files:
            holds = "holds" if self.empty_files == 1 else "hold"
            said.append(f"{_counted(self.empty_files, 'file')} {holds} no document")
        if self.bad:
            said.append(
                f"{_counted(self.bad, 'row')} skipped that cannot be read (on_bad_line='skip'); the first:"
                f" {self.first_bad}"
            )
        if self.replaced:
            said.append(
                f"{_counted(self.replaced, 'row')} with unpaired surrogates, which were replaced by U+FFFD"
            )
        return said


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
