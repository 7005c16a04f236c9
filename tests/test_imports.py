"""Who may import whom, read from the source: the arrows point down this table, never up."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [  # a module imports from its own row and the rows below
    "train evaluate generate __init__",
    "config",
    "blockwise ladder evaluator terminal report trainer",
    "text",
    "evals",
    "evals.support",
    "training convert sampler",
    "objectives optim checkpoint data lora",
    "data.readers",
    "extend linearize",
    "llama striped_hyena",
    "model",
    "parameters mixers",
    "ops rope layers sharding remat",
    "kernels_pallas rope_fields hub",
    "locks paths",
    "errors moved version",
]
LEVEL = {name: -row for row, names in enumerate(LAYERS) for name in names.split()}
OWNERS = {  # nobody else imports these
    "torch": ("lcx/convert/",),
    "orbax": ("lcx/checkpoint/",),
    "tensorstore": ("lcx/checkpoint/",),
    "grain": ("lcx/data/",),
    "wandb": ("lcx/training/logger.py",),
    "gin": ("lcx/config/",),
    "huggingface_hub": ("lcx/hub.py",),
    "transformers": (),
}
ONLY_JAX = ("lcx/ops/", "lcx/rope.py", "lcx/rope_fields.py", "kernels_pallas/")
INSIDE_FUNCTIONS = {
    *("torch", "wandb", "matplotlib", "tokenizers", "sentencepiece", "pyarrow", "huggingface_hub", "jinja2"),
    "filelock",
}
FILES = sorted([*ROOT.glob("lcx/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")])
# Modules that still import each other in a circle. A group goes from this list when its circle is opened.
KNOWN_CIRCLES = [
    (
        *("lcx", "lcx.convert.api", "lcx.convert.lcx_folder", "lcx.convert.lolcats_writer"),
        *("lcx.convert.peft", "lcx.sampler", "lcx.text_stream"),
    ),
    ("lcx.data.batches", "lcx.data.dataset", "lcx.data.mixing"),
    (
        *("lcx.data.special", "lcx.data.tokenizer_build", "lcx.data.tokenizer_folders"),
        *("lcx.data.tokenizer_libraries", "lcx.data.tokenizers"),
    ),
]


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(name):
    """`lcx.ops.attention` -> ops, `lcx` -> __init__."""
    parts = [*name.split("."), "__init__"]
    return parts[0] if parts[0] == "kernels_pallas" else parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    file = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    is_command = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
    own = unit(file.removesuffix(".py").replace("/", "."))
    assert own in LEVEL, f"{file} has no row in the table of this test: give it one"
    for name in imports(ast.walk(tree)):
        top = name.partition(".")[0]
        if name in ("lcx", "lcx.__version__"):
            pass  # the facade imports nothing until it is asked
        elif name == "lcx.config" and is_command:
            pass  # which itself imports nothing but errors
        elif top in ("lcx", "kernels_pallas"):
            ours = unit(name)
            assert ours in LEVEL, f"{file} imports {name}, which has no row in the table"
            assert LEVEL[ours] <= LEVEL[own], f"{file} must not import {name}: the arrows point down"
        elif top in OWNERS:
            assert file.startswith(OWNERS[top] or ("-",)), f"{file} imports {top}, only {OWNERS[top]} may"
        elif file.startswith(ONLY_JAX) and top not in sys.stdlib_module_names:
            assert top in ("jax", "numpy", "jaxtyping"), (
                f"{file} imports {top}: rope, ops and kernels know jax only"
            )
    at_top = {name.partition(".")[0] for name in imports(tree.body)}
    assert not at_top & INSIDE_FUNCTIONS, f"{file}: import {at_top & INSIDE_FUNCTIONS} where it is used"


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
    assert circles(graph()) == sorted(KNOWN_CIRCLES), (
        "modules import each other: what they share belongs below them"
    )


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{path} has more than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                assert node.end_lineno - first.lineno < 50, f"{path}: {node.name} has more than 50 lines"


def test_help_comes_before_jax():
    verbs = [f"lcx.{name}" for name in ("train", "evaluate", "generate", "convert.__main__")]
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
