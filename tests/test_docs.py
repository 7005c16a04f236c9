"""The documentation is true: its commands run, its snippets of Python run, its flags and configurations exist.

A block of commands with `<!-- needs: a GPU -->` (or other hardware that a test does not have) before it is not run, nor
is one with `<!-- tested: tests/FILE.py::NAME -->`, which that test does at small size. The command's own parser still
reads its flags, and its configuration is read and built. The README's commands are checked that way as well: the pages
run the same ones.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import itertools
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import doc_scripts
import doc_world
import pytest
from doc_pages import PAGES, README, ROOT, Block, blocks

from lcx import config
from lcx.checkpoint import model_json
from lcx.config import processes
from lcx.trainer import Trainer

sys.path.insert(0, str(ROOT / "scripts"))
import docs_commands

VERBS = docs_commands.COMMANDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: a clone of the repository, as far as they name its files."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "scripts", "benchmarks", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def world(folder):
    """The folder with what /path/to/... names in it."""
    doc_world.make(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("LCX_CACHE", str(folder / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # a benchmark has one process less (test_workers.py)


def main_of(verb: str):
    assert verb in VERBS, f"there is no command lcx.{verb}"
    module = importlib.import_module(f"lcx.{verb}")
    return (module if hasattr(module, "main") else importlib.import_module(f"lcx.{verb}.__main__")).main


def call(verb: str, words: list[str]) -> int:
    main = main_of(verb)
    with pytest.MonkeyPatch.context() as patch:
        if verb in ("generate", "convert"):  # as in a new process: no module of the page is imported
            here = str(pathlib.Path.cwd().resolve())
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(f"{here}/"):
                    patch.delitem(sys.modules, name)
        if inspect.signature(main).parameters:
            return main(words)
        patch.setattr(sys, "argv", [verb, *words])  # a main that reads sys.argv
        return main()


# ------------------------------------------------------------------------------------------------ check without running


def read_only(function, source, flags) -> int:
    """In the place of config._call: everything up to the call of the target."""
    configured = config._imported(source.target)
    inspect.signature(function).bind(**config._arguments(function, flags.own, configured))
    return 0


class Parsed(Exception):
    """Raised in the place of what follows a command line that parses."""


def parse_only(self, args=None, namespace=None, original=argparse.ArgumentParser.parse_known_args):
    parsed, unknown = original(self, args, namespace)
    if unknown:
        raise AssertionError(f"unknown flag {unknown[0]!r}")
    raise Parsed


def check(words: list[str], monkeypatch) -> None:
    """Raises unless a command and its flags exist, and what it configures can be built."""
    if words[:2] == ["python", "-m"] and words[2].startswith("lcx."):
        verb = words[2].removeprefix("lcx.")
        monkeypatch.setattr(config, "_call", read_only)
        for name in ("begin", "join"):
            monkeypatch.setattr(processes, name, lambda flags: None)  # the others are not there
        if verb == "data":
            monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
            with pytest.raises(Parsed):
                call(verb, words[3:])
        else:
            assert call(verb, words[3:]) == 0
    elif words[0] == "python" and words[1].endswith(".py"):
        check_script(words, monkeypatch)
    elif words[0] == "bash" or words[0].endswith(".sh"):
        script, *given = words[words[0] == "bash" :]
        flags = [word.partition("=")[0] for word in itertools.takewhile("--".__ne__, given) if word.startswith("--")]
        text = (ROOT / script).read_text()
        unknown = [flag for flag in flags if flag not in text]
        assert not unknown, f"{script} has no flag {unknown}"
    elif "pip" in words:
        check_install(words)
    else:
        check_tool(words)


def check_script(words: list[str], monkeypatch) -> None:
    path = ROOT / words[1]
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    if "ArgumentParser" in path.read_text():
        with pytest.raises(Parsed):
            script.main()
    else:
        assert len(words) == 2, f"{words[1]} takes no arguments"


def check_install(words: list[str]) -> None:
    extras = set(re.findall(r"[\w-]+", "".join(re.findall(r"\[(.+?)\]", " ".join(words)))))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras <= known.keys(), f"no extra {extras - known.keys()}"


def check_tool(words: list[str]) -> None:
    """Commands of others that a page shows."""
    known = ("mkdocs", "wandb", "tensorboard", "cat", "ls", "tail", "jupyter", "cd", "git", "ulimit", "pip")
    clusters = ("srun", "sbatch", "docker", "kubectl")
    assert words[0] in known + clusters, f"no check for {words[0]!r}"


# ------------------------------------------------------------------------------------------------ run


def run(block: Block, world: pathlib.Path, monkeypatch) -> None:
    """Runs a block's commands at toy size; what is no command of lcx is checked."""
    for words in block.commands():
        if words[:2] == ["python", "-m"] and words[2].startswith("lcx."):
            verb = words[2].removeprefix("lcx.")
            small = doc_world.small(verb, words[3:], world)
            if verb == "train" and copied(small):
                with monkeypatch.context() as patch:
                    check(words, patch)
                continue
            with monkeypatch.context() as patch:
                if verb == "evaluate":  # its pictures cost more than its numbers; `lcx.report` draws them
                    patch.setattr("lcx.reporting.report.build", lambda **_: None)
                patch.setattr(Trainer, "held_out_loss", held_out_loss)
                status = call(verb, small)
            assert status in ((0, 1) if verb == "data" else (0,)), words
        elif words[0] == "bash":
            run_script(words, world, monkeypatch)
        elif doc_scripts.small(words) is not None:
            run_python(words, monkeypatch)
        else:
            with monkeypatch.context() as patch:
                check(words, patch)


def held_out_loss(self, model, state, mesh, original=Trainer.held_out_loss) -> float | None:
    """The first run of each objective is evaluated at its end; every other one would compile a program more for it."""
    name = model_json.to_json(self.objective)
    if str(name) in EVALUATED:
        return 0.0
    EVALUATED.add(str(name))
    return original(self, model, state, mesh)


def run_python(words: list[str], monkeypatch) -> None:
    """`python FILE FLAGS` in this process, at toy size."""
    small = doc_scripts.small(words)
    assert small is not None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", small[1:])
        patch.syspath_prepend(str((ROOT / small[1]).parent))
        runpy.run_path(str(ROOT / small[1]), run_name="__main__")


def run_script(words: list[str], world: pathlib.Path, monkeypatch) -> None:
    """What a shell script does, in this process: one command of each kind at toy size, the others are checked."""
    with monkeypatch.context() as patch:
        check(words, patch)
    for command in doc_scripts.commands_of(words, world):
        kind, small = (words[1], doc_scripts.kind(command)), doc_scripts.small(command)
        if kind in DONE or small is None:
            with monkeypatch.context() as patch:
                check(small or command, patch)
        elif command[:2] == ["python", "-m"]:
            verb = command[2].removeprefix("lcx.")
            assert call(verb, doc_world.small(verb, small[3:], world)) == 0, command
        else:
            run_python(command, monkeypatch)
        DONE.add(kind)


EVALUATED: set[str] = set()
DONE: set[tuple[str, str]] = set()  # (script, kind of command)
TRAINED: dict[tuple[str, ...], str] = {}


def copied(words: list[str]) -> bool:
    """Whether an equal run was done before, at toy size, and its workdir stands for this one's."""
    settings = dict(word.partition("=")[::2] for word in words if not word.startswith("--gin_file="))
    workdir = settings.pop("--workdir")
    files = [word for word in words if word.startswith("--gin_file=")]
    key = (*files, *(f"{name}={value}" for name, value in sorted(settings.items())))
    if pathlib.Path(workdir).exists():  # a resumed run is no equal run
        return False
    done = pathlib.Path(TRAINED.setdefault(key, workdir))
    if str(done) == workdir or not done.exists():
        return False
    shutil.copytree(done, workdir)
    return True


def execute(block: Block, names: dict, world: pathlib.Path) -> None:
    text = block.text.replace("/path/to/", f"{world}/path/to/")
    exec(compile("\n" * block.line + text, block.page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_a_page_does_what_it_says(page, world, monkeypatch):
    names: dict = {"__name__": page.stem}
    for block in blocks(page):
        try:
            if block.title is not None:
                pathlib.Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                pathlib.Path(block.title).write_text(block.text.replace("/path/to/", f"{world}/path/to/"))
            elif block.language == "python":
                compile(block.text, block.place, "exec")
                if block.runs:
                    execute(block, names, world)
            elif block.language == "bash" and block.runs:
                run(block, world, monkeypatch)
            elif block.language == "bash":
                for words in block.commands():
                    with monkeypatch.context() as patch:
                        check(words, patch)
        except BaseException as error:
            error.add_note(f"in {block.place}")
            raise


HARDWARE = re.compile(r"\b(GPUs?|TPUs?|hosts|Kubernetes cluster)\b")
# What a test that stands for a command has in its file.
EVIDENCE = {"train": "train", "evaluate": "eval", "convert": "convert", "serve": "serving", "plan": "plan"}
MARKED = [block for page in PAGES for block in blocks(page) if not block.runs]


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.place)
def test_what_is_not_run_needs_hardware_or_has_a_test(block):
    if block.needs is not None:
        assert HARDWARE.search(block.needs), f"{block.place}: {block.needs!r} is no hardware"
        return
    file, _, name = block.tested.partition("::")
    text = (ROOT / file).read_text()
    assert re.search(rf"^def {name}\(", text, re.M), f"{block.place}: {file} has no test {name}"
    for words in block.commands() if block.language == "bash" else ():
        if words[0] == "python" or words[0] == "bash":
            own = words[2].removeprefix("lcx.") if words[1] == "-m" else pathlib.Path(words[1]).stem
            assert EVIDENCE.get(own, own) in text, f"{block.place}: {file} does not mention {own}"


def test_readme_names_what_exists(monkeypatch):
    for block in blocks(README):
        for words in block.commands() if block.language == "bash" else ():
            with monkeypatch.context() as patch:
                try:
                    check(words, patch)
                except BaseException as error:
                    error.add_note(f"in {block.place}: {' '.join(words)}")
                    raise


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)", README.read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    "words",
    [
        "python -m lcx.train --gin_file=configs/extend/yarn.gin --workdri=w",
        "python -m lcx.train --gin_file=configs/extend/yran.gin --workdir=w",
        "python -m lcx.train --gin_file=configs/quickstart.gin --workdir=w --gin.Trainer.stesp=3",
        "python -m lcx.nothing --help",
        "python benchmarks/train_step.py --no_such_flag",
        "bash scripts/no_such_script.sh",
        "bash scripts/reproduce_linearize.sh --no_such_flag=3",
        "pip install -e .[no_such_extra]",
        "sudo anything",
    ],
)
def test_a_command_that_does_not_exist_is_found(words, monkeypatch, capsys):
    import shlex

    with pytest.raises((AssertionError, SystemExit, OSError)):
        check(shlex.split(words), monkeypatch)


@pytest.mark.parametrize("path", docs_commands.PAGES, ids=lambda path: path.stem)
def test_a_written_page_is_up_to_date(path):
    assert path.read_text() == docs_commands.PAGES[path](), "run python scripts/docs_commands.py"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) == len(PAGES)
    fetched = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?://')
    assert not [page for page in pages if fetched.search(page.read_text())], "a page loads from another site"
    shutil.rmtree(tmp_path / "site")
