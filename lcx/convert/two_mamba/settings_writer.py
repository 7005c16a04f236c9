"""Writes config.pt: the settings by which the published code builds a model, and those of a run that it continues."""

import importlib.util
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from lcx import model as model_lib
from lcx.convert.core.training_state import StoredRun
from lcx.convert.two_mamba.family import KEY, head_sizes
from lcx.convert.two_mamba.training_state import CONFIG
from lcx.model import Decoder

log = logging.getLogger(__name__)

#: model_size -> hidden size, width of the MLP, heads, head_dim, layers: those that the published code can build.
SIZES = {
    "small": (1024, 2048, 16, 64, 20),
    "medium": (1536, 3072, 24, 64, 27),
    "medium_wide": (1536, 3072, 24, 64, 20),
    "large": (3072, 6144, 16, 192, 20),
    "large_depth": (1024, 2048, 32, 32, 60),
}
#: What that code builds at every size, whatever config.json says.
_FIXED = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "mlp_bias": False}
_LOG_STEPS = 10  # as published; lcx logs as its own run says
NEEDS_TORCH = "PyTorch files need torch: pip install 'lcx[torch]'"


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def write(folder: pathlib.Path, model: Decoder, config: Mapping[str, Any], run: StoredRun | None) -> None:
    """Writes config.pt into the folder.

    Args:
      config: the folder's config.json.
      run: the run that goes with the model's optimizer, if that is written too.
    """
    if not has_torch():
        log.warning("config.pt, by which the published code builds the model, is not written: %s", NEEDS_TORCH)
        return
    import torch

    size, why = model_size(model), f"no model of this size, only {', '.join(SIZES)}"
    if size and (other := [key for key, value in _FIXED.items() if config.get(key, value) != value]):
        size, why = None, f"models with {other[0]} {_FIXED[other[0]]}, this one has {config[other[0]]}"
    if size is None:
        log.warning("config.pt has model_size None: the published code builds %s; use it in lcx", why)
    settings = {
        "model_size": size,
        "model_max_length": model.max_position_embeddings,
        KEY: config[KEY],
        "mlp_type": "normal",
    }
    torch.save(settings if run is None else settings | _of_run(run), folder / CONFIG)


def _of_run(run: StoredRun) -> dict[str, Any]:
    """Without `dataset`, of which lcx knows none of the published names: that code reads its default then, FineWeb."""
    optimizer = run.optimizer
    return {
        "learning_rate": optimizer.peak,
        "warmup_steps": optimizer.warmup(run.steps),
        "num_steps": run.steps,
        "clipping_value": optimizer.clip_norm,
        "weight_decay": optimizer.weight_decay,
        "step_ckpt": run.step - 1,
        "use_amp": run.dtype == "bfloat16",
        "dev": "gpu",
        "log_steps": _LOG_STEPS,
        **dict.fromkeys(("wandb_name", "wandb_id")),
    }


def model_size(model: Decoder) -> str | None:
    """What the published code calls a model of this size; None: nothing, so it cannot build one."""
    depth = model_lib.layers(model)
    block = depth[0].block
    found = (model.hidden_size, block.mlp.intermediate_size, *(head_sizes(block.mixer) or (0, 0)), len(depth))
    return next((name for name, known in SIZES.items() if known == found), None)
