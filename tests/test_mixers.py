"""One table, a row per mixer; one battery that every row must pass. A new mixer adds its row, nothing else."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import mixers
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.mixers.latent_attention import LatentAttention
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.published_lolcats import PublishedLinearAttention
from lcx.mixers.two_mamba import TwoMamba
from lcx.rope import Rope

D = 32
YARN = Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

MIXERS = {
    "attention": Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    "attention_one_kv_head": Attention(num_heads=4, num_kv_heads=1, head_dim=16, rope=YARN),
    "attention_window": Attention(num_heads=4, num_kv_heads=4, head_dim=8, window=17),
    "attention_chunked": Attention(
        4, 2, 8, window=17, chunked=True, qk_norm="l2", temperature=0.4, temperature_floor=13, keys_as_values=True,
        value_norm=True,
    ),
    "attention_bias_qk_norm_partial": Attention(4, 2, 8, Rope(partial_rotary_factor=0.5), None, True, True, True),
    "latent_attention": LatentAttention(4, 12, 6, 4, 5, q_lora_rank=10, rope=YARN, bias=True),
    "hyena_se": HyenaSE(num_channels=D, num_groups=8),
    "hyena_mr": HyenaMR(num_channels=D, num_groups=16, init_length=512),
    "hyena_li": HyenaLI(num_channels=D),
    "linear": LinearAttention(4, 2, 8, window=None, feature_map="relu", feature_dim=6, feature_bias=True),
    "linear_terraced": LinearAttention(4, 2, 8, window=16, feature_dim=6),
    "linear_sliding": LinearAttention(4, 1, 8, window=9, window_kind="sliding", feature_dim=8, adapter=4),
    "mamba2": Mamba2(num_heads=4, head_dim=8, state_dim=16, num_groups=2),
    "mamba2_one_head": Mamba2(1, 8, 16, conv_size=2, conv_bias=False, skip_per_channel=True, mlp_size=24),
    "two_mamba": TwoMamba(num_heads=2, head_dim=16),
    "two_mamba_exp": TwoMamba(num_heads=4, head_dim=8, score="exp", value_step=True),
    "two_mamba_square_output_norm": TwoMamba(2, 16, norm="output", residual=True, conv_width=3),
    "two_mamba_linear": TwoMamba(4, 8, "linear", "output", "silu", 4, "discretize", True, True, True),
    "two_mamba_linear_relu": TwoMamba(4, 8, "linear", "scores", "relu", 1, "none"),
}
LENGTHS = (1, 63, 100, 257)
# Other settings of rows above, which reach the same operators: at one token and at the longest length alone.
VARIANTS = (
    *("attention_one_kv_head", "attention_bias_qk_norm_partial", "mamba2_one_head"),
    *("two_mamba_square_output_norm", "two_mamba_linear_relu"),
)


def pytest_generate_tests(metafunc):
    """Every mixer at every length, VARIANTS at fewer; pieces at the lengths that a cut tells apart."""
    if {"mixer", "T"} <= set(metafunc.fixturenames):
        # Pieces of 63 tokens are shorter than a chunk, those of 257 longer; 100 tokens add no third kind.
        left_out = (100,) if metafunc.function is test_pieces_and_decoding_equal_the_whole else ()
        cases = [
            (name, T)
            for name in MIXERS
            for T in LENGTHS
            if T not in left_out and (name not in VARIANTS or T in (LENGTHS[0], LENGTHS[-1]))
        ]
        metafunc.parametrize(("mixer", "T"), cases, indirect=["mixer"], scope="module")
    elif {"mixer", "params"} <= set(metafunc.fixturenames):
        metafunc.parametrize("mixer", MIXERS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def mixer(request):
    return MIXERS[request.param]


@pytest.fixture(scope="module")
def params(mixer):
    return noisy_params(mixer)


@functools.cache
def noisy_params(mixer):
    x = jnp.zeros((1, 2, D))
    variables = nn.meta.unbox(jax.jit(mixer.init)(jax.random.key(0), x))
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))  # biases and norms away from 0 and 1
    noise = (0.1 * normal(key, x.shape) for x, key in zip(leaves, keys, strict=True))
    return jax.tree.unflatten(tree, [x + new for x, new in zip(leaves, noise, strict=True)])


def normal(key, shape):
    return np.asarray(jax.random.normal(key, shape))


@functools.partial(jax.jit, static_argnums=0)
def apply(mixer, params, x, positions, segment_ids, cache):
    return mixer.apply({"params": params}, x, positions=positions, segment_ids=segment_ids, cache=cache)


def run(mixer, params, x, positions=None, segment_ids=None, cache=None):
    """y as a numpy array, since each slice of a jax array would be a program, and the cache."""
    y, cache = apply(mixer, params, x, positions, segment_ids, cache)
    return np.asarray(y), cache


def value_and_gradients(mixer, params, x, counts, positions=None, segment_ids=None):
    """y, and the gradients by the parameters and by x of a sum over the tokens that count [B, T]."""
    return jax.device_get(differentiated(mixer, params, x, counts, positions, segment_ids))


@functools.partial(jax.jit, static_argnums=0)
def differentiated(mixer, params, x, counts, positions, segment_ids):
    def loss(params, x):
        y, _ = mixer.apply({"params": params}, x, positions=positions, segment_ids=segment_ids)
        return jnp.sum(jnp.where(counts[..., None], jnp.sin(y), 0)), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, grads


def inputs(T, B=2, seed=2):
    return normal(jax.random.key(seed), (B, T, D)).copy()


def three_rows(T):
    """Three, since a packed row has as many documents, which come alone in the same program."""
    return np.concatenate([inputs(T), inputs(T, B=1)])


def whole(mixer, x):
    """Rows without documents: y and its gradients, in one program for all tests of a length."""
    return value_and_gradients(mixer, noisy_params(mixer), x, np.ones(x.shape[:2], bool))


def test_causal(mixer, T):
    x, at = three_rows(T), T // 2
    y, _ = whole(mixer, x)
    x[:, at] += 1
    changed, _ = whole(mixer, x)
    np.testing.assert_allclose(y[:, :at], changed[:, :at], atol=1e-6)
    assert np.abs(y[:, at] - changed[:, at]).max() > 1e-3  # the change does arrive


def test_segments_are_independent(mixer, params, T):
    """A packed row gives what its documents give alone; padding changes nothing."""
    lengths = [n for n in (T // 3, T - T // 3 - T // 5, T // 5) if n]
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    pad = ((0, 0), (0, 3))
    x = np.pad(inputs(T, B=1), (*pad, (0, 0)), constant_values=7.0)
    packed, _ = run(mixer, params, x, np.pad(positions, pad), np.pad(segments, pad))
    assert np.isfinite(packed).all()
    starts = np.cumsum([0, *lengths[:-1]])
    rows = np.zeros((3, T, D), np.float32)  # a document at the start of each; what follows changes nothing
    for row, start, n in zip(rows, starts, lengths, strict=False):
        row[:n] = x[0, start : start + n]
    alone, _ = whole(mixer, rows)
    for row, start, n in zip(alone, starts, lengths, strict=False):
        np.testing.assert_allclose(packed[0, start : start + n], row[:n], atol=2e-6)


def test_pieces_and_decoding_equal_the_whole(mixer, params, T):
    """A prompt in two pieces, then five tokens one by one; slots are left over, or just enough."""
    x, cache, ys = three_rows(T), mixer.init_cache(3, LENGTHS[-1], jnp.float32), []
    edges = [*{0, max(T - 5, 0) // 3, *range(max(T - 5, 0), T + 1)}]
    for first, last in itertools.pairwise(sorted(edges)):
        y, cache = run(mixer, params, x[:, first:last], cache=cache)
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, 1), whole(mixer, x)[0], atol=2e-6)


# --- rows of 40 tokens: two that are cut into pieces, one of them packed, and the same 8 tokens wherever padding is

SHORT = 40  # tokens: more than any window here holds; pieces end inside of a window, a chunk and a document
DOCUMENTS = np.array([[1] * SHORT, [1] * 9 + [2] * 28 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(SHORT)], [*range(9), *range(28), 0, 0, 0]], np.int32)
PLACES = ("left", "right", "both", "nothing but padding")
TEXT = 8
PUBLISHED = {
    f"linear_published_{kind}": PublishedLinearAttention(
        4, 2, 8, window=window, window_kind=kind, feature_dim=6
    )
    for kind, window in (("terraced", 4), ("sliding", 3))
} | {"linear_published": LinearAttention(4, 2, 8, window=None, feature_dim=6, published_quirks=True)}


@pytest.fixture(params=[*MIXERS, *PUBLISHED], scope="module")
def padded(request):
    """(mixer, its parameters); those that are "as published" are held to these rules of the battery alone."""
    mixer = (MIXERS | PUBLISHED)[request.param]
    return mixer, noisy_params(mixer)


def padded_rows(x, T, filling):
    """x [1, t, D] in a row of T for each place -> the first place of each, arrays [4, T, ...]."""
    t = x.shape[1]
    firsts = {"left": T - t, "right": 0, "both": 4}
    rows = np.full((len(PLACES), T, D), filling, np.float32)
    segments, positions = np.zeros((2, len(PLACES), T), np.int32)
    for row, first in enumerate(firsts.values()):
        at = slice(first, first + t)
        rows[row, at], segments[row, at], positions[row, at] = x[0], 1, np.arange(t)
    return firsts, rows, positions, segments


def with_padding(mixer, filling, rows):
    """value_and_gradients of SHORT tokens: two rows of documents, then padded ones; `rows`: those that count."""
    firsts, padded, positions, segments = padded_rows(inputs(TEXT, B=4)[:1], SHORT, filling)
    x = np.concatenate([inputs(SHORT, B=2), padded])
    positions, segments = np.concatenate([POSITIONS, positions]), np.concatenate([DOCUMENTS, segments])
    counts = (segments != 0) & np.isin(np.arange(6), rows)[:, None]
    return firsts, value_and_gradients(mixer, noisy_params(mixer), x, counts, positions, segments)


@functools.partial(jax.jit, static_argnums=(0, 3))
def in_pieces(mixer, params, x, cuts):
    """As value_and_gradients of the rows of documents, the state passed from piece to piece."""

    def loss(params, x):
        cache = mixer.init_cache(x.shape[0], SHORT, x.dtype)
        ys, edges = [], (0, *cuts, SHORT)
        for first, last in itertools.pairwise(edges):
            at = (slice(None), slice(first, last))
            packed = {"positions": jnp.asarray(POSITIONS[at]), "segment_ids": jnp.asarray(DOCUMENTS[at])}
            y, cache = mixer.apply({"params": params}, x[at], **packed, cache=cache)
            ys.append(y)
        y = jnp.concatenate(ys, axis=1)
        return jnp.sum(jnp.where((DOCUMENTS != 0)[..., None], jnp.sin(y), 0)), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, grads


def test_pieces_have_the_gradient_of_one(mixer, params):
    """What follows a piece reaches it through the cache; packed documents and padding too."""
    cuts = (17, 23) if mixers.grows(mixer) else (23,)  # few tokens and many are different code there
    _, (want, (of_params, of_x)) = with_padding(mixer, 0.0, (0, 1))
    got, (grads, dx) = jax.device_get(in_pieces(mixer, params, inputs(SHORT, B=2), cuts))
    np.testing.assert_allclose(got[:, :-3], want[:2, :-3], atol=2e-6)
    np.testing.assert_allclose(dx[:, :-3], of_x[:2, :-3], atol=1e-4 * float(np.abs(of_x).max()))
    for (path, g), w in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(of_params), strict=True
    ):
        # 2e-6: rounding of sums whose terms cancel, such as the one number that is a head's bias.
        np.testing.assert_allclose(g, w, atol=2e-6 + 1e-4 * float(np.abs(w).max()), err_msg=str(path))


def test_padding_changes_no_token_and_no_gradient(padded):
    mixer, params = padded
    x = inputs(TEXT, B=4)
    y, (of_params, of_x) = value_and_gradients(mixer, params, x, np.arange(4)[:, None] + np.zeros(TEXT) == 0)
    for filling in (0.0, 1e4):
        firsts, (found, (grads, dx)) = with_padding(mixer, filling, (2, 3, 4, 5))
        found, dx = found[2:], np.array(dx[2:])
        assert np.isfinite(found).all()
        for row, (place, first) in enumerate(firsts.items()):
            at = (slice(row, row + 1), slice(first, first + TEXT))
            np.testing.assert_allclose(found[at], y[:1], atol=2e-6, err_msg=f"{place} {filling}")
            np.testing.assert_allclose(dx[at], of_x[:1], atol=1e-5, err_msg=f"{place} {filling}")
            dx[at] = 0
        assert not dx.any(), f"padding with {filling} has a gradient"
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            want = 3 * functools.reduce(lambda tree, key: tree[key.key], path, of_params)
            np.testing.assert_allclose(g, want, atol=3e-5, rtol=3e-5, err_msg=f"{path} {filling}")


def test_padding_does_not_count_in_a_rotation_that_depends_on_the_length():
    mixer = Attention(4, 2, 8, rope=Rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=4))
    params, x = noisy_params(mixer), inputs(9, B=1)
    alone, _ = run(mixer, params, x[:, :6])
    padded, _ = run(mixer, params, x, None, jnp.array([[1] * 6 + [0] * 3]))
    np.testing.assert_allclose(padded[:, :6], alone, atol=2e-6)


def test_ragged_prompts_decode_like_each_row_alone(padded):
    """Prompts of 5 tokens and of none, padded on either side; then 4 steps, of which row by row one is padding."""
    mixer, params = padded
    x, later = inputs(5, B=1), inputs(4, B=len(PLACES), seed=3)
    firsts, rows, positions, segments = padded_rows(x, 14, 1e4)
    y, cache = run(mixer, params, rows, positions, segments, mixer.init_cache(4, 20, jnp.float32))
    got = [[] for _ in PLACES]
    for row, first in enumerate(firsts.values()):
        got[row].extend(y[row, first : first + 5])
    for step in range(4):
        real = np.arange(4) != step  # this row waits
        new = np.where(real[:, None, None], later[:, step : step + 1], np.float32(-1e4))
        place = np.array([[len(row)] for row in got], np.int32)
        out, cache = run(mixer, params, new, place, real[:, None].astype(np.int32), cache)
        for row in np.flatnonzero(real):
            got[row].append(out[row, 0])
    own = np.stack([later[row, np.arange(4) != row] for row in range(4)])
    alone = decoded_alone if mixer in PUBLISHED.values() else at_once
    for place, row, want in zip(PLACES, got, alone(mixer, x, own), strict=True):
        np.testing.assert_allclose(np.stack(row), want[: len(row)], atol=2e-6, err_msg=place)


def at_once(mixer, x, own):
    """What the tokens x and then each row's own give, and in the last row its own; what follows changes nothing."""
    rows = np.concatenate([np.repeat(x, 4, axis=0), own], axis=1)
    rows[3] = np.roll(rows[3], len(own[0]), axis=0)
    return whole(mixer, rows)[0]


def decoded_alone(mixer, x, own):
    """The same, token by token after x: as published, a window there is not the one of a text read at once."""
    y, read = run(mixer, noisy_params(mixer), np.repeat(x, 4, axis=0), cache=mixer.init_cache(4, 20, jnp.float32))
    ys = []
    for start, cache in ((5, read), (0, mixer.init_cache(4, 20, jnp.float32))):
        for place in range(3):
            at, ones = np.full((4, 1), start + place, np.int32), np.ones((4, 1), np.int32)
            out, cache = run(mixer, noisy_params(mixer), own[:, place : place + 1], at, ones, cache)
            ys.append(out)
    return [*np.concatenate([y, *ys[:3]], axis=1)[:3], np.concatenate(ys[3:], axis=1)[3]]


def test_left_padded_prompts_in_pieces_are_like_whole_ones(mixer, params):
    """Rows of 9 and 5 tokens in pieces of 3: the first of the shorter row's is padding alone."""
    x = inputs(9, B=2)
    segments = np.array([[1] * 9, [0] * 4 + [1] * 5], np.int32)
    positions = np.array([list(range(9)), [0] * 4 + list(range(5))], np.int32)
    cache, ys = mixer.init_cache(2, 9, jnp.float32), []
    for start in (0, 3, 6):
        at = (slice(None), slice(start, start + 3))
        y, cache = run(mixer, params, x[at], positions[at], segments[at], cache)
        ys.append(y)
    alone = np.zeros((4, TEXT, D), np.float32)
    alone[0, :5] = x[1, 4:]
    np.testing.assert_allclose(np.concatenate(ys, axis=1)[1, 4:], whole(mixer, alone)[0][0, :5], atol=2e-6)


def test_a_window_counts_tokens_behind_a_padded_piece():
    """Pieces of more tokens than are attended to at once, the first filled up on the right, the second on the left."""
    mixer = Attention(4, 2, 8, window=7)
    params, x = noisy_params(mixer), inputs(24, B=1)
    alone, _ = run(mixer, params, x)
    cache = mixer.init_cache(1, 40, jnp.float32)
    first = jnp.pad(x[:, :10], ((0, 0), (0, 6), (0, 0)), constant_values=1e4)
    ids = jnp.array([[1] * 10 + [0] * 6])
    y, cache = run(mixer, params, first, jnp.arange(16)[None], ids, cache)
    second = jnp.pad(x[:, 10:], ((0, 0), (3, 0), (0, 0)), constant_values=1e4)
    z, _ = run(mixer, params, second, jnp.arange(7, 24)[None], jnp.array([[0] * 3 + [1] * 14]), cache)
    np.testing.assert_allclose(jnp.concatenate([y[:, :10], z[:, 3:]], axis=1), alone, atol=2e-6)


def test_bfloat16_is_near_float32(mixer, params):
    x = three_rows(100)
    y, _ = whole(mixer, x)
    low, _ = run(mixer, params, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(np.float32) - y) / np.linalg.norm(y) < 1e-2


def test_gradients_are_finite_and_reach_every_parameter(mixer, T):
    _, (grads, _) = whole(mixer, three_rows(T))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        if "decay" in str(path):  # a constant that is stored with the weights
            assert np.abs(g).max() == 0, path
            continue
        # A single token attends to itself alone: nothing that shapes the scores, or a decay, has a gradient then.
        shapes = (
            "q_proj",
            "k_proj",
            "q_a_",
            "q_b_",
            "q_norm",
            "k_norm",
            "'p'",
            "gamma",
            "forget",
            "A_log",
            "feature_map",
            "window_f",
        )
        scores_only = any(name in str(path) for name in shapes)
        assert T == 1 and scores_only or np.abs(g).max() > 0, path


@pytest.mark.parametrize(
    ("mixer", "setting"),
    [
        (lambda: Attention(4, 2, 8, scale=0.0, parent=None), "Attention.scale is 0.0, expected a positive"),
        (lambda: Attention(4, 2, 8, norm_eps=-1.0, parent=None), "Attention.norm_eps is -1.0"),
        (lambda: LinearAttention(4, 2, 0, parent=None), "LinearAttention.head_dim is 0"),
        (lambda: HyenaSE(32, featurizer_length=0, parent=None), "HyenaSE.featurizer_length is 0"),
        (lambda: HyenaMR(32, init_length=0, parent=None), "HyenaMR.init_length is 0"),
        (lambda: HyenaLI(32, num_modes=0, parent=None), "HyenaLI.num_modes is 0"),
        (lambda: Mamba2(4, num_groups=0, parent=None), "Mamba2.num_groups is 0"),
        (lambda: Mamba2(4, mlp_size=-1, parent=None), "Mamba2.mlp_size is -1"),
        (lambda: TwoMamba(0, 8, parent=None), "TwoMamba.num_heads is 0"),
        (lambda: TwoMamba(2, 8, init_gain=0.0, parent=None), "TwoMamba.init_gain is 0.0"),
    ],
)
def test_sizes_that_cannot_be(mixer, setting):
    with pytest.raises(UserError, match=f"^{setting}.*: change "):
        jax.eval_shape(mixer().init, jax.random.key(0), jnp.zeros((1, 2, 32)))
