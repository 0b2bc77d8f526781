"""What `auto` takes on a CPU: the first time that a shape meets a number of tokens, every way is timed, and the fastest kept.

| choice | how |
|---|---|
| `kernel` | the compiled kernel, from the packed tensors |
| `dense` | the core unpacked into a shared buffer, in the dtype of the layer's floats, and `F.linear` |
| `dense-float32` | the same in float32, which some processors multiply faster than 16-bit numbers |
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.runtime.kernel import KernelCall
from armor_recipes.runtime.scratch import run_dense, unpacked

KEEP_VARIABLE = "ARMOR_KEEP_DENSE"
CHOICES = ("kernel", "dense", "dense-float32")
TOKEN_CLASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""A batch is in the first class that is not smaller; all larger batches are in the last."""
_HOPELESS = 4.0
"""A way that takes this many times the best is not timed again."""
_LONG = 0.2
"""Seconds after which one run tells enough."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a choice depends on."""

    rows: int
    columns: int
    block_size: tuple[int, int]
    dtype: torch.dtype
    """Of the packed floats."""
    core: str
    """`float`, `int8` or `int4`."""
    group_size: int | None
    """Kept values of a quantised core that have one scale; None for a whole row."""
    activation: torch.dtype
    tokens: int
    """The class, from TOKEN_CLASSES."""
    threads: int
    kept: bool
    """Whether layers keep the unpacked core."""

    @classmethod
    def of(cls, x: Tensor, packed: PackedLinear) -> Situation:
        """Describe x `(..., I)` meeting a layer."""
        tokens = x.numel() // max(1, x.shape[-1])
        token_class = next((most for most in TOKEN_CLASSES if tokens <= most), TOKEN_CLASSES[-1])
        rows, columns = packed.shape
        threads = torch.get_num_threads()
        return cls(
            rows,
            columns,
            packed.block_size,
            packed.dtype,
            packed.core,
            packed.group_size,
            x.dtype,
            token_class,
            threads,
            keeps_dense(),
        )


@dataclass(slots=True)
class DenseCores:
    """The unpacked core of one layer, by dtype; filled only where ARMOR_KEEP_DENSE asks for it."""

    kept: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def get(self, packed: PackedLinear, dtype: torch.dtype) -> Tensor | None:
        """Return the core `(O, I)`, unpacked now or before, or None where nothing is kept."""
        if not keeps_dense():
            return None
        if dtype not in self.kept:
            self.kept[dtype] = unpacked(packed, dtype)
        return self.kept[dtype]


_choices: dict[Situation, str] = {}
_changes = [0]
"""How often choices were told or forgotten."""
_MOST_KNOWN = 64
"""Sizes of x whose choice a layer keeps at hand."""


def keeps_dense() -> bool:
    """Whether ARMOR_KEEP_DENSE is 1: every layer that meets a large batch then keeps its unpacked core beside the packed one."""
    return os.environ.get(KEEP_VARIABLE) == "1"


def choices() -> dict[Situation, str]:
    """Return what was measured or told so far, a copy."""
    return dict(_choices)


def tell(told: Mapping[Situation, str]) -> None:
    """Take these choices instead of measuring. Raises `RecipeError` for a name that is not in CHOICES."""
    for choice in told.values():
        if choice not in CHOICES:
            raise RecipeError(f"choice {choice!r} is unknown: choose one of {', '.join(CHOICES)}")
    _choices.update(told)
    _changes[0] += 1


def forget() -> None:
    """Forget all choices: each is measured again when it is met."""
    _choices.clear()
    _changes[0] += 1


def run_auto(x: Tensor, packed: PackedLinear, bias: Tensor | None, cores: DenseCores | None = None) -> Tensor:
    """Compute `A (S (B x)) + bias` `(..., O)` on the CPU in whatever way is the fastest for this shape; no gradients."""
    return AutoCall(packed, bias, cores)(x)


class AutoCall:
    """A layer, looked at once for many calls of `run_auto`. It keeps the tensors that it was made from."""

    __slots__ = ("_bias", "_cores", "_kernel", "_known", "_packed", "_told")

    def __init__(self, packed: PackedLinear, bias: Tensor | None, cores: DenseCores | None = None) -> None:
        self._packed, self._bias, self._cores = packed, bias, DenseCores() if cores is None else cores
        self._kernel = KernelCall(packed, bias)
        self._told, self._known = -1, dict[tuple[int, torch.dtype, int, bool], str]()

    def __call__(self, x: Tensor) -> Tensor:
        """See `run_auto`. Threads may call it at once."""
        if self._told != _changes[0]:
            self._told, self._known = _changes[0], {}
        key = x.numel(), x.dtype, torch.get_num_threads(), keeps_dense()
        choice = self._known.get(key)
        if choice is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known = {}
            choice = self._known[key] = self._choice(x)
        if choice == "kernel":
            return self._kernel(x)
        with torch.no_grad():
            return self._ways()[choice](x)

    @torch.no_grad()
    def _choice(self, x: Tensor) -> str:
        situation = Situation.of(x, self._packed)
        found = _choices.get(situation)
        if found is None:
            found = _choices[situation] = _measure(situation, self._ways())
        return found

    def _ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        packed, bias, cores = self._packed, self._bias, self._cores

        def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
            return run_dense(x, packed, bias, dtype, cores.get(packed, dtype))

        return {
            "kernel": self._kernel,
            "dense": lambda x: dense(x, packed.dtype),
            "dense-float32": lambda x: dense(x, torch.float32),
        }


def _measure(situation: Situation, ways: Mapping[str, Callable[[Tensor], Tensor]]) -> str:
    x = torch.full((situation.tokens, situation.columns), 0.5, dtype=situation.activation, device="cpu")
    best_name, best = "", float("inf")
    for name, way in ways.items():
        if name == "dense-float32" and situation.dtype == torch.float32:
            continue
        seconds = _seconds(way, x)  # the first run also warms up
        if seconds < min(_HOPELESS * best, _LONG):
            seconds = min(_seconds(way, x) for _ in range(2))
        if seconds < best:
            best_name, best = name, seconds
    return best_name


def _seconds(way: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    way(x)
    return time.perf_counter() - start
