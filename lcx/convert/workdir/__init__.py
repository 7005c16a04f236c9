"""lcx's own checkpoints: workdirs whose steps are read parameter by parameter, or restored through Orbax."""
