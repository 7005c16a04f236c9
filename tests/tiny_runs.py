"""What the training tests share: a small corpus of real text, a tiny model, a run of seconds."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import quick_xla

from lcx import model as model_lib
from lcx.checkpoint import Checkpointer
from lcx.data import Dataset
from lcx.optim import AdamW
from lcx.trainer import Trainer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPEED = (  # what no two runs share
    *("tokens_per_second", "mfu", "time", "wall_seconds", "data_seconds", "compute_seconds", "save_seconds"),
    "goodput",
)

GIN = """
from __gin__ import dynamic_registration
from lcx import data
from lcx import model
from lcx import optim
from lcx import trainer

trainer.train.job = @trainer.Trainer()
trainer.Trainer.model = @model.llama()
trainer.Trainer.data = @data.Dataset()
trainer.Trainer.optimizer = @optim.AdamW()
trainer.Trainer.steps = 40
trainer.Trainer.batch_size = 8
trainer.Trainer.seq_len = 32
trainer.Trainer.log_every = 3
trainer.Trainer.checkpoint_every = 4
trainer.Trainer.eval_batches = 2
optim.AdamW.learning_rate = 1e-2
optim.AdamW.warmup_steps = 4
data.Dataset.source = '{folder}/text'
data.Dataset.cache_dir = '{folder}/cache'
data.Dataset.split = 'tail'
data.Dataset.eval_fraction = 0.2
model.llama.vocab_size = 258
model.llama.hidden_size = 32
model.llama.intermediate_size = 64
model.llama.num_layers = 2
model.llama.num_heads = 4
model.llama.num_kv_heads = 2
model.llama.max_position_embeddings = 32
"""


def write_text(folder: pathlib.Path, documents: int = 12) -> None:
    """Documents of real text: pieces of the source of this Python."""
    (folder / "text").mkdir(parents=True)
    sources = [inspect.getsource(module) for module in (inspect, json, os, pathlib, subprocess, textwrap)]
    for i in range(documents):
        text = sources[i % len(sources)]
        start = 2500 * (i // len(sources))
        (folder / "text" / f"{i:02d}.txt").write_text(text[start : start + 2500])


@pytest.fixture(name="text", scope="module")
def text_fixture(tmp_path_factory) -> pathlib.Path:
    """A folder with the corpus, for `dataset` and `tiny_trainer`."""
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    return folder


def dataset(folder: pathlib.Path, **changes) -> Dataset:
    settings = {
        "source": f"{folder}/text",
        "cache_dir": f"{folder}/cache",
        "split": "tail",
        "eval_fraction": 0.2,
    }
    return Dataset(**{**settings, **changes})


def tiny_model(**changes) -> model_lib.Decoder:
    sizes = dict(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=32,
    )
    return model_lib.llama(**{**sizes, **changes})


def tiny_hf_config(**changes):
    """The configuration of transformers for `tiny_model`."""
    import transformers

    sizes = dict(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaConfig(**{**sizes, **changes})


def tiny_trainer(folder: pathlib.Path, **changes) -> Trainer:
    """The run that GIN describes, too."""
    settings = dict(
        data=dataset(folder),
        steps=40,
        batch_size=8,
        seq_len=32,
        log_every=3,
        checkpoint_every=4,
        eval_batches=2,
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=4),
    )
    if "init_from" not in changes:
        settings["model"] = tiny_model()
    return Trainer(**{**settings, **changes})


class StopAt:
    """In the place of a StopRequest: asks the run to stop after this many updates, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def __enter__(self) -> StopAt:
        return self

    def __exit__(self, *_) -> None:
        pass

    def requested(self, step: int) -> bool:
        return step >= self.step


def lines(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in found]


def losses(workdir) -> list[float]:
    return [line["loss"] for line in lines(workdir) if "loss" in line]


def saved(workdir, step: int | None = None):
    """(step, raw arrays by name, json documents) of a checkpoint, read without knowing what is in it."""
    from lcx.checkpoint import read_record

    folder = pathlib.Path(workdir) / "checkpoints"
    with Checkpointer(folder) as checkpointer:
        step = checkpointer.steps()[-1] if step is None else step
        entries = read_record(folder / str(step)).arrays
        abstract = {
            item: {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in arrays.items()}
            for item, arrays in entries.items()
        }
        nested = {item: _nested(tree) for item, tree in abstract.items()}
        _, items, documents = checkpointer.restore(nested, step=step)
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return step, {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}, documents


def _nested(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def assert_same_checkpoint(workdir, expected) -> None:
    """The newest checkpoints hold the same bits: parameters, optimizer, place in the data."""
    (step, arrays, documents), (other_step, other, other_documents) = saved(workdir), saved(expected)
    assert step == other_step
    assert arrays.keys() == other.keys()
    for name, x in arrays.items():
        assert x.dtype == other[name].dtype and x.tobytes() == other[name].tobytes(), name
    assert documents["data"]["next_index"] == other_documents["data"]["next_index"]


def write_gin(folder: pathlib.Path, text: str = GIN) -> str:
    path = folder / "tiny.gin"
    path.write_text(text.replace("{folder}", str(folder)))
    return str(path)


def command(gin_file: str, workdir, *flags: str) -> list[str]:
    return [sys.executable, "-m", "lcx.train", f"--gin_file={gin_file}", f"--workdir={workdir}", *flags]


def environment(**env: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": quick_xla.flags(), **env}
