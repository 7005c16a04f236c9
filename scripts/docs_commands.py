"""Generates two pages of docs/reference from the code that they describe, so that they cannot become outdated.

commands.md is generated from the parsers of the commands, configs.md from the headers of the files in configs/.

    python scripts/docs_commands.py
"""

import argparse
import importlib
import inspect
import pathlib
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = ("train", "evaluate", "generate", "convert", "data", "report")
HEADER = """# Command lines

This page is written by `python scripts/docs_commands.py` from the commands' own parsers; `--help` shows the same text.
Commands exit with 0 when they did what was asked, with 2 and one line on stderr when the input is wrong, with 130
after Ctrl-C. [Write a configuration](../how-to/configure.md) explains `--gin_file` and `--gin.NAME=VALUE`.
"""


class Captured(Exception):
    def __init__(self, parser: argparse.ArgumentParser, parsed: argparse.Namespace | None = None):
        self.parser, self.parsed = parser, parsed


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that `python -m lcx.<command>` builds, intercepted when it parses."""
    name = f"lcx.{command}"
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")

    def parse_known_args(self, args=None, namespace=None):
        raise Captured(self)

    original, argv = argparse.ArgumentParser.parse_known_args, sys.argv
    argparse.ArgumentParser.parse_known_args, sys.argv = parse_known_args, [name]
    try:
        module.main()
    except Captured as caught:
        return caught.parser
    finally:
        argparse.ArgumentParser.parse_known_args, sys.argv = original, argv
    raise RuntimeError(f"{name} parses no arguments")


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return "|".join(map(str, action.choices))
    value = str(action.metavar or action.dest.upper())
    return f"{value} ..." if action.nargs in ("+", "*") else value


def section(command: str) -> str:
    parser = parser_of(command)
    lines = [f"\n## python -m lcx.{command}\n", _description(parser.description or ""), ""]
    lines += ["| flag | value | |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest == "help":
            continue
        flag = ", ".join(f"`{name}`" for name in action.option_strings)
        text = " ".join((action.help or "").split()).replace("|", "\\|")
        required = " (required)" if action.required else ""
        value = _value(action).replace("|", "\\|")
        lines.append(f"| {flag}{required} | {value} | {text} |")
    return "\n".join(lines) + "\n"


def _description(text: str) -> str:
    """The description of a parser as Markdown: indented examples become code blocks with the text of --help."""
    out: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.split("\n")
        prose = [line for line in lines if not line.startswith("  ")]
        code = [line[2:] for line in lines if line.startswith("  ")]
        out.append("\n".join(prose))
        if code:
            out.append("\n".join(["```text", *code, "```"]))
    return "\n\n".join(out)


def page(commands: Sequence[str] = COMMANDS) -> str:
    return HEADER + "".join(section(command) for command in commands)


CONFIGS_HEADER = """# Configurations

The recipes in `configs/`; this page is written by `python scripts/docs_commands.py` from their first lines. Each file
begins with what it does, on which hardware, how long it takes, what to expect, and its command.
[Write a configuration](../how-to/configure.md) explains how to change them.
"""
FOLDERS = {
    "": "Start",
    "extend": "Extend",
    "linearize": "Linearize",
    "pretrain": "Pretrain",
    "pretrain/genome": "Pretrain: StripedHyena 2 and a Llama on a genome",
    "pretrain/two_mamba": "Pretrain: the models of the 2Mamba paper",
    "pretrain/two_mamba/sizes": "Pretrain: the sizes of the 2Mamba paper, to be included",
    "eval": "Evaluate",
    "models": "Models, to be included",
    "data": "Data, to be included",
}


def configs_page() -> str:
    """A table of each folder of configs/: a file, and the first line of its header."""
    lines = [CONFIGS_HEADER]
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "configs").rglob("*.gin")):
        name = path.relative_to(ROOT / "configs")
        title = path.read_text().splitlines()[0].lstrip("# ").rstrip(".")
        folder = name.parent.as_posix().removeprefix(".")
        found.setdefault(folder, []).append(f"| `configs/{name.as_posix()}` | {title} |")
    for folder in sorted(
        found, key=lambda name: list(FOLDERS).index(name) if name in FOLDERS else len(FOLDERS)
    ):
        lines += [
            f"## {FOLDERS.get(folder, folder)}\n",
            "| file | what it does |",
            "|---|---|",
            *found[folder],
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


PAGES = {
    ROOT / "docs" / "reference" / "commands.md": page,
    ROOT / "docs" / "reference" / "configs.md": configs_page,
}

if __name__ == "__main__":
    for path, write in PAGES.items():
        path.write_text(write())
