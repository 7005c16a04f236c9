"""Operators: pure array functions, each with a reference, a fast portable form and kernels; see dispatch.py."""

# Operators give this name (jax.ad_checkpoint.checkpoint_name) to residuals that are expensive to recompute, so that
# rematerialisation policies can save them and a rematerialised block does not run its mixer twice.
MIXER_RESIDUALS = "mixer_residuals"

# The results of products that are hidden from those policies in a function with a gradient of its own.
PRODUCTS = "products"
