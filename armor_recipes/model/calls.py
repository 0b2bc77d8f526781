"""One call of a block: its arguments, and the block run on them or on a part of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.compute import is_out_of_memory

#: A block run by itself must reproduce the model's own activations up to this share of their norm.
REPLAY_TOLERANCE = 1e-3
#: What a model's own code raises where it is called otherwise than it expects.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a block: its arguments without the hidden states, and those `(B, L, H)` by themselves.

    `name` is that of the hidden states' argument; empty where they come first without one.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str = ""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        """Split a block's arguments as the model passes them: hidden states first, or by name.

        By name they are `hidden_states`, or the first tensor. Raises TypeError where there is none.
        """
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], dict(kwargs))
        rest = dict(kwargs)
        tensors = (name for name, value in rest.items() if isinstance(value, Tensor))
        name = "hidden_states" if isinstance(rest.get("hidden_states"), Tensor) else next(tensors, "")
        if args or not name:
            raise TypeError("a block is called without hidden states")
        return cls(rest.pop(name), (), rest, name)

    def run(self, block: Callable[..., Any]) -> Tensor:
        """The block's output hidden states `(B, L, H)`."""
        if self.name:
            out = block(**{self.name: self.hidden}, **self.kwargs)
        else:
            out = block(self.hidden, *self.args, **self.kwargs)
        hidden = hidden_states(out)
        if not isinstance(hidden, Tensor):
            raise TypeError(f"a block gives no tensor first, but a {type(hidden).__name__}")
        return hidden

    def part(self, windows: slice) -> LayerCall:
        """The call for some windows of the batch: their share of each tensor of the arguments whose first dimension is the batch's.

        Which tensors these are is a guess by their shape; `comes_apart` says whether it is right.
        """
        batch = len(self.hidden)

        def part(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[windows] if batch > 1 and value.ndim and len(value) == batch else value
            if type(value) is dict:
                return {key: part(inner) for key, inner in value.items()}
            return type(value)(map(part, value)) if type(value) in (tuple, list) else value

        return LayerCall(part(self.hidden), part(self.args), part(self.kwargs), self.name)

    def comes_apart(self, block: Callable[..., Any], parts: Sequence[slice]) -> bool:
        """Whether the block gives for these parts of the batch what it gives for all of it, token by token but for rounding."""
        whole = self.run(block)
        try:
            joined = torch.cat([self.part(windows).run(block) for windows in parts])
        except CALL_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return False
        return joined.shape == whole.shape and tokens_agree(joined, whole)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments, besides the hidden states."""
        yield from _tensors((self.args, self.kwargs))

    @property
    def is_plain(self) -> bool:
        """Whether its arguments are tensors, numbers, texts and tuples of those alone, in which a block can leave nothing."""
        return _is_plain((self.args, tuple(self.kwargs.values())))

    def without(self, names: Collection[str]) -> LayerCall:
        """The call without some of its named arguments."""
        return replace(self, kwargs={name: value for name, value in self.kwargs.items() if name not in names})

    def same_tensors(self, other: LayerCall) -> bool:
        """Whether another call has the same tensors among its arguments, whatever else there is."""
        return _same(list(self.tensors()), list(other.tensors()))

    def same_arguments(self, other: LayerCall) -> bool:
        """Whether another call has the same ones, whatever its hidden states."""
        return self.name == other.name and _same(self.args, other.args) and _same(self.kwargs, other.kwargs)


def hidden_states(output: Any) -> Any:
    """A block's hidden states, which come alone, or first among others."""
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    return next(iter(output.values()), None) if isinstance(output, Mapping) else output


def tokens_agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors `(…, H)` are the same but for rounding, token by token."""
    tolerance = max(REPLAY_TOLERANCE, 4 * torch.finfo(wanted.dtype).eps)
    errors, sizes = (x.float().norm(dim=-1) for x in (found - wanted, wanted))
    return bool((errors <= tolerance * sizes).all())


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; infinite where their shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.float().norm())
    error = float((found - wanted).float().norm())
    return error / size if size else error


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool(torch.equal(left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, (Tensor, nn.Module)) or type(left) is not type(right):
        return False
    return bool(left == right)
