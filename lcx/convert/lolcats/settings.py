"""The settings that published LoLCATS files do not contain, under the names of LoLCATS' .yaml configurations.

From a file of feature maps follow their sizes, whether they have biases, an adapter or a window, and which layers have
them. The kind and size of the window, the activation and the mixing are in the run's configuration, section
`attention`:

    attention_type                 lolcats_llama (no window), lolcats_llama_window_tk (terraced), ..._sw (sliding)
    window_size, init_window_factor, affine_attention_factors, tie_qk_kernels, softmax_attentions (softmax layers kept)
    feature_map                    softmax_dim, exp_dim, relu, pos_elu
    feature_map_kwargs             fullspace, eps
    learned_kernel                 untied_head_einsum, untied_head_adapter
    learned_kernel_kwargs          feature_dim, skip_connection, bias, zero_init, normal_init, hidden_dim

and lora_alpha in `finetune.kwargs`. Settings that are not stated are taken from the file name if it contains them
("..._lk_smd_wtk64_fd64_w01..."), else from the defaults of all published runs: terraced window of 64, softmax_dim over
the full space, no mixing, no softmax layers kept.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from lcx import small_files
from lcx.convert.files import folders
from lcx.convert.lolcats.files import SETTINGS_FILE
from lcx.errors import UserError
from lcx.mixers.feature_maps import FLOOR
from lcx.mixers.linearized import LinearizedAttention

#: The settings file of a folder that lcx wrote.
FILE = SETTINGS_FILE
_TYPE = re.compile(r"lolcats(?:_long)?_llama(?:_window_(tk|sw)(?:_(?:linear|gen|bf16|fa2|sdpa))?)?")
_KINDS = {"tk": "terraced", "sw": "sliding"}
_EINSUM, _ADAPTER = "untied_head_einsum", "untied_head_adapter"
#: Keys that never affect what a trained model computes; in `_FIXED`, keys that do not at the listed values.
_IGNORED = {
    "layer_idx",
    "state_chunk_len",
    "train_qk",
    "train_attention_weights",
    "no_peft_grad_ckpt",
    "rank",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "decode_window_size": (None,),
    "fp32_attention": (False,),
    "mask_value": (0,),
    "num_feature_maps": (1,),
    "rotary_config": (None,),
}
_KINDS_OF_VALUE: dict[str, tuple[type, ...]] = {
    "attention_type": (str,),
    "window_size": (int,),
    "init_window_factor": (int, float),
    "affine_attention_factors": (bool,),
    "tie_qk_kernels": (bool,),
    "softmax_attentions": (list, tuple),
    "feature_map": (str,),
    "feature_map_kwargs.fullspace": (bool,),
    "learned_kernel": (str,),
    "learned_kernel_kwargs.feature_dim": (int,),
    "learned_kernel_kwargs.skip_connection": (bool,),
    "learned_kernel_kwargs.bias": (bool,),
    "learned_kernel_kwargs.zero_init": (bool,),
    "learned_kernel_kwargs.normal_init": (bool,),
    "learned_kernel_kwargs.hidden_dim": (int,),
}


@dataclasses.dataclass(frozen=True)
class Stated:
    """Settings under their published names ("learned_kernel_kwargs.bias"); `where` is their origin, for messages."""

    values: Mapping[str, Any]
    where: str
    lora_alpha: float | None = None
    published_quirks: bool = False

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)


def read(given: Mapping[str, Any] | str | os.PathLike) -> Stated:
    """Reads settings from a mapping or a .yaml or .json file: the `attention` section, or a mapping that contains it.

    Raises:
      UserError: the file does not exist, or has an unsupported key or value.
    """
    if isinstance(given, Mapping):
        return _parsed(given, "attention")
    path = pathlib.Path(given).expanduser()
    if path.suffix == ".json" and path.is_file():
        return _parsed(folders.read_json(path), str(path))
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        found = "nothing there" if not path.exists() else f"a file {path.suffix or 'without suffix'}"
        raise UserError(f"attention {given}: {found}, expected a .yaml or .json of settings, or the settings")
    return _parsed(_yaml(path), str(path))


def _yaml(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UserError(
            f"{path}: reading .yaml needs PyYAML: pip install pyyaml, or write it as .json"
        ) from error
    try:
        value = yaml.safe_load(small_files.read_text(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(value, Mapping):
        raise UserError(
            f"{path}: holds a {type(value).__name__}, expected settings with a section `attention`"
        )
    return value


def _parsed(given: Mapping[str, Any], where: str) -> Stated:
    sections = {"finetune", "published_quirks"} & set(given)
    section = given.get("attention", {} if sections else given)
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: attention is {section!r}, expected settings by name")
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("feature_map_kwargs", "learned_kernel_kwargs") and isinstance(value, Mapping):
            values |= {f"{key}.{inner}": x for inner, x in value.items()}
        elif key in _FIXED:
            if value not in _FIXED[key]:
                raise UserError(
                    f"{where}: {key} is {value!r}, expected {_FIXED[key][0]!r}: only that can be read"
                )
        elif key not in _IGNORED:
            values[key] = value
    _check_values(values, where)
    return Stated(values, where, _alpha(given, where), given.get("published_quirks") is True)


def _check_values(values: dict[str, Any], where: str) -> None:
    if (eps := values.pop("feature_map_kwargs.eps", FLOOR)) not in (
        FLOOR,
        str(FLOOR),
    ):  # YAML 1.1 reads 1e-12 as a string
        raise UserError(
            f"{where}: feature_map_kwargs.eps is {eps!r}, expected {FLOOR}: only that can be read"
        )
    for name in [name for name, value in values.items() if value is None]:
        del values[name]
    for name, value in values.items():
        if name not in _KINDS_OF_VALUE:
            known = ", ".join(dict.fromkeys(key.partition(".")[0] for key in _KINDS_OF_VALUE))
            raise UserError(f"{where}: unknown setting {name!r}, expected some of {known}; leave it out")
        kinds = _KINDS_OF_VALUE[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{where}: {name} is {value!r}, expected {kinds[0].__name__}")
    if "attention_type" in values and not _TYPE.fullmatch(values["attention_type"]):
        raise UserError(
            f"{where}: attention_type is {values['attention_type']!r}, expected lolcats_llama, "
            "lolcats_llama_window_tk or lolcats_llama_window_sw"
        )
    if values.get("learned_kernel", _EINSUM) not in (_EINSUM, _ADAPTER):
        found = values["learned_kernel"]
        raise UserError(f"{where}: learned_kernel is {found!r}, expected {_EINSUM} or {_ADAPTER}")
    layers = values.get("softmax_attentions", ())
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise UserError(f"{where}: softmax_attentions is {layers!r}, expected numbers of layers")


def _alpha(given: Mapping[str, Any], where: str) -> float | None:
    section = given.get("finetune")
    kwargs = section.get("kwargs") if isinstance(section, Mapping) else None
    alpha = kwargs.get("lora_alpha") if isinstance(kwargs, Mapping) else None
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0):
        raise UserError(f"{where}: lora_alpha is {alpha!r}, expected a positive number")
    return alpha


def of_name(path: pathlib.Path) -> Stated:
    """The settings that the file name of a published run contains: the window and the activation."""
    values: dict[str, Any] = {}
    if found := re.search(r"_w(tk|sw)(\d+)(?=_|-|\.|$)", path.name):
        values |= {"attention_type": f"lolcats_llama_window_{found[1]}", "window_size": int(found[2])}
    if found := re.search(r"_lk_(smd|t2r)(?=_|-|\.|$)", path.name):
        values["feature_map"] = {"smd": "softmax_dim", "t2r": "relu"}[found[1]]
    return Stated(values, f"the name of {path}")


def window_of(stated: Stated, *, has_factors: bool) -> tuple[int | None, str]:
    """(size, kind) of the window.

    Args:
      has_factors: whether the file has window factors; if the settings state nothing, there is a window only with them.
    """
    size, kind = LinearizedAttention.window, LinearizedAttention.window_kind
    name = stated.get("attention_type", None)
    if name is None and not has_factors:
        return None, kind
    if name is not None:
        found = _TYPE.fullmatch(name)
        assert found is not None
        if found[1] is None:
            return None, kind
        kind = _KINDS[found[1]]
    return stated.get("window_size", size), kind


def start_of(stated: Stated) -> str:
    """How the maps were initialised; without effect on trained maps."""
    prefix = "learned_kernel_kwargs."
    if stated.get(f"{prefix}normal_init", False):
        return "normal"
    return "identity" if stated.get(f"{prefix}zero_init", False) else "uniform"


def to_json(mixer: LinearizedAttention, kept: list[int], lora: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings in the form that `read` accepts, for one mixer that all layers except the kept ones use.

    Args:
      kept: indices of the layers that stay softmax.
      lora: r, lora_alpha and target_modules of the pairs, if there are any.
    """
    kind = {kind: name for name, kind in _KINDS.items()}[mixer.window_kind]
    kernel: dict[str, Any] = {
        "feature_dim": mixer.feature_dim,
        "skip_connection": mixer.skip,
        "bias": mixer.feature_bias,
        "zero_init": mixer.feature_init == "identity",
        "normal_init": mixer.feature_init == "normal",
    }
    attention: dict[str, Any] = {
        "attention_type": "lolcats_llama" + ("" if mixer.window is None else f"_window_{kind}"),
        "affine_attention_factors": mixer.affine,
        "init_window_factor": mixer.window_factor,
        "feature_map": mixer.feature_map,
        "feature_map_kwargs": {"eps": FLOOR, "fullspace": mixer.full_space},
        "learned_kernel": _EINSUM if mixer.adapter is None else _ADAPTER,
        "learned_kernel_kwargs": kernel,
        "tie_qk_kernels": mixer.tied,
        "softmax_attentions": kept,
    }
    if mixer.window is not None:
        attention["window_size"] = mixer.window
    if mixer.adapter is not None:
        kernel["hidden_dim"] = mixer.adapter
    out: dict[str, Any] = {"attention": attention}
    if mixer.published_quirks:
        out["published_quirks"] = True
    return (
        out
        if lora is None
        else {**out, "finetune": {"method": "lora", "kwargs": {**lora, "lora_dropout": 0}}}
    )
