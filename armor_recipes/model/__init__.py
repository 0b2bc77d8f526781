"""A model as the engine sees it: what its config says, its stacks of blocks, their replay, hooks, views, and a store of weights."""
