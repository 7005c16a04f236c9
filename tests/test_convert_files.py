"""Reading and writing checkpoint files: equal to the safetensors and torch libraries, and safe on broken
input."""

import json
import os
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from file_checks import assert_same, one_line

from lcx.convert.files import safetensors as own
from lcx.convert.files import torch_bin, torch_writer
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_bin import TorchFile
from lcx.errors import UserError


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(5, 7)).astype(np.float32),
        "b": rng.normal(size=(3, 2, 4)).astype(ml_dtypes.bfloat16),
        "c": rng.normal(size=11).astype(np.float16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "odd": np.arange(3, dtype=np.int8),
    }


# ------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = own.SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(arrays())
    for name, array in arrays().items():
        assert_same(file.read(name), array)
        if array.ndim and len(array) > 2:
            assert_same(file.read(name, 1, 3), array[1:3])


def test_safetensors_writes_what_the_library_reads(tmp_path):
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays().items()}

    def pieces(name):
        array = arrays()[name]
        return [array[:2], array[2:]] if array.ndim else [array]

    own.write_file(tmp_path / "x.safetensors", infos, pieces)
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(infos)
    for name, array in arrays().items():
        assert_same(loaded[name], array)
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    expected = 0o666 & ~current_umask()
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == expected


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def raw_file(path: pathlib.Path, header, data: bytes = b"\0" * 8) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "not json": (b"{nope", "not valid"),
    "not utf-8": (b'{"\xff": 1}', "not valid"),
    "a list": ([1], "expected a JSON object"),
    "deep": (b"[" * 100_000, "not valid"),
    "duplicate key": (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), "occurs twice"),
    "unknown dtype": ({"a": F32 | {"dtype": "F33"}}, "dtype 'F33'"),
    "dtype of another kind": ({"a": F32 | {"dtype": [1]}}, "dtype"),
    "negative shape": ({"a": F32 | {"shape": [-2]}}, "shape [-2]"),
    "float shape": ({"a": F32 | {"shape": [2.0]}}, "shape [2.0]"),
    "true as a size": ({"a": F32 | {"shape": [True, 2]}}, "shape"),
    "huge shape": ({"a": F32 | {"shape": [2**70]}}, "shape"),
    "overflowing shape": ({"a": F32 | {"shape": [2**33, 2**33]}}, "takes"),
    "too many axes": ({"a": F32 | {"shape": [1] * 70}}, "shape"),
    "wrong size": ({"a": F32 | {"shape": [3]}}, "takes 12 bytes"),
    "beyond the file": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "truncated"),
    "backwards": ({"a": F32 | {"data_offsets": [8, 0]}}, "lies at bytes 8 to 0"),
    "negative offset": ({"a": F32 | {"data_offsets": [-8, 0]}}, "data_offsets"),
    "overlap": ({"a": F32, "b": F32}, "overlaps"),
    "hole": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "hole"),
    "trailing bytes": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "belong to none"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "expected dtype, shape and data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": F32}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_refuses(tmp_path, case):
    header, message = BAD_HEADERS[case]
    with pytest.raises(UserError) as error:
        own.SafetensorsFile(raw_file(tmp_path / "x.safetensors", header))
    assert message in one_line(error) and "x.safetensors" in str(error.value)


def test_safetensors_refuses_truncation_at_every_place(tmp_path):
    whole = raw_file(tmp_path / "whole", {"a": F32}).read_bytes()
    for length in (0, 3, 8, 20, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            own.SafetensorsFile(tmp_path / "cut")
        assert "copy or download it again" in one_line(error)


def test_safetensors_refuses_a_header_longer_than_the_format_allows(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no space
    with pytest.raises(UserError, match="header claims 200000000 bytes"):
        own.SafetensorsFile(path)


def test_file_cut_after_it_was_opened(tmp_path):
    file = own.SafetensorsFile(raw_file(tmp_path / "x.safetensors", {"a": F32}))
    os.truncate(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size - 1)
    with pytest.raises(UserError, match="changed the file while it was read"):
        file.read("a")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_with_the_other(tmp_path, kind):
    """Two conversions of which each wrote to the source of the other read the header of one and the data of both."""
    old, new = tmp_path / f"old.{kind}", tmp_path / f"new.{kind}"
    for path, value in ((old, 1.0), (new, 2.0)):
        if kind == "safetensors":
            safetensors.numpy.save_file({name: np.full((3, 4), value) for name in ("a", "b")}, path)
        else:
            torch.save({name: torch.full((3, 4), value) for name in ("a", "b")}, path)
    file = own.SafetensorsFile(old) if kind == "safetensors" else torch_bin.TorchFile(old)
    assert file.read("a").max() == 1.0
    os.replace(new, old)
    with pytest.raises(UserError, match="another process changed the file while it was read: run the command again"):
        file.read("b")


# ------------------------------------------------------------------------------------------------ torch


def states() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10, 12, generator=generator)
    return {
        "plain": base,
        "shared": base,
        "slice": base[2:7, 3:9],
        "transposed": torch.randn(6, 4, generator=generator).T,
        "bf16": torch.randn(4, 6, generator=generator).bfloat16(),
        "half": torch.randn(5, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3, 2, generator=generator)),
    }


def test_torch_refuses_a_zip_of_a_version_that_is_not_there(tmp_path):
    torch.save(states(), tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    entry = data.index(b"PK\x01\x02")  # the first of the directory; the version that it needs is 6 bytes on
    data[entry + 6 : entry + 8] = struct.pack("<H", 99)
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(UserError, match="not a readable PyTorch file: zip file version 9.9") as error:
        TorchFile(tmp_path / "x.bin")
    assert one_line(error)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("with_places", [True, False])
def test_torch_file_equals_torch_load(tmp_path, zipped, wrapped, with_places, monkeypatch):
    """Without places (older versions of torch do not give them) the file is read whole."""
    if not with_places:
        monkeypatch.setattr(torch_bin, "_has_place", lambda tensor: False)
    state = states()
    torch.save(
        {"state_dict": state} if wrapped else state, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped
    )
    file = TorchFile(tmp_path / "x.bin")
    assert set(file.tensors) == set(state)
    for name, tensor in state.items():
        expected = tensor.detach().float().numpy()
        assert file.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(file.read(name).astype(np.float32), expected)
        if tensor.ndim and len(tensor) > 2:
            np.testing.assert_array_equal(file.read(name, 1, 3).astype(np.float32), expected[1:3])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_not_executed(tmp_path, zipped):
    target = tmp_path / "executed"
    torch.save({"a": Payload(target)}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        TorchFile(tmp_path / "x.bin")
    assert "nothing in it was executed" in one_line(error) and "open" in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "bomb, message",
    [
        (lambda: torch.zeros(1).expand(10**6, 10**6), "claims shape (1000000, 1000000)"),
        (lambda: torch.zeros(4).as_strided((3, 3), (0, 1)), "claims shape (3, 3)"),
        (lambda: torch.zeros(4, 4).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "lazy view"),
        (lambda: [torch.zeros(1)], "list"),
    ],
)
def test_torch_file_refuses_tensors_that_are_not_dense(tmp_path, bomb, message, zipped):
    torch.save({"w": bomb()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        TorchFile(tmp_path / "x.bin")
    assert message in one_line(error) and "'w'" in str(error.value)


def rezip(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    compression=zipfile.ZIP_STORED,
    edit=lambda name, data: data,
):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, edit(member.filename, old.read(member)))


def test_torch_file_refuses_deflated_members(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.bin")
    rezip(tmp_path / "plain.bin", tmp_path / "x.bin", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        TorchFile(tmp_path / "x.bin")


def test_torch_file_refuses_a_storage_shorter_than_claimed(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.bin")
    rezip(
        tmp_path / "plain.bin",
        tmp_path / "x.bin",
        edit=lambda name, data: data[:100] if name.endswith("data/0") else data,
    )
    with pytest.raises(UserError) as error:
        TorchFile(tmp_path / "x.bin")
    assert "needs 4000 bytes but the file stores 100" in one_line(error)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip"])
def test_torch_file_refuses_garbage(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        TorchFile(tmp_path / "x.bin")
    assert "x.bin" in one_line(error)


def test_torch_file_refuses_truncation(tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "x.bin")
    os.truncate(tmp_path / "x.bin", 3000)
    with pytest.raises(UserError) as error:
        TorchFile(tmp_path / "x.bin")
    assert "copy or download it again" in one_line(error)


@pytest.mark.parametrize("state", [torch.zeros(2), {1: torch.zeros(2)}, [torch.zeros(2)]])
def test_torch_file_wants_a_dict_of_names(tmp_path, state):
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(UserError, match="expected a dict of named tensors"):
        TorchFile(tmp_path / "x.bin")


def test_a_torch_file_is_made_of_holes(tmp_path):
    """No byte is in memory or on disk before it is written, in any order, and torch reads what was written."""
    infos = {"a": TensorInfo(np.dtype(np.float32), (3, 4)), "b": TensorInfo(np.dtype(np.float32), (1 << 28,))}
    writer = torch_writer.TorchWriter(tmp_path / "x.pt", infos, under="module", beside={"n": 3})
    assert (tmp_path / "x.pt").stat().st_size > 1 << 30
    assert (tmp_path / "x.pt").stat().st_blocks * 512 < 1 << 20
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.write("a", 1, rows[1:])
    with pytest.raises(UserError, match="bytes were never written"):
        writer.finish()
    writer.write("a", 0, rows[:1])
    writer.close()
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert loaded["n"] == 3
    np.testing.assert_array_equal(loaded["module"]["a"].numpy(), rows)
