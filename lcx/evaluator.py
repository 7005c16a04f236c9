"""Runs evaluations on a checkpoint and writes results.json, a plot for each evaluation, and report.html.

results.json is rewritten atomically after every evaluation, so a failure or a kill does not lose earlier results.
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
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from lcx import hub, linearize, parameters, paths, sharding, terminal
from lcx.checkpoint import model_json
from lcx.checkpoint.folder import find_step, read_json
from lcx.convert.api import detect, load
from lcx.data import ByteTokenizer, Dataset, Mixture, Tokenizer, special_tokens
from lcx.data.special import described
from lcx.errors import UserError, first_line
from lcx.evals import Evaluation, Result
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.perplexity import Perplexity
from lcx.evals.support import settings
from lcx.evals.support.model_facts import facts
from lcx.model import Decoder
from lcx.reporting import report
from lcx.reporting.runs import RESULTS
from lcx.version import __version__
from lcx.wording import quantity

_PREVIOUS = "results.previous.json"


def evaluate(
    *,
    checkpoint: str,
    output: str,
    evals: tuple[Evaluation, ...] = (LossByPosition(), Perplexity()),
    dataset: Dataset | Mixture | None = None,
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
    """Evaluates a checkpoint and returns what results.json holds.

    Args:
      checkpoint: a workdir, one step of it, a Hugging Face folder, or the name of a model on the hub.
      output: the folder for results.json, the plots and report.html.
      evals: the evaluations to run; `lcx.evals` describes their interface.
      dataset: the text for evaluations that do not set one. None: the data that the checkpoint was trained on; if the
        checkpoint does not record that, a byte-level model is evaluated on the source of the Python standard library.
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
    settings.check(evals)
    if name is not None:
        settings.check_name(name, "--name")
    started = time.perf_counter()
    adapter = (adapter,) if isinstance(adapter, str) else adapter
    with _writable(output) as folder:
        place = hub.local(checkpoint)
        detect(place, format)  # raises if this is no checkpoint, before a more confusing error about its tokenizer
        tokenizer = _tokenizer(place, format)
        evals = _with_outputs(evals, folder)
        evals = _with_text(evals, _default_dataset(place, tokenizer) if dataset is None else dataset)
        settings.check_text(evals)
        devices = None if jax.device_count() == 1 and mesh == sharding.MeshShape() else mesh.build()
        model, params = load(
            place,
            format=format,
            dtype=dtype,
            mesh=devices,
            rope_scaling=rope_scaling,
            context_length=context_length,
            adapter=adapter,
            input_projections=input_projections,
        )
        if only_part is not None:
            model = linearize.ablated(model, only_part)
            params = parameters.chosen(model, params)
        label = name or _label(checkpoint, rope_scaling, adapter)
        if tokenizer is not None:
            _say(f"{label}: {described(tokenizer, special_tokens(tokenizer), of='text')}")
        results: dict[str, Any] = {
            "name": label,
            "checkpoint": hub.place(checkpoint),
            "rope_scaling": rope_scaling,
            "only_part": only_part,
            "adapter": adapter and [os.path.abspath(os.path.expanduser(path)) for path in adapter],
            **_circumstances(model),
            "evaluations": {},
            "errors": {},
        }
        if _writes() and (folder / RESULTS).is_file():  # keep the results of an earlier run
            os.replace(folder / RESULTS, folder / _PREVIOUS)
        for evaluation in evals:
            _say(f"{label}: {evaluation.name} ...")
            _run(evaluation, model, params, tokenizer, results)
            results["seconds"] = time.perf_counter() - started
            _write(folder, results)
        if _writes():
            report.build(results=(str(folder),), output=str(folder), overwrite=True)
        _raise_failures(results, folder)
        return results


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
        if not isinstance(error, UserError):
            traceback.print_exc()
        results["errors"][evaluation.name] = _explained(error)
        _say(f"{results['name']}: {evaluation.name} failed: {_explained(error)}")


def _check_finite(result: Result) -> None:
    """Raises UserError if the table contains NaN, which would make comparisons meaningless."""
    bad = [name for name, value in result["table"].items() if isinstance(value, float) and math.isnan(value)]
    if bad:
        raise UserError(
            f"{bad[0]} is NaN: the weights contain NaN, or the computation overflows in this dtype; check the "
            "checkpoint with lcx.convert, or set dtype to float32"
        )


def _explained(error: Exception) -> str:
    line = first_line(error)
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


def _tokenizer(checkpoint: str, format: str | None) -> Tokenizer | None:
    try:
        return terminal.tokenizer_of(checkpoint, format)
    except UserError as error:
        _say(f"warning: no tokenizer: {error}")
        return None


def _default_dataset(checkpoint: str, tokenizer: Tokenizer | None) -> Dataset | Mixture | None:
    """The data that the checkpoint was trained on; else, for a byte-level model, the standard library; else None."""
    recorded = _meta(checkpoint).get("data")
    if recorded is not None:
        try:
            return _untokenized(model_json.from_json(recorded))
        except (UserError, TypeError) as error:
            _say(f"warning: the dataset recorded in the checkpoint cannot be used: {error}")
    return Dataset(source="stdlib") if isinstance(tokenizer, ByteTokenizer) else None


def _meta(checkpoint: str) -> dict[str, Any]:
    """The metadata that a training run stored in its checkpoint; {} for any other kind of checkpoint."""
    if (pathlib.Path(checkpoint).expanduser() / "config.json").is_file():
        return {}
    with contextlib.suppress(UserError):
        directory, step = find_step(checkpoint)
        return read_json(directory / str(step), "meta")
    return {}


def _untokenized(dataset: Dataset | Mixture) -> Dataset | Mixture:
    """The dataset without its tokenizer, whose file may no longer exist; the checkpoint's own is used instead."""
    if isinstance(dataset, Dataset):
        return dataclasses.replace(dataset, tokenizer="bytes")
    parts = tuple((dataclasses.replace(part, tokenizer="bytes"), weight) for part, weight in dataset.parts)
    return dataclasses.replace(dataset, parts=parts)


def _with_text(evals: tuple[Evaluation, ...], dataset: Dataset | Mixture | None) -> tuple[Evaluation, ...]:
    """The evaluations, with `dataset` filled in wherever an evaluation has such a field and it is None."""
    without = [evaluation.name for evaluation in evals if getattr(evaluation, "dataset", evals) is None]
    if without and dataset is None:
        raise UserError(
            f"no text for {', '.join(without)}: none is set, and the checkpoint does not say what it was trained on;"
            " set evaluate.dataset, as --gin.evaluate.dataset='@lcx.data.Dataset()'"
            " --gin.Dataset.source='\"text.txt\"'"
        )
    return tuple(
        dataclasses.replace(evaluation, dataset=dataset) if evaluation.name in without else evaluation  # type: ignore[type-var]
        for evaluation in evals
    )


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
