"""How long the tutorial on Evo 2 takes and what it teaches a small model: every command as it is on the page.

    python benchmarks/evo2_tutorial.py --first=lambda.fa --genome=ecoli.fna.gz [--output FILE.json]

A small StripedHyena 2 is trained from scratch on the genome `--first` (section 7 of the page). It stands for the
released checkpoint in sections 1 to 5, which score with it, embed, generate and fine-tune it on `--genome`. The
sequences are the last HELD_OUT letters of that genome, in the tenth that fine-tuning holds out, and every SPACING-th
letter of theirs has a variant. Section 6 needs 8 GPUs, and section 8 is a study of its own.
"""

import argparse
import csv
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorials" / "evo2.md"
SECTIONS = (7, 1, 2, 3, 4, 5)  # in the order in which they run
HELD_OUT, SPACING = 50_000, 1000
OTHERS = {"A": "G", "C": "T", "G": "A", "T": "C"}


def commands(section: int) -> list[list[str]]:
    """The words of the commands in a section of the page."""
    text = re.search(rf"^## {section}\. .*?(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    if text is None:
        sys.exit(f"{PAGE} has no section {section}")
    blocks = re.findall(r"^```bash\n(.*?)^```", text[0], re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python -m lcx.")]


def prepare(folder: pathlib.Path, genome: str) -> None:
    """Writes the sequences and the variants that the page names."""
    from lcx.evals.support import dna

    name, letters = next(iter(dna.records(genome, owner="--genome")))
    text = letters[len(letters) - HELD_OUT : len(letters)].upper()
    (folder / "sequences.fa").write_text(f">{name}_end\n{text}\n")
    rows = [
        f"{name}_end\t{i + 1}\t.\t{text[i]}\t{OTHERS[text[i]]}\t.\t.\t."
        for i in range(SPACING, HELD_OUT, SPACING)
        if text[i] in OTHERS
    ]
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    (folder / "variants.vcf").write_text(head + "\n".join(rows) + "\n")
    (folder / "configs").symlink_to(ROOT / "configs")


def run(section: int, words: list[str], folder: pathlib.Path, genome: str) -> dict[str, object]:
    """Runs one command; its time includes the start of Python and compilation."""
    places = {
        "/path/to/evo2_7b.pt": "runs/my_genome",
        "/path/to/genome.fna.gz": os.path.abspath(genome),
        "/path/to/": f"{folder}/",
    }
    for place, real in places.items():
        words = [word.replace(place, real) for word in words]
    start = time.monotonic()
    found = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if found.returncode:
        sys.exit(f"{shlex.join(words)}\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    return {"section": section, "command": words[2], "seconds": round(time.monotonic() - start, 1)}


def learned(folder: pathlib.Path) -> dict[str, float]:
    """Nats per letter on the held-out sequences, before fine-tuning (section 1) and after it (section 5)."""
    results = json.loads((folder / "out" / "sequences" / "results.json").read_text())
    with open(folder / "out" / "tuned.tsv") as file:
        after = next(csv.DictReader(file, delimiter="\t"))
    found = json.dumps(results)
    before = float(re.search(r'"mean_log_likelihood": (-[\d.e-]+)', found)[1])
    return {"before": -before, "after": -float(after["mean_log_likelihood"]), "letters": int(after["scored"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", required=True, metavar="FASTA")
    parser.add_argument("--genome", required=True, metavar="FASTA")
    parser.add_argument("--output", default="-", metavar="FILE.json")
    arguments = parser.parse_args()
    import harness

    record = harness.Run("the commands of the tutorial on Evo 2", threads={"lcx": {"threads": os.cpu_count() or 1}})
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="lcx-evo2-tutorial-") as made:
        folder = pathlib.Path(made)
        prepare(folder, arguments.genome)
        with record.watched():
            for section in SECTIONS:
                genome = arguments.first if section == SECTIONS[0] else arguments.genome
                for words in commands(section):
                    rows.append(run(section, words, folder, genome))
                    print(json.dumps(rows[-1]), flush=True)
        loss = learned(folder)
    print(json.dumps(loss), flush=True)
    record.write(arguments.output, rows=rows, held_out_loss=loss)


if __name__ == "__main__":
    main()
