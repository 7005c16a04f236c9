"""The decoder: embedding, stages of blocks, norm, head.

`parameters` makes and counts the parameters of a model; `llama` and `striped_hyena` are architectures.

A model *is* its configuration: frozen Flax modules that a .gin file builds directly. A Stage repeats a pattern of
blocks. Each stage is one scan, so compile time grows with the length of the pattern, not with the depth.

    Llama-3 8B             ((A,) x 32)
    Qwen2, mixed windows   ((full,) x 21, (sliding,) x 7)
    Evo 2 7B               ((S,) x 1, (M, L, A, S, M, L, S) x 4, (M, L, A) x 1): the first layer's MLP differs
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import mixers, moved
from lcx.block import Block
from lcx.errors import UserError, check_not_negative, check_positive, check_sizes
from lcx.layers import INITIALIZATIONS, Embedding, Norm, wants_shapes
from lcx.mixers.kv_cache import LayerOf
from lcx.mlps.activations import ACTIVATIONS
from lcx.mlps.gated import GatedMlp as Mlp  # the old name, which existing .gin files and users' code import
from lcx.ops import cache_gradients
from lcx.ops.cross_entropy import LogitTransform
from lcx.parameters import (
    abstract_params,
    flops_per_token,
    init_params,
    mixer_macs_per_token,
    num_params,
    param_shardings,
    plain_init,
)
from lcx.remat import REMAT

__all__ = [
    "ACTIVATIONS", "Block", "Decoder", "Layer", "Layers", "Mlp", "Stage", "layers", "map_mixers", "part", "stages_of",
    "abstract_params", "flops_per_token", "init_params", "mixer_macs_per_token", "num_params", "param_shardings",
    "plain_init",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pattern of blocks, repeated `repeat` times in depth.

    Raises:
      UserError: an empty pattern, a repeat below 1, or a block that Block.check rejects.
    """

    pattern: tuple[Block, ...]
    repeat: int = 1

    def __post_init__(self):
        if not self.pattern or self.repeat < 1:
            found = f"{len(self.pattern)} blocks x {self.repeat}"
            raise UserError(f"Stage is {found}, expected at least one block, once: change pattern or repeat")
        for block in self.pattern:
            block.check()


class _Period(nn.Module):
    """One pass through a stage's pattern: the body of its scan.

    Flax binds modules that it finds in attributes and names their parameters after the attribute. It does not look
    inside a Stage, so blocks are named here, and each mixer is named `mixer`, whatever its class. Flax shares the
    weights of a module object that occurs twice, so each block gets its own copies.

    The backward pass recomputes one block at a time, not the whole pattern, so it holds the inner activations of only
    one block.
    """

    stage: Stage
    remat: str

    @nn.compact
    def __call__(self, carried, cache, layer, stacked, positions, segment_ids):
        x, before = carried
        if before:
            cache, before = cache_gradients.read(cache, before, layer)
        caches = {}
        for i, block in enumerate(self.stage.pattern):
            name = f"block_{i}"
            # Without the barriers of prevent_cse the compiler may recompute all blocks of a pattern up front, which
            # would hold all of their activations at once. With one block the scan itself is the barrier.
            several = len(self.stage.pattern) > 1
            kind = type(block)
            recomputed = kind if wants_shapes() else nn.remat(kind, policy=REMAT[self.remat], prevent_cse=several)
            fields = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
            fields |= {part: x.clone(parent=None) for part, x in fields.items() if isinstance(x, nn.Module)}
            fields["mlp_in_tiles"] |= self.remat == "host"
            block = recomputed(**{**fields, "parent": self, "name": name})
            block_cache = None if cache is None else cache.get(name)
            if block_cache is None and stacked:
                block_cache = LayerOf(stacked[name], layer)
            x, caches[name] = block(x, positions=positions, segment_ids=segment_ids, cache=block_cache)
        return (x, before), caches


def _scanned(stage: Stage, remat: str, *, initializing: bool) -> nn.Module:
    """The blocks of a stage, scanned `repeat` times.

    Flax checks that the body passes nothing out but carry and scanned values, which traces it once more. It is left
    out where the model is applied: the body is checked already, and tracing is most of the time to a first token. With
    the check the random numbers of an initialization are others, so there it stays unless only shapes are wanted.
    """
    if remat not in REMAT:
        raise UserError(f"remat {remat!r}: expected one of {', '.join(REMAT)}")
    scanned: Any = nn.scan(
        _Period,
        variable_axes={"params": 0, "lora": 0, "fp8": 0, "losses": 0, "activations": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=stage.repeat,
        check_constancy_invariants=initializing and not wants_shapes(),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(stage, remat)


def _cached(stage: Stage, cache: Any, num_tokens: int) -> tuple[Any, Any, Any]:
    """The caches of a stage as its scan takes them: (those cut by layer, the numbers of layers, those passed whole)."""
    if cache is None:
        return None, None, None
    whole = {
        f"block_{b}"
        for b, block in enumerate(stage.pattern)
        if mixers.reads_in_place(block.mixer, num_tokens)
    }
    cut = {name: one for name, one in cache.items() if name not in whole}
    return cut, jnp.arange(stage.repeat), {name: cache[name] for name in whole}


def _appended(stage: Stage, cache: Any, new: Any) -> Any:
    """The caches of a stage, all its layers at once, with the new entries that its blocks returned."""
    blocks = {f"block_{b}": block.mixer for b, block in enumerate(stage.pattern)}
    return {name: mixers.state_after(mixer, cache[name], new[name]) for name, mixer in blocks.items()}


class Layers(nn.Module):
    """Some layers of a decoder, from residual stream to residual stream, without embedding and head.

    It can replace a Decoder in code that works on the parameter tree: weights, sharding and training.
    """

    hidden_size: int
    stages: tuple[Stage, ...]
    max_position_embeddings: int
    dtype: str = "float32"
    remat: str = "none"

    vocab_size = 0
    tie_word_embeddings = True

    @nn.nowrap
    def example(self) -> Float[Array, "1 2 D"]:
        return jnp.zeros((1, 2, self.hidden_size), jnp.dtype(self.dtype))

    def setup(self):
        for i, stage in enumerate(self.stages):
            setattr(self, f"stages_{i}", _scanned(stage, self.remat, initializing=self.is_initializing()))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        x = x.astype(jnp.dtype(self.dtype))
        for i in range(len(self.stages)):
            (x, _), _ = getattr(self, f"stages_{i}")((x, None), None, None, None, positions, segment_ids)
        return x


class Decoder(nn.Module):
    """A decoder-only language model.

    Attributes:
      max_position_embeddings: the model's context window (after extension), in tokens.
      dtype: dtype of activations; parameters keep their own (float32 master weights with bfloat16 compute).
      remat: which activations the backward pass recomputes: a key of REMAT.
      model_type: the Hugging Face family used for export; no effect on the computation.
      norm: the final norm; see layers.Norm.
      embedding_multiplier: factor on the input embeddings: sqrt(hidden_size) in Gemma.
      logit_multiplier: factor on the logits: logit_scale of Cohere, 1 / logits_scaling of Granite.
      scaled_layers: which rotary embeddings a context extension scales: "all", or those of the "full" layers, without a
        window, if sliding layers have their own (Gemma 3, OLMo 3).
      logit_softcap: c in c tanh(logits / c), applied after logit_multiplier, as in Gemma 2. None: no cap.
      initialization: of linear maps and their biases: "normal", or "torch" for uniform numbers within 1 / sqrt(fan-in),
        with which models of plain torch modules start; no effect on a model that has its weights.
    """

    vocab_size: int
    hidden_size: int
    stages: tuple[Stage, ...]
    max_position_embeddings: int
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    dtype: str = "float32"
    remat: str = "none"
    norm: Norm = Norm()
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    scaled_layers: str = "all"
    initialization: str = "normal"

    def setup(self):
        self.check()
        self.embed = self.embedding()
        if not self.tie_word_embeddings:
            self.lm_head = Embedding(self.vocab_size, self.hidden_size)
        self.final_norm = self.norm(self.hidden_size, self.norm_eps, name="final_norm")
        for i, stage in enumerate(self.stages):
            setattr(self, f"stages_{i}", _scanned(stage, self.remat, initializing=self.is_initializing()))

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for invalid sizes, multipliers and caps."""
        check_sizes(
            "Decoder",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.vocab_size >= 1 << 31:  # tokens are int32
            raise UserError(f"Decoder.vocab_size is {self.vocab_size}, expected less than 2^31: change vocab_size")
        _check_dtype(self.dtype)
        if self.scaled_layers not in ("all", "full"):
            raise UserError(
                f"Decoder.scaled_layers is {self.scaled_layers!r}, expected 'all' or 'full': change it"
            )
        if self.initialization not in INITIALIZATIONS:
            raise UserError(
                f"Decoder.initialization is {self.initialization!r}, expected one of {', '.join(INITIALIZATIONS)}"
            )
        check_not_negative("Decoder", norm_eps=self.norm_eps)
        check_positive(
            "Decoder",
            embedding_multiplier=self.embedding_multiplier,
            logit_multiplier=self.logit_multiplier,
            logit_softcap=self.logit_softcap,
        )
        if not self.stages:
            raise UserError("Decoder.stages is empty, expected at least one Stage: set Decoder.stages")

    @nn.nowrap
    def embedding(self) -> Embedding:
        """The module that maps tokens to the residual stream; its table is at `embed` in the parameter tree."""
        return Embedding(self.vocab_size, self.hidden_size, multiplier=self.embedding_multiplier)

    @nn.nowrap
    def example(self) -> Int[Array, "1 2"]:
        """Example tokens for tracing the module."""
        return jnp.zeros((1, 2), jnp.int32)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Activations after the final norm, and the cache including these tokens (None if no cache was given)."""
        x = self.embed(tokens, dtype=jnp.dtype(self.dtype))
        new_cache = {}
        for i in range(len(self.stages)):
            name = f"stages_{i}"
            stage_cache = None if cache is None else cache[name]
            cut, number, whole = _cached(self.stages[i], stage_cache, tokens.shape[1])
            values = jax.lax.stop_gradient(cut)  # their gradient goes into the other one, see ops/cache_gradients.py
            (x, cut), new = getattr(self, name)((x, cut), values, number, whole, positions, segment_ids)
            if cache is not None:
                new_cache[name] = _appended(self.stages[i], cut | whole, new)
        return self.final_norm(x), None if cache is None else new_cache

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32. Training uses hidden() and ops.cross_entropy, which never hold all logits at once."""
        x, _ = self.hidden(tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(x)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, float32, from the activations that `hidden` returns."""
        return self.logit_transform(self.head_module().logits(x))

    def head_module(self) -> Embedding:
        return self.embed if self.tie_word_embeddings else self.lm_head

    @nn.nowrap
    def head(self, params) -> Float[Array, "V D"]:
        """The output matrix in a parameter tree (the embedding itself if tied)."""
        return params["embed" if self.tie_word_embeddings else "lm_head"]["embedding"]

    @property
    def logit_transform(self) -> LogitTransform:
        """The transform from products with the output matrix to logits, in the form that ops.cross_entropy takes."""
        return LogitTransform(self.logit_multiplier, self.logit_softcap)

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: Any = None) -> Any:
        """Empty caches for every block with room for `length` tokens, in `dtype` (None: the model's dtype)."""
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)

        def stacked(block: Block, repeat: int):
            one = mixers.empty_state(block.mixer, batch_size, length, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeat, *x.shape)), one)

        return {
            f"stages_{s}": {
                f"block_{b}": stacked(block, stage.repeat) for b, block in enumerate(stage.pattern)
            }
            for s, stage in enumerate(self.stages)
        }

    @property
    def num_layers(self) -> int:
        return sum(len(stage.pattern) * stage.repeat for stage in self.stages)


def _check_dtype(dtype: str) -> None:
    """Raises UserError unless it is the name of a floating-point type."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise UserError(f"dtype is {dtype!r}, expected 'float32', 'bfloat16' or 'float16': change dtype of the model")


def stages_of(blocks: tuple[Block, ...]) -> tuple[Stage, ...]:
    """Groups blocks, given in depth order, into stages that compile quickly.

    If a period divides the whole depth, the result is one stage. Otherwise dynamic programming finds the split into
    repeated patterns with the smallest total number of blocks and stages.
    """
    depth = len(blocks)
    for period in range(1, depth // 2 + 1):
        if depth % period == 0 and blocks == blocks[:period] * (depth // period):
            return (Stage(blocks[:period], depth // period),)
    best: list[tuple[int, tuple[Stage, ...]]] = [(0, ())]  # best[n]: (cost, stages) of the first n blocks
    for end in range(1, depth + 1):
        found = []
        for period in range(1, end + 1):
            pattern, repeat = blocks[end - period : end], 1
            while True:
                cost, stages = best[end - period * repeat]
                found.append((cost + period + 1, (*stages, Stage(pattern, repeat))))
                start = end - period * (repeat + 1)
                if start < 0 or blocks[start : start + period] != pattern:
                    break
                repeat += 1
        best.append(min(found, key=lambda one: (one[0], -len(one[1]))))  # on ties, the fewest blocks
    return best[depth][1]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: its block and the location of its parameters: index `repeat` of the stacked arrays at `path`."""

    block: Block
    path: str
    repeat: int


def layers(model: Decoder | Layers) -> list[Layer]:
    """The layers of a model, in depth order."""
    return [
        Layer(block, f"stages_{s}/block_{b}", repeat)
        for s, stage in enumerate(model.stages)
        for repeat in range(stage.repeat)
        for b, block in enumerate(stage.pattern)
    ]


def part(model: Decoder, first: int, last: int) -> Layers:
    """Layers first, ..., last - 1 of a model as a separate module."""
    return Layers(
        hidden_size=model.hidden_size,
        stages=stages_of(tuple(layer.block for layer in layers(model)[first:last])),
        max_position_embeddings=model.max_position_embeddings,
        dtype=model.dtype,
        remat=model.remat,
        parent=None,
    )


def map_mixers(model: Decoder, fn) -> Decoder:
    """The same model with each mixer replaced by fn(mixer), for example to change a rope or a window."""

    def new_block(block: Block) -> Block:
        return block if block.mixer is None else block.clone(mixer=fn(block.mixer), parent=None)

    stages = tuple(Stage(tuple(new_block(b) for b in stage.pattern), stage.repeat) for stage in model.stages)
    return model.clone(stages=stages, parent=None)


__getattr__ = moved.names_of(__name__)
