"""The optimizer's state of a run, as a step of its workdir holds it, for a format that stores one beside the model."""

import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.checkpoint import model_json
from lcx.checkpoint.folder import read_json, read_record
from lcx.checkpoint.slices import StepReader
from lcx.convert.core import rules
from lcx.convert.core.training_state import StoredRun
from lcx.errors import UserError

log = logging.getLogger(__name__)

OPTIMIZER, SETTINGS = "opt_state", "settings"
_WHICH = {"mu": "first", "nu": "second"}
_MOMENT = re.compile(r"(.*)/(mu|nu)/params/(.+)")


def read(step_folder: pathlib.Path, leaves: Mapping[str, Any]) -> StoredRun | None:
    """What a step holds of its run's optimizer; None if it holds none, or not that of every parameter in `leaves`.

    A line says so in the second case.

    Raises:
      UserError: the settings of the run are damaged.
    """
    arrays = read_record(step_folder).arrays.get(OPTIMIZER)
    if not arrays:
        return None
    found = {key: match for key in arrays if (match := _MOMENT.fullmatch(key))}
    keys = {(_WHICH[match[2]], match[3]): tuple(key.split("/")) for key, match in found.items()}
    missing = [path for path in leaves for which in _WHICH.values() if (which, path) not in keys]
    adam = {match[1] for match in found.values()}
    counts = [key for key in arrays if key.rpartition("/")[2] == "count"]
    own = [key for key in counts if key.rpartition("/")[0] in adam]
    others = [key for key in counts if key not in own]
    if missing or len(own) != 1 or len(others) != 1:
        why = f"it has none for {missing[0]}" if missing else "its schedule is of another kind"
        log.warning("%s: the optimizer is not written: %s", step_folder, why)
        return None
    reader, settings = StepReader(step_folder, OPTIMIZER), read_json(step_folder, SETTINGS)
    updates, step = (int(reader.read(tuple(key.split("/")))) for key in (own[0], others[0]))
    try:
        optimizer, steps = model_json.from_json(settings["optimizer"]), int(settings["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{step_folder}: its settings are not readable ({error}); use another step") from None

    def moment(which: str, path: str, index: rules.Index) -> np.ndarray:
        return reader.read(keys[which, path], index).astype(np.float32)

    return StoredRun(step, updates, steps, optimizer, settings.get("dtype"), moment)
