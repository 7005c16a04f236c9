"""The folder of a run: its config.gin, and its checkpoints after a non-finite step.

A run that is refused before it has written anything leaves the folder and config.gin as they were.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax

from lcx import paths
from lcx.buckets import copies, is_url
from lcx.buckets import workdirs as buckets
from lcx.checkpoint import Checkpointer
from lcx.errors import UserError
from lcx.locks import LOCK
from lcx.multihost import channel

_OF_MODELS = ("config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json")


@contextlib.contextmanager
def claimed(folders: Sequence[pathlib.Path], config: str) -> Iterator[None]:
    """Lets no other process write to these folders within the block, and keeps the configuration in each."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(paths.claimed(folder, "--workdir"))
            stack.enter_context(kept_config(folder, config))
        yield


@contextlib.contextmanager
def kept_config(folder: pathlib.Path, text: str) -> Iterator[None]:
    """Writes config.gin; an existing one with other contents is renamed to config.1.gin, config.2.gin, ...

    If the block raises an exception before anything else in the folder has changed, this is undone.
    """
    config, old = folder / "config.gin", None
    if not text or (config.exists() and config.read_text() == text):
        yield
        return
    before = _contents(folder)
    (folder / "config.gin.new").write_text(text)
    if config.exists():
        number = next(i for i in range(1, 1 << 30) if not (folder / f"config.{i}.gin").exists())
        old = config.rename(folder / f"config.{number}.gin")
    (folder / "config.gin.new").rename(config)
    try:
        yield
    except BaseException:
        ours = {config, old}
        unchanged = {path: about for path, about in _contents(folder).items() if path not in ours}
        if unchanged == {path: about for path, about in before.items() if path != config}:
            config.unlink()
            if old is not None:
                old.rename(config)
        raise


def _contents(folder: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
    """(size, time of the last change) of every file below a folder, except the lock."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(root) / name
            with contextlib.suppress(OSError):  # a file that was removed in the meantime
                if name != LOCK:
                    found[path] = (path.lstat().st_size, path.lstat().st_mtime_ns)
    return found


@contextlib.contextmanager
def opened(workdir: str, every: int | None = None) -> Iterator[pathlib.Path]:
    """The folder on this machine that a run writes to. Call it on every process.

    Args:
      every: of a workdir in a bucket, copy only the checkpoints of steps that are multiples of it, and the last.

    One in a bucket is copied there by process 0. The other processes must see its folder: those of one machine do.

    Raises:
      UserError: it is no folder, the bucket cannot be used, or the processes run on several machines.
    """
    if not is_url(workdir):
        folder = paths.destination(workdir, "--workdir")
        paths.refuse_inside(folder, "--workdir")
        _refuse_model(folder)
        yield folder
        return
    alone = jax.process_count() == 1
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        problem: UserError | None = None
        folder = copies.cache(workdir, "workdirs")
        try:
            folder = stack.enter_context(buckets.opened(workdir, every or 1)) if first else folder
        except UserError as error:
            problem = error
        if not alone:  # no collective: process 0 may copy for many minutes
            channel.gather("workdir, here", "")
            seen = channel.gather("workdir, seen", "" if problem is not None else str(folder.is_dir()))
            if problem is None and "" in seen:
                problem = UserError(f"process 0 cannot use the workdir {workdir}, see its message")
            elif problem is None and "False" in seen:
                problem = UserError(
                    f"{workdir} is kept on the disk of process 0, and {jax.process_count()} processes on several "
                    "machines need a folder that all of them see: mount the bucket (gcsfuse, Mountpoint for S3) and "
                    "set --workdir to the mount"
                )
        if problem is not None:
            raise problem
        yield folder


def _refuse_model(folder: pathlib.Path) -> None:
    """Raises UserError for a folder that holds a model in the format of another library, and no run.

    Commands that read it later would find that model, not the run.
    """
    if (folder / "checkpoints").is_dir():
        return
    for name in _OF_MODELS:
        if (folder / name).is_file():
            raise UserError(
                f"--workdir is {folder}, which holds a model ({name}): set --workdir to another folder, and to start "
                "from this model Trainer.init_from"
            )


def retreat(checkpointer: Checkpointer, bad_step: int) -> str:
    """After a non-finite step: sets aside the checkpoint that led to it, and says which one remains.

    A checkpoint of the step before holds the weights that produced the non-finite values.
    """
    with contextlib.suppress(UserError):
        checkpointer.close()  # waits for a save in progress
    checkpointer.reject(bad_step - 1)
    steps = checkpointer.steps()
    return f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"
