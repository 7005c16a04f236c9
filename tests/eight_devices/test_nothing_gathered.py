"""The training steps of all shipped configurations on a `context` mesh hold nothing as long as a row on any device.

What attention sends by its stated method is apart. Blocks whose mixers are of one kind and send the same are compiled
once, at the sizes of the configuration; no step runs. A configuration that starts from a model gets a small one.
"""

import collections
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from test_configs import SETTINGS, with_includes
from test_context_mesh import build

from lcx import mixers, objectives, sharding
from lcx import model as model_lib
from lcx.checkpoint import model_json
from lcx.convert.hf import config as hf_config
from lcx.linearize import Linearize
from lcx.mixers.two_mamba import PUBLISHED as OF_TWO_MAMBA
from lcx.mixers.two_mamba import published
from lcx.model import Block, Stage
from lcx.optim import AdamW
from lcx.planning.program import parse
from lcx.striped_hyena import striped_hyena
from lcx.training import step as train_step

ROOT = pathlib.Path(__file__).parents[2]
P, L = 4, 37
T = P * L  # 148: no other size of a model is that
PUBLISHED = ("softmax", "mamba", *OF_TWO_MAMBA)
WHOLE = ("all-to-all over heads", "gathered")  # of context_method: methods that hold whole rows of some heads

SMALL = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "tie_word_embeddings": False,
}  # fmt: skip
TWO_KINDS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8,
    "v_head_dim": 5, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip
FAMILIES = {
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, **TWO_KINDS},
    "olmo3": {"model_type": "olmo3", **TWO_KINDS},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "deepseek": {"model_type": "deepseek_v3", **LATENT},
}

READ = """
import json, os, sys, traceback
from lcx import config, objectives, trainer
from lcx.checkpoint import model_json

for path, settings in json.load(sys.stdin):
    if os.fork() == 0:
        try:
            config.parse([path], settings, target="lcx.trainer:train")
            job = config._arguments(trainer.train, {"workdir": "nowhere"})["job"]
            run = getattr(job, "trainer", job)
            values = {name: getattr(run, name) for name in ("model", "linearize", "objective")}
            values = {name: None if x is None else model_json.to_json(x) for name, x in values.items()}
            print(json.dumps([path, run.expects_linear, values]), flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.wait()
"""


def shipped():
    """path -> (whether it starts from a linear model, its model, linearization and objective)

    Files that differ in the name of a published mixer alone are read once.
    """
    jobs, named = [], re.compile(r"(published\.attention_type = )'(\w+)'")
    recipes: dict[str, str] = {}
    for path in sorted((ROOT / "configs").rglob("*.gin")):
        text = with_includes(path)
        whole = "Trainer.model =" in text or "Trainer.init_from =" in text
        recipe = named.sub(r"\1", re.sub("^#.*\n", "", text, flags=re.M))
        if "Trainer.data =" in text and whole and recipes.setdefault(recipe, path) is path:
            jobs.append((str(path), [item for item in SETTINGS.items() if f"{item[0]} = None" in text]))
    done = subprocess.run(
        [sys.executable, "-c", READ], cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(jobs), done.stderr[-2000:]
    return {pathlib.Path(path).relative_to(ROOT / "configs").as_posix(): rest for path, *rest in found}


def model_of(name, expects_linear, values):
    """The model that a configuration trains."""
    if values["model"] is not None:
        return model_json.from_json(values["model"])
    stem = pathlib.Path(name).stem
    if stem.startswith("evo2"):
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "se_groups": 8, "mr_groups": 8}
        return striped_hyena(pattern="SDH*", max_position_embeddings=T, **sizes)
    model = hf_config.from_config(SMALL | {"model_type": "llama"} | FAMILIES.get(stem, {}))
    linearize = Linearize() if expects_linear else None
    if values["linearize"] is not None:
        linearize = model_json.from_json(values["linearize"])
    return model if linearize is None else dataclasses.replace(linearize, window=8, feature_dim=4).model(model)


def sent(block):
    """What a block says that it sends, without the sizes."""
    if block.mixer is None:
        return "nothing"
    return re.sub(r"\d+ (\w+?)s?\b", r"\1s", mixers.context_method(block.mixer, devices=P, tensor=1, seq_len=T))


def kind(block):
    """What tells blocks apart here."""
    return mixers.kind(block.mixer) if block.mixer is not None else "", sent(block), type(block.mlp).__name__


def covered(key, others):
    """Whether other kinds of blocks have this mixer sending this, perhaps with a halo as well, and this MLP."""
    mixer, sends, mlp = key
    same = any(other == mixer and more.startswith(sends) for other, more, _ in others)
    return same and any(other == mlp for _, _, other in others)


def steps():
    """objective -> {kind of block: one of them}, and the model that it is from"""
    blocks, models = collections.defaultdict(dict), {}
    for name, (expects_linear, values) in shipped().items():
        model = model_of(name, expects_linear, values)
        objective = model_json.from_json(values["objective"])
        models.setdefault(objective, model)
        found = [layer.block for layer in model_lib.layers(model)]
        if "pretrain/two_mamba/" in name:
            found = [Block(published(one, num_heads=4, head_dim=8), found[0].mlp) for one in PUBLISHED]
        for block in found:
            blocks[objective].setdefault(kind(block), block)
    for found in blocks.values():
        for key in sorted(found):
            if covered(key, found.keys() - {key}):
                del found[key]
    settings = {"dtype": "float32", "remat": "none", "parent": None}
    return {
        objective: models[objective].clone(stages=(Stage(tuple(found.values()), 1),), **settings)
        for objective, found in blocks.items()
    }


def compiled(model, objective):
    """The HLO of a training step on rows of T tokens."""
    mesh = build(fsdp=1, context=P)
    with jax.set_mesh(mesh):
        weights = {"params": model_lib.abstract_params(model, mesh=mesh)}
        optimizer = AdamW(learning_rate=1e-2, warmup_steps=0)
        transformation = optimizer.build(train_step.moving(weights), 9)
        abstract = train_step.abstract_state(weights, transformation, mesh)
        step = train_step.make_step(
            model, transformation, objective, optimizer.learning_rates(9), accumulation=1, abstract=abstract
        )
        where = sharding.batch_sharding(mesh)
        names = ("tokens", "labels", "segment_ids", "positions")
        batch = {name: jax.ShapeDtypeStruct((1, T), np.int32, sharding=where) for name in names}
        batch["loss_weights"] = jax.ShapeDtypeStruct((1, T), np.float32, sharding=where)
        return step.lower(abstract, batch, np.int32(0)).compile().as_text()


def as_long_as_a_row(text):
    """Where arrays come from that have an axis of T tokens: {(dtype, op_name)}"""
    return {
        (array.dtype, run.instruction.op_name)
        for run in parse(text).runs()
        for array in run.instruction.results
        if T in array.shape and run.instruction.op_name
    }


def test_the_steps_of_all_shipped_configurations():
    for objective, model in steps().items():
        whole = [i for i, block in enumerate(model.stages[0].pattern) if any(word in sent(block) for word in WHOLE)]
        stated = [rf"/block_{i}/mixer/" for i in whole]
        if objective is objectives.attention_transfer:
            stated.append(r"/mixer\._imitated/")  # the softmax attention of the teacher: all-to-all over heads
        found = as_long_as_a_row(compiled(model, objective))
        for pattern in stated:
            assert any(re.search(pattern, name) for _, name in found), pattern  # the search finds what is there
        rest = {one for one in found if not any(re.search(pattern, one[1]) for pattern in stated)}
        if objective is objectives.nucleotides:  # taxonomic tags are found across the row: labels, 4 bytes a token
            rest = {(dtype, name) for dtype, name in rest if dtype.startswith("f") or "jvp()/" not in name}
        assert not rest, (objective.__name__, sorted(rest))
