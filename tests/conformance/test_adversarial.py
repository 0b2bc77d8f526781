"""Every modifier on weights that no training leaves: zeros, constants, rows and groups of zeros, dead channels, infinities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armor_recipes
from armor_recipes.errors import NumericalError
from armor_recipes.integrations.plain import dequantized
from armor_recipes.run import apply
from tests.conformance.cases import COLUMNS, Case, cases, expected, mapping, model_of
from tests.conformance.checks import logits

COLUMN = COLUMNS[0]
LAYER = "model.layers.0"
#: Schemes whose scales are made in different ways.
FIELDS: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in ("W8A8", "FP8", "NVFP4", "MXFP4", "MXFP8")},
    "int4": {"config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 16}}}},
    "int4 asymmetric": {"config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 16, "symmetric": False}}}},
    "blocks": {
        "config_groups": {"all": {"weights": {"type": "float", "strategy": "block", "block_structure": "16x16"}}}
    },
    "mse": {"config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 16, "observer": "mse"}}}},
}
#: What `zeros` makes zeros of.
ZEROS: dict[str, Any] = {
    "self_attn.k_proj": slice(None),
    "self_attn.v_proj": 3,
    "self_attn.o_proj": (slice(None), slice(0, 16)),
    "mlp.gate_proj": (slice(None), 5),
}
RIGHT = [case for case in cases() if expected()["cells"][str(case)][COLUMN.name]["outcome"] == "right"]


def damaged(folder: Path, *damages: Callable[[nn.Module], None]) -> Path:
    model: Any = model_of(COLUMN)
    with torch.no_grad():
        for damage in damages:
            damage(model)
    model.save_pretrained(folder)
    return folder


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{LAYER}.{name}.weight")


def zeros(model: nn.Module) -> None:
    for name, place in ZEROS.items():
        weight(model, name)[place] = 0


def constant(model: nn.Module) -> None:
    weight(model, "self_attn.q_proj").fill_(0.5)


def dead_channel(model: nn.Module) -> None:
    weight(model, "post_attention_layernorm")[7] = 0


def run(group: dict[str, Any], source: Path, output: Path) -> Any:
    """The loaded model, whose logits the run has compared with those of the model in memory."""
    apply(mapping(group, source, output))
    return armor_recipes.load(output)


@pytest.mark.slow
@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_zeros_and_constants_are_taken(case: Case, tmp_path: Path) -> None:
    source = damaged(tmp_path / "model", zeros, constant, dead_channel)
    loaded = run(case.recipe(COLUMN), source, tmp_path / "out")
    assert bool(logits(loaded).isfinite().all())


@pytest.mark.parametrize("scheme", FIELDS)
def test_zeros_stay_zeros_in_every_format(scheme: str, tmp_path: Path) -> None:
    source = damaged(tmp_path / "model", zeros, constant, dead_channel)
    loaded = run({"QuantizationModifier": {"targets": [COLUMN.targets], **FIELDS[scheme]}}, source, tmp_path / "out")
    assert bool(logits(loaded).isfinite().all())
    for name, place in ZEROS.items():
        found = dequantized(loaded.get_submodule(f"{LAYER}.{name}"))
        assert found is not None
        assert not found[place].any(), name
    whole = dequantized(loaded.get_submodule(f"{LAYER}.self_attn.q_proj"))
    assert whole is not None
    torch.testing.assert_close(whole.float(), torch.full((32, 32), 0.5), rtol=0.1, atol=0)


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_what_is_not_finite_is_named_before_anything_is_changed(case: Case, tmp_path: Path) -> None:
    def damage(model: nn.Module) -> None:
        weight(model, "mlp.down_proj")[1, 1] = float("inf")

    source = damaged(tmp_path / "model", damage)
    with pytest.raises(NumericalError) as caught:
        apply(mapping(case.recipe(COLUMN), source, tmp_path / "out"))
    told = f"{LAYER}.mlp.down_proj (1); mend the model, or add them to `ignore`"
    if case == Case("SmoothQuantModifier"):  # it takes no weight that is not finite, and meets what that one puts out
        told = (
            f"the output of {LAYER}.mlp.down_proj is not finite before anything was changed: check the model's weights"
        )
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()
