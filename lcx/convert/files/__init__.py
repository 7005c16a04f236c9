"""Files that hold tensors, whatever the model: readers that trust nothing, writers that appear whole or not at all."""
