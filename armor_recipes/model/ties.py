"""Output layers whose weight is that of the input embeddings, and their own copies of it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from armor_recipes.model.facts import text_config

_UNTIED = "_armor_untied"


def tied_output(model: Any) -> str | None:
    """The name of the output layer, where it is linear and its weight that of an embedding and of nothing else."""
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        return None
    places = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is output.weight
    ]
    name = next((name for name, module in places if module is output), None)
    others = [module for _, module in places if module is not output]
    return name if len(others) == 1 and isinstance(others[0], nn.Embedding) else None


def untie(model: Any, names: Collection[str]) -> None:
    """Give output layers copies of their weights, and the model a configuration of its own that says so: it is saved with both."""
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
    if names:
        model.config = copy.deepcopy(model.config)
        for config in {id(one): one for one in (model.config, text_config(model.config))}.values():
            config.tie_word_embeddings = False
        gone = {f"{name}.weight" for name in names}
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in gone}
        model.__dict__[_UNTIED] = tuple(dict.fromkeys((*untied(model), *names)))


def untied(model: Any) -> tuple[str, ...]:
    """What `untie` has given a weight of its own."""
    found: tuple[str, ...] = model.__dict__.get(_UNTIED, ())
    return found
