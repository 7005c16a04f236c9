"""The rows of a file in any of the row formats."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lcx.data.readers import Row, SourceFile, arrow_rows, csv_rows, json_rows
from lcx.data.readers.csv_rows import Columns
from lcx.data.readers.tally import Tally


def read(
    file: SourceFile, tally: Tally, *, columns: Columns, is_row: Callable[[Mapping[str, Any]], bool]
) -> Iterator[Row]:
    """Yields the rows of a file whose format is one of `ROW_FORMATS`.

    Args:
      tally: receives the rows that cannot be read.
      columns: called once per table: a function from {column: whether it can contain text} to the columns to read.
      is_row: whether a JSON object that is the only one in its file is a row; if not, the list of objects in it is
        read.

    Raises:
      UserError: the file cannot be read as its format.
    """
    if file.format == "jsonl":
        return json_rows.read_lines(file, tally)
    if file.format == "json":
        return json_rows.read_values(file, tally, is_row=is_row)
    if file.format in csv_rows.DELIMITERS:
        return csv_rows.read(file, tally, columns=columns)
    return arrow_rows.read(file, tally, columns=columns)
