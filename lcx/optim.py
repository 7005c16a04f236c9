"""AdamW and its schedules, built from optax. Regular expressions over parameter paths select what is trained."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lcx import moved
from lcx.errors import UserError
from lcx.parameters import leaf_paths

SCHEDULES = ("cosine", "linear", "constant", "plateau")
_LEAST = float(jnp.finfo(jnp.float32).tiny)  # what is smaller is 0 on the devices


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with global-norm clipping, warmup, decay, and frozen parameters (Loshchilov & Hutter, arXiv 1711.05101).

    Attributes:
      learning_rate: the peak learning rate, before context_scale.
      schedule: after warmup. "cosine" or "linear" decays to final_fraction of the peak; "constant" stays at the peak;
        "plateau" multiplies by plateau_factor whenever the held-out loss has not improved for more than
        plateau_patience evaluations (Trainer.eval_every), down to final_fraction of the peak.
      lag: updates by which the learning rate lags behind the schedule: update i, from 0, has the rate of i - lag, or of
        0 if that is negative. 1 for a torch loop that passes the number of the last update to its scheduler.
      warmup_steps: steps of linear increase from warmup_from * peak to the peak; None: 20, or a tenth of a run that is
        shorter than 200 steps.
      warmup_from: fraction of the peak at which the warmup starts.
      final_fraction: fraction of the peak at which the decay ends.
      plateau_factor, plateau_patience: of the "plateau" schedule.
      context_scale: s = new context length / original one; the peak becomes learning_rate / sqrt(s).
      b1, b2, eps: decay rates of Adam's two moments, and the constant in its denominator.
      weight_decay: applied to parameters whose path matches `decay`.
      decay: regular expression; by default kernels, those of experts too, embeddings and LoRA matrices, but not norms
        and biases.
      clip_norm: gradients with a larger global norm are scaled down to it; None: no clipping.
      trainable: regular expression; only parameters whose path ("params/stages_0/block_0/mixer/q_proj/kernel") matches
        are trained. None: all.
      frozen: regular expression; parameters whose path matches are not trained. None: no exception.
    """

    learning_rate: float = 3e-4
    schedule: str = "cosine"
    lag: int = 0
    warmup_steps: int | None = None
    warmup_from: float = 0.0
    final_fraction: float = 0.1
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    context_scale: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = r"/(kernel|(gate|up|down)_proj_kernel|embedding|a|b)$"
    clip_norm: float | None = 1.0
    trainable: str | None = None
    frozen: str | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"AdamW.schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        for name in ("learning_rate", "context_scale", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not _LEAST <= value < 1 / _LEAST:
                raise UserError(f"AdamW.{name} is {value}, expected a positive number that float32 holds")
        if self.learning_rate > 1:  # as in 1e6 for 1e-6
            raise UserError(
                f"AdamW.learning_rate is {self.learning_rate:g}, expected at most 1: an update moves each weight by "
                "about the learning rate; change AdamW.learning_rate"
            )
        for name in ("warmup_from", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"AdamW.{name} is {getattr(self, name)}, expected a number from 0 to 1")
        if not 0 < self.plateau_factor < 1:
            raise UserError(f"AdamW.plateau_factor is {self.plateau_factor}, expected a number between 0 and 1")
        for name in ("b1", "b2"):  # at 1, the moment would stay at zero
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"AdamW.{name} is {getattr(self, name)}, expected a number from 0 to below 1")
        for name in ("lag", "warmup_steps", "weight_decay", "plateau_patience"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UserError(f"AdamW.{name} is {getattr(self, name)}, expected a finite number, at least 0")
        for name in ("decay", "trainable", "frozen"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                found = f"AdamW.{name} {getattr(self, name)!r} is not a regular expression ({error})"
                raise UserError(f"{found}: change AdamW.{name}") from None

    def warmup(self, steps: int) -> int:
        """The number of warmup steps in a run of `steps` updates."""
        return min(20, steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.learning_rate / math.sqrt(self.context_scale)

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The schedule of a run of `steps` updates: step (0 for the first update) -> learning rate."""
        schedule = self._schedule(steps)
        return (lambda count: schedule(jnp.maximum(count - self.lag, 0))) if self.lag else schedule

    def _schedule(self, steps: int) -> optax.Schedule:
        peak, warmup_steps = self.peak, self.warmup(steps)
        rest = max(steps - warmup_steps, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction),
            "linear": optax.linear_schedule(peak, peak * self.final_fraction, rest),
            "constant": optax.constant_schedule(peak),
            "plateau": optax.constant_schedule(peak),
        }[self.schedule]
        if not warmup_steps:
            return after
        warmup = optax.linear_schedule(peak * self.warmup_from, peak, warmup_steps)
        return optax.join_schedules([warmup, after], [warmup_steps])

    def without_effect(self, steps: int) -> list[str]:
        """One line for each setting that another one makes meaningless in a run of `steps` updates."""
        unused = {
            ("plateau_factor", f"schedule is {self.schedule!r}"): self.schedule != "plateau",
            ("plateau_patience", f"schedule is {self.schedule!r}"): self.schedule != "plateau",
            ("final_fraction", "schedule is 'constant'"): self.schedule == "constant",
            ("warmup_from", "there are no warmup_steps"): not self.warmup(steps),
            ("decay", "weight_decay is 0"): not self.weight_decay,
        }
        return [
            f"AdamW.{name} has no effect: {reason}"
            for (name, reason), is_unused in unused.items()
            if is_unused and getattr(self, name) != getattr(AdamW, name)
        ]

    def trains(self, params: Any, beside: str | None = None) -> Any:
        """Tree of bool with the structure of `params`: True for the parameters that are trained.

        Args:
          params: the weights of a training state: "params/..." and, with LoRA, "lora/...".
          beside: with LoRA, a regular expression for model parameters that are trained too (LoRA.beside). Without LoRA,
            and for the LoRA matrices themselves, `trainable` and `frozen` decide.

        Raises:
          UserError: nothing is trained, or `frozen` or `beside` matches nothing.
        """

        def one(path: str) -> bool:
            if "lora" in params and path.startswith("params/"):
                return beside is not None and bool(re.search(beside, path))
            wanted = self.trainable is None or re.search(self.trainable, path)
            return bool(wanted) and not (self.frozen is not None and re.search(self.frozen, path))

        mask = _by_path(params, one)
        paths = leaf_paths(params)
        if self.frozen is not None and not any(re.search(self.frozen, path) for path in paths):
            found = f"AdamW.frozen {self.frozen!r} matches none of the {len(paths)} parameters"
            raise UserError(f"{found}, such as {paths[0]}: change AdamW.frozen")
        if beside is not None and not any(jax.tree.leaves(mask["params"])):
            found = f"LoRA.beside {beside!r} matches none of the model's parameters"
            raise UserError(
                f"{found}, such as {leaf_paths({'params': params['params']})[0]}; change LoRA.beside"
            )
        if not any(jax.tree.leaves(mask)):
            raise UserError(
                f"nothing to train: trainable={self.trainable!r} frozen={self.frozen!r} leave none of the "
                f"{len(paths)} parameters, such as {paths[0]}; change AdamW.trainable or AdamW.frozen"
            )
        return mask

    def build(self, moving: Any, steps: int) -> optax.GradientTransformation:
        """The optax transformation of a run of `steps` updates.

        Args:
          moving: the (abstract) parameters that are trained: `partition(params, trains)[0]`.
          steps: updates of the whole run.

        Raises:
          UserError: weight_decay is set, but `decay` matches none of these parameters.
        """
        decays = _by_path(moving, lambda path: bool(re.search(self.decay, path)))
        if self.weight_decay and not any(jax.tree.leaves(decays)):
            raise UserError(
                f"AdamW.weight_decay is {self.weight_decay} but decay={self.decay!r} matches nothing that trains, "
                f"such as {leaf_paths(moving)[0]}; change AdamW.decay, or set weight_decay to 0"
            )
        return optax.chain(
            *([] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]),
            optax.adamw(
                self.learning_rates(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decays,
            ),
            *([self._plateau()] if self.schedule == "plateau" else []),
        )

    def _plateau(self) -> optax.GradientTransformation:
        """Scales updates by the factor that `observe` stored in the state, and leaves the state unchanged."""
        return optax.GradientTransformation(
            self._reduce().init,
            lambda updates, state, params=None: (
                jax.tree.map(lambda u: u * state.scale.astype(u.dtype), updates),
                state,
            ),
        )

    def _reduce(self) -> optax.GradientTransformationExtraArgs:
        return optax.contrib.reduce_on_plateau(
            factor=self.plateau_factor,
            # optax reduces at the patience-th evaluation without improvement; here, as in torch, it is the one after.
            patience=self.plateau_patience + 1,
            rtol=1e-4,
            min_scale=self.final_fraction,
        )

    def observe(self, opt_state: Any, loss: float) -> Any:
        """The optimizer state after an evaluation with this held-out loss. Only the "plateau" schedule changes it."""
        if self.schedule != "plateau" or not math.isfinite(loss):
            return opt_state
        reduce = self._reduce()

        def seen(state):
            new = reduce.update({}, state, value=jnp.float32(loss))[1] if _is_plateau(state) else state
            return jax.tree.map(lambda x, old: jax.device_put(x.astype(old.dtype), old.sharding), new, state)

        return jax.tree.map(seen, opt_state, is_leaf=_is_plateau)


def plateau_scale(opt_state: Any) -> Any:
    """The factor by which AdamW.observe has reduced the learning rate; 1 for other schedules."""
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(x)]
    return states[0].scale if states else 1.0


def _is_plateau(x: Any) -> bool:
    return isinstance(x, optax.contrib.ReduceLROnPlateauState)


def partition(tree: Any, chosen: Any) -> tuple[Any, Any]:
    """Splits a tree into (the leaves where `chosen` is True, the others).

    Both have the structure of `tree`, with None in place of the missing leaves. `combine` is the inverse.
    """
    return (
        jax.tree.map(lambda x, yes: x if yes else None, tree, chosen),
        jax.tree.map(lambda x, yes: None if yes else x, tree, chosen),
    )


def combine(tree: Any, others: Any) -> Any:
    """Merges the two trees that `partition` returned."""
    return jax.tree.map(lambda x, y: y if x is None else x, tree, others, is_leaf=lambda x: x is None)


def _by_path(tree: Any, fn) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), map(fn, leaf_paths(tree)))


__getattr__ = moved.names_of(__name__)
