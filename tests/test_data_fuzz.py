"""Mutated files of every format: read, or refused in one line; a row that is not damaged is never changed."""

import io
import random

import pytest
from test_data_formats import FILES, LINES, TEXTS, zstd

from lcx.data import find_files, read_documents
from lcx.data.sources import Tally
from lcx.errors import UserError

INSERTED = (
    b"\0", b"\xff", b'"', b"\r", b"\n", b"[", b"{", b"}", b"]", b",", b"\\u", b"\\ud800", b"null", b"\xef\xbb\xbf",
    b"1e999", b"[" * 5000, b"9" * 5000, bytes(50),
)  # fmt: skip


def mutate(data, rng):
    """One to twenty changes: bits, bytes, deletions, insertions, a cut, a repetition, a word of four bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        kind, i, j = rng.randrange(7), rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        at = min(i, len(data) - 1)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.choice([0, 255, 10, 13, 34, 44, 91, 93, 123, 125, 92, 128, rng.randrange(256)])
        elif kind == 2:
            del data[i : i + rng.choice([1, 2, 10, 100])]
        elif kind == 3:
            data[i:i] = rng.choice(INSERTED)
        elif kind == 4:
            del data[i:]
        elif kind == 5:
            data[i:i] = data[j : j + rng.choice([1, 4, 30])]
        else:
            data[i : i + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
    return bytes(data)


@pytest.fixture(scope="module")
def files():
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = pa.table({"n": range(4), "text": TEXTS, "d": pa.array(TEXTS).dictionary_encode()})
    made = dict(FILES) | {
        "z.jsonl.zst": zstd(LINES),
        "g.fa": b">a x\nACGT\nACG\n>b\nTTTT\n",
        "t.txt": b"one<|e|>\xc3\xbc",
    }
    for name, table in (("a", rows), ("d", rows.select(["d"]).rename_columns(["text"]))):
        for ending, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
            with io.BytesIO() as sink:
                with new(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=2)
                made[f"{name}.{ending}"] = sink.getvalue()
        with io.BytesIO() as sink:
            pq.write_table(table, sink, compression="none")
            made[f"{name}.parquet"] = sink.getvalue()
    return made


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_end_in_documents_or_in_one_line(files, tmp_path, seed):
    rng = random.Random(seed)
    outcomes = {"read": 0, "refused": 0}
    for name, data in files.items():
        for mode in ("error", "skip", "error"):
            (tmp_path / name).write_bytes(mutate(data, rng))
            try:
                documents = list(
                    read_documents(find_files(str(tmp_path / name)), tally=Tally(mode), separator="<|e|>")
                )
                assert all(document.text.encode() for document in documents)
                outcomes["read"] += 1
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 700
                assert str(tmp_path) in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes
    (tmp_path / "a.jsonl").write_bytes(LINES + b"\n" + mutate(LINES, rng) + b"\n" + LINES)
    texts = [d.text for d in read_documents(find_files(str(tmp_path / "a.jsonl")), tally=Tally("skip"))]
    assert texts[:4] == texts[-4:] == TEXTS
