"""The format "peft": a LoRA run's trained parameters as a PEFT adapter."""

import dataclasses

from lcx.convert.core.format import TrainedFormat, option
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class PeftAdapter(TrainedFormat):
    """A folder that `peft.PeftModel.from_pretrained` loads onto the base model. To read one, use `adapter=`.

    Attributes:
      base_model: the base that adapter_config.json names; None: the model that the run started from.
    """

    name: str = "peft"
    help: str = "a PEFT adapter with the parameters that a LoRA run trained"
    overlay: bool = True
    base_model: str | None = option(
        None, help="the base that a 'peft' adapter names, a path or a name on the hub", metavar="NAME"
    )

    def detect(self, path, names):
        from lcx.convert.hf.folder import CONFIG
        from lcx.convert.peft import settings

        if path.is_dir() and settings.FILE in names and CONFIG not in names:
            base = settings.read(path).base
            raise UserError(
                f"{path} is a PEFT adapter: pass its base{f', {base!r},' if base else ''} as the model, and this as "
                "--adapter (adapter= in Python)"
            )
        return False

    def export(self, workdir, path, *, overwrite):
        from lcx.convert.peft import adapter

        first, *rest = adapter.export(workdir, path, base_model=self.base_model, overwrite=overwrite)
        said = f"{path / 'README.md'} says how to load it with transformers and PEFT"
        return [f"read back: {first}", *rest, said]
