"""What all computing rests on: the state of torch that results may depend on, and the checks at the doors of compiled code."""

from armor_recipes.compute.doors import check_tensors
from armor_recipes.compute.state import drawn_alike, plain_torch
from armor_recipes.exhaustion import is_out_of_memory

__all__ = ["check_tensors", "drawn_alike", "is_out_of_memory", "plain_torch"]
