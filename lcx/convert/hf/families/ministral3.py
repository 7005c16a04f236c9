"""Ministral 3 (December 2025): Mistral whose queries grow with the position, by steps of the original window.

rope_parameters.
  llama_4_scaling_beta               queries at position p are multiplied by 1 + beta log(1 + floor(p / window))
  original_max_position_embeddings   the window of that; YaRN counts from it too
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.convert.hf.layered import FULL, SLIDING, Layered
from lcx.convert.hf.llama_like import layer_types
from lcx.convert.hf.rope_parameters import ORIGINAL, RopeDialect
from lcx.convert.hf.values import integer, nonnegative
from lcx.errors import UserError

_BETA, _OBJECTS = "llama_4_scaling_beta", ("rope_parameters", "rope_scaling")
#: In the same object, and without effect.
_REPEATED = "max_position_embeddings"
#: The rotary settings of a config.json that states none, as in transformers.
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, _BETA: 0.1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ministral3Rope(RopeDialect):
    """transformers 4 has no Ministral 3, so only the new spelling is written."""

    def spelled(self, keys, rope, window):
        return {key: value for key, value in keys.items() if key not in ("rope_scaling", "rope_theta")}


@dataclasses.dataclass(frozen=True)
class Ministral3(Layered):
    model_type: str = "ministral3"
    architecture: str = "Ministral3ForCausalLM"
    num_kv_heads: int | None = 8
    head_dim: int | None = 128
    norm_eps: float = 1e-5
    rope: RopeDialect = Ministral3Rope()

    def model(self, config, *, dtype):
        if not any(config.get(name) for name in _OBJECTS):
            config = {**config, "rope_parameters": _ROPE}
        return super().model(config, dtype=dtype)

    def attention(self, config):
        given = _stated(config)
        if given.get(_BETA) is None:
            raise UserError(
                f"config.json has no {_BETA} in rope_parameters, which transformers needs for model_type "
                f"{self.model_type!r}: set it, to 0 for none"
            )
        beta = nonnegative(given, _BETA, 0.0)
        if not beta:
            return {}
        scaled = given.get("rope_type", given.get("type")) in ("yarn", "llama3", "longrope")
        window = integer(config, "max_position_embeddings") if scaled else None
        floor = integer({ORIGINAL: config.get(ORIGINAL), **given}, ORIGINAL, window)
        return {"temperature": beta, "temperature_floor": floor, "temperature_offset": 0}

    def kinds(self, config, num_layers):
        kind = FULL if config.get("sliding_window") is None else SLIDING
        if any(other != kind for other in layer_types(config, num_layers) or ()):
            raise UserError(
                "config.json has layer_types that differ from sliding_window, which holds for all layers of model_type "
                f"{self.model_type!r}; remove layer_types"
            )
        return [kind] * num_layers

    def _rope(self, config, kind, head_dim):
        kept = {name: _without(config[name]) for name in _OBJECTS if isinstance(config.get(name), Mapping)}
        return super()._rope({**config, **kept}, kind, head_dim)

    def _kind_keys(self, depth):
        return {"sliding_window": depth[0].block.mixer.window}

    def _rope_keys(self, model, depth):
        keys, mixer = super()._rope_keys(model, depth), depth[0].block.mixer
        keys["rope_parameters"] |= {_BETA: mixer.temperature or 0.0}
        if mixer.temperature is not None:
            keys["rope_parameters"].setdefault(ORIGINAL, mixer.temperature_floor)
        return keys


def _stated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[name] for name in _OBJECTS if isinstance(config.get(name), Mapping) and config[name]), {})


def _without(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in (_BETA, _REPEATED)}


MINISTRAL3 = Ministral3()
