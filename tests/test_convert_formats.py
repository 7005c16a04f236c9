"""The table of formats and that of families: what a new one takes, as CONTRIBUTING.md shows it, and that nothing else
in lcx knows the name of one."""

import ast
import dataclasses
import json
import pathlib
import re
import sys

import hf_folders
import jax
import numpy as np
import pytest
import safetensors.numpy

import lcx
from lcx.convert import formats
from lcx.convert.__main__ import main
from lcx.convert.core.format import Format
from lcx.convert.hf import families
from lcx.convert.hf.format import HuggingFace
from lcx.data import Dataset
from lcx.evaluator import evaluate
from lcx.ladder import Ladder, Rung
from lcx.trainer import Trainer

ROOT = pathlib.Path(__file__).parent.parent
NORM = "model.norm.weight", "model.final_norm.weight"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The Python of CONTRIBUTING.md as modules of a user's package: names of the classes -> modules."""
    folder = tmp_path_factory.mktemp("package")
    sys.path.insert(0, str(folder))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    family, other = blocks
    family += "\n\nfrom lcx.convert.hf.format import HuggingFace\n\nFORMAT = HuggingFace(family=TOY)\n"
    for name, text in (("my_family", family), ("my_format", other)):
        (folder / f"{name}.py").write_text(text)
    yield __import__("my_family"), __import__("my_format")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folders.make(tmp_path_factory.mktemp("formats") / "llama")


@pytest.fixture(scope="module")
def toy_folder(folder):
    def config(value):
        value |= {"model_type": "toy", "architectures": ["ToyForCausalLM"]}

    def tensors(found):
        found[NORM[1]] = found.pop(NORM[0]) + np.float32(0.5)
        return found

    return hf_folders.changed(folder, folder.parent / "toy", tensors=tensors, config=config)


def read(source):
    return {
        path: source.read(path, tuple(slice(0, size) for size in info.shape))
        for path, info in source.leaves.items()
    }


def test_a_family_is_one_file_and_one_entry(examples, folder, toy_folder, tmp_path, monkeypatch):
    with pytest.raises(lcx.UserError, match="model_type 'toy', supported are llama"):
        lcx.load(toy_folder)
    monkeypatch.setitem(families.FAMILIES, "toy", examples[0].TOY)
    source = formats.detect(toy_folder).open(toy_folder)
    assert source.model.model_type == "toy"
    expected, found = hf_folders.parameters(folder), read(source)
    expected["final_norm/scale"] = expected["final_norm/scale"] + np.float32(0.5)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)
    assert main([f"--src={toy_folder}", f"--dst={tmp_path / 'lcx'}", "--dst_format=lcx"]) == 0
    assert main([f"--src={tmp_path / 'lcx'}", f"--dst={tmp_path / 'back'}", "--dst_format=hf"]) == 0
    same_folders(toy_folder, tmp_path / "back")


def same_folders(one, other):
    tensors = [safetensors.numpy.load_file(path / "model.safetensors") for path in (one, other)]
    assert tensors[0].keys() == tensors[1].keys() and NORM[1] in tensors[0]
    for name, array in tensors[0].items():
        np.testing.assert_array_equal(tensors[1][name], array)
    configs = [json.loads((path / "config.json").read_text()) for path in (one, other)]
    assert configs[0] == configs[1]


@dataclasses.dataclass(frozen=True)
class Size:
    """An evaluation that needs no text."""

    name: str = "size"

    def __call__(self, model, params, tokenizer):
        return {"summary": "counted", "table": {"layers": float(model.num_layers)}}


def test_a_users_own_family_and_format_are_passed_along(examples, toy_folder, tmp_path, capsys):
    family, format = (module.__name__ for module in examples)
    flags = ["--overwrite", f"--dst_format={format}:FORMAT"]
    for _ in range(2):  # the second time over the first
        assert (
            main(
                [f"--src={toy_folder}", f"--src_format={family}:FORMAT", f"--dst={tmp_path / 'npz'}", *flags]
            )
            == 0
        )
    back = [f"--src={tmp_path / 'npz'}", f"--src_format={format}:FORMAT", f"--dst={tmp_path / 'back'}"]
    assert main([*back, f"--dst_format={family}:FORMAT"]) == 0
    same_folders(toy_folder, tmp_path / "back")
    model, params = lcx.load(toy_folder, format=examples[0].FORMAT)
    lcx.save(tmp_path / "again", model, params, format=examples[0].FORMAT)
    same_folders(toy_folder, tmp_path / "again")
    settings = {"checkpoint": str(toy_folder), "output": str(tmp_path / "eval"), "evals": (Size(),)}
    with pytest.raises(lcx.UserError, match="model_type 'toy', supported are llama"):
        evaluate(**settings)
    assert evaluate(**settings, format=f"{family}:FORMAT")["evaluations"]["size"]["table"] == {"layers": 2.0}
    with pytest.raises(lcx.UserError, match="model_type 'toy'; the 'hf' format supports llama"):
        lcx.save(tmp_path / "no", model, params, format="hf")
    with pytest.raises(lcx.UserError, match="model_type 'llama' and the family of the format 'toy'"):
        llama = model.clone(model_type="llama", parent=None)
        lcx.save(tmp_path / "no", llama, params, format=examples[0].FORMAT)
    capsys.readouterr()


def test_training_starts_from_a_users_own_family(examples, toy_folder):
    """Named in the settings, without a conversion before; in a ladder for its first rung alone."""
    family = f"{examples[0].__name__}:FORMAT"
    settings = dict(data=Dataset("stdlib"), steps=1, batch_size=1, seq_len=64)
    trainer = Trainer(**settings, init_from=str(toy_folder), init_format=family)
    found, expected = trainer.load(trainer.mesh.build()), lcx.load(toy_folder, format=examples[0].FORMAT)
    assert found.model == expected[0] and found.model.model_type == "toy"
    jax.tree.map(np.testing.assert_array_equal, found.params, expected[1])
    ladder = Ladder(trainer, (Rung(64, 1), Rung(128, 1)), {"rope_type": "linear"})
    first, second = (ladder.trainer_for(ladder.rungs[0], path, 64, 0) for path in (str(toy_folder), "runs/64"))
    assert (first.init_format, second.init_format) == (family, None)
    with pytest.raises(lcx.UserError, match="model_type 'toy', supported are llama"):
        dataclasses.replace(trainer, init_format=None).load(trainer.mesh.build())
    with pytest.raises(lcx.UserError, match="Trainer.init_format is 'toy', expected one of lcx, hf"):
        dataclasses.replace(trainer, init_format="toy").load(trainer.mesh.build())
    with pytest.raises(lcx.UserError, match="init_format is the format of a pretrained model: set Trainer.init_from"):
        Trainer(**settings, model=found.model, init_format=family)


@pytest.mark.parametrize(
    "name, message",
    [
        ("my_family:GONE", "cannot be imported: module 'my_family' has no attribute"),
        ("gone:FORMAT", "cannot be imported: No module named 'gone'"),
        ("my_family:TOY", "a Toy, expected an instance of Format"),
        (":", "cannot be imported"),
        (None, "format is None, expected one of lcx, hf"),
    ],
)
def test_formats_that_there_are_not(name, message, examples):
    with pytest.raises(lcx.UserError, match=message):
        formats.named(name)


def test_options_belong_to_formats():
    assert formats.writer("savanna", model_parallel=8).model_parallel == 8
    assert formats.writer("hf", max_shard_bytes=None) == HuggingFace()
    with pytest.raises(
        lcx.UserError, match="max_shard_bytes is the maximum size .* the format is 'lcx': leave out max_shard_bytes"
    ):
        formats.writer("lcx", max_shard_bytes=1)
    with pytest.raises(lcx.UserError, match="seed is no option of any format"):
        formats.writer("lcx", seed=1)
    with pytest.raises(
        lcx.UserError, match="format is 'peft', expected one of lcx, hf, savanna, vortex, lolcats"
    ):
        formats.writer("peft")
    with pytest.raises(
        lcx.UserError, match="format is 'peft', expected one of lcx, hf, savanna, savanna_legacy"
    ):
        formats.reader("nowhere", "peft")


def test_help_names_every_format_and_option(capsys):
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for format in formats.FORMATS:
        assert f"{format.name}, {format.help}" in shown.replace("- ", "-"), format.name
        assert all(
            f"--{name} {field.metadata['metavar']}" in shown for name, field in format.options().items()
        )
        assert dataclasses.is_dataclass(format) and isinstance(format, Format)


def test_nothing_else_knows_the_name_of_a_format_or_a_family():
    """A comparison with the name of a format, or any text that is the model_type of a family, is a special case."""
    names = {format.name for format in formats.FORMATS}
    kinds = set(families.FAMILIES) - {"llama"}  # the default of a Decoder
    tokenizers = sorted(
        ROOT.glob("lcx/data/tokenizer_*.py")
    )  # transformers' tables of tokenizers by model_type
    for path in [p for p in sorted(ROOT.glob("lcx/**/*.py")) if p not in tokenizers]:
        text = path.read_text()
        in_convert, own = "lcx/convert/" in path.as_posix(), "hf/families/" in path.as_posix()
        if not any(f'"{name}"' in text for name in names | kinds):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Compare) and in_convert:
                parts = [node.left, *node.comparators]
                texts = {part.value for part in parts if isinstance(part, ast.Constant)}
                assert not texts & names, f"{path}:{node.lineno} compares with the name of a format"
            if isinstance(node, ast.Constant) and not own:
                assert node.value not in kinds, f"{path}:{node.lineno} names the family {node.value!r}"
