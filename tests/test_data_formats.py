"""Every format of rows and compression gives the same documents; what no format fits is one clear line."""

import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys

import pytest

from lcx.data import find_files, read_documents
from lcx.data.sources import Tally
from lcx.errors import UserError

TEXTS = ['one, "quoted"\nline', "zwei ü\t𝄞", "three" * 50, "[4] {not} json"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def read(source, *, format=None, on_bad_line="error", **options):
    tally = Tally(on_bad_line)
    files = find_files(str(source), format=format)
    return [one.text for one in read_documents(files, tally=tally, **options)], tally


def texts_of(source, **options):
    return read(source, **options)[0]


def fails(source, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        read(source, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def table(delimiter, end="\r\n"):
    lines = []
    writer = csv.writer(
        type("", (), {"write": lambda self, x: lines.append(x)})(), delimiter=delimiter, lineterminator=end
    )
    writer.writerow(["id", "text"])
    writer.writerows([row["id"], row["text"]] for row in ROWS)
    return "".join(lines).encode()


LINES = "\n".join(map(json.dumps, ROWS)).encode()
FILES = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "no_ending": LINES,
    "lines.txt": LINES,
    "lines.csv": LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n") + b"\r\n",
    "cr.jsonl": LINES.replace(b"\n", b"\r"),
    "mark.json": b"\xef\xbb\xbf" + LINES,
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "array.txt": json.dumps(ROWS, ensure_ascii=False).encode(),
    "array_mark.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode() + b"\n\n",
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "pretty_crlf.json": json.dumps(ROWS, indent=2).encode().replace(b"\n", b"\r\n"),
    "pretty_objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "pretty_objects": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "two_arrays.json": json.dumps(ROWS[:1]).encode() + b"\n" + json.dumps(ROWS[1:], indent=1).encode(),
    "row_a_line.json": b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
    "wrapped.json": json.dumps({"version": "1", "data": ROWS, "tags": ["x"]}).encode(),
    "wrapped_pretty.json": json.dumps({"version": "1", "data": ROWS}, indent=2).encode(),
    "table.csv": table(","),
    "table_lf.csv": table(",", "\n"),
    "semicolons.csv": table(";"),
    "mark.csv": b"\xef\xbb\xbf" + table(","),
    "table.tsv": table("\t"),
    "lines.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
    "padded.jsonl.gz": gzip.compress(LINES) + bytes(1000),
    "gzip_inside.jsonl": gzip.compress(LINES),
    "lines.json.bz2": bz2.compress(LINES[:40]) + bz2.compress(LINES[40:]),
    "lines.json.xz": lzma.compress(LINES[:40]) + bytes(8) + lzma.compress(LINES[40:]),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "table.csv.gz": gzip.compress(table(",")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_same_documents(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    texts, tally = read(tmp_path / name)
    assert texts == TEXTS and not tally.lines()
    # Read a few bytes at a time, every value is cut somewhere.
    if name.endswith((".json", ".csv", ".jsonl")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lcx.data.readers.streams.PIECE", 7)
            patch.setattr("lcx.data.readers.json_rows._PIECE", 5)
            assert texts_of(tmp_path / name) == TEXTS


def test_zstd(tmp_path):
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "lines.jsonl.zst"
    path.write_bytes(skippable + zstd(LINES[:40]) + zstd(b"") + zstd(LINES[40:]))
    assert texts_of(path) == TEXTS
    whole = zstd(LINES * 50)
    path.write_bytes(whole[:-3])
    fails(path, "ends early")
    path.write_bytes(whole + b"garbage garbage")
    fails(path, "lines.jsonl.zst: zstd")


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress, zstd])
def test_damaged_compression(tmp_path, pack):
    path = tmp_path / "lines.jsonl"
    whole = pack(LINES)
    path.write_bytes(whole[:-9])
    fails(path, "ends early")
    path.write_bytes(whole + b"garbage that is no stream")
    fails(path, "cannot read")
    path.write_bytes(whole[:30] + b"\xff\xff\xff\xff" + whole[34:])
    fails(path, "cannot read")
    path.write_bytes(pack(pack(LINES)))
    fails(path, "compressed twice")


def test_arrow_in_every_layout(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.feather
    import pyarrow.parquet as pq

    kinds = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
    ]
    texts = [*TEXTS, None, "", *TEXTS]
    for number, kind in enumerate([*kinds, "dictionary"]):
        if kind == "dictionary":
            column = pa.array(texts).dictionary_encode()
        else:
            column = pa.array([t and t.encode() for t in texts] if "binary" in str(kind) else texts, kind)
        rows = pa.table({"n": range(len(texts)), "text": column})
        with (
            pa.OSFile(str(tmp_path / f"{number}.stream.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, rows.schema) as w,
        ):
            w.write_table(rows, max_chunksize=3)
        with (
            pa.OSFile(str(tmp_path / f"{number}.file.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, rows.schema) as w,
        ):
            w.write_table(rows.slice(1), max_chunksize=3)
        pq.write_table(rows, tmp_path / f"{number}.parquet")
        for name, expected in (
            ("stream.arrow", TEXTS * 2),
            ("parquet", TEXTS * 2),
            ("file.arrow", TEXTS[1:] + TEXTS),
        ):
            found, tally = read(tmp_path / f"{number}.{name}")
            assert found == expected and tally.empty == 2, (kind, name)
    pyarrow.feather.write_feather(pa.table({"text": TEXTS}), tmp_path / "f.feather")
    assert texts_of(tmp_path / "f.feather") == TEXTS
    (tmp_path / "parquet_by_content.json").write_bytes((tmp_path / "0.parquet").read_bytes())
    assert texts_of(tmp_path / "parquet_by_content.json") == TEXTS * 2
    fails(tmp_path / "0.parquet", "is parquet, expected jsonl .Dataset.format='jsonl'", format="jsonl")
    (tmp_path / "0.parquet.gz").write_bytes(gzip.compress((tmp_path / "0.parquet").read_bytes()))
    fails(tmp_path / "0.parquet.gz", "compressed parquet.*decompress it")


def test_bytes_that_are_no_text_in_a_table(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": pa.array([b"one", b"\xff\xfe", b"two"], pa.binary())}), path)
    fails(path, r"t.parquet row 1, column 'text', is not UTF-8 text: byte 0xff")
    texts, tally = read(path, on_bad_line="skip")
    assert texts == ["one", "two"] and tally.bad == 1


def test_the_cases_that_were_read_wrongly(reference):
    data = reference / "cases" / "data"
    five = [f"document number {i}." for i in range(5)]
    for name in ("a.json", "arr.json", "c4.json.gz", "a.jsonl"):
        assert texts_of(data / name) == five
    assert texts_of(data / "t.csv") == ["hello", "world"]
    texts, tally = read(data / "null.jsonl")
    assert texts == five * 2 and tally.empty == 2 and "2 empty documents skipped" in tally.lines()[0]
    pytest.importorskip("pyarrow")
    assert texts_of(data / "view.parquet") == ["aa", "bb"]
    files = find_files(str(data / "folder_parquet_and_loader"))
    assert [file.name for file in files] == ["train.parquet"]


@pytest.mark.parametrize(
    "text",
    [
        "[Illustration]\n\nIt is a truth universally acknowledged",
        "[1] First note\n[2] Second note\n",
        "[1]\nFirst note",
        "{ int x = 1; }",
        "{}\nno JSON",
        "{curly} words",
        '{"a": 1} and then prose',
        '{"key": broken',
        "[{'text': 'a Python list'}]",
        "[[[" * 50_000,
        "null",
        '"quoted"',
        "12",
    ],
)
def test_text_that_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text]


def test_json_in_a_text_file_is_said_and_can_be_text(tmp_path, caplog):
    path = tmp_path / "notes.txt"
    path.write_bytes(LINES)
    assert texts_of(path) == TEXTS
    assert "notes.txt is read as jsonl, by its content; Dataset.format='text'" in caplog.text
    assert texts_of(path, format="text") == [LINES.decode()]
    assert texts_of(path, format="json") == texts_of(path, format="jsonl") == TEXTS
    path.write_bytes(b"damaged " + LINES)
    fails(path, "notes.txt line 1 is not JSON")
    path.write_bytes(FILES["pretty.json"])
    fails(path, "is a JSON array, but Dataset.format='jsonl'", format="jsonl")


def test_long_rows(tmp_path):
    """Longer than what is looked at to tell the format, than the csv module's limit, and than a piece of a stream."""
    long = "x, " * 500_000
    rows = [{"text": long}, {"text": "short"}, {"text": long}]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "d.csv").write_text(f'text,n\n"{long}",1\nshort,2\n"{long}",3\n')
    (tmp_path / "e.txt").write_text(json.dumps(rows, indent=2))
    for name in ("a.json", "b.json", "c.json", "d.csv", "e.txt"):
        assert texts_of(tmp_path / name) == [long, "short", long]


def test_a_long_row_of_a_small_compressed_table_is_refused(tmp_path):
    """The csv module would hold it as 4 bytes a letter: 200 MB of spaces in 0.2 MB took 1.1 GB."""
    path = tmp_path / "a.tsv"
    path.write_bytes(gzip.compress(b"text\n" + b" " * (65 << 20), 1))
    fails(path, "a row has more than 64 MiB of text")


def test_an_object_is_a_row_unless_it_holds_the_rows(tmp_path):
    path = tmp_path / "a.json"
    for one in ({"text": "a", "tags": [{"x": 1}]}, {"data": [{"text": "a"}], "n": 1}, {"text": "a"}):
        path.write_text(json.dumps(one))
        assert texts_of(path) == ["a"]
    path.write_text(json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}))
    fails(path, r"fields \['test', 'train'\], expected the field 'text'")
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    fails(path, r"fields \['messages'\]")


def test_the_field_is_found_or_asked_for(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    row = {"url": "u", "content": "a", "n": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.csv").write_text("url,content,n\nu,a,1\n")
    pq.write_table(pa.table({k: [v] for k, v in row.items()}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        texts, tally = read(tmp_path / name)
        assert texts == ["a"]
        assert tally.lines() == [
            "there is no field 'text' and 'content' is read (of ['url', 'content', 'n']); Dataset.text_field names"
            " another"
        ]
        assert texts_of(tmp_path / name, text_field="url") == ["u"]
        fails(tmp_path / name, "expected (the field )?'body'; set Dataset.text_field", text_field="body")
    null, row = '{"content": null}', '{"content": "b"}'  # as a column of a table that begins with null
    for name, text in (("n.jsonl", f"{null}\n{row}"), ("n.json", f"[{null}, {row}]")):
        (tmp_path / name).write_text(text)
        texts, tally = read(tmp_path / name)
        assert texts == ["b"] and tally.empty == 1
    (tmp_path / "b.jsonl").write_text('{"title": "a", "label": "b"}')
    fails(tmp_path / "b.jsonl", r"fields \['label', 'title'\], expected the field 'text'")
    (tmp_path / "b.csv").write_text("body,content\na,b\n")
    fails(tmp_path / "b.csv", r"columns \['body', 'content'\], expected 'text'")
    (tmp_path / "c.csv").write_text("text;n\na;1\n")
    assert texts_of(tmp_path / "c.csv") == ["a"]
    (tmp_path / "d.csv").write_text("text\tn\na\t1\n")
    fails(tmp_path / "d.csv", "set Dataset.format to 'tsv'")
    assert texts_of(tmp_path / "d.csv", format="tsv") == ["a"]
    (tmp_path / "e.csv").write_text("text,text\na,b\n")
    fails(tmp_path / "e.csv", "2 columns 'text'")


NOTHING = [None, "", " \n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_null_and_empty_are_skipped_and_counted_in_every_format(tmp_path, name):
    texts = ["one", *NOTHING, "two", *NOTHING, "NaN"]
    path = tmp_path / name
    if name.endswith("json"):
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif name.endswith("csv"):
        path.write_text("n,text\n" + "".join(f'1,"{text or ""}"\n' for text in texts))
    elif name.endswith("txt"):
        path.write_text("|".join(text or "" for text in texts) + "|\n")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), path)
    found, tally = read(path, separator="|" if name == "a.txt" else None)
    assert found == ["one", "two", "NaN"] and tally.empty == 6
    assert tally.lines() == ["6 empty documents skipped (null, or only white space)"]


BAD = {
    "json.jsonl": (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "line 2 is not JSON"),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n', "line 2 is not UTF-8"),
    "zero.jsonl": (b'{"text": "a"}\n{"text": "\0"}\n{"text": "c"}\n', "line 2 is not text: a zero byte"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n{"text": "c"}\n', "line 2 has a list"),
    "field.jsonl": (b'{"text": "a"}\n{"content": "b"}\n{"text": "c"}\n', r"line 2 has fields \['content'\]"),
    "type.jsonl": (b'{"text": "a"}\n{"text": 3}\n{"text": "c"}\n', "line 2: field 'text' is a int"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000 + b'\n{"text": "c"}\n', "line 2 .* nested too deeply"),
    "huge.jsonl": (b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b'}\n{"text": "c"}\n', "line 2 is JSON that cannot"),
    "type.json": (b'[{"text": "a"},\n{"text": 3}, {"text": "c"}]', "line 2, row 1: field 'text' is a int"),
    "list.json": (b'[{"text": "a"},\n["b"], {"text": "c"}]', "line 2 has a list"),
    "first.json": (b'{"text": "b"\n{"text": "a"}\n{"text": "c"}\n', "line 1 is not JSON"),
    "cells.csv": (b"text,n\na,1\nb\nc,3\n", "line 3 has 1 cells, the header 2"),
    "many.csv": (b"text,n\na,1\nb,2,3\nc,3\n", "line 3 has 3 cells"),
    "utf8.csv": (b'text,n\na,1\n"\xffb\nb",2\nc,3\n', "line 3 is not UTF-8 text: byte 0xff"),
    "zero.csv": (b"text,n\na,1\n\0b,2\nc,3\n", "line 3 is not text: a zero byte"),
    "quote.csv": (b'text,n\na,1\n"b"x,2\nc,3\n', "line 3 is not a csv row"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_with_its_place_or_counted(tmp_path, name):
    data, match = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    fails(path, f"{name} {match}")
    texts, tally = read(path, on_bad_line="skip")
    assert texts == ["a", "c"] and tally.bad == 1
    assert tally.lines()[0].startswith("1 row skipped that cannot be read") and name in tally.lines()[0]


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"', "line 1 is not JSON"),
        ("a.json", b'[{"text": "a"}', "the file ends where ',' is expected"),
        ("a.json", b'[{"text": "a"},]', "is not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "there is '{' where ',' is expected"),
        ("a.json", b'[{"text": "a"}] trailing', "is not JSON"),
        ("a.json", b"plain text", "line 1 is not JSON"),
        ("a.json", b'{"text": "a"', "line 1 is not JSON"),
        ("a.json", b'[\n{"text": "a\nb"}]', "line 2 is not JSON: Invalid control character; correct"),
        ("a.jsonl", b'{"text": "a\tb"}', "line 1 is not JSON: Invalid control character at column 12; expected"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"a":' * 100_000, "nested too deeply|not JSON"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8 text: byte 0xff at offset 11"),
        ("a.json", b'[{"text": "\0"}]', "a zero byte at offset 11"),
        ("a.csv", b'text,n\na,1\n"open,2\nc,3\n', "line 3: a quote is opened there and never closed"),
        ("a.csv", b'text,"n\n', "line 1: a quote is opened"),
        ("a.parquet", b"", "it is empty"),
        ("a.arrow", b"text", "as arrow: it begins with b'text'"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "as parquet"),
        ("a.arrow", b"\xff\xff\xff\xff" + bytes(range(200)), "as arrow"),
        ("a.arrow", b"ARROW1\0\0" + bytes(100), "as arrow"),
        ("a.txt", "text".encode("utf-16"), "UTF-16 text; convert it: iconv"),
        ("a.csv", "text\na\n".encode("utf-16"), "UTF-16 text"),
        ("a.json", "[]".encode("utf-32"), "UTF-32 text"),
        ("a.txt", "text".encode("utf-16-le"), "a zero byte at offset 1"),
        ("a.txt", "é".encode("latin-1"), "not UTF-8 text: byte 0xe9 at offset 0"),
        ("a.txt", "é".encode()[:1], "not UTF-8 text: byte 0xc3 at offset 0"),
        ("a.txt", b"%PDF-1.7\n", "a PDF; extract its text"),
        ("a.txt", b"PK\x03\x04 word/document.xml", "a Word document"),
        ("a.csv", b"PK\x03\x04 xl/workbook.xml", "an Excel sheet"),
        ("a.bin", b"\x80\x04\x95abc", "a pickle, which could run code"),
        ("a.txt", b"{\\rtf1\\ansi", "a rich text"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ("a.tar.gz", gzip.compress(bytes(257) + b"ustar  ", mtime=0), "a tar archive"),
        ("a.gz", b"plain", "Not a gzipped file although"),
        ("a.zst", b"plain", "not a zstd file although"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, data, match):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    fails(tmp_path / name, match)


def test_unusual_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "\\u0041\\u0000\\ud834\\udd1e", "text2": NaN, "n": 1e999, "m": -0}, {"text": "last"}]'
    )
    assert texts_of(path) == ["A\0𝄞", "last"]
    twice = '{"text": "first", "text": "second", "\\ud800": "\\udfff"}'
    for line in (twice, f"[{twice}]"):
        path.write_text(line)
        texts, tally = read(path)
        assert texts == ["second"] and "the key 'text' occurs twice" in tally.lines()[0]
    (tmp_path / "mark.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert texts_of(tmp_path / "mark.jsonl") == ["a", "b"]
    path.write_bytes(b'{"text": "half \\ud83d pair"}')
    texts, tally = read(path)
    assert texts == ["half \ufffd pair"] and tally.replaced == 1
    for empty in (b"", b" \n\n", b"\xef\xbb\xbf", b"[]", b"[ ]\n[]"):
        path.write_bytes(empty)
        texts, tally = read(path)
        assert texts == [] and tally.lines() == ["1 file holds no document"]


def test_a_separator_that_is_not_there_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo")
    texts, tally = read(tmp_path / "a.txt", separator="<|endoftext|>")
    assert texts == ["one\n---\ntwo"] and "separator '<|endoftext|>' is not in a.txt" in tally.lines()[0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_separator_is_found_across_pieces(tmp_path, size, monkeypatch):
    monkeypatch.setattr("lcx.data.readers.streams.PIECE", size)
    text = "ü<|e|><|e|>b<|e<|e|>|>c<|e|>"
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt", separator="<|e|>") == [t for t in text.split("<|e|>") if t]


MEMORY = """
import resource, sys
from lcx.data import find_files, read_documents
from lcx.data.sources import Tally
from lcx.errors import UserError
files = find_files(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = 0
try:
    for document in read_documents(files, separator=sys.argv[2] or None):
        count += len(document.text)
except UserError as error:
    print(error)
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize(
    ("name", "unit", "separator"),
    [
        ("a.txt.gz", b"%s<|end|>\n", "<|end|>"),
        ("a.jsonl.gz", b'{"text": "%s"}\n', ""),
        ("a.json.zst", b'{"text": "%s"},\n', ""),
        ("a.csv.bz2", b'"%s",1\n', ""),
        ("a.txt.xz", b"%s", ""),
    ],
)
def test_a_compressed_file_is_streamed(tmp_path, name, unit, separator):
    """What unfolds to 40 MiB takes a few MiB of memory; as one document it is refused before it is held."""
    repeated = unit % (b"work and play, " * 666 + b"work and p") * 100
    pack = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}[
        name[name.rindex(".") :]
    ]
    times = 40
    head, tail = {"csv": (b"text,n\n", b""), "jso": (b"[", b'{"text": "end"}]')}.get(name[2:5], (b"", b""))
    if name == "a.jsonl.gz":
        head = tail = b""
    (tmp_path / name).write_bytes(pack(head) + pack(repeated) * times + pack(tail))
    script = (
        MEMORY
        if name != "a.txt.xz"
        else "import lcx.data.readers.streams as s; s._MOST_UNPACKED = 1 << 23\n" + MEMORY
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / name), separator],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    count, grown = map(int, out[-1].split())
    assert grown < 30, out
    if name == "a.txt.xz":
        assert count == 0 and "the one document in it has more than 8 MiB of text" in out[0]
    else:
        assert count // 10_000 == 100 * times
