"""A distributed checkpoint of Megatron as a model (see `megatron_files`)."""

import logging
import os

from lcx.convert.evo2.megatron_files import MegatronFiles
from lcx.convert.evo2.savanna import Canonical
from lcx.convert.evo2.striped_hyena import StripedHyenaSource
from lcx.errors import UserError

log = logging.getLogger(__name__)


class MegatronSource(StripedHyenaSource):
    """The model of a checkpoint (a `model_source.ModelSource`).

    Raises:
      UserError: as `MegatronFiles`; an MLP with an activation in every layer, as bionemo's "NV" models have it.
    """

    def __init__(self, path: str | os.PathLike):
        files = MegatronFiles(path)
        if files.settings.get("first_only") is False:
            raise UserError(
                f"{path}: its configuration sets remove_activation_post_first_layer to false, a gelu in every layer, "
                "which is not read: expected Evo 2, which has one in layer 0"
            )
        try:
            canonical = Canonical(files, layer_0_only=True)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        canonical.length = files.settings.get("seq_length")  # the filters are stored with their live taps alone
        super().__init__(canonical, str(path))
        factor = files.settings.get("factor", 1)
        if factor != 1:
            log.warning(
                "%s: the run divided positions by %g, which is not stored in any tensor; pass rope_scaling "
                '{"rope_type": "linear", "factor": %g}',
                path,
                factor,
                factor,
            )
