"""Block-wise attention transfer: linearizes a model of any size with only one block of layers in memory at a time.

In attention transfer every layer receives the softmax model's own activations, so blocks of layers can be trained
independently (LoLCATS, Zhang et al. 2024, arXiv 2410.10254, section 3.3, trains 405B as 14 blocks of 9 layers).
The job has three parts:

1. inputs   Writes the residual stream at the first layer of every block to disk, for all rows of the run. The inputs
            of block b + 1 are computed by block b from its own inputs, so at most one block is in memory.
2. blocks   Trains each block as an ordinary run in WORKDIR/blocks/NNN: one after the other, or in parallel by several
            processes or hosts on the same folder, each with its own `only`.
3. stitch   Combines the pretrained weights with the feature maps of all blocks into the checkpoint WORKDIR/linear,
            which can be loaded, exported, or trained further with LoRA.

Each part resumes where it was stopped. The rows are the same as those of one run of the same trainer over all layers.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx import extend, hub, linearize, paths, sharding
from lcx import model as model_lib
from lcx.convert import api as convert
from lcx.convert.core import model_source
from lcx.convert.core.model_source import ModelSource
from lcx.convert.core.relaid import RelaidSource
from lcx.convert.progress import Progress
from lcx.convert.start import SETTINGS, Start
from lcx.convert.workdir.source import LcxSource
from lcx.data import BatchSpec, Dataset, Mixture, Opened, Tokenizer
from lcx.errors import UserError, naming
from lcx.model import Decoder, Layers
from lcx.trainer import Trainer
from lcx.training import division, residual_store, statements
from lcx.training.signals import StopRequest
from lcx.wording import quantity

log = logging.getLogger(__name__)

FLUSH_EVERY = 16  # batches between flushes to disk; a kill loses at most so many


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """The data of a block's training run: the residual stream at its first layer.

    Attributes:
      folder: the folder of all recorded streams.
      depth: index of the block's first layer.
      text: the data that the rows were made from.
    """

    folder: str
    depth: int
    text: Dataset | Mixture

    def opened(self) -> "BlockInputs":
        return self

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text.load_tokenizer()

    def describe_special_tokens(self) -> str:
        return self.text.describe_special_tokens()

    def remarks(self) -> list[str]:
        """Nothing: remarks on the text were printed when its rows were recorded."""
        return []

    def batches(self, spec: BatchSpec) -> residual_store.Rows:
        """The rows as they were recorded. The spec's seed and seq_len are ignored; they were applied at recording."""
        return residual_store.Rows(
            stream_folder(pathlib.Path(self.folder), spec.split, self.depth),
            batch_size=spec.global_batch_size,
            process_index=spec.process_index,
            process_count=spec.process_count,
            repeat=spec.repeats,
        )


@dataclasses.dataclass(frozen=True)
class BlockTrainer(Trainer):
    """A training run of the layers first ... last - 1 of init_from, on their recorded inputs."""

    first: int = 0
    last: int = 0

    def _origin(self) -> dict[str, Any]:
        return super()._origin() | {"layers": [self.first, self.last]}

    def load(self, mesh) -> Start:
        source, model = _softmax(self)
        assert self.linearize is not None
        block = model_lib.part(self.linearize.model(model), self.first, self.last)
        fresh = linearize.initial(block, jax.random.fold_in(jax.random.key(self.seed), self.first))
        relaid = RelaidSource(source, block, {path: np.asarray(x) for path, x in fresh.items()}, self.first)
        params = model_source.to_devices(relaid, dtype=None, mesh=mesh)
        return Start(block, params, dict(source.carried), self.lora)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block-wise attention transfer; a job for `train`.

    Attributes:
      trainer: the settings of every block's run: init_from, linearize, objective, data, optimizer. Its `steps` applies
        to each block.
      layers_per_block: the last block has the remaining layers, possibly fewer.
      only: which blocks to train here, counted from 0; their inputs must have been written. (): write the inputs and
        stop. None: write the inputs, train all blocks, and stitch.
    """

    trainer: Trainer
    layers_per_block: int
    only: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.trainer.init_from is None or self.trainer.linearize is None:
            raise UserError("Blocks.trainer linearizes a pretrained model: set Trainer.init_from and Trainer.linearize")
        if self.layers_per_block < 1:
            raise UserError(f"Blocks.layers_per_block is {self.layers_per_block}, expected at least 1")

    def run(self, workdir: str) -> str | None:
        """Returns the folder of the linearized model; None if asked to stop earlier, or with `only`.

        Raises:
          UserError: a setting is wrong, the inputs of a block are missing, or the disk is too small.
        """
        folder = pathlib.Path(workdir)
        assert self.trainer.init_from is not None
        convert.verify_source(self.trainer.init_from, self.trainer.init_format)  # the blocks read it piece by piece
        source, model = _softmax(self.trainer)
        blocks = self.cut(model)
        unknown = [block for block in self.only or () if not 0 <= block < len(blocks)]
        if unknown:
            raise UserError(f"Blocks.only has block {unknown[0]}, expected 0 to {len(blocks) - 1}")
        linear = self._linear(model)
        if not self.only and not self._inputs(folder, source, model, blocks):
            return None
        for number in range(len(blocks)) if self.only is None else self.only:
            if _is_linear(model_lib.part(linear, *blocks[number])):
                _say(
                    f"block {number} of {len(blocks)}: layers {blocks[number][0]} to {blocks[number][1] - 1}"
                )
                own = _block_folder(folder, number)
                # With `only`, `train` has claimed it already.
                claim = paths.claimed(own, "--workdir") if self.only is None else contextlib.nullcontext()
                with claim:
                    run = self.block_trainer(folder, *blocks[number]).run(str(own))
                if run.step < self.trainer.last_step:
                    return None
        if self.only is not None:
            _say("next: the other blocks, then the same command without Blocks.only, which combines them")
            return None
        return self._stitch(folder, source, linear, blocks)

    def writes(self, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
        """The parts of the workdir that this job writes: with `only`, blocks that several hosts train at once."""
        return tuple(_block_folder(folder, number) for number in dict.fromkeys(self.only or ())) or (folder,)

    def cut(self, model: Decoder) -> list[tuple[int, int]]:
        """(first layer, last layer + 1) of every block."""
        cuts = [*range(0, model.num_layers, self.layers_per_block), model.num_layers]
        return list(zip(cuts[:-1], cuts[1:], strict=True))

    def check(self, workdir: str) -> None:
        """Raises UserError if a block in the workdir was started with other settings, before any inputs are written."""
        folder = pathlib.Path(workdir)
        for number, block in enumerate(self.cut(_softmax(self.trainer)[1])):
            if (own := _block_folder(folder, number)).exists():
                self.block_trainer(folder, *block).check(str(own))

    def _linear(self, model: Decoder) -> Decoder:
        assert self.trainer.linearize is not None
        return self.trainer.linearize.model(model)

    def largest(self, model: Decoder) -> tuple[int, int]:
        """(first layer, last layer + 1) of the first of the blocks that train and have the most layers."""
        linear = self._linear(model)
        blocks = [block for block in self.cut(model) if _is_linear(model_lib.part(linear, *block))]
        return max(blocks, key=lambda block: block[1] - block[0])

    def block_trainer(self, folder: pathlib.Path, first: int, last: int) -> BlockTrainer:
        """The training run of the layers first ... last - 1, whose inputs are below `folder`."""
        settings = {field.name: getattr(self.trainer, field.name) for field in dataclasses.fields(Trainer)}
        settings["data"] = BlockInputs(str(folder / "inputs"), first, self.trainer.data)
        return BlockTrainer(**settings, first=first, last=last)

    # ------------------------------------------------------------------------------------------------------- inputs

    def _inputs(self, folder: pathlib.Path, source: ModelSource, model: Decoder, blocks) -> bool:
        """Writes the inputs of every block. Returns False if asked to stop before they are complete."""
        if jax.process_count() > 1:
            raise UserError(
                f"Blocks: found {jax.process_count()} processes, but a single process must write the inputs: run once "
                "without --distributed and with Blocks.only = (), then the blocks with Blocks.only = (number,)"
            )
        trainer = self.trainer
        _ = self._opened  # tokenises the data first, so that a mistake in it shows before anything is written
        layouts = self.layouts(model)
        residual_store.check_space(
            folder,
            [layout for layout in layouts.values() for _ in blocks],
            checkpoints=self.checkpoint_bytes(source, model, blocks),
            settings="lower Trainer.steps, seq_len or keep_checkpoints, raise Blocks.layers_per_block, or set another "
            "--workdir",
        )
        folder = folder / "inputs"
        mesh = division.mesh_of(trainer)
        assert trainer.init_from is not None
        about = {
            "init_from": hub.place(trainer.init_from),
            "rope_scaling": trainer.rope_scaling,
            "context_length": trainer.context_length,
            "seed": trainer.seed,
        }
        with jax.set_mesh(mesh), StopRequest() as stop:
            for split, layout in layouts.items():
                with self._text(split, model) as batches:
                    about["data"] = batches.fingerprint
                for number, (first, _) in enumerate(blocks):
                    before = blocks[number - 1] if number else None
                    place = stream_folder(folder, split, first)
                    with residual_store.Writer(place, layout, about) as writer:
                        if writer.rows < layout.rows and not self._depth(
                            writer, layout, folder, split, before, source, model, mesh, stop
                        ):
                            return False
                    _say(f"{split} inputs of block {number} of {len(blocks)}: {quantity(layout.rows, 'row')}")
        return True

    def checkpoint_bytes(self, source: ModelSource, model: Decoder, blocks) -> int:
        """An upper bound of the disk space for all checkpoints, in bytes.

        These are keep_checkpoints of every block, one more that is being written, and the stitched model. Weights that
        train take 4 bytes each; the others at most as many as the widest dtype in which the model is stored.
        """
        linear, stored = self._linear(model), max(info.dtype.itemsize for info in source.leaves.values())

        def size(part: Any) -> int:
            weights = {"params": model_lib.abstract_params(part)}
            leaves = zip(
                *map(jax.tree.leaves, (weights, self.trainer.optimizer.trains(weights))), strict=True
            )
            return sum(leaf.size * (4 if trains else stored) for leaf, trains in leaves)

        sizes = [
            size(part) for part in (model_lib.part(linear, *block) for block in blocks) if _is_linear(part)
        ]
        return self.trainer.keep_checkpoints * sum(sizes) + max(sizes) + size(linear)

    def layouts(self, model: Decoder) -> dict[str, residual_store.Layout]:
        """{split: layout} of the stream stored for each block: "train", and "eval" if there is held-out data."""
        trainer = self.trainer
        rows = {"train": trainer.steps * trainer.batch_size}
        if held_out := self._held_out_batches(model):
            rows["eval"] = held_out * trainer.batch_size
        dtype = trainer.dtype or model.dtype
        return {
            split: residual_store.Layout(count, trainer.seq_len, model.hidden_size, dtype)
            for split, count in rows.items()
        }

    def _held_out_batches(self, model: Decoder) -> int:
        try:
            with self._text("eval", model) as batches:
                return min(self.trainer.eval_batches, batches.num_batches or self.trainer.eval_batches)
        except UserError as error:
            log.warning("no evaluation: %s", error)
            return 0

    @functools.cached_property
    def _opened(self) -> Opened:
        return self.trainer.data.opened()

    def _text(self, split: str, model: Decoder) -> Any:
        trainer = self.trainer
        rows = BatchSpec(
            split, trainer.batch_size, trainer.seq_len, trainer.seed, vocab_size=model.vocab_size
        )
        return self._opened.batches(rows)

    def _depth(self, writer, layout, folder, split, before, source, model, mesh, stop) -> bool:
        """Writes the stream at one depth, computed from the text or by the previous block. False if asked to stop."""
        size = self.trainer.batch_size
        if before is None:
            forward, batches = _embedding(source, model), self._text(split, model)
        else:
            forward = _block(source, model, before, mesh)
            batches = residual_store.Rows(stream_folder(folder, split, before[0]), batch_size=size)
        label = f"{split} inputs at layer {0 if before is None else before[1]}"
        with batches, Progress(label, (layout.rows - writer.rows) * layout.row_bytes) as progress:
            if writer.data is not None:
                batches.restore(writer.data)
            done = 0
            while writer.rows < layout.rows:
                if stop.requested(done):
                    writer.flush()
                    return False
                batch = next(batches)
                masks = {name: batch[name] for name in residual_store.MASKS}
                # Without the rows of padding that a mesh may add.
                stream = np.asarray(forward(sharding.shard_batch(batch, mesh)))[: batch["positions"].shape[0]]
                writer.write(stream, masks, batches.state())
                progress.add(stream.nbytes)
                done += 1
                if done % FLUSH_EVERY == 0:
                    writer.flush()
        writer.flush()
        return True

    # ------------------------------------------------------------------------------------------------------- stitch

    def _stitch(self, folder: pathlib.Path, source: ModelSource, linear: Decoder, blocks) -> str:
        """Writes the pretrained weights with the trained feature maps of all blocks; returns the folder."""
        # {path in the whole model: one row per layer}. Blocks number stages and layers from 0, so paths are translated.
        fresh: dict[str, list[np.ndarray]] = {}
        for number, (first, last) in enumerate(blocks):
            part = model_lib.part(linear, first, last)
            trained = LcxSource(_block_folder(folder, number)) if _is_linear(part) else None
            for at, own in zip(model_lib.layers(linear)[first:last], model_lib.layers(part), strict=True):
                for path in model_source.leaf_shapes(part):
                    if trained is not None and path.startswith(f"{own.path}/") and linearize.is_new(path):
                        whole = tuple(slice(0, size) for size in trained.leaves[path].shape[1:])
                        row = trained.read(path, (slice(own.repeat, own.repeat + 1), *whole))
                        fresh.setdefault(at.path + path.removeprefix(own.path), []).append(row)
        stitched = RelaidSource(source, linear, {path: np.concatenate(rows) for path, rows in fresh.items()})
        target = folder / "linear"
        _say(f"wrote {target}: {convert.write(target, stitched, format='lcx', overwrite=True)}")
        _say(f"{statements.following(str(target), str(folder))}, or LoRA (configs/linearize/llama_lora.gin)")
        return str(target)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def stream_folder(folder: pathlib.Path, split: str, depth: int) -> pathlib.Path:
    return folder / split / f"depth_{depth:03d}"


def _block_folder(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / "blocks" / f"{number:03d}"


def _is_linear(part: Layers) -> bool:
    return bool(linearize.linear_layers(part))


@naming(SETTINGS)
def _softmax(trainer: Trainer) -> tuple[ModelSource, Decoder]:
    """The source of the pretrained weights, and their softmax model with its context extended."""
    assert trainer.init_from is not None
    source = convert.source(trainer.init_from, trainer.init_format)
    model = extend.extend_model(source.model, trainer.rope_scaling, trainer.context_length)
    return source, trainer.adjusted(model)


def _embedding(source: ModelSource, model: Decoder):
    name = "embed/embedding"
    whole = tuple(slice(0, size) for size in source.leaves[name].shape)
    table = {"params": {"embedding": jnp.asarray(source.read(name, whole))}}
    run = jax.jit(functools.partial(model.embedding().apply, dtype=jnp.dtype(model.dtype)))
    return lambda batch: run(table, batch["tokens"])


def _block(source: ModelSource, model: Decoder, block: tuple[int, int], mesh):
    part = model_lib.part(model, *block)
    # Nothing is trained here, so the weights are held in the dtype of the computation instead of float32.
    params = model_source.to_devices(
        RelaidSource(source, part, {}, block[0]), dtype=np.dtype(part.dtype), mesh=mesh
    )
    run = jax.jit(part.apply)
    return lambda batch: run(
        {"params": params}, batch["residual"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
