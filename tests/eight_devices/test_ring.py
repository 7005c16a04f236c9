"""Ring attention: the definition on one device, what is sent, who works how much, and when it is chosen."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Axes
from test_context_mesh import assert_close, build, received

from lcx.errors import UserError
from lcx.ops import attention_shards
from lcx.ops.attention import attention
from lcx.ops.attention_ring import Ring
from lcx.ops.dealt import Deal
from lcx.planning.program import parse

B, N, K, H, W = 2, 4, 2, 8, 6
PLAN = {"heads": 1, "group": 1, "decays": False}


def arguments(T, *, decays, sinks):
    """q, k, v, decays and sinks; the second row holds documents of random lengths, padding inside and at its end."""
    rng = np.random.default_rng(T)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, W)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if decays:
        arrays["log_decay"] = -np.abs(rng.normal(size=(B, T, N)).astype(np.float32)) / 10
        arrays["log_decay"][0, T // 2] = -np.inf  # a hard reset
    if sinks:
        arrays["sinks"] = rng.normal(size=N).astype(np.float32)
    ids = np.ones((B, T), np.int32)
    ids[1] = np.sort(rng.integers(1, 4, T))
    ids[1, T // 3] = ids[1, -3:] = 0
    return arrays, jnp.asarray(ids)


def gradients(mesh_axis, ids, settings, arrays):
    """(outputs, gradients of a loss on all of them), on this device's part of the rows."""

    def loss(arrays):
        segments = {"q_segment_ids": ids, "kv_segment_ids": ids}
        if mesh_axis is None:
            y = attention(**arrays, **segments, **settings, implementation="reference")
        else:
            y = attention(**arrays, **segments, **settings, mesh_axis=mesh_axis, over_context="ring")
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    grads, y = jax.grad(loss, has_aux=True)(arrays)
    return y, grads


def on_a_ring(P, arrays, ids, **settings):
    """A jitted function of (ids, arrays), and its arguments."""
    specs = {name: Axes() if name == "sinks" else Axes(None, "context") for name in arrays}

    def run(ids, arrays):
        y, grads = gradients("context", ids, settings, arrays)
        if "sinks" in grads:
            grads["sinks"] = jax.lax.psum(grads["sinks"], "context")
        return y, grads

    mapped = jax.shard_map(
        run,
        mesh=build(context=P, fsdp=1),
        in_specs=(Axes(None, "context"), specs),
        out_specs=(Axes(None, "context"), specs),
        check_vma=False,
    )
    return jax.jit(mapped)


CASES = {  # devices, tokens of a part, decays, sinks, settings
    "tiles_decays": (4, 150, True, False, {"softcap": 2.0}),  # a block is several tiles, and not full
    "odd_everything": (2, 7, True, True, {"softcap": 2.0}),
    "wide_window": (4, 11, False, False, {"window": 23}),  # dealt in blocks, which see those of all devices
    "window_decays": (4, 13, True, True, {"window": 20}),  # the last block of a part is short
    "narrow_window": (8, 3, True, False, {"window": 2}),  # reaches one part back; parts stay where they are
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_definition(case):
    P, L, decays, sinks, settings = CASES[case]
    arrays, ids = arguments(P * L, decays=decays, sinks=sinks)
    program = on_a_ring(P, arrays, ids, **settings)
    found = program(ids, arrays)
    wanted = jax.jit(functools.partial(gradients, None, ids, settings))(arrays)
    if decays:  # the reference gives a hard reset no gradient either
        assert found[1]["log_decay"][0, P * L // 2].tolist() == [0.0] * N
    assert_close(found, wanted)
    assert_others_unchanged(found, program(ids, with_another_second_document(arrays, ids)), ids)


def with_another_second_document(arrays, ids):
    """The second document of the last row is another one, with stronger decays."""
    own, out = np.asarray(ids[-1]) == 2, {name: x.copy() for name, x in arrays.items()}
    for name, x in out.items():
        if name != "sinks":
            x[-1, own] = 3 * x[-1, own][::-1]
    return out


def assert_others_unchanged(before, after, ids):
    """No bit of values and gradients differs at the tokens of other documents."""
    others = np.asarray(ids) != 2
    others[:-1] = True
    for old, new in ((before[0], after[0]), *((before[1][name], after[1][name]) for name in before[1])):
        if old.shape[:2] == others.shape:
            np.testing.assert_array_equal(old[others], new[others])


def test_bytes_of_both_passes_and_memory_of_one_part():
    """As the docstring of attention_ring.py counts them; and no device ever holds an array of a whole row."""
    P, L = 4, 22
    arrays, ids = arguments(P * L, decays=False, sinks=False)
    half = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    compiled = on_a_ring(P, half, ids).lower(ids, half).compile()
    keys, places = K * (H + W) * L, (N + K) * (H + W) * L // 2
    passes = keys * (P - 1) + places, keys * (P - 1) + keys * P + places
    assert received(compiled.as_text()) == B * sum(passes)
    shapes = {array.shape for run in parse(compiled.as_text()).runs() for array in run.instruction.results}
    assert max(max(shape, default=0) for shape in shapes) == L  # a row has 88
    y, grads = compiled(ids, half)
    wide = {name: x.astype(jnp.float32) for name, x in half.items()}
    wanted_y, wanted = jax.jit(functools.partial(gradients, None, ids, {}))(wide)
    for a, b in ((y, wanted_y), *((grads[name], wanted[name]) for name in grads)):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.03 * (1 + np.abs(b).max()))


def pairs_of_each_device(deal, window):
    """How many keys the queries of each device see, counted one by one."""
    P, L = deal.devices, deal.tokens
    sees = np.minimum(np.arange(P * L) + 1, window or P * L)
    found, taken = np.zeros(P), np.zeros(P * L)
    for device, starts in enumerate(deal.places()):
        for j, start in enumerate(starts):
            own = slice(start, start + min(deal.size, L - j * deal.size))
            found[device] += sees[own].sum()
            taken[own] += 1
    assert (taken == 1).all()
    return found


@pytest.mark.parametrize(("P", "L"), [(2, 100), (3, 101), (4, 64), (8, 77), (64, 70)])
def test_all_devices_work_equally(P, L):
    """No device sees more than 1.05 times the mean of keys, whatever the window; `Deal.work` says what each does."""
    for window in (None, *(max(1, P * L * i // 40) for i in range(41))):
        deal = Deal.of(P, L, window)
        work = pairs_of_each_device(deal, window)
        np.testing.assert_array_equal(work, deal.work(window))
        assert work.max() <= 1.05 * work.mean(), window
        assert deal.blocks == 2 or window
    assert Deal.of(P, L, P * L // 11).in_place and not Deal.of(P, L, P * L // 9).in_place


def test_a_narrow_window_rings_as_far_as_it_sees():
    P, L = 64, 100
    for window in (30, 160, 400):
        ring = Ring.of("context", P, L, window=window, **PLAN)
        assert ring.deal.in_place and ring.steps == -(-(window - 1) // L)
    for window in (P * L // 4, 3 * P * L // 4):  # blocks from all over the row are on every device
        ring = Ring.of("context", P, L, window=window, **PLAN)
        assert not ring.deal.in_place and ring.steps == P - 1


def test_it_is_chosen_where_whole_rows_of_keys_are_too_much(caplog):
    sizes = {"devices": 8, "heads": 12, "kv_heads": 3, "window": None, "kv_width": 256}
    choose = functools.partial(attention_shards.choose, **sizes)
    most = attention_shards.MOST_GATHERED // (8 * 3 * 256)
    assert choose(None, tokens=most) == "gather"
    assert choose(None, tokens=most + 1) == "ring"
    assert choose(None, tokens=most + 1, heads=16, kv_heads=2) == "heads"
    assert choose(None, tokens=most + 1, window=2048) == "halo"
    assert choose("ring", tokens=4) == "ring"
    with caplog.at_level(logging.INFO, "lcx"):
        attention_shards._say("ring", 8, 1 << 28)
    assert "keys and values in a ring; keys and values of a whole row are 268,435,456 numbers" in caplog.text
    with pytest.raises(UserError, match="a ring is computed by 'xla'; leave implementation at None"):
        arrays, ids = arguments(4, decays=False, sinks=False)
        on_a_ring(2, arrays, ids, implementation="splash")(ids, arrays)
