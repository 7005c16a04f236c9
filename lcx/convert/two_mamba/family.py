"""The published models as a family: a Llama with another mixer in place of its attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx import model as model_lib
from lcx.convert.core.rules import Rule
from lcx.convert.hf.families.llama import LLAMA
from lcx.convert.hf.llama_like import KEYS, LlamaLike
from lcx.convert.two_mamba import layouts
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.two_mamba import PUBLISHED, TwoMamba, published
from lcx.mlps.gated import GatedMlp
from lcx.model import Decoder
from lcx.rope import Rope
from lcx.rope_fields import shown

KEY = "attention_type"
NAMES = ("softmax", "mamba", *PUBLISHED)
ROTATION = "rotary_emb.freqs"
MASK = "attn_mask"
# These do not change the function, but for position_dtype: published models have it while they train, and nowhere else.
_UNSTORED = ("parent", "name", "init_gain", "form", "implementation", "position_dtype")
_LONGEST = 400  # of an attention_type in a message: longer than any published one


@dataclasses.dataclass(frozen=True)
class TwoMambaFamily(LlamaLike):
    """Models of the published 2Mamba trainer. `attention_type` says which of its 28 mixers all layers have."""

    model_type: str = "llama"
    architecture: str = "LlamaForCausalLM"
    keys: frozenset[str] = KEYS | {KEY}
    biases: str = "config"
    mlp_bias: bool = True
    buffers: tuple[str, ...] = (rf"model\.layers\.\d+\.self_attn\.({MASK}|rotary_emb\.(freqs|inv_freq))",)

    def model(self, config: Mapping[str, Any], *, dtype: str) -> Decoder:
        name = config.get(KEY)
        if not isinstance(name, str):
            raise UserError(f"config.json has {KEY} = {shown(name)}, expected one of {', '.join(NAMES)}")
        if name not in NAMES:
            raise UserError(
                f"config.json has {KEY} = {shown(name, _LONGEST)}, expected one of {', '.join(NAMES)}"
            )
        llama = LLAMA.model(config, dtype=dtype)
        attention: Any = llama.stages[0].pattern[0].mixer
        self._check_attention(attention, name)
        mixer = published(name, num_heads=attention.num_heads, head_dim=attention.head_dim)
        width = attention.num_heads * attention.head_dim
        if name == "mamba" and width != llama.hidden_size:
            raise UserError(
                f"config.json has head_dim x num_attention_heads = {width}, and {KEY} 'mamba' needs hidden_size "
                f"{llama.hidden_size}"
            )
        return _with_mixers(llama, mixer)

    def _check_attention(self, found: Attention, name: str) -> None:
        """Raises UserError for settings of Llama's attention that the published mixers do not have."""
        if found.num_kv_heads != found.num_heads:
            raise UserError(
                f"config.json has num_key_value_heads {found.num_kv_heads}, and {KEY} {name!r} needs as many as "
                f"num_attention_heads, {found.num_heads}"
            )
        if found.qkv_bias:
            raise UserError(f"config.json has attention_bias true, which is not read with {KEY} {name!r}")
        if name == "softmax" and found.rope != Rope():
            raise UserError(
                f"config.json changes rope_theta or rope_scaling, and {KEY} 'softmax' always rotates with base "
                "10000, unscaled: remove the keys"
            )

    def config(self, model: Decoder, *, dtype: str) -> dict[str, Any]:
        name = attention_types(model)[0]
        return LLAMA.config(_llama(model), dtype=dtype) | {KEY: name}

    def rules(self, model: Decoder) -> list[Rule]:
        table = [rule for rule in LLAMA.rules(_llama(model)) if ".self_attn." not in rule.name]
        for i, layer in enumerate(model_lib.layers(model)):
            path, prefix = f"{layer.path}/mixer", f"model.layers.{i}.self_attn."
            table += layouts.rules(layer.block.mixer, path, prefix, layer.repeat)
        return table


TWO_MAMBA = TwoMambaFamily()


def attention_types(model: Decoder) -> list[str]:
    """The published names of the mixer that all layers of the model have: two for the one that has two spellings.

    Raises:
      UserError: the layers differ, or their mixer is none of the published ones.
    """
    depth = model_lib.layers(model)
    known: dict[tuple[int, int] | None, list[str]] = {}
    for i, layer in enumerate(depth):
        mixer, sizes = layer.block.mixer, head_sizes(layer.block.mixer)
        if sizes not in known:
            made = {} if sizes is None else {name: _published(name, *sizes) for name in NAMES}
            known[sizes] = [name for name, other in made.items() if _stored(other) == _stored(mixer)]
        if not known[sizes] or _stored(mixer) != _stored(depth[0].block.mixer):
            differs = "differs from layer 0" if known[sizes] else "is none of the published 2Mamba mixers"
            raise UserError(
                f"the {type(mixer).__name__} of layer {i} {differs}, and the 'two_mamba' format holds one of "
                f"{', '.join(NAMES)} in all layers; save with format 'lcx'"
            )
        if type(layer.block.mlp) is not GatedMlp:
            raise UserError(
                f"the MLP of layer {i} is {type(layer.block.mlp).__name__}, and the 'two_mamba' format holds GatedMlp "
                "only; save with format 'lcx'"
            )
    if not depth:
        raise UserError("the model has no layers, expected at least one in the 'two_mamba' format")
    return known[head_sizes(depth[0].block.mixer)]


def _published(name: str, num_heads: int, head_dim: int) -> Any:
    return published(name, num_heads=num_heads, head_dim=head_dim)


def head_sizes(mixer: Any) -> tuple[int, int] | None:
    """(heads, head_dim) as config.json states them; None for a mixer of no published kind."""
    if isinstance(
        mixer, Mamba2
    ):  # the published one has a single head; the other heads' channels are its MLP's
        return 1 + mixer.mlp_size // mixer.head_dim, mixer.head_dim
    return (mixer.num_heads, mixer.head_dim) if type(mixer) in (TwoMamba, Attention) else None


def _stored(mixer: Any) -> tuple[type, dict[str, Any]]:
    fields = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer)}
    return type(mixer), {name: value for name, value in fields.items() if name not in _UNSTORED}


def _llama(model: Decoder) -> Decoder:
    """The model with plain attention of the same sizes in place of its mixers."""
    attention_types(model)
    num_heads, head_dim = head_sizes(model.stages[0].pattern[0].mixer) or (1, 1)
    return _with_mixers(model, Attention(num_heads, num_heads, head_dim, parent=None))


def _with_mixers(model: Decoder, mixer: Any) -> Decoder:
    """The model with this mixer in every layer, and the same paths of all other parameters."""
    stages = tuple(
        dataclasses.replace(
            stage, pattern=tuple(block.clone(mixer=mixer, parent=None) for block in stage.pattern)
        )
        for stage in model.stages
    )
    return model.clone(stages=stages, parent=None)
