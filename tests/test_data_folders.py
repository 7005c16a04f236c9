"""Which files of a folder are read: its data, its training split, through links; pipes and devices are never opened."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from lcx.data import Dataset, find_files, read_documents
from lcx.errors import UserError


def make(folder, names):
    """Files by name: JSON lines and the like hold their own name as text."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {".csv": f"text\n{name}\n", ".fa": f">{name}\nACGT\n"}.get(
            path.suffix, json.dumps({"text": name})
        )
        path.write_text(text if path.suffix in (".csv", ".fa", ".json", ".jsonl", "") else f"words of {name}")


def names(folder, **options):
    return [file.name for file in find_files(str(folder), **options)]


def texts(folder, **options):
    return [document.text for document in read_documents(find_files(str(folder), **options))]


@pytest.mark.parametrize(
    ("there", "read"),
    [
        ("train.jsonl loader.py", "train.jsonl"),
        ("train.json README.md LICENSE .gitattributes dataset_info.json", "train.json"),
        ("a.csv requirements-dev.txt LICENSE.txt setup.py", "a.csv"),
        ("a.txt b.jsonl notes.md", "a.txt b.jsonl"),
        ("a.txt notes.md README.md LICENSE", "a.txt notes.md"),
        ("notes.md more.rst", "more.rst notes.md"),
        ("data/train-00000-of-00002.csv data/train-00001-of-00002.csv data/test-00000-of-00001.csv gen.py",
         "data/train-00000-of-00002.csv data/train-00001-of-00002.csv"),
        ("train.jsonl validation.jsonl extra.jsonl", "extra.jsonl train.jsonl"),
        ("wiki.train.txt wiki.valid.txt wiki.test.txt", "wiki.train.txt"),
        ("en/train.jsonl en/dev.jsonl de/train.jsonl", "de/train.jsonl en/train.jsonl"),
        ("train/0.jsonl train/1.jsonl test/0.jsonl", "train/0.jsonl train/1.jsonl"),
        ("test.jsonl", "test.jsonl"),
        ("test/0.jsonl more.jsonl", "more.jsonl test/0.jsonl"),
        ("a_contest.txt trained.txt latest.txt", "a_contest.txt latest.txt trained.txt"),
        ("part-00000 part-00001 _SUCCESS", "part-00000 part-00001"),
        ("a.txt b.txt metadata.csv SOURCES.tsv", "a.txt b.txt"),
        ("README.md LICENSE", "README.md"),
        ("metadata.csv picture.png", "metadata.csv"),
        ("g.fa README.md authors.jsonl", "authors.jsonl g.fa"),
    ],
)  # fmt: skip
def test_a_folder_is_read_for_its_data(tmp_path, there, read, caplog):
    make(tmp_path, there.split())
    assert names(tmp_path) == read.split()
    assert len(texts(tmp_path)) == len(read.split())
    left_out = {name for name in there.split() if not name.startswith(".")} - set(read.split())
    assert all(name in caplog.text for name in left_out)
    assert bool(caplog.records) == bool(left_out or "part-00000" in there.split())


@pytest.mark.parametrize(
    "there",
    [
        "setup.py package.json src/a.py tests/cases/x.csv requirements.txt README.md",
        "index.js package.json angular.json README.md",
        "main.c notes.txt",
    ],
)
def test_a_repository_is_code(tmp_path, there):
    make(tmp_path, there.split())
    (tmp_path / "settings.json").write_text('{\n "rules": [{"a": 1}]\n}')
    make(tmp_path, ["tests/broken.parquet"])
    files = find_files(str(tmp_path))
    assert {file.format for file in files} == {"code"} and len(texts(tmp_path)) == 1
    (one,) = texts(tmp_path)
    assert "setup.py" in one or "index.js" in one or "main.c" in one


def test_a_folder_of_which_one_format_is_asked_for(tmp_path):
    make(tmp_path, ["a.fa", "b.jsonl", "README.md", "notes"])
    assert names(tmp_path, format="fasta") == ["a.fa"]
    assert names(tmp_path, format="jsonl") == ["b.jsonl"]
    (tmp_path / "a.fa").unlink()
    (tmp_path / "b.jsonl").unlink()
    assert names(tmp_path, format="text") == ["notes"]


def test_missing_parts_are_said(tmp_path, caplog):
    make(tmp_path, ["data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl", "a-00000-of-00001.jsonl"])
    assert len(names(tmp_path)) == 3
    assert "data/train-* has 2 of 3 parts" in caplog.text and len(caplog.records) == 1


def test_splits_without_training_are_asked_for(tmp_path):
    make(tmp_path, ["test.jsonl", "validation.jsonl"])
    with pytest.raises(UserError, match="splits test, validation and none for training; name the files"):
        find_files(str(tmp_path))
    assert names(tmp_path / "*.jsonl") == ["test.jsonl", "validation.jsonl"]


def test_a_hub_snapshot_of_links_is_read(tmp_path):
    """models--x/snapshots/HASH/data/train.jsonl -> ../../../blobs/HASH, which has no ending."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    make(blobs, ["aa", "bb"])
    (snapshot / "data").mkdir(parents=True)
    os.symlink("../../../blobs/aa", snapshot / "data" / "train.jsonl")
    os.symlink("../../blobs/bb", snapshot / "README.md")
    assert names(snapshot) == ["data/train.jsonl"] and texts(snapshot) == ["aa"]
    assert texts(snapshot / "data" / "train.jsonl") == texts(snapshot / "*" / "*.jsonl") == ["aa"]
    linked = tmp_path / "linked"
    os.symlink(snapshot, linked)
    assert names(linked) == ["data/train.jsonl"]


def test_cycles_of_links_end(tmp_path, monkeypatch):
    make(tmp_path / "a", ["x.jsonl", "b/y.jsonl"])
    os.symlink(tmp_path / "a", tmp_path / "a" / "b" / "up")
    os.symlink("b", tmp_path / "a" / "again")
    assert sorted(texts(tmp_path / "a")) == ["b/y.jsonl", "x.jsonl"]
    os.symlink(tmp_path / "a", tmp_path / "a" / "third")  # with three, ways through them are too many to follow
    for pattern in ("a/**/*.jsonl", "**/*.jsonl", "a/**", "*/**/*.json?"):
        monkeypatch.chdir(tmp_path)
        assert sorted(texts(pattern)) == ["b/y.jsonl", "x.jsonl"], pattern
    assert texts("a/**/b/*") == ["b/y.jsonl"] and texts("./**/x.jsonl") == ["x.jsonl"]
    os.symlink("self.jsonl", tmp_path / "self.jsonl")
    with pytest.raises(
        UserError, match="cannot read .*self.jsonl: it is a link to self.jsonl, which leads to no file"
    ):
        find_files(str(tmp_path / "self.jsonl"))
    with pytest.raises(UserError, match="cannot read .*self.jsonl: it is a link to self.jsonl"):
        find_files(str(tmp_path))


def test_a_broken_link_is_an_error_where_it_would_be_data(tmp_path, caplog):
    make(tmp_path, ["a.jsonl"])
    os.symlink("nowhere", tmp_path / "link")
    assert names(tmp_path) == ["a.jsonl"] and "link (not a regular file)" in caplog.text
    os.symlink("nowhere", tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="b.jsonl: it is a link to nowhere, which leads to no file"):
        find_files(str(tmp_path))


def test_pipes_sockets_and_devices_are_refused_and_not_opened(tmp_path, caplog):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="pipe.jsonl: it is a pipe, expected a regular file"):
        find_files(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(UserError, match="it is a pipe"):
        find_files(str(tmp_path))
    with pytest.raises(UserError, match="/dev/zero: it is a device"):
        find_files("/dev/zero")
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    with pytest.raises(UserError, match="zero.txt: it is a device"):
        find_files(str(tmp_path / "zero.*"))
    other = tmp_path / "other"
    make(other, ["a.jsonl"])
    os.mkfifo(other / "pipe")
    os.mkfifo(other / "b.py")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(other / "socket"))
        assert names(other) == ["a.jsonl"]
    assert "pipe (not a regular file)" in caplog.text and "socket (not a regular file)" in caplog.text
    (other / "a.jsonl").unlink()
    (other / "c.py").write_text("c = 1")
    assert names(other) == ["other/c.py"] and "b.py (not a regular file)" in caplog.text


def test_a_source_that_is_no_path(tmp_path):
    for source, match in ((3, "Dataset.source is 3"), (("",), "no data source"), ("a\0b", "matches no file")):
        with pytest.raises(UserError, match=match):
            find_files(source)
    (tmp_path / "two\nlines.jsonl").write_text("{")
    with pytest.raises(UserError) as caught:
        texts(tmp_path / "two\nlines.jsonl")
    assert "\n" not in str(caught.value)
    make(tmp_path, ["a[1].jsonl"])
    assert texts(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A `datasets` folder in several shards, whose order is not that of its first rows; and a dictionary of splits."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"n": range(40), "text": [f"text {i}" for i in range(40)]})
    rows.shuffle(seed=1).select(range(30)).save_to_disk(folder / "one", num_shards=12)
    splits = {"test": rows.select([0]), "train": rows.select([3, 1, 2])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(folder / "no_train")
    datasets.DatasetDict({"test": rows.select([5])}).save_to_disk(folder / "single")
    return folder


def test_a_folder_saved_by_datasets(saved, caplog):
    import datasets

    expected = datasets.load_from_disk(str(saved / "one"))["text"]
    assert texts(saved / "one") == list(expected) and len(set(expected)) == 30
    assert names(saved / "one")[1] == "data-00001-of-00012.arrow"
    assert not caplog.records
    assert texts(saved / "splits") == ["text 3", "text 1", "text 2"]
    assert "splits: the split train is read, without test" in caplog.text
    assert texts(saved / "splits" / "test") == ["text 0"]
    assert texts(saved / "single") == ["text 5"]
    with pytest.raises(UserError, match="has the splits a, b and none named train; name the folder of one"):
        find_files(str(saved / "no_train"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_data_files": [{"filename": "../one/data.arrow"}]}, "expected a name in that folder"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "expected a name in that folder"),
        ({"_data_files": [{"filename": 3}]}, "_data_files holds 3"),
        ({"_data_files": 3}, "_data_files holds None"),
        ({"_data_files": []}, "without rows"),
        ({"_data_files": [{"filename": "absent.arrow"}]}, "absent.arrow: No such file"),
        ({"_indices_files": [{"filename": "i.arrow"}]}, "a selection of rows"),
        ([], "has a list, expected an object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_saved_folder(saved, tmp_path, change, match):
    folder = tmp_path / "copy"
    shutil.copytree(saved / "one", folder)
    state = json.loads((folder / "state.json").read_text())
    changed = {**state, **change} if isinstance(change, dict) else change
    (folder / "state.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=match) as caught:
        find_files(str(folder))
    assert "\n" not in str(caught.value)


def test_arrow_streams_that_were_cut_or_joined(saved, tmp_path):
    data = (saved / "one" / "data-00000-of-00012.arrow").read_bytes()
    path = tmp_path / "a.arrow"
    path.write_bytes(data * 2)
    with pytest.raises(UserError, match="bytes follow the end of its Arrow stream"):
        texts(path)
    path.write_bytes(data[:-8])
    dataset = Dataset(str(path), cache_dir=str(tmp_path / "cache"))
    assert "may be truncated" in dataset.open().store.notes[0]


def test_what_is_skipped_is_said_at_every_start(tmp_path, caplog):
    lines = ['{"text": "one"}', '{"text": null}', "{", '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    dataset = Dataset(str(tmp_path / "a.jsonl"), on_bad_line="skip", cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # the second reads the store alone
        store = dataset.open().store
        assert store.num_documents == 2
        assert store.notes[0].startswith("1 empty document skipped") and "a.jsonl line 3" in store.notes[1]
    assert caplog.text.count("1 row skipped that cannot be read") == 1  # said once by one process
    with pytest.raises(UserError, match="a.jsonl line 3 is not JSON"):
        Dataset(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")).open()
    with pytest.raises(UserError, match="on_bad_line='ignore' is unknown; expected one of error, skip"):
        Dataset("a", on_bad_line="ignore")
    (tmp_path / "b.jsonl").write_text('{"a"\n[]\n')
    with pytest.raises(UserError, match="holds no text: .*2 rows skipped.*b.jsonl line 1"):
        Dataset(str(tmp_path / "b.jsonl"), on_bad_line="skip", cache_dir=str(tmp_path / "cache")).open()


def test_the_command_says_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one."}\n{"text": ""}\n{\n')
    command = [sys.executable, "-m", "lcx.data", f"--source={tmp_path}", "--min_length=1"]
    environment = {**os.environ, "LCX_CACHE": str(tmp_path / "cache")}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "a.jsonl line 3 is not JSON" in out.stderr
    out = subprocess.run([*command, "--on_bad_line=skip"], capture_output=True, text=True, env=environment)
    assert out.returncode == 0 and out.stdout.startswith("1 document,")
    assert "1 empty document skipped" in out.stderr and "1 row skipped" in out.stderr
