"""The same bytes whatever switches of torch a caller has set: default dtype and device, autocast, inference mode, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.transformers import load
from armor_recipes.run import apply
from armor_recipes.solver import factorize
from tests.support.engine import ALL, ARMOR, logits, make_model, recipe


@contextmanager
def set_and_reset(switch: Callable[[Any], object], value: object, usual: object) -> Iterator[None]:
    switch(value)
    try:
        yield
    finally:
        switch(usual)


CALLERS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "bfloat16": lambda: set_and_reset(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": lambda: set_and_reset(torch.set_default_dtype, torch.float64, torch.float32),
    "meta": lambda: torch.device("meta"),
    "default-device": lambda: set_and_reset(torch.set_default_device, "meta", None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "deterministic": lambda: set_and_reset(torch.use_deterministic_algorithms, True, False),
    "precision": lambda: set_and_reset(torch.set_float32_matmul_precision, "medium", "highest"),
}
callers = pytest.mark.parametrize("caller", CALLERS)
ONE = "model.layers.0.mlp.up_proj"
INPUTS = torch.randn(3, 32, generator=torch.Generator().manual_seed(7))
TRAINED: dict[str, Any] = {"targets": [ALL], "epochs": 1}


def hashes(llama: Path, output: Path) -> dict[str, str]:
    mapping = recipe(llama, output, ARMORModifier=ARMOR, BlockRefineModifier=TRAINED, DistillationModifier=TRAINED)
    return tensor_hashes(apply(mapping).output)


@pytest.fixture(scope="module")
def usual(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("usual") / "out"
    hashes(llama, output)
    return output


@callers
def test_a_run_and_what_is_loaded(llama: Path, usual: Path, tmp_path: Path, caller: str) -> None:
    with CALLERS[caller]():
        found = hashes(llama, tmp_path / "out")
        model = load(tmp_path / "out", backend="cpu", dtype=torch.float32)
        export_folder(tmp_path / "out", tmp_path / "dense", to="dense")
        layer = model.get_submodule(ONE)
        inside = layer(INPUTS)
    assert caller == "autocast" or torch.equal(inside, layer(INPUTS))
    assert inside.dtype == (torch.bfloat16 if caller == "autocast" else torch.float32)
    assert found == tensor_hashes(usual)
    assert torch.equal(logits(model), logits(load(usual, backend="cpu", dtype=torch.float32)))
    export_folder(usual, tmp_path / "again", to="dense")
    assert tensor_hashes(tmp_path / "dense") == tensor_hashes(tmp_path / "again")
    assert not any(parameter.is_inference() for parameter in model.parameters())


@callers
def test_the_solver(caller: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, moment = torch.randn(16, 32, generator=generator), torch.rand(32, generator=generator) + 0.1
    options: dict[str, Any] = {"block_size": 8, "iterations": 5, "seed": 0}
    wanted = factorize(weight, moment, **options)
    with CALLERS[caller]():
        found = factorize(weight.requires_grad_(), moment, **options)
    assert found.losses == wanted.losses
    for part in ("a", "core", "b"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))


def test_a_model_made_in_inference_mode(llama: Path, usual: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = make_model()
    mapping = recipe(
        llama, tmp_path / "out", ARMORModifier=ARMOR, BlockRefineModifier=TRAINED, DistillationModifier=TRAINED
    )
    assert tensor_hashes(apply(mapping, model).output) == tensor_hashes(usual)
