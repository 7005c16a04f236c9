"""config.json of the Llama family <-> the lcx model.

Reading refuses what it cannot honour: a key that changes what the model computes is an error, never ignored.
Writing uses both spellings of the rotary settings (`hf_rope`), since transformers 4 reads a file with only the new one
without any complaint, as a model with theta 10000 and no scaling.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lcx.convert.hf import rope as hf_rope
from lcx.convert.hf.llama import FAMILIES, Family, Layer, layers
from lcx.convert.hf.rope_parameters import written_max_position_embeddings
from lcx.errors import UserError
from lcx.llama import llama
from lcx.model import Decoder
from lcx.rope_fields import is_number, shown

log = logging.getLogger(__name__)

_MOST = 10_000  # layers, head_dim: a damaged file must not build a huge model before its tensors are compared

#: Read here or in lcx.rope.
_USED = {
    "architectures", "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
    "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size", hf_rope.REMEMBERED,
}  # fmt: skip
#: Settings of training, generation or bookkeeping that the Decoder does not hold; `to_config` takes them
#: back.
CARRIED = (
    "attention_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
#: Keys without influence on the function, beside those that start with an underscore.
_HARMLESS = {
    *CARRIED, "attn_implementation", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
    "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "pretraining_tp",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
    "chunk_size_feed_forward", "problem_type", "tokenizer_class", "is_decoder", "decoder_start_token_id",
    "tie_encoder_decoder", "encoder_no_repeat_ngram_size", "diversity_penalty",
}  # fmt: skip
#: Other keys are stated and left, but not one that sounds like a change of the function, unless it is
#: switched off.
_SUSPICIOUS = re.compile(
    r"soft_?cap|multiplier|logit|expert|moe|quant|interleav|qk_|norm|scal|alibi|sink|clip|residual|parallel"
    r"|chunk|lora|adapt[eo]r|activation|act_fn|bidirection|causal|encoder|cross|rope|rotary|window|sliding"
    r"|attention|attn|bias|mask|head|gate|gating|sparse|mtp|nextn|predict|mup|embed|position|mamba|hybrid"
    r"|vision|audio",
    re.IGNORECASE,
)
_FACTOR = re.compile(r"multiplier|scal|factor|mod$", re.IGNORECASE)  # switched off by 1


def from_config(config: Mapping[str, Any], *, dtype: str = "float32") -> Decoder:
    """The model that config.json describes.

    Raises:
      UserError: an unsupported model_type or setting, a missing or malformed value.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type {shown(model_type)}, supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    _refuse_unsupported(config, family)
    _check_carried(config)
    sizes = _sizes(config, family)
    rope = hf_rope.read(config, family, sizes.head_dim)
    biased = family.biases == "config" and _boolean(config, "attention_bias")
    return llama(
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=_integer(config, "hidden_size"),
        intermediate_size=_integer(config, "intermediate_size"),
        max_position_embeddings=hf_rope.window(rope, _integer(config, "max_position_embeddings")),
        rope=rope,
        layer_windows=_windows(config, family, sizes.num_layers),
        qkv_bias=biased or family.biases == "qkv",
        o_bias=biased,
        qk_norm=family.qk_norm,
        mlp_bias=family.mlp_bias and _boolean(config, "mlp_bias"),
        norm_eps=_number(config, "rms_norm_eps", family.norm_eps),
        tie_word_embeddings=_boolean(config, "tie_word_embeddings"),
        dtype=dtype,
        model_type=model_type,
    )


class _Sizes(NamedTuple):
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _sizes(config: Mapping[str, Any], family: Family) -> _Sizes:
    hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads", family.num_kv_heads or num_heads)
    head_dim = _integer(config, "head_dim", family.head_dim or hidden_size // num_heads)
    num_layers = _integer(config, "num_hidden_layers")
    if num_heads % num_kv_heads:
        raise UserError(
            f"config.json has num_attention_heads {num_heads}, expected a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    if not config.get("head_dim") and not family.head_dim and hidden_size % num_heads:
        raise UserError(
            f"config.json has hidden_size {hidden_size}, expected a multiple of num_attention_heads "
            f"{num_heads}"
        )
    if max(num_layers, head_dim) > _MOST:
        raise UserError(
            f"config.json has {num_layers} layers and head_dim {head_dim}, expected at most {_MOST}"
        )
    return _Sizes(num_layers, num_heads, num_kv_heads, head_dim)


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"config.json has architectures {shown(architectures)}, expected [{family.architecture!r}]: a language "
            "model"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"config.json has hidden_act {shown(config['hidden_act'])}, supported is 'silu'")
    unsupported = {"attention_bias": family.biases == "none", "mlp_bias": not family.mlp_bias}
    for key in unsupported:
        if unsupported[key] and config.get(key) not in (None, False):
            raise UserError(
                f"config.json has {key} {shown(config[key])}, which model_type {config['model_type']!r} does not "
                "have; "
                "remove the key"
            )
    unknown = {key: value for key, value in config.items() if not _has_no_effect(key, value)}
    for key, value in unknown.items():
        if _SUSPICIOUS.search(key):
            raise UserError(
                f"config.json has {shown(key)[1:-1]} = {shown(value, 60)}, which would change the model and is not "
                "supported; if it has no effect, remove the key"
            )
    if unknown:
        log.warning(
            "config.json: no use for the keys %s", ", ".join(shown(key, 40)[1:-1] for key in sorted(unknown))
        )
    dropouts = [key for key in CARRIED if "drop" in key and config.get(key)]
    if dropouts:
        log.warning("config.json: %s is not applied, training here has no dropout", ", ".join(dropouts))


def _check_carried(config: Mapping[str, Any]) -> None:
    """UserError for settings that are only passed on, and that no reader of the written file would take."""
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


def _has_no_effect(key: str, value: Any) -> bool:
    if key in _USED or key in _HARMLESS or key.startswith("_") or not value:
        return True
    if isinstance(value, bool):
        return key in ("is_causal", "causal")
    return value == 1 and _FACTOR.search(key) is not None


def _windows(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...] | None:
    window = config.get("sliding_window", family.sliding_window)
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != num_layers):
        raise UserError(
            f"config.json has layer_types {shown(types, 60)}, expected a list of num_hidden_layers = "
            f"{num_layers} names"
        )
    odd = sorted(
        {shown(kind)[1:-1] if isinstance(kind, str) else shown(kind) for kind in types or ()}
        - {"full_attention", "sliding_attention"}
    )
    if odd:
        raise UserError(
            f"config.json has layer_types {', '.join(odd)}, supported are full_attention and "
            "sliding_attention"
        )
    if family.windows == "none":
        if window or "sliding_attention" in (types or ()):
            raise UserError(
                f"config.json has sliding_window {shown(window)}, which model_type {config['model_type']!r} does "
                "not use; remove the key or change model_type to 'mistral'"
            )
        return None
    if family.windows == "by_layer" and not _boolean(config, "use_sliding_window"):
        window = None
    if window is not None:
        window = _integer({"sliding_window": window}, "sliding_window")
    if family.windows == "uniform":
        expected = "full_attention" if window is None else "sliding_attention"
        if any(kind != expected for kind in types or ()):
            raise UserError(
                f"config.json has layer_types that differ from sliding_window {window}, which holds for all "
                f"layers of model_type {config['model_type']!r}; remove layer_types"
            )
        return (window,) * num_layers
    if types is None:
        first = _integer(config, "max_window_layers", 28, least=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    elif window is None and "sliding_attention" in types:
        raise UserError(
            "config.json has layer_types with sliding_attention but no window; set use_sliding_window and "
            "sliding_window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def to_config(model: Decoder, *, dtype: str, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model.

    Args:
      model: of this family.
      dtype: of the weights beside it.
      carried: values of `CARRIED` keys (token ids and the like) from the folder or tokenizer that the model
        came with.

    Raises:
      UserError: the model has something that its model_type cannot express.
    """
    family = FAMILIES.get(model.model_type)
    if family is None:
        raise UserError(
            f"the model has model_type {model.model_type!r}; the 'hf' format supports {', '.join(FAMILIES)}"
        )
    depth = layers(model)
    shape = _uniform_shape(model, depth)
    _check_expressible(model, family, shape)
    window = written_max_position_embeddings(shape["rope"], model.max_position_embeddings)
    config = _size_keys(model, family, shape, dtype)
    config |= {"num_hidden_layers": len(depth), "max_position_embeddings": window}
    config |= _window_keys(model.model_type, family, depth)
    config |= hf_rope.keys(model.model_type, shape["rope"], window, shape["head_dim"])
    # null where nothing is known: without the key transformers would assume token ids of its own
    config |= dict.fromkeys(key for key in CARRIED if key.endswith("token_id"))
    known = {key: value for key, value in (carried or {}).items() if key in CARRIED}
    if isinstance(known.get("initializer_range"), int):
        known["initializer_range"] = float(known["initializer_range"])  # transformers 5 takes no integer
    return config | known


def _size_keys(model: Decoder, family: Family, shape: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": shape["intermediate_size"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if family.writes_head_dim or shape["head_dim"] * shape["num_heads"] != model.hidden_size:
        config["head_dim"] = shape["head_dim"]
    if family.biases == "config":
        config["attention_bias"] = shape["qkv_bias"]
    if family.mlp_bias:
        config["mlp_bias"] = shape["mlp_bias"]
    return config


def _uniform_shape(model: Decoder, depth: list[Layer]) -> dict[str, Any]:
    """The numbers that config.json states once for all layers."""
    read: dict[str, Callable[[Any], Any]] = {
        name: lambda block, name=name: getattr(block.mixer, name)
        for name in ("num_heads", "num_kv_heads", "head_dim", "rope", "qkv_bias", "o_bias", "qk_norm")
    }
    read["intermediate_size"] = lambda block: block.mlp.intermediate_size
    read["mlp_bias"] = lambda block: block.mlp.bias
    shape = {}
    for name, get in read.items():
        values = [get(layer.block) for layer in depth]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise UserError(
                f"layer {other} has {name} {values[other]} and layer 0 {values[0]}; config.json can state "
                "one for all, save with format 'lcx'"
            )
        shape[name] = values[0]
    for i, layer in enumerate(depth):
        epsilons = {layer.block.norm_eps} | ({layer.block.mixer.norm_eps} if shape["qk_norm"] else set())
        if epsilons != {model.norm_eps}:
            raise UserError(
                f"layer {i} has norm_eps {sorted(epsilons)} and the final norm {model.norm_eps}; config.json "
                "can state one for all, save with format 'lcx'"
            )
    return shape


def _check_expressible(model: Decoder, family: Family, shape: Mapping[str, Any]) -> None:
    expected = {"qk_norm": family.qk_norm}
    if family.biases == "config":
        expected["o_bias"] = shape["qkv_bias"]
    else:
        expected |= {"qkv_bias": family.biases == "qkv", "o_bias": False}
    if not family.mlp_bias:
        expected["mlp_bias"] = False
    for name, value in expected.items():
        if shape[name] != value:
            raise UserError(
                f"the model has {name} {shape[name]}, model_type {model.model_type!r} has {value} in the "
                "'hf' format; change model_type or save with format 'lcx'"
            )
    if model.model_type == "llama" and model.hidden_size % shape["num_heads"]:
        raise UserError(
            f"the model has hidden_size {model.hidden_size}, which transformers' llama wants to be a "
            f"multiple of num_heads {shape['num_heads']}; change model_type to 'mistral'"
        )
    rope = shape["rope"]
    if rope.partial_rotary_factor != 1 and not family.partial_rotary and rope.rope_type != "proportional":
        raise UserError(
            f"the model has partial_rotary_factor {rope.partial_rotary_factor:g}, which model_type "
            f"{model.model_type!r} cannot express; change model_type to 'phi3'"
        )


def _window_keys(model_type: str, family: Family, depth: list[Layer]) -> dict[str, Any]:
    windows = [layer.block.mixer.window for layer in depth]
    sizes = sorted({window for window in windows if window is not None})
    if (
        len(sizes) > 1
        or (family.windows == "none" and sizes)
        or (family.windows == "uniform" and len(set(windows)) > 1)
    ):
        kinds = ", ".join(str(window) for window in dict.fromkeys(windows))
        raise UserError(
            f"the layers have windows {kinds}, which model_type {model_type!r} cannot express; change "
            "model_type (mistral: one for all, qwen2: one, in some layers)"
        )
    if family.windows == "none":
        return {}
    if family.windows == "uniform":
        return {"sliding_window": windows[0]}
    first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": first,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json has no {key}; it is needed")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise UserError(
            f"config.json has {key} = {shown(value)}, expected an integer from {least} to 2^31 - 1"
        )
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"config.json has {key} = {shown(value)}, expected a number between 0 and 1")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    value = False if value is None else value
    if not isinstance(value, bool):
        raise UserError(f"config.json has {key} = {shown(value)}, expected true or false")
    return value
