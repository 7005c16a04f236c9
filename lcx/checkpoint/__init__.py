"""Checkpoints: complete, verified, independent of the mesh. Nothing else in lcx imports Orbax or tensorstore.

checkpointer  Checkpointer saves and restores the steps of a run, through Orbax
folder        the layout on disk: step folders, the record of what was saved, JSON documents
tree          converts between a pytree and the flat arrays of an item
slices        reads and writes arrays slice by slice, holding one slice in memory at a time
fingerprint   a 32-bit checksum per array, to detect corrupted values
model_json    converts a model to JSON and back
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
