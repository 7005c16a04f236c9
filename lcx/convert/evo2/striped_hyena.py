"""StripedHyena 2 under savanna's tensor names: the table of rules, and inference of the model from its tensors.

savanna's checkpoints have no config.json: except for a few conventions, the model follows from tensor names and shapes.
Every format of Evo 2 is first converted to this canonical set of tensors (model-parallel shares merged, roles
interleaved); layer i is `sequential.{i + 2}`:

    sequential.0.word_embeddings.weight [V, D]         sequential.{layers + 3}.norm.weight [D]
    input_layernorm.weight, pre_mlp_layernorm.weight [D]
    mixer.dense_projection.weight [3D, D]              row 3 c + role; of attention per head: its q, its k, its v
    mixer.dense_projection.fp8_scales [2]              of input and weight, of a hyena layer in FP8 (`fp8_states`)
    mixer.dense.weight [D, D], .bias [D]
    mixer.hyena_proj_conv.short_conv_weight [3D, 1, K]           the last tap is the current token's, as of SE
    mixer.mixer.short_conv.short_conv_weight [G, 1, 7]           SE
    mixer.mixer.filter.h, .decay [G, 128], .conv_bias [D]        MR; the first tap is the current token's
    mixer.mixer.filter.p, .gamma, .R [D, 16], .conv_bias [D]     LI
    mlp.w1.weight, mlp.w2.weight [F, D], mlp.w3.weight [D, F]

Only the first 128 taps of MR are used, however many are stored. The MLPs before the first MR or LI layer have a gelu;
the others have none (this follows from savanna's construction).
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from lcx import mixers
from lcx import model as model_lib
from lcx.block import Block, changed
from lcx.convert.core import model_source, rules
from lcx.convert.core.rules import Part, Rule, Same, Taps, Transposed
from lcx.convert.evo2.fp8_states import GRADIENT_SCALE, HISTORIES, State
from lcx.convert.files.tensor_io import FLOAT_DTYPES, TensorInfo, TensorSource
from lcx.errors import UserError
from lcx.extend import rotaries
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.model import Decoder, Mlp
from lcx.rope import Rope
from lcx.striped_hyena import striped_hyena

log = logging.getLogger(__name__)

LIVE_TAPS = 128
NORM_EPS = 1e-6
EMBEDDING = "sequential.0.word_embeddings.weight"
PROJECTION, FEATURIZER = "mixer.dense_projection.weight", "mixer.hyena_proj_conv.short_conv_weight"
SCALES = "mixer.dense_projection.fp8_scales"
SHORT_FILTER = "mixer.mixer.short_conv.short_conv_weight"
FILTER = "mixer.mixer.filter."
_WIDTHS_IN_FP8 = (1920, 8192)
DEFAULT_HEAD_DIM, DEFAULT_LENGTH = 128, 8192
TOKENIZER = {"kind": "bytes", "bos_id": None, "eos_id": 0}


class Tensors(TensorSource, Protocol):
    """A checkpoint in the canonical form above.

    Attributes:
      inv_freq: the stored frequencies of the attention layers, [head_dim / 2]; None if not stored.
      length: the number of tokens that the filters were stored for; None if not known.
      layer_0_only: whether only layer 0 has a gelu, rather than all layers before the first MR or LI.
      interpolation: what a configuration beside the tensors divides positions by; None if there is none that says so.
      fp8_states: the FP8 scaling of input projections by layer; {} if they are not in FP8.
    """

    inv_freq: np.ndarray | None
    length: int | None
    layer_0_only: bool
    interpolation: float | None

    @property
    def fp8_states(self) -> Mapping[int, State]: ...


def prefix(layer: int) -> str:
    return f"sequential.{layer + 2}."


def scales_of(states: Mapping[int, State]) -> dict[str, np.ndarray]:
    """The scales of inputs and weights under their canonical names."""
    return {prefix(i) + SCALES: np.array(state.scales, np.float32) for i, state in states.items()}


def final_norm(num_layers: int) -> str:
    return f"sequential.{num_layers + 3}.norm.weight"


@dataclasses.dataclass(frozen=True)
class LetteredLayer:
    """One layer in depth order: its letter in the pattern, its block, and the path of its parameters."""

    letter: str
    block: Block
    path: str
    repeat: int


_LETTERS: dict[type, str] = {HyenaSE: "S", HyenaMR: "D", HyenaLI: "H", Attention: "*"}


def layers(model: Decoder) -> list[LetteredLayer]:
    """The layers of a StripedHyena 2, in depth order.

    Raises:
      UserError: the model has a property that these formats cannot express.
    """
    found = []
    if not {type(block.mixer) for stage in model.stages for block in stage.pattern} & {
        HyenaSE,
        HyenaMR,
        HyenaLI,
    }:
        raise UserError(
            "the model has no hyena layers, which this format is for; save with format 'hf' or 'lcx'"
        )
    for s, stage in enumerate(model.stages):
        for repeat in range(stage.repeat):
            for b, block in enumerate(stage.pattern):
                letter = _LETTERS.get(type(block.mixer))
                problem = f"it is {type(block.mixer).__name__} + {type(block.mlp).__name__}"
                if letter is not None and type(block.mlp) is Mlp:
                    problem = _problem(model, block)
                if letter is None or problem:
                    raise UserError(
                        f"layer {len(found)}: {problem}, which checkpoints of StripedHyena 2 do not hold; save with "
                        "format 'lcx'"
                    )
                found.append(LetteredLayer(letter, block, f"stages_{s}/block_{b}", repeat))
    if not model.tie_word_embeddings:
        raise UserError("the output head is not the embedding; save with format 'lcx'")
    return found


# The settings that these formats can express.
_ATTENTION = "num_heads num_kv_heads head_dim rope window qkv_bias o_bias qk_norm norm_eps implementation"
_DECODER = "vocab_size hidden_size stages max_position_embeddings norm_eps tie_word_embeddings model_type dtype remat"


def _problem(model: Decoder, block: Block) -> str:
    mixer = block.mixer
    if block.mlp.bias:
        return "its MLP has biases"
    if {block.norm_eps, model.norm_eps} != {NORM_EPS}:
        return (
            f"its norms have an eps of {block.norm_eps:g} (the last one {model.norm_eps:g}), not {NORM_EPS:g}"
        )
    unsaid = changed(block, "mixer mlp norm_eps") or changed(model, _DECODER)
    if unsaid:
        return f"it has {unsaid}"
    if not isinstance(mixer, Attention):
        return "" if mixer.num_channels == model.hidden_size else f"it has {mixer.num_channels} channels"
    if unsaid := changed(mixer, _ATTENTION):
        return f"it has {unsaid}"
    if mixer.rope is None:
        return "its attention has no rope"
    expected = (mixer.num_heads, None, False, True, False)
    found = (mixer.num_kv_heads, mixer.window, mixer.qkv_bias, mixer.o_bias, mixer.qk_norm)
    return (
        ""
        if found == expected
        else "its attention is not that of Evo 2 (all heads, a bias on the output alone)"
    )


def activated_layers(pattern: str, layer_0_only: bool) -> int:
    """The number of leading layers whose MLP has a gelu."""
    return (
        1 if layer_0_only else next((i for i, letter in enumerate(pattern) if letter in "DH"), len(pattern))
    )


def check_activations(model: Decoder, *, layer_0_only: bool) -> None:
    """Raises UserError if the model would be read back with other activations."""
    found = layers(model)
    active = activated_layers("".join(layer.letter for layer in found), layer_0_only)
    for i, layer in enumerate(found):
        expected = "gelu" if i < active else "identity"
        if layer.block.mlp.activation != expected:
            raise UserError(
                f"the MLP of layer {i} has activation {layer.block.mlp.activation!r}, and this format means "
                f"{expected!r} there; save with format 'lcx'"
            )


def table_of(model: Decoder) -> list[Rule]:
    """The rules for one model."""
    found = layers(model)
    table = [Rule(EMBEDDING, (Part("embed/embedding", Same()),))]
    for i, layer in enumerate(found):
        table += [
            Rule(prefix(i) + name, parts, block) for name, parts, block in [*_mixer(layer), *_shared(layer)]
        ]
    return [*table, Rule(final_norm(len(found)), (Part("final_norm/scale", Same()),))]


def _shared(layer: LetteredLayer) -> list[tuple[str, tuple[Part, ...], None]]:
    def one(name: str, path: str, layout: rules.Layout) -> tuple[str, tuple[Part, ...], None]:
        return name, (Part(f"{layer.path}/{path}", layout, layer.repeat),), None

    return [
        one("input_layernorm.weight", "mixer_norm/scale", Same()),
        one("pre_mlp_layernorm.weight", "mlp_norm/scale", Same()),
        one("mlp.w1.weight", "mlp/gate_proj/kernel", Transposed()),
        one("mlp.w2.weight", "mlp/up_proj/kernel", Transposed()),
        one("mlp.w3.weight", "mlp/down_proj/kernel", Transposed()),
    ]


def _mixer(layer: LetteredLayer) -> list[tuple[str, tuple[Part, ...], int | None]]:
    def part(path: str, layout: rules.Layout) -> Part:
        return Part(f"{layer.path}/mixer/{path}", layout, layer.repeat)

    def one(name: str, path: str, layout: rules.Layout) -> tuple[str, tuple[Part, ...], None]:
        return name, (part(path, layout),), None

    if layer.letter == "*":
        heads = tuple(part(f"{name}_proj/kernel", Transposed()) for name in "qkv")
        return [
            (PROJECTION, heads, layer.block.mixer.head_dim),
            one("mixer.dense.weight", "o_proj/kernel", Transposed(2)),
            one("mixer.dense.bias", "o_proj/bias", Same()),
        ]
    table = [
        one(PROJECTION, "in_proj/kernel", Transposed()),
        one(FEATURIZER, "featurizer", Taps()),
        one("mixer.dense.weight", "out_proj/kernel", Transposed()),
        one("mixer.dense.bias", "out_proj/bias", Same()),
    ]
    if layer.block.mixer.fp8:
        table.append(one(SCALES, "in_proj/fp8_scales", Same()))
    if layer.letter == "S":
        return [*table, one(SHORT_FILTER, "h", Taps())]
    names = ("h", "decay") if layer.letter == "D" else ("p", "gamma", "R")
    table += [one(FILTER + name, name, Same()) for name in names]
    return [*table, one("mixer.mixer.conv_bias", "skip", Same())]


# ------------------------------------------------------------------------------------------ what tensors imply


def pattern_of(names: Mapping[str, Any]) -> str:
    """The pattern, one letter per layer, inferred from the filters that each layer has.

    Raises:
      UserError: there are no layers, or their numbers have a gap.
    """
    numbers = sorted(
        int(found.group(1))
        for name in names
        if (found := re.fullmatch(r"sequential\.(\d+)\.mlp\.w1\.weight", name))
    )
    if not numbers or numbers != list(range(2, 2 + len(numbers))):
        what = f"layers {', '.join(map(str, numbers))}" if numbers else "no sequential.N.mlp.w1.weight"
        raise UserError(f"expected the layers sequential.2, .3, ... of a StripedHyena 2, found {what}")
    letters = {SHORT_FILTER: "S", FILTER + "h": "D", FILTER + "p": "H"}
    return "".join(
        next((letter for name, letter in letters.items() if f"sequential.{n}.{name}" in names), "*")
        for n in numbers
    )


def model_of(source: Tensors) -> Decoder:
    """Infers the model from its tensors.

    Raises:
      UserError: a tensor that determines one of the sizes is missing.
    """
    pattern = pattern_of(source.tensors)

    def shape(letter: str, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        at = pattern.find(letter)
        info = source.tensors.get(prefix(at) + name) if at >= 0 else None
        return default if info is None or len(info.shape) != len(default) else info.shape

    def size(name: str) -> tuple[int, int]:
        info = source.tensors.get(name)
        if info is None or len(info.shape) != 2:
            raise UserError(f"expected {name} of two axes, found {'nothing' if info is None else info.shape}")
        return info.shape[0], info.shape[1]

    vocab_size, width = size(EMBEDDING)
    head_dim = DEFAULT_HEAD_DIM if source.inv_freq is None else 2 * len(source.inv_freq)
    if "*" in pattern and width % head_dim:
        raise UserError(
            f"{width} channels are no whole number of heads of {head_dim}, the size that inv_freq implies"
        )
    featurized = next((letter for letter in pattern if letter != "*"), "S")
    se_groups, _, se_length = shape("S", SHORT_FILTER, (1, 1, 7))
    mr_groups, mr_length = shape("D", FILTER + "h", (1, LIVE_TAPS))
    length = source.length or DEFAULT_LENGTH
    rope = Rope() if source.inv_freq is None else rope_of(source.inv_freq)
    return striped_hyena(
        pattern=pattern,
        hidden_size=width,
        intermediate_size=size(prefix(0) + "mlp.w1.weight")[0],
        num_heads=width // head_dim if "*" in pattern else 1,
        max_position_embeddings=length,
        se_groups=se_groups,
        mr_groups=mr_groups,
        vocab_size=vocab_size,
        se_length=se_length,
        mr_length=mr_length,
        num_modes=shape("H", FILTER + "p", (1, 16))[1],
        featurizer_length=shape(featurized, FEATURIZER, (1, 1, 3))[2],
        init_length=length,
        norm_eps=NORM_EPS,
        fp8=any(name.endswith(SCALES) for name in source.tensors),
        rope=_interpolated(rope, source.interpolation, length),
        activated_layers=activated_layers(pattern, source.layer_0_only),
    )


def _interpolated(rope: Rope, factor: float | None, length: int) -> Rope:
    """The rotary embedding of a model that reached `length` tokens by dividing positions by `factor`."""
    if factor is None:
        return rope
    original = max(1, round(length / factor))
    return dataclasses.replace(rope, rope_type="linear", factor=factor, original_max_position_embeddings=original)


def rope_of(inv_freq: np.ndarray) -> Rope:
    """The rotary embedding with exactly these frequencies, [head_dim / 2].

    If a rope_theta reproduces them bit for bit, the Rope holds only the rope_theta. Otherwise it holds the list of
    frequencies and the nearest rope_theta, with a warning if the difference exceeds float32 rounding, since its effect
    grows with the position.
    """
    values, head_dim = np.asarray(inv_freq, np.float32), 2 * len(inv_freq)
    theta = 1e4
    if len(values) > 1 and 0 < values[-1] < 1:
        theta = float(values[-1]) ** (-head_dim / (head_dim - 2))
        power = 10.0 ** round(math.log10(theta))
        theta = power if abs(theta / power - 1) < 0.05 else float(f"{theta:.3g}")
    computed = np.asarray(Rope(rope_theta=max(theta, 1.001)).frequencies(head_dim, 1)[0])
    if np.array_equal(computed, values):
        log.info("inv_freq is that of rope_theta %g", theta)
        return Rope(rope_theta=theta)
    relative = float(np.max(np.abs(values / computed - 1)))
    rounded = np.array_equal(computed.astype(FLOAT_DTYPES["bfloat16"]).astype(np.float32), values)
    log.log(
        logging.WARNING if relative > 1e-6 else logging.INFO,
        "inv_freq is not that of any rope_theta: %s of %g, up to %.2g away (relative); the stored values are used",
        "the bfloat16 rounding" if rounded else "near that",
        theta,
        relative,
    )
    return Rope(rope_theta=max(theta, 1.001), inv_freq=tuple(values.tolist()))


def frequencies_of(model: Decoder) -> np.ndarray | None:
    """The unscaled inv_freq of the model's attention, as these formats store it; None without attention.

    Raises:
      UserError: the formats cannot express the scaling. They support only position interpolation, with its factor in
        the settings of savanna and vortex.
    """
    mixers = [layer.block.mixer for layer in layers(model) if layer.letter == "*"]
    if not mixers:
        return None
    rope = mixers[0].rope
    if any(mixer.rope != rope for mixer in mixers) or rope.rope_type not in ("default", "linear"):
        raise UserError(
            f"rope_type {rope.rope_type!r} cannot be expressed in this format, which has one 'default' or 'linear' "
            "for all layers; save with format 'lcx'"
        )
    plain = Rope(rope_theta=rope.rope_theta, inv_freq=rope.inv_freq)
    return np.asarray(plain.frequencies(mixers[0].head_dim, 1)[0], np.float32)


def say_scaling(model: Decoder) -> None:
    """Warns, when a model is written, that its position interpolation is not stored in the checkpoint."""
    attentions = [layer.block.mixer for layer in layers(model) if layer.letter == "*"]
    if attentions and attentions[0].rope.rope_type == "linear":
        log.warning(
            "positions are divided by %g, which savanna and vortex do not store in checkpoints: set it in their "
            "configuration",
            attentions[0].rope.factor,
        )


def with_scaling_of(like: Decoder, model: Decoder) -> Decoder:
    """`model` with the position interpolation of `like`, of which these formats store the factor at most."""
    rope = next((rope for rope, _ in rotaries(like) if rope.rope_type == "linear"), None)

    def scaled(mixer):
        own = mixers.rotary(mixer)
        if rope is None or own is None or own.rope.factor not in (None, rope.factor):
            return mixer
        original = rope.original_max_position_embeddings
        new = dataclasses.replace(
            own.rope, rope_type="linear", factor=rope.factor, original_max_position_embeddings=original
        )
        return mixers.with_rope(mixer, new)

    return model_lib.map_mixers(model, scaled)


class StripedHyenaSource:
    """A model from tensors in canonical form (a `model_source.ModelSource`).

    Raises:
      UserError: the tensors are not those of a StripedHyena 2.
    """

    def __init__(self, tensors: Tensors, where: str):
        self.where, self._tensors = where, tensors
        try:
            model = model_of(tensors)
            self._table = rules.Table(table_of(model), model_source.leaf_shapes(model))
            self._table.check_source(tensors.tensors, against="the model that they imply")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        self.leaves = {
            path: TensorInfo(self._table.leaf_dtype(tensors.tensors, path), shape, where)
            for path, shape in self._table.shapes.items()
        }
        self.model: Decoder = model.clone(dtype=str(model_source.stored_dtype(self.leaves)), parent=None)
        fp8 = any(name.endswith(SCALES) for name in tensors.tensors)
        if model.hidden_size in _WIDTHS_IN_FP8 and not fp8:
            log.warning(
                "%s: has the width of Evo 2 1B, 20B or 40B, which were trained with FP8 input projections, and neither "
                "FP8 scales nor a configuration that sets them: input_projections='fp8' computes them so",
                where,
            )
        self.carried: dict[str, Any] = {}
        self.side_files: list[Any] = []
        self.tokenizer = TOKENIZER | {"vocab_size": model.vocab_size} if model.vocab_size > 255 else None

    @property
    def fp8_scaling(self) -> dict[str, np.ndarray]:
        """See model_source.fp8_scaling."""
        states, stacks = self._tensors.fp8_states, dict[str, list[State]]()
        for layer, lettered in enumerate(layers(self.model)):
            if layer in states:
                stacks.setdefault(f"{lettered.path}/mixer/in_proj", []).append(states[layer])
        found = {f"{path}/{HISTORIES}": [one.history for one in stack] for path, stack in stacks.items()}
        rates = {f"{path}/{GRADIENT_SCALE}": [s.gradient_scale for s in x] for path, x in stacks.items()}
        return {path: np.array(values, np.float32) for path, values in (found | rates).items()}

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        return self._table.read(self._tensors, path, index)
