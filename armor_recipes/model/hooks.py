"""One owner for every hook: nested scopes, each of which removes its own hooks on any exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from armor_recipes.model.experts import in_parts


class Hooks:
    """A depth-counted context manager. Hooks added inside a `with` belong to that depth and go when it is left.

    Leaving an inner scope never touches the hooks of an outer one. Adding a hook outside any scope is an error.
    """

    def __init__(self) -> None:
        self._scopes: list[list[RemovableHandle]] = []

    @property
    def depth(self) -> int:
        """How many scopes are open."""
        return len(self._scopes)

    @property
    def active(self) -> int:
        """How many hooks are in place."""
        return sum(len(scope) for scope in self._scopes)

    def __enter__(self) -> Hooks:
        self._scopes.append([])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in reversed(self._scopes.pop()):
            handle.remove()

    def before(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call `hook(module, args, kwargs)` before each forward of `module`, until the scope is left."""
        self._own(lambda: module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], None]) -> None:
        """Call `hook(module, args, output)` after each forward of `module`, until the scope is left."""
        self._own(lambda: module.register_forward_hook(hook))

    def rewriting(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `module` with the `(args, kwargs)` that `hook(module, args, kwargs)` gives, until the scope is left."""
        self._own(lambda: module.register_forward_pre_hook(hook, with_kwargs=True))

    def changing(self, module: nn.Module, change: Callable[[Any], Any]) -> None:
        """Put `change(output)` in the place of each output of `module`, until the scope is left."""
        self._own(lambda: module.register_forward_hook(lambda _, __, output: change(output)))

    def _own(self, add: Callable[[], RemovableHandle]) -> None:
        if not self._scopes:
            raise RuntimeError("a hook was added outside `with hooks:`; nothing would remove it")
        self._scopes[-1].append(add())


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a linear layer among the arguments that it is called with."""
    return args[0] if args else kwargs["input"]


def feeding(statistic: Any, name: str, pieces: Callable[[Tensor], Iterable[Tensor]] = lambda x: (x,)) -> Any:
    """A forward pre-hook that gives the pieces of the named module's input, by default all of it, to the statistic's `update`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for piece in pieces(input_of(args, kwargs)):
            for (rows,) in in_parts(name, piece):
                statistic.update(rows)

    return hook
