"""LoRA: the collection against merged weights, values and gradients; adapters against the peft package."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft as peft_package
import pytest
import torch
import transformers
from jax.sharding import AbstractMesh

import lcx
from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx import sharding
from lcx.checkpoint import Checkpointer, model_json
from lcx.convert.peft import adapter as peft
from lcx.errors import UserError
from lcx.lora import LoRA
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.two_mamba import TwoMamba

V = 61
TOKENS = np.random.default_rng(0).integers(0, V, (2, 19))
ALL = "_proj$"


def make(**changes):
    """A model with biases and grouped heads: (model, params)."""
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
    model = model_lib.llama(**sizes | dict(max_position_embeddings=64, qkv_bias=True, mlp_bias=True) | changes)
    return model, model_lib.init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def tiny():
    return make()


def drawn(lora, seed=1):
    """The collection with a random b in place of zero, and a scale of its own for every layer."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def leaf(path, x):
        name = path[-1].key
        if name == "scale":
            return x * jnp.arange(1, 1 + x.size)
        return jax.random.normal(next(keys), x.shape) * 0.2 if name == "b" else x

    return jax.tree_util.tree_map_with_path(leaf, lora)


def logits(model, params, lora=None):
    collections = {"params": params} if lora is None else {"params": params, "lora": lora}
    return np.asarray(jax.jit(model.apply)(collections, TOKENS))


# ---------------------------------------------------------------------------------------------- the collection


def test_the_collection_is_the_merged_weights():
    """Under scan, in two stages of which one has pairs on other projections than the other."""
    model, params = make(num_layers=3, layer_windows=(None, None, 7))
    assert len(model.stages) == 2
    targets = "stages_0.*(q|k|v|o)_proj|stages_1.*(o|gate|up|down)_proj"
    lora = drawn(LoRA(rank=3, alpha=6, targets=targets).init(jax.random.key(2), model))
    assert set(lora["stages_0"]["block_0"]) == {"mixer"} and set(lora["stages_1"]["block_0"]["mixer"]) == {"o_proj"}
    found, base = logits(model, params, lora), logits(model, params)
    np.testing.assert_allclose(found, logits(model, merge(params, lora)), atol=2e-5)
    assert np.abs(found - base).max() > 0.05


def test_merge_is_the_formula(tiny):
    model, params = tiny
    lora = drawn(LoRA(rank=3, alpha=6, targets=ALL).init(jax.random.key(2), model))
    merged = merge(params, lora)
    formulas = {"o_proj": "lnhr,lrd,l->lnhd", "mlp": "ldr,lrf,l->ldf", "qkv": "ldr,lrnh,l->ldnh"}
    for part, names in (("mixer", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            path = "stages_0", "block_0", part, f"{name}_proj"
            ours, before, pair = (get(tree, path) for tree in (merged, params, lora))
            formula = formulas["mlp" if part == "mlp" else "o_proj" if name == "o" else "qkv"]
            arrays = [np.asarray(pair[leaf], np.float64) for leaf in ("a", "b", "scale")]
            expected = before["kernel"] + np.einsum(formula, *arrays)
            np.testing.assert_allclose(ours["kernel"], expected, atol=1e-6)
            assert ours.keys() == before.keys()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half = merge(rounded, lora)  # rounded once, after the sum
    sums = merge(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), lora)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y.astype(jnp.bfloat16)).all()), half, sums))


merge = jax.jit(lora_lib.merge)


def get(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_gradients_are_those_through_the_merged_weights(tiny):
    model, params = tiny
    model = model.clone(remat="full", parent=None)
    lora = drawn(LoRA(rank=2, targets=ALL).init(jax.random.key(2), model))

    def loss(logits):
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3])

    ours = jax.jit(jax.grad(lambda x: loss(model.apply({"params": params, "lora": x}, TOKENS))))(lora)
    through_merge = jax.jit(jax.grad(lambda x: loss(model.apply({"params": lora_lib.merge(params, x)}, TOKENS))))
    merged = through_merge(lora)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(merged), strict=True):
        if path[-1].key == "scale":
            assert not x.any()  # a setting, not a parameter
        else:
            assert np.abs(y).max() > 1e-6
            np.testing.assert_allclose(x, y, atol=1e-6 + 1e-4 * np.abs(y).max())


def test_generation_takes_the_collection(tiny):
    model, params = tiny
    lora = drawn(LoRA(targets=ALL, alpha=64).init(jax.random.key(2), model))
    with_pairs = lcx.generate(model, params, TOKENS[:, :5], max_new_tokens=8, lora=lora)
    merged = lcx.generate(model, merge(params, lora), TOKENS[:, :5], max_new_tokens=8)
    assert with_pairs.tolist() == merged.tolist()
    assert with_pairs.tolist() != lcx.generate(model, params, TOKENS[:, :5], max_new_tokens=8).tolist()


def test_init(tiny):
    model, params = tiny
    lora = LoRA(rank=16, alpha=24, targets=ALL).init(jax.random.key(0), model)
    assert jax.tree.map(lambda x: x.shape, lora["stages_0"]["block_0"]["mixer"]["o_proj"]) == {
        "a": (2, 4, 8, 16),
        "b": (2, 16, 32),
        "scale": (2,),
    }
    torch.manual_seed(0)
    for part, name in (("mixer", "q_proj"), ("mixer", "o_proj"), ("mlp", "down_proj")):
        pair = lora["stages_0"]["block_0"][part][name]
        assert not pair["b"].any() and pair["scale"].tolist() == [1.5, 1.5]
        inputs = pair["a"][0].size // 16
        theirs = torch.empty(16, inputs)
        torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)  # how PEFT draws lora_A
        assert abs(float(jnp.abs(pair["a"]).max()) / float(theirs.abs().max()) - 1) < 0.02
        assert abs(float(jnp.std(pair["a"])) / float(theirs.std()) - 1) < 0.08
        assert not np.array_equal(pair["a"][0], pair["a"][1])
    np.testing.assert_array_equal(logits(model, params, lora), logits(model, params))
    some = LoRA(rank=16, targets="k_proj").init(jax.random.key(0), model)
    k_proj = ("stages_0", "block_0", "mixer", "k_proj")
    assert set(some["stages_0"]["block_0"]["mixer"]) == {"k_proj"} and "mlp" not in some["stages_0"]["block_0"]
    np.testing.assert_array_equal(get(some, k_proj)["a"], get(lora, k_proj)["a"])  # whatever else is a target


def test_pairs_lie_as_their_kernels_do(tiny):
    model, _ = tiny
    sizes = tuple({"data": 1, "fsdp": 2, "context": 1, "tensor": 2}[axis] for axis in sharding.AXES)
    mesh = AbstractMesh(sizes, sharding.AXES)
    lora = LoRA(rank=3, targets=ALL).abstract(model, mesh=mesh)
    kernels = model_lib.abstract_params(model, mesh=mesh)
    spec = lambda leaf: tuple(leaf.sharding.spec)  # noqa: E731
    for name, num_in in (("q_proj", 1), ("o_proj", 2)):
        pair, kernel = (tree["stages_0"]["block_0"]["mixer"][name] for tree in (lora, kernels))
        assert spec(pair["a"]) == (*spec(kernel["kernel"])[: 1 + num_in], None)
        assert spec(pair["b"]) == (None, None, *spec(kernel["kernel"])[1 + num_in :])
        assert "fsdp" in spec(pair["a"]) + spec(pair["b"]) and "tensor" in spec(pair["a"]) + spec(pair["b"])
    one = sharding.make_mesh(devices=jax.devices()[:1])
    lora = LoRA(rank=3).init(jax.random.key(0), model, mesh=one)
    plain = LoRA(rank=3).init(jax.random.key(0), model)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), lora, plain))
    assert jax.tree.all(jax.tree.map(lambda x: x.sharding.mesh == one, lora))


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(targets="qproj"), "'qproj' matches no projection .* q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (dict(targets="(q_proj"), "not a regular expression"),
        (dict(rank=0), "LoRA.rank is 0"),
        (dict(rank=1.5), "LoRA.rank is 1.5"),
        (dict(alpha=0), "LoRA.alpha is 0"),
    ],
)
def test_bad_settings(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings).abstract(tiny[0])


def test_merging_with_another_model_is_refused(tiny):
    model, params = tiny
    lora = LoRA().abstract(model)
    with pytest.raises(UserError, match="has stages_2"):
        lora_lib.merge(params, {"stages_2": lora["stages_0"]})
    with pytest.raises(UserError, match="pair at stages_0/block_0/mixer/k_proj .* do not fit the kernel"):
        moved = {**lora["stages_0"]["block_0"]["mixer"]}
        moved = {"k_proj": moved["q_proj"]}
        lora_lib.merge(params, {"stages_0": {"block_0": {"mixer": moved}}})
    with pytest.raises(UserError, match="has stages_0/block_0/mixer_norm, which is not a projection"):
        lora_lib.merge(params, {"stages_0": {"block_0": {"mixer_norm": {"a": 1, "b": 1, "scale": 1}}}})


MIXERS = {
    "Attention": Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    "LinearAttention": LinearAttention(4, 2, 8, window=8, feature_dim=6),
    "HyenaSE": HyenaSE(num_channels=32, num_groups=8),
    "HyenaMR": HyenaMR(num_channels=32, num_groups=8, filter_length=16, init_length=64),
    "HyenaLI": HyenaLI(num_channels=32),
    "Mamba2": Mamba2(num_heads=4, head_dim=8, state_dim=16, num_groups=2, mlp_size=24),
    "TwoMamba": TwoMamba(num_heads=2, head_dim=16),
}


def filled(abstract, seed):
    """Random numbers in these shapes, without a program to compile."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), abstract)


def model_of(names, repeat):
    """A decoder of these mixers, one after the other."""
    blocks = tuple(
        model_lib.Block(mixer=MIXERS[name].clone(parent=None), mlp=model_lib.Mlp(48, parent=None), parent=None)
        for name in names
    )
    stages = (model_lib.Stage(blocks, repeat),)
    return model_lib.Decoder(V, 32, stages, max_position_embeddings=64, parent=None)


def test_the_default_targets_reach_every_projection_of_every_mixer():
    model = model_of(MIXERS, repeat=2)
    lora = LoRA(rank=2).abstract(model)
    said = lora_lib.statement(model, lora)
    assert said.startswith("LoRA rank 2 on 52 matrices: Attention q_proj 2, k_proj 2, v_proj 2, o_proj 2; ")
    for kind in ("SE", "MR", "LI"):
        assert f"; Hyena{kind} in_proj 2, out_proj 2; " in said
    mamba = ("z", "dt", "x", "b", "c", "out", "gate", "up", "down")
    assert f"; Mamba2 {', '.join(f'{name}_proj 2' for name in mamba)}; " in said
    assert "; TwoMamba qkv_proj 2, forget_proj 2, o_proj 2; " in said and "Mlp" not in said
    size = sum(pair[x].size for pair in pairs_of(lora) for x in "ab")
    assert said.endswith(f"; {size} parameters")
    assert "Mlp gate_proj" in lora_lib.statement(model, LoRA(rank=2, targets="_proj").abstract(model))


def test_pairs_of_other_mixers_train_and_merge():
    """Merged equal to unmerged, a gradient for every pair. Attention's are above; MR and LI have SE's projections."""
    model = model_of(("HyenaSE", "Mamba2", "TwoMamba"), repeat=1)
    params = filled(model_lib.abstract_params(model), 0)
    lora = filled(LoRA(rank=2).abstract(model), 1)

    def loss(lora, params):
        logits = model.apply({"params": params, "lora": lora}, TOKENS)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3]), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))  # one program: pairs of zeros are none
    (_, found), grads = step(lora, params)
    none = jax.tree.map(np.zeros_like, lora)
    np.testing.assert_allclose(found, step(none, merge(params, lora))[0][1], atol=2e-5)
    assert np.abs(found - step(none, params)[0][1]).max() > 0.02
    for pair in pairs_of(grads):
        assert all(np.isfinite(pair[x]).all() and np.abs(pair[x]).max() > 1e-9 for x in "ab")


def pairs_of(tree):
    return [tree] if set(tree) == set(lora_lib.LEAVES) else [x for sub in tree.values() for x in pairs_of(sub)]


# ---------------------------------------------------------------------------------------------- PEFT

SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=None,
)
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "q and v": ("llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "all": ("llama", dict(r=3, lora_alpha=7, target_modules="all-linear")),
    "rank-stabilised": ("llama", dict(r=4, lora_alpha=8, use_rslora=True, target_modules=QKVO)),
    "some layers": ("llama", dict(r=4, lora_alpha=8, layers_to_transform=[0, 2], target_modules=QKVO)),
    "patterns": (
        "llama",
        dict(
            r=4,
            lora_alpha=8,
            target_modules=[*QKVO, "down_proj"],
            rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
            alpha_pattern={"layers.0.self_attn.k_proj": 3, "o_proj": 1},
        ),
    ),
    "fused": ("phi3", dict(r=3, lora_alpha=6, target_modules=["qkv_proj", "o_proj", "gate_up_proj"])),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny random base models."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    for name, config in (
        ("llama", transformers.LlamaConfig(**SIZES)),
        ("phi3", transformers.Phi3Config(**SIZES, original_max_position_embeddings=64, eos_token_id=2)),
    ):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def hf_logits(hf_model):
    with torch.no_grad():
        return hf_model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def hf_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_adapter(base, settings, folder, **save):
    """An adapter of the peft package with random matrices; the logits of base and adapter together."""
    torch.manual_seed(1)
    hf_model = peft_package.get_peft_model(
        hf_base(base), peft_package.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, x in hf_model.named_parameters():
            if "lora_" in name:
                x.normal_(std=0.3)
    hf_model.save_pretrained(str(folder), **save)
    return hf_logits(hf_model)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft_in_and_out(name, bases, tmp_path):
    base, settings = ADAPTERS[name]
    expected = write_adapter(bases / base, settings, tmp_path / "theirs")
    model, params = lcx.load(bases / base)
    lora = peft.load(tmp_path / "theirs", model)
    found = logits(model, params, lora)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(found - logits(model, params)).max() > 0.5
    peft.save(tmp_path / "ours", model, lora, base_model=str(bases / base))
    again = peft_package.PeftModel.from_pretrained(hf_base(bases / base), str(tmp_path / "ours"))
    np.testing.assert_allclose(hf_logits(again), expected, atol=2e-4)
    np.testing.assert_array_equal(logits(model, params, peft.load(tmp_path / "ours", model)), found)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["r"] == settings["r"] and config["base_model_name_or_path"] == str(bases / base)
    if "rank_pattern" not in settings:
        assert not config["rank_pattern"] and not config["alpha_pattern"]


def test_trained_pairs_of_a_fused_model_go_out_side_by_side(bases, tmp_path):
    """Training pulls the parts of qkv_proj apart; the sum of the ranks holds them all."""
    model, params = lcx.load(bases / "phi3")
    lora = drawn(LoRA(rank=3, alpha=6, targets=r"(q|v|up|o)_proj").init(jax.random.key(0), model))
    lora["stages_0"]["block_0"]["mixer"]["v_proj"]["scale"] *= 2
    peft.save(tmp_path / "ours", model, lora)
    again = peft_package.PeftModel.from_pretrained(hf_base(bases / "phi3"), str(tmp_path / "ours"))
    np.testing.assert_allclose(hf_logits(again), logits(model, params, lora), atol=2e-4)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["target_modules"] == ["gate_up_proj", "o_proj", "qkv_proj"]
    assert set(config["rank_pattern"].values()) | {config["r"]} == {3, 6}
    read = peft.load(tmp_path / "ours", model)
    np.testing.assert_allclose(logits(model, params, read), logits(model, params, lora), atol=2e-5)


def test_older_files_and_half_precision(bases, tmp_path):
    _, settings = ADAPTERS["q and v"]
    write_adapter(bases / "llama", settings, tmp_path / "a")
    model, _ = lcx.load(bases / "llama")
    expected = peft.load(tmp_path / "a", model)
    state = peft_package.utils.load_peft_weights(str(tmp_path / "a"), device="cpu")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/adapter_model.safetensors").unlink()
    torch.save({k: v.bfloat16() for k, v in state.items()}, tmp_path / "b/adapter_model.bin")
    found = peft.load(tmp_path / "b", model)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=2**-8)


def test_export_of_a_training_run(bases, tmp_path):
    model, params = lcx.load(bases / "llama")
    lora = drawn(LoRA(rank=3).init(jax.random.key(0), model))
    with Checkpointer(tmp_path / "run/checkpoints") as checkpointer:
        meta = {"model": model_json.to_json(model)}
        checkpointer.save(5, {"params": params, "lora": lora}, json={"meta": meta}, wait=True)
    peft.export(tmp_path / "run", tmp_path / "adapter")
    again = peft_package.PeftModel.from_pretrained(hf_base(bases / "llama"), str(tmp_path / "adapter"))
    np.testing.assert_allclose(hf_logits(again), logits(model, params, lora), atol=2e-4)
    with pytest.raises(UserError, match="already exists"):
        peft.export(tmp_path / "run", tmp_path / "adapter")
    peft.export(tmp_path / "run", tmp_path / "adapter", overwrite=True)


@pytest.fixture
def adapter(bases, tmp_path):
    write_adapter(bases / "llama", ADAPTERS["q and v"][1], tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(peft_type="IA3"), "peft_type 'IA3', expected 'LORA'"),
        (dict(use_dora=True), "lora_magnitude_vector of .* is missing, and use_dora"),
        (dict(bias="most"), "bias .most., expected one of none, all"),
        (dict(modules_to_save=["lm_head"]), "selects lm_head.weight, which the adapter lacks"),
        (dict(init_lora_weights="pissa_niter_4"), "changes the base weights too"),
        (dict(r=0), "r 0, expected a positive number"),
        (dict(r=5), "rank 4 in its tensors, expected 5"),
        (dict(alpha_pattern={"(": 3}), "not a valid regular expression"),
    ],
)
def test_other_kinds_of_adapters_are_refused(adapter, bases, changes, message):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        peft.load(adapter, lcx.load(bases / "llama")[0])


def test_adapters_of_other_models_are_refused(adapter, bases, tiny, tmp_path):
    with pytest.raises(UserError, match=r"model.layers.0.self_attn.q_proj.* such as model.layers.0.self_attn.qkv_proj"):
        peft.load(adapter, lcx.load(bases / "phi3")[0])
    wide = model_lib.llama(
        **dict(vocab_size=V, hidden_size=64, intermediate_size=48, num_layers=3, num_heads=4),
        max_position_embeddings=64,
    )
    with pytest.raises(UserError, match="maps 32 to 32 features, the model's 64 to 64"):
        peft.load(adapter, wide)
    lora = LoRA().init(jax.random.key(0), tiny[0])
    with pytest.raises(UserError, match="pass its own model"):
        peft.save(tmp_path / "x", wide, lora)
    with pytest.raises(UserError, match="has stages_1/block_0.* which the model lacks"):
        peft.save(tmp_path / "x", tiny[0], {"stages_1": lora["stages_0"]})
    assert not (tmp_path / "x").exists()


def test_damaged_adapters_are_refused(adapter, bases, tmp_path):
    model, _ = lcx.load(bases / "llama")
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated"):
        peft.load(adapter, model)
    weights.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        peft.load(adapter, model)
    with pytest.raises(UserError, match="no adapter at"):
        peft.load(tmp_path / "nothing", model)
