"""lcx's own checkpoints: a workdir whose steps are read parameter by parameter, or restored through Orbax."""
