"""Which field of a record holds the text."""

from collections.abc import Mapping
from typing import Any

from lcx.data.readers import Row, shown
from lcx.data.readers.tally import Tally
from lcx.errors import UserError

DEFAULT = "text"
# Common names of the text field other than "text"; used, with a message, if a file has exactly one of them.
USUAL = (
    "text",
    "content",
    "contents",
    "document",
    "body",
    "article",
    "raw_content",
    "story",
    "passage",
    "code",
)


class TextField:
    """Extracts the text from the records of one file.

    `Dataset.text_field` names the field. If it is "text" and there is no such field, the one field with another common
    name is used.
    """

    def __init__(self, path: str, wanted: str, tally: Tally):
        self._path, self._wanted, self._tally = path, wanted, tally
        self._chosen: str | None = None

    def columns(self, names: Mapping[str, bool]) -> tuple[str, ...]:
        """The column of a table to read.

        Args:
          names: {column: whether it can contain text}.

        Raises:
          UserError: there is no such column, or it does not contain text.
        """
        chosen = self._choose(names)
        if chosen is None:
            raise UserError(
                f"{shown(self._path)} has columns {_listed(list(names))}, expected {self._wanted!r}; set"
                " Dataset.text_field"
            )
        self._chosen = chosen
        return (chosen,)

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has a field for the text."""
        return self._choose(_may_be_text(record)) is not None

    def text(self, row: Row) -> str:
        """The text of a row; "" for null.

        Raises:
          UserError: there is no such field, or its value is not text.
        """
        record = row.record
        name = self._chosen or self._choose(_may_be_text(record))
        if name is None or name not in record:
            raise UserError(
                f"{row.place} has fields {_listed(sorted(record))}, expected the field"
                f" {name or self._wanted!r}; set Dataset.text_field"
            )
        self._chosen = name
        text = record[name]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UserError(
                f"{row.place}: field {name!r} is a {type(text).__name__}, expected text; set Dataset.text_field"
            )
        return text

    def _choose(self, names: Mapping[str, bool]) -> str | None:
        if self._wanted in names:
            return self._wanted
        if self._wanted != DEFAULT:
            return None
        usual = [name for name, is_text in names.items() if is_text and name.strip().lower() in USUAL]
        if len(usual) != 1:
            return None
        self._tally.remark(
            f"there is no field 'text' and {usual[0]!r} is read (of {_listed(list(names))});"
            " Dataset.text_field names another"
        )
        return usual[0]


def _may_be_text(record: Mapping[str, Any]) -> dict[str, bool]:
    """{field: whether it can contain text}; null can, as a column of a table that has text in other rows."""
    return {name: value is None or isinstance(value, str) for name, value in record.items()}


def _listed(names: list[str]) -> str:
    """The first names, for a message."""
    return str([name[:40] for name in names[:8]])
