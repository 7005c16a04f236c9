"""The training state of a job as shapes: what `Trainer.run` would start from, without reading a weight."""

import json
import pathlib
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lcx import extend, hub, parameters
from lcx import model as model_lib
from lcx.blockwise import Blocks, BlockTrainer
from lcx.convert import formats
from lcx.convert.hf import config as hf_config
from lcx.convert.hf.folder import CONFIG
from lcx.convert.start import SETTINGS
from lcx.errors import UserError, naming
from lcx.ladder import Ladder, original_window
from lcx.linearize import check_linear, is_new
from lcx.model import Decoder
from lcx.trainer import Trainer
from lcx.training.residual_store import MASKS
from lcx.training.run import Run

STREAM = "residual"  # what a batch of a block holds in place of tokens

# name -> dtype of what a batch holds for every token
FIELDS = {name: np.int32 for name in ("tokens", "labels", "positions", "segment_ids")} | {"loss_weights": np.float32}

Dtypes = dict[str, Any]  # path -> dtype of a stored parameter; "": of those that are not listed


def trainer_of(job: Any) -> tuple[Trainer, list[str]]:
    """The run to plan, and what to say about the choice.

    Raises:
      UserError: a job that is none of Trainer, Ladder and Blocks, or one that trains an adapter from a folder.
    """
    if isinstance(job, Ladder):
        source = job.trainer.init_from
        assert source is not None
        window = original_window(_stored(source, job.trainer.init_format)[0])
        trainer = job.trainer_for(job.rungs[-1], source, window, 0)
        notes = [f"a ladder: this is one round of its longest rung, {job.rungs[-1].context_length} tokens"]
    elif isinstance(job, Blocks):
        trainer, notes = _largest_block(job)
    elif isinstance(job, Trainer):
        trainer, notes = job, []
    else:
        raise UserError(
            f"train.job is a {type(job).__name__}, and only a Trainer, a Ladder or Blocks can be planned: bind one of "
            "them to train.job"
        )
    if trainer.adapter is not None:
        raise UserError(
            "Trainer.adapter cannot be planned: set Trainer.lora with the adapter's rank and targets"
        )
    return trainer, notes


@naming(SETTINGS)
def _largest_block(job: Blocks) -> tuple[Trainer, list[str]]:
    assert job.trainer.init_from is not None
    model = extend.extend_model(
        _stored(job.trainer.init_from, job.trainer.init_format)[0],
        job.trainer.rope_scaling,
        job.trainer.context_length,
    )
    first, last = job.largest(model)
    note = f"block by block: this is the largest of {len(job.cut(model))} blocks, layers {first} to {last - 1}"
    return job.block_trainer(pathlib.Path(), first, last), [note]


def fields_of(trainer: Trainer, run: Run) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape of each token, dtype)} of a batch: tokens, or the residual stream before a block of layers."""
    if not isinstance(trainer, BlockTrainer):
        return {name: ((), dtype) for name, dtype in FIELDS.items()}
    found: dict[str, tuple[tuple[int, ...], Any]] = {name: ((), np.dtype("int32")) for name in MASKS}
    found[STREAM] = (run.model.hidden_size,), jnp.dtype(run.model.dtype)
    return found


@naming(SETTINGS)
def run_of(trainer: Trainer, mesh: Mesh) -> Run:
    """The run without its arrays, as `Trainer` prepares it.

    Raises:
      UserError: the model at init_from cannot be read, extended or linearized.
    """
    if trainer.init_from is None:
        assert trainer.model is not None
        return trainer.prepared(trainer.adjusted(trainer.model), mesh, trainer.lora)
    model, dtypes = _stored(trainer.init_from, trainer.init_format)
    model = extend.extend_model(model, trainer.rope_scaling, trainer.context_length)
    model = model.clone(dtype="float32", parent=None)
    if trainer.linearize is not None:
        model = trainer.linearize.model(model)
    if isinstance(trainer, BlockTrainer):
        model = cast(Decoder, model_lib.part(model, trainer.first, trainer.last))  # what a run calls its model
    if trainer.expects_linear:
        check_linear(model, seq_len=trainer.seq_len, where=trainer.init_from)
    model = trainer.adjusted(model)
    stored = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, dtypes.get(path, np.dtype("float32") if is_new(path) else dtypes[""])
        )
        for path, leaf in flatten_dict(parameters.abstract_params(model), sep="/").items()
    }
    return trainer.prepared(model, mesh, trainer.lora, unflatten_dict(stored, sep="/"))


def _stored(path: str, format: str | None) -> tuple[Decoder, Dtypes]:
    """The model at `path` and the dtypes in which its parameters are stored; a lone config.json is enough."""
    folder = pathlib.Path(path).expanduser()
    if (folder / CONFIG).is_file() and not any(_WEIGHTS.search(entry.name) for entry in folder.iterdir()):
        return _described(folder)
    local = hub.local(path)
    source = formats.reader(local, format, where="Trainer.init_format").open(local)
    dtypes: Dtypes = {name: info.dtype for name, info in source.leaves.items()}
    return source.model, dtypes | {"": max(dtypes.values(), key=list(dtypes.values()).count)}


_WEIGHTS = re.compile(r"\.(safetensors|bin|pth?|gguf|npz|h5|msgpack)$|\.index\.json$")


def _described(folder: pathlib.Path) -> tuple[Decoder, Dtypes]:
    """A model without weights: config.json alone. The weights are taken to be stored in its dtype, or bfloat16."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / CONFIG} cannot be read: {error}; expected config.json of a model"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is not a JSON object: expected config.json of a model")
    name = config.get("dtype", config.get("torch_dtype")) or "bfloat16"
    if name not in ("bfloat16", "float16", "float32"):
        raise UserError(f"{folder / CONFIG} has dtype {name!r}, expected bfloat16, float16 or float32")
    return hf_config.from_config(config), {"": jnp.dtype(name)}
