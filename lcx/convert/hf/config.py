"""config.json <-> the lcx model: the part that is common to all families; the rest is in `families`.

Reading rejects what it cannot honour: a key that changes what the model computes is an error, never ignored.
Writing uses both spellings of the rotary settings (`rope`), because transformers 4 silently reads a file that has only
the new spelling as a model with rope_theta 10000 and no scaling.
"""

import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Any

from lcx.convert.core import model_source, rules
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import families, rope_parameters, text_part
from lcx.convert.hf.families.missing import MISSING
from lcx.convert.hf.family import Family
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.rope import Rope
from lcx.rope_fields import is_number, shown

log = logging.getLogger(__name__)

_NAMES = ("architectures", "model_type")  # keys that name the family
#: Training, generation and bookkeeping settings that the Decoder does not hold. They are kept aside (`carried`) and
#: passed back to `to_config`.
CARRIED = (
    "attention_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
#: Keys that do not affect what the model computes, in addition to those that start with an underscore.
_HARMLESS = {
    *CARRIED, "attn_implementation", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
    "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "pretraining_tp",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
    "chunk_size_feed_forward", "problem_type", "tokenizer_class", "is_decoder", "decoder_start_token_id",
    "tie_encoder_decoder", "encoder_no_repeat_ngram_size", "diversity_penalty",
}  # fmt: skip
#: Other unknown keys are ignored with a warning. A key that matches this pattern is an error instead, unless its value
#: switches it off, because its name suggests that it changes what the model computes.
_SUSPICIOUS = re.compile(
    r"soft_?cap|multiplier|logit|expert|moe|quant|interleav|qk_|norm|scal|alibi|sink|clip|residual|parallel"
    r"|chunk|lora|adapt[eo]r|activation|act_fn|bidirection|causal|encoder|cross|rope|rotary|window|sliding"
    r"|attention|attn|bias|mask|head|gate|gating|sparse|mtp|nextn|predict|mup|embed|position|mamba|hybrid"
    r"|vision|audio",
    re.IGNORECASE,
)
_FACTOR = re.compile(r"multiplier|scal|factor|mod$", re.IGNORECASE)  # factors: the value 1 switches them off


def from_config(
    config: Mapping[str, Any], *, dtype: str = "float32", family: Family | None = None
) -> Decoder:
    """The model that config.json describes.

    Args:
      dtype: dtype of the computation.
      family: the user's own family, used if the model_type is its own.

    Raises:
      UserError: an unsupported model_type or setting, or a missing or malformed value.
    """
    config = text_part.config_of(config, own=family)
    found = family_of(config, family)
    architectures = config.get("architectures") or [found.architecture]
    if architectures != [found.architecture]:
        raise UserError(
            f"config.json has architectures {shown(architectures)}, expected [{found.architecture!r}]: a language "
            "model"
        )
    _refuse_unknown(config, found)
    _check_carried(config)
    return found.model(config, dtype=dtype)


def family_of(config: Mapping[str, Any], own: Family | None = None) -> Family:
    """The family of a config.json. Raises UserError for a model_type without a family."""
    model_type = config.get("model_type")
    found = families.find(model_type, own)
    if found is None:
        missing = MISSING.get(model_type) if isinstance(model_type, str) else None
        needs = f"which needs {missing}; " if missing else ""
        raise UserError(
            f"config.json has model_type {shown(model_type)}, {needs}supported are "
            f"{', '.join(families.FAMILIES)}, and the text models of {', '.join(text_part.WHOLES)}"
        )
    return found


def fitting(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[Family]:
    """The other families that fit both the settings of a config.json and the tensors; none if its own fits too."""
    found: list[Family] = []
    own = families.find(config.get("model_type"))
    for family in sorted(families.FAMILIES.values(), key=lambda family: family is not own):
        with contextlib.suppress(UserError):
            model = family.model({**config, "model_type": family.model_type}, dtype="float32")
            table = rules.Table(family.rules(model), model_source.leaf_shapes(model))
            table.check_source(tensors, harmless=(*family.buffers, re.escape(family.head)))
            if family is own:
                return []
            found.append(family)
    return found


def rope_from_config(config: Mapping[str, Any], *, layer_type: str | None = None) -> Rope:
    """The Rope of a config.json, as its family reads it: see `rope_parameters.read`."""
    family = families.find(config.get("model_type"))
    dialect = rope_parameters.RopeDialect() if family is None else family.rope
    return rope_parameters.read(config, dialect, layer_type=layer_type)


def _refuse_unknown(config: Mapping[str, Any], family: Family) -> None:
    unknown = {key: value for key, value in config.items() if not _has_no_effect(family, key, value)}
    for key, value in unknown.items():
        if _SUSPICIOUS.search(key):
            raise UserError(
                f"config.json has {shown(key)[1:-1]} = {shown(value, 60)}, which would change the model and is not "
                "supported; if it has no effect, remove the key"
            )
    if unknown:
        log.warning(
            "config.json: ignoring unrecognised keys %s",
            ", ".join(shown(key, 40)[1:-1] for key in sorted(unknown)),
        )
    dropouts = [key for key in CARRIED if "drop" in key and config.get(key)]
    if dropouts:
        log.warning("config.json: %s is not applied, training here has no dropout", ", ".join(dropouts))


def _check_carried(config: Mapping[str, Any]) -> None:
    """Raises UserError for malformed carried settings, which a reader of the written config.json would reject."""
    for key in CARRIED:
        value = config.get(key)
        if key.endswith("token_id"):
            ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
            right = ids == [None] or all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        else:
            right = value is None or (is_number(value) and value >= 0)
        if not right:
            expected = "an id, or null" if key.endswith("token_id") else "a number of at least 0"
            raise UserError(f"config.json has {key} = {shown(value)}, expected {expected}")


def _has_no_effect(family: Family, key: str, value: Any) -> bool:
    if key in family.keys or key in _NAMES or key in _HARMLESS or key.startswith("_") or not value:
        return True
    if isinstance(value, bool):
        return key in ("is_causal", "causal")
    return value == 1 and _FACTOR.search(key) is not None


def to_config(
    model: Decoder, *, dtype: str, carried: Mapping[str, Any] | None = None, family: Family | None = None
) -> dict[str, Any]:
    """config.json of a model.

    Args:
      dtype: dtype of the weights next to it.
      carried: values of `CARRIED` keys (token ids and the like) from the folder or tokenizer that the model
        came with.
      family: the user's own family, used if the model_type is its own.

    Raises:
      UserError: the model has a property that its model_type cannot express.
    """
    if family is not None and family.model_type != model.model_type:
        raise UserError(
            f"the model has model_type {model.model_type!r} and the family of the format {family.model_type!r}: choose"
            f" a format of that model_type, or change the model's (model.clone(model_type={family.model_type!r}))"
        )
    found = families.find(model.model_type, family)
    if found is None:
        raise UserError(
            f"the model has model_type {model.model_type!r}; the 'hf' format supports {', '.join(families.FAMILIES)}"
        )
    try:
        config = found.config(model, dtype=dtype)
    except UserError as error:
        raise UserError(f"{error}{_alternatives(model)}") from error
    # null if unknown: without the key, transformers would assume its own default token ids
    config |= dict.fromkeys(key for key in CARRIED if key.endswith("token_id"))
    known = {key: value for key, value in (carried or {}).items() if key in CARRIED}
    if isinstance(known.get("initializer_range"), int):
        known["initializer_range"] = float(known["initializer_range"])  # transformers 5 rejects integers here
    return config | known


def _alternatives(model: Decoder) -> str:
    """Other families that can express the model, as the end of an error message."""
    able = []
    for family in families.FAMILIES.values():
        with contextlib.suppress(UserError):
            family.config(model.clone(model_type=family.model_type, parent=None), dtype="float32")
            able.append(repr(family.model_type))
    return f", or change model_type to {' or '.join(able)}" if able else ""
