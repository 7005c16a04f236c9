"""The messages at the start and end of a training run: model, data, sizes, and where the run writes."""

import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lcx import extend, mixers
from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx.errors import by_url
from lcx.training import division, doubtful, fp8_scaling, resume_check, settings
from lcx.wording import counted, quantity


def opening(
    trainer: Any, run: Any, opened: Any, batches: Any, mesh: jax.sharding.Mesh, workdir: str
) -> Iterator[str]:
    """The lines printed before the first step.

    Args:
      trainer: the settings, a `trainer.Trainer`.
      run: the run as initialised or restored, a `training.run.Run`.
      opened: its data, a `data.Opened`.
      batches: the rows of it to train on, a `data.BatchIterator`.
      mesh: where it trains.
      workdir: where it writes.
    """
    if run.data is not None:
        rest = "resuming" if run.step < trainer.last_step else "nothing is left to do"
        yield f"step {run.step} of {trainer.last_step} is done: {rest}"
        yield from resume_check.changes(run.before, resume_check.changeable(trainer))
    elif run.step:
        yield (
            f"continuing {trainer.init_from} after {run.step} updates, with its optimizer; the data starts at its "
            "beginning, since its position there is not stored"
        )
    yield _model(run)
    if isinstance(run.model, model_lib.Decoder):
        yield from extend.table(run.model)
    yield _size(trainer, mesh)
    yield from division.remarks(trainer, mesh)
    yield from _pieces(trainer, mesh)
    yield from _context(run.model, mesh, *settings.at_once(trainer))
    yield from _forms(run.model, mesh, *settings.at_once(trainer))
    for line in doubtful.settings(trainer, run.model):
        yield f"warning: {line}"
    for part in getattr(opened, "parts", ()):  # a block of layers trains on stored activations
        yield _data(part.corpus)
    yield trainer.data.describe_special_tokens()
    yield from opened.remarks()
    yield from getattr(batches, "remarks", list)()  # stored activations have none
    if run.lora is not None:
        yield lora_lib.statement(run.model, run.abstract["lora"], run.trains["params"])
    if fp8_scaling.COLLECTION in run.abstract:
        yield fp8_scaling.statement(run.abstract)
    yield f"writing to {by_url(workdir)}"
    if run.step < trainer.last_step:
        yield "compiling the first step"


def closing(workdir: str, step: int, steps: int, *, whole: bool = True) -> str:
    """The last line: where the checkpoint is and, of a whole model, which command to run next."""
    checkpoint = by_url(os.path.join(workdir, "checkpoints", str(step)))
    if step < steps:
        return f"stopped at step {step} of {steps}; the same command resumes from {checkpoint}"
    return f"done: {checkpoint}{f'; {following(workdir, workdir)}' if whole else ''}"


def following(checkpoint: str, workdir: str) -> str:
    """The command that evaluates a checkpoint into a folder of the workdir; into one here if that is in a bucket."""
    output, source = os.path.join(workdir, "evaluation"), by_url(checkpoint)
    if by_url(workdir) != workdir:
        output = f"{os.path.basename(by_url(workdir))}-evaluation"
    return f"next: python -m lcx.evaluate --checkpoint={shlex.quote(source)} --output={shlex.quote(output)}"


def _model(run: Any) -> str:
    stored = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(run.abstract["params"])})
    kind = getattr(run.model, "model_type", "a block of layers")  # model.Layers are of no family
    layers, parameters = model_lib.layers(run.model), model_lib.num_params(run.model)
    return (
        f"model: {kind}, {quantity(len(layers), 'layer')}{_parts(layers)}, "
        f"{quantity(counted(parameters), 'parameter')}{_trained(run)} in "
        f"{' and '.join(stored)}, activations in {run.model.dtype}, "
        f"window of {quantity(run.model.max_position_embeddings, 'token')}{extend.scalings(run.model)}"
    )


def _trained(run: Any) -> str:
    """ " (of which 1024 train)", unless all train, or with LoRA, which has a line of its own."""
    leaves = jax.tree.leaves(run.abstract["params"]), jax.tree.leaves(run.trains["params"])
    count = sum(leaf.size for leaf, trains in zip(*leaves, strict=True) if trains)
    return "" if run.lora is not None or all(leaves[1]) else f" (of which {counted(count)} train)"


def _data(corpus: Any) -> str:
    splits = ((corpus.train, "to train on"), (corpus.eval, "held out"))
    sizes = [
        f"{quantity(counted(len(s)), 'document')}, {quantity(counted(s.num_tokens), 'token')} {use}"
        for s, use in splits
    ]
    return f"data: {corpus.source}: {'; '.join(sizes)}"


def _parts(layers: Sequence[model_lib.Layer]) -> str:
    """ " of TwoMamba + GatedMlp": what is in the layers, unless it is what `model.llama` puts there."""
    blocks = [layer.block for layer in layers]
    kinds = [mixers.kind(block.mixer) for block in blocks if block.mixer is not None]
    kinds += [type(block.mlp).__name__ for block in blocks if block.mlp is not None]
    names = list(dict.fromkeys(kinds))
    return "" if {*names} <= {"Attention", "GatedMlp"} else f" of {' + '.join(names)}"


def _size(trainer: Any, mesh: jax.sharding.Mesh) -> str:
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    schedule = f" (of a schedule over {trainer.steps})" if trainer.last_step < trainer.steps else ""
    count = division.micro_batches(trainer, mesh)
    pieces = f" in {count} micro-batches" if count > 1 else ""
    return (
        f"steps: {trainer.last_step}{schedule}, each of {quantity(trainer.batch_size, 'row')} x {trainer.seq_len} = "
        f"{quantity(counted(trainer.batch_size * trainer.seq_len), 'token')}{pieces}, on {mesh.size} x "
        f"{jax.devices()[0].device_kind}{f' ({axes})' if axes else ''}"
    )


def _pieces(trainer: Any, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """How rows are divided, if they are."""
    length = getattr(trainer, "piece_length", None)
    if length is not None and length < trainer.seq_len:
        count = -(-trainer.seq_len // length)
        gradients = "exact gradients" if trainer.carry == "exact" else "gradients stop at their borders"
        on_cpus = mesh.devices.flat[0].platform == "cpu"
        waiting = ", states wait in the host's memory" if trainer.borders == "host" and not on_cpus else ""
        yield f"pieces: every row in {count} of {quantity(length, 'token')}, {gradients}{waiting}"
        if trainer.borders == "host" and on_cpus:
            yield "warning: Trainer.borders 'host' has no effect: CPUs have no memory beside the host's"


def _forms(model: Any, mesh: jax.sharding.Mesh, seq_len: int, cached: bool = False) -> Iterator[str]:
    """How mixers that have several forms compute their part of a row; see settings.at_once."""
    devices = mesh.shape["context"]
    options: dict[str, Any] = {"seq_len": -(-seq_len // devices), "follows": cached or devices > 1}
    found = [layer.block.mixer for layer in model_lib.layers(model) if layer.block.mixer is not None]
    words = {mixers.kind(mixer): mixers.form_of_rows(mixer, **options) for mixer in dict.fromkeys(found)}
    for kind, form in words.items():
        if form is not None:
            yield f"{kind} computes {options['seq_len']} tokens {form}"


def _context(model: Any, mesh: jax.sharding.Mesh, seq_len: int, cached: bool = False) -> Iterator[str]:
    """What the devices of `context` send each other, if there are several; see settings.at_once."""
    sizes = {"devices": mesh.shape["context"], "tensor": mesh.shape["tensor"], "seq_len": seq_len, "cached": cached}
    if sizes["devices"] == 1:
        return
    blocks = [layer.block for layer in model_lib.layers(model) if layer.block.mixer is not None]
    found = [
        f"{mixers.kind(block.mixer)} sends {mixers.context_method(block.mixer, **sizes)}" for block in blocks
    ]
    yield f"context: every row over {sizes['devices']} devices; {'; '.join(dict.fromkeys(found))}"
