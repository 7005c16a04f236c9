"""The optimizer, schedule and settings of a published run: optimizer.pt, scheduler.pt and config.pt.

    optimizer.pt   {"state": {i: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": [{"lr", ..., "params": [i, ...]}]}
    scheduler.pt   the state of a LambdaLR; its last_epoch is the number of the last update, counted from 0
    config.pt      the trainer's settings, and step_ckpt, the number of the last update

Parameter i is the i-th that the modules register, which `names` lists. Nothing in the files is executed. tokenizer.pt
and scaler.pt are pickled objects and are not read: the tokenizer is also there in its own files, and bfloat16 needs no
loss scaling.
"""

import math
import os
import pathlib
from typing import Any

import numpy as np

from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.core.training_state import TrainingState
from lcx.convert.files import folders, torch_bin
from lcx.convert.hf.tensor_names import Renamed
from lcx.convert.two_mamba import layouts
from lcx.convert.two_mamba.family import ROTATION, TWO_MAMBA
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.model import Decoder
from lcx.rope_fields import is_number, shown

OPTIMIZER, SCHEDULER, CONFIG = "optimizer.pt", "scheduler.pt", "config.pt"
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
#: Names in config.pt -> ours.
_SETTINGS = {
    "learning_rate": "AdamW.learning_rate",
    "warmup_steps": "AdamW.warmup_steps",
    "num_steps": "Trainer.steps",
    "weight_decay": "AdamW.weight_decay",
    "clipping_value": "AdamW.clip_norm",
}


def read(folder: str | os.PathLike, model: Decoder) -> TrainingState:
    """The training state in a folder, for the model that the folder holds.

    Raises:
      UserError: optimizer.pt is missing or damaged, or is that of another model.
    """
    place = pathlib.Path(folder)
    path = folders.inside(place, OPTIMIZER)
    file = torch_bin.TorchFile(path, training_state=True, within=("state",), nested=True)
    group = _group(path)
    stored = _stored(path, file, group["params"], model)
    shapes = model_source.leaf_shapes(model)
    table = rules.Table(TWO_MAMBA.rules(model), shapes)
    moments = {}
    for name, theirs in MOMENTS.items():
        renamed = Renamed(file, {tensor: f"{i}.{theirs}" for tensor, i in stored.items()})
        moments[name] = layouts.Turned(renamed)
        table.check_source(moments[name].tensors, against=str(path))

    def moment(leaf: str, which: str) -> np.ndarray:
        whole = tuple(slice(0, size) for size in shapes[leaf])
        return table.read(moments[which], leaf, whole).astype(np.float32)

    updates = _updates(path, file, stored)
    step, settings = _run(place, group)
    rate = group.get("lr")
    next_rate = float(rate) if is_number(rate) else None
    return TrainingState(updates if step is None else step, updates, moment, settings, next_rate)


def names(model: Decoder) -> list[str]:
    """The tensors in the order in which the published modules register them, which numbers the optimizer's state."""
    found = ["model.embed_tokens.weight"]
    for i, layer in enumerate(model_lib.layers(model)):
        prefix, mixer = f"model.layers.{i}.", layer.block.mixer
        attention = layouts.rules(mixer, "", f"{prefix}self_attn.", layer.repeat)
        found += [f"{prefix}self_attn.{ROTATION}"] if isinstance(mixer, Attention) else []
        found += [rule.name for rule in attention]
        kinds = ("weight", "bias") if layer.block.mlp.bias else ("weight",)
        found += [f"{prefix}mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in kinds]
        found += [f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    return [*found, "model.norm.weight", *([] if model.tie_word_embeddings else ["lm_head.weight"])]


def _group(path: pathlib.Path) -> dict[str, Any]:
    groups = torch_bin.plain_values(path).get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise UserError(
            f"{path}: expected one entry of param_groups, as the published trainer has, in a dict"
        )
    ids = groups[0].get("params")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids) or len(set(ids)) != len(ids):
        raise UserError(
            f"{path}: param_groups has params {shown(ids)}, expected the numbers of the parameters"
        )
    return groups[0]


def _stored(path: pathlib.Path, file: torch_bin.TorchFile, ids: list[int], model: Decoder) -> dict[str, int]:
    """Tensor -> its number in the optimizer's state; the fixed frequencies of "softmax" have a number but no state."""
    every = names(model)
    trained = [name for name in every if not name.endswith(ROTATION)]
    order = next((known for known in (every, trained) if len(known) == len(ids)), None)
    if order is None:
        raise UserError(
            f"{path}: is the optimizer of {len(ids)} parameters, expected the model's {len(trained)}: it is of another "
            "model"
        )
    stored = {name: i for name, i in zip(order, ids, strict=True) if not name.endswith(ROTATION)}
    for name, i in stored.items():
        if missing := [key for key in ("step", *MOMENTS.values()) if f"{i}.{key}" not in file.tensors]:
            raise UserError(f"{path}: has no {missing[0]} of parameter {i}, {name}; save the run again")
    return stored


def _updates(path: pathlib.Path, file: torch_bin.TorchFile, stored: dict[str, int]) -> int:
    counts = {float(x) for i in stored.values() for x in file.read(f"{i}.step").reshape(-1)[:2]}
    count = counts.pop() if counts else math.nan
    if counts or not (math.isfinite(count) and count == int(count) and 0 <= count < 2**31):
        raise UserError(
            f"{path}: the parameters differ in their step, or it is no count; the file is damaged"
        )
    return int(count)


def _run(folder: pathlib.Path, group: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """(updates done, settings of the run), as far as config.pt and scheduler.pt state them."""
    found: dict[str, Any] = {}
    for key, ours in (("eps", "AdamW.eps"), ("weight_decay", "AdamW.weight_decay")):
        if key in group:
            found[ours] = group[key]
    if isinstance(group.get("betas"), tuple | list) and len(group["betas"]) == 2:
        found |= {"AdamW.b1": group["betas"][0], "AdamW.b2": group["betas"][1]}
    last = None
    for name, key in ((SCHEDULER, "last_epoch"), (CONFIG, "step_ckpt")):
        if not (folder / name).exists():
            continue
        values = torch_bin.plain_values(folders.inside(folder, name))
        if name == CONFIG:
            found |= {ours: values[theirs] for theirs, ours in _SETTINGS.items() if theirs in values}
        number = values.get(key)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise UserError(
                f"{folder / name}: {key} is {shown(number)}, expected the number of the last update"
            )
        last = number
    plain = {name: value for name, value in found.items() if value is None or is_number(value)}
    return None if last is None else last + 1, plain
