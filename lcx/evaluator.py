"""Runs evaluations on one or more checkpoints; writes results.json, a plot for each evaluation, and report.html.

results.json is rewritten atomically after every evaluation, so a failure or a kill does not lose earlier results.
Within an evaluation, each answer of the model is kept in `answers/` (`evals/support/journal.py`): the same command goes
on where an earlier one was stopped, if the weights are the same.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from lcx import hub, linearize, parameters, paths, sharding, terminal
from lcx.buckets import is_url
from lcx.checkpoint import model_json
from lcx.checkpoint.fingerprint import fingerprint
from lcx.checkpoint.folder import find_step
from lcx.convert.api import detect, load
from lcx.data import Dataset, Mixture, Tokenizer, special_tokens
from lcx.data.special import described
from lcx.errors import UserError, as_read, first_line, naming
from lcx.evals import Evaluation, Result
from lcx.evals.cost import Cost
from lcx.evals.key_value import KeyValue
from lcx.evals.long_ppl import LongPPL
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.needle_grid import NeedleGrid
from lcx.evals.passkey import Passkey
from lcx.evals.perplexity import Perplexity
from lcx.evals.ruler import Ruler
from lcx.evals.support import journal, remembered, settings, texts
from lcx.evals.support.model_facts import facts
from lcx.model import Decoder
from lcx.multihost import channel
from lcx.multihost.agreement import first_only, require_same_outcome
from lcx.reporting import report
from lcx.reporting.runs import RESULTS, labelled, read_results
from lcx.version import __version__
from lcx.wording import quantity

_PREVIOUS, ANSWERS = "results.previous.json", "answers"
SUITES: dict[str, tuple[Evaluation, ...]] = {
    "short": (LossByPosition(), Perplexity()),
    "retrieval": (Passkey(), NeedleGrid(), KeyValue()),
    "ruler": (Ruler(),),
    "long": (
        *(LossByPosition(), Perplexity(), LongPPL()),
        *(Passkey(), NeedleGrid(), KeyValue(), Ruler()),
        Cost(),
    ),
}


def evaluate(
    *,
    checkpoint: str | tuple[str, ...],
    output: str,
    suite: str | None = None,
    evals: tuple[Evaluation, ...] = (LossByPosition(), Perplexity()),
    dataset: Dataset | Mixture | str | None = None,
    rope_scaling: dict | None = None,
    context_length: int | None = None,
    only_part: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    mesh: sharding.MeshShape = sharding.MeshShape(),  # noqa: B008 (frozen)
    adapter: str | tuple[str, ...] | None = None,
    format: str | None = None,
    input_projections: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint and returns what results.json holds; of several, {"models": {name: that}}.

    Args:
      checkpoint: a workdir, one step of it, a Hugging Face folder, or the name of a model on the hub; or several, which
        are evaluated one after the other, and compared in one report.
      output: the folder for results.json, the plots and report.html; of several checkpoints, a folder in it for each.
      suite: the name of a set of evaluations, a key of SUITES, in place of `evals`, unless those are the same ones with
        other settings. Those that need a text are left out, which a line says, if there is none.
      evals: the evaluations to run; `lcx.evals` describes their interface.
      dataset: the text for evaluations that do not set one: a Dataset, or the path of a file, folder or glob, of which
        all is read. None: the held-out part of the data that the checkpoint was trained on; if the checkpoint does not
        record that, a byte-level model is evaluated on the source of the Python standard library.
      rope_scaling: in Hugging Face's format, applied to the checkpoint first.
      context_length: the context window in tokens; None: what rope_scaling implies.
      only_part: for a linearized model: "window" or "linear" evaluates only that part of its attention.
      name: label of this model in tables and plots; None: derived from the checkpoint.
      dtype: of the parameters and the computation; None: as stored.
      mesh: sizes of the mesh axes.
      adapter: folder of a PEFT adapter (LoRA) for the checkpoint, or several, which are merged into it.
      format: of the checkpoint, as in lcx.load; None detects it.
      input_projections: "fp8" or "plain" for the Hyena layers of Evo 2; None: as the checkpoint says (lcx.load).

    Raises:
      UserError: there is no readable checkpoint, the output cannot be written, or some evaluations failed. In the last
        case the results of the others are still in results.json.
    """
    shared = {key: value for key, value in locals().items() if key not in ("checkpoint", "output", "name")}
    if not isinstance(checkpoint, str):
        return _compared(tuple(checkpoint), output, name, shared)
    evals = _suite(suite, evals)
    optional = {one.name for one in evals if suite and one in SUITES[suite]}  # those without settings of the user
    settings.check(evals)
    if name is not None:
        settings.check_name(name, "--name")
    adapter = (adapter,) if isinstance(adapter, str) else adapter
    by_flag = isinstance(dataset, str)
    label = name or _label(checkpoint, rope_scaling, adapter)
    named = naming(texts.NAMES) if by_flag else contextlib.nullcontext()
    with _writable(output) as folder, named, remembered.remembering():
        place = hub.local(checkpoint)
        detect(place, format)  # raises if this is no checkpoint, before a more confusing error about its tokenizer
        tokenizer = _tokenizer(place, format, needed=by_flag)
        text = texts.of_path(dataset) if isinstance(dataset, str) else dataset
        text = texts.recorded(place, tokenizer, _say) if text is None else text
        evals, skipped = texts.readable(evals, text) if suite else (evals, {})
        evals = texts.filled(_with_outputs(evals, folder), text)
        model, params, left_out = _loaded(
            place,
            evals,
            tokenizer,
            label=label,
            optional=optional,
            only_part=only_part,
            format=format,
            dtype=dtype,
            mesh=None if jax.device_count() == 1 and mesh == sharding.MeshShape() else mesh.build(),
            rope_scaling=rope_scaling,
            context_length=context_length,
            adapter=adapter,
            input_projections=input_projections,
        )
        _say_what_is_read(label, tokenizer, skipped | left_out)
        results: dict[str, Any] = {
            "name": label,
            "checkpoint": hub.place(checkpoint),
            "rope_scaling": rope_scaling,
            "only_part": only_part,
            "adapter": adapter and [os.path.abspath(os.path.expanduser(path)) for path in adapter],
            "weights": _weights(params),
            **_circumstances(model),
            **{"evaluations": {}, "errors": {}, "skipped": skipped | left_out},
        }
        _run_all([one for one in evals if one.name not in left_out], model, params, tokenizer, results, folder)
        first_only(report.build)(results=(str(folder),), output=str(folder), overwrite=True)
        _raise_failures(results, folder)
        return results


def _loaded(
    place: str,
    evals: Sequence[Evaluation],
    tokenizer: Tokenizer | None,
    *,
    label: str,
    optional: Collection[str],
    only_part: str | None,
    **loading: Any,
) -> tuple[Decoder, Any, dict[str, str]]:
    """(model, parameters, why optional evaluations are left out); what cannot work is found before weights are read."""
    left_out: dict[str, str] = {}

    def check(model: Decoder) -> None:
        part = model if only_part is None else linearize.ablated(model, only_part)
        found = remembered.once(
            check, lambda: settings.check_model(evals, part, tokenizer, label=label, optional=optional)
        )
        left_out.update(found)

    model, params = load(place, check=check, **loading)
    if only_part is not None:
        model = linearize.ablated(model, only_part)
        params = parameters.chosen(model, params)
    return model, params, left_out


def _say_what_is_read(label: str, tokenizer: Tokenizer | None, left_out: Mapping[str, str]) -> None:
    if tokenizer is not None:
        _say(f"{label}: {described(tokenizer, special_tokens(tokenizer), of='text')}")
    for which, why in left_out.items():
        _say(f"{label}: {which} is left out: {why}")


def _run_all(
    evals: Sequence[Evaluation],
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer | None,
    results: dict,
    folder: pathlib.Path,
) -> None:
    """Runs the evaluations one after the other; results.json is written after each."""
    started = time.perf_counter()
    if _writes() and (folder / RESULTS).is_file():  # keep the results of an earlier run
        os.replace(folder / RESULTS, folder / _PREVIOUS)
    label = results["name"]
    identity = [__version__, results["model"]["description"] or repr(model), results["weights"]]
    for number, evaluation in enumerate(evals, start=1):
        _say(f"{label}: {evaluation.name} ({number} of {len(evals)}) ...")
        with journal.keeping(folder / ANSWERS / f"{_slug(evaluation.name)}.jsonl", identity) as kept:
            _run(evaluation, model, params, tokenizer, results)
        if kept is not None and kept.reused:
            _say(f"{label}: {evaluation.name}: {kept.reused} answers were kept from an earlier run")
        results["seconds"] = time.perf_counter() - started
        _write(folder, results)


def _compared(
    checkpoints: tuple[str, ...], output: str, name: str | None, shared: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates each checkpoint in a folder of its own, then writes one report about all of them."""
    if not checkpoints:
        raise UserError("evaluate.checkpoint is empty, expected at least one checkpoint: set --checkpoint")
    if len(checkpoints) == 1:
        return evaluate(checkpoint=checkpoints[0], output=output, name=name, **shared)
    if name is not None:
        raise UserError(f"one name, {name!r}, for {len(checkpoints)} checkpoints: remove --name")
    _refuse_missing(checkpoints, shared["format"])
    folder = paths.destination(output, "--output")
    done: dict[str, Any] = {}
    failed = []
    labels = _labels(checkpoints, shared["rope_scaling"], shared["adapter"])
    for number, (checkpoint, label) in enumerate(zip(checkpoints, labels, strict=True), start=1):
        place = folder / f"{number}_{_slug(label)}"
        try:
            done[str(place)] = evaluate(checkpoint=checkpoint, output=str(place), name=label, **shared)
        except UserError as error:  # the others are still worth having
            _say(f"{label}: {error}")
            failed.append(f"{checkpoint}: {error}")
            if (place / RESULTS).is_file():
                done[str(place)] = read_results(str(place))
    if done:
        first_only(report.build)(results=tuple(done), output=str(folder), overwrite=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(checkpoints)} checkpoints failed: {'; '.join(failed)}")
    return {"models": labelled(list(done.values()))}


def _refuse_missing(checkpoints: tuple[str, ...], format: str | None) -> None:
    """Raises UserError for a checkpoint that is given twice or is none, before any of the others is evaluated."""
    places: dict[str, str] = {}
    for one in checkpoints:
        place = one if is_url(one) or hub.is_name(one) else _place(hub.local(one), format)
        if place in places:
            found = f"{one} is" if one == places[place] else f"{places[place]} and {one} are the same weights,"
            raise UserError(f"{found} given twice, expected different ones: change --checkpoint")
        places[place] = one


def _place(path: str, format: str | None) -> str:
    """Where the weights of a checkpoint are: of a run, in its newest step. Raises UserError if it is none."""
    if detect(path, format) == "lcx":
        directory, step = find_step(path)
        return str(directory / str(step))
    return os.path.realpath(path)


def _labels(checkpoints: tuple[str, ...], rope_scaling: Any, adapter: Any) -> list[str]:
    """A name for each checkpoint; where folders have the same name, with the name of the folder that holds them."""
    adapter = (adapter,) if isinstance(adapter, str) else adapter
    labels = [_label(checkpoint, rope_scaling, adapter) for checkpoint in checkpoints]
    if len(set(labels)) == len(labels):
        return labels
    parents = [pathlib.Path(hub.place(checkpoint)).resolve().parent.name for checkpoint in checkpoints]
    return [f"{parent}/{label}" for parent, label in zip(parents, labels, strict=True)]


def _suite(suite: str | None, evals: tuple[Evaluation, ...]) -> tuple[Evaluation, ...]:
    if suite is None:
        return evals
    if suite not in SUITES:
        raise UserError(f"suite is {suite!r}, expected one of {', '.join(SUITES)}: change --suite")
    return evals if list(map(type, evals)) == list(map(type, SUITES[suite])) else SUITES[suite]


def _weights(params: Any) -> str:
    """A fingerprint of all parameters, so that answers of other weights do not count."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [(jax.tree_util.keystr(path), str(x.dtype), x.shape, int(fingerprint(x))) for path, x in leaves]
    return journal.key_of(sorted(found))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)[:80]


def _circumstances(model: Decoder) -> dict[str, Any]:
    """The entries of results.json on when, on which model, and with which software and hardware it was made."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {**facts(model), "description": _described(model)},
        "versions": _versions(),
        "machine": _machine(),
    }


def _run(
    evaluation: Evaluation, model: Decoder, params: Any, tokenizer: Tokenizer | None, results: dict
) -> None:
    """Runs one evaluation and adds its result, or the reason why it failed, to `results`."""
    started = time.perf_counter()
    try:
        result: Result = evaluation(model, params, tokenizer)
        _check_finite(result)
        seconds = time.perf_counter() - started
        about = {"evaluation": _described(evaluation), "seconds": seconds}
        results["evaluations"][evaluation.name] = {**result, **about}
        _say(f"{results['name']}: {evaluation.name}: {result['summary']} ({seconds:.0f} s)")
        for note in result.get("notes", ()):
            _say(f"{results['name']}: {evaluation.name}: {note}")
    except Exception as error:  # one failing evaluation must not prevent the others
        if channel.count() > 1 and not isinstance(error, UserError):
            raise  # the processes are out of step
        if not isinstance(error, UserError):
            traceback.print_exc()
        results["errors"][evaluation.name] = _explained(error)
        _say(f"{results['name']}: {evaluation.name} failed: {_explained(error)}")
    name = evaluation.name
    require_same_outcome(f"{results['name']}: {name}", results["errors"].get(name, ""))


def _check_finite(result: Result) -> None:
    """Raises UserError if the table contains NaN, which would make comparisons meaningless."""
    bad = [name for name, value in result["table"].items() if isinstance(value, float) and math.isnan(value)]
    if bad:
        raise UserError(
            f"{bad[0]} is NaN: the weights contain NaN, or the computation overflows in this dtype; check the "
            "checkpoint with lcx.convert, or set --dtype=float32"
        )


def _explained(error: Exception) -> str:
    line = as_read(first_line(error))
    if "RESOURCE_EXHAUSTED" in line:
        return f"out of memory ({line[:120]}): lower tokens_per_batch or batch_size of this evaluation"
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def _raise_failures(results: Mapping[str, Any], folder: pathlib.Path) -> None:
    errors = results["errors"]
    if not errors:
        return
    total = len(errors) + len(results["evaluations"])
    kept = f"; the others are in {folder / RESULTS}" if results["evaluations"] else ""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in errors.items())
    raise UserError(f"{len(errors)} of {quantity(total, 'evaluation')} failed: {reasons}{kept}")


# ------------------------------------------------------------------------------------------------ inputs


def _tokenizer(checkpoint: str, format: str | None, *, needed: bool) -> Tokenizer | None:
    try:
        return terminal.tokenizer_of(checkpoint, format)
    except UserError as error:
        if needed:
            raise UserError(f"--dataset is read with the tokenizer of the checkpoint: {error}") from None
        _say(f"warning: no tokenizer: {error}")
        return None


def _with_outputs(evals: tuple[Evaluation, ...], folder: pathlib.Path) -> tuple[Evaluation, ...]:
    """The evaluations, with NAME.tsv in the output folder wherever one has a field `output` for its table, not set."""
    return tuple(
        dataclasses.replace(one, output=str(folder / f"{one.name}.tsv"), overwrite=True)  # type: ignore[type-var]
        if getattr(one, "output", one) is None
        else one
        for one in evals
    )


def _label(checkpoint: str, rope_scaling: Mapping[str, Any] | None, adapter: Sequence[str] | None) -> str:
    path = pathlib.Path(hub.place(checkpoint)).resolve()
    name = f"{path.parent.parent.name} step {path.name}" if path.parent.name == "checkpoints" else path.name
    name = " + ".join([name, *(pathlib.Path(folder).expanduser().resolve().name for folder in adapter or ())])
    if not rope_scaling:
        return name
    kind = rope_scaling.get("rope_type") or rope_scaling.get("type") or "scaled"
    factor = rope_scaling.get("factor")
    return f"{name}, {kind}" + (f" x{factor:g}" if isinstance(factor, int | float) else "")


# ------------------------------------------------------------------------------------------------ outputs


def _writes() -> bool:
    return jax.process_index() == 0


def _say(line: str) -> None:
    if _writes():
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _writable(output: str) -> Iterator[pathlib.Path]:
    """The output folder, which is created and found to be writable before the model is loaded.

    No other process may write to it in the meantime. If it is still empty after an exception, it is removed.
    """
    folder = paths.destination(output, "--output")
    own = any((folder / name).exists() for name in (RESULTS, _PREVIOUS))
    if (folder / report.PAGE).exists() and not own:
        raise UserError(
            f"{folder} holds the report of something else, {report.PAGE}: choose another --output"
        )
    if not _writes():
        yield folder
        return
    with paths.claimed(folder, "--output"):
        yield folder


def _write(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    if not _writes():
        return
    text = json.dumps(_plain(results), indent=1, allow_nan=False)
    partial = folder / f"{RESULTS}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / RESULTS)


def _plain(value: Any) -> Any:
    """The value as plain JSON: arrays and numpy scalars as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def _described(value: Any) -> Any:
    try:
        return model_json.to_json(value)
    except UserError:  # for example a lambda, which cannot be found by name
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lcx": __version__}
    for package in ("jax", "jaxlib", "flax", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
