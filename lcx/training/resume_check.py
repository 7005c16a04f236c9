"""What a run began with, as its checkpoints record it: a workdir goes on only with the settings that began it.

What a resumed run may change, such as steps, batch size or optimizer, is compared too, and a change is stated.
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from lcx import hub, moved
from lcx.checkpoint import model_json
from lcx.errors import UserError
from lcx.linearize import Linearize
from lcx.lora import LoRA
from lcx.model import Decoder

log = logging.getLogger(__name__)

_FREE = ("dtype", "remat", "implementation")  # how, not what, a model computes
_CHANGEABLE = ("steps", "batch_size", "accumulation", "optimizer", "objective", "mesh", "dtype", "remat")


def record(
    *,
    model: Decoder | None,
    init_from: str | None,
    rope_scaling: Mapping[str, Any] | None,
    context_length: int | None,
    linearize: Linearize | None,
    lora: LoRA | None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """The settings as JSON."""
    started = {} if adapter is None else {"adapter": True}  # a run that goes on does not read it again
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
    """A line for every setting that is not what the run had before."""
    recorded, now, lines = _today(recorded), _today(now), list[str]()
    for name in now:
        if name in recorded and recorded[name] != now[name]:
            path, old, new = _difference(recorded[name], now[name], f"Trainer.{name}")
            lines.append(f"{path} is {_brief(new)} from here on, and was {_brief(old)} before")
    return lines


def check(recorded: Mapping[str, Any], now: Mapping[str, Any], workdir: str) -> None:
    """Compares what the checkpoint in the workdir records with the settings of now.

    Another init_from is a warning: folders are moved, and a run that goes on reads its own checkpoint only.

    Raises:
      UserError: another model, scaling or LoRA; it names the first setting that differs.
    """
    recorded, now = _today(recorded), _today(now)
    place = {"init_from": now["init_from"]}
    if {**recorded, **place} != now:
        path, old, new = _difference({**recorded, **place}, now, "Trainer")
        raise UserError(
            f"{workdir} holds a run that began with {path} = {_brief(old)}, found {_brief(new)}: "
            "set it back, or set another --workdir"
        )
    if recorded["init_from"] != now["init_from"]:
        log.warning(
            "%s goes on with a run that began with %s; init_from %s is not read",
            workdir,
            recorded["init_from"],
            now["init_from"],
        )


def _today(value: Any) -> Any:
    """A record with the classes and functions as they are called now."""
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
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new}, key=lambda key: isinstance(old.get(key), dict | list))  # plain ones first
        key = next(key for key in keys if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), path if key == model_json.TUPLE else f"{path}.{key}")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        a, b = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
        return _difference(a, b, path)
    return path, old, new


def _brief(value: Any) -> str:
    """A plain value, a class with its plain fields, the length of a list. What is at its default is not recorded."""
    if isinstance(value, Mapping):
        plain = {k: v for k, v in value.items() if k != model_json.CLASS and not isinstance(v, dict | list)}
        name = value.get(model_json.CLASS, "").rpartition(":")[2]
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"
    if isinstance(value, list):
        return f"{len(value)} of them"
    return "the default" if value is None else repr(value)


def keep_config(folder: pathlib.Path, text: str) -> None:
    """Writes config.gin; one that says something else is kept as config.1.gin, config.2.gin, ..."""
    config = folder / "config.gin"
    if not text or (config.exists() and config.read_text() == text):
        return
    (folder / "config.gin.new").write_text(text)
    if config.exists():
        number = next(i for i in range(1, 1 << 30) if not (folder / f"config.{i}.gin").exists())
        config.rename(folder / f"config.{number}.gin")
    (folder / "config.gin.new").rename(config)
