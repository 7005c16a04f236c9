"""RoPE against transformers (frequencies, rotation, the trace of a decode) and float64 (large positions)."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rope_oracle import KEY, assert_same, hf_config, hf_frequencies

from lcx import rope as rope_lib
from lcx.convert.hf.config import rope_from_config as from_hf
from lcx.convert.hf.rope_parameters import to_hf
from lcx.errors import UserError
from lcx.rope import ROPE_TYPES, Rope, rotate

torch = pytest.importorskip("torch")
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402
from transformers.models.phi3 import modeling_phi3  # noqa: E402

HEADS, BASES = (16, 64, 80, 96, 128), (10000.0, 500000.0, 1e6)


# ---------------------------------------------------------------- the types, against transformers over a grid


def grid():
    """(parameters, head_dim, max_position_embeddings, length): every type over sizes, bases, windows."""
    for head_dim, base in itertools.product(HEADS, BASES):
        common = {"rope_theta": base}
        yield {"rope_type": "default", **common}, head_dim, 4096, None
        for factor in (1.0, 1.5, 4, 40.0):
            yield {"rope_type": "linear", "factor": factor, **common}, head_dim, 4096, None
        for factor, window in itertools.product((1.0, 2.0, 8.0, 64.0), (64, 4096)):
            for length in (1, window, window + 1, 2 * window + 3, int(factor) * window + 17):
                yield {"rope_type": "dynamic", "factor": factor, **common}, head_dim, window, length
        for factor, window in itertools.product((1.0, 2.0, 4.0, 16.0, 40), (64, 2048, 32768)):
            yield {"rope_type": "yarn", "factor": factor, KEY: window, **common}, head_dim, 131072, None
            bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **common}
            yield {"rope_type": "llama3", "factor": factor, KEY: window, **bands}, head_dim, 131072, None
        for low, high in ((2, 3.5), (1.0, 1.0)):  # Llama 4 Scout has no band in between
            bands = {"low_freq_factor": low, "high_freq_factor": high}
            yield {"rope_type": "llama3", "factor": 8.0, KEY: 8192, **bands, **common}, head_dim, 131072, None
        for partial, factor in itertools.product((0.25, 0.3, 0.5, 1.0), (None, 1.0, 4.0)):
            extra = {"partial_rotary_factor": partial} | ({} if factor is None else {"factor": factor})
            yield {"rope_type": "proportional", **extra, **common}, head_dim, 4096, None
    yield from yarn_options()
    yield from longrope_cases()
    yield from partial_cases()


def yarn_options():
    for options, head_dim in itertools.product(
        (
            {"attention_factor": 1.0},
            {"attention_factor": 1.4851, "mscale": 1.0, "mscale_all_dim": 0.5},
            {"mscale": 1.0, "mscale_all_dim": 1.0},
            {"mscale": 0.707, "mscale_all_dim": 1.2},
            {"mscale": 1.3},
            {"mscale": 0.0, "mscale_all_dim": 1.0},
            {"beta_fast": 16, "beta_slow": 2.0},
            {"beta_fast": 0, "beta_slow": None},
            {"beta_fast": 1.0, "beta_slow": 1.0},  # low == high once truncated the same way
            {"beta_fast": 5.0, "beta_slow": 5.0, "truncate": False},  # low == high exactly
            {"truncate": False},
            {"truncate": None},
            {"truncate": True},
        ),
        HEADS,
    ):
        for base, window in ((10000.0, 4096), (150000.0, 4096), (10000.0, 1048576), (100.0, 4096)):
            given = {"rope_type": "yarn", "rope_theta": base, "factor": 32.0, KEY: window}
            yield given | options, head_dim, 131072, None


def longrope_cases():
    rng = np.random.default_rng(0)
    for head_dim, (factor, attention) in itertools.product(
        HEADS, ((None, None), (4.0, None), (1.0, None), (32.0, 1.19), (None, 1.5))
    ):
        short = rng.uniform(1, 1.5, head_dim // 2).tolist()
        long = np.sort(rng.uniform(1, 64, head_dim // 2)).tolist()
        given = {"rope_type": "longrope", "rope_theta": 10000.0, KEY: 64}
        given |= {"short_factor": short, "long_factor": long}
        given |= {k: v for k, v in (("factor", factor), ("attention_factor", attention)) if v is not None}
        for window, length in itertools.product((64, 256), (1, 64, 65, 1000)):
            yield given, head_dim, window, length


def partial_cases():
    scalings = (
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, KEY: 1024},
        {"rope_type": "llama3", "factor": 4.0, KEY: 1024, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    )
    for scaling, head_dim, partial in itertools.product(scalings, (64, 80, 128), (0.25, 0.5, 0.75)):
        yield {"rope_theta": 10000.0, "partial_rotary_factor": partial, **scaling}, head_dim, 4096, 10000


CASES = list(grid())


@pytest.mark.parametrize("name", sorted({case[0]["rope_type"] for case in CASES}))
def test_frequencies_equal_transformers(name):
    cases = [case for case in CASES if case[0]["rope_type"] == name]
    assert len(cases) >= 15
    for parameters, head_dim, window, length in cases:
        expected = hf_frequencies(hf_config(parameters, head_dim, window), length)
        rope = from_hf({"rope_parameters": parameters, "max_position_embeddings": window})
        found = rope.frequencies(head_dim, 1 if length is None else length)
        try:
            assert_same(found, expected)
            if name in (
                "default",
                "linear",
                "longrope",
                "proportional",
            ):  # rounded alike: two last bits at most
                np.testing.assert_allclose(found[0], expected[0], rtol=2.5e-7, atol=0)
        except AssertionError as error:
            raise AssertionError(f"{parameters}, head {head_dim}, window {window}, n {length}") from error


def test_the_grid_is_wide():
    assert len(CASES) > 1000
    assert {case[0]["rope_type"] for case in CASES} == set(ROPE_TYPES) - {"ntk"}


@pytest.mark.parametrize("factor", [1.5, 2.0, 8.0, 64.0])
@pytest.mark.parametrize("head_dim", HEADS)
def test_ntk_is_the_default_with_an_enlarged_base(head_dim, factor):
    for base in BASES:
        theta = base * factor ** (head_dim / (head_dim - 2))
        expected = hf_frequencies(hf_config({"rope_type": "default", "rope_theta": theta}, head_dim, 4096))
        found = Rope(rope_type="ntk", rope_theta=base, factor=factor).frequencies(head_dim, 1)
        assert_same(found, expected)
        plain = base ** (-np.arange(0, head_dim, 2) / head_dim)  # the two conditions that the base comes from
        np.testing.assert_allclose(found[0][[0, -1]], [plain[0], plain[-1] / factor], rtol=1e-6)


@pytest.mark.parametrize("base, factor, theta", [(1e4, 2, 20221), (1e4, 8, 82685), (5e5, 8, 4.134e6)])
def test_ntk_published_bases(base, factor, theta):
    assert rope_lib.ntk_theta(Rope("ntk", base, factor), 128) == pytest.approx(theta, rel=2e-4)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_traced_length_gives_the_same(name):
    """The length may be an array inside jit, as the length of a cache is."""
    by_case = {}
    for parameters, head_dim, window, length in CASES:
        if parameters["rope_type"] == name and head_dim in (16, 128):
            by_case.setdefault((json.dumps(parameters), head_dim, window), []).append(length)
    assert len(by_case) > 15
    for (text, head_dim, window), lengths in by_case.items():
        rope = from_hf({"rope_parameters": json.loads(text), "max_position_embeddings": window})
        many = jax.vmap(lambda n, rope=rope, head_dim=head_dim: rope.frequencies(head_dim, n)[0])
        found = jax.jit(many)(jnp.asarray(lengths, jnp.int32))
        for row, length in zip(found, lengths, strict=True):
            expected = hf_frequencies(hf_config(json.loads(text), head_dim, window), torch.tensor(length))
            np.testing.assert_allclose(row, expected[0], rtol=5e-6, atol=0)
            for whole in (np.int32(length), np.asarray(length), jnp.asarray(length)):
                np.testing.assert_allclose(rope.frequencies(head_dim, whole)[0], expected[0], rtol=5e-6)


def test_static_types_ignore_a_traced_length():
    rope = Rope("yarn", factor=4.0, original_max_position_embeddings=64)
    traced = jax.jit(lambda n: rope.frequencies(64, n)[0])(7)
    np.testing.assert_array_equal(traced, rope.frequencies(64, 10**6)[0])


def halved(rope, head_dim, length):
    inv_freq, scaling = rope_lib.yarn(rope, head_dim, length)
    return inv_freq / 2, scaling


def test_a_type_of_ones_own():
    rope = Rope(halved, factor=4.0, original_max_position_embeddings=64)
    expected = Rope("yarn", factor=4.0, original_max_position_embeddings=64).frequencies(64, 1)
    np.testing.assert_allclose(rope.frequencies(64, 1)[0], expected[0] / 2)
    with pytest.raises(UserError, match="function halved.*change rope_type"):
        to_hf(rope, max_position_embeddings=256)
    with pytest.raises(UserError, match="'halved' has no factor"):
        Rope(halved).frequencies(64, 1)


def test_a_rope_can_be_a_field_of_a_module():
    rope = Rope("longrope", 10000, 4, 64, short_factor=[1, 1], long_factor=[2, 2.5])
    assert hash(rope) == hash(dataclasses.replace(rope, long_factor=(2.0, 2.5)))
    assert rope == Rope("longrope", 10000.0, 4.0, 64.0, short_factor=(1.0, 1.0), long_factor=(2.0, 2.5))


# ------------------------------------------------------------------------------------------------- rotation


def hf_rotate(parameters, x, positions, head_dim, window=4096):
    """Rotation and gradient (of the sum weighted with x itself) by transformers, for x [B,T,N,H]."""
    config = hf_config(parameters, head_dim, window)
    embedding = modeling_phi3.Phi3RotaryEmbedding(config)
    q = torch.tensor(x, requires_grad=True)
    cos, sin = embedding(q, torch.tensor(np.broadcast_to(positions, x.shape[:2]).astype(np.int64)))
    y, _ = modeling_phi3.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    (y * torch.arange(y.numel()).reshape(y.shape).cos()).sum().backward()
    return y.detach().numpy(), q.grad.numpy()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "head_dim, parameters",
    [
        (16, {"rope_type": "default", "rope_theta": 10000.0}),
        (64, {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, KEY: 512}),
        (80, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0, "partial_rotary_factor": 0.25}),
        (
            96,
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, KEY: 512, "partial_rotary_factor": 0.75},
        ),
        (16, {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
)
def test_rotation_equals_transformers(head_dim, parameters, rows):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 37, 2, head_dim)).astype(np.float32)
    positions = rng.integers(0, 4096, (rows, 37)).astype(np.int32)  # any order, as packing makes them
    rope = from_hf({"rope_parameters": parameters, "max_position_embeddings": 4096})
    frequencies = rope.frequencies(head_dim, 4096)
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(x):
        y = rotate(x, positions, *frequencies)
        return (y * weights).sum(), y

    (_, y), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x))
    expected, expected_grad = hf_rotate(parameters, x, positions, head_dim)
    # The last bit of an angle of 4096 rad is 2.4e-4 rad: this is closer than the angles are exact.
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(grad, expected_grad, atol=2e-5)


def float64_rotation(x, positions, inv_freq, scaling):
    """(the rotation in float64, its angles, the length of each rotated pair), from the formula."""
    pairs = len(inv_freq)
    angle = positions.astype(np.float64)[:, :, None, None] * np.asarray(inv_freq, np.float64)
    first, second = x[..., :pairs].astype(np.float64), x[..., pairs:].astype(np.float64)
    c, s = np.cos(angle) * scaling, np.sin(angle) * scaling
    y = np.concatenate([first * c - second * s, second * c + first * s], -1)
    return y, np.concatenate([angle, angle], -1), np.tile(np.hypot(first, second), 2) * scaling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", [0, 4000, 2**20 - 256, 2**20, 2**23])
def test_large_positions_are_as_exact_as_a_float32_product(start, dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 512, 2, 64)), dtype)
    positions = np.arange(start, start + 512, dtype=np.int32)[None]
    inv_freq, scaling = Rope("yarn", 5e5, 16.0, 8192).frequencies(64, 1)
    y = jax.jit(rotate)(x, positions, inv_freq, scaling)
    assert y.dtype == x.dtype
    expected, angle, size = float64_rotation(np.asarray(x, np.float64), positions, inv_freq, scaling)
    # Half a unit in the last place of the angle and of the result's dtype; float32 sine and cosine.
    bound = angle * 2.0**-24 + 1e-6 + (2.0**-8 if dtype == "bfloat16" else 0.0)
    assert (np.abs(np.asarray(y, np.float64) - expected) <= bound * size).all()


def test_distinct_positions_stay_distinct():
    """In bfloat16 the 8192 positions would be 33 distinct ones up there, and 897 from zero."""
    positions = np.arange(2**20, 2**20 + 8192, dtype=np.int32)[None]
    x = jnp.ones((1, 8192, 1, 64), jnp.float32)
    y = np.asarray(rotate(x, positions, *Rope().frequencies(64, 1)))[0, :, 0]
    assert len(np.unique(y, axis=0)) == 8192
    collapsed = np.asarray(jnp.asarray(positions, jnp.bfloat16).astype(jnp.int32))
    assert len(np.unique(collapsed)) < 100  # what this test would see if positions were rounded


def test_bfloat16_is_the_float32_rotation_rounded_once():
    x = jax.random.normal(jax.random.key(0), (2, 64, 2, 32), jnp.bfloat16)
    positions = np.arange(100_000, 100_064, dtype=np.int32)[None]
    frequencies = Rope().frequencies(32, 1)
    expected = rotate(x.astype(jnp.float32), positions, *frequencies).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rotate(x, positions, *frequencies)), np.asarray(expected))


def test_one_row_of_positions_costs_one_row_of_cosines():
    x, positions = jnp.ones((8, 16, 2, 32)), jnp.arange(16)[None]
    text = str(jax.make_jaxpr(lambda x: rotate(x, positions, *Rope().frequencies(32, 1)))(x))
    shapes = [line.split("=")[0] for line in text.splitlines() if "= cos" in line or "= sin" in line]
    assert len(shapes) == 2 and all("f32[1,16,1,16]" in shape for shape in shapes)


def test_dimensions_beyond_the_rotated_ones_pass_through_bit_for_bit():
    x = jax.random.normal(jax.random.key(0), (1, 8, 1, 80), jnp.bfloat16)
    y = rotate(x, jnp.arange(8)[None] + 99, *Rope(partial_rotary_factor=0.4).frequencies(80, 1))
    np.testing.assert_array_equal(np.asarray(y[..., 32:]), np.asarray(x[..., 32:]))
    assert (np.asarray(y[..., :32]) != np.asarray(x[..., :32])).any()


# ------------------------------------------------------------------- the trace of transformers' cached decode


def test_dynamic_trace_equals_transformers_step_by_step():
    window, head_dim = 64, 32
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    module = LlamaRotaryEmbedding(hf_config(parameters, head_dim, window))
    rope = Rope("dynamic", factor=4.0, original_max_position_embeddings=window)
    cached, seen = window, set()
    # Growing by tokens, a shorter text with the stale base, exactly the window (no reset), a reset, again.
    for n in (3, 63, 64, 65, 66, 67, 200, 100, 65, 64, 64, 63, 64, 65, 300, 1, 256, 255, 257, 64, 10, 64):
        module(torch.zeros(1), torch.arange(n)[None])
        cached = (
            window if n < window else max(cached, n)
        )  # the base only grows, until a shorter text resets it
        assert cached == int(module.max_seq_len_cached)
        np.testing.assert_allclose(rope.frequencies(head_dim, cached)[0], module.inv_freq.numpy(), rtol=5e-6)
        seen.add(cached == max(n, window))
    assert seen == {True, False}  # the trace differs from the length of the text somewhere


def test_longrope_trace_is_the_last_position():
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, KEY: 64, "factor": 4.0}
    parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    module = LlamaRotaryEmbedding(hf_config(parameters, 16, 256))
    rope = from_hf({"rope_parameters": parameters, "max_position_embeddings": 256})
    for n in (3, 64, 65, 200, 64, 10):
        module(torch.zeros(1), torch.arange(n)[None])
        np.testing.assert_allclose(rope.frequencies(16, n)[0], module.inv_freq.numpy(), rtol=5e-6)
