"""Families that are Llama with a few switches.

model.embed_tokens.weight [V, D]     model.norm.weight [D]     lm_head.weight [V, D] (absent when tied)
model.layers.{i}.
  input_layernorm.weight, post_attention_layernorm.weight [D]
  self_attn.{q,k,v}_proj.weight [heads*H, D], .bias [heads*H]
  self_attn.o_proj.weight [D, N*H], .bias [D]
  self_attn.{q,k}_norm.weight [H]                              with qk_norm
  mlp.{gate,up}_proj.weight [F, D], .bias [F]
  mlp.down_proj.weight [D, F], .bias [D]
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lcx import model as model_lib
from lcx.block import Block, changed
from lcx.convert.core.rules import Flat, Part, Rule, Same, Transposed
from lcx.convert.hf import rope as hf_rope
from lcx.convert.hf.family import Family
from lcx.convert.hf.rope_parameters import written_max_position_embeddings
from lcx.convert.hf.values import boolean, fraction, integer
from lcx.errors import UserError
from lcx.llama import llama
from lcx.mixers.attention import Attention
from lcx.model import Decoder, Layer, Mlp
from lcx.rope_fields import shown

KEYS = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "original_max_position_embeddings", "partial_rotary_factor", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window",
    "vocab_size", hf_rope.REMEMBERED,
})  # fmt: skip
# The settings that config.json can express.
_ATTENTION = "num_heads num_kv_heads head_dim rope window qkv_bias o_bias qk_norm norm_eps implementation"
_DECODER = "vocab_size hidden_size stages max_position_embeddings norm_eps tie_word_embeddings model_type dtype remat"
#: Limit of layers and of head_dim; keeps a damaged file from building a huge model before its tensors are checked.
_MOST = 10_000


class _Sizes(NamedTuple):
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class LlamaLike(Family):
    """A family described by switches; subclasses override what a switch cannot express.

    Attributes:
      num_kv_heads, head_dim, norm_eps, sliding_window: transformers' defaults for keys missing in config.json
        (None: as many kv heads as heads; hidden_size / num_heads; no window).
      biases: "none"; "qkv" (always on q, k, v); "config" (on q, k, v and o if attention_bias is set).
      mlp_bias: whether config.json may enable biases in the MLP.
      windows: "none"; "uniform" (sliding_window applies to all layers); "by_layer" (layer_types selects the layers).
      fused: pairs of a module and the projections whose outputs it concatenates.
      writes_head_dim: whether to write head_dim even if it equals hidden_size / num_heads.
    """

    keys: frozenset[str] = KEYS
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    sliding_window: int | None = None
    biases: str = "none"
    mlp_bias: bool = False
    windows: str = "none"
    qk_norm: bool | str = False
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    writes_head_dim: bool = True

    # ----------------------------------------------------------------------------------- config.json -> model

    def model(self, config: Mapping[str, Any], *, dtype: str) -> Decoder:
        self.check_config(config)
        sizes = self._sizes(config)
        rope = hf_rope.read(config, self.rope, sizes.head_dim)
        biased = self.biases == "config" and boolean(config, "attention_bias")
        return llama(
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            max_position_embeddings=hf_rope.window(rope, integer(config, "max_position_embeddings")),
            rope=rope,
            layer_windows=self._windows(config, sizes.num_layers),
            qkv_bias=biased or self.biases == "qkv",
            o_bias=biased,
            qk_norm=self.qk_norm,
            mlp_bias=self.mlp_bias and boolean(config, "mlp_bias"),
            norm_eps=fraction(config, "rms_norm_eps", self.norm_eps),
            tie_word_embeddings=boolean(config, "tie_word_embeddings"),
            dtype=dtype,
            model_type=self.model_type,
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises UserError for settings of Llama-like models that this family does not support."""
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"config.json has hidden_act {shown(config['hidden_act'])}, supported is 'silu'")
        unsupported = {"attention_bias": self.biases == "none", "mlp_bias": not self.mlp_bias}
        for key in unsupported:
            if unsupported[key] and config.get(key) not in (None, False):
                raise UserError(
                    f"config.json has {key} {shown(config[key])}, which model_type {self.model_type!r} does not have; "
                    "remove the key"
                )

    def _sizes(self, config: Mapping[str, Any]) -> _Sizes:
        hidden_size, num_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
        num_kv_heads = integer(config, "num_key_value_heads", self.num_kv_heads or num_heads)
        head_dim = integer(config, "head_dim", self.head_dim or hidden_size // num_heads)
        num_layers = integer(config, "num_hidden_layers")
        if num_heads % num_kv_heads:
            raise UserError(
                f"config.json has num_attention_heads {num_heads}, expected a multiple of num_key_value_heads "
                f"{num_kv_heads}"
            )
        if not config.get("head_dim") and not self.head_dim and hidden_size % num_heads:
            raise UserError(
                f"config.json has hidden_size {hidden_size}, expected a multiple of num_attention_heads "
                f"{num_heads}"
            )
        if max(num_layers, head_dim) > _MOST:
            raise UserError(
                f"config.json has {num_layers} layers and head_dim {head_dim}, expected at most {_MOST}"
            )
        return _Sizes(num_layers, num_heads, num_kv_heads, head_dim)

    def _windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...] | None:
        window = config.get("sliding_window", self.sliding_window)
        types = layer_types(config, num_layers)
        if self.windows == "none":
            if window or "sliding_attention" in (types or ()):
                raise UserError(
                    f"config.json has sliding_window {shown(window)}, which model_type {self.model_type!r} does "
                    "not use; remove the key"
                )
            return None
        if self.windows == "by_layer" and not boolean(config, "use_sliding_window"):
            window = None
        if window is not None:
            window = integer({"sliding_window": window}, "sliding_window")
        if self.windows == "uniform":
            expected = "full_attention" if window is None else "sliding_attention"
            if any(kind != expected for kind in types or ()):
                raise UserError(
                    f"config.json has layer_types that differ from sliding_window {window}, which holds for all "
                    f"layers of model_type {self.model_type!r}; remove layer_types"
                )
            return (window,) * num_layers
        if types is None:
            first = integer(config, "max_window_layers", 28, least=0)
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
        elif window is None and "sliding_attention" in types:
            raise UserError(
                "config.json has layer_types with sliding_attention but no window; set use_sliding_window and "
                "sliding_window"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    # ----------------------------------------------------------------------------------- model -> config.json

    def config(self, model: Decoder, *, dtype: str) -> dict[str, Any]:
        depth = layers(model)
        shape = _uniform_shape(model, depth)
        self.check_expressible(model, shape)
        window = written_max_position_embeddings(shape["rope"], model.max_position_embeddings)
        config = self._size_keys(model, shape, dtype)
        config |= {"num_hidden_layers": len(depth), "max_position_embeddings": window}
        config |= self._window_keys([layer.block.mixer.window for layer in depth])
        return config | hf_rope.keys(self.rope, shape["rope"], window, shape["head_dim"])

    def check_expressible(self, model: Decoder, shape: Mapping[str, Any]) -> None:
        """Raises UserError for properties of the model that this model_type has no key for."""
        expected = {"qk_norm": self.qk_norm}
        if self.biases == "config":
            expected["o_bias"] = shape["qkv_bias"]
        else:
            expected |= {"qkv_bias": self.biases == "qkv", "o_bias": False}
        if not self.mlp_bias:
            expected["mlp_bias"] = False
        for name, value in expected.items():
            if shape[name] != value:
                raise UserError(
                    f"the model has {name} {shape[name]}, model_type {self.model_type!r} has {value} in the "
                    "'hf' format; save with format 'lcx'"
                )
        rope = shape["rope"]
        if rope.partial_rotary_factor != 1 and not self.rope.partial and rope.rope_type != "proportional":
            raise UserError(
                f"the model has partial_rotary_factor {rope.partial_rotary_factor:g}, which model_type "
                f"{self.model_type!r} cannot express; save with format 'lcx'"
            )

    def _size_keys(self, model: Decoder, shape: Mapping[str, Any], dtype: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
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
        if self.writes_head_dim or shape["head_dim"] * shape["num_heads"] != model.hidden_size:
            config["head_dim"] = shape["head_dim"]
        if self.biases == "config":
            config["attention_bias"] = shape["qkv_bias"]
        if self.mlp_bias:
            config["mlp_bias"] = shape["mlp_bias"]
        return config

    def _window_keys(self, windows: list[int | None]) -> dict[str, Any]:
        sizes = sorted({window for window in windows if window is not None})
        if (
            len(sizes) > 1
            or (self.windows == "none" and sizes)
            or (self.windows == "uniform" and len(set(windows)) > 1)
        ):
            kinds = ", ".join(str(window) for window in dict.fromkeys(windows))
            raise UserError(
                f"the layers have windows {kinds}, which model_type {self.model_type!r} cannot express; save with "
                "format 'lcx'"
            )
        if self.windows == "none":
            return {}
        if self.windows == "uniform":
            return {"sliding_window": windows[0]}
        first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
        return {
            "use_sliding_window": bool(sizes),
            "sliding_window": sizes[0] if sizes else None,
            "max_window_layers": first,
            "layer_types": [
                "full_attention" if window is None else "sliding_attention" for window in windows
            ],
        }

    # ------------------------------------------------------------------------------------ tensors <-> parameters

    def rules(self, model: Decoder) -> list[Rule]:
        table = [Rule(self.embedding, (Part("embed/embedding", Same()),))]
        for i, layer in enumerate(layers(model)):
            table += self._attention_rules(f"model.layers.{i}.self_attn.", layer)
            table += self._mlp_rules(f"model.layers.{i}.mlp.", layer)
            for theirs, ours in (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "mlp_norm")):
                part = Part(f"{layer.path}/{ours}/scale", Same(), layer.repeat)
                table.append(Rule(f"model.layers.{i}.{theirs}.weight", (part,)))
        table.append(Rule("model.norm.weight", (Part("final_norm/scale", Same()),)))
        if not model.tie_word_embeddings:
            table.append(Rule(self.head, (Part("lm_head/embedding", Same()),)))
        return table

    def _attention_rules(self, prefix: str, layer: Layer) -> list[Rule]:
        mixer, path = layer.block.mixer, f"{layer.path}/mixer"
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        table = self._kernels(prefix, path, names, layer.repeat)
        biased = names[:3] * mixer.qkv_bias + names[3:] * mixer.o_bias
        table += [
            Rule(f"{prefix}{name}.bias", (Part(f"{path}/{name}/bias", Flat(), layer.repeat),))
            for name in biased
        ]
        norms = ("q_norm", "k_norm") if mixer.qk_norm in (True, "all_heads") else ()
        return table + [
            Rule(f"{prefix}{name}.weight", (Part(f"{path}/{name}/scale", Same(), layer.repeat),))
            for name in norms
        ]

    def _mlp_rules(self, prefix: str, layer: Layer) -> list[Rule]:
        path, names = f"{layer.path}/mlp", ("gate_proj", "up_proj", "down_proj")
        table = self._kernels(prefix, path, names, layer.repeat)
        return table + [
            Rule(f"{prefix}{name}.bias", (Part(f"{path}/{name}/bias", Flat(), layer.repeat),))
            for name in names * layer.block.mlp.bias
        ]

    def _kernels(self, prefix: str, path: str, names: Sequence[str], repeat: int | None) -> list[Rule]:
        """Rules for the weights of some projections; those that the family fuses share one tensor."""
        module = {part: theirs for theirs, parts in self.fused for part in parts}
        found: dict[str, list[Part]] = {}
        for name in names:
            layout = Transposed(2 if name == "o_proj" else 1)
            part = Part(f"{path}/{name}/kernel", layout, repeat)
            found.setdefault(module.get(name, name), []).append(part)
        return [Rule(f"{prefix}{name}.weight", tuple(parts)) for name, parts in found.items()]


def layers(model: Decoder) -> list[Layer]:
    """The layers of a Llama-like model, in depth order.

    Raises:
      UserError: a layer is not Attention + Mlp, or has a setting that config.json cannot express.
    """
    found = model_lib.layers(model)
    if not found:
        raise UserError(
            "the model has no layers, expected at least one in the 'hf' format; save with format 'lcx'"
        )
    for i, layer in enumerate(found):
        mixer, mlp = type(layer.block.mixer), type(layer.block.mlp)
        if mixer is not Attention or mlp is not Mlp:
            raise UserError(
                f"layer {i} is {mixer.__name__} + {mlp.__name__}; the 'hf' format of this model_type holds "
                "Attention + Mlp only, save with format 'lcx' (a linearized Llama also with 'lolcats', a published "
                "2Mamba model with 'two_mamba')"
            )
        if unsaid := _unsaid(layer.block):
            raise UserError(
                f"layer {i} has {unsaid}, which model_type {model.model_type!r} cannot express; save with format 'lcx'"
            )
    if unsaid := changed(model, _DECODER):
        raise UserError(
            f"the model has {unsaid}, which model_type {model.model_type!r} cannot express; save with format 'lcx'"
        )
    return found


def _unsaid(block: Block) -> str:
    """A setting of a layer that config.json cannot express; "" if there is none."""
    return (
        changed(block, "mixer mlp norm_eps")
        or changed(block.mlp, "intermediate_size bias")
        or changed(block.mixer, _ATTENTION)
        or ("Attention.rope = None" if block.mixer.rope is None else "")
    )


def layer_types(config: Mapping[str, Any], num_layers: int) -> list[str] | None:
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
    return types


def _uniform_shape(model: Decoder, depth: list[Layer]) -> dict[str, Any]:
    """The sizes that config.json states once for all layers."""
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
