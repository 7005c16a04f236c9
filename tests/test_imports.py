"""Who may import whom, read from the source: the arrows point down this table, never up."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [  # a module imports from its own row and the rows below
    "train evaluate generate __init__",
    "config",
    "blockwise ladder evaluator terminal report trainer",
    "evals",
    "evals.support",
    "training convert sampler",
    "objectives optim checkpoint data lora",
    "data.readers",
    "extend linearize",
    "llama striped_hyena",
    "model",
    "block parameters mixers mlps",
    "ops rope layers sharding remat",
    "kernels_pallas rope_fields hub",
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
}
FILES = sorted([*ROOT.glob("lcx/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")])


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
