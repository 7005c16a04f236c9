"""Recognises unsupported checkpoint files; the error says how to turn them into a readable checkpoint."""

import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lcx import small_files
from lcx.convert.files.tensor_io import FLOAT_DTYPES, TensorInfo
from lcx.errors import UserError
from lcx.rope_fields import shown

#: Which some families read as bfloat16 (convert.hf.mxfp4, convert.hf.fp8_blocks).
UNPACKED = frozenset({"mxfp4", "fp8"})
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_POINTER_BYTES = 1024  # the format's own limit
_DEQUANTIZE = (
    "write it in 16 bits first, with transformers: m = AutoModelForCausalLM.from_pretrained(FOLDER, "
    "torch_dtype='bfloat16'); m.dequantize().save_pretrained(NEW_FOLDER); or take the model that was quantized"
)
#: Suffixes of tensors that only quantized checkpoints have.
_QUANTIZED = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".input_scale", ".absmax",
    ".quant_map", ".weight_packed", ".SCB", ".weight_format", "_blocks", "_scales",
)  # fmt: skip


def check_pointer(path: pathlib.Path) -> None:
    """Raises UserError for a Git LFS pointer file."""
    try:
        if path.stat().st_size > _MOST_POINTER_BYTES:
            return
        with small_files.opened(path) as file:
            found = file.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found == _POINTER:
        raise UserError(
            f"{path}: is a pointer of Git LFS, not the file itself: run `git lfs install && git lfs pull` in its folder"
        )


def check_names(where: pathlib.Path, names: Iterable[str]) -> None:
    """Raises UserError for llama.cpp (GGUF) files where weights are expected."""
    found = [name for name in names if name.lower().endswith(".gguf")]
    if found:
        folder = where if where.is_dir() else where.parent
        raise UserError(
            f"{where}: .gguf is llama.cpp's own, mostly quantized format ({found[0]}), which is not read; take the "
            "original folder, or make one with transformers and gguf: AutoModelForCausalLM.from_pretrained("
            f"'{folder}', gguf_file='{found[0]}').save_pretrained(NEW_FOLDER), and the same of AutoTokenizer"
        )


def check_config(
    config: Mapping[str, Any], where: pathlib.Path | None = None, *, reads: Collection[str] = UNPACKED
) -> None:
    """Raises UserError for the config.json of a quantized model, unless its method is one of `reads`.

    Args:
      where: the folder, for a message that nobody else puts it before.
    """
    for key in ("quantization_config", "compression_config"):
        given = config.get(key)
        if not given:
            continue
        method = given.get("quant_method") if isinstance(given, Mapping) else None
        if key == "quantization_config" and method in reads:
            continue
        bits = [
            name
            for name in ("load_in_4bit", "load_in_8bit")
            if isinstance(given, Mapping) and given.get(name)
        ]
        name = method or (f"bitsandbytes, {bits[0]}" if bits else "an unnamed method")
        folder = "" if where is None else f"{where}: "
        raise UserError(
            f"{folder}the weights are quantized ({key}: {shown(name)}), which is not read: {_DEQUANTIZE}"
        )


def check_tensors(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises UserError for tensors of a quantized model whose config.json does not say that it is quantized."""
    names = [name for name in tensors if name.endswith(_QUANTIZED)]
    names += [
        name
        for name, info in tensors.items()
        if name.endswith("_proj.weight")
        and info.dtype not in FLOAT_DTYPES.values()
        and info.dtype.itemsize == 1
    ]
    if names:
        raise UserError(
            f"the weights are quantized ({len(names)} tensors such as {shown(names[0])}, "
            f"{tensors[names[0]].dtype}), which is not read: {_DEQUANTIZE}"
        )
