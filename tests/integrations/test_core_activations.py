"""Layers with fp8 cores, and with 8-bit activations of the core: written, read by either loader, run, and refused where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.config import layer_spec_of, layer_specs, quantization_config, version_of
from armor_recipes.checkpoint.export import Source, export
from armor_recipes.checkpoint.reader import check_folder, inspect, read_layers
from armor_recipes.errors import CheckpointError, RecipeError
from armor_recipes.runtime.kernel import kernel_available
from armor_recipes.runtime.linear import ArmorLinear, set_backend
from armor_recipes.solver.activations import round_activations
from tests.support.packed import logits, session_model, write

KIND = "llama-attention-bias-gqa"
UP = "model.layers.0.mlp.up_proj"
KINDS: dict[str, dict[str, Any]] = {
    "w8a8": {"activations": "int8"},
    "fp8-dynamic": {"numbers": "fp8", "activations": "fp8"},
    "fp8-weights": {"numbers": "fp8"},
}
OLD = Path(__file__).with_name("quantized_folder")
"""Written by release 861d9c8: int8 by channel and in groups, int4 in groups; its logits beside it."""


@pytest.fixture(params=KINDS)
def core(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@pytest.mark.parametrize("numbers", ["int8", "fp8"])
def test_activations_are_rounded_as_compressed_tensors_rounds_them(numbers: str) -> None:
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30, 1e-3])[:, None, None]
    args = QuantizationArgs(
        num_bits=8, type="int" if numbers == "int8" else "float", strategy="token", dynamic=True, symmetric=True
    )
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Identity())
    expected = fake_quantize(x, scale, zero, args)
    assert torch.allclose(round_activations(x, numbers), expected, rtol=1e-6, atol=0)


def test_a_token_of_zeros_stays_and_gradients_pass() -> None:
    x = torch.zeros(2, 8)
    x[1] = torch.linspace(-1, 1, 8)
    x.requires_grad_()
    found = round_activations(x, "int8")
    assert not found[0].any()
    assert 0 < float((found[1] - x[1]).detach().abs().max()) < 0.01
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 8))


def test_folders_come_back_and_either_loader_runs_them_alike(core: dict[str, Any], tmp_path: Path) -> None:
    folded = logits(write(KIND, tmp_path / "model", bits=8, core=core))
    _, layers = session_model(KIND, bits=8, **core)
    read = read_layers(tmp_path / "model")
    assert read[UP].activations == core.get("activations")
    assert all(torch.equal(read[name].values.float(), layer.values.float()) for name, layer in layers.items())
    by_backend = {
        backend: logits(armor_recipes.load(tmp_path / "model", dtype=torch.float32, backend=backend))
        for backend in ("folded", "reference", "auto")
    }
    assert torch.equal(by_backend["folded"], folded)  # of the weights alone
    off = float((by_backend["reference"] - folded).norm() / folded.norm())
    assert (1e-3 < off < 0.1) if "activations" in core else off < 1e-4
    torch.testing.assert_close(by_backend["auto"], by_backend["reference"], rtol=1e-3, atol=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    set_backend(stock, "auto")
    assert torch.equal(logits(stock), by_backend["auto"])


def test_saved_again_it_stays_the_same(core: dict[str, Any], tmp_path: Path) -> None:
    write(KIND, tmp_path / "model", bits=8, core=core, share=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again"))
    specs = [layer_specs(config["quantization_config"], where="x") for config in (first, again)]
    assert specs[0] == specs[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_the_config_survives_compressed_tensors_schema(core: dict[str, Any]) -> None:
    _, layers = session_model(KIND, bits=8, **core)
    config = quantization_config(layers, ["lm_head"])
    kept = json.loads(json.dumps(QuantizationConfig.model_validate(config).model_dump(mode="json")))
    assert layer_specs(kept, where="x") == layer_specs(config, where="x")
    assert version_of(config) == 4
    assert version_of(quantization_config(session_model(KIND, bits=8)[1], [])) == 2


@pytest.mark.skipif(not kernel_available(), reason="the kernel was not built")
def test_the_compiled_kernel_refuses_it(core: dict[str, Any], tmp_path: Path) -> None:
    write(KIND, tmp_path / "model", bits=8, core=core)
    model = armor_recipes.load(tmp_path / "model", dtype=torch.float32, backend="folded")
    layer = model.get_submodule(UP)
    assert isinstance(layer, ArmorLinear)
    layer.backend = "cpu"
    with pytest.raises(RecipeError, match=r"8-bit activations|fp8 cores"):
        logits(model)


def test_an_export_to_dense_is_of_the_weights_alone(core: dict[str, Any], tmp_path: Path) -> None:
    expected = logits(write(KIND, tmp_path / "model", bits=8, core=core))
    (tmp_path / "dense").mkdir()
    export(Source.open(tmp_path / "model"), tmp_path / "dense", to="dense")
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    assert (dense - expected).norm() < 0.02 * expected.norm()
    assert {layer.core for layer in inspect(tmp_path / "model").layers} == {"fp8" if "numbers" in core else "int8"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dynamic": False}, "dynamic"),
        ({"strategy": "tensor"}, "token"),
        ({"symmetric": False}, "symmetric"),
        ({"num_bits": 4}, "8 bits"),
    ],
)
def test_activations_that_no_layer_has_are_refused(change: dict[str, Any], told: str) -> None:
    config = quantization_config(session_model(KIND, bits=8, activations="int8")[1], [])
    group = next(iter(config["config_groups"].values()))
    with pytest.raises(CheckpointError, match=told):
        layer_spec_of(group["weights"], {**group["input_activations"], **change}, where="x")
    floats = {**group["weights"], "observer_kwargs": {"armor_block_size": [8, 8]}}
    with pytest.raises(CheckpointError, match="the core is float"):
        layer_spec_of(floats, group["input_activations"], where="x")


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    write(KIND, tmp_path / "model", bits=8, core={"numbers": "fp8"})
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight"].view(torch.uint8)[0, 0] = 0x7F  # NaN
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.*not finite"):
        read_layers(tmp_path / "model")
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].view(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        check_folder(tmp_path / "model")


def test_folders_of_an_earlier_release_give_the_same_logits() -> None:
    expected = load_file(OLD / "expected.safetensors")
    for load in (armor_recipes.load, AutoModelForCausalLM.from_pretrained):
        for dtype, name in ((torch.float32, "logits"), (torch.bfloat16, "stored")):
            model = load(OLD, dtype=dtype)
            for module in model.modules():
                if isinstance(module, ArmorLinear):
                    module.backend = "folded"
            found = logits(model)[:, : expected[name].shape[1]].float()
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
