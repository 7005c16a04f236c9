"""What reading left out, chose or replaced: counted, and said at the start of a run."""

import dataclasses

from lcx.errors import UserError

ON_BAD_LINE = ("error", "skip")


@dataclasses.dataclass
class Tally:
    """Counts of one reading of a source.

    Attributes:
      on_bad_line: "error" raises at the first row that cannot be read, "skip" counts it.
      empty: documents that were null, empty or only white space.
      empty_files: files without any document.
      bad: rows that were skipped; `first_bad` says what was wrong with the first.
      replaced: rows with halves of surrogate pairs.
      remarks: other lines, each said once.
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
        """What to say, a line each; nothing when all was read as it is."""
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
                f"{_counted(self.replaced, 'row')} with halves of surrogate pairs, which became U+FFFD"
            )
        return said


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
