"""One warning for a model whose layers are slower here than dense ones, as it is loaded, and never again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import armor_recipes
from armor_recipes.runtime import ArmorLinear, slower
from armor_recipes.runtime.kernel import kernel_available
from armor_recipes.runtime.slower import Times, times_of, warn_where_slower
from tests.support.packed import logits

pytestmark = [
    pytest.mark.skipif(not kernel_available(), reason="the kernel was not built"),
    pytest.mark.usefixtures("default_backend"),
]


def layers_of(folder: Path, backend: str = "auto") -> dict[str, ArmorLinear]:
    model = armor_recipes.load(folder, backend=backend)
    return {name: module for name, module in model.named_modules() if isinstance(module, ArmorLinear)}


def of(seconds: Callable[[ArmorLinear], Times], asked: list[str]) -> Callable[[ArmorLinear], Times]:
    def measure(layer: ArmorLinear) -> Times:
        asked.append(layer.label)
        return seconds(layer)

    return measure


def test_those_that_are_slower_are_counted_and_the_worst_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, asked = layers_of(checkpoint), list[str]()
    monkeypatch.setattr(slower, "_SMALL", 0)
    down = [name for name in layers if name.endswith("down_proj")]
    assert down

    def seconds(layer: ArmorLinear) -> Times:
        return Times(0.003, 0.001) if layer.label.endswith("down_proj") else Times(0.001, 0.001)

    with pytest.warns(UserWarning, match="ARMOR layers take longer here") as told:
        warn_where_slower(layers, of(seconds, asked))
    (message,) = [str(one.message) for one in told]
    together = (len(layers) + 2 * len(down)) / len(layers)
    assert f"{len(down)} of {len(layers)} ARMOR layers take longer here than dense layers" in message
    assert f"3.00 times as long at most ({down[0]}), all together {together:.2f} times" in message
    assert len(asked) == len({(layers[name].packed().shape, layers[name].packed().block_size) for name in layers})


@pytest.mark.parametrize("times", [Times(0.00109, 0.001), Times(0.0001, 0.001), Times(2e-6, 1e-6)])
def test_noise_gains_and_what_nobody_feels_are_not_told(
    checkpoint: Path, times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of(checkpoint)
    monkeypatch.setattr(slower, "_SMALL", 0)
    warn_where_slower(layers, lambda _: times)  # warnings are errors


def test_small_layers_are_not_measured(checkpoint: Path) -> None:
    asked = list[str]()
    warn_where_slower(layers_of(checkpoint), of(lambda _: Times(1.0, 0.001), asked))
    assert not asked


@pytest.mark.parametrize("backend", ["folded", "reference"])
def test_backends_that_are_not_there_to_be_fast_are_not_measured(
    checkpoint: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, asked = layers_of(checkpoint, backend), list[str]()
    monkeypatch.setattr(slower, "_SMALL", 0)
    warn_where_slower(layers, of(lambda _: Times(1.0, 0.001), asked))
    assert not asked


def test_loading_tells_once_and_passes_tell_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(slower, "times_of", of(lambda _: Times(1.0, 0.001), asked))
    monkeypatch.setattr(slower, "_SMALL", 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = armor_recipes.load(checkpoint)
        count = len(asked)
        for _ in range(2):
            logits(model)
    assert len(told) == 1
    assert len(asked) == count


def test_a_layer_that_sleeps_is_slower_and_one_that_does_nothing_is_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = next(iter(layers_of(checkpoint).values()))
    monkeypatch.setattr(ArmorLinear, "forward", lambda *_: time.sleep(0.004))
    assert times_of(layer).ratio > 2
    monkeypatch.setattr(ArmorLinear, "forward", lambda *_: None)
    assert times_of(layer).ratio < 1
    assert torch.get_num_threads() == 1
