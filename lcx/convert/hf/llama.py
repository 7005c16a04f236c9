"""The Llama family in Hugging Face's layout: Llama 2 to 3.2, Mistral, Qwen2, Qwen3, Phi-3.

They are one architecture with a few switches (`FAMILIES`), so one table of tensor names serves them all:

    model.embed_tokens.weight [V, D]     model.norm.weight [D]     lm_head.weight [V, D] (absent when tied)
    model.layers.{i}.
      input_layernorm.weight, post_attention_layernorm.weight [D]
      self_attn.{q,k,v}_proj.weight [heads*H, D], .bias [heads*H]
      self_attn.o_proj.weight [D, N*H], .bias [D]
      self_attn.{q,k}_norm.weight [H]                              Qwen3
      self_attn.qkv_proj.weight = q, k, v                          Phi-3, in place of the three
      mlp.{gate,up}_proj.weight [F, D], .bias [F]
      mlp.down_proj.weight [D, F], .bias [D]
      mlp.gate_up_proj.weight = gate, up                           Phi-3, in place of the two
"""

import dataclasses

from lcx import model as model_lib
from lcx.block import changed
from lcx.convert.rules import Flat, Part, Rule, Same, Transposed
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.model import Decoder, Layer, Mlp


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one model_type apart.

    Attributes:
      architecture: the class that transformers builds.
      num_kv_heads, head_dim, norm_eps, sliding_window: what transformers assumes where config.json is silent
        (None: as many kv heads as heads; hidden_size / num_heads; no window).
      biases: "none"; "qkv" (always on q, k, v); "config" (attention_bias: q, k, v and o; mlp_bias).
      windows: "none"; "uniform" (sliding_window holds for all layers); "by_layer" (layer_types says where).
      fused: q, k, v in one tensor, gate and up in another.
    """

    architecture: str
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    sliding_window: int | None = None
    biases: str = "none"
    mlp_bias: bool = False
    windows: str = "none"
    qk_norm: bool = False
    partial_rotary: bool = False
    fused: bool = False
    writes_head_dim: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", biases="config", mlp_bias=True),
    "mistral": Family("MistralForCausalLM", num_kv_heads=8, sliding_window=4096, windows="uniform"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        num_kv_heads=32,
        sliding_window=4096,
        biases="qkv",
        windows="by_layer",
        writes_head_dim=False,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        biases="config",
        windows="by_layer",
        qk_norm=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        norm_eps=1e-5,
        windows="uniform",
        partial_rotary=True,
        fused=True,
        writes_head_dim=False,
    ),
}

#: Buffers that old checkpoints carry although they follow from config.json.
HARMLESS = (r".*rotary_emb\.inv_freq",)


#: The settings that config.json says.
_ATTENTION = "num_heads num_kv_heads head_dim rope window qkv_bias o_bias qk_norm norm_eps implementation"
_DECODER = "vocab_size hidden_size stages max_position_embeddings norm_eps tie_word_embeddings model_type dtype remat"
_ELSE = "save with format 'lcx'"


def layers(model: Decoder) -> list[Layer]:
    """The layers of a model of this family, in depth order.

    Raises:
      UserError: a mixer or mlp that the family does not have.
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
                "Attention + Mlp only, save with format 'lcx' (a linearized Llama also with 'lolcats')"
            )
        block = layer.block
        unsaid = (
            changed(block, "mixer mlp norm_eps")
            or changed(block.mlp, "intermediate_size bias")
            or changed(block.mixer, _ATTENTION)
            or ("Attention.rope = None" if block.mixer.rope is None else "")
        )
        if unsaid:
            raise UserError(
                f"layer {i} has {unsaid}, which model_type {model.model_type!r} does not: {_ELSE}"
            )
    if unsaid := changed(model, _DECODER):
        raise UserError(f"the model has {unsaid}, which model_type {model.model_type!r} does not: {_ELSE}")
    return found


def rules(model: Decoder) -> list[Rule]:
    """The table for one model, in the order in which transformers writes the tensors."""
    family = FAMILIES[model.model_type]
    table = [Rule("model.embed_tokens.weight", (Part("embed/embedding", Same()),))]
    for i, layer in enumerate(layers(model)):
        table += _attention_rules(f"model.layers.{i}.self_attn.", layer, family)
        table += _mlp_rules(f"model.layers.{i}.mlp.", layer, family)
        for theirs, ours in (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "mlp_norm")):
            part = Part(f"{layer.path}/{ours}/scale", Same(), layer.repeat)
            table.append(Rule(f"model.layers.{i}.{theirs}.weight", (part,)))
    table.append(Rule("model.norm.weight", (Part("final_norm/scale", Same()),)))
    if not model.tie_word_embeddings:
        table.append(Rule("lm_head.weight", (Part("lm_head/embedding", Same()),)))
    return table


def _attention_rules(prefix: str, layer: Layer, family: Family) -> list[Rule]:
    mixer, path = layer.block.mixer, f"{layer.path}/mixer"

    def kernel(name: str, in_axes: int = 1) -> Part:
        return Part(f"{path}/{name}/kernel", Transposed(in_axes), layer.repeat)

    projections = ("q_proj", "k_proj", "v_proj")
    if family.fused:
        table = [Rule(f"{prefix}qkv_proj.weight", tuple(kernel(name) for name in projections))]
    else:
        table = [Rule(f"{prefix}{name}.weight", (kernel(name),)) for name in projections]
    table.append(Rule(f"{prefix}o_proj.weight", (kernel("o_proj", in_axes=2),)))
    biased = projections * mixer.qkv_bias + ("o_proj",) * mixer.o_bias
    table += [
        Rule(f"{prefix}{name}.bias", (Part(f"{path}/{name}/bias", Flat(), layer.repeat),)) for name in biased
    ]
    norms = ("q_norm", "k_norm") * mixer.qk_norm
    return table + [
        Rule(f"{prefix}{name}.weight", (Part(f"{path}/{name}/scale", Same(), layer.repeat),))
        for name in norms
    ]


def _mlp_rules(prefix: str, layer: Layer, family: Family) -> list[Rule]:
    path = f"{layer.path}/mlp"

    def kernel(name: str) -> Part:
        return Part(f"{path}/{name}/kernel", Transposed(), layer.repeat)

    names = ("gate_proj", "up_proj", "down_proj")
    if family.fused:
        table = [
            Rule(f"{prefix}gate_up_proj.weight", (kernel("gate_proj"), kernel("up_proj"))),
            Rule(f"{prefix}down_proj.weight", (kernel("down_proj"),)),
        ]
    else:
        table = [Rule(f"{prefix}{name}.weight", (kernel(name),)) for name in names]
    biased = names * layer.block.mlp.bias
    return table + [
        Rule(f"{prefix}{name}.bias", (Part(f"{path}/{name}/bias", Flat(), layer.repeat),)) for name in biased
    ]
