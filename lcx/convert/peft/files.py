"""The files of a PEFT adapter as changes to the tensors of its base model.

A folder holds adapter_config.json (`settings`) and adapter_model.safetensors (or .bin), with these tensor names:

    base_model.model.MODULE.lora_A.weight [R, in], .lora_B.weight [out, R]          W + scale B A
                           .lora_magnitude_vector [out]                             DoRA: the norms of W's rows
                           .lora_embedding_A [R, V], .lora_embedding_B [D, R]       of an embedding: W + scale (B A)^T
                           .weight, .bias                                           modules_to_save, biases: a new W
                           .base_layer.weight, .base_layer.bias                     the same of a module with a pair
                           .token_adapter.trainable_tokens_delta [n, D]             new values for some rows of W

MODULE is a module of the base under its Hugging Face name, "model.layers.0.self_attn.q_proj". PEFT changes modules, not
weights: if the head of the base is tied to its embedding, changing one leaves the other unchanged.
"""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from lcx.convert.files import folders, safetensors, tensor_io, torch_bin
from lcx.convert.files.tensor_io import FLOAT_DTYPES, TensorSource
from lcx.convert.peft import module_names, text_modules
from lcx.convert.peft import settings as peft_settings
from lcx.convert.peft.settings import EMBEDDING, HEAD, Settings
from lcx.errors import UserError

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, TORCH_WEIGHTS = peft_settings.FILE, "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
HEAD_WEIGHT, EMBEDDING_WEIGHT = f"{HEAD}.weight", f"{EMBEDDING}.weight"
_MAX_NAME = 300
#: Name components that torch wrappers insert.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAME = r"(?:\.(?P<adapter>[^.]+))?"  # the adapter's name, which PEFT omits when it saves
_KEYS = {
    kind: re.compile(rf"(?P<module>.+)\.{rest}")
    for kind, rest in {
        "A": rf"lora_A{_NAME}\.weight",
        "B": rf"lora_B{_NAME}\.weight",
        "embedding_A": rf"lora_embedding_A{_NAME}",
        "embedding_B": rf"lora_embedding_B{_NAME}",
        "magnitude": r"lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?",
        "rows": rf"token_adapter\.trainable_tokens_delta{_NAME}",
        "base weight": r"base_layer\.weight",
        "base bias": r"base_layer\.bias",
        "weight": rf"(?:modules_to_save{_NAME}\.)?weight",
        "bias": rf"(?:modules_to_save{_NAME}\.)?bias",
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Known:
    """The base model under its Hugging Face names.

    Attributes:
      shapes: tensor name -> shape, e.g. "model.layers.0.self_attn.q_proj.weight" -> [out, in].
      linear: names of the linear modules in the layers, e.g. "model.layers.0.self_attn.q_proj".
      tied: whether the head is tied to the embedding (`shapes` then has both).
    """

    shapes: Mapping[str, tuple[int, ...]]
    linear: tuple[str, ...]
    tied: bool


class Change(Protocol):
    """A change to a tensor of the base."""

    def apply(self, rows: np.ndarray, start: int) -> np.ndarray:
        """Returns the changed rows, float32; `rows` are the current rows [start, start + n)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """W + scale B A; with `magnitude`, its rows are rescaled to these norms (DoRA, arXiv 2402.09353)."""

    A: np.ndarray  # [R, in] float32
    B: np.ndarray  # [out, R] float32
    scale: float
    magnitude: np.ndarray | None = None  # [out]

    def apply(self, rows: np.ndarray, start: int) -> np.ndarray:
        stop = start + len(rows)
        new = rows + np.float32(self.scale) * (self.B[start:stop] @ self.A)
        if self.magnitude is None:
            return new
        return new * (self.magnitude[start:stop] / np.linalg.norm(new, axis=1))[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Replaced:
    """Replaces a tensor by another one, which is read on demand."""

    source: TensorSource
    key: str
    everywhere: bool = False  # whether the change also applies to the tied tensor

    def apply(self, rows: np.ndarray, start: int) -> np.ndarray:
        return self.source.read(self.key, start, start + len(rows)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Replaces some rows of a tensor."""

    places: np.ndarray  # [n]
    values: np.ndarray  # [n, D] float32
    everywhere: bool = False

    def apply(self, rows: np.ndarray, start: int) -> np.ndarray:
        inside = (self.places >= start) & (self.places < start + len(rows))
        new = rows.copy()
        new[self.places[inside] - start] = self.values[inside]
        return new


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that fits a base.

    Attributes:
      changes: name of a tensor of the base -> the changes to apply to it, in this order.
      ties: whether the head is tied to the embedding after the changes; False also if it was not before.
      nbytes: size of the adapter's tensors in bytes.
    """

    folder: pathlib.Path
    settings: Settings
    changes: Mapping[str, tuple[Change, ...]]
    ties: bool
    nbytes: int

    @property
    def pairs(self) -> dict[str, LowRank]:
        """Module -> its pair."""
        found = {
            name.removesuffix(".weight"): change
            for name, changes in self.changes.items()
            for change in changes
            if isinstance(change, LowRank)
        }
        return found


def read(path: str | os.PathLike, known: Known) -> Adapter:
    """Reads a folder, and checks it against the base and its own adapter_config.json.

    Raises:
      UserError: a missing or damaged file; an unsupported kind of adapter; tensors that are missing, unexpected,
        non-finite, or do not fit the base.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"no adapter at {path}, expected a folder with {CONFIG} and {WEIGHTS}: change the setting adapter"
        )
    if not (folder / CONFIG).exists() and not (folder / WEIGHTS).exists():
        raise UserError(
            f"no adapter at {path}, whose folder holds neither {CONFIG} nor {WEIGHTS}: change the setting adapter"
        )
    settings = peft_settings.read(folder)
    name = TORCH_WEIGHTS if not (folder / WEIGHTS).exists() and (folder / TORCH_WEIGHTS).exists() else WEIGHTS
    file = folders.inside(folder, name)
    source: TensorSource = safetensors.SafetensorsFile(file) if name == WEIGHTS else torch_bin.TorchFile(file)
    try:
        return _Reading(folder, settings, source, known).adapter()
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


class _Reading:
    """State of reading one folder into an Adapter."""

    def __init__(self, folder: pathlib.Path, settings: Settings, source: TensorSource, known: Known):
        self.folder, self.source, self.known = folder, source, known
        # module -> kind -> key
        found, spelling = text_modules.of_text_model(_sorted(source, settings.saved), settings.saved)
        names = " ".join(known.shapes)
        self.found = {module_names.of_checkpoint(module, names): keys for module, keys in found.items()}
        saved = tuple(module_names.of_checkpoint(name, names) for name in settings.saved)
        self.settings = dataclasses.replace(settings, spelling=spelling, saved=saved)
        if spelling:
            log.warning("%s: trained on a model with encoders, and read as an adapter of its text model", folder)
        self.changes: dict[str, list[Change]] = {}

    def adapter(self) -> Adapter:
        self._check_modules()
        self._check_targets()
        for module, keys in self.found.items():
            for kind in ("base weight", "base bias", "weight", "bias"):
                if kind in keys:
                    self._replace(module, kind, keys[kind])
        for module, keys in self.found.items():
            if "rows" in keys:
                self._add_rows(module, keys["rows"])
        self._add_pairs()
        self._check_saved()
        if not self.changes:
            raise UserError("the adapter holds no pairs, expected at least one")
        changes, ties = _tied(self.changes, self.known.tied)
        nbytes = sum(info.nbytes for info in self.source.tensors.values())
        order = {name: tuple(changes[name]) for name in self.known.shapes if name in changes}
        return Adapter(self.folder, self.settings, order, ties, nbytes)

    def _check_modules(self) -> None:
        if other := next((keys["other"] for keys in self.found.values() if "other" in keys), None):
            raise _unexpected(other)
        modules = {name.rpartition(".")[0] for name in self.known.shapes}
        unknown = [module for module in self.found if module not in modules]
        if unknown:
            what = "pairs" if {"A", "B"} & self.found[unknown[0]].keys() else "tensors"
            raise UserError(
                f"the adapter has {what} for {_listing(unknown)}, expected modules such as {self.known.linear[0]}: "
                "it belongs to another kind of model"
            )

    def _check_targets(self) -> None:
        """Raises UserError unless the pairs match target_modules.

        PEFT would silently initialise missing pairs anew, and drop extra ones.
        """
        expected = self.settings.targeted(self.known.linear, (EMBEDDING, HEAD))
        has = {
            module
            for module, keys in self.found.items()
            if keys.keys() & {"A", "B", "embedding_A", "embedding_B"}
        }
        if expected is None:
            return
        if self.settings.tying and self.known.tied and expected & {EMBEDDING, HEAD}:
            expected |= {EMBEDDING, HEAD}
        missing, extra = sorted(expected - has), sorted(has - expected)
        if missing:
            raise UserError(
                f"target_modules of {CONFIG} selects {len(expected)} modules, and the tensors of {len(missing)} of "
                f"them are missing: {_listing(missing)}; copy or download the adapter again"
            )
        if extra:
            raise UserError(
                f"the adapter has pairs for {_listing(extra)}, which target_modules of {CONFIG} does not select: one "
                "of the two is another adapter's"
            )

    def _replace(self, module: str, kind: str, key: str) -> None:
        name = f"{module}.{kind.rpartition(' ')[2]}"
        self._check_shape(name, key, self.known.shapes.get(name))
        saved = self.settings.is_saved(module)
        bias = name.endswith(".bias") and self.settings.bias != "none"
        # PEFT also saves tables whose vocabulary was resized, or that have a pair.
        table = module in (EMBEDDING, HEAD)
        if not (saved or bias or table):
            asks = "modules_to_save" if kind == "weight" else "bias"
            raise UserError(
                f"unexpected tensor {key!r}, which {asks} of {CONFIG} does not select: correct it"
            )
        everywhere = table and not (self.settings.is_saved(EMBEDDING) or self.settings.is_saved(HEAD))
        self.changes.setdefault(name, []).append(Replaced(self.source, key, everywhere))

    def _add_rows(self, module: str, key: str) -> None:
        stated = {end: rows for end, rows in self.settings.rows.items() if self._named(module).endswith(end)}
        if len(stated) != 1:
            raise UserError(
                f"unexpected tensor {key!r}, which trainable_token_indices of {CONFIG} does not select"
            )
        (places,) = stated.values()
        name = f"{module}.weight"
        rows, *rest = self.known.shapes[name]
        self._check_shape(name, key, (len(places), *rest))
        if max(places) >= rows or len(set(places)) < len(places):
            raise UserError(
                f"trainable_token_indices of {CONFIG} has token {max(places)} (or one twice), expected different ids "
                f"below {rows}, the model's vocabulary"
            )
        # PEFT changes the tied module too, unless that has trained rows of its own.
        alone = sum("rows" in keys for keys in self.found.values()) == 1
        change = Rows(np.array(places), self._read(key), everywhere=alone)
        self.changes.setdefault(name, []).append(change)

    def _add_pairs(self) -> None:
        sides = {m: s for m, keys in self.found.items() if (s := _sides(m, keys)) is not None}
        read = {m: tuple(self._read(key) for key in keys) for m, keys in sides.items()}
        for module, (A, B) in read.items():
            if A.ndim != 2 or B.ndim != 2:
                raise UserError(f"{module} has A {A.shape} and B {B.shape}, expected [R, in] and [out, R]")
            # An embedding's weight is the transpose of a linear map's.
            if "embedding_A" in self.found[module]:
                read[module] = B.T, A.T
        for module, (A, B) in read.items():
            rows, columns = self.known.shapes[f"{module}.weight"]
            if A.shape[0] != B.shape[1]:
                raise UserError(f"{module} has A {A.shape} and B {B.shape}, expected [R, in] and [out, R]")
            if A.shape[1] != columns or B.shape[0] != rows:
                sizes = f"maps {A.shape[1]} to {B.shape[0]} features, the model's {columns} to {rows}"
                raise UserError(f"the adapter's {module} {sizes}: it belongs to another model")
        scales = self.settings.scales({module: len(A) for module, (A, _) in read.items()})
        for module, (A, B) in read.items():
            magnitude = self._magnitude(module, len(B))
            change = LowRank(np.ascontiguousarray(A), np.ascontiguousarray(B), scales[module], magnitude)
            self.changes.setdefault(f"{module}.weight", []).append(change)

    def _magnitude(self, module: str, rows: int) -> np.ndarray | None:
        key = self.found[module].get("magnitude")
        if (key is None) == self.settings.dora:
            state = "is missing" if key is None else "is there"
            raise UserError(
                f"the lora_magnitude_vector of {module} {state}, and use_dora of {CONFIG} is "
                f"{str(self.settings.dora).lower()}: the two do not belong together"
            )
        if key is None:
            return None
        if "embedding_A" in self.found[module]:
            raise UserError(f"{module} is an embedding with DoRA, which is not read here: merge it with PEFT")
        self._check_shape(f"{module}'s magnitude", key, (rows,))
        return self._read(key)

    def _check_saved(self) -> None:
        """Raises UserError if a tensor that the settings announce is missing."""
        promised = [
            name
            for name in self.known.shapes
            if self.settings.is_saved(name.rpartition(".")[0])
            or (name.endswith(".bias") and self.settings.bias == "all")
        ]
        missing = [name for name in promised if name not in self.changes]
        if missing:
            raise UserError(
                f"modules_to_save or bias of {CONFIG} selects {_listing(missing)}, which the adapter lacks: copy "
                "or download it again"
            )
        modules = {self._named(name.rpartition(".")[0]) for name in self.known.shapes}
        ignored = [
            end for end in self.settings.saved if not any(f"{m}.".find(f"{end}.") >= 0 for m in modules)
        ]
        if ignored:
            log.warning(
                "%s: modules_to_save names %s, which the model does not have", self.folder, _listing(ignored)
            )
        has_rows = [module for module, keys in self.found.items() if "rows" in keys]
        named = [self._named(module) for module in has_rows]
        absent = [end for end in self.settings.rows if not any(name.endswith(end) for name in named)]
        follows = self.known.tied and len(set(self.settings.rows.values())) == 1 and has_rows
        if absent and not follows:
            raise UserError(
                f"trainable_token_indices of {CONFIG} has {absent[0]!r}, whose rows the adapter does not hold"
            )

    def _named(self, module: str) -> str:
        """The name of a module in the model that was trained."""
        return text_modules.outer(module, self.settings.spelling)

    def _check_shape(self, name: str, key: str, expected: tuple[int, ...] | None) -> None:
        found = self.source.tensors[key].shape
        if expected is None:
            raise UserError(f"unexpected tensor {key!r}: the model has no {name}")
        if found != expected:
            advice = "it belongs to another model"
            if found[1:] == expected[1:] and name in (HEAD_WEIGHT, EMBEDDING_WEIGHT):
                advice = (
                    "its vocabulary was resized, so save the base with the resized embedding, and pass that"
                )
            raise UserError(f"the adapter's {name} is {found}, expected {expected}: {advice}")
        if self.source.tensors[key].dtype not in FLOAT_DTYPES.values():
            raise UserError(
                f"{key!r} is {self.source.tensors[key].dtype}, expected float32, bfloat16 or float16"
            )
        shape, itemsize = found, self.source.tensors[key].dtype.itemsize
        for start, stop in tensor_io.split_rows(shape, itemsize, tensor_io.PIECE_BYTES):
            _check_finite(key, self.source.read(key, start, stop).astype(np.float32))

    def _read(self, key: str) -> np.ndarray:
        """Reads a small tensor whole, as float32."""
        info = self.source.tensors[key]
        if info.dtype not in FLOAT_DTYPES.values():
            raise UserError(f"{key!r} is {info.dtype}, expected float32, bfloat16 or float16")
        return _check_finite(key, self.source.read(key).astype(np.float32))


def _sorted(source: TensorSource, saved: Collection[str]) -> dict[str, dict[str, str]]:
    """module -> kind of tensor -> its key in the file; of a saved module also kinds that no module here has, "other".
    """
    found: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    other = []
    for key in source.tensors:
        if len(key) > _MAX_NAME:
            raise UserError(
                f"a tensor's name has {len(key)} characters ({key[:60]!r}...), expected at most {_MAX_NAME}"
            )
        bare = _WRAPPERS.sub("", key)
        if bare != key or not bare.startswith(PREFIX):
            other.append(key)
        bare = bare.removeprefix(PREFIX)
        kind, match = next(
            ((kind, match) for kind, pattern in _KEYS.items() if (match := pattern.fullmatch(bare))),
            ("", None),
        )
        if match is None:
            module = bare.rpartition(".")[0]
            if not text_modules.inside(module, saved):
                raise _unexpected(key)
            found.setdefault(module, {})["other"] = key
            continue
        if name := match.groupdict().get("adapter"):
            names.add(name)
        if kind in found.setdefault(match["module"], {}):
            raise UserError(
                f"the tensors {key!r} and {found[match['module']][kind]!r} are the same, expected one"
            )
        found[match["module"]][kind] = key
    if len(names) > 1:
        raise UserError(
            f"the file holds the adapters {_listing(sorted(names))}, expected one: save each in its folder"
        )
    if other:
        log.warning(
            "%d tensors are read without what wrappers left in, or took from, their names: %s",
            len(other),
            other[0],
        )
    return found


def _unexpected(key: str) -> UserError:
    return UserError(f"unexpected tensor {key!r}, expected {PREFIX}MODULE.lora_A.weight and lora_B.weight")


def _sides(module: str, keys: Mapping[str, str]) -> tuple[str, str] | None:
    """The keys of A and B; None if the module has no pair."""
    for a, b in (("A", "B"), ("embedding_A", "embedding_B")):
        if a in keys and b in keys:
            return keys[a], keys[b]
        if a in keys or b in keys:
            raise UserError(
                f"{module} has lora_{a if a in keys else b} alone, expected lora_{a} and lora_{b}"
            )
    if "magnitude" in keys:
        raise UserError(f"{module} has lora_magnitude_vector alone, expected lora_A and lora_B too")
    return None


def _check_finite(key: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError(
            f"{key!r} holds numbers that are not finite (NaN or infinite): the adapter is damaged"
        )
    return values


def _tied(changes: dict[str, list[Change]], tied: bool) -> tuple[dict[str, list[Change]], bool]:
    """(the changes to separate tensors, whether embedding and head are still tied after them).

    They stay tied if both are changed in the same way; a change to only one of them unties the model.
    """
    if not tied:
        return changes, False
    both = [changes.pop(name, []) for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)]
    shared = [change for some in both for change in some if getattr(change, "everywhere", False)]
    embedding, head = ([c for c in some if not getattr(c, "everywhere", False)] for some in both)
    ties = len(embedding) == len(head) and all(map(_same, embedding, head))
    new = {EMBEDDING_WEIGHT: shared + embedding} | ({} if ties else {HEAD_WEIGHT: shared + head})
    return changes | {name: some for name, some in new.items() if some or not ties}, ties


def _same(a: Change, b: Change) -> bool:
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return a.scale == b.scale and np.array_equal(a.A, b.A) and np.array_equal(a.B, b.B)
    if isinstance(a, Rows) and isinstance(b, Rows):
        return np.array_equal(a.places, b.places) and np.array_equal(a.values, b.values)
    if not (isinstance(a, Replaced) and isinstance(b, Replaced)):
        return False
    info = a.source.tensors[a.key]
    return info.shape == b.source.tensors[b.key].shape and all(
        np.array_equal(a.source.read(a.key, *rows), b.source.read(b.key, *rows))
        for rows in tensor_io.split_rows(info.shape, info.dtype.itemsize, tensor_io.PIECE_BYTES)
    )


def _listing(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
