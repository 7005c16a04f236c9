"""LoLCATS files that are damaged, hostile or of another model, and settings that do not fit: each refused in a line."""

import json
import pathlib
import shutil

import pytest
import torch
from lolcats_files import (  # noqa: F401
    CONFIG,
    FACTORS,
    MAP,
    PAIR,
    SETTINGS,
    files_fixture,
    load,
    made_fixture,
    published_fixture,
    state,
)

import lcx
from lcx.convert.lolcats.files import Lolcats
from lcx.errors import UserError


def damaged(change, name="x_distill.pt"):
    def damage(where):
        tensors = dict(state(where / name))
        change(tensors)
        torch.save({"model_state_dict": tensors}, where / name)

    return damage


def heads(tensors):
    for i in (0, 1):
        tensors[FACTORS.format(i)] = torch.zeros(1, 8, 1, 1)
        for side in "qk":
            tensors[MAP.format(i, side)] = torch.zeros(8, 16, 8)


def cut(where):
    whole = (where / "x_distill.pt").read_bytes()
    (where / "x_distill.pt").write_bytes(whole[: len(whole) // 2])


class Harm:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("harm"),)


def hostile(where):
    torch.save({"model_state_dict": state(where / "x_distill.pt"), "step": Harm()}, where / "x_distill.pt")


def other_model(where):
    (where / "hf" / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))


BAD = {
    "wrong_heads": (damaged(heads), {}, r"\(8, 16, 8\).*expected \(4, 16.*belong to another model"),
    "wrong_feature_dim": (
        damaged(lambda t: t.update({MAP.format(1, "k"): torch.zeros(4, 16, 6)})),
        {},
        r"layers.1.*\(4, 16, 6\), expected \(4, 16, 8\)",
    ),
    "stated_feature_dim": (
        lambda where: None,
        {"settings": {**SETTINGS, "learned_kernel_kwargs": {"feature_dim": 64}}},
        "have feature_dim 8, expected 64 as attention says; change attention or feature_maps",
    ),
    "missing": (
        damaged(lambda t: t.pop(FACTORS.format(1))),
        {},
        r"1 tensors are missing.*layers.1.*window_factors",
    ),
    "missing_layer": (
        damaged(lambda t: [t.pop(name) for name in list(t) if ".0." in name]),
        {},
        "3 tensors are missing.*layers.0.*softmax_attentions for layers without",
    ),
    "no_layer": (damaged(lambda t: t.clear()), {}, "no feature maps"),
    "extra_layer": (
        damaged(lambda t: t.update({MAP.format(2, "q"): torch.zeros(4, 16, 8)})),
        {},
        "1 unexpected tensors, such as model.layers.2",
    ),
    "extra": (
        damaged(lambda t: t.update({"lm_head.weight": torch.zeros(2)})),
        {},
        "unexpected tensor 'lm_head",
    ),
    "no_window": (
        lambda where: None,
        {"settings": {"attention_type": "lolcats_llama"}},
        "2 unexpected.*attention_type",
    ),
    "integers": (
        damaged(lambda t: t.update({MAP.format(0, "q"): torch.zeros(4, 16, 8, dtype=torch.int32)})),
        {},
        "is int32, expected float32",
    ),
    "truncated": (cut, {}, "not a readable PyTorch file"),
    "hostile": (hostile, {}, "holds more than tensors, and nothing in it was executed"),
    "empty_tensor_dict": (
        lambda where: torch.save([1], where / "x_distill.pt"),
        {},
        "expected a dict of named tensors",
    ),
    "one_sided_pair": (damaged(lambda t: t.pop(PAIR.format("B")), "x_ft.pt"), {}, "has lora_A alone"),
    "wrong_pair": (
        damaged(lambda t: t.update({PAIR.format("A"): torch.zeros(8, 32)}), "x_ft.pt"),
        {},
        "do not fit its weight.*change lora or --src",
    ),
    "other_module": (
        damaged(
            lambda t: t.update({PAIR.format("A").replace("q_proj", "w_proj"): torch.zeros(8, 64)}), "x_ft.pt"
        ),
        {},
        "has lora_A alone",
    ),
    "not_a_llama": (other_model, {}, "config.json has model_type 'gpt2', supported are llama"),
    "no_config": (
        lambda where: (where / "hf" / "config.json").unlink(),
        {},
        "no config.json, expected the Hugging Face folder",
    ),
    "window_too_large": (
        lambda where: None,
        {"settings": {**SETTINGS, "window_size": 64}},
        "set a smaller window",
    ),
    "unknown_type": (
        lambda where: None,
        {"settings": {"attention_type": "lolcats_llama_window_sw_scale"}},
        "expected lol",
    ),
    "unknown_setting": (lambda where: None, {"settings": {"windowsize": 8}}, "unknown setting 'windowsize'"),
    "wrong_value": (
        lambda where: None,
        {"settings": {"window_size": "8"}},
        "window_size is '8', expected int",
    ),
    "other_eps": (
        lambda where: None,
        {"settings": {"feature_map_kwargs": {"eps": 1e-6}}},
        "eps is 1e-06, expected 1e-12",
    ),
    "other_decode": (
        lambda where: None,
        {"settings": {"decode_window_size": 4}},
        "decode_window_size is 4, expected None",
    ),
    "other_map": (
        lambda where: None,
        {"settings": {**SETTINGS, "feature_map": "cosine"}},
        "expected one of softmax_dim",
    ),
    "no_settings": (lambda where: None, {"settings": "nothing.yaml"}, "nothing there, expected a .yaml"),
    "alpha": (lambda where: None, {"lora_alpha": -1.0}, "expected a positive number"),
    "no_file": (
        lambda where: (where / "x_distill.pt").unlink(),
        {},
        "no feature maps at .*change feature_maps",
    ),
    "no_lora": (lambda where: (where / "x_ft.pt").unlink(), {}, "no file at .*x_ft.pt"),
}


@pytest.mark.parametrize(("damage", "settings", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(damage, settings, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(files)
    with pytest.raises(UserError, match=message) as error:
        load(files, **settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "harm").exists()


def test_folders_that_leave_a_choice_are_refused(files, tmp_path):
    for name in ("a_distill.pt", "b_distill.pt"):
        shutil.copy(files / "x_distill.pt", files / "hf" / name)
    with pytest.raises(UserError, match="holds 2 files X_distill.pt: set feature_maps"):
        lcx.load(files / "hf")
    (files / "empty").mkdir()
    with pytest.raises(UserError, match="no feature maps in"):
        lcx.load(files / "hf", lolcats=Lolcats(files / "empty"))


def test_an_unknown_window_is_said(files, caplog):
    """Published files are terraced, 64: taken where nothing states it, and never in silence."""
    with pytest.raises(UserError, match="window 64 holds the model's whole context of 64 tokens"):
        lcx.load(files / "hf", lolcats=Lolcats(files / "x_distill.pt"))
    assert "nothing next to it states its window and activation; assuming the published ones" in caplog.text


@pytest.mark.parametrize("given", ["x_distill.pt", {"feature_maps": "x_distill.pt"}])
def test_the_argument_is_a_lolcats(files, given):
    with pytest.raises(UserError, match=r"expected lcx.Lolcats\(feature_maps=..., lora=..., attention=...\)"):
        lcx.load(files / "hf", lolcats=given)
