"""A tiny Hugging Face folder, and copies of it with something changed."""

import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy

import lcx
from lcx import model as model_lib
from lcx.convert.core import model_source
from lcx.convert.hf.source import HfSource


def make(folder: pathlib.Path, **changes) -> pathlib.Path:
    """A Llama of two layers with random weights."""
    keys = dict(vocab_size=12, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1)
    model = model_lib.llama(**keys | dict(max_position_embeddings=64) | changes)
    lcx.save(folder, model, model_lib.init_params(model, jax.random.key(0)), format="hf")
    return folder


def changed(
    source: pathlib.Path,
    folder: pathlib.Path,
    *,
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    config: Callable[[dict], object] | None = None,
) -> pathlib.Path:
    """A copy with other tensors (all of them given) or another config.json (changed in place)."""
    shutil.copytree(source, folder)
    if tensors is not None:
        path = folder / "model.safetensors"
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path)
    if config is not None:
        value = json.loads((folder / "config.json").read_text())
        config(value)
        (folder / "config.json").write_text(json.dumps(value))
    return folder


def parameters(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What lcx reads from it, by its own names."""
    source = HfSource(folder)
    return {
        path: source.read(path, tuple(slice(0, size) for size in shape))
        for path, shape in model_source.leaf_shapes(source.model).items()
    }
