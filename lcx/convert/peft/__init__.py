"""PEFT adapters: read, written, merged, and as the start of training."""
