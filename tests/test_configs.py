"""Every .gin file in configs/ parses, names only what exists, and says what a reader needs to know."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.gin"))
SETTINGS = {
    "MODEL": "'model'",
    "TOKENIZER": "'model'",
    "TEXT": "'text'",
    "FASTA": "'genome.fa'",
    "VARIANTS": "'a.vcf'",
    "CONTEXT_LENGTH": "1024",
}


def with_includes(path):
    text = path.read_text()
    included = re.findall(r"^include '(.+)'", text, re.M)
    return text + "".join(with_includes(path.parent / name) for name in included)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_parses(path):
    """In a process of its own, as a command does: gin remembers what every file before it named."""
    text = with_includes(path)
    settings = [(name, value) for name, value in SETTINGS.items() if f"{name} = None" in text]
    code = f"from lcx import config; config.parse([{str(path)!r}], {settings!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_header_says_what_it_is(path):
    header = path.read_text().partition("\n\n")[0] + path.read_text().partition("from __gin__")[0]
    assert header.startswith("# ")
    if "train.job" in path.read_text():
        for word in ("Hardware", "Command"):
            assert word in header, f"{path.name} does not say its {word.lower()}"


def test_files_that_the_readme_and_the_help_name_exist():
    pages = [ROOT / "README.md", *(ROOT / "lcx").glob("*.py"), *CONFIGS, *(ROOT / "scripts").glob("*.sh")]
    path = re.compile(r"(?:configs|scripts|benchmarks)/[\w/]+\.\w+")
    named = {name for page in pages for name in path.findall(page.read_text())}
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert named and not missing
