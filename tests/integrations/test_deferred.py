"""What hangs behind somebody else's import: it happens once, after the import that succeeds, and never ends it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import zipfile
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from armor_recipes.errors import ArmorError
from armor_recipes.integrations.deferred import _Watcher, after_import

HOST = "host_of_a_watcher"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that nobody has imported, with a module in it; what a test leaves behind is removed."""
    folder = tmp_path / HOST
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text("done = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield folder
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.startswith(HOST)]:
        del sys.modules[name]


def part() -> Any:
    return importlib.import_module(f"{HOST}.part")


def watching(calls: list[object]) -> None:
    """Note whether the module had run when the action was called."""
    after_import(f"{HOST}.part", lambda: calls.append(getattr(sys.modules[f"{HOST}.part"], "done", False)))


def test_it_happens_once_after_the_module_has_run() -> None:
    calls: list[object] = []
    before = list(sys.meta_path)
    watching(calls)
    importlib.import_module(HOST)
    assert importlib.util.find_spec(f"{HOST}.part") is not None
    assert calls == []
    module = part()
    importlib.reload(module)
    part()
    assert calls == [True]
    assert sys.meta_path == before
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_at_once_where_it_is_imported_already() -> None:
    part()
    calls: list[object] = []
    watching(calls)
    assert calls == [True]


@pytest.mark.parametrize(
    "error", [ImportError("no such name"), AttributeError("gone"), ArmorError("taken"), OSError(5)]
)
@pytest.mark.parametrize("imported", [False, True])
def test_an_action_that_fails_is_told_and_ends_no_import(error: Exception, imported: bool) -> None:
    def fail() -> None:
        raise error

    def watch_and_import() -> None:
        after_import(f"{HOST}.part", fail)
        assert part().done

    if imported:
        part()
    with pytest.warns(RuntimeWarning, match=rf"does not work with {HOST}\.part .*: {type(error).__name__}: ") as warned:
        watch_and_import()
    importlib.reload(part())
    assert len(warned) == 1


def test_an_import_that_fails_is_waited_for_again(host: Path) -> None:
    calls: list[object] = []
    watching(calls)
    (host / "part.py").write_text("raise RuntimeError('half')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half"):
            part()
    assert calls == []
    (host / "part.py").write_text("done = True  # mended\n")
    importlib.invalidate_caches()
    part()
    assert calls == [True]


def test_a_module_that_does_not_exist_is_none() -> None:
    after_import(f"{HOST}.missing", lambda: pytest.fail("there is nothing to act on"))
    assert importlib.util.find_spec(f"{HOST}.missing") is None
    with pytest.raises(ModuleNotFoundError, match=f"{HOST}.missing"):
        importlib.import_module(f"{HOST}.missing")


def test_two_that_ask_each_other_for_the_same_module() -> None:
    calls: list[object] = []
    watching(calls)
    watching(calls)
    sys.meta_path.insert(0, AsksTheOthers())
    part()
    assert calls == [True, True]


class AsksTheOthers(MetaPathFinder):
    """As import hooks of other packages do."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        others = [finder for finder in sys.meta_path if finder is not self]
        return next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)


def test_a_finder_that_stands_in_front_only_delays_it(host: Path) -> None:
    calls: list[object] = []
    watching(calls)
    real = importlib.machinery.PathFinder

    class InFront(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            return real.find_spec(fullname, path, target) if fullname == f"{HOST}.part" else None

    sys.meta_path.insert(0, InFront())
    part()
    assert calls == []
    (host / "next.py").write_text("")
    importlib.import_module(f"{HOST}.next")
    assert calls == [True]


def test_asked_for_in_the_middle_of_the_import_it_waits_for_its_end(host: Path) -> None:
    (host / "part.py").write_text(f"import {HOST}.asks\ndone = True\n")
    (host / "asks.py").write_text(
        "from armor_recipes.integrations.deferred import after_import\nimport sys\ncalls = []\n"
        f"after_import('{HOST}.part', lambda: calls.append(sys.modules['{HOST}.part'].done))\n"
    )
    (host / "next.py").write_text("")
    part()
    importlib.import_module(f"{HOST}.next")
    assert sys.modules[f"{HOST}.asks"].calls == [True]


def test_modules_that_share_a_loader_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as file:
        file.writestr(f"{HOST}_zipped.py", "done = True")
        file.writestr(f"{HOST}_other.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "zipped.zip"))
    calls: list[str] = []
    after_import(f"{HOST}_zipped", lambda: calls.append("zipped"))
    importlib.util.find_spec(f"{HOST}_zipped")
    importlib.import_module(f"{HOST}_other")
    assert calls == []
    importlib.import_module(f"{HOST}_zipped")
    assert calls == ["zipped"]


def test_threads_that_import_at_once(host: Path) -> None:
    (host / "part.py").write_text("import time\ntime.sleep(0.1)\ndone = True\n")
    calls: list[object] = []
    watching(calls)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(part().done)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (calls, found) == ([True], [True] * 8)
    assert not [finder for finder in sys.meta_path if isinstance(finder, _Watcher) and finder.module.startswith(HOST)]
