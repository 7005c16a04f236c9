"""MLPs: one file for each kind. This page is the whole contract between an MLP and the rest of the library.

An MLP is a Flax module with one method, which maps each token independently::

    __call__(x [B,T,D]) -> y [B,T,D]        y[b, t] depends on x[b, t] alone

It keeps no state, so decoding needs no other method, and it computes in the dtype of x. Optional capabilities:

- Parameters made by ``layers.Linear`` and ``layers.named_param`` carry the names of their axes, which
  ``sharding.RULES`` maps to mesh axes. LoRA adds its pairs to each ``Linear`` whose path matches its ``targets``. Other
  parameters are replicated on every device. The projections are called ``gate_proj``, ``up_proj`` and ``down_proj``.
- An MLP whose statistics must exclude padding sets the class attribute ``takes_segment_ids = True``. It is then also
  called with ``segment_ids=`` ([B,T], 0 is padding; None: there is no padding).
- Values that it sows into the collection ``losses`` are added to the training loss: see ``objectives.next_token``.
- A token is assumed to cost one multiply-add per weight. An MLP for which that is wrong, such as a mixture of experts,
  defines ``macs_per_token(hidden_size) -> float``, all multiply-adds per token. MFU is computed from it.

There is no registry: a config or a user's own package names the class.
"""

import math
from typing import Any

from lcx.errors import UserError


def macs_per_token(mlp: Any, hidden_size: int) -> float | None:
    """Multiply-adds per token as the MLP defines them; None: one per weight.

    Raises:
      UserError: the method returns something other than a finite, non-negative number.
    """
    if not hasattr(mlp, "macs_per_token"):
        return None
    value = mlp.macs_per_token(hidden_size)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(
            f"{type(mlp).__name__}.macs_per_token returned {value!r:.80}, expected the multiply-adds per token, a "
            "finite number of at least 0: change its return value"
        )
    return float(value)
