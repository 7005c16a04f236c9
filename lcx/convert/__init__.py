"""Checkpoints in other layouts <-> lcx: a rules engine, readers and writers of files, and one file a
family."""
