"""Records the base model of a PEFT adapter, including its RoPE scaling, in lcx_adapter.json and README.md.

PEFT records only the name of the base. An adapter that was trained on an extended model also depends on that model's
rotary embedding; on the base as stored, the same pairs would silently give different logits. lcx therefore writes the
scaling next to the adapter, in README.md for people and in lcx_adapter.json for itself:

    {"format": 1, "base_model_name_or_path": "...", "max_position_embeddings": 32768, "mixers": {"Attention": 32},
     "ropes": [{"head_dim": 128, "rope_type": "yarn", "factor": 4.0, ...}], "holds": "..."}
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx import mixers
from lcx import model as model_lib
from lcx.convert.files import folders
from lcx.convert.hf import text_part
from lcx.convert.hf.folder import CONFIG
from lcx.convert.hf.rope_parameters import to_hf, written_max_position_embeddings
from lcx.errors import UserError
from lcx.extend import rotaries
from lcx.model import Decoder
from lcx.rope import Rope

log = logging.getLogger(__name__)

FILE, README = "lcx_adapter.json", "README.md"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to.

    Attributes:
      name: a path or a name on the hub; None if unknown.
      model: the model that the adapter was trained on, with its context extended.
    """

    name: str | None
    model: Decoder


def mixer_kinds(model: Decoder) -> dict[str, int]:
    """Kind of mixer -> number of layers."""
    return dict(collections.Counter(mixers.kind(layer.block.mixer) for layer in model_lib.layers(model)))


def is_scaled(model: Decoder) -> bool:
    return any(rope.rope_type != "default" for rope, _ in rotaries(model))


def scaling(rope: Rope) -> dict[str, Any]:
    """The rope_scaling setting that turns the rotary embedding of the base into this one."""
    name = rope.rope_type if isinstance(rope.rope_type, str) else _function(rope)
    out: dict[str, Any] = {"rope_type": name, "rope_theta": rope.rope_theta}
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if field.name not in out and value != field.default:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def _function(rope: Rope) -> str:
    return f"{rope.rope_type.__module__}:{rope.rope_type.__qualname__}"


def lines(base: Base) -> list[str]:
    """Instructions for using the adapter, printed on the terminal."""
    found = [f"base: {base.name or 'unknown, set it with --base_model'}"]
    if base.name and _has_encoders(pathlib.Path(base.name).expanduser()):
        found.append(
            f"warning: {base.name} holds encoders beside the text model, and PEFT would not find the pairs' modules in "
            "it: write the text model alone (python -m lcx.convert --dst_format=hf), and set --base_model to it"
        )
    for rope, _ in rotaries(base.model) if is_scaled(base.model) else []:
        found.append(
            f"scaling: the base needs --rope_scaling='{json.dumps(scaling(rope))}' "
            f"--context_length={base.model.max_position_embeddings}"
        )
    if set(mixer_kinds(base.model)) != {"Attention"}:
        found.append(
            f"warning: the pairs were trained on {_listed(mixer_kinds(base.model))}, not on softmax attention: with "
            "PEFT on the softmax model of the same name, the logits are wrong"
        )
    return found


def _has_encoders(folder: pathlib.Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False  # a name on the hub, or a checkpoint of another kind
    return text_part.is_part(folders.read_json(folder / CONFIG))


def write(folder: pathlib.Path, base: Base, holds: str) -> None:
    """Writes both files into an adapter's folder."""
    folders.write_json(
        folder / FILE,
        {
            "format": _FORMAT,
            "base_model_name_or_path": base.name,
            "max_position_embeddings": base.model.max_position_embeddings,
            "mixers": mixer_kinds(base.model),
            "ropes": [{"head_dim": head_dim, **scaling(rope)} for rope, head_dim in rotaries(base.model)],
            "holds": holds,
        },
    )
    folders.write_bytes(folder / README, _readme(folder, base, holds).encode())


def _readme(folder: pathlib.Path, base: Base, holds: str) -> str:
    name = base.name or "PATH_OF_THE_BASE"
    head = [
        "---",
        f"base_model: {json.dumps(name)}",
        "library_name: peft",
        "tags: [lora]",
        "---",
        "",
        holds,
        "",
    ]
    for line in lines(base):
        head += [line, ""]
    keywords, flags = "", ""
    for rope, head_dim in rotaries(base.model) if is_scaled(base.model) else []:
        window = base.model.max_position_embeddings
        flags = f" --rope_scaling='{json.dumps(scaling(rope))}' --context_length={window}"
        try:
            length = written_max_position_embeddings(rope, window)
            given = to_hf(rope, max_position_embeddings=length, head_dim=head_dim)
            keywords = f", rope_parameters={given!r}, max_position_embeddings={length}"
        except UserError as error:
            head += [f"transformers cannot express this scaling: {error}", ""]
    use = [
        "With transformers and PEFT:",
        "",
        "```python",
        f"base = AutoModelForCausalLM.from_pretrained({name!r}{keywords})",
        "model = PeftModel.from_pretrained(base, 'PATH_OF_THIS_FOLDER')",
        "```",
        "",
        "With lcx:",
        "",
        "```bash",
        f"python -m lcx.generate --checkpoint={name} --adapter=PATH_OF_THIS_FOLDER{flags} --prompt='Once upon a time'",
        "```",
        "",
    ]
    return "\n".join(head + use)


# ------------------------------------------------------------------------------------------------ checking


def check(path: str | os.PathLike, model: Decoder, *, scaled: bool) -> None:
    """Compares the model that an adapter is used on with the one it was trained on, if the adapter records it.

    Args:
      scaled: whether the user chose the scaling; a mismatch is then only a warning.

    Raises:
      UserError: the scaling or the kinds of attention differ, or lcx_adapter.json is damaged.
    """
    folder = pathlib.Path(path).expanduser()
    if not os.path.lexists(folder / FILE):
        return
    record = folders.read_json(folders.inside(folder, FILE))
    if record.get("format") != _FORMAT or not isinstance(record.get("ropes"), list):
        raise UserError(
            f"{folder}: {FILE} has format {record.get('format')!r:.40}, expected {_FORMAT} and a list of ropes"
        )
    kinds = record.get("mixers")
    if kinds != mixer_kinds(model):
        raise UserError(
            f"{folder}: the adapter trained on {_listed(kinds)}, and this model has {_listed(mixer_kinds(model))}: use "
            f"it on its own base, {record.get('base_model_name_or_path')!r:.200}"
        )
    needed = [_rope(folder, entry) for entry in record["ropes"]]
    window = record.get("max_position_embeddings")
    if not isinstance(window, int) or isinstance(window, bool) or not 0 < window < 2**40:
        raise UserError(
            f"{folder}: {FILE} has max_position_embeddings {window!r:.40}, expected a number of tokens"
        )
    if _agree(needed, rotaries(model), window):
        return
    flags = " and ".join(f"rope_scaling='{json.dumps(entry)}'" for entry, _, _ in needed) or "no rope_scaling"
    own = ", ".join(json.dumps(scaling(rope)) for rope, _ in rotaries(model))
    found = f"{folder}: the adapter trained on a model with another rotary embedding than this one's {own}"
    if not scaled:
        raise UserError(f"{found}, so its logits would be wrong: pass {flags}, context_length={window}")
    log.warning("%s: expect other results than with %s, context_length=%d", found, flags, window)


_Needed = tuple[dict[str, Any], Rope | None, int]


def _rope(folder: pathlib.Path, entry: Any) -> _Needed:
    """(the rope_scaling, the Rope or None for a custom function, head_dim)."""
    if not isinstance(entry, dict):
        raise UserError(f"{folder}: {FILE} has the rope {entry!r:.60}, expected an object")
    given = {key: value for key, value in entry.items() if key != "head_dim"}
    head_dim, fields = entry.get("head_dim"), {field.name for field in dataclasses.fields(Rope)}
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or not 0 < head_dim < 2**16:
        raise UserError(f"{folder}: {FILE} has head_dim {head_dim!r:.40}, expected an integer")
    if not isinstance(given.get("rope_type"), str) or not given.keys() <= fields:
        raise UserError(
            f"{folder}: {FILE} has a rope with the keys {sorted(given)!r:.200}, expected those of a rope"
        )
    if ":" in given["rope_type"]:
        return given, None, head_dim
    try:
        return given, Rope(**given), head_dim
    except UserError as error:
        raise UserError(f"{folder}: {FILE} has a rope whose {error}") from error


def _agree(needed: list[_Needed], own: list[mixers.Rotary], window: int) -> bool:
    if len(needed) != len(own):
        return False
    for (given, rope, head_dim), (have, size) in zip(needed, own, strict=True):
        if head_dim != size:
            return False
        if rope is None or not isinstance(have.rope_type, str):
            if given != scaling(have):
                return False
            continue
        if not all(_turn_alike(rope, have, size, length) for length in (1, window)):
            return False
    return True


def _turn_alike(needed: Rope, have: Rope, head_dim: int, length: int) -> bool:
    try:
        with np.errstate(all="ignore"):
            inv_freq, attention_scaling = needed.frequencies(head_dim, length)
    except (ArithmeticError, ValueError) as error:
        raise UserError(f"{FILE} has a rope that cannot be computed: {error}; correct it") from error
    own, own_scaling = have.frequencies(head_dim, length)
    same = np.shape(inv_freq) == np.shape(own) and np.allclose(inv_freq, own, rtol=1e-6, atol=0)
    return bool(same) and abs(attention_scaling - own_scaling) <= 1e-6


def _listed(kinds: Mapping[str, int] | Any) -> str:
    if not isinstance(kinds, dict):
        return f"{kinds!r:.60}"
    return ", ".join(f"{count!s:.12} {name!s:.60}" for name, count in list(kinds.items())[:6])
