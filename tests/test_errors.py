"""The settings that errors name: those of the command, and variables of the environment."""

import contextlib
import os

import pytest

from lcx import errors
from lcx.config.environment import blamed, check, misspelt
from lcx.errors import UserError, command_has, named, naming_flags
from lcx.locks import only_writer

FLAGS = {"Dataset.source": "--source", "Dataset.format": "--format", "Dataset.on_bad_line": "--on_bad_line",
         "Dataset.chat": "--chat"}  # fmt: skip
FASTA = {"Dataset.source": "--fasta", "Dataset.format": None, "Dataset.separator": None}


@pytest.mark.parametrize(
    "names, message, expected",
    [
        (
            FLAGS,
            "x is bad (Dataset.on_bad_line='skip' leaves it out)",
            "x is bad (--on_bad_line=skip leaves it out)",
        ),
        (
            FLAGS,
            "set Dataset.chat=True to read it, or Dataset.chat=False",
            "set --chat to read it, or --no-chat",
        ),
        (FLAGS, "set Dataset.format to 'tsv'", "set --format to 'tsv'"),
        (FLAGS, "Dataset.formatted, Dataset.split='x'", "Dataset.formatted, Dataset.split='x'"),
        (FASTA, "a.fa: give FASTA, or set Dataset.format if it is another", "a.fa: give FASTA"),
        (
            FASTA,
            "too long; split it (Dataset.separator does), or unpack it",
            "too long; split it, or unpack it",
        ),
        (FASTA, "cannot read a:b;c.fa; check Dataset.source", "cannot read a:b;c.fa; check --fasta"),
        (
            {"strands": "--strands"},
            "--strands needs x; a/strands: leave strands",
            "--strands needs x; a/strands: leave --strands",
        ),
        ({"A.b": "C.d"}, "change A.b='x'", "change C.d='x'"),
        ({"rope": "--rope"}, "pass rope='{\"a\": 1}'", "pass --rope='{\"a\": 1}'"),  # as a shell reads it
        ({}, "nothing to name", "nothing to name"),
    ],
)
def test_settings_of_the_reader(names, message, expected):
    assert named(message, names) == expected


@naming_flags("context_length", "setting adapter", "top_k")
def shared(adapter):
    raise UserError(f"context_length and top_k: change the setting {adapter}, not the adapter")


def test_a_function_of_commands_and_programs_names_flags_only_in_a_command():
    said = "context_length and top_k: change the setting adapter, not the adapter"
    with pytest.raises(UserError, match=f"^{said}$"):
        shared("adapter")
    with pytest.raises(UserError) as found, command_has(["--context_length", "--adapter", "-h"]):
        shared("adapter")
    assert str(found.value) == "--context_length and top_k: change the --adapter, not the adapter"
    with pytest.raises(UserError, match=f"^{said}$"):
        shared("adapter")


def test_the_copy_of_a_url(monkeypatch):
    monkeypatch.setattr(errors, "_urls", {})
    errors.copied("/c/1-run", "s3://b/run")
    errors.copied("/c/1-run/30", "s3://b/run/30")
    assert errors.by_url("/c/1-run, /c/1-run/x.") == "s3://b/run, s3://b/run/x."
    assert errors.by_url("in /c/1-run/30/y") == "in s3://b/run/30/y"
    for other in ("/c/1-run2", "/c/1-run.partial/x", "/d/c/1-run", "s3://b/run is in /c/1-run"):
        assert errors.by_url(other) == other
    said = UserError("/c/1-run/x: is damaged")
    assert str(said) == "s3://b/run/x: is damaged (s3://b/run is copied to /c/1-run)"
    assert str(UserError(f"again: {said}")) == f"again: {said}"


def test_a_variable_that_jax_refuses_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "zero")
    refused = ValueError('Invalid value "zero" for JAX flag jax_num_cpu_devices')
    assert (blamed(refused) or "").startswith(
        "JAX_NUM_CPU_DEVICES is 'zero', which jax refuses (Invalid value"
    )
    assert blamed(ValueError('another "zero"')) is None
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    assert blamed(refused) is None


@pytest.mark.parametrize("devices, refused", [("-1", False), ("", False), ("x", False), ("8", False), ("-3", True),
                                              ("0", True), ("99999999999", True)])  # fmt: skip
def test_a_number_of_devices_that_cannot_be(monkeypatch, devices, refused):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", devices)
    with pytest.raises(UserError, match="expected 1 to 4096") if refused else contextlib.nullcontext():
        check()


def test_a_misspelt_variable_of_jax_is_pointed_out(monkeypatch):
    import jax  # noqa: F401, whose variables are asked for

    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    for name in ("JAX_PLATFORM", "JAX_PLATFORMS", "JAX_TOOLBOX_REF", "JAX_PROCESS_ID"):
        monkeypatch.setenv(name, "cpu")
    assert misspelt() == [
        "JAX_PLATFORM has no effect: jax does not know it; did you mean JAX_PLATFORMS?"
    ]


def test_a_lock_that_cannot_be_made_is_not_said_to_be_held():
    with pytest.raises(OSError, match="/proc"), only_writer("/proc/x.lcx-lock", of="x", setting="--output"):
        pass
