"""Checks that a workdir is resumed only with the settings that its run started with, as its checkpoints record them.

Settings that a resumed run may change, such as steps, batch size or optimizer, are compared as well; each change is
reported.
"""

import logging
from collections.abc import Mapping
from typing import Any

from lcx import hub, moved
from lcx.checkpoint import model_json
from lcx.errors import UserError
from lcx.linearize import Linearize
from lcx.lora import LoRA
from lcx.model import Decoder

log = logging.getLogger(__name__)

_FREE = ("dtype", "remat", "implementation")  # change how a model computes, not which function
_CHANGEABLE = (
    *("steps", "stop_at", "batch_size", "accumulation", "piece_length", "carry", "borders", "optimizer", "objective"),
    *("mesh", "dtype", "remat"),
)


def record(
    *,
    model: Decoder | None,
    init_from: str | None,
    rope_scaling: Mapping[str, Any] | None,
    context_length: int | None,
    linearize: Linearize | None,
    lora: LoRA | None,
    adapter: str | None = None,
    stateful_rows: int = 0,
) -> dict[str, Any]:
    """The settings that a run starts with and that may not change later, as JSON.

    stateful_rows: rows of a batch that continue those of the batch before; 0: rows do not.
    """
    # Only whether there was an adapter: a resumed run reads the adapter's weights from its own checkpoint.
    started: dict[str, Any] = {} if adapter is None else {"adapter": True}
    if stateful_rows:
        started |= {"stateful": True, "batch_size": stateful_rows}
    scaling = {key: model_json.to_json(value) for key, value in (rope_scaling or {}).items()}
    return {
        "model": _without_free(model_json.to_json(model)),
        "init_from": init_from and hub.place(init_from),
        "rope_scaling": scaling,
        "context_length": context_length,
        "linearize": model_json.to_json(linearize),
        "lora": model_json.to_json(lora),
        **started,
    }


def changeable(trainer: Any) -> dict[str, Any]:
    """The settings that a resumed run may change, as JSON."""
    return {name: model_json.to_json(getattr(trainer, name)) for name in _CHANGEABLE}


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs from that of the run's last checkpoint."""
    recorded, now, lines = _today(recorded), _today(now), list[str]()
    for name in now:
        if name in recorded and recorded[name] != now[name]:
            path, old, new = _difference(recorded[name], now[name], f"Trainer.{name}")
            lines.append(f"{path} changes from {_brief(old)} to {_brief(new)}")
    return lines


def check(recorded: Mapping[str, Any], now: Mapping[str, Any], workdir: str) -> None:
    """Compares the settings recorded in the workdir's checkpoint with the current ones.

    A different init_from is only a warning: the folder may have been moved, and a resumed run reads its weights from
    its own checkpoint.

    Raises:
      UserError: the model, scaling, LoRA or another setting that may not change differs. The message names the first.
    """
    recorded, now = _today(recorded), _today(now)
    place = {"init_from": now["init_from"]}
    if {**recorded, **place} != now:
        path, old, new = _difference({**recorded, **place}, now, "Trainer")
        raise UserError(
            f"{workdir} holds a run that started with {path} = {_brief(old)}, found {_brief(new)}: "
            "set it back, or set another --workdir"
        )
    if recorded["init_from"] != now["init_from"]:
        log.warning(
            "resuming the run in %s, which started from %s; init_from %s is ignored",
            workdir,
            recorded["init_from"],
            now["init_from"],
        )


def _today(value: Any) -> Any:
    """A record in which classes and functions that have moved have their current names."""
    if isinstance(value, Mapping):
        names = (model_json.CLASS, model_json.FUNCTION)
        return {
            key: moved.today(item) if key in names and isinstance(item, str) else _today(item)
            for key, item in value.items()
        }
    return [_today(item) for item in value] if isinstance(value, list) else value


def _without_free(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_free(item) for key, item in value.items() if key not in _FREE}
    return [_without_free(item) for item in value] if isinstance(value, list) else value


def _difference(old: Any, new: Any, path: str) -> tuple[str, Any, Any]:
    """(dotted path, old value, new value) of the first difference between two records."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # Plain values before nested ones: they give the clearest message.
        keys = sorted(dict.fromkeys([*old, *new]), key=lambda key: isinstance(old.get(key), dict | list))
        key = next(key for key in keys if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), path if key == model_json.TUPLE else f"{path}.{key}")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        a, b = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
        return _difference(a, b, path)
    return path, old, new


def _brief(value: Any) -> str:
    """A value for a message: a plain value, a class with its plain fields, or the length of a list.

    None stands for a field at its default, which is not recorded.
    """
    if isinstance(value, Mapping):
        plain = {k: v for k, v in value.items() if k != model_json.CLASS and not isinstance(v, dict | list)}
        name = value.get(model_json.CLASS, "").rpartition(":")[2]
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "the default" if value is None else repr(value)
