"""What the library asks of a mixer: the defaults of one with two methods alone, and an error for what does not fit."""

import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lcx import extend, mixers, parameters, sharding
from lcx import lora as lora_lib
from lcx.checkpoint import model_json
from lcx.errors import UserError
from lcx.linearize import Linearize
from lcx.llama import llama
from lcx.lora import LoRA
from lcx.mixers.attention import Attention
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.published_lolcats import PublishedLinearAttention
from lcx.model import Block, Decoder, Mlp, Stage
from lcx.rope import Rope


class Sum(nn.Module):
    """y_t is the sum of all x so far, projected: a mixer with the two methods that a mixer needs."""

    @nn.compact
    def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
        before = self.init_cache(x.shape[0], 0, x.dtype) if cache is None else cache
        sums = before["sum"][:, None] + jnp.cumsum(x, axis=1)
        return nn.Dense(x.shape[-1])(sums), None if cache is None else {"sum": sums[:, -1]}

    @nn.nowrap
    def init_cache(self, batch_size, length, dtype):
        return {"sum": jnp.zeros((batch_size, 16), dtype)}


class Bare(nn.Module):
    """Gives outputs alone."""

    def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
        return x


class Drifting(Sum):
    """Its state is wider than the one before."""

    def __call__(self, x, **arrays):
        return x, {"sum": jnp.zeros((x.shape[0], 16), jnp.bfloat16)}


class Asked(Sum):
    rope: Any = None
    whole_prompt: Any = False


def model(mixer, mlp=True):
    block = Block(mixer, Mlp(24, parent=None) if mlp else None, parent=None)
    return Decoder(11, 16, (Stage((block,), 2),), 32)


def trace(model, cached=True):
    def run(key):
        tokens = jnp.zeros((1, 3), jnp.int32)
        params = model.init(key, tokens)
        cache = model.init_cache(1, 8) if cached else None
        return model.apply(params, tokens, cache=cache, method="hidden")

    return jax.eval_shape(run, jax.random.key(0))


def test_two_methods_are_enough():
    plain = model(Sum(parent=None))
    _, cache = trace(plain)
    assert cache["stages_0"]["block_0"]["sum"].shape == (2, 1, 16)
    mixer = plain.stages[0].pattern[0].mixer
    assert (mixers.grows(mixer), mixers.whole_prompt(mixer), mixers.rotary(mixer)) == (False, False, None)
    assert mixers.kind(mixer) == "Sum" and not extend.rotaries(plain)


def test_what_a_mixer_does_not_say_is_an_error_and_no_zero():
    plain = model(Sum(parent=None))
    with pytest.raises(UserError, match=r"Sum does not define the cost of a token: .* macs_per_token\(seq_len\)"):
        parameters.flops_per_token(plain, 32)
    assert mixers.macs_per_token(None, 32) == 0
    said = lora_lib.statement(plain, LoRA(rank=2, targets="_proj").abstract(plain))
    assert "Mlp gate_proj 2" in said and said.endswith("none in Sum, which has no lcx.layers.Linear")
    with pytest.raises(UserError, match="made of lcx.layers.Linear, and the model has none"):
        LoRA().paths(model(Sum(parent=None), mlp=False))


class Experts(nn.Module):
    """The sum of several MLPs without their costs, and with that of one of them: as if a token saw one expert."""

    count: int
    macs: Any = None

    @nn.compact
    def __call__(self, x):
        return sum(Mlp(24, parent=None).clone(name=f"expert_{i}", parent=self)(x) for i in range(self.count))


class Routed(Experts):
    @nn.nowrap
    def macs_per_token(self, hidden_size):
        return 3 * 24 * hidden_size if self.macs is None else self.macs


def with_mlp(mlp):
    return Decoder(11, 16, (Stage((Block(Attention(2, 1, 8, parent=None), mlp, parent=None),), 2),), 32)


def test_the_cost_of_a_mixture_of_experts_is_what_it_says():
    one = parameters.flops_per_token(with_mlp(Experts(1, parent=None)), 32)
    assert parameters.flops_per_token(with_mlp(Experts(4, parent=None)), 32) == one + 6 * 2 * 3 * (3 * 24 * 16)
    assert parameters.flops_per_token(with_mlp(Routed(4, parent=None)), 32) == one


WRONG = {
    "no cache": (lambda: trace(model(Bare(parent=None)), cached=False), r"Bare.__call__ returned .* \(y, cache\)"),
    "no state": (lambda: model(Bare(parent=None)).init_cache(1, 8), "Bare has no method init_cache"),
    "another state": (lambda: trace(model(Drifting(parent=None))), r"whose \['sum'\] is bfloat16 .*expected float32"),
    "a rope": (lambda: extend.rotaries(model(Asked(rope=True, parent=None))), "Asked.rope is True, expected a lcx"),
    "a method": (lambda: mixers.whole_prompt(Asked(whole_prompt=len)), "whole_prompt is a builtin_function_or_method"),
    "a cost": (
        lambda: parameters.flops_per_token(with_mlp(Routed(2, "many", parent=None)), 32),
        "Routed.macs_per_token returned 'many', expected the multiply-adds per token",
    ),
    "an axis": (lambda: sharding.spec(("width",), (4,), MESH), "names its axis 'width', expected one of layers, vocab"),
}  # fmt: skip
MESH = jax.sharding.AbstractMesh((1, 1, 1, 1), sharding.AXES)


@pytest.mark.parametrize("call, says", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_in_one_line(call, says):
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rotary_embeddings_are_found_and_replaced():
    yarn = Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    mixer = Attention(4, 2, 8)
    assert mixers.rotary(mixer) == (Rope(), 8) and mixers.rotary(Attention(4, 2, 8, rope=None)) is None
    assert mixers.with_rope(mixer, yarn).rope == yarn
    cache = mixers.with_rope_length(mixer.init_cache(1, 4, jnp.float32), 9)
    assert cache["rope_length"] == 9 and cache["index"] == 0


def test_without_a_rope_positions_change_nothing():
    mixer = Attention(4, 2, 8, rope=None)
    x = jax.random.normal(jax.random.key(0), (1, 5, 16))
    run = jax.jit(lambda params, positions: mixer.apply(params, x, positions=positions)[0])
    params = nn.meta.unbox(jax.jit(mixer.init)(jax.random.key(1), x))
    assert (run(params, jnp.arange(5)[None]) == run(params, 7 + jnp.arange(5)[None])).all()


def test_published_quirks_still_name_the_published_mixer():
    """In code, in a stored model, in Linearize: the same parameters, the same state, the same answers."""
    new, old = (kind(4, 2, 8, feature_dim=6, **more) for kind, more in (
        (PublishedLinearAttention, {}), (LinearAttention, {"published_quirks": True})))  # fmt: skip
    x = jnp.zeros((1, 3, 16))
    shapes = [jax.eval_shape(m.init, jax.random.key(0), x) for m in (new, old)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    states = [jax.eval_shape(lambda m=m: m.init_cache(1, 4, jnp.float32)) for m in (new, old)]
    assert states[0] == states[1]
    assert all(mixers.whole_prompt(m) and mixers.kind(m) == "LinearAttention" for m in (new, old))
    stored = {"class": "lcx.mixers.linear_attention:LinearAttention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
              "feature_dim": 6, "published_quirks": True}  # fmt: skip
    assert model_json.from_json(stored) == old and model_json.to_json(old) == stored
    small = llama(
        vocab_size=11, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    (stage,) = Linearize(feature_dim=6, published_quirks=True).model(small).stages
    assert isinstance(stage.pattern[0].mixer, PublishedLinearAttention)


def test_nobody_else_asks_a_mixer():
    root = pathlib.Path(mixers.__file__).parent.parent
    asks = re.compile(r"""(getattr|hasattr)\([\w.]*(mixer|\bm), ["'](rope|append_cache|whole_prompt|macs)""")
    found = [path for path in root.glob("**/*.py") if asks.search(path.read_text())]
    assert found == [root / "mixers" / "__init__.py"]
