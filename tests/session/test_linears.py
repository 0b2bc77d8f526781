"""Linear modules and the places of their weights, found in one pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from armor_recipes.model.linears import Place, find_linears


def model() -> Any:
    made: Any = nn.Module()
    made.embed = nn.Embedding(4, 4)
    made.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))
    first, second = made.layers
    second["a"] = first["a"]
    second["b"].weight = made.embed.weight
    made.scale = nn.Module()
    made.scale.factor = first["b"].weight
    return made


def test_every_place_of_a_weight_is_known() -> None:
    linears = find_linears(model())
    assert list(linears.modules) == ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]
    assert linears.modules["layers.0.a"] is linears.modules["layers.1.a"]
    assert linears.others("layers.0.a") == (Place("layers.1.a", "Linear", "weight", True),)
    assert linears.others("layers.1.a") == (Place("layers.0.a", "Linear", "weight", True),)
    assert linears.others("layers.1.b") == (Place("embed", "Embedding", "weight", False),)
    (place,) = linears.others("layers.0.b")
    assert (place.described, place.linear) == ("scale.factor (Module)", False)


def test_a_weight_alone_has_no_places() -> None:
    linears = find_linears(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}))
    assert linears.places("a") == linears.others("b") == ()
