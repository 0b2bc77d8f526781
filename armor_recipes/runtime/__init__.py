"""The room of the runtime: the linear layer that runs `A (S (B x))`, and its backends."""
