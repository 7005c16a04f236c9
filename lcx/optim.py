"""AdamW and its schedules, from optax; which parameters train, by regular expressions over their paths."""

import dataclasses
import math
import re
from typing import Any

import jax
import optax

from lcx.errors import UserError

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with global-norm clipping, warmup, decay, and frozen parameters (Loshchilov & Hutter, arXiv 1711.05101).

    Attributes:
      learning_rate: the peak.
      schedule: after warmup: "cosine" or "linear" down to final_fraction of the peak, or "constant".
      warmup_steps: linear rise from warmup_from * learning_rate to learning_rate.
      context_scale: s = context now / original context; the peak becomes learning_rate / sqrt(s).
      clip_norm: global norm that gradients are scaled down to; None: no clipping.
      weight_decay: on kernels and embeddings whose path matches decay; norms and biases have none.
      trainable: only parameters whose path ("stages_0/block_0/mixer/q_proj/kernel") it matches train.
      frozen: parameters whose path it matches do not train.
    """

    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 20
    warmup_from: float = 0.0
    final_fraction: float = 0.1
    context_scale: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = r"(kernel|embedding)$"
    clip_norm: float | None = 1.0
    trainable: str | None = None
    frozen: str | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if self.context_scale <= 0 or self.learning_rate <= 0:
            raise UserError(
                f"learning_rate {self.learning_rate} and context_scale {self.context_scale} must be positive"
            )

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Step -> learning rate over a run of `steps` updates."""
        peak = self.learning_rate / math.sqrt(self.context_scale)
        rest = max(steps - self.warmup_steps, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction),
            "linear": optax.linear_schedule(peak, peak * self.final_fraction, rest),
            "constant": optax.constant_schedule(peak),
        }[self.schedule]
        if not self.warmup_steps:
            return after
        warmup = optax.linear_schedule(peak * self.warmup_from, peak, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])

    def build(self, params: Any, steps: int) -> optax.GradientTransformation:
        """The optax transformation for this tree of (abstract) parameters.

        Raises:
          UserError: trainable, frozen or decay is not a regular expression, or nothing is left to train.
        """
        paths = leaf_paths(params)
        trains = {
            path: _matches(self.trainable, path, True) and not _matches(self.frozen, path, False)
            for path in paths
        }
        if not any(trains.values()):
            raise UserError(
                f"nothing to train: trainable={self.trainable!r} frozen={self.frozen!r} leave none of the "
                f"{len(paths)} parameters, such as {paths[0]}; change AdamW.trainable or AdamW.frozen"
            )
        decays = {path: _matches(self.decay, path, True) for path in paths}
        adamw = optax.chain(
            optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.learning_rates(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=_by_path(params, lambda path: decays[path]),
            ),
        )
        if all(trains.values()):
            return adamw
        labels = _by_path(params, lambda path: "train" if trains[path] else "freeze")
        return optax.multi_transform({"train": adamw, "freeze": optax.set_to_zero()}, labels)


def leaf_paths(tree: Any) -> list[str]:
    return [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _by_path(tree: Any, fn) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: fn(_path(keys)), tree)


def _path(keys) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def _matches(pattern: str | None, path: str, default: bool) -> bool:
    if pattern is None:
        return default
    try:
        return re.search(pattern, path) is not None
    except re.error as e:
        raise UserError(
            f"{pattern!r} is not a regular expression: {e}; change AdamW.trainable, frozen or decay"
        ) from None
