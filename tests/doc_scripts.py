"""The commands of the shell scripts that the documentation shows, and of Python scripts, each at toy size."""

from __future__ import annotations

import os
import pathlib
import subprocess

from doc_pages import ROOT

# Flags that make a script small, after those of the page; None: it is checked, not run, with what runs its parts.
SMALL: dict[str, list[str] | None] = {
    "scripts/recall_text.py": ["--documents=60"],
    "scripts/recall_start.py": [],
    "scripts/recall_study.py": None,  # minutes: fourteen trainings and evaluations
    "benchmarks/two_mamba_study.py recall": [],
    "benchmarks/two_mamba_study.py table": None,  # tests/test_two_mamba_study.py
    **dict.fromkeys(f"benchmarks/two_mamba_ablations.py {what}" for what in ("runs", "figures", "table")),  # there too
    "benchmarks/linearized.py": None,  # decodes 16K tokens
    "benchmarks/train_vs_transformers.py": ["--cases=quickstart:16", "--dtypes=float32", "--rounds=1", "--no-memory"],
}


# In the place of python: writes its arguments down, and makes the folder of a run, in which a script may leave a mark.
_STAND_IN = """#!/bin/bash
printf '%s\\0' python "$@" >> {log}
echo >> {log}
for word in "$@"; do case "$word" in --workdir=*) mkdir -p "${{word#*=}}" ;; esac; done
"""


def commands_of(words: list[str], folder: pathlib.Path) -> list[list[str]]:
    """The commands of lcx and the Python files that a script runs, in order, if none of their outputs is there yet.

    Args:
      words: the script and its flags.
      folder: where the page's commands run; it has the repository's scripts/.
    """
    place = folder / "script"
    (place / "bin").mkdir(parents=True, exist_ok=True)
    (place / "scripts").mkdir(exist_ok=True)
    log = place / "log"
    log.unlink(missing_ok=True)
    (place / "bin" / "python").write_text(_STAND_IN.format(log=log))
    (place / "bin" / "python").chmod(0o755)
    here = f'use_venv() {{ cd "{folder}"; export PATH="{place}/bin:$PATH"; }}\n'  # without an environment of its own
    (place / "scripts" / "_env.sh").write_text((ROOT / "scripts" / "_env.sh").read_text() + here)
    script = place / "scripts" / pathlib.Path(words[1]).name
    script.write_text((ROOT / words[1]).read_text())
    given = [word.replace("/path/to/", f"{folder}/path/to/") for word in words[2:]]
    env = os.environ | {"LCX_REFERENCE": str(folder / "path" / "to" / "reference")}
    done = subprocess.run(["bash", str(script), *given], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = log.read_text().replace(f"{folder}/path/to/", "/path/to/")  # as on the page
    commands = [line.split("\0")[:-1] for line in said.splitlines()]
    return [command for command in commands if _of_lcx(*command[1:3])]


def _of_lcx(first: str = "", second: str = "") -> bool:
    return first.endswith(".py") or (first == "-m" and second.startswith("lcx."))


def kind(command: list[str]) -> str:
    """The command of lcx or the script that is run."""
    return command[2] if command[1] == "-m" else _script(command)


def small(command: list[str]) -> list[str] | None:
    """The command with flags that make it small; None if it is to be checked only, or is not known."""
    if command[2:3] == ["lcx.report"]:  # of what the script has made, some of which is only checked here
        return None
    if command[1] == "-m":
        return [*command, "--gin.Recall.rows=4"] if any("--evals=recall" in word for word in command) else command
    flags = SMALL.get(_script(command))
    return None if flags is None else [*command, *flags]


def _script(command: list[str]) -> str:
    """The script, and what it is to do, if that comes first."""
    task = [] if command[2:3] == [] or command[2].startswith("-") else command[2:3]
    return " ".join([command[1], *task])
