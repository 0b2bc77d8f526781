"""Where weights are: read by every step, written by the commit alone (`session/commit.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from armor_recipes.compute.scratch import Scratch
from armor_recipes.model.cache import States, through_cache

V = TypeVar("V")
InputHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]
OutputHook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


class WeightStore(Protocol):
    """The parameters of a model by full name, in its compute dtype."""

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """What parameters held that were written since `keep_originals`, where they gave another function since."""

    def keep_originals(self, wanted: bool) -> None:
        """Forget the originals, and keep those of what is written from now on where they are wanted."""

    def read(self, parameter: str) -> Tensor:
        """The present values, not to be changed. Raises AttributeError where the model has no such parameter."""

    def write(self, parameter: str, value: Tensor, *, same_function: bool = False) -> None:
        """Replace the values. `same_function` says that the model gives what it gave before."""

    def keep(self, value: V) -> V:
        """What stays to the end of the run (a tensor, or what holds some), where such things are."""

    def change_activations(self, module: str, before: InputHook | None, after: OutputHook | None) -> None:
        """Let what comes to a module, and what it puts out, pass through these instead of those given before; None leaves it."""

    def change_cache(self, module: str, change: States) -> None:
        """Let keys and values of an attention module pass through this before its cache takes them."""

    def lent(self, parameters: Sequence[str]) -> AbstractContextManager[None]:
        """Give the memory of these back while a step holds something in their place; afterwards they mean nothing until written."""


class InMemory:
    """All weights of a model in memory.

    `stored_dtype` is that of the checkpoint: originals are kept in it where they fit. `teacher` are originals of a model that came
    changed already: the dense weights of those parameters in which it differs. With a `scratch`, in which the model's weights are,
    all that is kept goes there, too.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stored_dtype: torch.dtype,
        teacher: Mapping[str, Tensor] | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self._scratch = scratch
        self._model = model
        self._stored_dtype = stored_dtype
        self._teacher = {name: self._narrow(value) for name, value in (teacher or {}).items()}
        self._originals: dict[str, Tensor] | None = None
        self._handles: dict[str, list[RemovableHandle]] = {}

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """What parameters held when they were first written since `keep_originals`; and the teacher's."""
        return self._teacher if self._originals is None else self._originals

    def keep_originals(self, wanted: bool) -> None:
        """Forget the originals, and keep those of what is written from now on where they are wanted."""
        self._originals = dict(self._teacher) if wanted else None

    def read(self, parameter: str) -> Tensor:
        """The present values, which are the model's own memory."""
        return self._model.get_parameter(parameter).detach()

    def write(self, parameter: str, value: Tensor, *, same_function: bool = False) -> None:
        """Copy the values in place."""
        own = self._model.get_parameter(parameter).data
        if self._originals is not None and not same_function and parameter not in self._originals:
            self._originals[parameter] = self._narrow(own)
        own.copy_(value)

    def keep(self, value: V) -> V:
        """As it is, or in the scratch."""
        return value if self._scratch is None else self._scratch.keep_all(value)

    def _narrow(self, value: Tensor) -> Tensor:
        """A copy, in the dtype of the checkpoint where that holds the numbers."""
        narrow = value.to(self._stored_dtype, copy=True)
        return self.keep(narrow if torch.equal(narrow.to(value.dtype), value) else value.clone())

    def change_activations(self, module: str, before: InputHook | None, after: OutputHook | None) -> None:
        """Register them as hooks, which stay with the model."""
        found = self._model.get_submodule(module)
        for handle in self._handles.pop(module, ()):
            handle.remove()
        handles = [] if before is None else [found.register_forward_pre_hook(before)]
        handles += [] if after is None else [found.register_forward_hook(after)]
        self._handles[module] = handles

    def change_cache(self, module: str, change: States) -> None:
        """Register a hook, which stays with the model."""
        found = self._model.get_submodule(module)
        found.register_forward_pre_hook(through_cache(found, change), with_kwargs=True)

    @contextmanager
    def lent(self, parameters: Sequence[str]) -> Iterator[None]:
        """Empty them meanwhile; afterwards they have their shape again and hold zeros."""
        weights = [self._model.get_parameter(name) for name in parameters]
        shapes = [weight.shape for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data.new_empty(0)
            yield
        finally:
            for weight, shape in zip(weights, shapes, strict=True):
                zeros = None if self._scratch is None else self._scratch.empty(tuple(shape), weight.dtype)
                weight.data = weight.data.new_zeros(shape) if zeros is None else zeros
