"""Folders that other tools wrote: prefixes of wrappers, heads stored alone, quantized weights, pointers, gguf."""

import numpy as np
import pytest
from hf_folders import changed, make, parameters

from lcx.convert import api
from lcx.convert.__main__ import main
from lcx.convert.hf.source import HfSource
from lcx.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("names") / "untied")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("names") / "tied", tie_word_embeddings=True)


def deep(name):
    for before, after in (
        (".self_attn.", "._orig_mod.self_attn."),
        ("model.layers", "model._fsdp_wrapped_module.layers"),
        (".mlp.", "._checkpoint_wrapped_module.mlp."),
    ):
        name = name.replace(before, after)
    return name


def every_second(prefix):
    count = iter(range(10**6))
    return lambda name: (prefix if next(count) % 2 else "") + name


RENAMED = {
    "module.": (lambda name: f"module.{name}", "21 of 21 tensors: removed module."),
    "_orig_mod.": (lambda name: f"_orig_mod.{name}", "removed _orig_mod."),
    "both": (lambda name: f"module._orig_mod.module.{name}", "removed module., removed _orig_mod."),
    "deep": (deep, "removed _orig_mod., removed _fsdp_wrapped_module., removed _checkpoint_wrapped_module."),
    "some": (every_second("module."), "10 of 21 tensors: removed module."),
    "lightning": (lambda name: f"model.{name}", "removed model."),
    "twice": (lambda name: f"model.model.{name}", "removed model.model."),
    "peft": (lambda name: f"base_model.model.{name}", "removed base_model.model."),
    "base model": (lambda name: name.removeprefix("model."), "20 of 21 tensors: added model."),
}


@pytest.mark.parametrize("case", RENAMED)
def test_prefixes_of_wrappers_are_removed_and_said(untied, tmp_path, caplog, case):
    rename, words = RENAMED[case]
    folder = changed(untied, tmp_path / "m", tensors=lambda t: {rename(name): v for name, v in t.items()})
    found, expected = parameters(folder), parameters(untied)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])
    lines = [line for line in caplog.text.splitlines() if "a wrapper renamed" in line]
    assert len(lines) == 1 and words in lines[0]


def test_names_as_they_should_be_say_nothing(untied, tied, caplog):
    parameters(untied), parameters(tied)
    assert not caplog.text


def test_a_tied_model_may_store_either_name(tied, tmp_path, caplog):
    expected = parameters(tied)
    only_head = changed(tied, tmp_path / "head", tensors=lambda t: {HEAD: t.pop(EMBEDDING), **t})
    both = changed(tied, tmp_path / "both", tensors=lambda t: {HEAD: t[EMBEDDING], **t})
    for folder in (only_head, both):
        for path, value in parameters(folder).items():
            np.testing.assert_array_equal(value, expected[path])
    assert caplog.text.count("stored as lm_head.weight") == 1
    other = changed(tied, tmp_path / "other", tensors=lambda t: {HEAD: t[EMBEDDING] + 1, **t})
    with pytest.raises(UserError, match="tie_word_embeddings true but lm_head.weight is not"):
        HfSource(other)


def quantized(method):
    return lambda config: config.update(quantization_config=method)


def in_bytes(tensors):
    return {name: v.astype(np.int8) if "_proj" in name else v for name, v in tensors.items()}


REFUSED = {
    "twice": (
        dict(tensors=lambda t: {"module.model.norm.weight": t["model.norm.weight"], **t}),
        "'model.norm.weight' and 'module.model.norm.weight' are both 'model.norm.weight'",
    ),
    "unmerged": (
        dict(tensors=lambda t: {"base_model.model.layers.0.q_proj.lora_A.default.weight": t[HEAD], **t}),
        "1 tensors belong to an adapter that is not merged",
    ),
    "no head": (dict(tensors=lambda t: {k: v for k, v in t.items() if k != HEAD}), "lm_head.weight is missing"),
    "mxfp4": (dict(config=quantized({"quant_method": "mxfp4"})), "quantized .quantization_config: 'mxfp4'"),
    "gptq": (dict(config=quantized({"quant_method": "gptq", "bits": 4})), "quantized .quantization_config: 'gptq'"),
    "bitsandbytes": (dict(config=quantized({"load_in_4bit": True})), "'bitsandbytes, load_in_4bit'.*dequantize"),
    "unknown": (dict(config=quantized("x")), "'an unnamed method'"),
    "qweight": (
        dict(tensors=lambda t: {k.replace("o_proj.weight", "o_proj.qweight"): v for k, v in t.items()}),
        "quantized .2 tensors such as 'model.layers.0.self_attn.o_proj.qweight'",
    ),
    "int8": (dict(tensors=in_bytes), "quantized .14 tensors such as .*int8"),
    "layers": (dict(config=lambda c: c.update(num_hidden_layers=300)), "num_hidden_layers 300, but .* of 2 layers"),
    "huge": (dict(config=lambda c: c.update(hidden_size=10**12)), "hidden_size = 1000000000000, expected"),
    "wide": (dict(config=lambda c: c.update(hidden_size=2**31 - 2)), "do not have the shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_one_line(untied, tmp_path, case):
    changes, message = REFUSED[case]
    folder = changed(untied, tmp_path / "m", **changes)
    with pytest.raises(UserError, match=message) as error:
        HfSource(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_pointer_of_git_lfs_is_recognised(untied, tmp_path, name):
    folder = changed(untied, tmp_path / "m")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS.*git lfs pull"):
        HfSource(folder)


def test_gguf_is_recognised(untied, tmp_path):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x.Q4_K.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "g", tmp_path / "g" / "x.Q4_K.gguf"):
        with pytest.raises(UserError, match=f"gguf_file='x.Q4_K.gguf'.*{tmp_path}|{tmp_path}.*gguf_file"):
            api.detect(path)
    (tmp_path / "g" / "config.json").write_bytes((untied / "config.json").read_bytes())
    with pytest.raises(UserError, match="gguf_file='x.Q4_K.gguf'"):
        HfSource(tmp_path / "g")


@pytest.mark.parametrize("format", ["hf", "lcx"])
def test_numbers_that_are_not_finite_are_counted_by_tensor(untied, tmp_path, capsys, format):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = np.nan
        tensors["model.norm.weight"][1] = -np.inf
        return tensors

    folder = changed(untied, tmp_path / "m", tensors=damage)
    assert main([f"--src={folder}", f"--dst={tmp_path}/out", f"--dst_format={format}"]) == 0
    text = capsys.readouterr().out
    assert (
        "warning: model.layers.1.mlp.up_proj.weight of the source holds 3 NaN and 0 infinite numbers" in text
    )
    assert "warning: model.norm.weight of the source holds 0 NaN and 1 infinite numbers" in text
    assert text.count("warning") == 2
