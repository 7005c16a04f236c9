"""`python -m lcx.convert` as a stranger uses it: round trips, one line for each kind of bad input, bounded
memory."""

import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from own_output import own_lines

import lcx
from lcx import model as model_lib
from lcx.checkpoint import Checkpointer, model_json
from lcx.convert.__main__ import main
from lcx.convert.files import tensor_io
from lcx.convert.hf.source import HfSource
from lcx.convert.progress import Progress
from lcx.convert.workdir.source import LcxSource
from lcx.data import ByteTokenizer, load_tokenizer

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> pathlib.Path:
    """A tiny Llama as transformers writes it, with generation settings."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=3,
        eos_token_id=[4, 5],
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model_folder, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    shutil.copytree(model_folder, tmp_path / "hf")
    return tmp_path / "hf"


def convert(src, dst, dst_format, *more) -> int:
    return main([f"--src={src}", f"--dst={dst}", f"--dst_format={dst_format}", *more])


def weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def assert_same_weights(folder: pathlib.Path, other: pathlib.Path) -> None:
    expected, found = weights(folder), weights(other)
    assert set(expected) == set(found)
    assert all(found[key].dtype == x.dtype and torch.equal(found[key], x) for key, x in expected.items())


def test_there_and_back(folder, tmp_path, capsys, caplog):
    assert convert(folder, tmp_path / "run", "lcx") == 0
    out = capsys.readouterr()
    assert "lcx), read back and checked: 12 tensors, " in out.out and ", bfloat16" in out.out
    assert "(100%" in out.err
    assert convert(tmp_path / "run", tmp_path / "new" / "back", "hf", "--max_shard_bytes=3000") == 0
    assert "21 tensors" in capsys.readouterr().out
    assert_same_weights(folder, tmp_path / "new" / "back")
    back = tmp_path / "new" / "back"
    assert (back / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    config = json.loads((back / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (3, [4, 5], "bfloat16")
    assert not caplog.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "new", "run"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]


def test_same_format_with_another_dtype_and_a_longer_context(folder, tmp_path):
    scaling = '--rope_scaling={"rope_type": "yarn", "factor": 4.0}'
    assert convert(folder, tmp_path / "out", "hf", "--dtype=float32", scaling, "--context_length=256") == 0
    for key, tensor in weights(tmp_path / "out").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights(folder)[key].float())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["original_max_position_embeddings"] == 64
    assert convert(folder, tmp_path / "run", "lcx", scaling) == 0
    assert LcxSource(tmp_path / "run").model.max_position_embeddings == 256


def test_from_torch_files(folder, tmp_path):
    state = weights(folder)
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    total = sum(x.numel() * x.element_size() for x in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copytree(folder, tmp_path / "original")
    (folder / "model.safetensors").unlink()
    assert convert(folder, tmp_path / "out", "hf") == 0
    assert_same_weights(tmp_path / "original", tmp_path / "out")


def test_overwrite_replaces_at_the_end(folder, tmp_path, capsys):
    assert convert(folder, tmp_path / "out", "lcx") == 0
    assert convert(folder, tmp_path / "out", "hf") == 2
    assert "already exists; choose another --dst, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoints").exists()
    assert convert(folder, tmp_path / "out", "hf", "--overwrite") == 0
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert_same_weights(folder, tmp_path / "out")


def damage(action):
    return pytest.param(action, id=action.__name__)


def truncated(folder):
    os.truncate(folder / "model.safetensors", 5000)
    return "it is truncated or damaged, copy or download it again"


def cut_in_the_header(folder):
    os.truncate(folder / "model.safetensors", 100)
    return "not a complete safetensors file"


def without_config(folder):
    (folder / "config.json").unlink()
    return "config.json is missing"


def of_another_type(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"llama"', '"gpt2"'))
    return "model_type 'gpt2', supported are llama, mistral, qwen2, qwen3, phi3"


def of_another_shape(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 50', '"vocab_size": 51'))
    return "model.embed_tokens.weight is (50, 16), expected (51, 16)"


def with_an_index_that_leaves_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "'../outside.safetensors', expected a plain file name"


def with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(folder.parent / "executed")}, folder / "pytorch_model.bin")
    return "nothing in it was executed"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def with_a_tokenizer_elsewhere(folder):
    (folder.parent / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(folder.parent / "secret")
    return "tokenizer.json is a link that leads out of the folder"


@pytest.mark.parametrize(
    "action",
    [
        damage(truncated),
        damage(cut_in_the_header),
        damage(without_config),
        damage(of_another_type),
        damage(of_another_shape),
        damage(with_an_index_that_leaves_the_folder),
        damage(with_code),
        damage(with_a_tokenizer_elsewhere),
    ],
)
def test_a_bad_source_is_one_line(folder, tmp_path, capsys, action):
    message = action(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert convert(folder, tmp_path / "out", "lcx") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--dst_format=gguf"], "format is 'gguf', expected one of lcx, hf"),
        (["--dst_format=lcx", "--dtype=int4"], "dtype is 'int4', expected one of float32, bfloat16, float16"),
        (["--dst_format=lcx", "--src_format=lcx"], "no checkpoint at"),
        (["--dst_format=lcx", "--rope_scaling=yarn"], "rope_scaling"),
        (["--dst_format=lcx", '--rope_scaling={"type": "yarn"}'], "factor"),
        (["--dst_format=lcx", "--rope_scaling=" + '{"a":' * 9999], "rope_scaling: not JSON"),
        (["--dst_format=lcx", "--context_length=100"], "context_length 100"),
        (["--dst_format=hf", "--max_shard_bytes=0"], "max_shard_bytes is 0"),
        (["--dst_format=hf", "--overwite"], "--overwrite"),
        ([], "--dst_format"),
    ],
)
def test_a_bad_setting_is_one_line(model_folder, tmp_path, capsys, more, message):
    assert main([f"--src={model_folder}", f"--dst={tmp_path}/out", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_source_is_never_the_destination(folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for dst in (folder, folder / ".", folder.parent):
        assert convert(folder, dst, "lcx", "--overwrite") == 2
        assert "--dst" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failure_in_the_middle_keeps_what_was_there(folder, tmp_path, capsys, monkeypatch):
    assert convert(folder, tmp_path / "out", "hf") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write, calls = tensor_io.write_all, []

    def full(file, data):
        calls.append(data)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(tensor_io, "write_all", full)
    capsys.readouterr()
    assert convert(folder, tmp_path / "out", "hf", "--overwrite", "--dtype=float32") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written: No space left on device; nothing was changed there" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_disk_that_fills_up_while_an_lcx_folder_is_written(folder, tmp_path):
    """A limit on the size of files stands for the full disk."""
    code = (
        "import resource, signal, sys\nfrom lcx.convert.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, f"--src={folder}", f"--dst={tmp_path}/out", "--dst_format=lcx"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{tmp_path}/out" in errors[0], result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    for stream, expected in ((Terminal(), "\r"), (io.StringIO(), "x: 2 of 2 MB (100%")):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("x", 2_000_000) as progress:
            progress.add(500_000)
            progress.add(1_500_000)
        assert expected in stream.getvalue() and "100%" in stream.getvalue()
        assert isinstance(stream, Terminal) or stream.getvalue().count("\n") == 1


def test_tokenizer_of_a_training_run_goes_along(tmp_path, reference, caplog):
    """A run records where its tokenizer was: its files are copied, unless they have changed since."""
    folder = tmp_path / "hf"
    shutil.copytree(reference / "data" / "weights" / "stories260K" / "hf", folder)
    model, params = lcx.load(folder)
    meta = {"model": model_json.to_json(model), "tokenizer": load_tokenizer(folder).to_json()}
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        checkpointer.save(3, {"params": params}, json={"meta": meta}, wait=True)
    assert convert(tmp_path / "run", tmp_path / "out", "hf") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 1
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert convert(tmp_path / "run", tmp_path / "again", "hf") == 0
    assert "no tokenizer is copied" in caplog.text
    assert not (tmp_path / "again" / "tokenizer.json").exists()


def test_byte_tokenizer_survives(tmp_path):
    model = model_lib.llama(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=8,
    )
    params = model_lib.init_params(model, jax.random.key(0))
    meta = {"model": model_json.to_json(model), "tokenizer": ByteTokenizer().to_json()}
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        checkpointer.save(3, {"params": params}, json={"meta": meta}, wait=True)
    assert convert(tmp_path / "run", tmp_path / "out", "hf") == 0
    assert load_tokenizer(tmp_path / "out") == ByteTokenizer()
    assert convert(tmp_path / "out", tmp_path / "back", "lcx") == 0
    source = LcxSource(tmp_path / "back")
    assert source.tokenizer == ByteTokenizer().to_json() and source.carried["eos_token_id"] == 257


def test_help_and_exit_status_of_the_process(model_folder, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lcx.convert"]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env)
    assert result.returncode == 0 and "--dst_format" in result.stdout and "Examples:" in result.stdout
    arguments = [f"--src={model_folder}/nothing", f"--dst={tmp_path}/out", "--dst_format=hf"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env)
    assert (
        result.returncode == 2 and len(own_lines(result.stderr)) == 1 and "does not exist" in result.stderr
    )


@pytest.mark.parametrize("name", ["babyllama105", "stories260K"])
def test_real_weights_there_and_back(reference, tmp_path, name):
    folder = reference / "data" / "weights" / name / "hf"
    assert convert(folder, tmp_path / "run", "lcx") == 0
    assert convert(tmp_path / "run", tmp_path / "hf", "hf") == 0
    assert_same_weights(folder, tmp_path / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (folder / file).read_bytes()
        assert (tmp_path / "run" / file).read_bytes() == (folder / file).read_bytes()
    source = HfSource(tmp_path / "hf")
    assert source.tokenizer == LcxSource(tmp_path / "run").tokenizer
    assert source.tokenizer["bos_id"] == 1


def test_memory_does_not_grow_with_the_folder(model_folder, tmp_path):
    """300 MB of tensors must cost far less than 300 MB: a converter that holds the model fails.

    What is in flight between threads has a limit, and on a busy machine reaches it: some 80 MB, whatever the size.
    """
    spec = importlib.util.spec_from_file_location("convert_memory", ROOT / "benchmarks" / "convert_memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    size = benchmark.make(tmp_path / "big", 0.3, 8000) / 1e6
    assert size > 270

    def peak(src, dst, dst_format):
        return benchmark.child(f"--src={src}", f"--dst={tmp_path / dst}", f"--dst_format={dst_format}")[
            "peak_mb"
        ]

    least = peak(model_folder, "small_lcx", "lcx")
    for most in (peak(tmp_path / "big", "big_lcx", "lcx"), peak(tmp_path / "big_lcx", "big_hf", "hf")):
        assert most - least < 0.5 * size, (least, most)
    for path in (tmp_path / "big").glob("*.safetensors"):
        assert np.array_equal(
            np.fromfile(path, np.uint8), np.fromfile(tmp_path / "big_hf" / path.name, np.uint8)
        )
