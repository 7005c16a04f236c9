"""Names on the Hugging Face hub, from a made cache: nothing here needs a network."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import hub_server
import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy

import lcx
from lcx import hub
from lcx import model as model_lib
from lcx.convert.__main__ import main
from lcx.errors import UserError

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = importlib.import_module("huggingface_hub.constants")
ROOT = pathlib.Path(__file__).parent.parent
REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: pathlib.Path, repo: str, files: dict[str, bytes], kind: str = "models", ref: str = "main"):
    """A snapshot as huggingface_hub keeps it: links into blobs, and the branch that names the revision."""
    root = cache / f"{kind}--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / REVISION
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(REVISION)
    for i, (name, data) in enumerate(files.items()):
        (root / "blobs" / f"{ref}{i}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{ref}{i}")
    return snapshot


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    model = model_lib.llama(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        max_position_embeddings=16,
    )
    folder = tmp_path_factory.mktemp("hub") / "model"
    lcx.save(folder, model, model_lib.init_params(model, jax.random.key(0)), format="hf")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    hub._folder.cache_clear()
    return tmp_path / "cache"


def test_a_model_by_its_name(cache, model_files, caplog):
    snapshot = cached(cache, "org/tiny-1.5B", model_files)
    model, params = lcx.load("org/tiny-1.5B")
    expected = lcx.load(snapshot)
    assert model == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    assert caplog.text.count(f"org/tiny-1.5B is read from {snapshot}") == 1
    cached(cache, "org/tiny-1.5B", {}, ref="v2")
    assert hub.local("org/tiny-1.5B@v2") == str(snapshot) == hub.local(f"org/tiny-1.5B@{REVISION}")
    with pytest.raises(UserError, match="local cache of the Hugging Face hub does not contain all of it"):
        hub.local("org/tiny-1.5B@v3")


def test_a_path_that_exists_wins(cache, model_files, tmp_path):
    cached(cache, "org/name", model_files)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.local("org/name") == "org/name"
    with pytest.raises(UserError, match="no checkpoint at org/name"):
        lcx.load("org/name")


@pytest.mark.parametrize(
    "path",
    ["bytes", "stdlib", "/runs/yarn", "./runs/yarn", "../runs", "runs/a/b", "runs/evo2.pt", "books/*.txt",
     "books/a.jsonl.gz", "a/b--c", "a/..", "a/", "a b/c", "a/b\n", 3, None, ("a/b",), b"a/b"],
)  # fmt: skip
def test_what_is_no_name_stays_as_it_is(cache, path):
    assert not hub.is_name(path) and hub.local(path) is path


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert hub.local("~/runs") == "/home/me/runs"


def test_an_empty_path_is_refused(cache):
    with pytest.raises(UserError, match="the path of the checkpoint is empty, expected a folder, a file or a name"):
        hub.local(" ")


def test_neither_here_nor_there_is_one_line(cache):
    for name in ("runs/yarn", pathlib.Path("runs/yarn")):
        with pytest.raises(
            UserError, match="runs/yarn: there is no such file or folder here, .* HF_HUB_OFFLINE"
        ):
            lcx.load(name)
    with pytest.raises(UserError, match="runs/yarn: there is no such .* HF_HUB_OFFLINE is set") as error:
        hub.local("runs/yarn", kind="dataset")
    assert "\n" not in str(error.value)


def test_a_snapshot_that_is_not_whole_is_not_used(cache, model_files):
    index = (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    files = {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": b"",
        "model.safetensors.index.json": index,
    }
    cached(cache, "org/half", files)
    cached(cache, "org/only-tokenizer", {"tokenizer.json": b"{}"})
    for name in ("org/half", "org/only-tokenizer"):
        with pytest.raises(UserError, match="local cache of the Hugging Face hub does not contain all of it"):
            hub.local(name)
    assert hub.local("org/only-tokenizer", kind="tokenizer").endswith(REVISION)
    with pytest.raises(UserError, match="local cache of the Hugging Face hub does not contain all of it"):
        hub.local("org/only-tokenizer", kind="adapter")


def test_data_and_tokenizers_by_their_name(cache):
    from lcx.data import ByteTokenizer, Dataset, load_tokenizer

    cached(cache, "org/text", {"a.txt": b"one", "b.txt": b"two"}, kind="datasets")
    cached(
        cache,
        "org/bytes",
        {"lcx_tokenizer.json": b'{"kind": "bytes", "bos_id": 256, "eos_id": 257, "vocab_size": 258}'},
    )
    assert load_tokenizer("org/bytes") == ByteTokenizer()
    folder = hub.local("org/text", kind="dataset")
    assert sorted(os.listdir(folder)) == ["a.txt", "b.txt"]
    with pytest.raises(UserError, match="org/nothing: there is no such"):
        Dataset(source="org/nothing", tokenizer="bytes").open()


def fake(monkeypatch, *, files=(), error=None):
    """A hub with these files, or with this error."""
    asked = []

    def download(*, local_files_only=False, **keys):
        if local_files_only:
            raise FileNotFoundError
        asked.append(keys)
        return "/folder"

    def repo_info(*args, **keys):
        if error is not None:
            raise error
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in files])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: types.SimpleNamespace(repo_info=repo_info))
    return asked


@pytest.mark.parametrize(
    "files, wanted, unwanted",
    [
        (
            [
                "config.json",
                "model-1.safetensors",
                "consolidated.safetensors",
                "pytorch_model.bin",
                "a.gguf",
                "tf_model.h5",
            ],
            "model-1.safetensors",
            "pytorch_model.bin",
        ),
        (
            ["config.json", "pytorch_model-1.bin", "training_args.bin", "model.onnx"],
            "pytorch_model-1.bin",
            "training_args.bin",
        ),
        (["evo2_7b.pt.part0", "evo2_7b.pt.part1", "README.md"], "evo2_7b.pt.part0", "README.md"),
    ],
)
def test_only_what_is_needed_is_downloaded(cache, monkeypatch, files, wanted, unwanted):
    from huggingface_hub.utils import filter_repo_objects

    asked = fake(monkeypatch, files=files)
    assert hub.local("org/name@v1") == "/folder"
    chosen = list(filter_repo_objects(files, allow_patterns=asked[0]["allow_patterns"]))
    assert asked[0]["revision"] == "v1" and wanted in chosen and unwanted not in chosen
    assert not {"a.gguf", "tf_model.h5", "model.onnx", "consolidated.safetensors"} & set(chosen)


@pytest.mark.parametrize(
    "name, message",
    [
        ("GatedRepoError", "org/name is gated: accept its terms on https://huggingface.co/org/name"),
        ("RepositoryNotFoundError", "org/name: there is no such file or folder here, and no model of this name on the"),
        ("RevisionNotFoundError", "org/name on the Hugging Face hub has no revision 'v9'"),
        ("ConnectError", "org/name: there is no such file or folder here, the local cache of the Hugging Face hub does "
         "not contain all of it"),
        ("Weird", "org/name cannot be downloaded from the Hugging Face hub: first line"),
    ],
)  # fmt: skip
def test_every_failure_is_one_line(cache, monkeypatch, name, message):
    fake(monkeypatch, error=type(name, (Exception,), {})("first line\nsecond line"))
    with pytest.raises(UserError, match=message) as error:
        hub.local("org/name@v9")
    assert "\n" not in str(error.value)


def test_a_model_without_weights_that_are_read(cache, monkeypatch):
    fake(monkeypatch, files=["a.gguf"])
    with pytest.raises(UserError, match="no weights that are read here .* found a.gguf"):
        hub.local("org/name")


@pytest.fixture
def served(cache, model_files, monkeypatch):
    """A hub on 127.0.0.1, asked by the real client; the model has its tensors in two files."""
    tensors = safetensors_numpy.load(model_files["model.safetensors"])
    names = sorted(tensors)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}, "metadata": {}}
    files = {
        "config.json": model_files["config.json"],
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: safetensors_numpy.save({n: tensors[n] for n in half}) for file, half in halves.items()},
        "README.md": b"not read",
    }
    texts = {"a.txt": b"one", "b.txt": b"two" * 1000, "README.md": b"not read"}
    hub_of = {f"models/org/{name}": files for name in ("model", "gated")} | {"datasets/org/texts": texts}
    with hub_server.running(hub_server.Hub(hub_of, gated=frozenset(["org/gated"]))) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
        yield server


def test_a_model_from_a_hub(served, model_files, tmp_path):
    (tmp_path / "expected").mkdir()
    for name, data in model_files.items():
        (tmp_path / "expected" / name).write_bytes(data)
    model, params = lcx.load("org/model")
    expected = lcx.load(tmp_path / "expected")
    assert model == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    assert not any("README" in path for path in served.asked)
    served.asked.clear()
    hub._folder.cache_clear()
    assert hub.local("org/model").endswith(hub_server.COMMIT) and not served.asked  # from the cache
    for name, says in (
        ("org/nothing", "no model of this name on the Hugging Face hub"),
        ("org/gated", "org/gated is gated: accept its terms"),
        ("org/model@v9", "has no revision 'v9'"),
    ):
        with pytest.raises(UserError, match=says) as error:
            hub.local(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [("org/model", "model", "model-00002-of-00002.safetensors"), ("org/texts", "dataset", "b.txt")],
)
def test_nothing_that_is_half_there_is_read(served, monkeypatch, name, kind, file):
    served.breaks[file] = 1
    assert file in os.listdir(hub.local(name, kind=kind))  # one broken connection is resumed
    assert sum(path.startswith("GET") and path.endswith(file) for path in served.asked) == 2
    shutil.rmtree(constants.HF_HUB_CACHE)
    served.breaks[file] = 1000
    hub._folder.cache_clear()
    with pytest.raises(UserError, match=f"{name} cannot be downloaded from the Hugging Face hub: ") as error:
        hub.local(name, kind=kind)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="does not contain all of it, and HF_HUB_OFFLINE is set"):
        hub.local(name, kind=kind)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.breaks.clear()
    folder = hub.local(name, kind=kind)
    assert file in os.listdir(folder)


def test_without_the_package_the_message_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"org/name: there is no such .*pip install 'lcx\[hub\]'"):
        lcx.load("org/name")


def test_the_command(cache, tmp_path, model_files, capsys):
    cached(cache, "org/tiny", model_files)
    assert main(["--src=org/tiny", f"--dst={tmp_path}/out", "--dst_format=hf"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    capsys.readouterr()
    assert main(["--src=org/tinny", f"--dst={tmp_path}/out2", "--dst_format=hf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: org/tinny: there is no such") and error.count("\n") == 1


def test_the_environment_is_respected(tmp_path):
    """HF_HUB_CACHE and HF_HUB_OFFLINE are read by huggingface_hub when it is imported."""
    snapshot = cached(tmp_path / "cache", "org/tiny", {"model.safetensors": b""})
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    code = "from lcx import hub; print(hub.local('org/tiny')); hub.local('org/tinny')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert result.stdout.strip() == str(snapshot)
    assert "HF_HUB_OFFLINE is set" in result.stderr.splitlines()[-1]
