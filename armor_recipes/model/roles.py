"""What linear modules are for in their block, told from classes and places on the module tree: no list of architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from armor_recipes.model.blocks import Stacks
from armor_recipes.model.experts import expert_of
from armor_recipes.model.linears import is_linear

Role = Literal["attention", "mlp", "router", "other"]
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
#: Modules that mix tokens without attention: state spaces, recurrences, convolutions.
_RECURRENCE = re.compile(r"mamba|ssm|rwkv|recurren|delta|lstm|conv|mixer2|hyena|retention", re.IGNORECASE)


def roles(modules: Sequence[tuple[str, nn.Module]], stacks: Stacks) -> Mapping[str, Role]:
    """The role of each linear module in a list of blocks, by name; those outside of all blocks have none.

    `attention`: below a module of the block whose class is named after it. `router`: beside experts, with an output for each of
    them, or with a single output (the gate of a shared expert). `other`: below a module that mixes tokens in another way (a state
    space, a recurrence). `mlp`: all else.
    """
    classes = {name: type(module).__name__ for name, module in modules}
    linear = [name for name, module in modules if is_linear(module)]
    experts = Counter(place for name in linear for place in _first_of_expert(name))
    blocks = len(stacks.names)
    found: dict[str, Role] = {}
    for name, module in modules:
        if not isinstance(module, nn.Linear):
            continue
        block = stacks.block_of(name)
        if block is not None and block < blocks:
            found[name] = _role(name, module, stacks.block_name(block), classes, experts)
    return found


def _first_of_expert(name: str) -> list[str]:
    """The module of an expert's mixture, once for each part of the expert; empty for what is no expert's."""
    expert = expert_of(name)
    return [] if expert is None else [f"{expert.layer}\0{expert.part}"]


def _role(name: str, module: nn.Linear, block: str, classes: Mapping[str, str], experts: Counter[str]) -> Role:
    inside = name.removeprefix(f"{block}.").split(".")[:-1]
    above = [f"{block}.{'.'.join(inside[: end + 1])}" for end in range(len(inside))]
    kinds = [classes.get(part, "") for part in above]
    if any(_ATTENTION.search(kind) for kind in kinds):
        return "attention"
    if any(_RECURRENCE.search(kind) for kind in kinds):
        return "other"
    if expert_of(name) is None and _counts(module.out_features, name, experts):
        return "router"
    return "mlp"


def _counts(outputs: int, name: str, experts: Counter[str]) -> bool:
    """Whether a module has one output, or one for each expert of a mixture in the same place."""
    if outputs == 1:
        return True
    parent = name.rpartition(".")[0]
    return any(
        key.partition("\0")[0].rpartition(".")[0] == parent and count == outputs for key, count in experts.items()
    )
