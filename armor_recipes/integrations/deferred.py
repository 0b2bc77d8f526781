"""Register with a neighbour (compressed-tensors, peft) when somebody imports it, and not before.

`import armor_recipes` must be enough for `from_pretrained` to read our checkpoints, but importing compressed-tensors
costs seconds (it imports torch and transformers), which `armor-apply --help` need not pay.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, action: Callable[[], object]) -> None:
    """Call `action` once: now if `module` is imported already, else right after it was, before its importer goes on.

    The import is the caller's: an error of `action` becomes a RuntimeWarning, and does not end it.
    """
    watcher = _Watcher(module, action)
    sys.meta_path.insert(0, watcher)
    if _imported(module):
        watcher.act()


class _Watcher(MetaPathFinder):
    """Lets the other finders find `module`, and hangs `action` behind its execution."""

    def __init__(self, module: str, action: Callable[[], object]) -> None:
        self.module = module
        self.action = action
        self._asking = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the others are asked by `importlib.util.find_spec`
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != self.module:
            if _imported(self.module):  # past this finder: another one stood before it, or it came in the middle
                self.act()
            return None
        if getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ThenAct(spec.loader, self.act)
        return spec

    def act(self) -> None:
        """Do what is to be done, if that was not begun before."""
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread was faster
            return
        try:
            self.action()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"armor_recipes does not work with {self.module} in this process: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )


class _ThenAct(Loader):
    """The loader that was found, and an action after it has executed its module; the module itself keeps its loader."""

    def __init__(self, loader: Any, act: Callable[[], None]) -> None:
        self._loader = loader
        self._act = act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._act()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _imported(module: str) -> bool:
    found = sys.modules.get(module)
    return found is not None and not getattr(getattr(found, "__spec__", None), "_initializing", False)
