"""Rows whose tokens lie on several devices: one device's values and gradients, and what is sent, counted.

Every kind of mixer of the battery (test_mixers.py) takes part; the oracle: its operator's reference form on one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from test_mixers import MIXERS, D, noisy_params

from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.block import Block
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.published_lolcats import PublishedLinearAttention
from lcx.mlps.gated import GatedMlp
from lcx.model import Decoder, Stage
from lcx.ops import attention_shards, linear_attention, shards
from lcx.ops.cross_entropy import cross_entropy
from lcx.optim import AdamW
from lcx.rope import Rope
from lcx.training import statements
from lcx.training import step as train_step

MESHES = {
    "context8": {"fsdp": 1, "context": 8},
    "fsdp2_context4": {"fsdp": 2, "context": 4},
    "fsdp2_context2_tensor2": {"fsdp": 2, "context": 2, "tensor": 2},
}
DYNAMIC = Rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16)
MORE = {
    "attention_window_halo": Attention(4, 2, 8, window=17, over_context="halo"),  # longer than a part of 8
    "attention_window_gather": Attention(4, 2, 8, window=17, over_context="gather"),
    "attention_dynamic": Attention(8, 2, 4, rope=DYNAMIC),  # kv heads are repeated for 8 devices
    "attention_sinks_heads": Attention(8, 2, 4, sinks=True, softcap=2.0, over_context="heads"),
    "attention_sinks_gather": Attention(4, 2, 8, sinks=True, over_context="gather"),
    "attention_sinks_halo": Attention(4, 2, 8, sinks=True, softcap=2.0, window=17, over_context="halo"),
    "attention_gather": Attention(4, 2, 8, over_context="gather"),
    "attention_ring": Attention(4, 2, 8, over_context="ring"),
    "attention_ring_window": Attention(4, 2, 8, window=17, over_context="ring"),
    "attention_ring_all": Attention(4, 2, 8, rope=DYNAMIC, sinks=True, softcap=2.0, over_context="ring"),
}
MORE |= {  # the battery's has relu, where denominators next to 0 make gradients differ by 1e-4 on one device as well
    "linear": LinearAttention(4, 2, 8, window=None, feature_map="pos_elu", feature_dim=6, feature_bias=True)
}
ALL = MIXERS | MORE
# Left out: other settings of rows above that reach the same operators and send the same. Of the battery's variants only
# two_mamba_linear_relu differs here: its convolution of one token sends no halo.
SAME = ("attention_one_kv_head", "attention_bias_qk_norm_partial", "attention_gather", "mamba2_one_head")
SAME += ("two_mamba_square_output_norm",)
PAIRS = [
    (name, list(MESHES)[i % 3]) for i, name in enumerate(ALL) if name not in SAME
]  # every kind of mixer comes in several rows

T = 57  # on 8 devices the last part holds one token, on 4 and 2 it is not full either
# A document ends on a border (24 on 8 devices), another lies within a part, the next crosses several.
LENGTHS = {1: 24, 2: 3, 3: 22, 0: 8}
SEGMENTS = np.array([[1] * T, np.repeat([*LENGTHS], [*LENGTHS.values()])], np.int32)
POSITIONS = np.array([range(T), [i for n in LENGTHS.values() for i in range(n)]], np.int32)
X = np.random.default_rng(0).normal(size=(2, T, D)).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Several to a part. The rounding error of the decay's gradient grows with the chunk, to 3e-5 with 64 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "CHUNK", 8)
        yield


@functools.partial(jax.jit, static_argnums=0)
def run(mixer, params, x):
    """(outputs of the tokens that are no padding, gradients of a loss on all of them by the parameters and by x)."""
    segments = jnp.asarray(SEGMENTS)

    def loss(params, x):
        packed = {"positions": jnp.asarray(POSITIONS), "segment_ids": segments}
        y = jnp.where(segments[..., None] != 0, mixer.apply({"params": params}, x, **packed)[0], 0)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, grads


@functools.cache
def expected(name):
    mixer = ALL[name]
    return run(mixer.clone(implementation="reference", parent=None), noisy_params(mixer), X)


def build(**sizes):
    count = int(np.prod([*sizes.values()]))
    return sharding.make_mesh(**sizes, devices=jax.devices()[:count])


def assert_close(found, wanted):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_values_and_gradients_are_those_of_one_device(name, mesh):
    """Packed, with a length that divides over none of the meshes; a document changed changes no bit of another."""
    params = noisy_params(ALL[name])
    with jax.set_mesh(build(**MESHES[mesh])):
        found = run(ALL[name], params, X)
        second = np.broadcast_to(SEGMENTS[..., None] == 2, X.shape)
        y, (_, dx) = run(ALL[name], params, np.where(second, X + 1, X))
    assert_close(found, expected(name))
    for whole, changed in ((found[0], y), (found[1][1], dx)):
        np.testing.assert_array_equal(np.where(second, 0, changed), np.where(second, 0, whole))
        assert np.abs(np.asarray(changed - whole)[second]).max() > 1e-3


def test_many_devices_take_steps_of_a_prefix(monkeypatch):
    """More devices than shards.GATHERED, of which there are not enough here."""
    name = "mamba2"
    monkeypatch.setattr(shards, "GATHERED", 2)
    jax.clear_caches()  # parts that were traced for this mesh by another test gather
    jitted = jax.jit(run.__wrapped__, static_argnums=0)
    with jax.set_mesh(build(context=8, fsdp=1)):
        compiled = jitted.lower(ALL[name], noisy_params(ALL[name]), X).compile()
        assert_close(compiled(noisy_params(ALL[name]), X), expected(name))
    kinds = {c.kind for c in collectives(compiled.as_text())}
    assert "collective-permute" in kinds and "reduce-scatter" not in kinds  # the gradient of a gathered state


# --- what is sent

P, L = 4, 44  # devices, tokens of a part: of the row, a window of 17 is less than a tenth
COUNTED = {  # name -> numbers that a device receives per row, forward, as the operators' docstrings count them
    "mamba2": (P - 1) * 4 * (16 * 8 + 1) + 3 * (4 * 8 + 2 * 2 * 16),
    "linear": (P - 1) * 4 * (6 * 8 + 6),
    "linear_terraced": (P - 1) * 4 * (12 * 8 + 12) + 32 * (2 * 8 + 2 * 8 + 4 * 12),
    "two_mamba": (P - 1) * 2 * (256 * 17 + 1) + 3 * 2 * 16,
    "hyena_se": 6 * D + 2 * 3 * D,
    "hyena_mr": 3 * L * D + 2 * 3 * D,  # 127 earlier inputs: all earlier parts
    "hyena_li": (P - 1) * 2 * 16 * D + 2 * 3 * D,  # of one row
    "attention_window": 2 * 16 * 4 * 8,
    "attention": (2 * 4 + 2 * 4) * 8 * L * (P - 1) // P,
    "attention_window_gather": 2 * 2 * 8 * L * (P - 1),
    "attention_gather": 2 * 2 * 8 * L * (P - 1) + 4 * 8 * L,
    "attention_ring": 2 * 16 * L * (P - 1) + (4 + 2) * 16 * L // 2,
    "attention_ring_window": 2 * 16 * L,  # 17 keys lie in this part and the one before
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_an_operator_sends_is_what_its_docstring_says(name):
    """One row without segment ids; the values are those of one device."""
    mixer, x = ALL[name], np.resize(X, (1, P * L, D))
    params = noisy_params(mixer)

    @jax.jit
    def forward(params, x):
        x = sharding.constrain(x, None, "context", None)
        y = mixer.apply({"params": params}, x)[0]
        return sharding.constrain(y, None, "context", None)

    with jax.set_mesh(build(context=P, fsdp=1)):
        compiled = forward.lower(params, x).compile()
        y = compiled(params, x)
    assert_close(y, forward(params, x))
    assert received(compiled.as_text()) == COUNTED[name]


def received(text):
    """Numbers that a device receives; a collective in a loop is a ring's, of P - 1 steps."""
    total = 0.0
    for c in collectives(text):
        if c.floating and c.kind != "all-reduce":
            times = P - 1 if c.loop else 1
            total += times * c.elements * (1 if c.kind == "collective-permute" else (P - 1) / P)
    return total


RECURRENT = (
    Block(Mamba2(2, 8, 4), GatedMlp(24)),
    Block(LinearAttention(2, 2, 8, window=4, feature_dim=6), None),
    Block(HyenaLI(num_channels=16, num_modes=4), None),
)


def test_nothing_as_long_as_a_row_moves_in_a_training_step():
    """Every size that has to do with T is a multiple of 37, and no other size is."""
    L, B, mesh = 37, 4, build(fsdp=2, context=4)
    model = Decoder(64, 16, (Stage(RECURRENT, 2),), 4 * L)
    with jax.set_mesh(mesh):
        weights = {"params": model_lib.abstract_params(model, mesh=mesh)}
        optimizer = AdamW(learning_rate=1e-2, warmup_steps=0)
        transformation = optimizer.build(train_step.moving(weights), 9)
        abstract = train_step.abstract_state(weights, transformation, mesh)
        step = train_step.make_step(
            model, transformation, objectives.next_token, optimizer.learning_rates(9), accumulation=1, abstract=abstract
        )  # fmt: skip
        where = sharding.batch_sharding(mesh)
        names = ("tokens", "labels", "segment_ids", "positions")
        batch = {name: jax.ShapeDtypeStruct((B, 4 * L), jnp.int32, sharding=where) for name in names}
        batch["loss_weights"] = jax.ShapeDtypeStruct((B, 4 * L), jnp.float32, sharding=where)
        text = step.lower(abstract, batch, np.int32(0)).compile().as_text()
    found = [c for c in collectives(text) if c.devices > 1]
    assert {"all-gather", "collective-permute", "all-reduce"} <= {c.kind for c in found}
    assert not [c for c in found for shape in c.shapes if np.prod(shape, dtype=int) % L == 0]


# --- losses, choices


def test_the_loss_of_rows_that_do_not_divide():
    labels, weights = np.arange(2 * T).reshape(2, T) % 61, (SEGMENTS != 0).astype(np.float32)
    head = np.random.default_rng(1).normal(size=(64, D)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(x, head, implementation):
        def loss(x, head):
            return cross_entropy(
                x, head, jnp.asarray(labels), jnp.asarray(weights), implementation=implementation
            )

        return jax.value_and_grad(loss, (0, 1))(x, head)

    with jax.set_mesh(build(context=8, fsdp=1)):
        found = gradient(X, head, None)
    assert_close(found, gradient(X, head, "reference"))


def test_the_method_of_attention_is_chosen_by_a_rule():
    sizes = {"devices": 16, "tokens": 64, "heads": 32, "kv_heads": 8, "kv_width": 16}

    def choose(method, **changed):
        return attention_shards.choose(method, **sizes | {"window": None} | changed)

    assert choose(None, window=65) == "halo"  # reaches one part back
    assert choose(None, window=66) == "heads"
    assert choose(None, window=65, devices=4) == "heads"  # a fourth of the row, of which the first device has less work
    assert choose(None) == "heads"
    assert choose(None, heads=40) == choose(None, heads=48, kv_heads=3) == "gather"
    assert choose("gather", window=17) == "gather"
    for method, found in (("rings", "expected one of 'halo', 'heads', 'gather', 'ring'"), ("halo", "a window")):
        with pytest.raises(UserError, match=found):
            choose(method)


def test_a_run_says_what_is_sent():
    """In words, once for each kind, and of a mixer that says nothing that it gathers."""
    mixers = (ALL["mamba2"], ALL["linear_terraced"], ALL["hyena_li"], ALL["attention"], ALL["two_mamba_exp"])
    published = PublishedLinearAttention(4, 2, 8)
    blocks = tuple(Block(mixer, None) for mixer in (*mixers, published))
    model = Decoder(64, D, (Stage(blocks, 2),), T)
    (found,) = statements._context(model, build(fsdp=1, context=8), T)
    assert found == (
        "context: every row over 8 devices; Mamba2 sends states and a halo of 3 tokens; "
        "LinearAttention sends states and a halo of 32 keys and values; "
        "HyenaLI sends a halo of 2 tokens and the states of its modes; Attention sends keys and values, gathered; "
        "TwoMamba sends keys and values, gathered and a halo of 1 token; LinearAttention sends whole rows, gathered"
    )
    assert not [*statements._context(model, build(fsdp=8, context=1), T)]
