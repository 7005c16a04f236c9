"""Who may import whom, read from the source: the arrows point down this table, never up."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

import lcx

ROOT = pathlib.Path(__file__).parent.parent
# Every module of lcx/, every package, and every room of the packages in ROOMS, from the top to the bottom: each imports
# what comes after it and nothing else. A new one gets its place here; the lines only group what is alike.
LINES = [
    "__init__ train plan evaluate generate serve embed variants score report lm_eval",
    "genomes embedding_files planning serving",
    "ladder evaluator harness terminal reporting blockwise trainer",
    "text evals evals.support",
    "training sampler embedding",
    "convert convert.lolcats convert.peft convert.workdir convert.evo2 convert.two_mamba",
    "convert.hf convert.core convert.files",
    "data data.readers",
    "checkpoint objectives layer_order pieces optim activations",
    "linearize lora extend striped_hyena llama",
    "model block parameters mixers mlps layers rope",
    "remat ops kernels_pallas sharding",
    "rope_fields hub config multihost buckets paths locks moved wording version small_files errors startup huge_pages",
]
ORDER = [name for line in LINES for name in line.split()]
ROOMS = ("convert", "data", "evals")
OWNERS = {  # nobody else imports these
    "torch": ("lcx/convert/",),
    "orbax": ("lcx/checkpoint/",),
    "tensorstore": ("lcx/checkpoint/", "lcx/embedding_files.py"),
    "grain": ("lcx/data/",),
    "wandb": ("lcx/training/logger.py",),
    "tensorboard": ("lcx/training/tensorboard.py",),
    "gin": ("lcx/config/",),
    "huggingface_hub": ("lcx/hub.py",),
    **dict.fromkeys(("fsspec", "s3fs", "gcsfs"), ("lcx/buckets/client.py",)),
    "transformers": (),
}
ONLY_JAX = ("lcx/ops/", "lcx/rope.py", "lcx/rope_fields.py", "kernels_pallas/")
INSIDE_FUNCTIONS = {
    *("torch", "wandb", "matplotlib", "tokenizers", "sentencepiece", "pyarrow", "huggingface_hub", "jinja2"),
    *("filelock", "tensorboard", "wonderwords", "rouge_score", "lm_eval"),
    *("fsspec", "s3fs", "gcsfs"),
}
FACADE = lcx.__all__
FILES = sorted([*ROOT.glob("lcx/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")])


def imports(nodes):
    """The dotted names that import statements and import_module("...") name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." if node.level else f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def unit(name, *, in_room=False):
    """`lcx.ops.attention` -> ops, `lcx.data.readers.text` -> data.readers, `lcx` -> __init__."""
    top, *parts = name.split(".")
    if top == "kernels_pallas":
        return top
    room = ".".join(parts[:2])
    if parts and parts[0] in ROOMS and (in_room or room in ORDER):
        return room
    return parts[0] if parts else "__init__"


def violations(file, text):
    """What is wrong with the imports of a file, a line each; lazy ones and those for types alone count as well."""
    tree = ast.parse(text)
    *folders, stem = file.removesuffix(".py").split("/")
    own = unit(".".join([*folders, *([] if stem == "__init__" else [stem])]), in_room=len(folders) > 2)
    if own not in ORDER:
        yield f"{own} has no place in ORDER: give it one"
        return
    for name in imports(ast.walk(tree)):
        top = name.partition(".")[0]
        if name == ".":
            yield "a relative import: write lcx..."
        elif top in ("lcx", "kernels_pallas"):
            yield from _against_the_arrows(own, file, name)
        elif top in OWNERS and not file.startswith(OWNERS[top] or ("-",)):
            yield f"imports {top}, which only {OWNERS[top] or 'tests'} may"
        elif file.startswith(ONLY_JAX) and top not in (*sys.stdlib_module_names, "jax", "numpy", "jaxtyping"):
            yield f"imports {top}: rope, ops and kernels know jax only"
    for top in {name.partition(".")[0] for name in imports(tree.body)} & INSIDE_FUNCTIONS:
        yield f"imports {top} at the top: import it where it is used"


def _against_the_arrows(own, file, name):
    if own == "kernels_pallas" and name.startswith("lcx"):
        yield f"imports {name}: the kernels are a package of their own"
    elif name == "lcx" or (name.count(".") == 1 and name.removeprefix("lcx.") in FACADE):
        yield f"imports {name}, of the facade, which stands above all: import it from its home"
    elif unit(name) not in ORDER:
        yield f"imports {name}, which has no place in ORDER"
    elif ORDER.index(unit(name)) < ORDER.index(own):
        yield f"imports {name}, and {unit(name)} stands above {own} in ORDER"
    elif own == unit(name) == "evals" and file != "lcx/evals/__init__.py" and name.count(".") > 2:
        yield f"imports {name}: an evaluation stands alone; what two share belongs in evals/support"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    assert not list(violations(path.relative_to(ROOT).as_posix(), path.read_text()))


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("lcx/data/readers/xml.py", "from lcx import trainer", "trainer stands above data.readers"),
        ("lcx/data/readers/xml.py", "def f():\n    from lcx.trainer import Trainer", "trainer stands above"),
        ("lcx/data/readers/xml.py", "if TYPE_CHECKING:\n    import lcx.trainer", "trainer stands above"),
        ("lcx/data/readers/xml.py", "x = importlib.import_module('lcx.trainer')", "trainer stands above"),
        ("lcx/data/readers/xml.py", "from lcx.data.chat import ChatReader", "data stands above data.readers"),
        ("lcx/data/readers/xml.py", "from lcx import load", "of the facade"),
        ("lcx/data/readers/xml.py", "import lcx", "of the facade"),
        ("lcx/data/readers/xml.py", "from . import Row", "a relative import"),
        ("lcx/data/readers/xml.py", "from lcx.xml import parse", "lcx.xml.parse, which has no place"),
        ("lcx/data/writers/xml.py", "", "data.writers has no place"),
        ("lcx/mine.py", "", "mine has no place"),
        ("lcx/evals/support/mine.py", "from lcx.evals.perplexity import Perplexity", "evals stands above"),
        ("lcx/evals/mine.py", "from lcx.evals.perplexity import Perplexity", "an evaluation stands alone"),
        ("lcx/ops/mine.py", "from lcx.mixers import hyena", "mixers stands above ops"),
        ("lcx/ops/mine.py", "import flax", "know jax only"),
        ("kernels_pallas/mine.py", "from lcx.errors import UserError", "a package of their own"),
        ("lcx/trainer.py", "def f():\n    import torch", "imports torch, which only"),
        ("lcx/convert/mine.py", "import torch", "import it where it is used"),
        (
            "lcx/data/readers/xml.py",
            "from lcx.data.readers import Row\nfrom lcx.errors import UserError",
            None,
        ),
        ("lcx/evals/mine.py", "from lcx.evals import Result\nfrom lcx.evals.support import scoring", None),
        ("lcx/convert/mine.py", "def f():\n    import torch", None),
    ],
)
def test_what_is_refused(file, text, found):
    lines = list(violations(file, text))
    if found is None:
        assert not lines
    else:
        assert len(lines) == 1 and found in lines[0], lines


def module(path):
    """lcx/ops/attention.py -> lcx.ops.attention, lcx/ops/__init__.py -> lcx.ops."""
    *folders, name = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(folders if name == "__init__" else (*folders, name))


@functools.cache
def graph():
    """{module: the modules of ours that it imports}, inside functions too; the facade imports what its table names.

    An import runs the `__init__` of every package on its way too. Two do not count: the packages in which the importer
    lies, which have run already, and the facade, which imports nothing until it is asked.
    """
    trees = {module(path): ast.parse(path.read_text()) for path in FILES}
    edges = {}
    for own, tree in trees.items():
        nodes = list(ast.walk(tree))
        names = set(imports(nodes)) - {"lcx.__version__"}
        if own == "lcx":
            names |= {node.value for node in nodes if isinstance(node, ast.Constant)} & trees.keys()
        edges[own] = set()
        for name in names:
            parts = name.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            target, *packages = [ours for ours in prefixes if ours in trees] or [own]
            packages = {ours for ours in packages if ours != "lcx" and not own.startswith(f"{ours}.")}
            edges[own] |= {target, *packages} - {own}
    return edges


def circles(edges):
    """The groups of modules that reach each other, each sorted."""
    reach = {}
    for start in edges:
        reach[start], todo = set(), [start]
        while todo:
            new = edges[todo.pop()] - reach[start]
            reach[start] |= new
            todo += new
    groups = {tuple(sorted(m for m in reach[own] if own in reach[m])) for own in edges if own in reach[own]}
    return sorted(groups)


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(edges) == [("b", "c"), ("e", "f")]
    assert "lcx.convert.api" in graph()["lcx"], "the table of the facade counts"
    assert "kernels_pallas.attention" in graph()["lcx.ops.attention"], "so do imports inside functions"
    assert "lcx.ops" in graph()["lcx.mixers.mamba2"], "and the packages on the way"


def test_no_circles():
    assert not circles(graph()), "modules import each other: what they share belongs below them"


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{path} has more than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                assert node.end_lineno - first.lineno < 50, f"{path}: {node.name} has more than 50 lines"


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "scripts"])
def test_other_files_stay_small(folder):
    long = [path.name for path in (ROOT / folder).rglob("*.py") if len(path.read_text().splitlines()) > 500]
    assert not long, f"more than 500 lines: {', '.join(long)}"


def test_help_comes_before_jax():
    verbs = [f"lcx.{name}" for name in ("train", "plan", "evaluate", "generate", "report", "convert.__main__")]
    script = f"import sys, {', '.join(verbs)}\nprint(*(m for m in sys.modules if '.' not in m))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {
        "jax",
        "numpy",
        "flax",
        "orbax",
        "grain",
        "wandb",
        "matplotlib",
        "tokenizers",
        "transformers",
        "torch",
    }
    assert not heavy & set(out.stdout.split())
