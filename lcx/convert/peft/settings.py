"""adapter_config.json of a PEFT LoRA: which modules have a pair, their ranks and scales, and what else was trained.

Every key that affects the computation is either read or rejected by name; keys unknown to PEFT are ignored with a
warning. The result agrees with `peft.LoraConfig` and PEFT's name-matching rules (peft 0.21).
"""

import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.convert.files import folders
from lcx.convert.peft import patterns, text_modules
from lcx.errors import UserError

log = logging.getLogger(__name__)

FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"

#: Keys of unsupported features, and the values with which they have no effect.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    **dict.fromkeys(("lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config")
        + ("monteclora_config", "target_parameters", "use_bdlora", "velora_config"),
        ([], {}),
    ),
}
#: Initialisations that leave the base weights unchanged. The others modify them, so that the adapter only fits the
#: modified base.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_BIASES = ("none", "all", "lora_only")
#: Keys that do not affect a trained adapter, and keys that are read below.
_KNOWN = (
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config "
    "lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save peft_version qalora_group_size r "
    "rank_pattern revision runtime_config target_modules task_type trainable_token_indices use_dora use_rslora"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The contents of adapter_config.json.

    Attributes:
      rank, alpha: defaults for pairs that no pattern matches.
      rank_pattern, alpha_pattern: regular expression of module names -> rank or alpha of the matching modules.
      rslora: the scale is alpha / sqrt(rank) (rsLoRA) instead of alpha / rank.
      dora: the norm of each row of a changed weight is a trained parameter (DoRA).
      targets: module names, a regular expression, or "all-linear"; None if not stated.
      exclude: modules to exclude from `targets`.
      layers, layers_pattern: the layers that `targets` is limited to (None: all), and the possible names of the module
        list that holds the layers.
      saved: name endings of modules that were trained in full (modules_to_save).
      rows: name ending of a module -> rows of its weight that were trained (trainable_token_indices).
      bias: which biases were trained: none, all or lora_only.
      tying: whether changes to a tied embedding or head apply to both (ensure_weight_tying).
      base: the name or path of the base.
      spelling: how the trained model names the modules of its text model (`text_modules`); names given to the methods
        are those of the text model alone.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]
    bias: str
    tying: bool
    base: str | None
    spelling: text_modules.Spelling = ()

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Module -> scale of its update: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).

        Args:
          ranks: module -> rank of its tensors.

        Raises:
          UserError: a rank contradicts the file, or a pattern is not a valid regular expression.
        """
        names = {text_modules.outer(name, self.spelling): name for name in ranks}
        stated = dict.fromkeys(ranks, self.rank) | _by_module(self.rank_pattern, names, "rank_pattern")
        alphas = dict.fromkeys(ranks, self.alpha) | _by_module(self.alpha_pattern, names, "alpha_pattern")
        for name, rank in ranks.items():
            if stated[name] != rank:
                raise UserError(
                    f"{name} has rank {rank} in its tensors, expected {stated[name]} as {FILE} says"
                )
        return {name: alphas[name] / (rank**0.5 if self.rslora else rank) for name, rank in ranks.items()}

    def targeted(self, linear: Sequence[str], tables: Sequence[str]) -> set[str] | None:
        """The modules that should have a pair; None if the file does not state them.

        Args:
          linear: the linear modules of the layers.
          tables: the embedding and the head, which "all-linear" excludes.
        """
        if self.targets is None:
            return None
        ours = {text_modules.outer(name, self.spelling): name for name in (*linear, *tables)}
        names = list(ours)
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            found = set(names[: len(linear)])
        elif isinstance(self.targets, str):
            found = patterns.matching([self.targets], names, setting=f"target_modules of {FILE}")[
                self.targets
            ]
        else:
            found = {name for name in names if name in self.targets or self._ends_in_target(name)}
        if isinstance(self.exclude, str):
            found -= patterns.matching([self.exclude], names, setting=f"exclude_modules of {FILE}")[
                self.exclude
            ]
        else:
            found -= {name for name in names if _ends(name, self.exclude)}
        kept = {name for name in found if not any(f".{saved}." in f".{name}." for saved in self.saved)}
        return {ours[name] for name in kept}

    def _ends_in_target(self, name: str) -> bool:
        assert isinstance(self.targets, tuple)
        if not _ends(name, self.targets) or self.layers is None:
            return _ends(name, self.targets)
        place = re.match(r".*?\.([^.]*)\.(\d+)\.", name)
        if place is None or (self.layers_pattern and place[1] not in self.layers_pattern):
            return False
        return int(place[2]) in self.layers

    def is_saved(self, module: str) -> bool:
        """Whether a module, or a module that contains it, is listed in modules_to_save."""
        parts = text_modules.outer(module, self.spelling).split(".")
        return any(
            ".".join(parts[:end]).endswith(saved) for saved in self.saved for end in range(1, len(parts) + 1)
        )


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _by_module(given: Mapping[str, Any], names: Mapping[str, str], setting: str) -> dict[str, Any]:
    """Module -> the value of the first pattern that it matches, by PEFT's rule (.*\\.)?(pattern)$.

    Args:
      names: name to match -> module.
    """
    if not given:
        return {}
    # Matching every dot-separated suffix replaces the prefix (.*\.)?, whose repetition would require the subprocess.
    ends = {name: [name, *(name[i + 1 :] for i, c in enumerate(name) if c == ".")] for name in names}
    every = sorted({end for some in ends.values() for end in some})
    matched = patterns.matching(list(given), every, setting=f"{setting} of {FILE}")
    out = {}
    for name, module in names.items():
        for pattern, value in given.items():
            if matched[pattern].intersection(ends[name]):
                out[module] = value
                break
    return out


# ------------------------------------------------------------------------------------------------ reading


def read(folder: pathlib.Path) -> Settings:
    """The settings of a folder.

    Raises:
      UserError: the file does not exist, the kind of adapter is not supported, or a value has the wrong type or range.
    """
    config = folders.read_json(folders.inside(folder, FILE))
    try:
        return _settings(config)
    except UserError as error:
        raise UserError(f"{folder}: {FILE} has {error}") from error


def _settings(config: Mapping[str, Any]) -> Settings:
    _check_kind(config)
    rows = _rows(config.get("trainable_token_indices"))
    targets = config.get("target_modules")
    return Settings(
        rank=_integer("r", config.get("r"), 1),
        alpha=_positive("lora_alpha", config.get("lora_alpha")),
        rank_pattern=_mapping("rank_pattern", config, lambda name, x: _integer(name, x, 1)),
        alpha_pattern=_mapping("alpha_pattern", config, _positive),
        rslora=_boolean("use_rslora", config),
        dora=_boolean("use_dora", config),
        targets=None if targets is None else _names("target_modules", targets),
        exclude=_names("exclude_modules", config.get("exclude_modules") or []),
        layers=_layers(config.get("layers_to_transform")),
        layers_pattern=_listed("layers_pattern", config.get("layers_pattern")),
        saved=_listed("modules_to_save", config.get("modules_to_save")),
        rows=rows,
        bias=_one_of("bias", config.get("bias", "none"), _BIASES),
        tying=_boolean("ensure_weight_tying", config),
        base=config.get("base_model_name_or_path")
        if isinstance(config.get("base_model_name_or_path"), str)
        else None,
    )


def _check_kind(config: Mapping[str, Any]) -> None:
    """Raises UserError unless the adapter is a plain LoRA for text generation."""
    if config.get("peft_type") is None:
        raise UserError("no peft_type, expected 'LORA': is this the folder of an adapter?")
    for key, plain in _PLAIN.items():
        if config.get(key) is not None and config[key] not in plain:
            only = "only LoRA can be read, merge the adapter with PEFT instead"
            expected = repr(plain[0]) if plain[0] not in ([], {}) else "null"
            raise UserError(f"{key} {_shown(config[key])}, expected {expected}: {only}")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"task_type {_shown(task)}, expected 'CAUSAL_LM': it is no adapter for generating text"
        )
    start = config.get("init_lora_weights")
    if not (
        start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in _STARTS)
    ):
        raise UserError(
            f"init_lora_weights {_shown(start)}, which changes the base weights too, or is unknown: save the adapter "
            "again with PEFT's path_initial_model_for_weight_conversion"
        )
    unknown = [key for key in config if key not in _KNOWN.split() and key not in _PLAIN and config[key]]
    for key in unknown:
        if key.startswith("use_"):
            raise UserError(f"{_shown(key)} {_shown(config[key])}, a variant of LoRA that is not known here")
    if unknown:
        log.warning(
            "%s has %d keys that PEFT 0.21 does not have, ignored: %s",
            FILE,
            len(unknown),
            ", ".join(_shown(key) for key in unknown[:4]),
        )
    if _boolean("fan_in_fan_out", config):
        log.warning(
            "%s has fan_in_fan_out true, which PEFT takes as false for the linear modules of this model", FILE
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _integer(key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        expected = "a positive number, an integer" if least else "an integer >= 0"
        raise UserError(f"{key} {_shown(value)}, expected {expected}")
    return value


def _positive(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1e30 or not math.isfinite(value):
        raise UserError(f"{key} {_shown(value)}, expected a positive number")
    return float(value)


def _boolean(key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key} {_shown(value)}, expected true or false")
    return bool(value)


def _one_of(key: str, value: Any, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{key} {_shown(value)}, expected one of {', '.join(known)}")
    return value


def _names(key: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _listed(key, value)


def _listed(key: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
        raise UserError(f"{key} {_shown(value)}, expected a list of names")
    return tuple(listed)


def _mapping(key: str, config: Mapping[str, Any], checked: Any) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key} {_shown(value)}, expected an object from names to numbers")
    return {name: checked(f"{key}[{_shown(name)}]", number) for name, number in value.items()}


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    listed = value if isinstance(value, list) else [value]
    return tuple(_integer("layers_to_transform", item, 0) for item in listed)


def _rows(value: Any) -> dict[str, tuple[int, ...]]:
    if value is None:
        return {}
    given = value if isinstance(value, dict) else {EMBEDDING.rpartition(".")[2]: value}
    out = {}
    for name, rows in given.items():
        if not isinstance(rows, list) or not rows:
            raise UserError(
                f"trainable_token_indices {_shown(value)}, expected a list of token ids, or one a module"
            )
        out[name] = tuple(_integer("trainable_token_indices", row, 0) for row in rows)
    return out
