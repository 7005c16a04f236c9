"""LoRA adapters in PEFT's files <-> the `lora` collection of an lcx model.

A folder holds adapter_config.json and adapter_model.safetensors, with two matrices a module:

    base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [R, in]      .lora_B.weight [out, R]

and the update lora_alpha / R * B A. Modules have the names of the family's table (llama.py), so what differs is only
the layout. A fused module (Phi-3's qkv_proj) has one A for all of its parts; each part gets its own here, and if
training has pulled them apart, they are written side by side, with the sum of their ranks: the same function.

    lora = peft.load("path/to/adapter", model)
    peft.save("path/to/adapter", model, lora)
    peft.export("path/to/workdir", "path/to/adapter")       # from a run that trained with LoRA
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx import describe
from lcx.array_store import StepReader
from lcx.checkpoint_folder import find_step, read_record
from lcx.convert import destination, hf_folder, lcx_folder, llama, rules, safetensors, sources, torch_bin
from lcx.convert.lolcats import softmax_model
from lcx.convert.rules import Transposed
from lcx.convert.tensor_io import TensorInfo, TensorSource
from lcx.errors import UserError
from lcx.model import Decoder

CONFIG, WEIGHTS, TORCH_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
#: Settings of adapter_config.json that would change the function, and the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), (False,)),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "modules_to_save")
        + (
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "velora_config",
        ),
        (None, [], {}),
    ),
}
#: Ways to initialise that change the base weights too: their files belong to another base.
_MOVES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Part:
    """One projection of one layer inside a module: rows [start, stop) of the module's output."""

    path: str
    repeat: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """A [R, in], B [out, R] and the scale of the update scale * B A."""

    A: np.ndarray
    B: np.ndarray
    scale: float


def load(path: str | os.PathLike, model: Decoder) -> dict[str, Any]:
    """Reads an adapter as the `lora` collection of this model, float32.

    Layers of a stage that the adapter does not touch have scale 0; smaller ranks are filled up with zeros.

    Raises:
      UserError: a missing or damaged file, a kind of adapter that is not plain LoRA, tensors that do not fit the model.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"no adapter at {path}, expected a folder with {CONFIG} and {WEIGHTS}")
    config = hf_folder.read_json(hf_folder.inside(folder, CONFIG))
    _check_config(folder, config)
    name = TORCH_WEIGHTS if not (folder / WEIGHTS).exists() and (folder / TORCH_WEIGHTS).exists() else WEIGHTS
    file = hf_folder.inside(folder, name)
    source: TensorSource = safetensors.SafetensorsFile(file) if name == WEIGHTS else torch_bin.TorchFile(file)
    try:
        return _collection(_parts_of_pairs(_pairs(source, config), modules(model)), model)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def save(
    path: str | os.PathLike,
    model: Decoder,
    lora: Mapping[str, Any],
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the pairs as an adapter that `peft.PeftModel.from_pretrained` loads onto the exported base model.

    Args:
      base_model: what adapter_config.json names as the base, a path or a name on the hub.
      overwrite: whether an existing adapter folder may be replaced.

    Raises:
      UserError: pairs that do not belong to this model, a destination that exists or cannot be written.
    """
    pairs = module_pairs(lora, modules(model))
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.B
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}
    needed = sum(info.nbytes for info in infos.values())
    with destination.replacing(
        path, overwrite=overwrite, needed_bytes=needed, replaceable=_is_adapter
    ) as folder:
        safetensors.write_file(folder / WEIGHTS, infos, lambda name: [tensors[name]])
        hf_folder.write_json(folder / CONFIG, _config(pairs, modules(model), base_model))


def export(
    checkpoint: str | os.PathLike,
    path: str | os.PathLike,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the pairs that a training run left in its checkpoint (a workdir, or one of its steps) as an adapter.

    Raises:
      UserError: no pairs there, or what `save` refuses.
    """
    folder = _step_folder(checkpoint)
    lora = stored_pairs(checkpoint)
    if lora is None:
        raise UserError(
            f"{folder} has no low-rank pairs, expected a checkpoint of a run that trained with LoRA"
        )
    model = describe.from_json(lcx_folder.read_meta(folder)["model"])
    save(path, model, lora, base_model=base_model, overwrite=overwrite)


def stored_pairs(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """The `lora` collection of a checkpoint; None if it has none."""
    folder = _step_folder(checkpoint)
    if "lora" not in read_record(folder).arrays:
        return None
    reader = StepReader(folder, "lora")
    return rules.unflatten({"/".join(keys): reader.read(keys, slice(None)) for keys in reader.arrays})


def _step_folder(checkpoint: str | os.PathLike) -> pathlib.Path:
    directory, step = find_step(checkpoint)
    return pathlib.Path(os.fspath(directory)) / str(step)


def modules(model: Decoder) -> dict[str, tuple[Part, ...]]:
    """The linear modules of the model under the names of its family: "model.layers.0.self_attn.q_proj" -> parts."""
    if model.model_type not in llama.FAMILIES:
        what = f"the model's model_type {model.model_type!r} has no PEFT names"
        raise UserError(f"{what}, expected one of {', '.join(llama.FAMILIES)}")
    shapes = sources.leaf_shapes(model)
    known: dict[str, tuple[Part, ...]] = {}
    for rule in llama.rules(softmax_model(model)):
        parts: list[Part] = []
        for part in rule.parts:
            if isinstance(part.layout, Transposed) and part.repeat is not None:
                shape, axes = shapes[part.path][1:], part.layout.in_axes
                path, start = part.path.removesuffix("/kernel"), parts[-1].stop if parts else 0
                stop = start + math.prod(shape[axes:])
                parts.append(Part(path, part.repeat, shape[:axes], shape[axes:], start, stop))
        if parts:
            known[rule.name.removesuffix(".weight")] = tuple(parts)
    return known


# ------------------------------------------------------------------------------------------------ reading


def _check_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    for key, plain in _PLAIN.items():
        if key in config and config[key] is not None and config[key] not in plain:
            expected = (
                f"expected {plain[0]!r}: only plain LoRA can be read, merge the adapter with PEFT instead"
            )
            raise UserError(f"{folder}: {CONFIG} has {key} {config[key]!r}, {expected}")
    method = config.get("init_lora_weights")
    if isinstance(method, str) and _MOVES_BASE.search(method):
        found = f"{CONFIG} has init_lora_weights {method!r}, which changes the base weights too"
        raise UserError(
            f"{folder}: {found}: convert the adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise UserError(f"{folder}: {CONFIG} has {key} {config.get(key)!r}, expected a positive number")


def _pairs(source: TensorSource, config: Mapping[str, Any]) -> dict[str, Pair]:
    """Module name -> its pair, checked for completeness."""
    names: dict[str, dict[str, str]] = {}
    for key in source.tensors:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise UserError(
                f"unexpected tensor {key!r}, expected {PREFIX}MODULE.lora_A.weight and lora_B.weight alone"
            )
        names.setdefault(match[1], {})[match[2]] = key
    pairs = {}
    for module, keys in names.items():
        if set(keys) != {"A", "B"}:
            raise UserError(f"{module} has lora_{next(iter(keys))} alone, expected lora_A and lora_B")
        A, B = (source.read(keys[side]) for side in "AB")
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise UserError(f"{module} has A {A.shape} and B {B.shape}, expected [R, in] and [out, R]")
        pairs[module] = Pair(A.astype(np.float32), B.astype(np.float32), _scale(config, module, A.shape[0]))
    return pairs


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """lora_alpha / rank, with PEFT's exceptions by module and for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    alpha = _by_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    stated = _by_module(config.get("rank_pattern"), module, config["r"])
    if stated != rank:
        raise UserError(f"{module} has rank {rank} in its tensors, expected {stated} as {CONFIG} says")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            found = f"{CONFIG} has the pattern {pattern!r}, which is no regular expression ({error})"
            raise UserError(f"{found}: correct rank_pattern or alpha_pattern") from None
    return default


def _parts_of_pairs(
    pairs: Mapping[str, Pair], known: Mapping[str, tuple[Part, ...]]
) -> Iterator[tuple[Part, Pair]]:
    """Every part with its own pair: the module's A, and its rows of B."""
    unknown = [name for name in pairs if name not in known]
    if unknown:
        expected = f"expected modules such as {next(iter(known))}"
        raise UserError(
            f"the adapter has pairs for {_listing(unknown)}, {expected}: it belongs to another kind of model"
        )
    if not pairs:
        raise UserError("the adapter holds no pairs, expected at least one")
    for name, pair in pairs.items():
        rows, columns = known[name][-1].stop, math.prod(known[name][0].in_shape)
        if pair.A.shape[1] != columns or pair.B.shape[0] != rows:
            sizes = f"maps {pair.A.shape[1]} to {pair.B.shape[0]} features, the model's {columns} to {rows}"
            raise UserError(f"the adapter's {name} {sizes}: it belongs to another model")
        for part in known[name]:
            yield part, dataclasses.replace(pair, B=pair.B[part.start : part.stop])


def _collection(parts: Iterable[tuple[Part, Pair]], model: Decoder) -> dict[str, Any]:
    """The pairs stacked by layer."""
    by_path: dict[str, list[tuple[Part, Pair]]] = collections.defaultdict(list)
    for part, pair in parts:
        by_path[part.path].append((part, pair))
    shapes, flat = sources.leaf_shapes(model), {}
    for path, entries in by_path.items():
        L, rank = shapes[f"{path}/kernel"][0], max(len(pair.A) for _, pair in entries)
        part = entries[0][0]
        a = np.zeros((L, *part.in_shape, rank), np.float32)
        b = np.zeros((L, rank, *part.out_shape), np.float32)
        scale = np.zeros(L, np.float32)
        for part, pair in entries:
            own = len(pair.A)
            a[part.repeat, ..., :own] = pair.A.T.reshape(*part.in_shape, own)
            b[part.repeat, :own] = pair.B.T.reshape(own, *part.out_shape)
            scale[part.repeat] = pair.scale
        flat |= {f"{path}/a": a, f"{path}/b": b, f"{path}/scale": scale}
    return jax.tree.map(jnp.asarray, rules.unflatten(flat))


# ------------------------------------------------------------------------------------------------ writing


def module_pairs(lora: Mapping[str, Any], known: Mapping[str, tuple[Part, ...]]) -> dict[str, Pair]:
    """Module name -> the pair to write, in the order of the model; modules without an update are left out."""
    flat = {path: np.asarray(leaf) for path, leaf in rules.flatten(lora).items()}
    expected = {
        f"{part.path}/{leaf}" for parts in known.values() for part in parts for leaf in ("a", "b", "scale")
    }
    unknown = sorted(set(flat) - expected)
    if unknown:
        raise UserError(
            f"the lora collection has {_listing(unknown)}, which the model lacks: pass its own model"
        )
    found = {}
    for name, parts in known.items():
        present = {part: pair for part in parts if (pair := _part_pair(flat, part)) is not None}
        if present:
            found[name] = next(iter(present.values())) if len(parts) == 1 else _fused(parts, present)
    if not found:
        raise UserError("the lora collection holds no pairs, expected at least one: nothing to save")
    return found


def _part_pair(flat: Mapping[str, np.ndarray], part: Part) -> Pair | None:
    if f"{part.path}/a" not in flat:
        return None
    a, b, scale = (
        flat[f"{part.path}/{leaf}"][part.repeat].astype(np.float32) for leaf in ("a", "b", "scale")
    )
    if a.shape[:-1] != part.in_shape or b.shape[1:] != part.out_shape:
        found = f"the lora pair at {part.path} has a {a.shape} and b {b.shape} in a layer"
        raise UserError(
            f"{found}, expected {part.in_shape} and {part.out_shape} beside the rank: pass its own model"
        )
    rank = a.shape[-1]
    pair = Pair(a.reshape(-1, rank).T.copy(), b.reshape(rank, -1).T.copy(), float(scale))
    return pair if scale else None


def _fused(parts: tuple[Part, ...], present: Mapping[Part, Pair]) -> Pair:
    """One pair for a module of several parts: one A if all have the same, else the sum of their ranks."""
    first = next(iter(present.values()))
    rows = parts[-1].stop
    if all(np.array_equal(pair.A, first.A) and pair.scale == first.scale for pair in present.values()):
        B = np.zeros((rows, len(first.A)), np.float32)
        for part, pair in present.items():
            B[part.start : part.stop] = pair.B
        return Pair(first.A, B, first.scale)
    A = np.concatenate([pair.A for pair in present.values()])
    B, column = np.zeros((rows, len(A)), np.float32), 0
    for part, pair in present.items():
        # A module has one scale; where the parts' differ, the quotient goes into B.
        B[part.start : part.stop, column : column + len(pair.A)] = pair.B * np.float32(
            pair.scale / first.scale
        )
        column += len(pair.A)
    return Pair(A, B, first.scale)


def _config(pairs: Mapping[str, Pair], known: Iterable[str], base_model: str | None) -> dict[str, Any]:
    """adapter_config.json. Modules whose rank or alpha is not the common one stand in the patterns."""
    ranks = {name: len(pair.A) for name, pair in pairs.items()}
    alphas = {name: number(pair.scale * len(pair.A)) for name, pair in pairs.items()}
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    last = {name.rpartition(".")[2] for name in pairs}
    all_layers = {name for name in known if name.rpartition(".")[2] in last} == set(pairs)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(last) if all_layers else list(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _pattern(module: str) -> str:
    return re.escape(module.removeprefix("model."))  # older PEFT wants something before what it matches


def number(value: float) -> int | float:
    """Without the rounding noise of a float32 scale, and whole where it is: PEFT's lora_alpha is an integer."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value


def _is_adapter(folder: pathlib.Path) -> bool:
    return (folder / CONFIG).is_file()


def _listing(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
