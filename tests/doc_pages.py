"""What stands in the fenced blocks of the documentation, and the commands among it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
_BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>needs|tested): (?P<marked>[^>]+?) -->\n\s*)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)(?:[ ]+title=\"(?P<title>[^\"]+)\")?[ ]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      needs: the hardware in `<!-- needs: ... -->` before it: the block is checked, not run.
      tested: the test in `<!-- tested: tests/FILE.py::NAME -->` before it, which does the same at small size: the block
        is checked, not run.
      title: the file that the page tells its reader to write.
      line: of the page, from 1.
    """

    page: str
    line: int
    language: str
    title: str | None
    needs: str | None
    tested: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.needs is None and self.tested is None

    def commands(self) -> list[list[str]]:
        """Words of each command; comments, `NAME=value` before a command and a final & are left out."""
        found = []
        for line in re.sub(r"\\\n\s*", " ", self.text).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and words[-1] == "&":
                words = words[:-1]
            if words:
                found.append(words)
        return found


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    name = page.relative_to(ROOT).as_posix()
    found = []
    for match in _BLOCK.finditer(text):
        indent = match["indent"]
        lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
        number = text.count("\n", 0, match.start("indent")) + 1
        needs, tested = (match["marked"] if match["mark"] == mark else None for mark in ("needs", "tested"))
        found.append(
            Block(name, number, match["language"], match["title"], needs, tested, "\n".join(lines) + "\n")
        )
    return found
