"""Checkpoints: complete, verified, independent of the mesh. Nothing else in lcx imports Orbax or tensorstore.

checkpointer  Checkpointer saves and restores the steps of a run, through Orbax
folder        what lies on disk: steps, the record of what was saved, documents of JSON
tree          a pytree <-> the flat arrays of an item
slices        arrays read and written slice by slice, in the memory of one slice
fingerprint   a number per array that shows whether it still holds the values that were saved
model_json    a model as JSON, and back
"""

from lcx.checkpoint.checkpointer import Checkpointer
from lcx.checkpoint.folder import committed_steps, find_step, metadata, read_json, read_record
from lcx.checkpoint.tree import as_stored

__all__ = [
    "Checkpointer",
    "as_stored",
    "committed_steps",
    "find_step",
    "metadata",
    "read_json",
    "read_record",
]
