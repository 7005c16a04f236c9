"""Published LoLCATS checkpoints: feature maps and LoRA pairs in PyTorch files, on the Hugging Face folder of the model.

    X_distill.pt   {"model_state_dict": {"model.layers.{i}.self_attn. ..."}, "step", ...}
      feature_map_{q,k}.mlp.layer [N, H, F]                     .bias [1, N, 1, 1]
      feature_map_{q,k}.mlp.layer0 [N, H, A], .layer1 [N, A, F], .bias0 [1, N, 1, A], .bias1 [1, N, 1, F]   (adapter)
      window_factors [1, N, 1, 1]
    X_ft.pt        the same wrapper, {"base_model.model.model.layers.{i}.self_attn. ..."}
      {q,k,v,o}_proj.lora_A.default.weight [R, in], .lora_B.default.weight [out, R]; sometimes feature maps trained on

A single file may hold both, with or without the wrapper and with any of the prefixes "", "model.", "base_model.model.".
Pairs are merged as rows are read. What no file says is in `settings`.

    model, params = lcx.load("path/to/hf_folder", lolcats=lcx.Lolcats("X_distill.pt", "X_ft.pt", "config.yaml"))
    writer.export("path/to/workdir", "path/to/folder")    # both files, of a run that trained with LoRA

A folder written by lcx ("lolcats", `writer`) holds all in one: the Hugging Face folder with the pairs merged,
model_distill.pt and lolcats.json.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

SETTINGS_FILE = "lolcats.json"
DISTILL, FINETUNE = "_distill.pt", "_ft.pt"


@dataclasses.dataclass(frozen=True)
class Lolcats:
    """The files beside a Hugging Face folder, and what they do not say.

    Attributes:
      feature_maps: X_distill.pt, or a file that holds the pairs too, or the folder of such files (or of those of all
        blocks, X-in=000-out=008_distill.pt ...); None: the folder of the model.
      lora: X_ft.pt; None: what lies beside, or in, the other file, if anything.
      attention: settings by their published names, or the .yaml or .json of them (`settings`); None: what
        lolcats.json beside the feature maps, else their file's name says, else the published ones.
      lora_alpha: None: what the settings say, else twice the rank, as in all published runs.
      published_quirks: compute as the published code does, mistakes included (mixers.linear_attention).
    """

    feature_maps: str | os.PathLike | None = None
    lora: str | os.PathLike | None = None
    attention: Mapping[str, Any] | str | os.PathLike | None = None
    lora_alpha: float | None = None
    published_quirks: bool = False


def is_lolcats(names: Collection[str]) -> bool:
    """Whether a folder of these files holds feature maps."""
    return SETTINGS_FILE in names or any(name.endswith((DISTILL, FINETUNE)) for name in names)
