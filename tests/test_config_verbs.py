"""The verbs: which flags reach which function; what is set before jax starts."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import types

import pytest

from lcx import config
from lcx.config import environment

train, evaluate, generate = (
    importlib.import_module(f"lcx.{verb}") for verb in ("train", "evaluate", "generate")
)


@pytest.fixture
def targets(monkeypatch):
    """The targets of the verbs, replaced by functions of the same signature that record their call."""
    calls = []

    def trainer_train(*, workdir, job=None):
        calls.append({"workdir": workdir})

    def evaluator_evaluate(
        *, checkpoint, output, rope_scaling=None, context_length=None, name=None, evals: tuple = ()
    ):
        calls.append(locals() | {"calls": None})

    def terminal_stream_text(
        *, checkpoint, prompt, max_new_tokens=256, temperature=0.0, top_p=1.0, seed=0, rope_scaling=None,
        context_length=None,
    ):  # fmt: skip
        calls.append(locals() | {"calls": None})

    evaluator_evaluate.__module__ = f"fake_{os.urandom(4).hex()}"  # gin knows it by this name for good
    its_module = types.SimpleNamespace(evaluator_evaluate=evaluator_evaluate)
    monkeypatch.setitem(sys.modules, evaluator_evaluate.__module__, its_module)
    for function in (trainer_train, evaluator_evaluate, terminal_stream_text):
        module, _, name = function.__name__.partition("_")
        monkeypatch.setitem(sys.modules, f"lcx.{module}", types.SimpleNamespace(**{name: function}))
    return calls


def test_the_verbs_pass_their_flags(targets, capsys):
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert train.main(["--workdir=w"]) == 0
    assert evaluate.main(["--checkpoint=c", "--output=o", f"--rope_scaling={json.dumps(scaling)}"]) == 0
    assert evaluate.main(["--checkpoint=c", "--output=o", "--context_length=64", "--name=n"]) == 0
    assert generate.main(["--checkpoint=c", "--prompt=p"]) == 0
    sampling = ["--max_new_tokens=5", "--temperature=0.5", "--top_p=0.9", "--seed=3", "--context_length=8"]
    assert generate.main(["--checkpoint=c", "--prompt=p", *sampling]) == 0
    drop = {None, "calls", "evals"}
    seen = [{k: v for k, v in call.items() if k not in drop and v is not None} for call in targets]
    paths = {"checkpoint": ["c"], "output": "o"}
    text = {"checkpoint": "c", "prompt": "p"}
    assert seen == [
        {"workdir": "w"},
        paths | {"rope_scaling": scaling},
        paths | {"context_length": 64, "name": "n"},
        text | {"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 0},
        text | {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "context_length": 8},
    ]
    assert generate.main(["--checkpoint=c", "--prompt=p", "--gin.x=3"]) == 2  # takes no gin
    assert "unknown argument '--gin.x=3'" in capsys.readouterr().err
    assert generate.main(["--checkpoint=c", "--prompt=p", "--prompt", "q"]) == 0 and targets[-1]["prompt"] == "q"
    assert capsys.readouterr().err == "warning: --prompt is given 2 times: the last one counts\n"


def test_evaluations_and_their_settings_need_no_file(monkeypatch, capsys):
    calls = []

    def call(function, source, flags):
        calls.append(config._arguments(function, flags.own))
        return 0

    monkeypatch.setattr(config, "_call", call)

    def evals(*flags):
        assert evaluate.main(["--checkpoint=c", "--output=o", *flags]) == 0
        return calls[-1]["evals"]

    assert [evaluation.name for evaluation in evals()] == ["loss_by_position", "perplexity"]
    _, perplexity = evals("--gin.Perplexity.windows=(64, 512)", "--gin.Perplexity.stride=8")
    assert (perplexity.windows, perplexity.stride) == ((64, 512), 8)
    passkey, own = evals("--evals=passkey,lcx.evals.recall:Recall", "--gin.Passkey.trials=3")
    assert (passkey.trials, own.name) == (3, "recall")
    not_one = ["--checkpoint=c", "--output=o", "--evals=fractions:Fraction"]
    assert evaluate.main(not_one) == 2 and "found @Fraction(), a Fraction" in capsys.readouterr().err
    assert len(evals("--gin.Passkey.trials=3")) == 2  # a setting of one that does not run is known all the same
    for names, expected in {"passky": "did you mean passkey?", "": "no evaluation is named", "a:B": "'a.B'"}.items():
        assert evaluate.main(["--checkpoint=c", "--output=o", f"--evals={names}"]) == 2
        assert expected in capsys.readouterr().err


def test_modules_of_the_users_are_imported_first(targets, capsys, tmp_path, monkeypatch):
    (tmp_path / "toy_own_mixer.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_own_mixer", raising=False)
    flags = ["--checkpoint=run", "--prompt=x"]
    assert generate.main([*flags, "--import=toy_own_mixer"]) == 0 and "toy_own_mixer" in sys.modules
    assert generate.main([*flags, "--import=toy_nothing"]) == 2
    error = capsys.readouterr().err
    assert "--import=toy_nothing cannot be imported (No module named 'toy_nothing')" in error
    assert len(targets) == 1


def test_json_flags():
    assert config.json_object('{"a": [1, 2]}') == {"a": [1, 2]}
    for text, message in (("{", "not JSON"), ('{"a": 1, "a": 2}', "'a' is set twice"), ("3", "expected a JSON object")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            config.json_object(text)


@pytest.mark.parametrize(
    "given, nproc",
    [
        ({"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8"}, "32"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=64"}, "256"),
        ({"JAX_NUM_CPU_DEVICES": "8"}, "32"),
        ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "5"}, "5"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, None),
        ({}, None),
    ],
)
def test_more_devices_than_cores_get_threads(monkeypatch, given, nproc):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "environ", dict(given))
    environment.setup_jax()
    assert os.environ.get("NPROC") == nproc


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "mine", "HOME": "/h"})
    environment.setup_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_ctrl_c_ends_a_command_that_runs_no_python():
    """The main thread is in a C function that no signal interrupts, as a compiler is: no Python handler runs."""
    script = """
import ctypes, os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
from lcx.config import interrupts
interrupts._GRACE_S = 0.1
mutex = ctypes.create_string_buffer(128)

def press():
    while mutex.raw[0] != 2:  # what glibc writes as soon as a thread waits
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

with interrupts.interruptible():
    threading.Thread(target=press, daemon=True).start()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


INTERRUPTED = """
import os, signal, sys, time
sys.argv[0], sys.orig_argv = "-m", ["python", "-m", "lcx.train"]
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"  # no other process with large pages
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
import lcx
from lcx.config import interrupts
interrupts._CLEAN_UP_S = 0.5

def _xla_gc_callback():
    signal.raise_signal(signal.SIGINT)  # an exception would be lost here

with interrupts.importing():
    if "{where}" == "imports":
        signal.raise_signal(signal.SIGINT)
try:
    with interrupts.interruptible():
        try:
            _xla_gc_callback()
        except KeyboardInterrupt:
            sys.exit("lost")
        if "{where}" == "never":
            while True:
                try:
                    time.sleep(1)
                except KeyboardInterrupt:
                    pass
        while True:
            time.sleep(0.01)
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize(("where", "status"), [("imports", 130), ("garbage collector", 7), ("never", 130)])
def test_ctrl_c_arrives_wherever_the_main_thread_is(where, status):
    script = INTERRUPTED.replace("{where}", where)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, "interrupted\n" * (status == 130))


def test_a_second_ctrl_c_ends_a_clean_up_that_hangs():
    script = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from lcx.config import interrupts
with interrupts.interruptible():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_no_cuda_plugin_without_a_gpu():
    """jax loads it where it is installed for its compiler alone, and its libraries complain."""
    script = """
import sys
from lcx import config
from lcx.config import environment, plugins
environment.ACCELERATORS = ()
config.setup_jax()
plugins.hide_unusable()
import jax
assert jax.devices()[0].platform == "cpu"
"""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ  # a folder of the user's has the limit that they set


def test_the_cache_is_bounded_and_without_leftovers(monkeypatch, tmp_path):
    cache = tmp_path / "lcx" / "xla"
    cache.mkdir(parents=True)
    for name, age in (("old", 3600), ("new", 0), ("whole", 3600)):
        (cache / f"{name}-cache").write_bytes(b"x")
        os.utime(cache / f"{name}-cache", (time.time() - age,) * 2)
    (cache / "whole-atime").write_bytes(bytes(8))
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    environment.setup_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(cache)
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(2 << 30)
    assert sorted(path.name for path in cache.iterdir()) == ["new-cache", "whole-atime", "whole-cache"]
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_MAX_SIZE": "-1"})
    environment.setup_jax()
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "-1"


_COMPILES = """
from lcx.config import setup_jax
setup_jax()
import jax, jax.numpy as jnp
for n in range(4):
    jax.jit(lambda x: jnp.sin(x) @ x + n)(jnp.ones((8, 8))).block_until_ready()
"""


def test_two_processes_share_a_cache_that_stays_within_its_limit(tmp_path):
    unset = ("JAX_COMPILATION_CACHE_DIR",)
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_COMPILATION_CACHE_MAX_SIZE": "30000", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    env |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "true"}
    command = [sys.executable, "-c", _COMPILES]
    running = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    kept = list((tmp_path / "lcx" / "xla").glob("*-cache"))
    assert kept and sum(path.stat().st_size for path in kept) <= 30000
