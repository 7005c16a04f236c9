"""What generation refuses: prompts, settings, and texts beyond the model's window."""

import math

import numpy as np
import pytest
from test_sampler import V, tiny

import lcx
from lcx import extend, sampler
from lcx.errors import UserError


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(tokens=[[1], []]), "prompt 1 is empty"),
        (dict(tokens=[]), "no prompts"),
        (dict(tokens=[1, 2]), "pass a list of prompts"),
        (dict(tokens=np.zeros(3, int)), r"expected \[B, T\]"),
        (dict(tokens=[[1.5]]), "integer token ids"),
        (dict(tokens=[[3, V]]), f"token id {V} is outside .* 0 to {V - 1}"),
        (dict(tokens=[[3, -1]]), "token id -1 is outside"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(seed="x"), "seed is 'x'"),
        (dict(rope_trace="HF"), "rope_trace is 'HF', expected one of exact, hf"),
    ],
)
def test_bad_input(changes, message):
    model, params = tiny()
    arguments = dict(tokens=[[1, 2]], max_new_tokens=4) | changes
    for function in (sampler.generate, sampler.stream):  # a stream complains at once, not at its first column
        with pytest.raises(UserError, match=message) as caught:
            function(model, params, **arguments)
        assert "\n" not in str(caught.value)


def test_beyond_the_window(caplog):
    model, params = tiny(max_position_embeddings=16)
    lcx.generate(model, params, [[1, 2]], max_new_tokens=14)
    found = "a prompt of 2 and max_new_tokens 15 are 17 tokens together, more than the model's window of 16"
    with pytest.raises(UserError, match=f"{found} .*: lower max_new_tokens to 14, or .* context_length 17"):
        lcx.generate(model, params, [[1, 2]], max_new_tokens=15)
    with pytest.raises(UserError, match="shorten the prompt, or"):
        lcx.generate(model, params, [[1] * 16], max_new_tokens=1)
    longer = extend.extend_model(model, {"rope_type": "default"}, 17)
    assert lcx.generate(longer, params, [[1, 2]], max_new_tokens=15).shape == (1, 15)
    assert [sampler.default_new_tokens(model, length) for length in (2, 16)] == [14, 1]
    assert sampler.default_new_tokens(model.clone(max_position_embeddings=1000), 2) == 256
    assert not caplog.records
