"""The one writer of a workdir in a bucket: killed elsewhere, slow, or stopped while it copies."""

import functools
import json
import os
import shutil
import time
import types

import pytest
import test_buckets
from test_buckets import one_scheme, record_of

from lcx.buckets import client, copies, workdirs
from lcx.errors import UserError

servers, weather, bucket = test_buckets.servers, test_buckets.weather, test_buckets.bucket  # fixtures


@one_scheme(["s3"])
@pytest.mark.parametrize("end", ["killed", "renews", "ends", "in a container"])
def test_one_after_a_writer_on_another_machine(bucket, weather, end, tmp_path, monkeypatch):
    """It may have been killed, as when a node fails and the job is put on another one: its silence tells."""
    with workdirs.opened(bucket) as folder:
        (folder / "note").write_text("mine")
    ahead = time.time() + 3600  # its clock
    record = record_of(bucket) | {"held": True, "host": "another", "process": os.getpid(), "time": ahead}
    if end != "in a container":  # whose processes all have the number 1; this one sees the folder of the other
        monkeypatch.setenv("LCX_CACHE", str(tmp_path / "another-machine"))
    client.write(f"{bucket}/{workdirs.WRITER}", json.dumps(record).encode())
    monkeypatch.setattr(workdirs, "_STALE_S", 0.2)
    looks = []

    def look(seconds):
        looks.append(seconds)
        changed = {"renews": {"time": ahead + 60}, "ends": {"held": False}}.get(end, {})
        client.write(f"{bucket}/{workdirs.WRITER}", json.dumps(record | changed).encode())

    clock = types.SimpleNamespace(monotonic=time.monotonic, time=time.time, time_ns=time.time_ns, sleep=look)
    monkeypatch.setattr(workdirs, "time", clock)
    if end == "renews":
        with pytest.raises(UserError, match="is being written by another process"), workdirs.opened(bucket):
            pass
    else:
        with workdirs.opened(bucket) as folder:
            assert (folder / "note").read_text() == "mine"
    assert looks


@one_scheme(["s3"])
def test_a_writer_renews_while_it_copies(bucket, weather, tmp_path, monkeypatch):
    """Both ways: another machine takes the bucket over from one that has not renewed for minutes."""
    monkeypatch.setattr(workdirs, "_RENEW_S", 0.01)
    download, upload, slow = client.download, client.upload, []

    def slowly(copy, url, names):
        before, end = record_of(bucket)["time"], time.monotonic() + 20
        while record_of(bucket)["time"] == before and time.monotonic() < end:
            time.sleep(0.01)
        slow.append(record_of(bucket)["time"] > before)
        copy(url, names)

    monkeypatch.setattr(client, "download", functools.partial(slowly, download))
    monkeypatch.setattr(client, "upload", functools.partial(slowly, upload))
    with workdirs.opened(bucket) as folder:
        (folder / "note").write_text("mine")
    assert all(slow) and len(slow) >= 2
    assert not record_of(bucket)["held"]


@one_scheme(["s3"])
def test_a_renewal_that_failed_is_not_another_writer(bucket, weather, monkeypatch):
    workdir = workdirs._Workdir(bucket)
    workdir.claim()
    workdir.fetch()
    monkeypatch.setenv("LCX_BUCKET_PATIENCE", "0.1")
    weather.fails = lambda number, method: True
    with pytest.raises(UserError):
        workdir._renew()
    weather.fails = lambda number, method: False
    (workdir.folder / "note").write_text("mine")
    workdir.push()
    assert client.read(f"{bucket}/note") == b"mine"


@one_scheme(["s3"])
def test_a_folder_that_is_removed_empties_no_bucket(bucket, weather, monkeypatch):
    with pytest.raises(UserError, match="was removed"), workdirs.opened(bucket) as folder:
        (folder / "note").write_text("mine")
        workdirs._opened[0].push()
        shutil.rmtree(folder)
    assert client.read(f"{bucket}/note") == b"mine"


@one_scheme(["s3"])
@pytest.mark.parametrize("reason", [UserError("the disk is full"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_start_that_cannot_copy_leaves_the_bucket_as_it_was(bucket, weather, reason, tmp_path, monkeypatch):
    """The next start, here or elsewhere, finds all of it; what has arrived here does not pass for all there is."""
    with workdirs.opened(bucket) as folder:
        for name in ("metrics.jsonl", "checkpoints/4/a", f"checkpoints/4/{copies.COMMIT_MARKER}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    before = {name for name in client.listing(bucket) if not name.startswith(workdirs.WRITER)}
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "another-machine"))
    download = client.download

    def one_of_them(url, wanted):
        download(url, wanted[:1])
        raise reason

    monkeypatch.setattr(client, "download", one_of_them)
    with pytest.raises(type(reason)), workdirs.opened(bucket):
        pass
    assert {name for name in client.listing(bucket) if not name.startswith(workdirs.WRITER)} == before
    monkeypatch.setattr(client, "download", download)
    with workdirs.opened(bucket) as folder:
        assert {name for name in before if (folder / name).exists()} == before
