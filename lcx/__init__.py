"""lcx gives pretrained language models a longer context, or a cheaper one, in JAX.

    model, params = lcx.load(path, *, format=None, dtype=None, mesh=None, rope_scaling=None, context_length=None)
    lcx.load(hf_folder, lolcats=lcx.Lolcats(feature_maps, lora))                   # a published linear model
    lcx.load(base, adapter=folder)                                                 # a PEFT adapter on its base
    lcx.save(path, model, params, *, format)
    lcx.logits(model, params, tokens, *, positions=None, segment_ids=None)         -> float32 [B, T, V]
    lcx.load_tokenizer(path).encode(text, *, add_special_tokens=False)             -> int32 [T], as transformers' ids
    lcx.generate(model, params, tokens, *, max_new_tokens, temperature=0.0, top_p=1.0, seed=0)   -> int32 [B, new]
    lcx.generate_text(model, params, tokenizer, text, *, max_new_tokens=None, ...) -> the text that follows

    lcx.embed(model, params, sequences, *, layers, pool="mean", piece_length=None) -> {layer: float32 [sequences, F]}

    python -m lcx.train | lcx.evaluate | lcx.generate | lcx.embed | lcx.variants | lcx.score | lcx.convert   --help

The letters of every shape comment and einsum:

    B batch            N query heads         F width of the MLP
    T query time       K key/value heads     V vocabulary
    S key time         G = N / K             C chunk of time
    D embedding        H size of a head      R rank of a LoRA, or repeats of a stage
    L layers

Importing lcx imports nothing heavy: each public name brings its module (and jax) when it is first used.
"""

from lcx import huge_pages, startup

startup.guard()  # before anything else is imported
huge_pages.use()

# ruff: noqa: E402
import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from lcx import moved
from lcx.errors import UserError
from lcx.version import __version__

if TYPE_CHECKING:
    from lcx.convert.api import load, save
    from lcx.convert.lolcats.files import Lolcats
    from lcx.embedding import embed
    from lcx.sampler import generate, logits
    from lcx.text import generate_text, load_tokenizer

__all__ = [
    "Lolcats", "UserError", "__version__", "embed", "generate", "generate_text", "load", "load_tokenizer", "logits",
    "save",
]  # fmt: skip

_HOMES = {
    "Lolcats": "lcx.convert.lolcats.files",
    "embed": "lcx.embedding",
    "load": "lcx.convert.api",
    "load_tokenizer": "lcx.text",
    "save": "lcx.convert.api",
    "logits": "lcx.sampler",
    "generate": "lcx.sampler",
    "generate_text": "lcx.text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lcx' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """`lcx.generate` is a function here and also the file behind `python -m lcx.generate`.

    Python binds an imported submodule to its package; this keeps it from hiding the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
moved.install()
