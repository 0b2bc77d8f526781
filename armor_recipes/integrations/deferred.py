"""Register with compressed-tensors when somebody imports it, and not before.

`import armor_recipes` must be enough for `from_pretrained` to read our checkpoints, but importing compressed-tensors
costs seconds (it imports torch and transformers), which `armor-apply --help` need not pay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(module: str, action: Callable[[], None]) -> None:
    """Call `action` once: now if `module` is imported already, else right after it was, before its importer goes on."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(module, action))


class _Watcher(MetaPathFinder):
    """Lets the other finders find `module`, and hangs `action` behind its execution."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module = module
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._then_act(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec

    def _then_act(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action()

        return execute_then_act
