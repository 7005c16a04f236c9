"""Which activations the backward pass recomputes, by name."""

import jax

from lcx.ops import MIXER_RESIDUALS, PRODUCTS

BLOCK_INPUT = "block_input"  # the name of what a block reads

_FREE = {"sharding_constraint", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"}


def _all_but_free(primitive, *_, **__) -> bool:
    """Saves every result that took arithmetic, but recomputes copies.

    Copies include the weights as cast and gathered over fsdp: saved for the backward pass, they would hold the whole
    model on every device.
    """
    return primitive.name not in _FREE


REMAT = {
    "none": _all_but_free,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each block
    # Keep them too, in the memory of the host.
    "host": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Keep the results of the projections and of the mixers; recompute norms, activations, rotations.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(MIXER_RESIDUALS, PRODUCTS),
    ),
}
