"""Every family of models: a training step, and the memory of decoding, of lcx against transformers + torch.

    JAX_NUM_CPU_DEVICES=2 python benchmarks/families.py [--families gemma3_text,...] [--rounds 5] [--output FILE.json]
    python benchmarks/families.py --memory [--families ...] [--output FILE.json]
    python benchmarks/families.py --decoding [--output FILE.json]

The models have 4 layers of width 256 and random weights. Speed: an AdamW step on two rows of 1024 tokens, in turns, as
in train_vs_transformers.py. Memory: the peak of such a step on one row of 8192 tokens, less what the process holds
before it; of lcx with the remat `dots`, as in the step whose time is taken, and with `full`. Decoding: the bytes of
the cache and the resident memory of a hybrid of five sliding layers and a full one at 131072 tokens; of transformers
with the cache that its generate() takes, and with one that does not know the windows. FILE is written anew by each
part, after every row; what it holds of families that are not asked for is kept. Needs the extra `torch`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile

import harness
import train_vs_transformers as steps
import workers

SIZES = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
WINDOW, KINDS = 256, ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
HYBRID = dict(sliding_window=WINDOW, layer_types=KINDS)
EXPERTS = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=176)
LOCAL = dict(num_local_experts=16, num_experts_per_tok=4, intermediate_size=176)
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
    head_dim=32,  # DeepSeek V3's own is qk_rope_head_dim, and one that is given replaces it
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=176, first_k_dense_replace=1,
)  # fmt: skip
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": dict(sliding_window=WINDOW),
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": HYBRID,
    "gemma3_text": HYBRID,
    "olmo2": {},
    "olmo3": HYBRID,
    "smollm3": {},
    "granite": {},
    "ernie4_5": {},
    "cohere2": HYBRID,
    "glm4": {},
    "ministral": HYBRID,
    "mixtral": LOCAL,
    "qwen2_moe": dict(EXPERTS, shared_expert_intermediate_size=176),
    "qwen3_moe": EXPERTS,
    "gpt_oss": LOCAL | HYBRID,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | dict(n_group=1, topk_group=1),
    "llama4_text": LOCAL | dict(num_experts_per_tok=1, intermediate_size_mlp=704, attention_chunk_size=WINDOW),
    "gemma4_text": dict(
        HYBRID, global_head_dim=128, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0
    ),
    "ministral3": {},
    "nemotron": {},
    "glm": {},
}


@dataclasses.dataclass(frozen=True)
class Case(steps.Case):
    """A family; the name of the model is its model_type."""

    @property
    def sizes(self) -> dict:
        return SIZES | FAMILIES[self.model]

    @property
    def rows(self) -> int:
        return max(1, 2048 // self.T)

    def torch_model(self):
        import torch
        import transformers

        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(self.model, **self.sizes)
        )


def speed(run: harness.Run, sides: workers.Sides, root: str, case: Case, rounds: int) -> dict:
    folder = os.path.join(root, case.model)
    case.torch_model().save_pretrained(folder)
    turns, peer, losses = steps.compared(run, sides, folder, case, rounds)
    return {
        **{"model_type": case.model, "T": case.T, "batch": case.rows},
        "lcx_ms": round(1e3 * turns.seconds("lcx"), 1),
        "torch_ms": round(1e3 * turns.seconds(peer), 1),
        "peer": peer,
        "speed_over_torch": turns.ratio(peer, "lcx"),
        "max_loss_difference": steps.difference(losses),
    }


# ------------------------------------------------------------------------------------------------------------ memory


def resident() -> float:
    """MiB that this process holds."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024


def in_process(*command: str) -> dict:
    """What one side measures of itself, in a process of its own."""
    kind = "lcx" if command[1].startswith("lcx") else "torch"
    env = os.environ | workers.environments(kind)[kind]
    command = (sys.executable, __file__, "--child", *command)
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(out.stdout.splitlines()[-1])


def memory(root: str, name: str, T: int) -> dict:
    folder = os.path.join(root, name)
    Case(name, T).torch_model().save_pretrained(folder)
    sides = ("lcx", "lcx_full", "torch")
    mib = {f"{side}_mib": in_process("step", side, folder, name, str(T))["step_mib"] for side in sides}
    ratios = {f"{side}_over_torch": round(mib[f"{side}_mib"] / mib["torch_mib"], 3) for side in sides[:2]}
    return {"model_type": name, "T": T, "batch": 1, **mib, **ratios}


# ---------------------------------------------------------------------------------------------------------- decoding

LONG, PIECE, NEW = 131072, 1024, 8
FIVE_TO_ONE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    sliding_window=1024,
    max_position_embeddings=LONG,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    tie_word_embeddings=True,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)


def hybrid():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gemma3_text", **FIVE_TO_ONE)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompt():
    import numpy as np

    return np.random.default_rng(0).integers(0, 512, (1, LONG - NEW)).astype(np.int32)


def decoded_by_lcx(folder: str) -> tuple[int, list[int]]:
    """(bytes of the cache, the new tokens)."""
    import jax

    import lcx

    model, params = lcx.load(folder)
    tokens = lcx.generate(model, params, prompt(), max_new_tokens=NEW)
    cache = jax.eval_shape(lambda: model.init_cache(1, LONG))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)), tokens[0].tolist()


def decoded_by_torch(folder: str, windows: bool = True) -> tuple[int, list[int]]:
    """The prompt is read in pieces: whole, the mask of a sliding layer alone would take 16 GiB."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = transformers.DynamicCache(config=model.config if windows else None)
    ids, out = torch.tensor(prompt()).long(), []
    with torch.inference_mode():
        for start in range(0, ids.shape[1], PIECE):
            piece = ids[:, start : start + PIECE]
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
        for _ in range(NEW):
            token = logits[:, -1:].argmax(-1)
            out.append(token.item())
            logits = model(token, past_key_values=cache).logits
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)), out


def child(kind: str, side: str, folder: str, *case: str) -> None:
    if kind == "step":
        return steps.memory(side, folder, Case(case[0], int(case[1])), remat="full" if side == "lcx_full" else "dots")
    import resource

    import jax
    import transformers  # noqa: F401  both sides hold the same libraries before

    jax.devices()
    before = resident()
    size, tokens = decoded_by_lcx(folder) if side == "lcx" else decoded_by_torch(folder, side == "torch")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cache_mib": round(size / 2**20, 2), "peak_mib": round(peak - before), "tokens": tokens}))


def decoding(root: str, side: str) -> dict:
    folder = os.path.join(root, "hybrid")
    if not os.path.exists(folder):
        hybrid().save_pretrained(folder)
    layers = f"5 sliding ({FIVE_TO_ONE['sliding_window']}), 1 full"
    return {"side": side, "T": LONG, "layers": layers, **in_process("decode", side, folder)}


def kept(path: str | None, part: str, names: list[str]) -> dict[str, dict]:
    """{family: row} of those families that are not measured now."""
    if part == "decoding" or not path or not os.path.exists(path):
        return {}
    with open(path) as file:
        rows = {row["model_type"]: row for row in json.load(file)[part]}
    return {name: row for name, row in rows.items() if name not in names}


def place(row: dict) -> int:
    return list(FAMILIES).index(row["model_type"]) if "model_type" in row else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory of a step, in place of its time")
    parser.add_argument("--decoding", action="store_true", help="memory of decoding, in place of a step")
    parser.add_argument("--output")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    part = "decoding" if args.decoding else "memory" if args.memory else "speed"
    names = ["lcx", "torch", "torch_whole_text"] if args.decoding else args.families.split(",")
    rows = kept(args.output, part, names)
    kinds = ("lcx", "torch") if part == "speed" else ()
    with tempfile.TemporaryDirectory() as root, workers.started(__file__, kinds) as sides:
        run = harness.Run("families, lcx against transformers + torch", threads=sides.threads)
        measure = {
            "speed": lambda name: speed(run, sides, root, Case(name, 1024), args.rounds),
            "memory": lambda name: memory(root, name, 8192),
            "decoding": lambda side: decoding(root, side),
        }[part]
        for name in names:
            rows[name] = measure(name)
            print(json.dumps(rows[name]), flush=True)
            run.write(args.output or "-", **{part: sorted(rows.values(), key=place)})


if __name__ == "__main__":
    workers.serve(lambda kind: steps.Side(kind, Case)) if workers.asked() else main()
