"""Any part of any record of a FASTA file, in every form that people store them, equals the letters written."""

import gzip
import logging
import struct
import zlib

import numpy as np
import pytest

from lcx.data.readers import SourceFile, fasta_index
from lcx.data.readers.fasta import read_fasta
from lcx.data.readers.fasta_index import IndexedFasta
from lcx.errors import UserError

rng = np.random.default_rng(0)
RECORDS = {
    name: "".join(rng.choice(list("ACGTNacgtn"), size)) for name, size in (("a", 1000), ("e", 0), ("b", 1), ("c", 333))
}


def text_of(end="\n", width=60, remark=""):
    """The records as FASTA; remark: a line put after every header and every line of sequence."""
    lines = []
    for name, letters in RECORDS.items():
        lines += [f">{name} some words", *([remark] if remark else [])]
        for i in range(0, len(letters), width):
            lines += [letters[i : i + width], *([remark] if remark else [])]
    return end.join([*lines, ""]).encode("latin-1")


def bgzip(data, block=500):
    """What bgzip writes: blocks of the SAM specification, and the empty one at the end."""
    out = []
    for i in range(0, len(data) + block, block):
        piece = data[i : i + block]
        packed = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = packed.compress(piece) + packed.flush()
        head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(body) + 25)
        out.append(head + body + struct.pack("<II", zlib.crc32(piece), len(piece)))
        if not piece:
            break
    return b"".join(out)


def fai_of(data):
    """samtools faidx, for records of equal lines."""
    rows, offset = [], 0
    for part in data.split(b">")[1:]:
        header, *lines = part.split(b"\n")
        start = offset + 1 + len(header) + 1
        length = sum(map(len, lines))
        width = len(lines[0])
        rows.append(f"{header.split()[0].decode()}\t{length}\t{start}\t{width}\t{width + 1 if length else 0}\n")
        offset += 1 + len(part)
    return "".join(rows)


FORMS = {
    "lf": text_of(),
    "crlf": text_of("\r\n"),
    "cr": text_of("\r"),
    "one line": text_of(width=10**6),
    "no end": text_of().rstrip(b"\n"),
    "remarks": text_of(remark="; a remark > with ACGT"),
    "ragged": text_of().replace(b"A", b"\nA ", 40),
    "bom": b"\xef\xbb\xbf" + text_of(),
    "latin-1": text_of().replace(b"some words", "caf\xe9 \xb5".encode("latin-1")),
    "bgz": bgzip(text_of()),
    "gz": gzip.compress(text_of()),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(fasta_index, "_STRETCH", 64)  # so that borders of pieces fall everywhere


@pytest.mark.parametrize("form", FORMS)
def test_every_part_of_every_form(form, tmp_path):
    path = tmp_path / ("x.fa.gz" if "gz" in form else "x.fa")
    path.write_bytes(FORMS[form])
    file = SourceFile(str(path), path.name, "fasta")
    contigs = IndexedFasta(file).contigs
    assert {name: len(contig) for name, contig in contigs.items()} == {n: len(t) for n, t in RECORDS.items()}
    for name, letters in RECORDS.items():
        assert contigs[name][:] == letters
        for start, stop in rng.integers(0, len(letters) + 2, (40, 2)):
            assert contigs[name][start:stop] == letters[start:stop]
    assert [(d.name, d.text) for d in read_fasta(file)] == [(f"{path.name}:{n}", t) for n, t in RECORDS.items()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_of_any_size_find_the_same_stretches(size, tmp_path, monkeypatch):
    monkeypatch.setattr(fasta_index, "_STRETCH", size)
    for form in ("lf", "crlf", "cr", "remarks"):
        (tmp_path / "x.fa").write_bytes(FORMS[form])
        contigs = IndexedFasta(SourceFile(str(tmp_path / "x.fa"), "x.fa", "fasta")).contigs
        assert {name: contig[:] for name, contig in contigs.items()} == RECORDS


@pytest.mark.parametrize("packed", [False, True])
def test_an_index_beside_the_file_is_used(packed, tmp_path, monkeypatch):
    path = tmp_path / ("x.fa.bgz" if packed else "x.fa")
    path.write_bytes(bgzip(text_of()) if packed else text_of())
    (tmp_path / f"{path.name}.fai").write_text(fai_of(text_of()))
    monkeypatch.setattr(fasta_index, "_scanned", None)  # there is no pass over the file
    contigs = IndexedFasta(SourceFile(str(path), path.name, "fasta")).contigs
    for name, letters in RECORDS.items():
        assert contigs[name][:] == letters and contigs[name][3:700] == letters[3:700]


@pytest.mark.parametrize(
    "change",
    [
        lambda fai: fai.replace("\t1000\t", "\t900\t"),  # of an older file
        lambda fai: fai.replace("a\t", "z\t", 1),
        lambda fai: "".join(fai.splitlines(keepends=True)[:-1]),
        lambda fai: fai.replace("60\t61", "61\t62", 1),
        lambda fai: fai.replace("\t", " "),
        lambda fai: "",
    ],
)
def test_an_index_of_another_file_is_not_used(change, tmp_path, caplog):
    (tmp_path / "x.fa").write_bytes(text_of())
    (tmp_path / "x.fa.fai").write_text(change(fai_of(text_of())))
    with caplog.at_level(logging.WARNING):
        contigs = IndexedFasta(SourceFile(str(tmp_path / "x.fa"), "x.fa", "fasta")).contigs
    assert "does not fit" in caplog.text
    assert {name: contig[:] for name, contig in contigs.items()} == RECORDS


@pytest.mark.parametrize(
    "data, message",
    [
        (b"ACGT\n>a\nA", "expected a FASTA header"),
        (b">a\nAC\n>a\nG", "2 records named 'a'"),
        (b">a\nA\0C", "zero byte"),
        (b">a\nA\xe9C", "expected letters"),
        (b">" + b"x" * (2 << 20), "more than 1 MiB"),
        (bgzip(text_of())[:-300], "ends early"),
    ],
)
def test_what_is_no_fasta_is_refused(data, message, tmp_path):
    path = tmp_path / ("x.fa.gz" if data[:1] == b"\x1f" else "x.fa")
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        for contig in IndexedFasta(SourceFile(str(path), path.name, "fasta")).contigs.values():
            contig[:]
