"""Embeddings of the sequences of a file, written to a file: the job of `python -m lcx.embed`.

Every row belongs to a sequence, or to one of its windows, or (pool "none") to one position:

    .parquet   columns record, start, stop (tokens, counted from 0), and one list of float32 per point
    .npz       arrays record, start, stop [rows], and one [rows, F] per point; all rows are held in memory
    .zarr      a folder with one zarr array [rows, F] per point, start and stop [rows], and record.txt with a line a row

The output is PATH.partial until it is complete.
"""

import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from lcx import activations, paths
from lcx.data.readers.fields import DEFAULT
from lcx.data.sources import Tally, find_files, read_documents
from lcx.embedding import Embedded, Embedder, check_settings
from lcx.errors import UserError, naming
from lcx.evals.support import dna
from lcx.evals.support.letters import Letters, Part
from lcx.evals.support.progress import progress
from lcx.text import opened
from lcx.wording import quantity

ENDINGS = (".parquet", ".npz", ".zarr")
#: Settings as messages name them, and the flags of the command.
_FLAGS: dict[str, str | None] = {
    "Dataset.source": "--dataset",
    "Dataset.format": "--dataset_format",
    "Dataset.text_field": "--text_field",
    "Dataset.separator": "--separator",
    "Dataset.on_bad_line": "--on_bad_line",
    "Dataset.chat": None,
    "both_strands": "--both_strands",
    "overlap": "--overlap",
    "setting layers": "--layers",
    "embed.piece_length": "--piece_length",
    "embed.window": "--window",
}
_NOTHING = "there is no sequence to embed that has a letter: change --fasta, --regions or --dataset"
_ZARR_ROWS = 1024  # rows of a chunk


@naming(_FLAGS)
def embed_file(
    *,
    checkpoint: str,
    layers: str,
    output: str,
    fasta: str | None = None,
    regions: str | None = None,
    dataset: str | None = None,
    pool: str = "mean",
    window: int | None = None,
    overlap: int = 0,
    piece_length: int | None = None,
    both_strands: bool = False,
    keep_case: bool = False,
    dataset_format: str | None = None,
    text_field: str | None = None,
    separator: str | None = None,
    on_bad_line: str | None = None,
    overwrite: bool = False,
    **loading: Any,
) -> None:
    """Writes the embeddings of FASTA records, BED regions or texts.

    Args:
      checkpoint: as in lcx.load.
      layers: names of points (lcx.activations), separated by commas.
      output: the file to write; its ending chooses the format.
      fasta, dataset: the sequences, one of the two. regions: a BED file for fasta.
      pool, window, overlap, piece_length: as in lcx.embed; both_strands is its reverse_complement.
      keep_case: whether lower-case letters of DNA stay as they are.
      dataset_format, text_field, separator, on_bad_line: how `dataset` is read: settings of lcx.data.Dataset, where
        dataset_format is its format.
      overwrite: whether an existing output is replaced.
      loading: other settings of lcx.load.

    Raises:
      UserError: a file cannot be read or written, or a setting is out of range.
    """
    if paths.destination(output, "--output").suffix not in ENDINGS:
        raise UserError(f"--output is {output}, expected a name that ends in {', '.join(ENDINGS)}: change --output")
    reading = {
        "dataset_format": dataset_format,
        "text_field": text_field,
        "separator": separator,
        "on_bad_line": on_bad_line,
    }
    _check_sequences(
        fasta,
        dataset,
        of_fasta={"regions": regions, "both_strands": both_strands, "keep_case": keep_case},
        of_dataset=reading,
    )
    inputs = {"--checkpoint": checkpoint, "--fasta": fasta, "--dataset": dataset, "--regions": regions}
    paths.refuse_inputs(output, "--output", inputs)
    check_settings(pool, piece_length=piece_length, window=window, overlap=overlap)
    names = [name.strip() for name in layers.split(",") if name.strip()]
    holds = ".zgroup" if output.endswith(".zarr") else None
    with paths.claimed_file(output, "--output", overwrite=overwrite, holds=holds) as partial:
        if fasta is not None:
            dna.check_files(fasta, owner="--fasta")
        else:
            find_files(str(dataset), format=dataset_format)
        model, params, tokenizer = opened(
            checkpoint, of="sequence", check=lambda model, _: activations.points(model, names), **loading
        )
        embedder = Embedder(
            model,
            params,
            names,
            pool=pool,
            piece_length=piece_length,
            window=window,
            overlap=overlap,
            reverse_complement=both_strands,
            tokenizer=tokenizer,
        )
        pairs = _records(fasta, regions, keep_case) if fasta is not None else _documents(str(dataset), **reading)
        texts = _Texts(pairs, dna=fasta is not None and (both_strands or model.model_type == "striped_hyena"))
        _write(partial, embedder, texts)
    print(f"{output}: {quantity(texts.count, 'sequence')}, {quantity(len(embedder.points), 'point')}", file=sys.stderr)
    if texts.empty:
        print(f"left out, because they are empty: {quantity(texts.empty, 'sequence')}", file=sys.stderr)
    for line in dna.foreign(texts.foreign, texts.count):
        print(line, file=sys.stderr)


def _check_sequences(
    fasta: str | None, dataset: str | None, *, of_fasta: dict[str, Any], of_dataset: dict[str, Any]
) -> None:
    """Raises UserError unless there is one source of sequences, and no setting of the other kind."""
    if (fasta is None) == (dataset is None):
        raise UserError(f"{'neither' if fasta is None else 'both'} of --fasta and --dataset: set one of them")
    others = of_fasta if fasta is None else of_dataset
    if wrong := [f"--{name}" for name, value in others.items() if value]:
        kind, other = ("--fasta", "--dataset") if fasta is None else ("--dataset", "--fasta")
        raise UserError(f"{wrong[0]} needs {kind}, and the sequences are those of {other}: leave out {wrong[0]}")


class _Texts:
    """The sequences of a source, read one at a time; `names` has those read so far that are still needed.

    `foreign` has the names of those that are hardly DNA, if they should be.
    """

    def __init__(self, pairs: Iterator[tuple[str, str]], *, dna: bool):
        self.names: dict[int, str] = {}
        self.foreign: list[str] = []
        self.count, self.empty = 0, 0
        self._pairs, self._dna = pairs, dna

    def __iter__(self) -> Iterator[str]:
        for name, text in self._pairs:
            if not text:
                self.empty += 1
                continue
            if self._dna and 2 * dna.ambiguous(text) > len(text):
                self.foreign.append(name)
            self.names[self.count] = name
            self.count += 1
            yield text

    def name(self, number: int) -> str:
        for old in [key for key in self.names if key < number]:  # embeddings arrive in order
            del self.names[old]
        return self.names[number]


def _records(fasta: str, regions: str | None, keep_case: bool) -> Iterator[tuple[str, str]]:
    if regions is None:
        found: list[tuple[str, Letters]] = list(dna.records(fasta, owner="--fasta"))
    else:
        bed, contigs = dna.Regions(regions, owner="--regions"), dna.read_contigs(fasta, owner="--fasta")
        bed.check(contigs)
        found = [
            (name, Part(contigs[record], start, stop)) for record, of in bed.of.items() for start, stop, name in of
        ]
    for name, letters in found:
        text = letters[0 : len(letters)]
        yield name, text if keep_case else text.upper()


def _documents(
    dataset: str, *, dataset_format: str | None, text_field: str | None, separator: str | None, on_bad_line: str | None
) -> Iterator[tuple[str, str]]:
    """(name, text) of every document; says at the end what was skipped."""
    tally = Tally(on_bad_line or "error")
    files = find_files(dataset, format=dataset_format)
    for document in read_documents(files, text_field=text_field or DEFAULT, separator=separator, tally=tally):
        yield document.name, document.text
    for line in tally.lines():
        print(line, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ files


class _Writer(Protocol):
    def add(self, records: list[str], spans: np.ndarray, values: dict[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


def _write(partial: pathlib.Path, embedder: Embedder, texts: _Texts) -> None:
    kinds: dict[str, Callable[[pathlib.Path], _Writer]] = {".parquet": _Parquet, ".npz": _Npz, ".zarr": _Zarr}
    writer = kinds[partial.with_suffix("").suffix](partial)
    with progress("embedding", None, "tokens") as bar:
        for part in embedder(texts):
            writer.add(*_rows(texts.name(part.sequence), part, per_position=embedder.pool == "none"))
            bar.update(part.stop - part.start)
    writer.close()


def _rows(name: str, part: Embedded, *, per_position: bool) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """(record names, [rows, 2] starts and stops, {point: [rows, F]})."""
    if not per_position:
        return [name], np.array([[part.start, part.stop]]), {key: x[None] for key, x in part.values.items()}
    starts = np.arange(part.start, part.stop)
    return [name] * len(starts), np.stack([starts, starts + 1], 1), part.values


class _Parquet:
    def __init__(self, path: pathlib.Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow: pip install 'lcx[parquet]'") from error
        self._pa, self._path = pyarrow, path
        self._writer: Any = None

    def add(self, records, spans, values) -> None:
        pa = self._pa
        columns = {"record": pa.array(records), "start": pa.array(spans[:, 0]), "stop": pa.array(spans[:, 1])}
        for name, x in values.items():
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pa.parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is None:
            raise UserError(_NOTHING)
        self._writer.close()


class _Npz:
    def __init__(self, path: pathlib.Path):
        self._path = path
        self._records: list[str] = []
        self._arrays: dict[str, list[np.ndarray]] = {}

    def add(self, records, spans, values) -> None:
        self._records += records
        for name, x in {"start": spans[:, 0], "stop": spans[:, 1], **values}.items():
            self._arrays.setdefault(name, []).append(x)

    def close(self) -> None:
        if not self._records:
            raise UserError(_NOTHING)
        arrays = {name: np.concatenate(parts) for name, parts in self._arrays.items()}
        with open(self._path, "wb") as file:
            np.savez(file, record=np.array(self._records), allow_pickle=False, **arrays)


class _Zarr:
    def __init__(self, path: pathlib.Path):
        self._path, self._arrays, self._count = path, dict[str, Any](), 0
        self._waiting: list[dict[str, np.ndarray]] = []
        path.mkdir()
        (path / ".zgroup").write_text('{"zarr_format": 2}\n')
        self._names = open(path / "record.txt", "w", encoding="utf-8")  # noqa: SIM115 (see close)

    def add(self, records, spans, values) -> None:
        self._names.writelines(f"{name}\n" for name in records)
        spans = spans.astype(np.int64)
        self._waiting.append({"start": spans[:, 0], "stop": spans[:, 1], **values})
        if sum(len(one["start"]) for one in self._waiting) >= _ZARR_ROWS:
            self._flush(whole_chunks=True)

    def _flush(self, *, whole_chunks: bool) -> None:
        """Writes the waiting rows; only whole chunks, because each write of a part reads and writes the whole chunk."""
        rows = {name: np.concatenate([one[name] for one in self._waiting]) for name in self._waiting[0]}
        count = len(rows["start"])
        count -= count % _ZARR_ROWS if whole_chunks else 0
        for name, x in rows.items():
            array = self._arrays.get(name) or self._created(name, x)
            array = array.resize(exclusive_max=[self._count + count, *x.shape[1:]]).result()
            array[self._count : self._count + count].write(x[:count]).result()
            self._arrays[name] = array
        self._count += count
        self._waiting = [{name: x[count:] for name, x in rows.items()}]

    def _created(self, name: str, x: np.ndarray) -> Any:
        import tensorstore as ts

        chunks = [_ZARR_ROWS, *x.shape[1:]]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{(self._path / name).absolute()}/"},
            "metadata": {"shape": [0, *x.shape[1:]], "chunks": chunks, "dtype": x.dtype.str},
            "create": True,
        }
        return ts.open(spec).result()

    def close(self) -> None:
        self._names.close()
        if self._waiting:
            self._flush(whole_chunks=False)
        if not self._count:
            raise UserError(_NOTHING)
