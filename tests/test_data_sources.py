"""Documents from every kind of file, and one clear line for every kind of bad file."""

import gzip
import json
import os
import pathlib
import sysconfig

import pytest

from lcx.data import find_files, read_documents
from lcx.errors import UserError


def read(source, *, format=None, **options):
    return {doc.name: doc.text for doc in read_documents(find_files(str(source), format=format), **options)}


def fails(source, match, *, format=None, **options):
    with pytest.raises(UserError, match=match) as caught:
        read(source, format=format, **options)
    assert "\n" not in str(caught.value)


def test_text_files_in_order_and_exactly(tmp_path):
    texts = {"b.txt": "two\r\n\tlines\n", "a.txt": "één ☃ 𝄞\n", "c.txt": "  \n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    assert list(read(tmp_path / "*.txt").items()) == [("a.txt", texts["a.txt"]), ("b.txt", texts["b.txt"])]
    assert read(tmp_path) == read(tmp_path / "*.txt")
    assert read(tmp_path / "b.txt") == {"b.txt": texts["b.txt"]}
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfmark")
    assert read(tmp_path / "d.txt") == {"d.txt": "mark"}


def test_names_do_not_depend_on_the_place(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "deep").mkdir(parents=True)
        (tmp_path / root / "deep" / "x.txt").write_text("x")
        (tmp_path / root / "y.txt").write_text("y")
    assert (
        read(tmp_path / "one" / "**" / "*.txt") == read(tmp_path / "two") == {"deep/x.txt": "x", "y.txt": "y"}
    )


def test_a_tuple_of_sources_keeps_its_order(tmp_path):
    for name in "zab":
        (tmp_path / f"{name}.txt").write_text(name)
    files = find_files((str(tmp_path / "z.txt"), str(tmp_path / "[ab].txt")))
    assert [document.text for document in read_documents(files)] == ["z", "a", "b"]


def test_separator(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("\nOne.\nMore.\n<|endoftext|>\n\n<|endoftext|>\nTwo.<|endoftext|>")
    assert list(read(file, separator="<|endoftext|>").values()) == ["One.\nMore.", "Two."]


def test_jsonl(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [{"text": "one\nline"}, {"text": ""}, {"text": "zwei ü", "x": 1}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read(file) == {"data.jsonl:1": "one\nline", "data.jsonl:5": "zwei ü"}
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert list(read(tmp_path / "data.jsonl.gz").values()) == ["one\nline", "zwei ü"]
    (tmp_path / "half.jsonl").write_text('{"text": "half \\ud83d pair"}')
    assert read(tmp_path / "half.jsonl")["half.jsonl:1"].encode().startswith(b"half ")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [f"text {i}" if i % 7 else None for i in range(1000)]
    pq.write_table(
        pa.table({"sentence": texts, "n": list(range(1000))}), tmp_path / "t.parquet", row_group_size=90
    )
    documents = read(tmp_path / "t.parquet", text_field="sentence")
    assert list(documents.values()) == [text for text in texts if text]
    fails(tmp_path / "t.parquet", r"columns \['sentence', 'n'\], expected 'text'; set Dataset.text_field")
    fails(tmp_path / "t.parquet", "column 'n' is int64, expected text", text_field="n")
    (tmp_path / "u.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:500])
    fails(tmp_path / "u.parquet", "as parquet", text_field="sentence")


def test_a_parquet_page_is_compared_with_its_checksum(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one", "three" * 50]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert list(read(path).values()) == ["one", "three" * 50]
    damaged = path.read_bytes()
    assert b"threethree" in damaged
    path.write_bytes(damaged.replace(b"threethree", b"threethrew"))
    fails(path, "a.parquet as parquet")


def test_fasta(tmp_path):
    file = tmp_path / "g.fa"
    file.write_text(">chr1 first\nACGT\nacgtN\n\n>chr2\nTT\n>empty\n")
    assert read(file) == {"g.fa:chr1": "ACGTacgtN", "g.fa:chr2": "TT"}
    file.write_text("ACGT\n")
    fails(file, r"line 1 starts with 'ACGT', expected a FASTA header")


def test_genomes(reference):
    genomes = reference / "data" / "genomes"
    (ecoli,) = read(genomes / "ecoli_k12_mg1655.fna.gz").values()
    assert len(ecoli) == 4_641_652 and set(ecoli) == set("ACGT")
    lengths = [len(text) for text in read(genomes).values()]
    assert sorted(lengths) == [5_386, 48_502, 4_641_652]


def test_novels_and_stories(reference):
    text = reference / "data" / "text"
    novels = read(text / "novels" / "*.txt")
    assert len(novels) == 12 and list(novels) == sorted(novels)
    for name, novel in novels.items():
        assert novel.encode() == (text / "novels" / name).read_bytes().removeprefix(b"\xef\xbb\xbf")
    stories = read(text / "tinystories_train_2MiB.txt", separator="<|endoftext|>")
    raw = (text / "tinystories_train_2MiB.txt").read_text()
    assert len(stories) == raw.count("<|endoftext|>") + 1
    assert sum(map(len, stories.values())) == sum(len(part.strip()) for part in raw.split("<|endoftext|>"))


def test_code_tree_is_one_document_in_path_order(tmp_path):
    repo = tmp_path / "repo"
    files = {"b.py": "b = 1\n", "a/z.c": "int z;\n", "a/a.py": "a = 1\n", "README.md": "# Hi\n"}
    hidden = {".git/x.py": "no", "a/__pycache__/y.py": "no", "image.png": "no"}
    for name, text in {**files, **hidden}.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    (repo / "bad.py").write_bytes(b"\xff\xfe\x00")
    os.symlink(tmp_path / "x.py", repo / "link.py")
    (tmp_path / "x.py").write_text("y = 1\n")
    os.symlink(repo / "b.py", repo / "again.py")  # read once, under its first name
    os.symlink(repo, repo / "a" / "cycle")
    files = {"again.py": "b = 1\n", "link.py": "y = 1\n", **files}
    del files["b.py"]
    order = sorted(files, key=lambda name: pathlib.PurePath(name).parts)
    expected = "".join(f"# repo/{name}\n{files[name].rstrip()}\n\n" for name in order)
    assert read(repo) == {"repo": expected}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "m.rs").write_text("fn main() {}")
    both = read(tmp_path / "[ro]*", format="code")
    assert list(both) == ["other", "repo"] and both["repo"] == expected
    fails(tmp_path / "[ro]*[ro]", 'only folders.*Dataset.format="code"')


def test_stdlib_is_real_and_leaves_out_tests_and_tables():
    documents = read("stdlib")
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert len(documents) > 100 and sum(len(text) > 10_000 for text in documents.values()) > 50
    assert (root / "argparse.py").read_text().rstrip() in documents["argparse"]
    assert documents["asyncio"].index("# asyncio/base_events.py") < documents["asyncio"].index(
        "# asyncio/tasks.py"
    )
    assert "# unittest/case.py" in documents["unittest"] and "# sqlite3/test/" not in documents["sqlite3"]
    assert not {"test", "encodings", "idlelib", "site-packages"} & set(documents)


def test_progress_reaches_the_size_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "y" * 100}) + "\n" for _ in range(50)))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    files = find_files(str(tmp_path))
    read_so_far = [document.bytes_read for document in read_documents(files)]
    assert read_so_far == sorted(read_so_far) and len(read_so_far) == 101
    assert read_so_far[-1] == sum(os.path.getsize(file.path) for file in files)


def test_a_mistyped_path_is_answered_with_the_right_one(tmp_path):
    (tmp_path / "novels.txt").write_text("x")
    fails(tmp_path / "novel.txt", "matches no file .did you mean '.*/novels.txt'.*Dataset.source")
    fails(tmp_path / "no" / "where" / "x.txt", "the folder .* does not exist")
    with pytest.raises(UserError, match="no data source is given"):
        find_files("")
    with pytest.raises(UserError, match="format 'txt' is unknown; expected one of text, jsonl"):
        find_files(str(tmp_path / "novels.txt"), format="txt")


def test_a_folder_without_anything_to_read(tmp_path):
    fails(tmp_path, "no file of a known kind")
    fails(tmp_path, "no source file", format="code")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("x.txt", b"abc\xff\xfe", "not UTF-8 text: byte 0xff at offset 3"),
        ("x.txt", b"PK\x03\x04\x00\x00", "a zip archive; unpack it"),
        ("x.txt", b"abc\0", "a zero byte at offset 3"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl line 2 is not JSON"),
        (
            "x.jsonl",
            b'{"text": "a"}\n\n{"body": "b"}\n',
            r"line 3 has fields \['body'\], expected the field 'text'",
        ),
        ("x.jsonl", b'["a"]\n', "line 1 has a list, expected a JSON object"),
        ("x.jsonl", b'{"text": 3}\n', "field 'text' is a int, expected text"),
        ("x.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("x.parquet", b"not parquet", "as parquet"),
        ("x.txt.gz", b"not gzip", "Not a gzipped file"),
        ("x.txt.gz", gzip.compress(b"abc" * 1000, mtime=0)[:-12], "ends early"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, match):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    fails(tmp_path / name, match)
    fails(tmp_path / name, name)
