"""Linear forms: what is linear in all but its module (transposed layers, fused experts) as ordinary `nn.Linear`s, and back."""

from armor_recipes.model.forms.convert import (
    forms_of,
    fused_keys,
    fused_names,
    fused_state,
    layouts,
    linear_parts,
    linearise,
    restore,
)
from armor_recipes.model.forms.layout import Layout, Slice

__all__ = [
    "Layout",
    "Slice",
    "forms_of",
    "fused_keys",
    "fused_names",
    "fused_state",
    "layouts",
    "linear_parts",
    "linearise",
    "restore",
]
