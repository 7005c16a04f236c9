"""StripedHyena 2 against a Llama: the steps of scripts/reproduce_striped_hyena.sh besides training and evaluation.

split   cuts a FASTA into train.fa and held_out.fa
rate    prints the learning rate with the lowest validation loss
table   reads what the runs wrote; prints a table, writes results.json and perplexity.png
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys

HELD_OUT = 0.1
PIECE = 8192  # letters per held-out record; the standard error treats records as independent
MODELS = {"striped_hyena": "StripedHyena 2", "llama": "Llama"}


def split(fasta: str, output: str, letters: int) -> None:
    """The last tenth of the letters is held out; the first `letters` of it are written, in records of PIECE."""
    from lcx.data.sources import find_files, read_fasta

    folder = pathlib.Path(output)
    if (folder / "held_out.fa").exists():
        return
    records = [
        record for file in find_files(fasta, format="fasta") for record in read_fasta(file) if record.text
    ]
    total = sum(len(record.text) for record in records)
    cut = total - max(2, round(total * HELD_OUT))
    trained, held_out, position = [], [], 0
    for record in records:
        here = min(max(cut - position, 0), len(record.text))
        if here:
            trained.append(f">{_word(record.name)}:1-{here}\n{record.text[:here]}\n")
        for start in range(here, len(record.text), PIECE):
            end = min(start + PIECE, len(record.text), start + letters)
            letters -= end - start
            if end > start:
                held_out.append(f">{_word(record.name)}:{start + 1}-{end}\n{record.text[start:end]}\n")
        position += len(record.text)
    (folder / "train.fa").write_text("".join(trained))
    partial = folder / "held_out.fa.partial"
    partial.write_text("".join(held_out))
    # Written last, so that its presence means that both files are complete.
    os.replace(partial, folder / "held_out.fa")


def _word(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name.rpartition(":")[2])


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def validation_loss(workdir: pathlib.Path) -> float:
    losses = [line["eval_loss"] for line in lines(workdir) if "eval_loss" in line]
    return losses[-1] if losses and math.isfinite(losses[-1]) else math.inf


def workdir_of(output: str, model: str, rate: str, seed: str) -> pathlib.Path:
    return pathlib.Path(output) / model / f"rate{rate}_seed{seed}"


def best_rate(output: str, model: str, rates: list[str], seed: str) -> tuple[str, dict[str, float]]:
    losses = {rate: validation_loss(workdir_of(output, model, rate, seed)) for rate in rates}
    return min(rates, key=losses.__getitem__), losses


def setting(config: str, name: str) -> int:
    """A number in an operative configuration, resolving a macro if needed."""
    value = re.search(rf"^(?:\w+\.)*{name} = (.+)$", config, re.M)
    assert value, name
    text = value.group(1).strip()
    if text.startswith("%"):
        return setting(config, text[1:])
    return int(text)


def about_run(workdir: pathlib.Path, seed: str) -> dict:
    """The result of one run on the held-out region, and its cost."""
    results = json.loads((workdir / "eval" / "results.json").read_text())
    found = results["evaluations"]["sequence_likelihood"]
    speeds = [line["tokens_per_second"] for line in lines(workdir) if "tokens_per_second" in line]
    return {
        "seed": int(seed),
        "loss": found["nll"],
        "perplexity": found["perplexity"],
        "standard_error_of_loss": found["standard_error"],
        "validation_loss": validation_loss(workdir),
        "train_seconds": sum(map(int, (workdir / "seconds").read_text().split())),
        "train_tokens_per_second": round(statistics.median(speeds)) if speeds else None,
        "parameters": results["model"]["num_params"],
        "letters_scored": sum(row["scored"] for row in found["sequences"]),
    }


def about_model(output: str, model: str, rates: list[str], seeds: list[str]) -> dict:
    rate, losses = best_rate(output, model, rates, seeds[0])
    runs = [about_run(workdir_of(output, model, rate, seed), seed) for seed in seeds]
    config = (workdir_of(output, model, rate, seeds[0]) / "operative_config.gin").read_text()
    steps, batch, length = (setting(config, f"Trainer.{name}") for name in ("steps", "batch_size", "seq_len"))
    values = [run["perplexity"] for run in runs]
    return {
        "parameters": runs[0]["parameters"],
        "tokens": steps * batch * length,
        "steps": steps,
        "batch_size": batch,
        "seq_len": length,
        "learning_rate": float(rate),
        "validation_losses": {rate: loss for rate, loss in losses.items() if math.isfinite(loss)},
        "perplexity_mean": statistics.mean(values),
        "perplexity_sd": statistics.stdev(values) if len(values) > 1 else None,
        "loss_mean": statistics.mean(run["loss"] for run in runs),
        "runs": runs,
    }


def compare(output: str, rates: list[str], seeds: list[str]) -> dict:
    models = {name: about_model(output, name, rates, seeds) for name in MODELS}
    ours, theirs = models["striped_hyena"], models["llama"]
    differences = [a["loss"] - b["loss"] for a, b in zip(ours["runs"], theirs["runs"], strict=True)]
    return {
        "what": "StripedHyena 2 and a Llama of equal parameters, equal tokens of one genome; a held-out region",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "parameter_ratio": ours["parameters"] / theirs["parameters"],
        "same_tokens": ours["tokens"] == theirs["tokens"],
        "loss_difference": {
            "by_seed": differences,
            "mean": statistics.mean(differences),
            "sd": statistics.stdev(differences) if len(differences) > 1 else None,
        },
        "models": models,
    }


def machine() -> dict:
    from importlib import metadata

    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def _cpu() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*: (.+)", text)
    return found.group(1).strip() if found else platform.machine()


def table(result: dict) -> str:
    rows = [
        f"{'':16}{'parameters':>11} {'tokens':>11} {'rate':>7} {'perplexity':>19} {'nats':>7} {'s a run':>8}"
    ]
    for name, model in result["models"].items():
        spread = "" if model["perplexity_sd"] is None else f" +- {model['perplexity_sd']:.4f}"
        seconds = statistics.mean(run["train_seconds"] for run in model["runs"])
        perplexity = f"{model['perplexity_mean']:.4f}{spread}"
        rows.append(
            f"{MODELS[name]:16}{model['parameters']:11,} {model['tokens']:11,} {model['learning_rate']:7g} "
            f"{perplexity:>19} {model['loss_mean']:7.4f} {seconds:8.0f}"
        )
    mean, by_seed = result["loss_difference"]["mean"], result["loss_difference"]["by_seed"]
    which = "below" if mean < 0 else "above"
    listing = ", ".join(f"{x:+.4f}" for x in by_seed)
    rows.append(f"StripedHyena 2 is {abs(mean):.4f} nats a letter {which} the Llama (by seed: {listing})")
    if abs(result["parameter_ratio"] - 1) > 0.01 or not result["same_tokens"]:
        rows.append(
            f"not equal: {result['parameter_ratio']:.3f}x the parameters; change STRIPED_HYENA_MLP or LLAMA_MLP"
        )
    return "\n".join(rows)


def draw(result: dict, path: pathlib.Path) -> None:
    """Each seed's perplexity as a dot, their mean as a bar."""
    from lcx.reporting import pictures

    def on(axes) -> None:
        for row, model in enumerate(result["models"].values()):
            values = [run["perplexity"] for run in model["runs"]]
            axes.plot(values, [row] * len(values), ls="", marker="o", ms=8, alpha=0.8, color=f"C{row}")
            axes.plot(model["perplexity_mean"], row, ls="", marker="|", ms=26, mew=2.4, color=f"C{row}")
        axes.set_yticks(range(len(MODELS)), [MODELS[name] for name in result["models"]])
        axes.set_ylim(len(MODELS) - 0.5, -0.5)
        axes.figure.set_figheight(2.6)
        tokens = result["models"]["llama"]["tokens"]
        axes.set_xlabel("perplexity per letter of the held-out region (dots: seeds, bar: mean)")
        axes.set_title(f"Equal parameters, {tokens / 1e6:.2f}M letters of training")

    path.write_bytes(pictures.picture(on))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("split", "rate", "table"))
    parser.add_argument("--output", required=True, help="the folder of the runs")
    parser.add_argument("--fasta")
    parser.add_argument("--letters", type=int, default=65536)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--rates", type=str.split, default=[])
    parser.add_argument("--seeds", type=str.split, default=[])
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    if args.what == "split":
        split(args.fasta, args.output, args.letters)
    elif args.what == "rate":
        print(best_rate(args.output, args.model, args.rates, args.seed)[0])
    else:
        result = compare(args.output, args.rates, args.seeds)
        folder = pathlib.Path(args.output)
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result, folder / "perplexity.png")
        print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
