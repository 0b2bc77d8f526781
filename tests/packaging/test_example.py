"""The example package: built, installed, found through its entry point, run, and refused in the wrong order."""

from __future__ import annotations

import ast
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import armor_recipes
from armor_recipes.errors import RecipeError
from armor_recipes.modifiers import modifiers, registry
from tests.packaging.test_distributions import build
from tests.support.engine import save_model
from tests.support.pages import ROOT

EXAMPLE = ROOT / "examples" / "armor-ria"
SMALL = ["calibration.samples=4", "calibration.dataset=builtin:random-tokens", "calibration.sequence_length=16"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "tree")
    return build("wheel", folder / "tree", folder)


@pytest.fixture
def _installed(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The wheel, unpacked where Python looks for packages; gone afterwards."""
    modifiers()  # those that come with the package are registered before the registry is copied
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry._discover.cache_clear()
    yield
    sys.modules.pop("armor_ria", None)
    registry._discover.cache_clear()


@pytest.mark.usefixtures("_installed")
def test_the_package_runs_its_recipe(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    output = str(tmp_path / "out")
    result = armor_recipes.apply(EXAMPLE / "ria.yaml", model=str(model), output=output, overrides=SMALL)
    assert len(result.modules) == 14
    loaded = armor_recipes.load(result.output)
    for name in result.modules:
        kept = (loaded.get_parameter(f"{name}.weight") != 0).unflatten(1, (-1, 4)).sum(-1)
        assert torch.equal(kept, torch.full_like(kept, 2))


@pytest.mark.usefixtures("_installed")
def test_its_field_is_checked() -> None:
    field = "prune_stage.prune_modifiers.RIAModifier.power=-1"
    with pytest.raises(RecipeError, match=r"RIAModifier\.power: must be at least 0"):
        armor_recipes.apply(EXAMPLE / "ria.yaml", overrides=[field])


def test_without_it_its_recipe_names_an_unknown_modifier() -> None:
    with pytest.raises(RecipeError, match="unknown modifier 'RIAModifier'"):
        armor_recipes.apply(EXAMPLE / "ria.yaml")


def test_all_that_it_imports_of_us_is_one_module() -> None:
    tree = ast.parse((EXAMPLE / "armor_ria.py").read_text(encoding="utf-8"))
    ours = [
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "armor" in (node.module or "")
    ]
    assert ours == ["armor_recipes.modifiers"]
