"""The text model of a folder that also holds an encoder of images or sounds, as Gemma 3 and Llama 4 are published.

config.json of such a folder has the settings of the text model in `text_config`. The tensors of the text model have one
of two prefixes, and all others belong to the encoders:

    language_model.model.X, language_model.lm_head.weight        Gemma 3, Llama 4, Mistral Small 3.1
    model.language_model.X, lm_head.weight                       Gemma 4, and as transformers 5 names its modules

What is read is the text model alone, with the model_type of text_config; it is written back as such.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from lcx.convert.files.tensor_io import TensorSource
from lcx.convert.hf.families.wholes import WHOLES, Whole
from lcx.convert.hf.family import Family
from lcx.convert.hf.tensor_names import Renamed, without_wrappers
from lcx.errors import UserError
from lcx.rope_fields import shown

log = logging.getLogger(__name__)

_TEXT, _TIED, _HEAD = "text_config", "tie_word_embeddings", "lm_head.weight"
#: What the outer object of config.json says of the text model as well. It takes precedence.
_SHARED = (
    _TIED, "dtype", "torch_dtype", "quantization_config", "compression_config", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
_BODY = re.compile(r"(?:language_model\.model|model\.language_model)\.")
_OUTER_HEAD = f"language_model.{_HEAD}"


def is_part(config: Mapping[str, Any]) -> bool:
    """Whether the text model is a part of what a config.json describes."""
    return _whole(config) is not None


def config_of(
    config: Mapping[str, Any], names: Collection[str] | None = None, *, own: Family | None = None
) -> Mapping[str, Any]:
    """The settings of the text model: those of `text_config` where model_type is one of `WHOLES`, else all.

    Args:
      names: of the stored tensors. They tell whether the output head is the embedding, where config.json does not.
      own: the user's own family, which reads folders of its model_type whole.

    Raises:
      UserError: other architectures than the language model, or no text_config.
    """
    whole = _whole(config, own)
    if whole is None:
        return config
    architectures = config.get("architectures") or [whole.architecture]
    if architectures != [whole.architecture]:
        raise UserError(
            f"config.json has architectures {shown(architectures)}, expected [{whole.architecture!r}]: its text model "
            "is read"
        )
    text = config.get(_TEXT)
    if not isinstance(text, Mapping):
        raise UserError(
            f"config.json has {_TEXT} = {shown(text, 60)}, expected the settings of the text model of "
            f"{config['model_type']!r}"
        )
    tied = whole.tied if names is None else not {_HEAD, _OUTER_HEAD} & {without_wrappers(x) for x in names}
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
    stored = {key: value for key, value in text.items() if key != "architectures"}
    return {"model_type": whole.text, **dict(whole.defaults), **stored, _TIED: tied, **shared}


def tensors_of(
    source: TensorSource, config: Mapping[str, Any], where: str, *, own: Family | None = None
) -> TensorSource:
    """The tensors of the text model, under the names of a folder of text alone; logs what is left out.

    Args:
      config: the whole config.json.
      own: as in `config_of`.
    """
    if _whole(config, own) is None:
        return source
    names, left = {}, {}
    for stored in source.tensors:
        name = without_wrappers(stored)
        if found := _BODY.match(name):
            names[f"model.{name[found.end() :]}"] = stored
        elif name in (_HEAD, _OUTER_HEAD):
            names[_HEAD] = stored
        else:
            parts = name.split(".")
            left[parts[1] if parts[0] == "model" and len(parts) > 2 else parts[0]] = stored
    if left:
        log.warning(
            "%s: the text model of %r is read; left out are %d tensors of %s",
            where, config["model_type"], len(source.tensors) - len(names), ", ".join(sorted(left)),
        )  # fmt: skip
    return Renamed(source, names)


def _whole(config: Mapping[str, Any], own: Family | None = None) -> Whole | None:
    model_type = config.get("model_type")
    if own is not None and own.model_type == model_type:
        return None
    return WHOLES.get(model_type) if isinstance(model_type, str) else None
