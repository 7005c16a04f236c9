"""Writes optimizer.pt and scheduler.pt, with which the published trainer continues a run of lcx.

They are those of a trainer that stopped after as many updates; `training_state` describes them and reads them again.
tokenizer.pt and scaler.pt are not written: they are pickled objects, and bfloat16 needs no loss scaling.
"""

import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lcx.convert.core import rules
from lcx.convert.core.training_state import StoredRun
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_writer import TorchWriter
from lcx.convert.two_mamba import layouts, settings_writer
from lcx.convert.two_mamba.family import ROTATION
from lcx.convert.two_mamba.training_state import MOMENTS, OPTIMIZER, SCHEDULER, names
from lcx.model import Decoder
from lcx.optim import AdamW

log = logging.getLogger(__name__)

_FLOAT32 = np.dtype(np.float32)
#: What the published schedule is, by the fields of AdamW that could make another one.
_SCHEDULE = {"schedule": "linear", "lag": 1, "final_fraction": 0.0, "warmup_from": 0.0}


def write(
    folder: pathlib.Path, run: StoredRun, model: Decoder, table: rules.Table, progress: Callable[[int], None]
) -> bool:
    """Writes both files, holding one tensor in memory; a line says what the published trainer does otherwise.

    `progress` is called with the bytes of each moment. Returns whether they were written; if not, a line says why.
    """
    if why := _unwritable(run):
        log.warning("the optimizer is not written: %s", why)
        return False
    for line in _differences(run, list(table.shapes)):
        log.warning("%s", line)
    every = names(model)
    _write_optimizer(folder / OPTIMIZER, run, table, every, progress)
    import torch

    torch.save(_states(run)[1], folder / SCHEDULER)
    return True


def _unwritable(run: StoredRun) -> str | None:
    if run.step < 1:
        return "no update has been done"
    if not settings_writer.has_torch():
        return settings_writer.NEEDS_TORCH
    return None


def _differences(run: StoredRun, paths: list[str]) -> list[str]:
    """One line for each setting of the run that the published trainer would not follow."""
    found = {name: getattr(run.optimizer, name) for name in _SCHEDULE}
    lines = [
        f"this run has AdamW.{name} = {found[name]!r}; the published trainer goes on with {published!r}"
        for name, published in _SCHEDULE.items()
        if found[name] != published
    ]
    kept = [path for path in paths if not re.search(run.optimizer.decay, f"params/{path}")]
    if run.optimizer.weight_decay and kept:
        lines.append(
            f"this run decays {len(paths) - len(kept)} of {len(paths)} parameters (AdamW.decay); the published "
            "trainer decays all"
        )
    return lines


def _write_optimizer(
    path: pathlib.Path,
    run: StoredRun,
    table: rules.Table,
    every: list[str],
    progress: Callable[[int], None],
) -> None:
    numbers = {name: i for i, name in enumerate(every) if not name.endswith(ROTATION)}
    tensors: dict[str, TensorInfo] = {}
    for name, i in numbers.items():
        tensors[f"{i}.step"] = TensorInfo(_FLOAT32, ())
        info = layouts.turned(name, TensorInfo(_FLOAT32, table.foreign_shapes[name]))
        tensors |= {f"{i}.{theirs}": info for theirs in MOMENTS.values()}
    group = _states(run)[0] | {"params": list(range(len(every)))}
    file = TorchWriter(path, tensors, under="state", nested=True, beside={"param_groups": [group]})
    try:
        for name, i in numbers.items():
            file.write(f"{i}.step", 0, np.asarray(run.updates, _FLOAT32))
            for which, theirs in MOMENTS.items():
                moment = np.concatenate([np.atleast_1d(part) for part in _parts(run, table, name, which)])
                moment = rules.transpose(moment) if name.endswith(layouts.TURNED) else moment
                file.write(f"{i}.{theirs}", 0, moment.reshape(tensors[f"{i}.{theirs}"].shape))
                progress(moment.nbytes)
        file.finish()
    finally:
        file.close()


def _parts(run: StoredRun, table: rules.Table, name: str, which: str) -> Iterator[np.ndarray]:
    def read(path: str, repeat: int | None) -> np.ndarray:
        whole = tuple(slice(0, size) for size in table.shapes[path])
        if repeat is None:
            return run.moment(which, path, whole)
        return run.moment(which, path, (slice(repeat, repeat + 1), *whole[1:]))[0]

    return table.foreign_parts(name, read)


def _states(run: StoredRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the entry of the optimizer's param_groups but for `params`, the schedule's state), as this torch writes them."""
    import torch

    adam: AdamW = run.optimizer
    made = torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(()))],
        lr=adam.peak,
        betas=(adam.b1, adam.b2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0).state_dict()
    group = made.state_dict()["param_groups"][0] | {"lr": run.next_rate}
    return group, schedule | {
        "last_epoch": run.step - 1,
        "_step_count": run.step + 1,
        "_last_lr": [run.next_rate],
    }
