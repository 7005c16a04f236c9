"""Peak memory and time of a conversion in both directions, each in a separate process.

    python benchmarks/convert_memory.py --gigabytes=2 --folder=/tmp/convert_memory

Makes a synthetic bfloat16 Llama of about that size as a Hugging Face folder, converts it to lcx and back,
compares the two Hugging Face folders byte for byte, prints JSON (--output writes it), and removes what it made.
Peak is VmHWM of the whole process, interpreter and libraries included; `baseline` is that of a process that only
imports the converter.
"""

import argparse
import filecmp
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

CHILD = """
import json, re, sys
code, argv = int(sys.argv[1]), sys.argv[2:]
if code:
    from lcx.convert.__main__ import main
    status = main(argv)
else:
    import lcx.convert.command
    status = 0
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"peak": peak}))
sys.exit(status)
"""


def make(folder: pathlib.Path, gigabytes: float, vocab_size: int) -> int:
    """A folder of random numbers in the shapes of a Llama; returns its size in bytes."""
    import jax
    import numpy as np

    from lcx import model as model_lib
    from lcx.convert.core import model_source
    from lcx.convert.hf import writer

    hidden = 2048 if gigabytes >= 0.5 else 512
    layer_bytes = 2 * (hidden * hidden * 5 // 2 + 3 * hidden * hidden * 4)
    num_layers = max(2, round((gigabytes * 1e9 - 4 * vocab_size * hidden) / layer_bytes))
    model = model_lib.llama(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=4,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )

    class Random(model_source.TreeSource):
        def read(self, path, index):
            shape = [s.stop - s.start for s in index]
            generator = np.random.default_rng([hash(path) % 2**32, *(s.start for s in index)])
            return generator.standard_normal(shape, np.float32).astype("bfloat16") * np.asarray(
                0.02, "bfloat16"
            )

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.bfloat16), model_lib.abstract_params(model)
    )
    folder.mkdir(parents=True)
    tensors = writer.write(folder, Random(model, abstract), max_shard_bytes=500_000_000)
    return sum(info.nbytes for info in tensors.values())


def child(*argv: str) -> dict[str, float]:
    """Runs the converter (or, without arguments, only imports it) in a new process."""
    start = time.monotonic()
    command = [sys.executable, "-c", CHILD, str(int(bool(argv))), *argv]
    paths = [str(pathlib.Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    seconds = time.monotonic() - start
    return {
        "peak_mb": json.loads(result.stdout.splitlines()[-1])["peak"] / 1e6,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/lcx_convert_memory"))
    parser.add_argument("--output", default="-", metavar="FILE.json")
    arguments = parser.parse_args()
    import harness

    cores = {"threads": os.cpu_count() or 1}
    run = harness.Run("peak memory and time of a conversion, both ways", threads={"lcx": cores})
    folder = arguments.folder
    if folder.exists():
        sys.exit(f"{folder} exists: choose another --folder")
    try:
        size = make(folder / "hf", arguments.gigabytes, arguments.vocab_size)
        back = (
            f"--src={folder}/lcx",
            f"--dst={folder}/back",
            "--dst_format=hf",
            "--max_shard_bytes=500000000",
        )
        with run.watched():
            results = {
                "size_mb": size / 1e6,
                "baseline": child(),
                "hf_to_lcx": child(f"--src={folder}/hf", f"--dst={folder}/lcx", "--dst_format=lcx"),
                "lcx_to_hf": child(*back),
            }
        weights = sorted(path.name for path in (folder / "hf").glob("*.safetensors*"))
        _, different, missing = filecmp.cmpfiles(folder / "hf", folder / "back", weights, shallow=False)
        results["equal"] = not different and not missing
        print(json.dumps(results))
        run.write(arguments.output, **results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
