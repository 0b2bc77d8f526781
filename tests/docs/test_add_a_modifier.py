"""docs/how-to/modifier.md, followed to the letter: packages with entry points, and runs of their recipes."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import armor_recipes
from armor_recipes.modifiers import modifiers, registry
from armor_recipes.recipe import reference_markdown
from tests.support.pages import ROOT, blocks

PAGE = ROOT / "docs" / "how-to" / "modifier.md"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's modules, installed as packages that register through the page's entry points; gone afterwards."""
    modifiers()  # those that come with the package are registered before the registry is copied
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    (group,) = (tomllib.loads(block.text)["project"]["entry-points"] for block in blocks("toml", page=PAGE))
    site = tmp_path / "site"
    modules = list(group[registry.ENTRY_POINT_GROUP].items())
    for (name, module), source in zip(modules, blocks("python", page=PAGE), strict=True):
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{name} = {module}\n")
        (site / f"{module}.py").write_text(source.text, encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    registry._discover.cache_clear()
    yield
    for _, module in modules:
        sys.modules.pop(module, None)
    registry._discover.cache_clear()


@pytest.mark.usefixtures("plugin")
def test_the_pages_modifier_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = blocks("yaml", page=PAGE)
    Path("ria.yaml").write_text(recipe.text, encoding="utf-8")
    result = armor_recipes.apply("ria.yaml", model=str(tiny_llama))
    assert len(result.modules) == 6
    model = armor_recipes.load(result.output)
    for name, module in result.modules.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal((weight != 0).unflatten(1, (-1, 4)).sum(-1), torch.full_like(weight[:, ::4], 2).long())
        assert 0 < module.stored_loss < 1
        assert module.stored_loss == pytest.approx(module.losses[-1], rel=1e-6)


@pytest.mark.usefixtures("plugin")
def test_the_pages_refiner_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, recipe = blocks("yaml", page=PAGE)
    Path("cosine.yaml").write_text(recipe.text, encoding="utf-8")
    result = armor_recipes.apply("cosine.yaml", model=str(tiny_llama))
    assert [row.unit for row in result.refinements] == ["model.layers.0", "model.layers.1"]
    assert all(module.refined == (result.refinements[0].modifier,) for module in result.modules.values())
    for row in result.refinements:
        assert 0 < min(row.losses) <= row.losses[0] < 2
    armor_recipes.load(result.output)


@pytest.mark.usefixtures("plugin")
def test_the_pages_modifier_is_in_schema_and_reference() -> None:
    kinds = registry.config_types()
    assert {"ARMORModifier", "NoWagModifier", "RIAModifier", "CosineRefineModifier"} <= set(kinds)
    reference = reference_markdown(kinds)
    assert "### `RIAModifier`" in reference
    assert "### `CosineRefineModifier`" in reference


def test_the_plugin_leaves_no_trace() -> None:
    assert not {"RIAModifier", "CosineRefineModifier"} & modifiers().keys()


def test_the_page_names_itself() -> None:
    assert str(Path(__file__).relative_to(ROOT)) in PAGE.read_text(encoding="utf-8")
