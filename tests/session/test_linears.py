"""Linear modules and the places of their weights, found in one pass."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from armor_recipes.model.linears import Place, find_linears, is_linear


class Spelled(nn.Linear):
    """As Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Grouped(nn.Linear):
    """As DeepSeek V4's: each group of rows reads columns of its own."""

    groups = 2

    def forward(self, x: Tensor) -> Tensor:
        parts = self.weight.view(self.groups, -1, self.in_features)
        return (x.unflatten(-1, (self.groups, -1)).unsqueeze(-2) * parts).sum(-1).flatten(-2)


class Router(nn.Linear):
    """As Llama 4's: chooses, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.sigmoid(), scores


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Initialised(nn.Linear):
    """Of a class of its own without code of its own."""


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "plain"),
    [(nn.Linear, True), (Initialised, True), (Spelled, True), (Grouped, False), (Router, False), (Doubled, False)],
)
def test_a_subclass_with_code_of_its_own_is_tried(kind: type[nn.Linear], plain: bool, bias: bool) -> None:
    module = kind(16, 32, bias=bias, device="meta")
    assert is_linear(module) == plain
    assert (module.in_features, module.weight.is_meta, tuple(module.weight.shape)) == (16, True, (32, 16))


def test_what_is_no_linear_layer_is_none() -> None:
    assert not is_linear(nn.Embedding(4, 4))
    assert not is_linear(nn.Conv1d(4, 4, 1))
