"""PEFT adapters: reading, writing, merging, and continuing training from them."""
