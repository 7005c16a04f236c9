"""Families of softmax attention whose blocks differ from Llama's: norms, multipliers, and kinds of layers.

A family states what config.json says of one layer (`attention`, `block`, `mlp`) and of the decoder (`decoder`), and the
keys that say it (`own_keys`). Everything else is here. A written config.json is read back before it is used: a model
that it cannot express differs from what was read, and is refused with the first difference. So a family needs no list
of what it cannot express.

Layers are of two kinds, `full_attention` and `sliding_attention`, in the order of `layer_types`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from lcx import model as model_lib
from lcx.block import Block
from lcx.convert.core.rules import Layout, Part, Rule, Same
from lcx.convert.hf import rope as hf_rope
from lcx.convert.hf.layouts import PairedBias, PairedRows
from lcx.convert.hf.llama_like import KEYS, LlamaLike, layer_types
from lcx.convert.hf.rope_parameters import ORIGINAL, written_max_position_embeddings
from lcx.convert.hf.values import boolean, fraction, integer
from lcx.errors import UserError
from lcx.layers import Norm
from lcx.mixers.attention import Attention
from lcx.mlps.gated import GatedMlp
from lcx.model import Decoder, Layer, stages_of
from lcx.rope import Rope, rotary_dim
from lcx.rope_fields import MOST_TOKENS, shown

FULL, SLIDING = "full_attention", "sliding_attention"
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", hf_rope.REMEMBERED)
#: What a family may leave to the user: it is not part of config.json.
_FREE = ("parent", "name", "dtype", "remat", "implementation", "stages", "aux_loss_weight")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}


@dataclasses.dataclass(frozen=True)
class Layered(LlamaLike):
    """A family with its own blocks.

    Attributes:
      own: keys of config.json that this family's methods read in addition to those of Llama.
      fixed: keys with the values that have no effect; other values are refused.
      period: every so many layers one is full and the others slide, if config.json lists no kinds; None: no kinds.
      norm_names: for each layer's norms, their name and ours.
      eps_key: the key of the epsilon of all norms.
      activation: the default of hidden_act, and its key.
      theta, local_theta: the defaults of rope_theta, and of that of sliding layers, which then have their own rope.
      tied: the default of tie_word_embeddings.
      paired: whether a head's dimensions are rotated in pairs (2j, 2j + 1); converted to pairs (j, j + d/2).
      mixer_type, mlp_types: the class of all mixers, and the classes of the MLPs.
    """

    own: frozenset[str] = frozenset()
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    period: int | None = None
    norm_names: tuple[tuple[str, str], ...] = (
        ("input_layernorm", "mixer_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    )
    eps_key: str = "rms_norm_eps"
    activation: tuple[str, str] = ("hidden_act", "silu")
    theta: float = 10_000.0
    local_theta: float | None = None
    partial_factor: float = 1.0
    tied: bool = False
    paired: bool = False
    mixer_type: type = Attention
    mlp_types: tuple[type, ...] = (GatedMlp,)

    def __post_init__(self):
        own = self.own | {key for key, _ in self.fixed} | {self.eps_key, self.activation[0]}
        object.__setattr__(self, "keys", KEYS - {"rms_norm_eps"} | own | {*_ROPE_KEYS})

    # ------------------------------------------------------------------------------ what a family may override

    def attention(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of Attention that all layers share, in addition to sizes, biases and qk_norm."""
        return {}

    def mixer(self, config: Mapping[str, Any], rope: Rope | None, window: int | None) -> nn.Module:
        """The mixer of a layer, a `mixer_type`."""
        sizes = self._sizes(config)
        fields = {
            "num_heads": sizes.num_heads,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_dim,
            "qk_norm": self.qk_norm,
            "norm_eps": fraction(config, self.eps_key, self.norm_eps),
            **self._biases(config),
            **self.attention(config),
        }
        return Attention(**fields, rope=rope, window=window, parent=None)

    def block(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of Block, in addition to mixer, mlp and norm_eps."""
        return {}

    def decoder(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of Decoder that Llama leaves at their defaults."""
        return {}

    def mlp(self, config: Mapping[str, Any], index: int) -> nn.Module:
        """The MLP of a layer."""
        bias = self.mlp_bias and boolean(config, "mlp_bias")
        activation = self.activation_of(config)
        return GatedMlp(integer(config, "intermediate_size"), bias, activation=activation, parent=None)

    def activation_of(self, config: Mapping[str, Any]) -> str:
        """The activation function of the MLPs, as mlps.activations names it."""
        key, default = self.activation
        name = config.get(key) or config.get("hidden_act") or default
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise UserError(f"config.json has {key} {shown(name)}, supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def rotates(self, config: Mapping[str, Any], index: int, kind: str) -> bool:
        """Whether a layer has a rotary embedding."""
        return True

    def own_keys(self, model: Decoder, depth: Sequence[Layer]) -> dict[str, Any]:
        """The keys that `attention`, `block`, `decoder`, `mlp` and `rotates` read."""
        return {}

    def mlp_rules(self, prefix: str, layer: Layer) -> list[Rule]:
        """The tensors of a layer's MLP; `prefix` is model.layers.{i}.mlp."""
        return self._mlp_rules(prefix, layer)

    def norms_of(self, layer: Layer) -> tuple[tuple[str, str], ...]:
        """The norms of a layer, their name and ours."""
        return self.norm_names

    def kinds(self, config: Mapping[str, Any], num_layers: int) -> list[str]:
        """The kind of each layer."""
        found = layer_types(config, num_layers)
        if found is not None:
            return found
        if self.period is None:
            return [FULL] * num_layers
        period = integer(config, "sliding_window_pattern", self.period)
        return [SLIDING if (i + 1) % period else FULL for i in range(num_layers)]

    # ------------------------------------------------------------------------------------ config.json -> model

    def model(self, config: Mapping[str, Any], *, dtype: str) -> Decoder:
        self.check_config(config)
        sizes, eps = self._sizes(config), fraction(config, self.eps_key, self.norm_eps)
        kinds = self.kinds(config, sizes.num_layers)
        ropes = {kind: self._rope(config, kind, sizes.head_dim) for kind in (FULL, SLIDING)}

        def block(index: int, kind: str) -> Block:
            window = self._window(config) if kind == SLIDING else None
            rope = ropes[kind] if self.rotates(config, index, kind) else None
            mixer = self.mixer(config, rope, window)
            return Block(mixer, self.mlp(config, index), norm_eps=eps, **self.block(config), parent=None)

        return Decoder(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            stages=stages_of(tuple(block(i, kind) for i, kind in enumerate(kinds))),
            max_position_embeddings=hf_rope.window(ropes[FULL], integer(config, "max_position_embeddings")),
            norm_eps=eps,
            tie_word_embeddings=boolean({"tie_word_embeddings": self.tied, **config}, "tie_word_embeddings"),
            model_type=self.model_type,
            dtype=dtype,
            scaled_layers="all" if self.local_theta is None else "full",
            **self.decoder(config),
            parent=None,
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        super().check_config({key: value for key, value in config.items() if key != "hidden_act"})
        self.activation_of(config)
        for key, values in self.fixed:
            if key in config and config[key] not in values:
                expected = " or ".join(shown(value) for value in values)
                raise UserError(
                    f"config.json has {key} {shown(config[key])}, which is not supported for model_type "
                    f"{self.model_type!r}, expected {expected}"
                )

    def _biases(self, config: Mapping[str, Any]) -> dict[str, bool]:
        if self.biases == "qkv":
            return {"qkv_bias": True}
        biased = self.biases != "none" and boolean(config, "attention_bias")
        return {"qkv_bias": biased, "o_bias": biased and self.biases == "config"}

    def _window(self, config: Mapping[str, Any]) -> int:
        if config.get("sliding_window", self.sliding_window) is None:
            raise UserError("config.json has layers of sliding_attention but no sliding_window: set it")
        return integer(config, "sliding_window", self.sliding_window)

    def _rope(self, config: Mapping[str, Any], kind: str, head_dim: int) -> Rope:
        flat = {key: value for key, value in config.items() if key not in _ROPE_KEYS}
        if self.partial_factor != 1 and not _states(config, "partial_rotary_factor"):
            flat["partial_rotary_factor"] = self.partial_factor
        own = self.local_theta is not None
        if own and kind == SLIDING:
            flat.pop(ORIGINAL, None)  # what an extension of the other layers started from
        if not own or kind == FULL:
            flat |= {
                key: config[key] for key in _ROPE_KEYS if key in config and key != "rope_local_base_freq"
            }
        given = config.get("rope_parameters")
        theta = self.theta
        if own and given:
            if not isinstance(given, Mapping) or not all(isinstance(x, Mapping) for x in given.values()):
                raise UserError(
                    f"config.json has rope_parameters {shown(given)}, expected an object for each of {FULL} "
                    f"and {SLIDING}"
                )
            flat["rope_parameters"] = given.get(kind)
        if self.local_theta is not None and kind == SLIDING:
            theta = config.get("rope_local_base_freq", self.local_theta)
            if self.theta == self.local_theta:
                theta = config.get("rope_theta", theta)  # one key for both
        if not _states(flat, "rope_theta"):
            flat["rope_theta"] = theta
        return hf_rope.read(flat, self.rope, head_dim)

    # ------------------------------------------------------------------------------------ model -> config.json

    def config(self, model: Decoder, *, dtype: str) -> dict[str, Any]:
        depth = self._layers(model)
        mixer, mlp = depth[0].block.mixer, depth[0].block.mlp
        shape = self.shape(mixer) | {
            "intermediate_size": getattr(mlp, "intermediate_size", None),
            "mlp_bias": getattr(mlp, "bias", False),
        }
        config = self._size_keys(model, shape, dtype)
        if self.eps_key != "rms_norm_eps":
            config[self.eps_key] = config.pop("rms_norm_eps")
        if self.biases == "qkv_of_config":
            config["attention_bias"] = shape["qkv_bias"]
        key = self.activation[0]
        names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        del config["hidden_act"]
        config |= {key: names.get(getattr(mlp, "activation", "silu"), "silu"), "num_hidden_layers": len(depth)}
        config |= self._kind_keys(depth) | self._rope_keys(model, depth) | self.own_keys(model, depth)
        self._check_read_back(model, config)
        return config

    def shape(self, mixer: Any) -> dict[str, Any]:
        """Sizes of a mixer, and whether it has biases, by the names of Attention's fields."""
        return {name: getattr(mixer, name) for name in ("num_heads", "num_kv_heads", "head_dim", "qkv_bias")}

    def _kind_keys(self, depth: Sequence[Layer]) -> dict[str, Any]:
        windows = [layer.block.mixer.window for layer in depth]
        if self.period is None and not any(windows):
            return {}
        return {
            "sliding_window": next((window for window in windows if window is not None), self.sliding_window),
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }

    def _rope_keys(self, model: Decoder, depth: Sequence[Layer]) -> dict[str, Any]:
        def first(kind: str | None, theta: float) -> tuple[Rope, int]:
            mixers = [layer.block.mixer for layer in depth]
            held = [x for x in mixers if kind is None or (x.window is None) == (kind == FULL)]
            found = next((x for x in held if x.rope is not None), None)
            return (Rope(rope_theta=theta), mixers[0].head_dim) if found is None else (found.rope, found.head_dim)

        either = self.local_theta is None
        rope, head_dim = first(None if either else FULL, self.theta)
        if rope.partial_rotary_factor != 1 and not self.rope.partial and rope.rope_type != "proportional":
            raise UserError(
                f"the model has partial_rotary_factor {rope.partial_rotary_factor:g}, which model_type "
                f"{self.model_type!r} cannot express; save with format 'lcx'"
            )
        window = written_max_position_embeddings(rope, model.max_position_embeddings)
        keys = hf_rope.keys(self.rope, rope, window, head_dim) | {"max_position_embeddings": window}
        if self.partial_factor != 1:  # what a file that does not say it would not mean
            keys["partial_rotary_factor"] = rope.partial_rotary_factor
            keys["rope_parameters"] |= {"partial_rotary_factor": rope.partial_rotary_factor}
        if either:
            return keys
        local = first(SLIDING, self.local_theta or self.theta)
        nested = {FULL: keys["rope_parameters"]}
        nested[SLIDING] = hf_rope.keys(self.rope, local[0], window, local[1])["rope_parameters"]
        keys |= {"rope_parameters": nested}
        return keys if self.theta == self.local_theta else keys | {"rope_local_base_freq": local[0].rope_theta}

    def _check_read_back(self, model: Decoder, config: Mapping[str, Any]) -> None:
        """Raises UserError unless the model is what its config.json says."""
        again = self.model(config, dtype=model.dtype)
        pairs = [(f"layer {i}", a.block, b.block) for i, (a, b) in enumerate(
            zip(model_lib.layers(model), model_lib.layers(again), strict=True)
        )]  # fmt: skip
        for where, ours, theirs in [("the model", model, again), *pairs]:
            if unsaid := difference(ours, theirs):
                raise UserError(
                    f"{where} has {unsaid}, which model_type {self.model_type!r} cannot express; save with format 'lcx'"
                )

    # ------------------------------------------------------------------------------------ tensors <-> parameters

    def rules(self, model: Decoder) -> list[Rule]:
        table = [Rule(self.embedding, (Part("embed/embedding", Same()),))]
        for i, layer in enumerate(self._layers(model)):
            table += self._attention_rules(f"model.layers.{i}.self_attn.", layer)
            table += self.mlp_rules(f"model.layers.{i}.mlp.", layer)
            for theirs, ours in self.norms_of(layer):
                norm = layer.block.norm
                table += _norm_rules(f"model.layers.{i}.{theirs}", norm, f"{layer.path}/{ours}", layer.repeat)
        table += _norm_rules("model.norm", model.norm, "final_norm")
        if not model.tie_word_embeddings:
            table.append(Rule(self.head, (Part("lm_head/embedding", Same()),)))
        return table

    def _layers(self, model: Decoder) -> list[Layer]:
        """The layers of a model, in depth order. Raises UserError for a mixer or MLP that the family does not have."""
        depth = model_lib.layers(model)
        if not depth:
            raise UserError(
                "the model has no layers, expected at least one in the 'hf' format; save with format 'lcx'"
            )
        for i, layer in enumerate(depth):
            mixer, mlp = layer.block.mixer, layer.block.mlp
            if type(mixer) is not self.mixer_type or type(mlp) not in self.mlp_types:
                others = " or ".join(kind.__name__ for kind in self.mlp_types)
                raise UserError(
                    f"layer {i} is {type(mixer).__name__} + {type(mlp).__name__}; the 'hf' format of this model_type "
                    f"holds {self.mixer_type.__name__} and {others} only, save with format 'lcx' (a linearized "
                    "model also with 'lolcats')"
                )
        return depth

    def _attention_rules(self, prefix: str, layer: Layer) -> list[Rule]:
        table, mixer = super()._attention_rules(prefix, layer), layer.block.mixer
        if not self.paired or mixer.rope is None:
            return table
        dims = rotary_dim(mixer.rope, mixer.head_dim)
        layouts: dict[str, Layout] = {"weight": PairedRows(dims), "bias": PairedBias(dims)}

        def paired(rule: Rule) -> Rule:
            if not rule.name.startswith((f"{prefix}q_proj.", f"{prefix}k_proj.")):
                return rule
            (part,) = rule.parts
            layout = layouts[rule.name.rpartition(".")[2]]
            return dataclasses.replace(rule, parts=(dataclasses.replace(part, layout=layout),))

        return [paired(rule) for rule in table]


def _norm_rules(theirs: str, norm: Norm, ours: str, repeat: int | None = None) -> list[Rule]:
    names = (("weight", "scale"), ("bias", "bias"))[: 1 + norm.bias]
    return [Rule(f"{theirs}.{name}", (Part(f"{ours}/{leaf}", Same(), repeat),)) for name, leaf in names]


def difference(ours: Any, theirs: Any) -> str:
    """The first setting in which two models, blocks or parts differ, as "Attention.window = 8"; "" if there is none."""
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name, None)
        if (
            field.name in _FREE
            or a == b
            or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b))
        ):
            continue
        if isinstance(a, nn.Module) and type(a) is type(b):
            if found := difference(a, b):
                return found
        elif not (isinstance(a, Rope) and isinstance(b, Rope) and _turn_alike(a, b, ours.head_dim)):
            return f"{type(ours).__name__}.{field.name} = {getattr(a, '__name__', a)!r:.80}"
    return ""


def _turn_alike(a: Rope, b: Rope, head_dim: int) -> bool:
    """Whether two ropes turn heads alike, at any length."""
    for length in (1, MOST_TOKENS):
        (inv_a, scale_a), (inv_b, scale_b) = (rope.frequencies(head_dim, length) for rope in (a, b))
        if inv_a.shape != inv_b.shape or not np.allclose(inv_a, inv_b, rtol=1e-5, atol=0):
            return False
        if abs(scale_a - scale_b) > 1e-5:
            return False
    return True


def _states(config: Mapping[str, Any], key: str) -> bool:
    """Whether config.json states a rotary setting, at the top level or in one of the two objects."""
    places = (config, *(config.get(name) for name in ("rope_parameters", "rope_scaling")))
    return any(isinstance(place, Mapping) and key in place for place in places)
