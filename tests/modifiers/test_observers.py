"""Observers of weights and activations: ranges with a known answer, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import armor_recipes
from armor_recipes.calibration.ranges import InputRange
from armor_recipes.errors import PlanError
from armor_recipes.modifiers.observers import NAMES, ActivationRange, observer_of, rule_of, weight_range
from armor_recipes.modifiers.scales import activation_scales
from tests.support.engine import make_job, recipe, save_model


def args_of(**fields: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**fields)


def rounded(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, args: Any) -> torch.Tensor:
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    scale, zero = calculate_qparams(low, high, args)
    found: torch.Tensor = fake_quantize(weight, scale, zero, args)
    return found


@given(seed=st.integers(0, 1000), bits=st.sampled_from([3, 4, 8]), name=st.sampled_from(NAMES))
def test_a_search_is_no_worse_than_the_whole_range_by_its_own_measure(seed: int, bits: int, name: str) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    args = args_of(num_bits=bits, strategy="channel", observer=name)
    rule = rule_of(args, weight=True)
    importance = torch.rand(16, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    found = weight_range(weight, args, importance)
    whole = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if rule.search is None:
        assert torch.equal(torch.stack(found), torch.stack(whole))
        return
    share = importance / importance.mean() if rule.search.weighted else torch.ones(16)
    start = tuple(value * rule.search.expand for value in whole)
    errors = [
        ((rounded(weight, *bounds, args) - weight).abs() ** rule.search.norm * share).sum(1)
        for bounds in (found, start)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_batches_count_as_the_observer_says() -> None:
    batches = [torch.tensor([[-1.0, 0.5]]), torch.tensor([[-0.5, 4.0]]), torch.tensor([[0.0, 2.0]])]
    wanted = {"static_minmax": 4.0, "memoryless_minmax": 2.0, "minmax": (0.5 * 0.99 + 4.0 * 0.01) * 0.99 + 2.0 * 0.01}
    for name, value in wanted.items():
        args = args_of(num_bits=8, strategy="tensor", observer=name)
        seen = InputRange("m", 2, ActivationRange.of(args))
        for batch in batches:
            seen.update(batch)
        scale = activation_scales("input", args, seen, torch.zeros(1))["input_scale"]
        reach = max(value, 1.0 if name != "memoryless_minmax" else 0.0)
        torch.testing.assert_close(
            scale, torch.tensor([reach / 127.5]), rtol=2e-2 if name == "minmax" else 1e-6, atol=0
        )


def test_what_is_not_here_is_told_with_what_is() -> None:
    with pytest.raises(
        PlanError, match="observer percentile is not here: take one of memoryless_minmax, static_minmax,"
    ):
        observer_of("percentile")
    with pytest.raises(
        PlanError, match=r"observer_kwargs\.bins of observer MSE is 3; it takes numbers, for expand, maxshrink"
    ):
        observer_of("MSE", {"bins": 3})
    assert observer_of("Memoryless-MinMax") == observer_of("memoryless_minmax")
    assert observer_of("minmax", {"averaging_constant": 1.0}).moving == 1.0
    with pytest.raises(PlanError, match="for activations take mse"):
        rule_of(args_of(num_bits=8, strategy="tensor", observer="imatrix_mse"), weight=False)
    with pytest.raises(PlanError, match="not for strategy: tensor"):
        rule_of(args_of(num_bits=8, strategy="tensor", observer="imatrix_mse"), weight=True)


def test_modules_that_read_one_tensor_may_have_other_observers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    static = {"num_bits": 8, "strategy": "tensor"}
    groups = {
        name: {
            "targets": [f"re:.*{name}_proj$"],
            "weights": {"num_bits": 8, "strategy": "channel", "observer": "imatrix_mse"},
            "input_activations": {**static, "observer": observer},
        }
        for name, observer in {"q": "static_minmax", "k": "mse", "v": "memoryless_minmax"}.items()
    }
    out = tmp_path / "out"
    result = armor_recipes.apply(recipe(model, out, QuantizationModifier={"config_groups": groups}))
    scales = {
        name: float(result.modules[f"model.layers.0.self_attn.{name}_proj"].quantized.tensors["input_scale"])
        for name in groups
    }
    assert scales["q"] > scales["k"] != scales["v"]
    assert armor_recipes.load(out)
    lacking = recipe(model, out, QuantizationModifier={"scheme": "W8A16", "weight_observer": "imatrix_mse"})
    del lacking["calibration"]
    with pytest.raises(PlanError, match="no observer that weighs columns"):
        make_job(lacking)
