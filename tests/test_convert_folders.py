"""Hugging Face folders and destinations: what is read, what is refused, and that nothing is ever lost."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from file_checks import assert_same, one_line

from lcx.convert.files import destination, tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import folder as hf_folder
from lcx.errors import UserError


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------------------ folders


def make_folder(
    folder: pathlib.Path, *, max_shard_bytes: int = 200, kind: str = "safetensors"
) -> dict[str, np.ndarray]:
    """A sharded folder of eight tensors of 64 bytes, and what it holds."""
    rng = np.random.default_rng(1)
    tensors = {f"w{i}": rng.normal(size=(4, 4)).astype(np.float32) for i in range(8)}
    folder.mkdir()
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}
    hf_folder.write(
        folder, infos, lambda name: [tensors[name]], config={"x": 1}, max_shard_bytes=max_shard_bytes
    )
    return tensors


def edit_index(folder: pathlib.Path, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_folder_round_trip_in_shards(tmp_path):
    tensors = make_folder(tmp_path / "m")
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names == sorted(["config.json", *shards, "model.safetensors.index.json"])
    source = hf_folder.HfFolder(tmp_path / "m")
    assert source.config == {"x": 1}
    assert list(source.tensors) == list(tensors)
    for name, array in tensors.items():
        assert_same(source.read(name), array)
        assert_same(source.read(name, 1, 2), array[1:2])


def test_folder_of_torch_shards(tmp_path):
    tensors = {f"w{i}": torch.randn(3, 2) for i in range(3)}
    for i, (name, tensor) in enumerate(tensors.items()):
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(tensors)}
    index = {"metadata": {"total_size": 72}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    source = hf_folder.HfFolder(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("total, fits", [(3 * 24, True), (2 * 24, True), (24, False)])
def test_tied_tensors_may_be_counted_once_or_twice(tmp_path, caplog, total, fits, zipped):
    tensor = torch.randn(3, 2)
    state = {"embed": tensor, "head": tensor, "other": torch.randn(3, 2)}
    torch.save(state, tmp_path / "pytorch_model-1.bin", _use_new_zipfile_serialization=zipped)
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(state, "pytorch_model-1.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    assert hf_folder.HfFolder(tmp_path).shared_bytes == 24
    assert ("total_size is 24 bytes but the files hold 72" in caplog.text) is not fits


@pytest.mark.parametrize("total", [513, 10**400, 512.5, "512", [], {}, True, float("nan")])
def test_a_wrong_total_size_is_a_warning(tmp_path, caplog, total):
    tensors = make_folder(tmp_path / "m")
    edit_index(tmp_path / "m", lambda index: index["metadata"].update(total_size=total))
    assert list(hf_folder.HfFolder(tmp_path / "m").tensors) == list(tensors)
    assert "but the files hold 512; it is not used" in caplog.text and len(caplog.text.splitlines()) == 1


def test_single_file_goes_before_an_index(tmp_path):
    make_folder(tmp_path / "m")
    safetensors.numpy.save_file({"only": np.zeros(2, np.float32)}, tmp_path / "m" / "model.safetensors")
    assert list(hf_folder.HfFolder(tmp_path / "m").tensors) == ["only"]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None]
)
def test_index_must_name_plain_files(tmp_path, name):
    make_folder(tmp_path / "m")
    edit_index(tmp_path / "m", lambda index: index["weight_map"].update(w0=name))
    with pytest.raises(UserError) as error:
        hf_folder.HfFolder(tmp_path / "m")
    assert "plain file name" in one_line(error)


def test_links_may_not_leave_the_folder(tmp_path):
    make_folder(tmp_path / "m")
    shard = tmp_path / "m" / "model-00001-of-00003.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="link that leads out of the folder"):
        hf_folder.HfFolder(tmp_path / "m")
    shard.unlink()
    (tmp_path / "outside.safetensors").rename(tmp_path / "m" / "real.safetensors")
    shard.symlink_to("real.safetensors")
    assert len(hf_folder.HfFolder(tmp_path / "m").tensors) == 8


def test_links_of_the_download_cache_are_followed(tmp_path):
    """snapshots/REVISION/name -> ../../blobs/HASH is how Hugging Face's cache keeps every file."""
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    tensors = make_folder(snapshot)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert list(hf_folder.HfFolder(snapshot).tensors) == list(tensors)


def _missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def _wrong_shard(folder):
    edit_index(folder, lambda index: index["weight_map"].update(w0="model-00003-of-00003.safetensors"))


def _unknown_key(folder):
    edit_index(folder, lambda index: index["weight_map"].update(w99="model-00003-of-00003.safetensors"))


def _twice(folder):
    safetensors.numpy.save_file(
        {f"w{i}": np.zeros((4, 4), np.float32) for i in (0, 6, 7)},
        folder / "model-00003-of-00003.safetensors",
    )
    edit_index(folder, lambda index: index["metadata"].update(total_size=64 * 9))


def _no_map(folder):
    edit_index(folder, lambda index: index.pop("weight_map"))


def _no_config(folder):
    (folder / "config.json").unlink()


def _bad_config(folder):
    (folder / "config.json").write_text('{"a": 1, "a": 2}')


def _no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_missing_shard, "model-00002-of-00003.safetensors is missing"),
        (
            _wrong_shard,
            "the tensor 'w0' should be in model-00003-of-00003.safetensors, which does not hold it",
        ),
        (_unknown_key, "the tensor 'w99' should be in"),
        (
            _twice,
            "the tensor 'w0' is in model-00001-of-00003.safetensors and in model-00003-of-00003.safetensors",
        ),
        (_no_map, "expected a weight_map"),
        (_no_config, "config.json is missing"),
        (_bad_config, "the key 'a' occurs twice"),
        (_no_weights, "no weights, expected one of model.safetensors"),
    ],
)
def test_folder_refuses(tmp_path, damage, message):
    make_folder(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError) as error:
        hf_folder.HfFolder(tmp_path / "m")
    assert message in one_line(error)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="expected a folder with config.json"):
        hf_folder.HfFolder(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------
# destinations


def replacing(path, *, overwrite=False, needed_bytes=0, replaceable=lambda path: True):
    return destination.replacing(
        path, overwrite=overwrite, needed_bytes=needed_bytes, replaceable=replaceable
    )


def listing(folder: pathlib.Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_destination_appears_whole(tmp_path):
    with replacing(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert listing(tmp_path) == {"a/b/x": "new"}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~current_umask()


def test_destination_is_kept_unless_told(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    with pytest.raises(UserError, match="pass --overwrite"), replacing(tmp_path / "b"):
        pass
    refused = replacing(tmp_path / "b", overwrite=True, replaceable=lambda path: False)
    with pytest.raises(UserError, match="not a checkpoint folder"), refused:
        pass
    assert listing(tmp_path) == {"b/x": "old"}
    with replacing(tmp_path / "b", overwrite=True) as folder:
        (folder / "y").write_text("new")
        assert listing(tmp_path / "b") == {"x": "old"}
    assert listing(tmp_path) == {"b/y": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), UserError("x")])
def test_failure_leaves_everything_as_it_was(tmp_path, error):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    for path in (tmp_path / "b", tmp_path / "c" / "d"):
        with pytest.raises((UserError, KeyboardInterrupt)), replacing(path, overwrite=True) as folder:
            (folder / "y").write_text("new")
            raise error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "x"]


def test_kill_between_the_renames_is_recovered(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    code = (
        "import os, sys\nfrom lcx.convert import destination\n"
        "rename, calls = os.rename, []\n"
        "def patched(*a):\n    calls.append(a)\n    if len(calls) == 2: os._exit(9)\n    rename(*a)\n"
        "os.rename = patched\n"
        "with destination.replacing(sys.argv[1], overwrite=True, needed_bytes=0, replaceable=lambda p: True) "
        "as f:\n"
        "    (f / 'y').write_text('new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")]).returncode == 9
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="already exists"), replacing(tmp_path / "b"):
        pass
    assert listing(tmp_path) == {"b/x": "old"}


def test_destination_without_space_is_refused_before_anything_is_written(tmp_path):
    refused = replacing(tmp_path / "b", needed_bytes=10**18)
    with pytest.raises(UserError, match="needs 1,000,000,000,000,000,000 bytes"), refused:
        raise AssertionError("the block ran")
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up(tmp_path):
    """A limit on file sizes fails in the same place and way as a full disk: write() returns an error."""
    code = (
        "import resource, sys, signal, numpy as np\nfrom lcx.convert import destination, hf_folder\n"
        "from lcx.convert.files.tensor_io import TensorInfo\nfrom lcx.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "info = {'w': TensorInfo(np.dtype('f4'), (100, 1000))}\n"
        "try:\n"
        "    with destination.replacing(sys.argv[1], overwrite=False, needed_bytes=0, replaceable=bool) as "
        "folder:\n"
        "        hf_folder.write(folder, info, lambda n: [np.zeros((100, 1000), 'f4')], config={})\n"
        "except UserError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True)
    assert "cannot be written: File too large" in out.stdout and out.stdout.count("\n") == 1, out
    assert not list(tmp_path.iterdir())


def test_source_is_never_the_destination(tmp_path):
    (tmp_path / "src" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "src")
    for src, dst in (
        ("src", "src"),
        ("src", "link"),
        ("src/inner", "src"),
        ("src/inner/../inner", "src/inner"),
    ):
        with pytest.raises(UserError, match="--dst"):
            destination.refuse_same(tmp_path / src, tmp_path / dst)
    destination.refuse_same(tmp_path / "src", tmp_path / "src" / "hf")
    destination.refuse_same(tmp_path / "src", tmp_path / "other")


def test_row_splits_cover_exactly():
    for shape, limit in (((10, 3), 25), ((1, 1000), 10), ((7,), 4), ((0, 3), 10), ((), 4)):
        ranges = list(tensor_io.split_rows(shape, 4, limit))
        assert [i for start, stop in ranges for i in range(start, stop)] == list(
            range(shape[0] if shape else 1)
        )
