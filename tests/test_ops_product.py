"""Products of bfloat16 matrices on a CPU against numpy in float64, wherever XLA could merge a transpose into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from lcx.llama import llama
from lcx.ops import dispatch
from lcx.ops.product import laid_out_transpose, product, wide
from lcx.remat import REMAT

pytestmark = pytest.mark.skipif(dispatch.platform() != "cpu", reason="the form for CPUs")
EXACT = 2.0**-8  # half the distance between neighbouring bfloat16 numbers, relative


@pytest.fixture(params=[True, False], ids=["instructions", "none"])
def bfloat16(request, monkeypatch):
    """A CPU with instructions for bfloat16, and one without."""
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: request.param)


def arrays():
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.normal(size=shape) for shape in ((96, 64), (64, 48), (96, 48)))
    return tuple(jnp.asarray(a, jnp.bfloat16) for a in (x, kernel, dy))


def close(found, *factors):
    expected = np.matmul(*(np.asarray(a, np.float64) for a in factors))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=EXACT, atol=1e-4)


def test_value_and_gradients(bfloat16):
    x, kernel, dy = arrays()
    y, pull = jax.vjp(product, x, kernel)
    dx, d_kernel = pull(dy)
    assert {a.dtype for a in (y, dx, d_kernel)} == {jnp.dtype(jnp.bfloat16)}
    close(y, x, kernel)
    close(dx, dy, kernel.T)
    close(d_kernel, x.T, dy)


def test_transposes_around_it(bfloat16):
    """A float32 master that is stored transposed: its gradient is widened and transposed where XLA may merge both."""
    x, kernel, dy = arrays()

    def f(stored):
        return jnp.sum(product(x, stored.T.astype(jnp.bfloat16)) * dy, dtype=jnp.float32)

    close(jax.jit(jax.grad(f))(kernel.T.astype(jnp.float32)).T, x.T, dy)
    close(jax.jit(lambda a, b: wide(a, b, 0).T + 1)(x, kernel).T - 1, x, kernel)

    def summed(a, b):
        return jax.lax.scan(lambda c, a: (c + wide(a, b, 0).T, None), jnp.zeros((48, 96)), a[None])[0]

    close(jax.jit(summed)(x, kernel).T, x, kernel)


def test_a_transpose_that_only_one_head_allows(monkeypatch):
    """The gradient of one head of values reaches their projection transposed, behind a conversion to bfloat16."""
    model = llama(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (1, 64)))
    params = model.init(jax.random.key(0), tokens)["params"]

    def gradients(instructions):
        monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: instructions)
        gradient = jax.grad(lambda params: jnp.mean(jnp.square(model.apply({"params": params}, tokens))))
        return jax.tree.leaves(jax.jit(gradient)(params))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(found, expected, atol=4 * EXACT * jnp.abs(expected).max())


def test_rematerialization_keeps_it_in_bfloat16(bfloat16, capsys):
    """As any product of a projection: with remat = 'dots' it is saved, not computed twice."""
    x, kernel, _ = arrays()

    def f(x, kernel):
        return jnp.sum(jnp.sin(product(jnp.sin(product(x, kernel)), kernel.T)).astype(jnp.float32))

    print_saved_residuals(jax.checkpoint(f, policy=REMAT["dots"]), x, kernel)
    saved = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert len(saved) == 2 and all(line.startswith("bf16[96,") for line in saved), saved


def test_the_left_factor_is_contracted_over_its_last_axis():
    """The form that XLA runs fast; a mere transpose would be merged into the product."""
    x, _, dy = arrays()
    text = jax.jit(lambda x, dy: wide(laid_out_transpose(x), dy, 0)).lower(x, dy).compile().as_text()
    (dot,) = [line for line in text.splitlines() if " dot(" in line]
    assert "f32[64,48]" in dot and "lhs_contracting_dims={1}" in dot, dot


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: x\nflags\t\t: fpu avx2 avx512_bf16 fsrm\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\nvmx flags\t: bf16\n", False),
        ("nothing", False),
    ],
)
def test_instructions_of_a_processor(monkeypatch, text, expected):
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: text)
    assert dispatch.multiplies_bfloat16.__wrapped__() is expected
