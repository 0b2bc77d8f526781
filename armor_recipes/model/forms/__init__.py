"""Linear forms: what is linear in all but its module (a transposed layer, fused expert weights) as ordinary `nn.Linear`s, and back."""

from armor_recipes.model.forms.convert import forms_of, fused_names, fused_state, layouts, linearise, part_shape, restore
from armor_recipes.model.forms.layout import Layout, Slice

__all__ = [
    "Layout",
    "Slice",
    "forms_of",
    "fused_names",
    "fused_state",
    "layouts",
    "linearise",
    "part_shape",
    "restore",
]
