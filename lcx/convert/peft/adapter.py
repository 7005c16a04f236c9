"""PEFT's LoRA adapter files <-> the `lora` collection of an lcx model and the parameters trained in full with it.

`peft.files` describes the contents of a folder. Modules have the names of the family's table of rules, so only the
layout differs. A fused module (Phi-3's qkv_proj) has one A for all of its parts; here each part has its own copy. If
training has made the copies differ, they are concatenated on export, which adds up the ranks and gives the same
function. Parameters that were trained in full are written as `modules_to_save`.

    lora = adapter.load("path/to/adapter", model)           # only pairs; for any adapter: lcx.load(base, adapter=...)
    adapter.save("path/to/adapter", model, lora)
    adapter.export("path/to/workdir", "path/to/adapter")    # from a run that trained with LoRA
"""

import collections
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx.checkpoint import model_json
from lcx.checkpoint.folder import read_json, read_record
from lcx.convert.core import model_source, rules
from lcx.convert.core.model_source import ModelSource
from lcx.convert.core.rules import Transposed
from lcx.convert.files import destination, folders, safetensors, tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.peft import base as adapter_base
from lcx.convert.peft import merged, module_names, targets
from lcx.convert.peft.base import Base
from lcx.convert.peft.files import CONFIG, EMBEDDING_WEIGHT, HEAD_WEIGHT, PREFIX, WEIGHTS, LowRank, read
from lcx.convert.workdir.source import LcxSource, read_meta, step_folder, stored_pairs, trained
from lcx.errors import UserError
from lcx.model import Decoder


@dataclasses.dataclass(frozen=True)
class Part:
    """One projection of one layer inside a module: rows [start, stop) of the module's output.

    Attributes:
      item: the number of the expert, if it is one of several with a pair each; None if there are none.
    """

    path: str
    repeat: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    start: int
    stop: int
    layout: Transposed = Transposed()  # of the output's axes
    item: int | None = None

    @property
    def at(self) -> tuple[int, ...]:
        """Where its pair is in the stacked ones."""
        return (self.repeat,) if self.item is None else (self.repeat, self.item)


def load(path: str | os.PathLike, model: Decoder) -> dict[str, Any]:
    """Reads an adapter that consists only of low-rank pairs as the `lora` collection of this model, float32.

    Layers of a stage that the adapter does not change get scale 0; smaller ranks are padded with zeros.

    Raises:
      UserError: as in `peft.files.read`; the adapter holds more than pairs.
    """
    adapter = read(path, merged.known(model))
    more = [name for name, changes in adapter.changes.items() if not all(map(_is_pair, changes))]
    if more:
        raise UserError(
            f"{path}: in addition to pairs it changes {_listing(more)} (modules_to_save, DoRA ...): use "
            "lcx.load(base, adapter=...), which merges it"
        )
    return collection(adapter.pairs, model)


def collection(pairs: Mapping[str, LowRank], model: Decoder, *, rank: int | None = None) -> dict[str, Any]:
    """Converts pairs by module to the `lora` collection of this model, float32; see `load`.

    Args:
      rank: pad all pairs to this rank; None: to the largest rank of each stack.

    Raises:
      UserError: a pair belongs to the embedding or the head.
    """
    return _collection(_parts_of_pairs(pairs, modules(model)), model, rank)


def _is_pair(change: Any) -> bool:
    return isinstance(change, LowRank) and change.magnitude is None


def modules(model: Decoder) -> dict[str, tuple[Part, ...]]:
    """The linear modules of the model under the names of its family: "model.layers.0.self_attn.q_proj" -> parts."""
    names = merged.table(model)
    known: dict[str, tuple[Part, ...]] = {}
    for rule in names.rules.values():
        parts: list[Part] = []
        for part in rule.parts:
            if isinstance(part.layout, Transposed) and part.repeat is not None:
                shape, axes = names.slice_shape(part), part.layout.in_axes
                path, start = part.path.removesuffix("kernel")[:-1], parts[-1].stop if parts else 0
                stop = start + math.prod(shape[axes:])
                layout = part.layout if axes == 1 else Transposed()
                parts.append(Part(path, part.repeat, shape[:axes], shape[axes:], start, stop, layout, part.item))
        if parts:
            known[rule.name.removesuffix(".weight")] = tuple(parts)
    return known


# ------------------------------------------------------------------------------------------------ reading


def _parts_of_pairs(
    pairs: Mapping[str, LowRank], known: Mapping[str, tuple[Part, ...]]
) -> Iterator[tuple[Part, LowRank]]:
    """Yields each part with its own pair: the module's A, and the part's rows of B."""
    for name, pair in pairs.items():
        if name not in known:
            raise UserError(
                f"the adapter has a pair for {name}, and here only projections have pairs: merge it"
            )
        for part in known[name]:
            yield part, dataclasses.replace(pair, B=pair.B[part.start : part.stop])


def _collection(parts: Iterable[tuple[Part, LowRank]], model: Decoder, common: int | None) -> dict[str, Any]:
    """The `lora` collection: the pairs stacked over the layers of each stage."""
    by_path: dict[str, list[tuple[Part, LowRank]]] = collections.defaultdict(list)
    for part, pair in parts:
        by_path[part.path].append((part, pair))
    shapes, flat = model_source.leaf_shapes(model), {}
    for path, entries in by_path.items():
        part, rank = entries[0][0], common or max(len(pair.A) for _, pair in entries)
        kernel = shapes[f"{path}/kernel" if part.item is None else f"{path}_kernel"]
        stack = kernel[: len(part.at)]
        a = np.zeros((*stack, *part.in_shape, rank), np.float32)
        b = np.zeros((*stack, rank, *part.out_shape), np.float32)
        scale = np.zeros(stack[0], np.float32)
        for part, pair in entries:
            own = len(pair.A)
            scale[part.repeat] = scale[part.repeat] or pair.scale
            # Columns of `a` and rows of `b` beyond the pair's own rank stay zero and do not change the update. The
            # experts of a layer have one scale. If theirs differ, the ratio is multiplied into b.
            a[part.at][..., :own] = pair.A.T.reshape(*part.in_shape, own)
            rows = part.layout.to_lcx(pair.B, (own, *part.out_shape))
            b[part.at][:own] = rows * np.float32(pair.scale / scale[part.repeat])
        flat |= {f"{path}/a": a, f"{path}/b": b, f"{path}/scale": scale}
    return jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))


# ------------------------------------------------------------------------------------------------ writing


def save(
    path: str | os.PathLike,
    model: Decoder,
    lora: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    beside: Sequence[str] = (),
    base_model: str | None = None,
    overwrite: bool = False,
) -> str:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads onto the base model; returns a summary of it.

    Args:
      params: parameters of the model; needed only with `beside`.
      beside: paths of parameters that were trained in full, e.g. "embed/embedding".
      base_model: the base that adapter_config.json names, a path or a name on the hub.
      overwrite: whether an existing adapter folder may be replaced.

    Raises:
      UserError: pairs do not belong to this model, PEFT has no place for a trained parameter, or the destination
        exists or cannot be written.
    """
    source = None
    if beside:
        if params is None:
            raise UserError("save got `beside` without the parameters that it names: pass params")
        source = model_source.TreeSource(model, params)
    return _write(path, Base(base_model, model), lora, source, beside, overwrite)


def export(
    checkpoint: str | os.PathLike,
    path: str | os.PathLike,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes the parameters that a LoRA run trained, from its workdir or one of its steps, as an adapter.

    Args:
      base_model: the base that adapter_config.json names; None: the model that the run started from.

    Returns:
      Lines that state what the adapter holds, its base model, and the RoPE scaling to use with it.

    Raises:
      UserError: the checkpoint has no pairs, or as in `save`.
    """
    folder = step_folder(checkpoint)
    lora = stored_pairs(checkpoint)
    if lora is None:
        raise UserError(
            f"{folder} has no low-rank pairs, expected a checkpoint of a run that trained with LoRA"
        )
    model = model_json.from_json(read_meta(folder)["model"])
    origin = read_json(folder, "origin") if "origin" in read_record(folder).json else {}
    base = Base(base_model or origin.get("init_from"), model)
    beside = [] if (found := trained(folder)) is None else found
    source = LcxSource(checkpoint, merge=False)
    return [_write(path, base, lora, source, beside, overwrite), *adapter_base.lines(base)]


def _write(
    path: str | os.PathLike,
    base: Base,
    lora: Mapping[str, Any],
    source: ModelSource | None,
    beside: Sequence[str],
    overwrite: bool,
) -> str:
    known = modules(base.model)
    places = {part.path for parts in known.values() for part in parts}
    targets.check_places(base.model, {path.rpartition("/")[0] for path in flatten_dict(lora, sep="/")}, places)
    pairs = module_pairs(lora, known)
    experts = {name for name, parts in known.items() if parts[0].item is not None}
    full = _full(base.model, pairs, beside)
    pieces: dict[str, Callable[[], Iterable[np.ndarray]]] = {}
    infos: dict[str, TensorInfo] = {}
    for name, pair in pairs.items():
        for side, array in (("A", pair.A), ("B", pair.B)):
            key = f"{PREFIX}{name}.lora_{side}.weight"
            infos[key] = TensorInfo(array.dtype, array.shape)
            pieces[key] = functools.partial(iter, [array])
    for name, key in full.items():
        assert source is not None
        table = merged.table(base.model)
        stored = name if name in table.rules else EMBEDDING_WEIGHT  # a tied head has no rule of its own
        dtype = table.foreign_dtype(source.leaves, stored)
        infos[key] = TensorInfo(dtype, table.foreign_shapes[stored])
        pieces[key] = functools.partial(_pieces, source, table, stored, dtype)
    holds = _holds(pairs, full, infos)
    needed = sum(info.nbytes for info in infos.values())
    with destination.replacing(
        path, overwrite=overwrite, needed_bytes=needed, replaceable=_is_adapter
    ) as folder:
        safetensors.write_file(folder / WEIGHTS, infos, lambda key: pieces[key]())
        folders.write_json(folder / CONFIG, _config(pairs, full, base, experts))
        adapter_base.write(folder, base, holds)
        changed = read(folder, merged.known(base.model)).changes
        expected = {f"{name}.weight" for name in pairs} | full.keys()
        if missing := sorted(expected - changed.keys() - {HEAD_WEIGHT}):
            raise UserError(
                f"{folder}: {_listing(missing)} were trained but are missing from the written adapter: report this bug"
            )
    return holds


def _pieces(source: ModelSource, table: rules.Table, name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields a tensor under its name in the base model; a table (embedding or head) in pieces."""
    for part in table.rules[name].parts:
        shape = table.slice_shape(part)
        whole = tuple(slice(0, size) for size in shape)
        if part.repeat is not None:
            read = source.read(part.path, (slice(part.repeat, part.repeat + 1), *whole))[0]
            yield part.layout.to_foreign(read).astype(dtype)
            continue
        for rows in tensor_io.split_rows(shape, dtype.itemsize, tensor_io.PIECE_BYTES):
            yield source.read(part.path, (slice(*rows), *whole[1:])).astype(dtype)


def _full(model: Decoder, pairs: Mapping[str, LowRank], beside: Sequence[str]) -> dict[str, str]:
    """Name of each tensor to write in full -> its key. A module is written whole if any of its parameters was trained.

    Raises:
      UserError: PEFT has no place for a trained parameter.
    """
    table = merged.table(model)
    trained = {at.name for path in beside for at in table.places.get(path, {}).values()}
    if lost := sorted(path for path in beside if path not in table.places):
        raise UserError(
            f"{len(lost)} parameters trained in full have no place in a PEFT adapter, such as {lost[0]}: "
            "write the merged model (--dst_format=lcx, hf or lolcats; feature maps: lolcats_files)"
        )
    twice = sorted(name for name in trained if name.removesuffix(".weight") in pairs)
    if twice:
        raise UserError(
            f"{twice[0]} has a pair and was also trained in full, which PEFT cannot express: write the merged model "
            "(--dst_format=hf), or change LoRA.beside"
        )
    owners = {name.rpartition(".")[0] for name in trained}
    of_pairs = {name for name in trained if name.endswith(".bias") and name.rpartition(".")[0] in pairs}
    full = {}
    for name in table.rules:
        owner, _, kind = name.rpartition(".")
        if of_pairs and kind == "bias":
            full[name] = f"{PREFIX}{owner}.{'base_layer.' if owner in pairs else ''}bias"
        elif owner in owners - pairs.keys() and (not of_pairs or name in trained):
            full[name] = PREFIX + module_names.of_class(name)
    # Otherwise PEFT would leave the head unchanged.
    if model.tie_word_embeddings and EMBEDDING_WEIGHT in full:
        full[HEAD_WEIGHT] = PREFIX + HEAD_WEIGHT
    return full


def _holds(pairs: Mapping[str, LowRank], full: Iterable[str], infos: Mapping[str, TensorInfo]) -> str:
    """A summary: '6 pairs (q_proj 3, v_proj 3) of rank 4, alpha 8; 1 full tensor (norm); 12,345 bytes, float32'."""

    def listed(names: Iterable[str]) -> str:
        counts = collections.Counter(name.rpartition(".")[2] for name in names)
        return ", ".join(f"{name} {count}" if count > 1 else name for name, count in counts.items())

    def values(found: Iterable[Any]) -> str:
        return " and ".join(f"{value:g}" for value in sorted(set(found)))

    ranks = values(len(pair.A) for pair in pairs.values())
    alphas = values(number(pair.scale * len(pair.A)) for pair in pairs.values())
    parts = [f"{len(pairs)} pairs ({listed(pairs)}) of rank {ranks}, alpha {alphas}"]
    if whole := [name.rpartition(".")[0] if name.endswith(".weight") else name for name in full]:
        parts.append(f"{len(whole)} full tensors ({listed(whole)})")
    dtypes = "/".join(sorted({str(info.dtype) for info in infos.values()}))
    return "; ".join([*parts, f"{sum(info.nbytes for info in infos.values()):,} bytes, {dtypes}"])


def module_pairs(lora: Mapping[str, Any], known: Mapping[str, tuple[Part, ...]]) -> dict[str, LowRank]:
    """Module name -> the pair to write, in the order of the model; modules without an update are omitted."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(lora, sep="/").items()}
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


def _part_pair(flat: Mapping[str, np.ndarray], part: Part) -> LowRank | None:
    if f"{part.path}/a" not in flat:
        return None
    a, b = (flat[f"{part.path}/{leaf}"][part.at].astype(np.float32) for leaf in ("a", "b"))
    scale = flat[f"{part.path}/scale"][part.repeat]
    if a.shape[:-1] != part.in_shape or b.shape[1:] != part.out_shape:
        found = f"the lora pair at {part.path} has a {a.shape} and b {b.shape} in a layer"
        raise UserError(
            f"{found}, expected {part.in_shape} and {part.out_shape} in addition to the rank: pass its own model"
        )
    rank = a.shape[-1]
    while rank > 1 and not (a[..., rank - 1].any() or b[rank - 1].any()):
        rank -= 1  # remove the zero padding that `load` added
    a, b = (a[..., :rank], b[:rank]) if a.any() or b.any() else (a, b)
    rank = a.shape[-1]
    pair = LowRank(a.reshape(-1, rank).T.copy(), part.layout.to_foreign(b), float(scale))
    return pair if scale else None


def _fused(parts: tuple[Part, ...], present: Mapping[Part, LowRank]) -> LowRank:
    """One pair for a fused module: with the common A if all parts share it, else with the sum of their ranks."""
    first = next(iter(present.values()))
    rows = parts[-1].stop
    if all(np.array_equal(pair.A, first.A) and pair.scale == first.scale for pair in present.values()):
        B = np.zeros((rows, len(first.A)), np.float32)
        for part, pair in present.items():
            B[part.start : part.stop] = pair.B
        return LowRank(first.A, B, first.scale)
    A = np.concatenate([pair.A for pair in present.values()])
    B, column = np.zeros((rows, len(A)), np.float32), 0
    for part, pair in present.items():
        # A module has a single scale. If the parts have different scales, their ratio is multiplied into B.
        B[part.start : part.stop, column : column + len(pair.A)] = pair.B * np.float32(
            pair.scale / first.scale
        )
        column += len(pair.A)
    return LowRank(A, B, first.scale)


def _config(
    pairs: Mapping[str, LowRank], full: Mapping[str, str], base: Base, experts: Collection[str]
) -> dict[str, Any]:
    """adapter_config.json. The most common rank and alpha are the defaults; the patterns list the other modules."""
    known = merged.known(base.model)
    ranks = {name: len(pair.A) for name, pair in pairs.items()}
    alphas = {name: number(pair.scale * len(pair.A)) for name, pair in pairs.items()}
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    biases = any(key.endswith(".base_layer.bias") for key in full.values())
    saved = {name.rpartition(".")[0] for name in full if not (biases and name.endswith(".bias"))}
    tying = {"ensure_weight_tying": True} if base.model.tie_word_embeddings and HEAD_WEIGHT in full else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(name): value for name, value in alphas.items() if value != alpha},
        **targets.settings(pairs, known.linear, experts),
        "modules_to_save": _endings(saved, known.shapes) or None,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        # Without the key, PEFT would train embedding and head separately from here on. Older versions reject it, so it
        # is written only if needed.
        **tying,
    }


def _endings(saved: set[str], tensors: Iterable[str]) -> list[str]:
    """Names for modules_to_save. PEFT matches name endings, so the short name is used if it matches no other module."""
    parents = {".".join(name.split(".")[:end]) for name in tensors for end in range(1, name.count(".") + 1)}
    found = []
    for name in saved:
        short = name.rpartition(".")[2]
        unique = all(other in saved for other in parents if other.endswith(short))
        found.append(short if unique else module_names.of_class(name))
    return sorted(set(found))


def _pattern(module: str) -> str:
    return re.escape(module.removeprefix("model."))  # older PEFT versions require a prefix before the match


def number(value: float) -> int | float:
    """Removes the rounding noise of a float32 scale; an int if integral, because PEFT's lora_alpha is an integer."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value


def _is_adapter(folder: pathlib.Path) -> bool:
    return (folder / CONFIG).is_file()


def _listing(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
