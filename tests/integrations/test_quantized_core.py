"""Layers with int8 and int4 cores: written, read by either loader, run, saved again and exported with the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.config import LayerSpec, layer_specs, quantization_config
from armor_recipes.checkpoint.export import Source, export
from armor_recipes.checkpoint.packing import pack_int4, unpack_int4
from armor_recipes.checkpoint.reader import check_folder, inspect, read_layers
from armor_recipes.checkpoint.verify import verify
from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.errors import CheckpointError, PlanError
from armor_recipes.runtime.kernel import kernel_available
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.packed import logits, made_up, quantized, session_model, write

KIND = "llama-attention-bias-gqa"
UP = "model.layers.0.mlp.up_proj"
CASES = [(8, None), (8, 8), (4, None), (4, 16)]


@pytest.fixture(params=CASES, ids=lambda case: f"int{case[0]}-{case[1] or 'channel'}")
def case(request: pytest.FixtureRequest) -> dict[str, int | None]:
    return dict(zip(("bits", "group"), request.param, strict=True))


@given(st.integers(1, 3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_int4_has_the_bit_order_of_compressed_tensors(rows: int, words: int, chance: object) -> None:
    numbers = [[chance.randint(-8, 7) for _ in range(8 * words)] for _ in range(rows)]  # type: ignore[attr-defined]
    integers = torch.tensor(numbers, dtype=torch.int8)
    packed = pack_int4(integers)
    assert torch.equal(packed, pack_to_int32(integers, 4))
    assert torch.equal(unpack_int4(packed), integers)


def test_the_first_value_is_in_the_lowest_bits() -> None:
    integers = torch.tensor([[-8, -7, -6, -5, 4, 5, 6, 7]], dtype=torch.int8)
    assert pack_int4(integers).tolist() == [[0xFEDC3210 - (1 << 32)]]
    with pytest.raises(CheckpointError, match="multiple of 16"):
        pack_int4(integers[:, :4])


def test_layers_come_back_bit_for_bit(case: dict[str, int | None], tmp_path: Path) -> None:
    _, layers = session_model(KIND, **case)
    expected = logits(write(KIND, tmp_path / "model", **case))
    read = read_layers(tmp_path / "model")
    for name, layer in layers.items():
        for part in ("values", "bitmask", "a", "b", "scale"):
            assert torch.equal(getattr(read[name], part), getattr(layer, part)), (name, part)
    for load in (armor_recipes.load, AutoModelForCausalLM.from_pretrained):
        model = load(tmp_path / "model", dtype=torch.float32)
        assert torch.equal(logits(model), expected)
    reference = armor_recipes.load(tmp_path / "model", dtype=torch.float32, backend="reference")
    torch.testing.assert_close(logits(reference), expected, rtol=1e-4, atol=1e-5)
    stored = armor_recipes.load(tmp_path / "model")
    assert stored.get_submodule(UP).weight.dtype == (torch.int8 if case["bits"] == 8 else torch.int32)
    assert (logits(stored) - expected).norm() < 0.02 * expected.norm()


def test_saving_again_gives_the_same_tensors_and_groups(case: dict[str, int | None], tmp_path: Path) -> None:
    write(KIND, tmp_path / "model", share=True, **case)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits(model)
    model.save_pretrained(tmp_path / "again")
    assert tensor_hashes(tmp_path / "again") == tensor_hashes(tmp_path / "model")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again"))
    specs = [layer_specs(config["quantization_config"], where="x") for config in (first, again)]
    assert specs[0] == specs[1]
    assert specs[0]["model.layers.0.mlp.down_proj"] == LayerSpec((16, 8), f"int{case['bits']}", None, case["group"])
    assert any(spec.input_factor for spec in specs[0].values())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_the_config_survives_compressed_tensors_schema(case: dict[str, int | None]) -> None:
    _, layers = session_model(KIND, **case)
    config = quantization_config(layers, ["lm_head"])
    kept = json.loads(json.dumps(QuantizationConfig.model_validate(config).model_dump()))
    assert layer_specs(kept, where="x") == layer_specs(config, where="x")
    assert {spec.core for spec in layer_specs(kept, where="x").values()} == {f"int{case['bits']}"}


@pytest.mark.skipif(not kernel_available(), reason="the kernel was not built")
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_the_kernel_runs_it(case: dict[str, int | None], backend: str, tmp_path: Path) -> None:
    expected = logits(write(KIND, tmp_path / "model", **case))
    model = armor_recipes.load(tmp_path / "model", dtype=torch.float32, backend=backend)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_casts_leave_the_integers(tmp_path: Path) -> None:
    write(KIND, tmp_path / "model", bits=4, group=8)
    layer = armor_recipes.load(tmp_path / "model").get_submodule(UP)
    assert isinstance(layer, ArmorLinear)
    before, dtypes = layer.packed(), (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        layer.to(dtype)
        assert torch.equal(layer.weight, before.values)
        assert layer.weight_scale.dtype == layer.armor_a.dtype == dtype
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert not hasattr(dense, "weight_scale")
    assert torch.equal(dense.weight, before.fold(torch.bfloat16))


def test_export_to_dense(case: dict[str, int | None], tmp_path: Path) -> None:
    expected = logits(write(KIND, tmp_path / "model", **case))
    for name in ("dense", "plain"):
        (tmp_path / name).mkdir()
    found = export(Source.open(tmp_path / "model"), tmp_path / "dense", to="dense")
    assert found.layers == len(read_layers(tmp_path / "model"))
    assert not [name for name in load_file(tmp_path / "dense" / "model.safetensors") if "scale" in name]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert (logits(plain) - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(PlanError, match="or a quantised core"):
        export(Source.open(tmp_path / "model"), tmp_path / "plain", to="dense-2of4")


def test_inspect_and_verify(tmp_path: Path) -> None:
    write(KIND, tmp_path / "model", bits=4, group=16)
    manifest = {"format_version": 2, "tensors": tensor_hashes(tmp_path / "model")}
    (tmp_path / "model" / "armor_manifest.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "model").layers == len(read_layers(tmp_path / "model"))
    size = next(layer for layer in inspect(tmp_path / "model").layers if layer.name == "model.layers.0.mlp.down_proj")
    assert (size.shape, size.core, size.group_size) == ((32, 64), "int4", 16)
    assert size.nbytes == 32 * 64 // 4 + 32 * 64 // 8 + 32 * 2 * 2 + 32 * 16 * 2 + 64 * 8 * 2
    assert size.dense_nbytes == 32 * 64 * 2


def _scale(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{UP}.weight_scale": change(tensors[f"{UP}.weight_scale"])})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(f"{UP}.weight_scale"), "holds its tensor .*up_proj.weight_scale"),
        (_scale(lambda scale: scale * torch.nan), "weight_scale: 128 of 128 numbers are not finite"),
        (_scale(lambda scale: -scale), "128 of 128 scales are not positive"),
        (_scale(lambda scale: scale[:, :1].clone()), r"weight_scale is \(64, 1\) BF16; .* must be \(64, 2\) BF16"),
        (_scale(lambda scale: scale.float()), r"weight_scale is \(64, 2\) F32"),
        (lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].float()}), r"weight is .* F32"),
        (lambda tensors: tensors.update({f"{UP}.armor_a": tensors[f"{UP}.armor_a"].double()}), "armor_a is F64"),
        (lambda tensors: tensors.update({"lm_head.weight_scale": torch.ones(96, 1)}), "belongs to no layer"),
    ],
)
def test_damaged_tensors_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    write(KIND, tmp_path / "model", bits=8, group=8)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        read_layers(tmp_path / "model")
    with pytest.raises(CheckpointError, match=says):
        armor_recipes.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_bits": 4}, "weights say 4 bits"),
        ({"symmetric": False}, "symmetric False"),
        ({"strategy": "tensor"}, "strategy 'tensor'"),
        ({"strategy": "channel"}, "strategy 'channel', group_size 8"),
        ({"group_size": 12}, "a multiple of 8"),
        ({"group_size": 24}, "no whole groups of 24"),
        ({"group_size": True}, "group_size True"),
        ({"observer_kwargs": {"armor_block_size": [16, 8], "armor_core": "int2"}}, "armor_core is 'int2'"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, change: dict[str, object], says: str) -> None:
    write(KIND, tmp_path / "model", bits=8, group=8)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_2"]["weights"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        check_folder(tmp_path / "model")


def test_int4_needs_rows_of_a_multiple_of_16() -> None:
    generator = torch.Generator().manual_seed(3)
    with pytest.raises(CheckpointError, match="multiple of 16"):
        quantized(made_up(8, 24, (4, 8), generator), torch.bfloat16, bits=4)
    packed = quantized(made_up(8, 24, (4, 8), generator), torch.bfloat16, bits=8)
    assert (packed.shape, packed.core, packed.group_size, packed.dtype) == ((8, 24), "int8", None, torch.bfloat16)
