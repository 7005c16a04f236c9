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
    "BOOKS": "'books'",
    "CODE": "'code'",
}
MIXTURE = ROOT / "configs" / "data" / "mixture.gin"

WRONG_MIXTURES = [
    (
        {"Mixture.datasets": "(1,)"},
        "Mixture has no parameter 'datasets'; it has parts, long_fraction, long_length",
    ),
    (
        {"Mixture.parts": "(@books/Dataset(), 0.7)"},
        "lcx.data.Mixture.parts: expected tuple[Dataset, float], found @Dataset()",
    ),
    (
        {"Mixture.parts": "@books/Dataset()"},
        "write it as lcx.data.Mixture.parts = ((@books/data.Dataset(), 0.7), ",
    ),
    (
        {"Mixture.parts": "((@books/Dataset(), 'x'),)"},
        "lcx.data.Mixture.parts: expected float, found 'x' (str); write it as",
    ),
    (
        {"CODE": "None"},
        "code/lcx.data.Dataset.source: expected str | tuple[str, ...], found None (NoneType); set CODE",
    ),
]


def with_includes(path):
    text = path.read_text()
    included = re.findall(r"^include '(.+)'", text, re.M)
    return text + "".join(with_includes(path.parent / name) for name in included)


# Every file in a process of its own, as a command does: gin remembers what every file before it named. The processes
# are children of one that has imported what takes seconds, and that reads no file itself.
PARSE = """
import itertools, json, math, os, sys, traceback
from lcx import config, convert, evaluator, sampler, trainer
from lcx.training import division

for name, paths, settings, mixed in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            source = config.parse(paths, settings, target="lcx.trainer:train" if mixed else None)
            if mixed:
                job = config._arguments(trainer.train, {"workdir": "nowhere"})["job"]
                parts = getattr(job, "trainer", job).data.parts
                print([(part.source, weight, part.tokenizer) for part, weight in parts])
                print(*config.checking.without_effect(source, {}), sep="\\n")
                rungs = getattr(job, "rungs", ())
                runs = [job.trainer_for(rung, "model", 1024, 0) for rung in rungs] or [getattr(job, "trainer", job)]
                for run, count in itertools.product(runs, (1, 6, 16, 64, 256)):
                    sizes = {**vars(division._shape(run, count))}
                    free = [axis for axis, size in sizes.items() if size == -1]
                    known = -math.prod(sizes.values()) if free else 1
                    sizes |= {axis: count // known for axis in free}
                    print("divided", count, math.prod(sizes.values()), run.seq_len % sizes["context"])
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"END {name} {status}", flush=True)
"""


@pytest.fixture(scope="module")
def parsed():
    """path -> (status, what was printed)"""
    jobs, recipes = [], set()
    for path in CONFIGS:
        text = with_includes(path)
        settings = [item for item in SETTINGS.items() if f"{item[0]} = None" in text]
        settings += [("MLP_SIZE", "96")] if "MLP_SIZE =" not in text and "%MLP_SIZE" in text else []
        jobs.append((str(path), [str(path)], settings, False))
        whole = "Trainer.model =" in text or "Trainer.init_from =" in text
        recipe = re.sub("^#.*\n", "", text, flags=re.M).replace(path.stem, "")  # generated ones differ in a name
        if whole and "Trainer.data =" in text and recipe not in recipes:
            recipes.add(recipe)
            mixed = [item for item in settings if item[0] not in ("TEXT", "FASTA")]
            mixed += [(name, SETTINGS[name]) for name in ("BOOKS", "CODE")]
            jobs.append((f"{path}+mixture", [str(path), str(MIXTURE)], mixed, True))
    needed = {name: SETTINGS[name] for name in ("MODEL", "CONTEXT_LENGTH", "BOOKS", "CODE")}
    recipe = str(ROOT / "configs" / "extend" / "yarn.gin")
    for number, (changed, _) in enumerate(WRONG_MIXTURES):
        jobs.append((f"wrong{number}", [recipe, str(MIXTURE)], list((needed | changed).items()), True))
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


def test_every_training_recipe_takes_the_mixture_and_any_number_of_devices(parsed):
    """Without a value for the TEXT that the mixture replaces; the other settings of the data stay the recipe's."""
    mixed = {name: found for name, found in parsed.items() if name.endswith("+mixture")}
    assert len(mixed) > 15
    for name, (status, text) in mixed.items():
        assert status == 0, f"{name}: {text[-2000:]}"
        line = text.splitlines()[0]
        assert line.startswith("[('books', 0.7, ") and "('code', 0.3, " in line, name
        assert "Dataset.source had no effect" not in text, name
        divided = [line.split()[1:] for line in text.splitlines() if line.startswith("divided")]
        assert len(divided) >= 5, name  # on any number of devices
        assert all(devices == product and rest == "0" for devices, product, rest in divided), name
        if "/extend/yarn.gin" in name:
            assert line == "[('books', 0.7, 'model'), ('code', 0.3, 'model')]"


@pytest.mark.parametrize("number", range(len(WRONG_MIXTURES)))
def test_a_wrong_mixture_is_one_line_that_says_how_to_write_it(parsed, number):
    status, text = parsed[f"wrong{number}"]
    line = text.splitlines()[-1]
    assert status == 1 and line.startswith("lcx.config.ConfigError: ") and WRONG_MIXTURES[number][1] in line


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
