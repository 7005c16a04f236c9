"""What the tests of LoLCATS files share: the published model's files, and their names."""

import collections
import json
import shutil

import numpy as np
import pytest
import torch

import lcx
from lcx.convert.lolcats.files import Lolcats

SETTINGS = {"attention_type": "lolcats_llama_window_tk", "window_size": 8}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
PAIR = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
MAP = "model.layers.{}.self_attn.feature_map_{}.mlp.layer"
FACTORS = "model.layers.{}.self_attn.window_factors"


def read(reference):
    with np.load(reference / "reference" / "lolcats" / "model_hybrid_tk.npz") as file:
        return {key: file[key] for key in file.files}


def tensors_of(published, prefix, of=lambda name: True):
    found = {name.removeprefix(prefix): x for name, x in published.items() if name.startswith(prefix)}
    return collections.OrderedDict((name, torch.tensor(x)) for name, x in found.items() if of(name))


def is_map(name):
    return "feature_map" in name or "window_factors" in name


def write(published, where):
    """The Hugging Face folder; its feature maps at the start, and after training with LoRA pairs, as published."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    (where / "hf").mkdir()
    (where / "hf" / "config.json").write_text(json.dumps(CONFIG))
    base = tensors_of(published, "w/", lambda name: not is_map(name))
    save_file(dict(base), where / "hf" / "model.safetensors", {"format": "pt"})
    beside = {"step": 12, "distill/eval/loss": 0.5, "metric": np.float64(0.5)}
    torch.save({"model_state_dict": tensors_of(published, "train1/final/"), **beside}, where / "x_distill.pt")
    torch.save(tensors_of(published, "w/", is_map), where / "start_distill.pt")
    torch.save({"model_state_dict": tensors_of(published, "stage2/rand/"), "step": 8}, where / "x_ft.pt")


def load(where, *, lora=True, settings=SETTINGS, **more):
    names = Lolcats(where / "x_distill.pt", where / "x_ft.pt" if lora else None, settings, **more)
    return lcx.load(where / "hf", lolcats=names)


def state(path):
    return torch.load(path, weights_only=False)["model_state_dict"]


@pytest.fixture(name="published", scope="module")
def published_fixture(reference):
    return read(reference)


@pytest.fixture(name="made", scope="module")
def made_fixture(published, tmp_path_factory):
    where = tmp_path_factory.mktemp("published")
    write(published, where)
    return where


@pytest.fixture(name="files")
def files_fixture(made, tmp_path):
    """A copy to damage."""
    shutil.copytree(made, tmp_path / "published")
    return tmp_path / "published"
