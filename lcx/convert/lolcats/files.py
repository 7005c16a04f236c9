"""Published LoLCATS checkpoints: PyTorch files of feature maps and LoRA pairs for the model of a Hugging Face folder.

    X_distill.pt   {"model_state_dict": {"model.layers.{i}.self_attn. ..."}, "step", ...}
      feature_map_{q,k}.mlp.layer [N, H, F]                     .bias [1, N, 1, 1]
      feature_map_{q,k}.mlp.layer0 [N, H, A], .layer1 [N, A, F], .bias0 [1, N, 1, A], .bias1 [1, N, 1, F]   (adapter)
      window_factors [1, N, 1, 1]
    X_ft.pt        the same wrapper, {"base_model.model.model.layers.{i}.self_attn. ..."}
      {q,k,v,o}_proj.lora_A.default.weight [R, in], .lora_B.default.weight [out, R]; sometimes further trained maps

A single file may hold both, with or without the wrapper and with any of the prefixes "", "model.", "base_model.model.".
Pairs are merged as rows are read. `settings` describes the settings that the files do not contain.

    model, params = lcx.load("path/to/hf_folder", lolcats=lcx.Lolcats("X_distill.pt", "X_ft.pt", "config.yaml"))
    writer.export("path/to/workdir", "path/to/folder")    # both files, from a run that trained with LoRA

A folder written by lcx ("lolcats", `writer`) is complete: the Hugging Face folder with the pairs merged,
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
    """LoLCATS files for the model of a Hugging Face folder, and the settings that they do not contain.

    Attributes:
      feature_maps: X_distill.pt, a file that holds both maps and pairs, or a folder with such files or with one file
        per block (X-in=000-out=008_distill.pt ...). None: the folder of the model.
      lora: X_ft.pt. None: the pairs in or next to the file of feature maps, if there are any.
      attention: settings under their published names, or a .yaml or .json file that holds them (`settings`). None:
        lolcats.json next to the feature maps, else what their file name implies, else the published defaults.
      lora_alpha: None: the value in the settings, else twice the rank, as in all published runs.
      published_quirks: reproduce the published code exactly, including its mistakes (mixers.linear_attention).
    """

    feature_maps: str | os.PathLike | None = None
    lora: str | os.PathLike | None = None
    attention: Mapping[str, Any] | str | os.PathLike | None = None
    lora_alpha: float | None = None
    published_quirks: bool = False


def is_lolcats(names: Collection[str]) -> bool:
    """Whether a folder of these files holds feature maps."""
    return SETTINGS_FILE in names or any(name.endswith((DISTILL, FINETUNE)) for name in names)
