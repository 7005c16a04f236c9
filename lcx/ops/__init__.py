"""Pure array functions: a reference, a form that runs anywhere at speed, and `implementation=` to name one."""

# Operators mark under this name (jax.ad_checkpoint.checkpoint_name) what their backward pass needs and is dear to
# compute again, so that rematerialising a block does not run its mixer twice.
MIXER_RESIDUALS = "mixer_residuals"
