"""What was written is held against the model in memory: models that draw random numbers, and those that never repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForClassification, ViTMAEConfig, ViTMAEModel

from armor_recipes.compute import drawn_alike
from armor_recipes.errors import VerificationError
from armor_recipes.integrations.models import load_dense
from armor_recipes.run.verify import verify_reloaded
from tests.support.engine import make_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}


@contextmanager
def global_numbers_go_on() -> Iterator[None]:
    """The global random numbers are where they were."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_begin_anew_and_the_global_ones_go_on() -> None:
    with global_numbers_go_on():
        drawn: list[Tensor] = []
        for _ in range(2):
            with drawn_alike(CPU):
                drawn.append(torch.randn(4))
    assert torch.equal(*drawn)


def test_a_model_that_draws_random_masks_is_verified(tmp_path: Path) -> None:
    with drawn_alike(CPU):
        ViTMAEModel(ViTMAEConfig(**SIZES, image_size=16, patch_size=4)).save_pretrained(tmp_path)
    model = load_dense(str(tmp_path), dtype=torch.float32, device=CPU)
    assert not torch.equal(model(**PIXELS).ids_restore, model(**PIXELS).ids_restore)
    with global_numbers_go_on():
        verify_reloaded(tmp_path, model, packed=False, probe=PIXELS)


def test_a_model_whose_layers_read_transposed_inputs_is_verified_frozen_or_not(tmp_path: Path) -> None:
    with drawn_alike(CPU):
        PatchTSTForClassification(
            PatchTSTConfig(
                d_model=64,
                ffn_dim=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                context_length=16,
                patch_length=4,
                patch_stride=4,
                num_input_channels=2,
                norm_type="batchnorm",
            )
        ).save_pretrained(tmp_path)
        values = {"past_values": torch.randn(2, 16, 2)}
    for frozen in (False, True):
        model = load_dense(str(tmp_path), dtype=torch.float32, device=CPU).requires_grad_(not frozen)
        verify_reloaded(tmp_path, model, packed=False, probe=values)
        assert {each.requires_grad for each in model.parameters()} >= {not frozen}


def test_a_model_that_never_repeats_itself_is_told_apart_from_a_wrong_folder(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model = load_dense(str(tmp_path), dtype=torch.float32, device=CPU)
    calls: list[int] = []

    def other(module: nn.Module, args: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output + len(calls)

    model.get_submodule("lm_head").register_forward_hook(other)
    with pytest.raises(VerificationError, match="puts out other logits each time"):
        verify_reloaded(tmp_path, model, packed=False, probe={"input_ids": torch.arange(8)[None]})
