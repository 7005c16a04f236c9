"""The table of moved names, through which old checkpoints, .gin files and imports keep working.

A checkpoint stores the class of its model as "module:name", a .gin file imports modules by name, and users' own code
imports both. When a module is moved or renamed, add a row to MODULES. When a function or class moves out of a module
that still exists, add a row to NAMES. Importing the old name of a module yields the same module object as the new one,
so their classes are identical too.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

MODULES = {
    "lcx.array_store": "lcx.checkpoint.slices",
    "lcx.checkpoint_folder": "lcx.checkpoint.folder",
    "lcx.checkpoint_tree": "lcx.checkpoint.tree",
    "lcx.describe": "lcx.checkpoint.model_json",
    "lcx.fingerprint": "lcx.checkpoint.fingerprint",
    "lcx.hardware": "lcx.training.peak_flops",
    "lcx.meter": "lcx.training.meter",
    "lcx.metrics": "lcx.training.logger",
    "lcx.origin": "lcx.training.resume_check",
    "lcx.processes": "lcx.multihost.join",
    "lcx.residuals": "lcx.training.residual_store",
    "lcx.stopping": "lcx.training.signals",
    "lcx.text_stream": "lcx.terminal",
    "lcx.train_step": "lcx.training.step",
    "lcx.training.distributed": "lcx.multihost.join",
    **{
        f"lcx.evals.{name}": f"lcx.evals.support.{name}"
        for name in ("dna", "documents", "figures", "intervals", "model_facts", "scoring", "variants")
    },
    **{
        f"lcx.convert.{name}": f"lcx.convert.files.{name}"
        for name in ("destination", "safetensors", "tensor_io", "torch_bin", "torch_writer", "unsupported")
    },
    **{f"lcx.convert.{name}": f"lcx.convert.core.{name}" for name in ("model_source", "relaid", "rules")},
    "lcx.convert.adapted": "lcx.convert.peft.merged",
    "lcx.convert.adapter_base": "lcx.convert.peft.base",
    "lcx.convert.adapter_start": "lcx.convert.peft.start",
    "lcx.convert.hf_config": "lcx.convert.hf.config",
    "lcx.convert.hf_folder": "lcx.convert.hf.folder",
    "lcx.convert.hf_rope": "lcx.convert.hf.rope",
    "lcx.convert.hf.llama": "lcx.convert.hf.families",
    "lcx.convert.lcx_folder": "lcx.convert.workdir.source",
    "lcx.convert.llama": "lcx.convert.hf.families",
    "lcx.convert.lolcats_settings": "lcx.convert.lolcats.settings",
    "lcx.convert.lolcats_writer": "lcx.convert.lolcats.writer",
    "lcx.convert.patterns": "lcx.convert.peft.patterns",
    "lcx.convert.peft_files": "lcx.convert.peft.files",
    "lcx.convert.peft_settings": "lcx.convert.peft.settings",
    "lcx.convert.savanna": "lcx.convert.evo2.savanna",
    "lcx.convert.savanna_files": "lcx.convert.evo2.savanna_files",
    "lcx.convert.sources": "lcx.convert.core.model_source",
    "lcx.convert.stripedhyena": "lcx.convert.evo2.striped_hyena",
    "lcx.convert.tensor_names": "lcx.convert.hf.tensor_names",
    "lcx.convert.vortex": "lcx.convert.evo2.vortex",
    "lcx.convert.zero": "lcx.convert.evo2.zero",
}
NAMES = {
    **{
        f"lcx.convert.{old}:{name}": f"lcx.convert.hf.{new}:{name}"
        for old in ("hf", "hf.format")
        for new, names in {
            "source": ("HfSource", "extras"),
            "writer": ("check_written", "config_of", "write"),
        }.items()
        for name in names
    },
    "lcx.convert.hf.rope_parameters:from_hf": "lcx.convert.hf.config:rope_from_config",
    "lcx.convert.lolcats:Lolcats": "lcx.convert.lolcats.files:Lolcats",
    "lcx.convert.lolcats:LolcatsSource": "lcx.convert.lolcats.source:LolcatsSource",
    "lcx.convert.lolcats.format:LolcatsSource": "lcx.convert.lolcats.source:LolcatsSource",
    "lcx.model:Block": "lcx.block:Block",
    "lcx.model:Mlp": "lcx.mlps.gated:GatedMlp",
    "lcx.model:llama": "lcx.llama:llama",
    "lcx.optim:join": "lcx.optim:combine",
    "lcx.optim:split": "lcx.optim:partition",
    **{
        f"lcx.report:{name}": f"lcx.reporting.{home}:{name}"
        for home, names in {
            "pictures": ("picture",),
            "report": ("PAGE", "build"),
            "runs": ("RESULTS", "labelled", "read_curves", "read_results"),
        }.items()
        for name in names
    },
    "lcx.rope:from_hf": "lcx.convert.hf.config:rope_from_config",
    "lcx.rope:hf_max_position_embeddings": "lcx.convert.hf.rope_parameters:written_max_position_embeddings",
    "lcx.rope:to_hf": "lcx.convert.hf.rope_parameters:to_hf",
    "lcx.sampler:stream_text": "lcx.terminal:stream_text",
}


def today(path: str) -> str:
    """The current name of "module:name", which is returned unchanged if it has not moved."""
    path = NAMES.get(path, path)
    module, colon, name = path.partition(":")
    return f"{MODULES.get(module, module)}{colon}{name}"


def stored(path: str) -> str:
    """The name under which a checkpoint stores "module:name": the first name that it had.

    When a class moves, stored models thus stay the same, runs can still be resumed, and older versions can read them.
    """
    return next((old for old, new in NAMES.items() if new == path), path)


def names_of(module: str) -> Callable[[str], Any]:
    """A module-level `__getattr__` for a module from which names have moved: `__getattr__ = names_of(__name__)`."""

    def get(name: str) -> Any:
        new = NAMES.get(f"{module}:{name}")
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, attribute = new.partition(":")
        return getattr(importlib.import_module(home), attribute)

    return get


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that imports the new module in place of an old one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system returns whatever sys.modules holds under this name afterwards.
        sys.modules[module.__name__] = importlib.import_module(MODULES[module.__name__])


def install() -> None:
    """Makes `import` find the old names. Calling it again has no effect."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
