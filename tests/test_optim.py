"""AdamW against the formulas, in numpy; which parameters it moves and decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.optim import AdamW, combine, leaf_paths, partition, plateau_scale

STEPS, WARMUP, PEAK = 24, 8, 2e-3


def by_hand(schedule: str, step: int, *, warmup_from: float, scale: float) -> float:
    peak = PEAK / scale**0.5
    if step < WARMUP:
        return peak * (warmup_from + (1 - warmup_from) * step / WARMUP)
    done = min(step - WARMUP, STEPS - WARMUP) / (STEPS - WARMUP)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - 0.9 * done)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_from", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0])
def test_schedules(schedule, warmup_from, scale):
    optimizer = AdamW(
        learning_rate=PEAK,
        schedule=schedule,
        warmup_steps=WARMUP,
        warmup_from=warmup_from,
        context_scale=scale,
    )
    rates = optimizer.learning_rates(STEPS)
    for step in range(STEPS + 3):  # beyond the end it stays where it is
        expected = by_hand(schedule, step, warmup_from=warmup_from, scale=scale)
        assert float(rates(step)) == pytest.approx(expected, rel=1e-5, abs=1e-12), step


def test_no_warmup_starts_at_the_peak_and_a_run_shorter_than_its_warmup_never_reaches_it():
    assert float(AdamW(learning_rate=PEAK, warmup_steps=0).learning_rates(STEPS)(0)) == pytest.approx(PEAK)
    rates = AdamW(learning_rate=PEAK, warmup_steps=100).learning_rates(5)
    for step in range(5):
        assert float(rates(step)) == pytest.approx(PEAK * step / 100, rel=1e-5)  # float32


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    tree = {
        "embed": {"embedding": rng.normal(size=(5, 3))},
        "stages_0": {
            "mixer": {"q_proj": {"kernel": rng.normal(size=(2, 3, 4)), "bias": rng.normal(size=(2, 4))}},
            "norm": {"scale": rng.normal(size=(2, 3))},
        },
    }
    return jax.tree.map(lambda x: x.astype(np.float32), tree)


def numpy_adamw(params, gradients, rates, *, b1, b2, eps, decay, clip, decayed):
    """Loshchilov & Hutter, algorithm 2, with the gradient's global norm cut to `clip` first. float64."""
    flat = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    m, v = [np.zeros_like(x) for x in flat], [np.zeros_like(x) for x in flat]
    for t, (tree, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(tree)]
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        for i, g in enumerate(grads):
            g = g if clip is None or norm < clip else g * clip / norm
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
            step = (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            flat[i] = flat[i] - rate * (step + decay * decayed[i] * flat[i])
    return flat


@pytest.mark.parametrize("clip", [None, 0.5, 1e-4, 1e3])
def test_three_steps_by_hand(params, clip):
    rng = np.random.default_rng(1)
    gradients = [
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(3)
    ]
    gradients[1] = jax.tree.map(lambda g: g * 1e-2, gradients[1])  # below the norm of 0.5
    optimizer = AdamW(
        learning_rate=0.1, schedule="linear", warmup_steps=0, weight_decay=0.3, clip_norm=clip, b2=0.9
    )
    transformation = optimizer.build(params, 4)
    got, state = params, transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, got)
        got = jax.tree.map(lambda x, u: x + u, got, updates)
    expected = numpy_adamw(
        params,
        gradients,
        [0.1 * (1 - 0.9 * step / 4) for step in range(3)],
        b1=0.9,
        b2=0.9,
        eps=1e-8,
        decay=0.3,
        clip=clip,
        decayed=[path.endswith(("kernel", "embedding")) for path in leaf_paths(params)],
    )
    for path, x, y in zip(leaf_paths(params), jax.tree.leaves(got), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6, err_msg=path)


def test_weight_decay_reaches_matrices_and_pairs_and_nothing_else(params):
    tree = params | {"stages_0": params["stages_0"] | {"lora": {name: np.ones((2, 2)) for name in "ab"}}}
    tree["stages_0"]["lora"]["scale"] = np.ones(2)
    tree["stages_0"]["mlp"] = {"gate_proj_kernel": np.ones((2, 2, 2)), "conv_kernel": np.ones(2)}
    optimizer = AdamW(learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.5)
    transformation = optimizer.build(tree, 1)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = transformation.update(zeros, transformation.init(tree), tree)
    moved = [path for path, u in zip(leaf_paths(tree), jax.tree.leaves(updates), strict=True) if np.any(u)]
    assert moved == [
        "embed/embedding",
        "stages_0/lora/a",
        "stages_0/lora/b",
        "stages_0/mixer/q_proj/kernel",
        "stages_0/mlp/gate_proj_kernel",
    ]
    for x, u in zip(jax.tree.leaves(tree), jax.tree.leaves(updates), strict=True):
        if np.any(u):
            np.testing.assert_allclose(u, -0.5 * x, rtol=1e-6)


def test_frozen_parameters_have_no_moments(params):
    optimizer = AdamW(warmup_steps=0, weight_decay=0.1, trainable="stages_0", frozen="bias")
    trains = optimizer.trains(params)
    chosen = ["stages_0/mixer/q_proj/kernel", "stages_0/norm/scale"]
    assert [
        path for path, yes in zip(leaf_paths(params), jax.tree.leaves(trains), strict=True) if yes
    ] == chosen
    moving, still = partition(params, trains)
    assert leaf_paths(moving) == chosen and len(leaf_paths(still)) == 2
    transformation = optimizer.build(moving, 5)
    state = transformation.init(moving)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == sorted(2 * [2 * 3 * 4, 2 * 3])  # m and v of the kernel and the scale
    updates, _ = transformation.update(jax.tree.map(jnp.ones_like, moving), state, moving)
    assert leaf_paths(updates) == chosen and all(np.all(u) for u in jax.tree.leaves(updates))
    assert jax.tree.structure(combine(updates, still)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"trainable": "(q_proj"},
            r"AdamW.trainable '\(q_proj' is not a regular expression .*change AdamW.trainable",
        ),
        ({"frozen": "*"}, r"AdamW.frozen '\*' is not a regular expression"),
        ({"decay": "["}, r"AdamW.decay '\[' is not a regular expression"),
        ({"schedule": "step"}, "AdamW.schedule is 'step', expected one of cosine, linear, constant"),
        ({"learning_rate": 0.0}, "AdamW.learning_rate is 0.0, expected a positive number"),
        ({"learning_rate": math.inf}, "AdamW.learning_rate is inf"),
        ({"learning_rate": 1e6}, r"AdamW.learning_rate is 1e\+06, expected at most 1"),
        ({"learning_rate": 1e-50}, "AdamW.learning_rate is 1e-50, expected a positive number that float32 holds"),
        ({"context_scale": -1.0}, "AdamW.context_scale is -1.0"),
        ({"clip_norm": 0.0}, "AdamW.clip_norm is 0.0"),
        ({"warmup_steps": -1}, "AdamW.warmup_steps is -1, expected a finite number, at least 0"),
        ({"weight_decay": float("inf")}, "AdamW.weight_decay is inf, expected a finite number"),
        ({"b2": 1.5}, "AdamW.b2 is 1.5, expected a number from 0 to below 1"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(UserError, match=says) as caught:
        AdamW(**settings)
    assert "\n" not in str(caught.value)


def test_nothing_to_train_or_to_decay(params):
    with pytest.raises(
        UserError, match="nothing to train: trainable='v_proj' frozen=None leave none of the 4"
    ):
        AdamW(trainable="v_proj").trains(params)
    with pytest.raises(UserError, match="nothing to train.*change AdamW.trainable or AdamW.frozen"):
        AdamW(frozen=".").trains(params)
    with pytest.raises(UserError, match="AdamW.frozen 'v_proj' matches none of the 4 parameters, such as"):
        AdamW(frozen="v_proj").trains(params)
    with pytest.raises(UserError, match="weight_decay is 0.1 but decay=.* matches nothing that trains"):
        optimizer = AdamW(trainable="norm", weight_decay=0.1)
        optimizer.build(partition(params, optimizer.trains(params))[0], 5)


def test_plateau_is_that_of_torch(params):
    """The held-out losses of a run, and the learning rate that torch's ReduceLROnPlateau makes of them."""
    torch = pytest.importorskip("torch")
    losses = [3.0, 2.0, 2.0001, 2.1, 1.9999, 2.0, 2.2, 1.5, 1.5, 1.5, 1.6, 1.4999, 1.49995, 1.6, *[1.7] * 12]
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.3, patience=2, min_lr=1e-3)
    ours = AdamW(
        learning_rate=0.1,
        schedule="plateau",
        warmup_steps=0,
        plateau_factor=0.3,
        plateau_patience=2,
        final_fraction=0.01,
    )
    transformation = ours.build(params, 9)
    state = jax.jit(transformation.init)(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    first = jax.tree.leaves(transformation.update(gradient, state, params)[0])[0]
    for loss in losses:
        schedule.step(loss)
        state = ours.observe(state, loss)
        rate = theirs.param_groups[0]["lr"]
        np.testing.assert_allclose(0.1 * plateau_scale(state), rate, rtol=1e-5)
        update = jax.tree.leaves(transformation.update(gradient, state, params)[0])[0]
        np.testing.assert_allclose(update, first * rate / 0.1, rtol=1e-5)
    assert rate == 1e-3
    assert ours.observe(state, float("nan")) is state


def test_beside_the_pairs_train_the_named_parameters(params):
    weights = {"params": params, "lora": {"stages_0": {"a": np.ones(2), "b": np.ones(2)}}}
    optimizer = AdamW()
    moving, _ = partition(weights, optimizer.trains(weights))
    assert leaf_paths(moving) == ["lora/stages_0/a", "lora/stages_0/b"]
    moving, _ = partition(weights, optimizer.trains(weights, beside="norm"))
    assert leaf_paths(moving) == ["lora/stages_0/a", "lora/stages_0/b", "params/stages_0/norm/scale"]
