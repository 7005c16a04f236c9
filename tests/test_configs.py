"""Every .gin file in configs/ parses, names only what exists, and says what a reader needs to know."""

import json
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


# Every file in a process of its own, as a command does: gin remembers what every file before it named. The processes
# are children of one that has imported what takes seconds, and that reads no file itself.
PARSE = """
import json, os, sys, traceback
from lcx import config, convert, evaluator, sampler, trainer

for path, settings in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            config.parse([path], settings)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"END {path} {status}", flush=True)
"""


@pytest.fixture(scope="module")
def parsed():
    """path -> (status, what was printed)"""
    jobs = []
    for path in CONFIGS:
        text = with_includes(path)
        jobs.append((str(path), [item for item in SETTINGS.items() if f"{item[0]} = None" in text]))
    done = subprocess.run(
        [sys.executable, "-c", PARSE], cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends = re.split(r"^END (.+) (-?\d+)\n", done.stdout, flags=re.M)
    return {path: (int(status), text) for text, path, status in zip(ends[::3], ends[1::3], ends[2::3])}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_parses(parsed, path):
    status, text = parsed[str(path)]
    assert status == 0, text[-2000:]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_header_says_what_it_is(path):
    header = path.read_text().partition("\n\n")[0] + path.read_text().partition("from __gin__")[0]
    assert header.startswith("# ")
    if "train.job" in path.read_text():
        for word in ("Hardware", "Command"):
            assert word in header, f"{path.name} does not say its {word.lower()}"


def test_files_that_the_readme_and_the_help_name_exist():
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pages = [*texts, *(ROOT / "lcx").glob("*.py"), *CONFIGS, *(ROOT / "scripts").glob("*.sh")]
    path = re.compile(r"(?:configs|scripts|benchmarks)/[\w/]+\.\w+")
    named = {name for page in pages for name in path.findall(page.read_text())}
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert named and not missing
