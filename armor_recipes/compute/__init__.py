"""What all computing rests on: the state of torch that results may depend on, the checks at the doors of compiled code, and what
becomes of freed memory.
"""

from armor_recipes.compute.doors import check_tensors
from armor_recipes.compute.memory import give_back
from armor_recipes.compute.state import drawn_alike, plain_torch
from armor_recipes.exhaustion import is_out_of_memory

__all__ = ["check_tensors", "drawn_alike", "give_back", "is_out_of_memory", "plain_torch"]
