"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3, Phi-3."""

import functools

from lcx.errors import UserError, check_sizes
from lcx.mixers.attention import Attention
from lcx.mlps.gated import GatedMlp
from lcx.model import Block, Decoder, stages_of
from lcx.rope import Rope
from lcx.wording import quantity


def llama(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    max_position_embeddings: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: Rope | None = Rope(),  # noqa: B008 (frozen)
    layer_ropes: tuple[Rope | None, ...] | None = None,
    layer_windows: tuple[int | None, ...] | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool | str = False,
    mlp_bias: bool = False,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    model_type: str = "llama",
    dtype: str = "float32",
    remat: str = "none",
    attention_implementation: str | None = None,
) -> Decoder:
    """A decoder of the Llama family (Llama 2/3, Mistral, Qwen2, Qwen3, Phi-3) from the usual hyper-parameters.

    Args:
      num_kv_heads: None: num_heads, which is multi-head attention.
      head_dim: None: hidden_size / num_heads.
      rope: the rotary embedding of all layers; ignored if layer_ropes is given.
      layer_ropes: the rope of each layer; None for a layer without positions (NoPE: every fourth layer of SmolLM3).
      layer_windows: the sliding window of each layer (None: full attention); None: full attention in all layers.

    Raises:
      UserError: inconsistent sizes, or per-layer settings whose number is not num_layers.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_sizes("llama", num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check_sizes("llama", hidden_size=hidden_size, intermediate_size=intermediate_size, vocab_size=vocab_size)
    check_sizes("llama", max_position_embeddings=max_position_embeddings)
    windows = (None,) * num_layers if layer_windows is None else tuple(layer_windows)
    ropes = (rope,) * num_layers if layer_ropes is None else tuple(layer_ropes)
    if head_dim is None and hidden_size % num_heads:
        raise UserError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}; set head_dim")
    if num_heads % num_kv_heads:
        raise UserError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
    for name, entries in (("layer_windows", windows), ("layer_ropes", ropes)):
        if len(entries) != num_layers:
            raise UserError(f"{name} has {quantity(len(entries), 'entry', 'entries')} for num_layers {num_layers}")

    @functools.cache
    def block(rope: Rope | None, window: int | None) -> Block:
        mixer = Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=hidden_size // num_heads if head_dim is None else head_dim,
            rope=rope,
            window=window,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            implementation=attention_implementation,
            parent=None,
        )
        return Block(
            mixer=mixer, mlp=GatedMlp(intermediate_size, mlp_bias, parent=None), norm_eps=norm_eps, parent=None
        )

    return Decoder(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        stages=stages_of(tuple(map(block, ropes, windows))),
        max_position_embeddings=max_position_embeddings,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        model_type=model_type,
        dtype=dtype,
        remat=remat,
        parent=None,
    )
