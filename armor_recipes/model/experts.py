"""The experts of a mixture as the engine sees them: linear modules below a module of experts, of which each token takes a few."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

#: `….experts.7.gate_proj`, or `….experts.expert_7.wi` of models that keep them in a dictionary.
_EXPERT = re.compile(r"(?P<layer>(?:.+\.)?[^.]*experts)\.(?:expert_)?(?P<number>\d+)\.(?P<part>.+)")
#: `….input_linear.7`, of models that keep one projection of all experts together.
_PROJECTION = re.compile(r"(?P<layer>.+)\.(?P<part>(?:input|output)_linear)\.(?P<number>\d+)")
#: Of an expert's rows in one call.
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Expert:
    """Where a linear module of an expert stands: `layer` is the module of the experts, `part` what the module is called in each."""

    layer: str
    number: int
    part: str


@lru_cache(maxsize=1 << 17)
def expert_of(name: str) -> Expert | None:
    """The expert that a module of this full name belongs to; None for all other modules, shared experts too."""
    found = _EXPERT.fullmatch(name) or _PROJECTION.fullmatch(name)
    return None if found is None else Expert(found["layer"], int(found["number"]), found["part"])


def in_parts(name: str, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What a call brings to a module, of an expert in four parts: rows `(t, I)` of several windows, in the order of the tokens.

    A statistic that keeps every fourth window apart then keeps a fourth of an expert's tokens apart, however few calls reach it.
    """
    if expert_of(name) is None or rows[0].ndim != 2:
        yield rows
        return
    for part in zip(*(x.tensor_split(_PARTS) for x in rows), strict=True):
        if len(part[0]):
            yield part


@contextmanager
def every_expert(*modules: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let modules of experts inside call every expert on all tokens, as long as outputs stay those of the tokens' own.

    Such a module has a flag `every_expert`. While it is set, all experts read the very same tensor.
    """
    flagged = [part for module in modules for part in module.modules() if wanted and can_call_every_expert(part)]
    try:
        for part in flagged:
            part.every_expert = True  # type: ignore[assignment]  # a plain flag
        yield
    finally:
        for part in flagged:
            del part.every_expert  # the class's own says no


def can_call_every_expert(module: nn.Module) -> bool:
    """Whether a module of experts has the flag."""
    return isinstance(getattr(type(module), "every_expert", None), bool)


def readers_within_experts(readers: Mapping[str, str]) -> dict[str, str]:
    """For each module the first that reads the same tensor, of an expert the first of its own, given the first of all.

    While every expert is called, all of a layer read one tensor; in use each reads its own tokens.
    """
    first: dict[tuple[str, str, int], str] = {}
    found = {}
    for name, reader in readers.items():
        expert = expert_of(name)
        found[name] = reader if expert is None else first.setdefault((reader, expert.layer, expert.number), name)
    return found
