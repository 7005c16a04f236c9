"""Generation: against the full forward pass, transformers' generate(), and a published text."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import lcx
from lcx import model as model_lib
from lcx import sampler
from lcx.errors import UserError
from lcx.ops import sampling
from lcx.rope import Rope

V, WINDOW = 61, 32
PROMPTS = [[5, 9, 3, 17, 40, 2, 8], [11], [7, 7, 30, 21, 4, 55, 12, 60, 1, 33, 20, 19]]
LONGROPE = dict(short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.5, 4.0, 6.0], factor=4.0)
STATIC = {
    "default": Rope(),
    "linear": Rope(rope_type="linear", factor=4),
    "ntk": Rope(rope_type="ntk", factor=4),
    "yarn": Rope(rope_type="yarn", factor=4, original_max_position_embeddings=WINDOW),
    "llama3": Rope(
        rope_type="llama3",
        factor=8,
        low_freq_factor=1,
        high_freq_factor=4,
        original_max_position_embeddings=WINDOW,
    ),
    "proportional": Rope(rope_type="proportional", partial_rotary_factor=0.5),
    "partial": Rope(partial_rotary_factor=0.5),
}
BY_LENGTH = {
    "dynamic": Rope(rope_type="dynamic", factor=4, original_max_position_embeddings=WINDOW),
    "longrope": Rope(rope_type="longrope", original_max_position_embeddings=WINDOW, **LONGROPE),
}


def tiny(rope=Rope(), **changes):  # noqa: B008 (frozen)
    model, params = _tiny(**changes)
    return model_lib.map_mixers(model, lambda mixer: mixer.clone(rope=rope, parent=None)), params


@functools.cache
def _tiny(**changes):
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
    model = model_lib.llama(**sizes | dict(max_position_embeddings=4 * WINDOW) | changes)
    params = model_lib.init_params(model, jax.random.key(0))
    return model, jax.tree.map(lambda x: x * (4 if x.ndim > 2 else 1), params)  # so that positions matter


def likeliest(model, params, prompts, out):
    """The definition of greedy decoding: at each step, the likeliest token after the full forward pass of the text."""
    texts = [[*prompt, *row] for prompt, row in zip(prompts, np.asarray(out).tolist(), strict=True)]
    padded = np.array([text + [0] * (max(map(len, texts)) - len(text)) for text in texts])  # causal: no effect
    best = np.argmax(lcx.logits(model, params, padded), axis=-1)
    return [row[len(p) - 1 : len(text) - 1].tolist() for row, p, text in zip(best, prompts, texts, strict=True)]


def fixed_length(model, n):
    """The same model with the frequencies that its RoPE has at length n, whatever the length of the text."""

    def fixed(mixer):
        def frequencies(rope, head_dim, length):
            return mixer.rope.frequencies(head_dim, n)

        return mixer.clone(rope=Rope(rope_type=frequencies), parent=None)

    return model_lib.map_mixers(model, fixed)


# ---------------------------------------------------------------------------------------------- cached decode


def test_cached_decode_is_the_full_forward_pass():
    model, params = tiny()
    (block,) = model.stages[0].pattern
    blocks = [block.clone(mixer=block.mixer.clone(rope=rope, parent=None), parent=None) for rope in STATIC.values()]
    model = model.clone(stages=(model_lib.Stage(tuple(blocks)),), parent=None)  # a layer of every type
    layers = params["stages_0"]["block_0"]
    layers = {f"block_{i}": jax.tree.map(lambda x, i=i: x[i % 2][None] / (1 + i), layers) for i in range(len(blocks))}
    params = {**params, "stages_0": layers}
    out = lcx.generate(model, params, PROMPTS, max_new_tokens=40)
    assert out.shape == (3, 40) and out.dtype == np.int32
    assert out.tolist() == likeliest(model, params, PROMPTS, out)
    assert len({tuple(row) for row in out}) == 3 and len(set(out.ravel().tolist())) > 10  # a test that can fail


@pytest.mark.parametrize("name", BY_LENGTH)
def test_exact_rule_is_the_full_forward_pass_at_one_length(name):
    """A prompt inside the original window, a text that ends beyond it: scaled from the first token on."""
    model, params = tiny(BY_LENGTH[name])
    out = lcx.generate(model, params, PROMPTS, max_new_tokens=40)
    n = len(PROMPTS[2]) + 40
    assert out.tolist() == likeliest(fixed_length(model, n), params, PROMPTS, out)
    assert out.tolist() != likeliest(fixed_length(model, WINDOW), params, PROMPTS, out)


def test_sliding_windows_decode_as_the_full_forward_pass():
    model, params = tiny(layer_windows=(5, None), qk_norm=True, qkv_bias=True)
    out = lcx.generate(model, params, PROMPTS, max_new_tokens=24)
    assert out.tolist() == likeliest(model, params, PROMPTS, out)
    wide = model_lib.map_mixers(model, lambda mixer: mixer.clone(window=None, parent=None))
    assert out.tolist() != likeliest(wide, params, PROMPTS, out)


def test_ragged_batch_is_each_row_alone():
    model, params = tiny()
    settings = dict(max_new_tokens=20, temperature=1.3, top_p=0.9, seed=3)  # greedy rows are tested above
    together = lcx.generate(model, params, PROMPTS, **settings)
    first = lcx.generate(model, params, PROMPTS[:1], **settings)
    assert together[:1].tolist() == first.tolist()
    others = [PROMPTS[0], [60] * 40, [1, 2]]  # neighbours, their lengths and the padding change
    assert together[:1].tolist() == lcx.generate(model, params, others, **settings)[:1].tolist()


def test_array_prompts_and_lists_are_the_same():
    model, params = tiny()
    array = np.array([[5, 9, 3], [1, 2, 4]], np.uint8)
    expected = lcx.generate(model, params, array.tolist(), max_new_tokens=5)
    for tokens in (array, jnp.asarray(array), [row for row in array]):
        assert np.array_equal(lcx.generate(model, params, tokens, max_new_tokens=5), expected)


def read(model, params, rows, *, piece, monkeypatch, trace="exact"):
    """(logits after the prompts, cache) with the prompts cut into pieces of this size."""
    monkeypatch.setattr(sampler, "_PIECE_TOKENS", piece * len(rows))
    rows = [np.array(row, np.int32) for row in rows]
    job = sampler._Job(model, {"params": params}, rows, 8, {}, np.zeros(0, np.int32), trace)
    return job.read(rows, 8)


@pytest.mark.parametrize("rope,trace", [("dynamic", "exact"), ("dynamic", "hf"), ("longrope", "hf")])
def test_prefill_in_pieces_is_one(rope, trace, monkeypatch):
    model, params = tiny(BY_LENGTH[rope], num_layers=1, layer_windows=(40,))
    prompts = [np.arange(100) % V, np.arange(33) % 7 + 1, [4]]
    one, _ = read(model, params, prompts, piece=1024, monkeypatch=monkeypatch, trace=trace)
    pieces, cache = read(model, params, prompts, piece=32, monkeypatch=monkeypatch, trace=trace)
    np.testing.assert_allclose(pieces, one, atol=2e-5)
    assert int(cache["stages_0"]["block_0"]["index"][0]) == 128  # 4 pieces of 32
    n = 108 if trace == "exact" else 100
    padded = np.array([[*prompt, *[0] * (100 - len(prompt))] for prompt in prompts])
    full = lcx.logits(fixed_length(model, n), params, padded)
    for logits, row, prompt in zip(pieces, full, prompts, strict=True):
        np.testing.assert_allclose(logits, row[len(prompt) - 1], atol=2e-5)


def test_pieces_are_bounded_and_waste_little():
    for batch_size, width in ((1, 5), (1, 50), (1, 4097), (3, 30_000), (64, 4096), (1000, 100)):
        first, *others = sampler._pieces(batch_size, width)
        most = max(first, *others, 0)
        assert len({*others}) <= 1 and first % 32 == 0 and (most * batch_size <= 4096 or most == 32)
        assert 0 <= sum((first, *others)) - width < first / 3 + 32
    for size in range(1, 20_000):
        bucket = sampler._bucket(size)
        assert size <= bucket <= max(32, size * (1.5 if size < 512 else 1.25 if size < 4096 else 1.13)) + 32
    for low, high, most in ((64, 512, 6), (512, 4096, 12), (4096, 65536, 32)):  # two, four, eight in an octave
        assert len({sampler._bucket(size) for size in range(low + 1, high + 1)}) == most


def compiled(calls):
    """How many programs these calls compile."""
    names = []

    def listen(event, _, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(more)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for call in calls:
            call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(names)


def test_lengths_in_one_bucket_share_their_programs():
    """Reading, the first token, decoding: three programs for all calls of a bucket, none for a second call."""
    model, params = tiny(num_layers=1, hidden_size=16)
    model = model.clone(max_position_embeddings=4096, parent=None)  # nobody else's program

    def call(length, new, run=lcx.generate):
        return lambda: run(model, params, [[*range(1, length + 1)]], max_new_tokens=new)

    def streamed(*args, **kwargs):
        return list(sampler.stream(*args, **kwargs))

    assert compiled([call(3, 20)]) == 3
    others = [call(1, 2), call(30, 17), call(32, 32), call(9, 31, streamed), call(5, 1)]
    assert compiled(others) == 0
    assert compiled([call(33, 20)]) == 2  # the next bucket of prompts: reading, and decoding with more slots


# ---------------------------------------------------------------------------------------------- transformers


def hf_weights(hf_model):
    """The state dict of a transformers Llama or Phi-3 as an lcx tree, written out by hand."""
    config, state = hf_model.config, {k: v.numpy() for k, v in hf_model.state_dict().items()}
    N, K, D = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    H = config.hidden_size // N

    def layer(i):
        get = lambda name: state[f"model.layers.{i}.{name}.weight"]  # noqa: E731
        if f"model.layers.{i}.mlp.gate_up_proj.weight" in state:
            q, k, v = np.split(get("self_attn.qkv_proj"), [N * H, (N + K) * H])
            gate, up = np.split(get("mlp.gate_up_proj"), 2)
        else:
            q, k, v = (get(f"self_attn.{x}_proj") for x in "qkv")
            gate, up = get("mlp.gate_proj"), get("mlp.up_proj")
        heads = {"q": q.T.reshape(D, N, H), "k": k.T.reshape(D, K, H), "v": v.T.reshape(D, K, H)}
        heads["o"] = get("self_attn.o_proj").T.reshape(N, H, D)
        widths = {"gate": gate.T, "up": up.T, "down": get("mlp.down_proj").T}
        return {
            "mixer_norm": {"scale": get("input_layernorm")},
            "mlp_norm": {"scale": get("post_attention_layernorm")},
            "mixer": {f"{k}_proj": {"kernel": x} for k, x in heads.items()},
            "mlp": {f"{k}_proj": {"kernel": x} for k, x in widths.items()},
        }

    layers = [layer(i) for i in range(config.num_hidden_layers)]
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "final_norm": {"scale": state["model.norm.weight"]},
        "lm_head": {"embedding": state["lm_head.weight"]},
        "stages_0": {"block_0": jax.tree.map(lambda *xs: np.stack(xs), *layers)},
    }


def hf_pair(name):
    """(transformers model, lcx model, params): tiny, random, with RoPE that changes at 32 tokens."""
    sizes = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    rope = {key: value for key, value in LONGROPE.items() if key != "factor"}
    rope |= {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": WINDOW}
    if name == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        config = transformers.LlamaConfig(max_position_embeddings=WINDOW, rope_parameters=rope, **sizes)
    elif name == "longrope":
        config = transformers.LlamaConfig(max_position_embeddings=4 * WINDOW, rope_parameters=rope, **sizes)
    else:
        lengths = dict(max_position_embeddings=4 * WINDOW, original_max_position_embeddings=WINDOW)
        config = transformers.Phi3Config(rope_parameters=rope, **lengths, **sizes)
    torch.manual_seed(1)
    hf_model = transformers.AutoModelForCausalLM.from_config(config).eval()
    kind = "phi3" if name == "phi3" else "llama"
    model, _ = tiny(BY_LENGTH["dynamic" if name == "dynamic" else "longrope"], norm_eps=config.rms_norm_eps)
    return hf_model, model.clone(model_type=kind, parent=None), hf_weights(hf_model)


def hf_generate(hf_model, prompts, count):
    """(tokens [B, count], logits [B, count, V]) of transformers' greedy cached decode of left-padded prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = hf_model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, width:].numpy(), torch.stack(out.logits, 1).numpy()


TRACED = [("dynamic", 12), ("dynamic", 40), ("longrope", 12), ("phi3", 12), ("phi3", 32), ("phi3", 40)]


@pytest.mark.parametrize("name,length", TRACED)
def test_hf_trace_is_the_cached_decode_of_transformers(name, length):
    hf_model, model, params = hf_pair(name)
    prompts = [np.random.default_rng(0).integers(0, V, n).tolist() for n in (length, length - 5)]
    tokens, logits = hf_generate(hf_model, prompts, 30)
    out = lcx.generate(model, params, prompts, max_new_tokens=30, rope_trace="hf")
    assert out.tolist() == tokens.tolist()
    if name == "phi3":  # reading again is decided between columns here, inside the loop there
        columns = sampler.stream(model, params, prompts, max_new_tokens=30, rope_trace="hf")
        assert np.stack(list(columns), 1).tolist() == tokens.tolist()
    if name != "phi3":  # logits at every step
        np.testing.assert_allclose(traced_logits(model, params, prompts, tokens), logits, atol=2e-4)
    if length == 12:  # the others have one rotation from the first token on, or nearly
        assert out.tolist() != lcx.generate(model, params, prompts, max_new_tokens=30).tolist()


def traced_logits(model, params, prompts, tokens):
    """Logits of the cached decode of these tokens, a step at a time."""
    rows, lengths = [np.array(p, np.int32) for p in prompts], np.array([len(p) for p in prompts], np.int32)
    job = sampler._Job(model, {"params": params}, rows, tokens.shape[1], {}, np.zeros(0, np.int32), "hf")
    last, cache = job.read(rows, tokens.shape[1])
    found = [last]
    for t, column in enumerate(tokens.T[:-1]):
        positions = (lengths + t)[:, None].astype(np.int32)
        new = column[:, None].astype(np.int32), positions, np.ones_like(positions), np.int32(positions.max() + 1)
        last, cache = sampler._append_jit(model, {"params": params}, cache, *new)
        found.append(last)
    return np.stack(found, 1)


def test_a_batch_of_phi3_reads_again_as_transformers_does():
    """Rows that all stop before the original window is full are not read again; the others are, at its end."""
    hf_model, model, params = hf_pair("phi3")
    prompts = [[3, 14, 15, 9, 2, 6], [5, 35]]
    tokens, _ = hf_generate(hf_model, prompts, 40)
    out = lcx.generate(model, params, prompts, max_new_tokens=40, rope_trace="hf")
    assert out.tolist() == tokens.tolist()
    stop = sorted({int(row[20]) for row in tokens})
    stopped = lcx.generate(model, params, prompts, max_new_tokens=40, rope_trace="hf", stop_tokens=stop)
    for row, expected in zip(stopped, tokens, strict=True):
        end = min(expected.tolist().index(s) for s in stop if s in expected)
        assert row[: end + 1].tolist() == expected[: end + 1].tolist() and set(row[end:]) == {row[end]}


# ---------------------------------------------------------------------------------------------- sampling


def numpy_nucleus(logits, top_p):
    """Which tokens TopPLogitsWarper keeps, from its definition, in float64."""
    kept = np.zeros(logits.shape, bool)
    for row, keep in zip(logits.astype(np.float64), kept, strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        total = 0.0
        for i in np.argsort(row, kind="stable"):
            total += p[i]
            keep[i] = total > 1 - top_p
        keep[np.argsort(row, kind="stable")[-1]] = True
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_nucleus_is_that_of_transformers(top_p):
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32) * [[0.1], [1], [2], [4], [8], [1]]
    logits = logits.astype(np.float32)
    logits[5] = 0.5  # all equal
    found = np.asarray(sampling.nucleus(jnp.asarray(logits), top_p))
    assert np.array_equal(np.isfinite(found)[:5], numpy_nucleus(logits, top_p)[:5])
    assert np.array_equal(found[np.isfinite(found)], logits[np.isfinite(found)])
    warper = transformers.TopPLogitsWarper(top_p)
    theirs = warper(None, torch.from_numpy(logits[:5])).numpy()
    assert np.array_equal(np.isfinite(found[:5]), np.isfinite(theirs))
    assert abs(np.isfinite(found[5]).sum() - max(1, math.ceil(top_p * 50 - 1e-6))) <= 1
    assert np.isfinite(found).any(axis=1).all()


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = lambda **kw: np.bincount(sampling.choose(jnp.tile(logits, (20_000, 1)), keys=keys, **kw), minlength=4) / 2e4  # noqa: E731
    np.testing.assert_allclose(draw(), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(draw(temperature=0.5), np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.015)
    np.testing.assert_allclose(draw(top_p=0.75), [0.625, 0.375, 0, 0], atol=0.015)
    assert draw(temperature=1e-9)[0] == 1


def test_every_step_and_row_draws_anew():
    model, params = tiny()
    params = {**params, "lm_head": {"embedding": jnp.zeros_like(params["lm_head"]["embedding"])}}  # uniform
    out = lcx.generate(model, params, [[1]] * 8, max_new_tokens=100, temperature=1.0)
    counts = np.bincount(out.ravel(), minlength=V)
    chi2 = float(((counts - 800 / V) ** 2 / (800 / V)).sum())
    assert chi2 < 120  # 60 degrees of freedom: exceeded once in 10^5
    assert max(np.unique(row, return_counts=True)[1].max() for row in [*out, *out.T]) <= 10


def test_seeds():
    model, params = tiny()
    draw = lambda seed, prompts=PROMPTS: lcx.generate(  # noqa: E731
        model, params, prompts, max_new_tokens=20, temperature=1.0, seed=seed
    ).tolist()
    assert draw(0) == draw(0) and draw(0) != draw(1)
    same = draw(0, [PROMPTS[0]] * 3)
    assert same[0] != same[1] != same[2]  # rows have keys of their own
    greedy = lcx.generate(model, params, PROMPTS, max_new_tokens=20)
    cold = lcx.generate(model, params, PROMPTS, max_new_tokens=20, temperature=1e-6, top_p=0.5, seed=9)
    assert cold.tolist() == greedy.tolist()


def test_temperature_and_top_p_do_not_compile_again():
    model, params = tiny()
    lcx.generate(model, params, PROMPTS, max_new_tokens=3, temperature=0.7, top_p=0.8)
    before = sampler._decode_jit._cache_size()
    lcx.generate(model, params, PROMPTS, max_new_tokens=4, temperature=0.9, top_p=0.3, seed=5)
    assert sampler._decode_jit._cache_size() == before


# ---------------------------------------------------------------------------------------------- stopping, streaming


def test_stop_tokens():
    model, params = tiny()
    free = lcx.generate(model, params, PROMPTS, max_new_tokens=24)
    stop = [int(free[0, 5]), int(free[1, 9])]
    ends = [min(row.index(s) for s in stop if s in row) if set(stop) & set(row) else 24 for row in free.tolist()]
    stopped = lcx.generate(model, params, PROMPTS, max_new_tokens=24, stop_tokens=stop)
    for row, expected, end in zip(stopped, free, ends, strict=True):
        assert row[: end + 1].tolist() == expected[: end + 1].tolist()
        assert end == 24 or (row[end:] == expected[end]).all()
    assert min(ends) < 24


def test_stream_is_generate():
    model, params = tiny()
    whole = lcx.generate(model, params, PROMPTS, max_new_tokens=24)
    columns = list(sampler.stream(model, params, PROMPTS, max_new_tokens=24))
    assert np.array_equal(np.stack(columns, 1), whole)
    every_last = sorted({int(row[6]) for row in whole})
    ends = [min(row.index(s) for s in every_last if s in row) for row in whole.tolist()]
    short = list(sampler.stream(model, params, PROMPTS, max_new_tokens=24, stop_tokens=every_last))
    assert len(short) == max(ends) + 1 < 24


def test_generate_ends_when_all_rows_have(monkeypatch):
    model, params = tiny()
    whole = lcx.generate(model, params, PROMPTS[:1], max_new_tokens=24)
    stop = [int(whole[0, 3])]
    job = sampler._job(model, params, PROMPTS[:1], 24, 0.0, 1.0, 0, stop, "exact", None)
    assert int(job.advance(job.start(), 24).step) == whole[0].tolist().index(stop[0]) + 1


def test_logits():
    model, params = tiny()
    tokens = np.array([[3, 1, 4, 1, 5], [4, 1, 5, 0, 0]])
    expected = model.apply({"params": params}, tokens)
    found = lcx.logits(model, params, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(lcx.logits(model, params, tokens.tolist()), expected, atol=1e-5)
    segments = dict(positions=np.array([[0, 1, 0, 1, 2]] * 2), segment_ids=np.array([[1, 1, 2, 2, 2]] * 2))
    packed = lcx.logits(model, params, tokens, **segments)
    np.testing.assert_allclose(packed[0, 2:], expected[1, :3], atol=1e-5)
    grad = jax.grad(lambda x: jnp.sum(lcx.logits(model, {**params, "lm_head": {"embedding": x}}, tokens)))
    assert bool(jnp.any(grad(params["lm_head"]["embedding"]) != 0))
    for bad, message in ((tokens + 60, "outside the model's vocabulary"), (tokens[0], "expected integers")):
        with pytest.raises(UserError, match=message):
            lcx.logits(model, params, bad)
    with pytest.raises(UserError, match=r"positions have shape \(1, 5\)"):
        lcx.logits(model, params, tokens, positions=np.zeros((1, 5), int))


def test_bfloat16_decodes_near_float32():
    model, params = tiny()
    half = model.clone(dtype="bfloat16", parent=None)
    rows = [np.array(PROMPTS[2], np.int32)]
    job = sampler._Job(half, {"params": params}, rows, 8, {}, np.zeros(0, np.int32), "exact")
    found, cache = job.read(rows, 8)
    assert cache["stages_0"]["block_0"]["k"].dtype == jnp.bfloat16
    full = np.asarray(lcx.logits(model, params, np.array([PROMPTS[2]]))[0, -1])
    assert np.abs(np.asarray(found[0], np.float32) - full).max() < 0.1 * np.abs(full).max()


# ---------------------------------------------------------------------------------------------- real weights


def test_stories_to_the_character(reference):
    """Greedy from BOS is the published text of llama2.c; its run stops at the next BOS, or after 256 steps."""
    folder = reference / "data/weights/stories260K"
    published = (folder / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    model, params = lcx.load(folder / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "hf/tokenizer.json"))
    out = lcx.generate(model, params, [[1]], max_new_tokens=256, stop_tokens=[1])
    assert tokenizer.decode(out[0], skip_special_tokens=True) == published


def test_babyllama_beyond_its_window(reference):
    """A cached decode at four times the window of real weights, by YaRN, against the full forward pass."""
    scaling = {"rope_type": "yarn", "factor": 4.0}
    model, params = lcx.load(reference / "data/weights/babyllama105/hf", rope_scaling=scaling)
    prompt = np.random.default_rng(0).integers(3, 105, 600).tolist()
    out = lcx.generate(model, params, [prompt], max_new_tokens=40)[0]
    logits = lcx.logits(model, params, np.array([prompt + out.tolist()]))[0, len(prompt) - 1 : -1]
    assert out.tolist() == np.argmax(logits, -1).tolist()
