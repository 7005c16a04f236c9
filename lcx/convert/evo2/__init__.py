"""Evo 2's checkpoints: savanna (training) and vortex (inference)."""
