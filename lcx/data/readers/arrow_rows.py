"""Rows of Arrow tables: parquet, Arrow files and streams (Feather 2, what `datasets` writes)."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from lcx.buckets import is_url
from lcx.data.readers import Row, SourceFile, shown, streams
from lcx.data.readers.csv_rows import Columns
from lcx.data.readers.tally import Tally
from lcx.errors import UserError

_END = b"\xff\xff\xff\xff\0\0\0\0"
_ROWS = 256  # how many are converted to Python objects at a time


def read(file: SourceFile, tally: Tally, *, columns: Columns) -> Iterator[Row]:
    """Yields the rows; the name of a row ends in its number, counted from 0.

    Args:
      columns: a function from {column: whether it contains text} to the columns to read.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(
            f"reading {shown(file.path)} needs pyarrow: pip install pyarrow (or 'lcx[parquet]')"
        ) from error
    try:
        with _batches(file, tally, columns) as batches:
            for row in _rows(file, batches):
                try:
                    yield _decoded(row)
                except UserError as error:
                    tally.bad_row(error)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(
            f"cannot read {shown(file.path)} as {file.format}: {reason}; the file is damaged or of another kind"
        ) from error


def _rows(file: SourceFile, batches: Iterator[tuple[Any, int]]) -> Iterator[Row]:
    """The rows of record batches, with text as bytes."""
    number = 0
    for batch, position in batches:
        columns = [_plain(column) for column in batch.columns]
        for start in range(0, batch.num_rows, _ROWS):
            values = [column.slice(start, _ROWS).to_pylist() for column in columns]
            for record in zip(*values, strict=True):
                fields = dict(zip(batch.schema.names, record, strict=True))
                yield Row(f"{shown(file.path)} row {number}", f"{file.name}:{number}", fields, position)
                number += 1


def _decoded(row: Row) -> Row:
    """The row with its bytes decoded as UTF-8."""
    texts = {}
    for name, value in row.record.items():
        if isinstance(value, bytes):
            try:
                texts[name] = value.decode()
            except UnicodeDecodeError as error:
                raise streams.not_text(f"{row.place}, column {name!r},", error, 0) from error
    return dataclasses.replace(row, record={**row.record, **texts})


@contextlib.contextmanager
def _batches(file: SourceFile, tally: Tally, columns: Columns) -> Iterator[Iterator[tuple[Any, int]]]:
    """Record batches of the requested columns, each with the number of bytes of the file read so far."""
    import pyarrow as pa

    size = streams.size(file.path)
    if file.format == "parquet":
        import pyarrow.parquet as pq

        with streams.open_raw(file.path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as table:
            wanted = _wanted(file, table.schema_arrow, columns)
            parts = table.iter_batches(batch_size=_ROWS, columns=wanted)
            total = max(1, table.metadata.num_rows)
            yield ((batch, min(size, size * _ROWS * i // total)) for i, batch in enumerate(parts, start=1))
        return
    with _mapped(file.path) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            total = reader.num_record_batches
            every = ((reader.get_batch(i), size * (i + 1) // total) for i in range(total))
        else:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            every = ((batch, source.tell()) for batch in _stream(file, reader, source, tally))
        wanted = _wanted(file, reader.schema, columns)
        yield ((batch.select(wanted), position) for batch, position in every)


def _mapped(path: str) -> Any:
    """A file in memory as far as it is looked at; of an object in a bucket the parts that are read."""
    import pyarrow as pa

    return pa.PythonFile(streams.open_raw(path), "r") if is_url(path) else pa.memory_map(path)


def _stream(file: SourceFile, reader: Any, source: Any, tally: Tally) -> Iterator[Any]:
    """The batches of a stream. Checks its end, because pyarrow accepts a stream truncated between two batches."""
    yield from reader
    end, size = source.tell(), source.size()
    if end < size:
        raise UserError(
            f"cannot read {shown(file.path)}: {size - end} bytes follow the end of its Arrow stream; write it as one"
            " stream"
        )
    source.seek(max(0, size - len(_END)))
    if source.read(len(_END)) != _END:
        tally.remark(f"{file.name} has no end-of-stream marker: it may be truncated")


def _wanted(file: SourceFile, schema: Any, columns: Columns) -> list[str]:
    """The columns to read.

    Raises:
      UserError: a column occurs twice, or holds plain values that are not text.
    """
    import pyarrow as pa

    names = {field.name: _is_text(field.type) for field in schema}
    wanted = list(columns(names))
    for name in wanted:
        if schema.names.count(name) > 1:
            raise UserError(
                f"{shown(file.path)} has {schema.names.count(name)} columns {name!r}; rename all but one"
            )
        kind = schema.field(name).type
        if not names[name] and not pa.types.is_nested(kind):
            raise UserError(
                f"{shown(file.path)}: column {name!r} is {kind}, expected text; set Dataset.text_field"
            )
    return wanted


def _is_text(kind: Any) -> bool:
    """Strings and bytes of every layout. Bytes count as UTF-8 text, because older writers store text untyped."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    checks = ("null", "string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(types, f"is_{name}")(kind) for name in checks)


def _plain(column: Any) -> Any:
    """A column with dictionaries decoded and text as bytes; validated, because pyarrow trusts offsets in files."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column.type, pa.BaseExtensionType):
        return _plain(column.storage)
    if pa.types.is_dictionary(column.type):
        dictionary, indices = _plain(column.dictionary), column.indices
        indices.validate(full=True)
        bounds = pc.min_max(indices).as_py()
        if bounds["max"] is not None and not 0 <= bounds["min"] <= bounds["max"] < len(dictionary):
            raise ValueError("an index outside the dictionary")
        return dictionary.take(indices)
    if pa.types.is_run_end_encoded(column.type):
        column.validate(full=True)
        return _plain(pc.run_end_decode(column))
    if _is_text(column.type):
        column.validate()
        column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column
