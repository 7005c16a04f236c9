"""Command lines: flags, .gin files, every mistake in one line, exit statuses."""

import dataclasses
import functools
import inspect
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import toy_job

from lcx import config

TESTS = pathlib.Path(__file__).parent
HEAD = "from __gin__ import dynamic_registration\nimport toy_job\n"
TARGET = "toy_job:train"


class Net(nn.Module):
    """A module is its configuration: built by gin it must be what it would be without gin."""

    features: int
    inner: nn.Module | None = None
    scale: float = 1.0
    widths: tuple[int, ...] = ()
    activation: Callable = nn.silu

    @nn.compact
    def __call__(self, x):
        y = self.activation(nn.Dense(self.features)(x)) * self.scale
        return y if self.inner is None else self.inner(y)


def start(*, net: nn.Module):
    toy_job.CALLS.append({"net": net})


@pytest.fixture
def gin_file(tmp_path, monkeypatch):
    """Writes .gin files to the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    toy_job.CALLS.clear()
    toy_job.TEXTS.clear()

    def write(text, name="a.gin", head=HEAD):
        (tmp_path / name).write_text(head + text)
        return f"--gin_file={name}"

    return write


def run(*argv, target=TARGET):
    parser = config.parser("A toy.")
    if target == TARGET:
        parser.add_argument("--workdir", required=True)
        parser.add_argument("--seed", type=int)
        parser.add_argument("--folder", metavar="FOLDER")
        argv = (*argv, "--workdir=w")
    else:
        parser.add_argument("--kind")
        parser.add_argument("--status", type=int)
    return config.run(parser, target, argv)


def job(*argv):
    assert run(*argv) == 0
    return toy_job.CALLS[-1]["job"]


def errors(capsys, *argv, **kwargs):
    assert run(*argv, **kwargs) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("config error: ", "error: ")) for line in lines)
    return [line.removeprefix("config error: ") for line in lines]


BASE = """
toy_job.train.job = @toy_job.Job()
toy_job.Job:
  name = 'base'
  steps = %STEPS
  sizes = [1, 2]
  optimizer = @toy_job.Optimizer()
toy_job.Optimizer.learning_rate = 1
toy_job.Optimizer.betas = %BETAS
STEPS = 100
BETAS = [0.5, 1]
"""
BUILT = toy_job.Job(
    name="base", steps=100, sizes=(1, 2), optimizer=toy_job.Optimizer(learning_rate=1.0, betas=(0.5, 1.0))
)


def test_objects_are_what_they_would_be_without_gin(gin_file):
    built = job(gin_file(BASE))
    assert built == BUILT and hash(built) == hash(BUILT)
    assert type(built) is toy_job.Job and type(built.optimizer) is toy_job.Optimizer
    assert type(built.optimizer.learning_rate) is float and type(built.optimizer.betas[1]) is float


@pytest.mark.parametrize(
    "flags, changed",
    [
        (["--gin.toy_job.Job.steps=7"], {"steps": 7}),
        (["--gin.Job.steps=7"], {"steps": 7}),
        (["--gin.Job.steps = 7"], {"steps": 7}),
        (["--gin.STEPS=7"], {"steps": 7}),
        (["--gin.Job.steps=6", "--gin.Job.steps=7"], {"steps": 7}),
        (["--gin.Job.name='x = y'"], {"name": "x = y"}),
        (["--gin.Job.sizes=[]", "--gin.Job.labels=['a']"], {"sizes": (), "labels": ("a",)}),
        (["--gin.Job.optimizer=None", "--gin.Job.verbose=True"], {"optimizer": None, "verbose": True}),
        (["--gin.Job.optimizer=@toy_job.make_optimizer()"], {"optimizer": toy_job.Optimizer(0.1)}),
        (["--gin.Job.optimizer=@toy_job.make_optimizer()", "--gin.make_optimizer.scale=20"],
         {"optimizer": toy_job.Optimizer(2.0)}),
        (["--gin.Job.stages=(@Optimizer(), @b/Optimizer())", "--gin.b/Optimizer.learning_rate=3",
          "--gin.Job.optimizer=None"],
         {"stages": (toy_job.Optimizer(1.0, (0.5, 1.0)), toy_job.Optimizer(3.0, (0.5, 1.0))), "optimizer": None}),
    ],
)  # fmt: skip
def test_flags_win_over_files_under_any_unambiguous_name(gin_file, flags, changed):
    assert job(gin_file(BASE), *flags) == dataclasses.replace(BUILT, **changed)


def test_a_function_can_be_a_value(gin_file):
    built = job(gin_file(BASE), "--gin.Job.activation=@toy_job.power", "--gin.power.exponent=3")
    assert built.activation(2.0) == 8.0 and inspect.unwrap(built.activation) is toy_job.power


def test_flags_alone_are_enough(gin_file):
    built = job("--gin.train.job=@toy_job.Job()", "--gin.Job.name='alone'")
    assert built == toy_job.Job(name="alone")


def test_later_files_and_including_files_win(gin_file):
    gin_file(BASE, "base.gin")
    first = gin_file("include 'base.gin'\ntoy_job.Job.steps = 1\ntoy_job.Job.name = 'first'\n", "first.gin")
    second = gin_file("toy_job.Job.steps = 2\n", "second.gin")
    assert job(first, second) == dataclasses.replace(BUILT, steps=2, name="first")


def test_includes_are_looked_up_beside_the_file(gin_file, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    gin_file(BASE, "models/base.gin")
    gin_file("include 'base.gin'", "models/top.gin")
    monkeypatch.chdir("/")
    assert job(f"--gin_file={tmp_path}/models/top.gin") == BUILT


def test_a_flag_that_is_not_given_leaves_the_binding_or_the_default(gin_file, capsys):
    file = gin_file(BASE + "toy_job.train.seed = 5\n")
    assert run(file) == 0 and toy_job.CALLS[-1]["seed"] == 5
    assert run(file, "--seed=6") == 0 and toy_job.CALLS[-1]["seed"] == 6
    assert "toy_job.train.seed had no effect: --seed was given (a.gin:14)" in capsys.readouterr().err
    assert run(gin_file(BASE)) == 0 and toy_job.CALLS[-1]["seed"] == 0


def test_linen_modules(gin_file):
    text = """
test_config.start.net = @test_config.Net()
test_config.Net:
  features = 4
  widths = [8, 16]
  inner = @small/test_config.Net()
small/test_config.Net:
  features = 2
  inner = None
  scale = 3
"""
    head = "from __gin__ import dynamic_registration\nimport test_config\n"
    assert run(gin_file(text, head=head), target=f"{__name__}:start") == 0
    net = toy_job.CALLS[-1]["net"]
    direct = Net(features=4, widths=(8, 16), inner=Net(features=2, widths=(8, 16), scale=3.0))
    assert type(net) is Net and type(net.inner) is Net
    assert net == direct and hash(net) == hash(direct)
    x = jnp.ones((1, 3))
    params, expected = net.init(jax.random.key(0), x), direct.init(jax.random.key(0), x)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    same = functools.partial(jax.tree.map, lambda a, b: bool((a == b).all()))
    assert all(jax.tree.leaves(same(params, expected)))
    assert (net.apply(params, x) == direct.apply(expected, x)).all()


MISTAKES = [
    ("toy_job.Job.stepz = 3", "Job has no parameter 'stepz'; did you mean steps? (a.gin:3)"),
    ("toy_job.Jop.steps = 3", "toy_job has no 'Jop'; did you mean Job? (a.gin:3)"),
    ("toyjob.Job.steps = 3", "'toyjob' is not imported in this file; did you mean toy_job? (a.gin:3)"),
    ("trainer.Trainer.steps = 3",
     "'trainer' is not imported in this file; import it, as in `from lcx import trainer` (a.gin:3)"),
    ("Job.steps = 3", "'Job': write its module too, as in toy_job.Job (a.gin:3)"),
    ("toy_job.Job.steps = 'five'", "toy_job.Job.steps: expected int, found 'five' (str) (a.gin:3)"),
    ("toy_job.Job.steps = 2.5", "toy_job.Job.steps: expected int, found 2.5 (float) (a.gin:3)"),
    ("toy_job.Job.steps = 1e3", "toy_job.Job.steps: expected int, found 1000.0: write 1000 (a.gin:3)"),
    ("toy_job.Job.steps = True", "toy_job.Job.steps: expected int, found True (bool) (a.gin:3)"),
    ("toy_job.Job.verbose = 1", "toy_job.Job.verbose: expected bool, found 1 (int) (a.gin:3)"),
    ("toy_job.Job.name = 1", "toy_job.Job.name: expected str, found 1 (int) (a.gin:3)"),
    ("toy_job.Job.mode = 'fats'", "toy_job.Job.mode: expected 'fast' or 'slow', found 'fats' (str) (a.gin:3)"),
    ("toy_job.Job.sizes = (1, 2.5)", "toy_job.Job.sizes: expected int, found 2.5 (float) (a.gin:3)"),
    ("toy_job.Job.sizes = 3", "toy_job.Job.sizes: expected tuple[int, ...], found 3 (int) (a.gin:3)"),
    ("toy_job.Optimizer.betas = (1.0,)",
     "toy_job.Optimizer.betas: expected tuple[float, float], found 1 value (a.gin:3)"),
    ("toy_job.Job.sizes = %S\nS = 'a'", "toy_job.Job.sizes: expected tuple[int, ...], found 'a' (str) (a.gin:3)"),
    ("toy_job.Job.optimizer = {'learning_rate': 1.0}",
     "toy_job.Job.optimizer: expected Optimizer | None, found {'learning_rate': 1.0} (dict) (a.gin:3)"),
    ("toy_job.train.job = @toy_job.Job",
     "toy_job.train.job: expected Job, found the class Job itself: write @Job() to call it (a.gin:3)"),
    ("toy_job.train.job = @toy_job.make_optimizer()",
     "toy_job.train.job: expected Job, found @make_optimizer(), a Optimizer (a.gin:3)"),
    ("toy_job.Job.stages = [@toy_job.Optimizer(), @toy_job.Job()]",
     "toy_job.Job.stages: expected Optimizer, found @Job(), a Job (a.gin:3)"),
    ("toy_job.Job.activation = 'relu'",
     "toy_job.Job.activation: expected a function | None, found 'relu' (str) (a.gin:3)"),
    ("toy_job.train.job = @toy_job.Jop()", "toy_job has no 'Jop'; did you mean Job? (a.gin:3)"),
    ("toy_job.Job.steps = %STEP\nSTEPS = 3", "macro %STEP is not defined; did you mean STEPS? (a.gin:3)"),
    ("A = %B\nB = %A\ntoy_job.Job.steps = %A", "macro %A is defined by itself (a.gin:3 and 1 more)"),
    ("toy_job.Job.steps = %gin.REQUIRED", "toy_job.Job.steps must be set (a.gin:3)"),
    ("toy_job.Job.name = abc",
     "abc is not a value; write 'abc' for text, %abc for a macro, @module.abc to refer (a.gin:3)"),
    (f"toy_job.Job.steps = {'-' * 200}1",
     f"{'-' * 97}... is not a value; write '{'-' * 97}...' for text (a.gin:3)"),
    ("toy_job.Job.verbose = true", "true is not a value; write True (a.gin:3)"),
    ("toy_job.Job.steps = 2*3",
     "2*3 is not one value: expected one value or import per line and nothing after it; gin has no arithmetic or "
     "units, write the result (a.gin:3)"),
    ("toy_job.Job.steps = 2\ntoy_job.Job.sizes = [1,\n  2\nX = 3\n", "(a.gin:"),
    ("\ntoy_job.Job.sizes = (1, 2\n", "a bracket or quote is never closed (a.gin:4)"),
    ("import toy_jop", "no module named 'toy_jop'; did you mean toy_job? (a.gin:3)"),
    ("from lcx import objectvies", "no module named 'lcx.objectvies'; did you mean objectives? (a.gin:3)"),
    ("from toy_job import Job", "toy_job.Job is not a module; write `import toy_job` and use toy_job.Job (a.gin:3)"),
    ("include 'elsewhere/configs/x.gin'", "elsewhere/configs/x.gin does not exist, neither beside a.gin nor in the "
     "working folder: write the whole path (a.gin:3)"),
    ("include 'confgiuration.gin'", "confgiuration.gin does not exist; did you mean configuration.gin? (a.gin:3)"),
    ("include 'a.gin'", "include cycle: a.gin -> a.gin (a.gin:3)"),
    ("include 'cycle.gin'", "include cycle: a.gin -> cycle.gin -> a.gin (cycle.gin:3)"),
    ("include 'folder'", "folder is a folder, expected a .gin file (a.gin:3)"),
    ("include 'bytes.gin'", "not a text file (bytes.gin)"),
    ("toy_job.Job:\n  stepz = 3\n  steps = 'a'\n", "Job has no parameter 'stepz'; did you mean steps? (a.gin:4)"),
    ("from __gin__ import dynamic", "only `from __gin__ import dynamic_registration` exists (a.gin:3)"),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", MISTAKES, ids=[text.partition("\n")[0] for text, _ in MISTAKES])
def test_a_mistake_is_one_line_with_its_place(gin_file, capsys, tmp_path, text, expected):
    gin_file(BASE, "configuration.gin")
    gin_file("include 'a.gin'\n", "cycle.gin")
    (tmp_path / "folder").mkdir()
    (tmp_path / "confgiuration").mkdir()  # no .gin file, so that it is not proposed
    (tmp_path / "bytes.gin").write_bytes(b"\xff\xfe\x00")
    found = errors(capsys, gin_file(text))
    assert any(line == expected or (line.endswith(")") and expected in line) for line in found), found
    assert toy_job.CALLS == []


def test_all_mistakes_at_once(gin_file, capsys):
    text = "toy_job.Job.stepz = 3\ntoy_job.Jop.x = 1\ntoy_job.Job.steps = 'five'\ntoy_job.Job.name = %NAME\n"
    found = errors(capsys, gin_file(text), "--gin.Job.verbos=True", "--gin.Job.mode=1")
    assert [line.rpartition("(")[2] for line in found] == [
        "a.gin:3)",
        "a.gin:4)",
        "--gin.Job.verbos)",
        "a.gin:5)",
        "a.gin:6)",
        "--gin.Job.mode)",
    ]


def test_a_repeated_mistake_is_reported_once(gin_file, capsys):
    (line,) = errors(capsys, gin_file("toi.A.b = 1\ntoi.A.c = 1\ntoi.A.d = 1\n"))
    assert line.startswith("'toi' is not imported") and line.endswith("(a.gin:3 and 2 more)")


FLAG_MISTAKES = [
    ("--gin.Job.stepz=3", "Job has no parameter 'stepz'; did you mean steps? (--gin.Job.stepz)"),
    ("--gin.Jop.steps=3", "nothing is called 'Jop'; did you mean Job? (--gin.Jop.steps)"),
    ("--gin.Job.optimizer=@UserError()",  # which no test names in a .gin file
     "nothing is called 'UserError'; write its module too, as in lcx.errors.UserError (--gin.Job.optimizer)"),
    ("--gin.Job.optimizer=@os.path()",
     "'os.path' cannot be configured: it is a module, expected a function or class (--gin.Job.optimizer)"),
    ("--gin.STEP=3", "no .gin file has a macro STEP; did you mean STEPS? (--gin.STEP)"),
    ("--gin.Job.steps=2.5", "toy_job.Job.steps: expected int, found 2.5 (float) (--gin.Job.steps)"),
    ("--gin.Job.name=abc", """abc is not a value; write --gin.Job.name="'abc'" for text, %abc for a macro, """
     "@module.abc to refer (--gin.Job.name)"),
    ("--gin.Job.name=my/model-8b", """my/model-8b is not a value; write --gin.Job.name="'my/model-8b'" for text """
     "(--gin.Job.name)"),
    ("--gin.Job.name=/tmp/a b", """/tmp/a b is not a value; write --gin.Job.name="'/tmp/a b'" for text """
     "(--gin.Job.name)"),
    ("--gin.Job.steps=" + 3000 * "(", "a value is nested too deeply to read (--gin.Job.steps)"),
    ("--gin.Job.sizes=[1,2", "a bracket or quote is never closed (--gin.Job.sizes)"),
    ("--gin.Job.steps", "error: --gin.Job.steps: expected --gin.NAME=VALUE (--help explains the flags)"),
    (r"--gin.Job.name='a\0b'",
     r"toy_job.Job.name: expected text without the character NUL, found 'a\x00b' (--gin.Job.name)"),
    ("--seed=\0", r"error: '--seed=\x00' contains the character NUL: remove it (--help explains the flags)"),
    ("--gin_file=/dev/null", "/dev/null is a device or a pipe, expected a .gin file (--gin_file)"),
    ("--gin_file=b.gin", "b.gin does not exist; did you mean a.gin? (--gin_file)"),
    ("--folder= ",
     "error: --folder is empty, expected a folder: set --folder, or leave it out (--help explains the flags)"),
    ("--sed=3", "error: unknown argument '--sed=3'; did you mean --seed? (--help explains the flags)"),
    ("--seed=x", "error: argument --seed: invalid int value: 'x' (--help explains the flags)"),
]  # fmt: skip


@pytest.mark.parametrize("flag, expected", FLAG_MISTAKES, ids=[repr(flag) for flag, _ in FLAG_MISTAKES])
def test_a_mistaken_flag_is_one_line(gin_file, capsys, flag, expected):
    assert errors(capsys, gin_file(BASE), flag) == [expected]


def test_a_failed_import_is_reported_once(gin_file, capsys, tmp_path, monkeypatch):
    (tmp_path / "toy_broken.py").write_text("import not_installed\n")
    (tmp_path / "toy_stale.py").write_text("from toy_job import Jobs\n")
    monkeypatch.syspath_prepend(tmp_path)
    uses = "toy_job.train.job = @toy_broken.make()\ntoy_broken.make.size = 1\ntoy_stale.make.size = 1\n"
    found = errors(capsys, gin_file("import toy_broken\nimport toy_stale\n" + uses))
    assert found[0] == "importing toy_broken failed: No module named 'not_installed' (a.gin:3)"
    assert found[1].startswith("importing toy_stale failed: cannot import name 'Jobs' from 'toy_job'")
    assert len(found) == 2
    assert errors(capsys, gin_file(BASE), "--gin.Job.optimizer=@toy_broken.make()") == [
        "'toy_broken.make' cannot be configured: importing toy_broken failed: No module named 'not_installed' "
        "(--gin.Job.optimizer)"
    ]


def test_an_ambiguous_name_asks_for_more_of_it(gin_file, capsys, tmp_path, monkeypatch):
    for name in ("toy_one", "toy_two"):
        (tmp_path / f"{name}.py").write_text("def make_it(size: int = 1): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = gin_file("import toy_one\nimport toy_two\ntoy_one.make_it.size = 1\ntoy_two.make_it.size = 2\n")
    (line,) = errors(capsys, file, "--gin.make_it.size=3")
    assert line.startswith("'make_it' is ambiguous: write more of toy_one.make_it or toy_two.make_it")


def test_missing_parameters_are_found_before_anything_is_built(gin_file, capsys):
    assert errors(capsys, gin_file("toy_job.train.job = @toy_job.Job()\n")) == [
        "Job needs 'name': set toy_job.Job.name (a.gin:3)"
    ]
    assert errors(capsys, gin_file("toy_job.train.job = @a/toy_job.Job()\nb/toy_job.Job.name = 'x'\n")) == [
        "Job needs 'name': set a/toy_job.Job.name (a.gin:3)"
    ]
    assert errors(capsys) == ["nothing sets 'job': bind toy_job.train.job in a --gin_file"]


def test_values_that_a_class_refuses(gin_file, capsys):
    (line,) = errors(capsys, gin_file(BASE), "--gin.Job.steps=-1")
    assert line == "Job: steps is -1, expected at least 0: change steps"


def test_warnings(gin_file, capsys):
    gin_file(BASE, "base.gin")
    lines = "toy_job.Job.steps = 3\ninclude 'base.gin'\ntoy_job.Job.name = 'a'\ntoy_job.Job.name = 'b'\n"
    unused = "c/toy_job.Job.name = 'c'\ntoy_job.make_optimizer.scale = 2.0\n"
    assert job(gin_file(lines + unused)) == dataclasses.replace(BUILT, name="b")
    assert capsys.readouterr().err.splitlines() == [
        "warning: toy_job.Job.steps (a.gin:3) is overridden by a file included after it (base.gin:7)",
        "warning: toy_job.Job.name is set twice, the later one wins (a.gin:5, a.gin:6)",
        "warning: toy_job.make_optimizer.scale has no effect: nothing that the run builds refers to make_optimizer "
        "(a.gin:8)",
        "warning: c/toy_job.Job.name had no effect: nothing used it (a.gin:7)",
    ]


def test_a_configuration_can_be_run_again_from_its_text(gin_file, tmp_path, capsys):
    flags = ["--gin.Job.stages=(@Optimizer(), @b/Optimizer())", "--gin.b/Optimizer.learning_rate=3"]
    built = job(gin_file(BASE), *flags, "--gin.Job.activation=@toy_job.power")
    whole, operative = toy_job.TEXTS[-1]
    for name, text in (("whole.gin", whole), ("operative.gin", operative)):
        again = job(gin_file(text, name, head=""))
        assert inspect.unwrap(again.activation) is toy_job.power
        assert dataclasses.replace(again, activation=None) == dataclasses.replace(built, activation=None)
    assert "toy_job.Job.verbose = False" in operative and "verbose" not in whole
    built = job("--gin.train.job=@toy_job.Job()", "--gin.Job.name='alone'")
    assert job(gin_file(toy_job.TEXTS[-1][0], head="")) == built
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, status, message",
    [
        ("nothing", 0, ""),
        ("user", 2, "error: window is 3, expected a power of two: change window\n"),
        ("os", 2, "error: No such file or directory: some/file\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_exit_statuses(capsys, kind, status, message):
    assert run(f"--kind={kind}", target="toy_job:fail") == status
    assert capsys.readouterr().err == message


def test_a_target_may_give_its_own_status():
    assert run("--status=3", target="toy_job:fail") == 3


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run("--kind=bug", target="toy_job:fail")


@pytest.mark.parametrize(
    "kind, error", [("user", ValueError), ("os", OSError), ("interrupt", KeyboardInterrupt)]
)
def test_debug_shows_every_traceback(kind, error):
    with pytest.raises(error):
        run(f"--kind={kind}", "--debug", target="toy_job:fail")


def test_one_process_of_several_does_not_wait_for_the_others(monkeypatch, capsys):
    left = []

    def leave(status):
        left.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(config, "_is_distributed", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    for kind in ("user", "bug", "nothing"):
        try:
            assert run(f"--kind={kind}", target="toy_job:fail") == 0
        except SystemExit:
            continue
    assert left == [2, 1] and "ZeroDivisionError" in capsys.readouterr().err


def python(script, **env):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        | {"PYTHONPATH": path}
        | env
    )
    return subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
    )


def test_a_reader_that_leaves_is_no_error():
    script = (
        "import sys; from lcx import config\n"
        "parser = config.parser(''); parser.add_argument('--kind')\n"
        "sys.exit(config.run(parser, 'toy_job:fail', ['--kind=pipe']))"
    )
    command = f'{sys.executable} -c "{script}" | head -n 1; echo ${{PIPESTATUS[0]}}'
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.splitlines()[-1] == "141" and done.stderr == ""


@pytest.mark.parametrize(
    "verb, argv, status, shown",
    [
        ("train", ["--help"], 0, "--gin_file=configs/quickstart.gin --workdir=/tmp/run"),
        ("evaluate", ["--help"], 0, "--rope_scaling"),
        ("generate", ["--help"], 0, "--prompt"),
        (
            "train",
            ["--workdir=w", "--gin_file=nope.gin"],
            2,
            "config error: nope.gin does not exist",
        ),
        ("train", ["--workdir=w", "--gin_file=a.gin"], 2, "config error: toy_job.Job.steps: expected int"),
        ("train", ["--gin_file=a.gin"], 2, "error: the following arguments are required: --workdir"),
        ("evaluate", ["--checkpoint=c", "--output=o", "--rope_scaling={"], 2, "not JSON"),
    ],
)
def test_help_and_mistakes_come_before_jax(gin_file, verb, argv, status, shown):
    gin_file(BASE + "toy_job.Job.steps = 'five'\n")
    done = python(
        "import importlib, sys\n"
        f"status = importlib.import_module('lcx.{verb}').main({argv!r})\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.exit(status)"
    )
    assert done.returncode == status and shown in done.stdout + done.stderr, done
    assert status == 0 or len(done.stderr.splitlines()) == 1


def test_compiled_programs_are_kept(tmp_path):
    script = "from lcx import config; config.setup_jax()\nimport jax, jax.numpy as jnp\n"
    body = "f = jax.jit(lambda x: jnp.linalg.eigh(jnp.sin(x @ x.T))[0] @ x)\nf(jnp.ones((32, 32))).block_until_ready()"
    # Whatever the compiler's speed today: by default programs that compile in under 0.05 s are not kept.
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = python(script + body, XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS="cpu", **always)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "lcx" / "xla").iterdir())
