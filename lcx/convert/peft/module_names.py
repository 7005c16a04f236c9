"""Modules whose name in transformers 5 is not that of their tensors in a checkpoint: the router of Mixtral.

PEFT names modules as the class does, so an adapter made with transformers 4 has the name of the checkpoint. PEFT 0.21
on transformers 5 loads a module trained in full by the new name only.
"""

_CHECKPOINT, _CLASS = ".block_sparse_moe.gate", ".mlp.gate"


def of_checkpoint(module: str, others: str) -> str:
    """The name of a module in the checkpoint, of a model whose modules have names such as those in `others`."""
    return module.replace(_CLASS, _CHECKPOINT) if _CHECKPOINT in others else module


def of_class(name: str) -> str:
    """The name of a module, or of its tensor, in transformers 5."""
    return name.replace(_CHECKPOINT, _CLASS)
