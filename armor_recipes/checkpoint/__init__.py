"""The room of the checkpoint: packing, the compressed-tensors layout, writing, reading, staging into place."""
