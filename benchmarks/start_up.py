"""Seconds from a command to its help text, first step, first token, first result and first answer, and where they go.

    python benchmarks/start_up.py [--only help,train,generate,evaluate,serve,evo2,abstract] [--output FILE.json]

Every start is a process of its own: `cold` with an empty compilation cache, `warm` with the one that the cold start
left. The tiny model is the quickstart's, which `train` makes for `generate`, `evaluate` and `serve`. `evo2` generates
with a tiny model of the four kinds of layers of Evo 2, `serve` ends with the answer to a first request, and `abstract`
is a training step of a model with the shape of Llama 3.2 1B, which is traced, lowered and compiled without allocating
it. Seconds of imports, data, tracing, lowering and compiling are those of the whole command, saves and the last
evaluation included; nested traces count once for each level.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

PORT = 8765
ROOT = pathlib.Path(__file__).parent.parent
PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
TRAIN = [
    "--gin_file=configs/quickstart.gin",
    *("--gin.Trainer.steps=3", "--gin.AdamW.warmup_steps=1", "--gin.Trainer.log_every=1"),
]
ABSTRACT = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32,
    "num_kv_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": True, "remat": "dots",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the child


def child(verb: str, arguments: list[str]) -> None:
    """Runs a command in this process and writes where its time went to the file in LCX_PARTS."""
    from lcx import config

    config.setup_jax()
    parts = dict.fromkeys(("imports", "data", *PARTS.values()), 0.0) | {"programs": 0}
    start = time.perf_counter()
    import jax

    import lcx.terminal
    import lcx.trainer  # noqa: F401 (the time it takes)
    from lcx.data import Dataset

    parts["imports"] = time.perf_counter() - start

    def listen(event: str, seconds: float, **_) -> None:
        if event in PARTS:
            parts[PARTS[event]] += seconds
            parts["programs"] += PARTS[event] == "compiling"

    jax.monitoring.register_event_duration_secs_listener(listen)
    opened = Dataset.opened

    def timed(self):
        start = time.perf_counter()
        try:
            return opened(self)
        finally:
            parts["data"] += time.perf_counter() - start

    Dataset.opened = timed  # type: ignore[method-assign]
    if verb == "abstract":
        abstract_step()
    else:
        from importlib import import_module

        import_module(f"lcx.{verb}").main(arguments)
    pathlib.Path(os.environ["LCX_PARTS"]).write_text(json.dumps(parts))


def abstract_step() -> None:
    import jax
    import numpy as np

    from lcx import model, objectives, optim, sharding
    from lcx.training import run, step

    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        optimizer = optim.AdamW(learning_rate=1e-4)
        made = run.prepared(optimizer, 100, model.llama(**ABSTRACT), mesh, None)
        rates = optimizer.learning_rates(100)
        settings = {"accumulation": 1, "abstract": made.abstract, "trains": made.trains}
        function = step.make_step(made.model, made.optimizer, objectives.next_token, rates, **settings)
        rows = sharding.batch_sharding(mesh)
        shape = (1, 2048)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
            for name, dtype in {
                "tokens": np.int32, "labels": np.int32, "positions": np.int32, "segment_ids": np.int32,
                "loss_weights": np.float32,
            }.items()
        }  # fmt: skip
        function.lower(made.abstract, batch, np.int32(0)).compile()
        print("compiled", flush=True)


# ---------------------------------------------------------------------------------------------------- the parent


def evo2(path: pathlib.Path) -> str:
    """The checkpoint of a tiny Evo 2 in one file, as vortex writes it; made if it is not there."""
    if not path.exists():
        code = f"""
import jax, lcx
from lcx import model
from lcx.striped_hyena import striped_hyena
sizes = dict(hidden_size=64, intermediate_size=64, num_heads=2, se_groups=4, mr_groups=4)
tiny = striped_hyena(pattern="SDH*", max_position_embeddings=1024, **sizes)
lcx.save({str(path)!r}, tiny, model.init_params(tiny, jax.random.key(0)), format="vortex")
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return str(next(path.rglob("*.pt"), path))


def answered(port: int) -> None:
    """Asks the server for eight tokens."""
    body = json.dumps({"prompt": "import", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as response:
        json.load(response)


def started(verb: str, arguments: list[str], sign: str, folder: pathlib.Path) -> dict:
    """Seconds until the command prints `sign` ("": anything on stdout), until it ends, and its parts."""
    parts = folder / "parts.json"
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "LCX_PARTS": str(parts)}
    for name in ("DIR", "MAX_SIZE"):
        env.pop(f"JAX_COMPILATION_CACHE_{name}", None)
    command = [sys.executable, __file__, "--child", verb, *arguments]
    if "--help" in arguments:
        command = [sys.executable, "-m", f"lcx.{verb}", *arguments]
    start, first, seen = time.perf_counter(), None, b""
    merged = subprocess.STDOUT if sign else subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=merged) as process:
        assert process.stdout
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            seen += piece
            if first is None and sign.encode() in seen:
                if verb == "serve":
                    answered(PORT)
                    process.send_signal(signal.SIGINT)
                first = time.perf_counter() - start
    if process.returncode not in (0, 130 if verb == "serve" else 0) or first is None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {seen.decode()[-2000:]}")
    found = {"first": first, "end": time.perf_counter() - start}
    return found | (json.loads(parts.read_text()) if parts.exists() else {})


def commands(folder: pathlib.Path) -> dict[str, tuple[str, list[str], str]]:
    """name -> (verb, arguments, what it prints first)."""
    prompt = [f"--checkpoint={folder / 'run'}", "--prompt=import", "--max_new_tokens=40"]
    return {
        "help": ("train", ["--help"], ""),
        "train": ("train", [*TRAIN, f"--workdir={folder / 'run'}"], "step 1/"),
        "generate": ("generate", prompt, ""),
        "evaluate": (
            "evaluate",
            [
                f"--checkpoint={folder / 'run'}",
                f"--output={folder / 'evaluation'}",
                "--evals=loss_by_position",
                "--gin.LossByPosition.max_tokens=4096",
            ],
            "nats per",
        ),
        "serve": ("serve", [f"--checkpoint={folder / 'run'}", f"--port={PORT}"], "serving "),
        "evo2": (
            "generate",
            [f"--checkpoint={folder / 'evo2.pt'}", "--prompt=ACGTACGT", "--max_new_tokens=40"],
            "",
        ),
        "abstract": ("abstract", [], "compiled"),
    }


def main() -> None:
    import shutil

    import harness

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = "help,train,generate,evaluate,serve,evo2,abstract"
    parser.add_argument("--only", default=every, metavar="NAMES")
    parser.add_argument("--output", default=str(harness.RESULTS / "start_up_cpu.json"))
    flags = parser.parse_args()
    run = harness.Run("start-up", threads={"lcx": harness.jax_threads()})
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for what in flags.only.split(","):
            verb, arguments, sign = commands(folder)[what]
            for state in ("cold", "warm"):
                if what in ("train", "evaluate"):
                    shutil.rmtree(
                        folder / {"train": "run", "evaluate": "evaluation"}[what], ignore_errors=True
                    )
                if what == "evo2":
                    arguments[0] = f"--checkpoint={evo2(folder / 'evo2.pt')}"
                with run.watched():
                    found = started(verb, arguments, sign, folder)
                rows.append({"command": what, "state": state, **{k: round(v, 3) for k, v in found.items()}})
                print(json.dumps(rows[-1]), flush=True)
    run.write(flags.output, rows=rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
