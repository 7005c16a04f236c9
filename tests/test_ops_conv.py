"""The convolutions against their definitions in float64, by sums: values, gradients, states, documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.ops import fir_conv as fir
from lcx.ops import long_conv as long
from lcx.ops import modal
from lcx.ops import short_conv as short
from lcx.ops.long_conv import fft_size
from lcx.ops.short_conv import ConvState

B, D, G = 2, 8, 4
# One program a call: an operation after the other, each would be compiled by itself.
fir_conv = jax.jit(fir.fir_conv, static_argnames="implementation")
long_conv = jax.jit(long.long_conv, static_argnames="implementation")
short_conv = jax.jit(short.short_conv, static_argnames=("implementation", "time_axis"))
modal_step, modal_state = jax.jit(modal.step), jax.jit(modal.state)
modal_response = jax.jit(modal.response, static_argnames="length")
modal_taps = jax.jit(modal.taps, static_argnums=2)


def documents(T, packed):
    """Padding at the left of row 0, several documents (some of a few tokens), padding at the right."""
    if not packed:
        return None
    rng = np.random.default_rng(T)
    ids = np.sort(rng.choice(np.repeat([1, 2, 3, 7, 8], [9, 9, 1, 1, 9]), (B, T)), axis=1).astype(np.int32)
    ids[0, : T // 7] = 0
    ids[:, T - T // 5 :] = 0
    return jnp.array(ids)


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes]


def seen(ids, T):
    """[B, T, T] float64: 1 where token t may take from token s."""
    causal = np.tril(np.ones((T, T)))
    if ids is None:
        return np.broadcast_to(causal, (B, T, T))
    ids = np.asarray(ids)
    return causal * (ids[:, :, None] == ids[:, None]) * (ids[:, :, None] != 0)


def numpy_conv(x1, x2, v, h, skip, ids, dy):
    """y and the gradients of sum(dy * y), by T x T matrices; h [D, K]."""
    T, K = v.shape[2], h.shape[1]
    x1, x2, v, h, skip, dy = (np.asarray(x, np.float64) for x in (x1, x2, v, h, skip, dy))
    mask, distance = seen(ids, T), np.arange(T)[:, None] - np.arange(T)
    taps = np.where((distance >= 0) & (distance < K), h[:, np.clip(distance, 0, K - 1)], 0)  # [D, T, T]
    own = np.einsum("btt->bt", mask)[:, None]
    g = x2 * v
    conv = np.einsum("dts,bts,bds->bdt", taps, mask, g, optimize=True) + skip[:, None] * g * own
    dconv = dy * x1
    dg = np.einsum("dts,bts,bdt->bds", taps, mask, dconv, optimize=True) + skip[:, None] * dconv * own
    pairs = np.einsum("bdt,bts,bds->dts", dconv, mask, g, optimize=True)
    dh = np.stack(
        [np.trace(pairs, offset=-k, axis1=1, axis2=2) if k < T else np.zeros(D) for k in range(K)], axis=1
    )
    return x1 * conv, dy * conv, dg * v, dg * x2, dh, (dconv * g * own).sum((0, 2))


def assert_close(found, expected, tolerance):
    for got, want in zip(found, expected, strict=True):
        want = np.asarray(want)
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-9)
        assert error < tolerance, error


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(f, inputs, dy):
    y, pull = jax.vjp(f, *inputs)
    return y, *pull(dy)


# A token alone; shifts (up to 15 taps); blocks of 32 and of 64; more taps than tokens; taps that fill their blocks.
FIR = [(1, 128), (63, 2), (257, 7), (100, 17), (100, 128), (257, 129), (300, 256)]


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(("T", "K"), FIR)
def test_fir_conv_equals_the_definition(T, K, packed):
    x1, x2, v, h, skip, dy = arrays(T, *[(B, D, T)] * 3, (G, K), (D,), (B, D, T))
    ids = documents(T, packed)
    expected = list(numpy_conv(x1, x2, v, jnp.repeat(h, D // G, axis=0), skip, ids, dy))
    expected[4] = expected[4].reshape(G, -1, K).sum(1)

    def f(x1, x2, v, h, skip):
        return fir_conv(x1, x2, v, h, skip=skip, segment_ids=ids)[0]

    found = with_gradients(f, (x1, x2, v, h, skip), dy)
    assert_close(found, expected, 2e-6)
    if ids is not None:
        assert not np.any(np.asarray(found[0])[np.broadcast_to(np.asarray(ids)[:, None] == 0, (B, D, T))])
    reference = fir_conv(x1, x2, v, h, skip=skip, segment_ids=ids, implementation="reference")[0]
    assert_close([reference], expected[:1], 1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("T", [1, 100, 257, 1100])
def test_long_conv_equals_the_definition(T, packed):
    x1, x2, v, h, skip, dy = arrays(T, *[(B, D, T)] * 3, (D, T + 3), (D,), (B, D, T))
    ids = documents(T, packed)
    expected = numpy_conv(x1, x2, v, h, skip, ids, dy)

    def f(x1, x2, v, h, skip):
        return long_conv(x1, x2, v, h, skip=skip, segment_ids=ids)

    assert_close(with_gradients(f, (x1, x2, v, h, skip), dy), expected, 2e-6)
    if T < 1000:
        reference = long_conv(x1, x2, v, h, skip=skip, segment_ids=ids, implementation="reference")
        assert_close([reference], expected[:1], 1e-6)


def test_channels_in_turns(monkeypatch):
    """Longer rows on a CPU: two channels at a time, and an odd number of channels, which leaves one at a time."""
    monkeypatch.setattr(long, "GROUP", 2 * B * 37)
    for channels, turns in ((6, 3), (5, 5)):
        x2, v, h, dy = arrays(8, *[(B, channels, 37)] * 2, (channels, 37), (B, channels, 37))
        skip, ones = jnp.ones(channels), jnp.ones_like(v)
        assert long._cut(B, h, skip, long.GROUP)[0] == turns
        y, _, *gradients = numpy_conv(ones, x2, v, h, skip, None, dy)
        found = with_gradients(
            lambda x2, v, h, s: long.long_conv(None, x2, v, h, skip=s), (x2, v, h, skip), dy
        )
        assert_close(found, [y, *gradients], 2e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(
    ("T", "K", "axis"), [(1, 4, -1), (63, 1, 1), (100, 3, -1), (100, 4, 1), (257, 8, -1)]
)
def test_short_conv_equals_the_definition(T, K, axis, packed):
    x, w, bias, dy = arrays(T, (B, D, T), (D, K), (D,), (B, D, T))
    ids = documents(T, packed)
    ones = jnp.ones_like(x)
    y, _, _, dx, dw, _ = numpy_conv(ones, ones, x, w, np.zeros(D), ids, dy)
    own = np.einsum("btt->bt", seen(ids, T))[:, None]
    turn = (lambda x: x.transpose(0, 2, 1)) if axis == 1 else (lambda x: x)

    def f(x, w, bias):
        return turn(short_conv(turn(x), w, bias=bias, segment_ids=ids, time_axis=axis)[0])

    expected = (y + np.asarray(bias)[:, None] * own, dx, dw, (np.asarray(dy) * own).sum((0, 2)))
    assert_close(with_gradients(f, (x, w, bias), dy), expected, 2e-6)
    reference = short_conv(
        turn(x), w, bias=bias, segment_ids=ids, time_axis=axis, implementation="reference"
    )[0]
    assert_close([turn(reference)], expected[:1], 1e-6)


def test_equal_torch():
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    T, K = 257, 128
    x1, x2, v, h, dy = arrays(0, *[(B, D, T)] * 3, (G, K), (B, D, T))
    inputs = [torch.tensor(np.asarray(x)).requires_grad_() for x in (x1, x2, v, h)]
    correlation = inputs[3].repeat_interleave(D // G, dim=0).flip(-1)[:, None]
    y = (
        inputs[0]
        * torch.nn.functional.conv1d(inputs[1] * inputs[2], correlation, padding=K - 1, groups=D)[..., :T]
    )
    y.backward(torch.tensor(np.asarray(dy)))
    found = with_gradients(lambda *a: fir_conv(*a)[0], (x1, x2, v, h), dy)
    assert_close(found, (x.detach().numpy() for x in (y, *(x.grad for x in inputs))), 2e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("K", [3, 128])
def test_a_row_in_pieces_is_the_row(K, packed):
    """Pieces longer and shorter than the history, the empty history of another layer's init included."""
    T = 300
    x1, x2, v, h, skip = arrays(5, *[(B, D, T)] * 3, (G, K), (D,))
    ids = documents(T, packed)
    whole, last = fir_conv(x1, x2, v, h, skip=skip, segment_ids=ids)
    state, ys, at = ConvState(jnp.full((B, D, K - 1), 3.0), jnp.zeros((B, K - 1), jnp.int32)), [], 0
    step = jax.jit(
        lambda part, own, state: fir_conv(*part, h, skip=skip, segment_ids=own, initial_state=state)
    )
    for size in (258, 1, 1, 40):
        cut = slice(at, at + size)
        y, state = step([x[..., cut] for x in (x1, x2, v)], None if ids is None else ids[:, cut], state)
        ys.append(y)
        at += size
    assert_close([jnp.concatenate(ys, axis=2)], [whole], 1e-6)
    np.testing.assert_array_equal(state.inputs, last.inputs)
    np.testing.assert_array_equal(state.segment_ids, last.segment_ids)


def test_gradients_reach_the_state():
    """Of the tokens after a state, with respect to what is in it: as if they were one row."""
    T, K = 40, 17
    before, v, h, dy = arrays(3, (B, D, K - 1), (B, D, T), (G, K), (B, D, T))
    ids = jnp.ones((B, K - 1), jnp.int32)

    def in_two(before, v, h):
        return fir_conv(None, None, v, h, initial_state=ConvState(before, ids))[0]

    def in_one(before, v, h):
        row = jnp.concatenate([before, v], axis=2)
        return fir_conv(None, None, row, h, implementation="reference")[0][..., K - 1 :]

    found, expected = (with_gradients(f, (before, v, h), dy) for f in (in_two, in_one))
    assert_close(found, expected, 2e-6)


def test_short_conv_in_pieces():
    T, K = 20, 4
    for axis, shape in ((-1, (B, D, T)), (1, (B, T, D))):
        x, w = arrays(1, shape, (D, K))
        x = jnp.array(x)
        whole, _ = short_conv(x, w, time_axis=axis)
        state, ys = None, []
        for start, stop in ((0, 2), (2, 3), (3, 20)):
            part = jax.lax.slice_in_dim(x, start, stop, axis=axis % 3)
            y, state = short_conv(part, w, time_axis=axis, initial_state=state)
            ys.append(y)
        assert_close([jnp.concatenate(ys, axis=axis)], [whole], 1e-6)


def modal_arrays():
    rng = np.random.default_rng(0)
    poles, residues = -np.exp(rng.uniform(-6, 1, (D, 16))), rng.normal(size=(D, 16))
    return jnp.array(poles, jnp.float32), jnp.array(residues, jnp.float32)


@pytest.mark.parametrize("T", [1, 63, 100, 257])
def test_modal_taps_and_their_gradients(T):
    log_pole, residue = modal_arrays()
    dy = arrays(1, (D, T))[0]
    t = np.arange(T)
    powers = np.exp(np.asarray(log_pole, np.float64)[..., None] * t)  # [D, P, T]
    expected = (
        np.einsum("dp,dpt->dt", residue, powers),
        np.einsum("dt,dp,dpt->dp", dy * t, residue, powers),
        np.einsum("dt,dpt->dp", dy, powers),
    )
    found = with_gradients(lambda p, r: modal.taps(p, r, T), (log_pole, residue), dy)
    assert_close(found[0::2], expected[0::2], 2e-6)
    assert_close(found[1:2], expected[1:2], 2e-6 if T > 1 else 1)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_modal_state_is_the_recurrence(packed):
    """After any piece the state is that of one step after the other in float64, and it answers for what came before."""
    T = 300
    (g,), (log_pole, residue) = arrays(2, (B, D, T)), modal_arrays()
    ids = documents(T, packed)
    own = np.ones((B, T), np.int32) if ids is None else np.asarray(ids)
    s, last, ys = np.zeros((B, D, 16)), np.zeros(B, int), []
    for t in range(T):
        new = (own[:, t] != 0) & (own[:, t] != last)
        after = np.where(new[:, None, None], 0, s) * np.exp(np.asarray(log_pole, np.float64))
        # Padding leaves the state as it is: what comes next is the next token, however far the row was filled up.
        s = np.where((own[:, t] != 0)[:, None, None], after + np.asarray(g)[:, :, t, None], s)
        last = np.where(own[:, t] != 0, own[:, t], last)
        ys.append(np.where((own[:, t] != 0)[:, None], np.einsum("bdp,dp->bd", s, residue), 0))
    expected = np.stack(ys, axis=2)
    h = modal_taps(log_pole, residue, T)
    state, found = modal.ModalState(jnp.zeros((B, D, 16)), jnp.zeros(B, jnp.int32)), []
    for start, stop in ((0, 130), (130, 131), (131, 300)):
        part, some = g[..., start:stop], None if ids is None else ids[:, start:stop]
        if stop - start == 1:
            y, state = modal_step(
                part[..., 0], log_pole, residue, state, segment_ids=None if some is None else some[:, 0]
            )
            found.append(y[..., None])
            continue
        earlier = modal_response(state, log_pole, residue, length=stop - start, segment_ids=some)
        found.append(earlier + long_conv(None, None, part, h, segment_ids=some))
        state = modal_state(part, log_pole, segment_ids=some, initial_state=state)
    assert_close([jnp.concatenate(found, axis=2), state.modes], [expected, s], 2e-6)
    np.testing.assert_array_equal(state.segment_ids, last)


def test_bfloat16_stays_near_float64():
    T = 257
    shapes = [(B, D, T)] * 3 + [(G, 128), (D,), (B, D, T)]
    low = [x.astype(jnp.bfloat16) for x in arrays(7, *shapes)]
    exact = [np.asarray(x.astype(jnp.float32)) for x in low]
    filters = np.repeat(exact[3], D // G, axis=0)
    expected = list(numpy_conv(*exact[:3], filters, exact[4], None, exact[5]))
    expected[4] = expected[4].reshape(G, -1, 128).sum(1)
    found = with_gradients(lambda *a: fir_conv(*a[:4], skip=a[4])[0], tuple(low[:5]), low[5])
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_close([x.astype(jnp.float32) for x in found], expected, 1e-2)
    padded = np.pad(filters, ((0, 0), (0, T - 128)))
    y = long_conv(*low[:3], jnp.array(padded), skip=low[4])
    assert y.dtype == jnp.bfloat16
    assert_close([y.astype(jnp.float32)], expected[:1], 1e-2)


def test_neighbours_of_another_document_cannot_spoil_a_row():
    """What lies beyond a boundary is cut off, not subtracted: not even infinity comes through."""
    T = 300
    v = np.ones((1, D, T), np.float32)
    v[:, :, 100:150] = np.inf
    ids = np.repeat([1, 2, 3], [100, 50, 150])[None]
    v, ids = jnp.array(v), jnp.array(ids, jnp.int32)
    y = fir_conv(None, None, v, jnp.ones((G, 128)), segment_ids=ids)[0]
    assert np.isfinite(y[:, :, :100]).all() and np.isfinite(y[:, :, 150:]).all()


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(T, f, h, packed):
        x = jax.ShapeDtypeStruct((1, D, T), jnp.float32)
        ids = jnp.ones((1, T), jnp.int32) if packed else None
        grad = jax.grad(lambda x1, x2, v: jnp.sum(f(x1, x2, v, h(T), ids)), argnums=(0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    def fir(x1, x2, v, h, ids):
        return fir_conv(x1, x2, v, h, segment_ids=ids)[0]

    def long(x1, x2, v, h, ids):
        return long_conv(x1, x2, v, h, segment_ids=ids)

    for f, h, packed in (
        (fir, lambda T: jnp.ones((G, 128)), False),
        (fir, lambda T: jnp.ones((G, 128)), True),
        (long, lambda T: jnp.ones((D, T)), False),
        (long, lambda T: jnp.ones((D, T)), True),
    ):
        small, large = (temporaries(T, f, h, packed) for T in (2048, 8192))
        assert large < 5 * small and large < 60 * D * 8192 * 4


def test_fft_sizes_have_small_factors():
    for n in (1, 2, 513, 1999, 16383):
        size, rest = fft_size(n), fft_size(n)
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1 and n <= size <= max(2, 1.2 * n) and size % 2 == 0


def test_mistakes_are_named():
    v = jnp.ones((1, 6, 10))
    with pytest.raises(UserError, match="a divisor of 6"):
        fir_conv(None, None, v, jnp.ones((4, 7)))
    with pytest.raises(UserError, match="fir_conv takes filters"):
        long_conv(None, None, v, jnp.ones((6, 9)))
    with pytest.raises(UserError, match="fir_conv takes more taps"):
        short_conv(v, jnp.ones((6, 9)))
    with pytest.raises(UserError, match="needs a gpu, found cpu"):
        fir_conv(None, None, v, jnp.ones((2, 7)), implementation="triton")
    with pytest.raises(UserError, match="expected one of"):
        long_conv(None, None, v, jnp.ones((6, 10)), implementation="cuda")
