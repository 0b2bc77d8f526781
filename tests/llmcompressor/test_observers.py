"""Scales by each observer, of weights and of activations in several batches, against llm-compressor's own observers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.modifiers.observers import NAMES, ActivationRange
from armor_recipes.modifiers.scales import activation_scales, weight_scales

pytestmark = pytest.mark.llmcompressor
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}
ARGS: dict[str, dict[str, Any]] = {
    "int8 tensor": {"num_bits": 8, "strategy": "tensor"},
    "int8 channel": {"num_bits": 8, "strategy": "channel"},
    "int4 groups": INT4,
    "int4 asymmetric": {**INT4, "symmetric": False},
    "fp8 blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
}


def theirs(values: list[Tensor], part: str, args: Any, importance: Tensor | None = None) -> dict[str, Tensor]:
    from llmcompressor.modifiers.quantization.calibration import initialize_observer
    from torch import nn

    found = nn.Linear(32, 24)
    name = "weights" if part == "weight" else "input_activations"
    found.quantization_scheme = type("Scheme", (), {name: args})()
    initialize_observer(found, part)
    observer: Any = getattr(found, f"{part}_observer")
    if importance is not None:
        observer._imatrix_sum, observer._imatrix_count = importance * 10, torch.tensor(10)
    for value in values:
        observer(value)
    return {key: value for key, value in observer.get_qparams().items() if value is not None}


def args_of(**fields: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**fields)


OF_WEIGHTS = [
    (name, args)
    for name in NAMES
    for args in ARGS
    if "imatrix" not in name or args not in ("int8 tensor", "fp8 blocks")
]
OF_INPUTS = [(name, {}) for name in NAMES if "imatrix" not in name]
OF_INPUTS += [(name, {"averaging_constant": 0.5}) for name in ("minmax", "mse")]


@pytest.mark.filterwarnings("ignore:The 'fouroversix' observer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "args"), OF_WEIGHTS)
def test_scales_of_weights(name: str, args: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator).mul(0.1).to(dtype)
    importance = torch.rand(32, generator=generator) if "imatrix" in name else None
    given = args_of(**ARGS[args], observer=name)
    wanted = theirs([weight], "weight", given, importance)
    found = weight_scales(weight, given, importance=importance)
    assert {f"weight_{key}" for key in wanted} == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[f"weight_{key}"].float(), value.float(), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:The 'fouroversix' observer")
@pytest.mark.parametrize(("name", "kwargs"), OF_INPUTS)
def test_scales_of_activations(name: str, kwargs: dict[str, float]) -> None:
    given = args_of(num_bits=8, strategy="tensor", observer=name, observer_kwargs=kwargs)
    batches = list(torch.randn(4, 2, 6, 32, generator=torch.Generator().manual_seed(1)))
    wanted = theirs(batches, "input", given)
    range_ = InputRange("m", 32, ActivationRange.of(given))
    for batch in batches:
        range_.update(batch)
    found = activation_scales("input", given, range_, torch.zeros(1))
    torch.testing.assert_close(found["input_scale"], wanted["scale"], rtol=1e-5, atol=0)
