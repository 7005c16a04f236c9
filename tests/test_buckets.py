"""Buckets: data, models, converted folders and workdirs, against emulators that fail now and then, or for good."""

import functools
import gzip
import json
import logging
import os
import shutil
import sys

import bucket_servers
import hf_folders
import jax
import numpy as np
import pytest
from tiny_runs import assert_same_checkpoint, dataset, lines, text_fixture, tiny_model, tiny_trainer  # noqa: F401

import lcx
from lcx import hub
from lcx import trainer as trainer_lib
from lcx.buckets import client, copies, workdirs
from lcx.convert import __main__ as convert
from lcx.data import find_files, sources
from lcx.errors import UserError

SCHEMES = ("s3", "gs")
# What a workdir does is the same in both, but for the calls of their clients, of which other tests make all in both.
one_scheme = functools.partial(pytest.mark.parametrize, "bucket", indirect=True)


@pytest.fixture(scope="module")
def servers():
    with bucket_servers.running() as weather:
        yield weather


@pytest.fixture
def weather(servers, tmp_path, monkeypatch):
    """The servers, without faults; and a local cache that is empty, as on another machine."""
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "lcx-cache"))
    copies.local.cache_clear()
    servers.fails, servers.slow, servers.requests, servers.failed = lambda number, method: False, 0.0, 0, 0
    return servers


@pytest.fixture(params=SCHEMES)
def bucket(request, weather):
    """A folder in the bucket that no other test uses."""
    return f"{request.param}://{bucket_servers.BUCKET}/{request.node.name.replace('[', '-').strip(']')}"


def every(n):
    return lambda number, method: number % n == 0


def put(url, folder):
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    client.upload(url, [(folder / name, name) for name in names])


# --- objects


def test_objects(bucket, weather, tmp_path):
    assert client.listing(bucket) == {} and client.stat(f"{bucket}/a") is None
    weather.fails = every(3)
    client.write(f"{bucket}/a", b"one")
    client.write(f"{bucket}/deep/b c", bytes(range(256)) * 70_000)  # more than a block
    assert list(client.listing(bucket)) == ["a", "deep/b c"]
    before = client.stat(f"{bucket}/a")
    stream = client.opened(f"{bucket}/deep/b c")
    assert stream.read() == bytes(range(256)) * 70_000
    assert stream.seek(-3, 2) and stream.read() == bytes([253, 254, 255])
    client.download(bucket, [("a", tmp_path / "x" / "a")])
    assert (tmp_path / "x" / "a").read_bytes() == b"one"
    client.write(f"{bucket}/a", b"two")
    assert client.stat(f"{bucket}/a").version != before.version
    with pytest.raises(UserError, match="has changed while it was read"):
        client.opened(f"{bucket}/a", client.Stat(5, "another")).read()
    client.remove(bucket, ["a", "never"])
    assert list(client.listing(bucket)) == ["deep/b c"]
    assert weather.failed > 3


@pytest.mark.parametrize("status", [500, 503, 403])
def test_failing_for_good_is_one_line(bucket, weather, monkeypatch, status):
    monkeypatch.setenv("LCX_BUCKET_PATIENCE", "0.2")
    weather.fails, weather.status = lambda number, method: True, status
    for work in (lambda: client.listing(bucket), lambda: client.write(f"{bucket}/a", b"")):
        with pytest.raises(UserError, match=f"^{bucket}.* cannot be (read|written) ") as error:
            work()
        assert "\n" not in str(error.value)
    weather.status = 503


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_cannot_be(scheme, weather, monkeypatch):
    with pytest.raises(UserError, match="there is no such bucket"):
        client.write(f"{scheme}://no-such-bucket/a", b"")
    for name in ("", "b/../c", "b//c"):
        with pytest.raises(UserError, match="is not the name of something in a bucket"):
            client.listing(f"{scheme}://{name}")
    client._of_scheme.cache_clear()
    monkeypatch.setitem(sys.modules, client.PACKAGES[scheme], None)
    with pytest.raises(UserError, match=r"pip install 'lcx\[buckets\]'"):
        client.listing(f"{scheme}://{bucket_servers.BUCKET}/x")
    monkeypatch.undo()
    client._of_scheme.cache_clear()


# --- data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Rows and texts of several formats, which are read here and in a bucket."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"text": f"document {i}: {'wide ' * i}"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[20]).encode()))
    (folder / "plain.txt").write_text("some text. " * 3000)
    (folder / "train").mkdir()
    table = pa.table({"text": [row["text"] for row in rows[21:40]]})
    pq.write_table(table, folder / "train" / "part-00000-of-00001.parquet", row_group_size=5)
    with pa.ipc.new_file(folder / "train" / "x.arrow", table.schema) as file:
        file.write_table(table)
    return folder


def documents(source):
    files = find_files(source)
    names = [(file.name, file.format) for file in files]
    return names, [(doc.name, doc.text) for doc in sources.read_documents(files)]


def test_data_is_read_as_from_a_folder(bucket, weather, corpus):
    put(bucket, corpus)
    weather.fails = every(4)
    for part in ("", "/rows.jsonl", "/*.jsonl*", "/train/*", "/**/*.parquet"):
        assert documents(f"{bucket}{part}") == documents(f"{corpus}{part}")
    assert weather.failed > 3


def test_a_large_object_is_read_a_block_at_a_time(bucket, weather, tmp_path):
    line = json.dumps({"text": "x" * 1000}) + "\n"
    client.write(f"{bucket}/big.jsonl", line.encode() * 60_000)
    files = find_files(f"{bucket}/big.jsonl")
    first = next(iter(sources.read_documents(files)))
    assert first.text == "x" * 1000
    assert weather.requests < 12, "a document of the first block needs no other block"


def test_the_token_store_knows_an_object_by_its_version(bucket, weather, tmp_path):
    url = f"{bucket}/a.txt"

    def stored(text):
        client.write(url, text)
        sources.streams._object.cache_clear()
        data = dataset(tmp_path, source=url, cache_dir=str(tmp_path / "store"), eval_fraction=0.0)
        data.opened()
        return sorted(path.name for path in (tmp_path / "store").iterdir() if path.is_dir())

    first = stored(b"the text " * 500)
    assert len(first) == 1 and stored(b"the text " * 500) == first
    assert len(stored(b"the next " * 500)) == 2


def test_sources_in_buckets_that_cannot_be(bucket, weather):
    for name, says in {"none": "there is no such object", "no*": "matches no object"}.items():
        with pytest.raises(UserError, match=says):
            find_files(f"{bucket}/{name}")
    with pytest.raises(UserError, match="copy it here"):
        find_files(bucket, format="code")
    client.write(f"{bucket}/dataset_dict.json", b"{}")
    with pytest.raises(UserError, match="a data set of `datasets`"):
        find_files(bucket)


# --- models


def equal(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_models_from_and_to_buckets(bucket, weather, tmp_path, capsys):
    here = hf_folders.make(tmp_path / "hf")
    put(f"{bucket}/hf", here)
    client.write(f"{bucket}/hf/pytorch_model.bin", b"a second copy of the weights, which is not wanted")
    _, params = lcx.load(str(here))
    weather.fails = every(5)
    assert equal(lcx.load(f"{bucket}/hf")[1], params)
    folder = hub.local(f"{bucket}/hf", kind="tokenizer")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"], "the weights stay in the copy"
    for style in ("lcx", "hf"):
        arguments = [f"--src={bucket}/hf", f"--dst={bucket}/{style}-out", f"--dst_format={style}"]
        assert convert.main(arguments) == 0
        assert convert.main(arguments) == 2  # it exists
        assert "already exists" in capsys.readouterr().err
        assert convert.main([*arguments, "--overwrite"]) == 0
        copies.local.cache_clear()
        assert equal(lcx.load(f"{bucket}/{style}-out")[1], params)
    model, params = lcx.load(f"{bucket}/hf")
    lcx.save(f"{bucket}/saved", model, params, format="hf")
    assert equal(lcx.load(f"{bucket}/saved")[1], params)
    assert weather.failed > 3
    client.write(f"{bucket}/other/notes.txt", b"mine")
    assert convert.main([f"--src={here}", f"--dst={bucket}/other", "--dst_format=hf", "--overwrite"]) == 2
    assert client.read(f"{bucket}/other/notes.txt") == b"mine"


def test_no_model_there(bucket, weather):
    with pytest.raises(UserError, match=f"there is nothing at {bucket}/none"):
        lcx.load(f"{bucket}/none")


# --- workdirs


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The workdir of a run that nothing disturbed, on this machine."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_lib.train(workdir=str(folder), job=run_of(text))
    return folder


def run_of(text, **changes):
    data = dataset(text, eval_fraction=0.0)  # one program less
    return tiny_trainer(text, **(dict(data=data, steps=12, checkpoint_every=4, log_every=3) | changes))


def as_left(url, folder):
    """What the bucket holds, in a folder."""
    client.download(url, [(name, folder / name) for name in client.listing(url)])
    return folder


def test_a_run_goes_on_on_another_machine(bucket, weather, text, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "_EVERY_S", 0.1)
    weather.fails = every(7)
    trainer_lib.train(workdir=bucket, job=run_of(text, stop_at=8), config_text="# the settings")
    shutil.rmtree(copies.cache(bucket, "workdirs"))
    trainer_lib.train(workdir=bucket, job=run_of(text))
    left = as_left(bucket, tmp_path / "left")
    assert_same_checkpoint(left, whole)
    logged, expected = (
        {line["step"]: line for line in lines(folder) if "loss" in line} for folder in (left, whole)
    )
    for step in (
        3,
        6,
        12,
    ):  # of the others the means begin elsewhere, because the first run logged its last step
        assert logged[step] == expected[step]
    assert (left / "config.gin").read_text() == "# the settings"
    kept = sorted(int(path.name) for path in (left / "checkpoints").iterdir() if path.name.isdecimal())
    assert kept == sorted(
        int(path.name) for path in (whole / "checkpoints").iterdir() if path.name.isdecimal()
    )
    assert weather.failed > 3
    assert equal(lcx.load(bucket)[1], lcx.load(str(whole))[1])
    copied = copies.cache(bucket, "read")
    assert not list(copied.rglob("opt_state")), "a model is wanted, not its optimizer"


@one_scheme(["gs"])
def test_errors_name_the_url_and_not_its_copy(bucket, weather, text, whole, tmp_path, capsys):
    """Of a workdir that is resumed, of a model, and of one of its files."""
    put(bucket, whole)
    trainer_lib.train(workdir=bucket, job=run_of(text))
    said = capsys.readouterr()
    assert f"done: {bucket}/checkpoints/12; " in (said.out + said.err), "the last step was there before"
    with pytest.raises(UserError, match=f"^{bucket} holds a run .* set another --workdir \\({bucket} is copied to /"):
        trainer_lib.train(workdir=bucket, job=run_of(text, model=tiny_model(num_heads=2)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    put(f"{bucket}/model", tmp_path / "model")
    with pytest.raises(UserError, match=f"^{bucket}/model/config.json: is not valid JSON: .* \\({bucket}/model is"):
        lcx.load(f"{bucket}/model")


@one_scheme(["s3"])
def test_a_bucket_that_fails_for_good_loses_nothing(
    bucket, weather, text, whole, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(workdirs, "_EVERY_S", 0.1)
    monkeypatch.setenv("LCX_BUCKET_PATIENCE", "0.3")
    caplog.set_level(logging.WARNING)
    fetch = workdirs._Workdir.fetch

    def then_fail(self):
        fetch(self)
        weather.fails = lambda number, method: True

    monkeypatch.setattr(workdirs._Workdir, "fetch", then_fail)
    with pytest.raises(UserError, match="not all of the run is in .* run the same command again") as error:
        trainer_lib.train(workdir=bucket, job=run_of(text))
    assert "\n" not in str(error.value)
    here = copies.cache(bucket, "workdirs")
    assert str(here) in str(error.value)
    assert_same_checkpoint(here, whole)
    weather.fails = lambda number, method: False
    assert not any(name.startswith("checkpoints/") for name in client.listing(bucket))
    monkeypatch.setattr(workdirs._Workdir, "fetch", fetch)
    trainer_lib.train(workdir=bucket, job=run_of(text))
    assert_same_checkpoint(as_left(bucket, tmp_path / "left"), whole)


@one_scheme(["gs"])
def test_a_step_counts_only_once_it_is_whole(bucket, weather, text, whole, tmp_path):
    put(bucket, whole)
    client.remove(f"{bucket}/checkpoints/12", [copies.COMMIT_MARKER])
    trainer_lib.train(workdir=bucket, job=run_of(text))  # from step 8
    assert_same_checkpoint(as_left(bucket, tmp_path / "left"), whole)


def record_of(bucket):
    return json.loads(client.read(f"{bucket}/{workdirs.WRITER}"))


def test_one_writer(bucket, weather, text, tmp_path, monkeypatch):
    with workdirs.opened(bucket) as folder:
        (folder / "note").write_text("mine")
        monkeypatch.setenv("LCX_CACHE", str(tmp_path / "another-machine"))
        with pytest.raises(UserError, match="is being written by another process"), workdirs.opened(bucket):
            pass
    record = record_of(bucket)
    assert not record["held"]
    with monkeypatch.context() as patch:  # one of this machine that still runs, with the same local folder
        patch.setenv("LCX_CACHE", str(tmp_path / "lcx-cache"))
        running = record | {"held": True, "process": os.getppid()}
        client.write(f"{bucket}/{workdirs.WRITER}", json.dumps(running).encode())
        with pytest.raises(UserError, match="is being written by another process"), workdirs.opened(bucket):
            pass
    for ended in ({"time": 0.0}, {"process": 2**22 + 1}):  # too long ago; a process that is no more
        left = record_of(bucket) | {"held": True} | ended
        client.write(f"{bucket}/{workdirs.WRITER}", json.dumps(left).encode())
        with workdirs.opened(bucket) as folder:
            assert (folder / "note").read_text() == "mine"
    shutil.rmtree(tmp_path / "another-machine")
    with (
        pytest.raises(UserError, match="another process writes there now"),
        workdirs.opened(bucket) as folder,
    ):
        (folder / "note").write_text("changed")
        client.write(f"{bucket}/{workdirs.WRITER}", json.dumps(record | {"token": "another"}).encode())
    assert client.read(f"{bucket}/note") == b"mine"


@pytest.mark.parametrize("left", ["nothing", "a run that ended", "a start that ended"])
def test_one_of_two_that_start_at_the_same_time(bucket, weather, left, tmp_path, monkeypatch):
    """Both have read that nobody writes before either does."""
    if left == "a run that ended":
        with workdirs.opened(bucket):
            pass
    elif left == "a start that ended":
        client.write(f"{bucket}/{workdirs.WRITER}.1", json.dumps({"time": 0.0, "id": "another"}).encode())
    one = workdirs._Workdir(bucket)
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "another-machine"))
    two = workdirs._Workdir(bucket)
    read = one._writer()
    monkeypatch.setattr(one, "_writer", lambda: (two.claim(), monkeypatch.undo(), read)[2])
    with pytest.raises(UserError, match="which came first"):
        one.claim()
    two.fetch()
    two.push()
    assert list(client.listing(bucket)) == [workdirs.WRITER, f"{workdirs.WRITER}.{two._number}"]


def test_what_was_not_copied_is_kept_when_another_machine_went_on(bucket, weather, tmp_path, caplog):
    with workdirs.opened(bucket) as folder:
        (folder / "note").write_text("mine")
        workdirs.copy_now()  # as a process does that ends at once
        assert client.read(f"{bucket}/note") == b"mine"
    (folder / "note").write_text("not copied")
    client.write(f"{bucket}/{workdirs.WRITER}", json.dumps(record_of(bucket) | {"id": "another"}).encode())
    with workdirs.opened(bucket):
        assert (folder / "note").read_text() == "mine"
    (aside,) = folder.parent.glob(f"{folder.name}.*")
    assert (aside / "note").read_text() == "not copied" and str(aside) in caplog.text
    with workdirs.opened(bucket):
        (folder / "note").unlink()
    assert all(name.startswith(workdirs.WRITER) for name in client.listing(bucket))


def test_rare_copies_of_frequent_checkpoints(weather, tmp_path):
    """Two are kept here, every fourth step is copied; the bucket always holds one to go on from."""
    url = f"s3://{bucket_servers.BUCKET}/rare"

    def steps():
        return sorted({name.split("/")[1] for name in client.listing(url) if copies.STEP.match(name)}, key=int)

    def save(folder, step):
        own = folder / "checkpoints" / str(step)
        own.mkdir(parents=True)
        (own / "array").write_text(f"of step {step}")
        (own / copies.COMMIT_MARKER).write_text("committed")
        if (old := folder / "checkpoints" / str(step - 4)).exists():
            shutil.rmtree(old)

    with workdirs.opened(url, 4) as folder:
        (workdir,) = workdirs._opened
        found = {}
        for step in range(2, 16, 2):
            save(folder, step)
            workdir.push()
            found[step] = steps()
        assert found == {2: [], 4: ["4"], 6: ["4"], 8: ["8"], 10: ["8"], 12: ["12"], 14: ["12"]}
    assert steps() == ["12", "14"], "the last one too"
    shutil.rmtree(folder)
    with workdirs.opened(url, 4) as folder:  # another machine
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "14"]
        shutil.rmtree(folder / "checkpoints" / "14")  # set aside: it led to a loss that is not finite
    assert steps() == ["12"]
