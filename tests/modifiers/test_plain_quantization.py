"""Plain layers quantised by compressed-tensors' schemes: from the plan to folders that stock loaders run with equal logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import armor_recipes
from armor_recipes.calibration.ranges import InputRange
from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.checkpoint.reader import inspect, read_config
from armor_recipes.cli.tables import overridden_lines
from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.plain import dequantized
from armor_recipes.modifiers.plain import quantized
from armor_recipes.modifiers.quantization import QuantizationConfig
from tests.support.engine import ATTENTION, MLP, make_job, recipe
from tests.support.releases import since

IDS = torch.arange(10)[None]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
FORMATS = {
    "W4A16": "pack-quantized",
    "w4a16_asym": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP8A16": "mxfp8-quantized",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=1, vocab_size=64, max_position_embeddings=64, **SIZES)  # type: ignore[arg-type]
        )
    model.bfloat16().save_pretrained(folder)
    return folder


def wanted(source: Path, output: Path | str = "out", **modifiers: Any) -> dict[str, Any]:
    return recipe(source, output, **modifiers)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def test_a_release_that_reads_no_blocks_is_told_before_anything_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("armor_recipes.modifiers.kinds.quantizer.release_of", lambda _: "0.18.1")
    with pytest.raises(
        PlanError, match=r"compressed-tensors 0\.18\.1 does not read weights with a scale for a block.*0\.19"
    ):
        armor_recipes.apply(wanted(source, tmp_path / "out", QuantizationModifier={"scheme": "FP8_BLOCK"}))


@pytest.mark.parametrize("scheme", [pytest.param(s, marks=since("0.19")) if s == "FP8_BLOCK" else s for s in FORMATS])
def test_from_plan_to_stock_loader(source: Path, tmp_path: Path, scheme: str) -> None:
    """The run compares the folder with the model in memory bit for bit; here loaders are compared, and bytes with the plan."""
    out = tmp_path / "out"
    result = armor_recipes.apply(
        wanted(source, out, QuantizationModifier={"scheme": scheme, "ignore": ["lm_head"]}), output=out
    )
    config = read_config(out)["quantization_config"]
    assert config["format"] == FORMATS[scheme]
    tensors = load_file(out / "model.safetensors")
    assert sum(value.nbytes for name, value in tensors.items() if "_proj." in name) == result.plan.totals.bytes_after
    loaded = armor_recipes.load(out)
    found = logits(loaded)
    assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto")))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


def test_no_window_passes_where_nothing_is_looked_at(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a stream was opened")

    free = wanted(source, tmp_path / "free", QuantizationModifier={"scheme": "W4A16", "ignore": ["lm_head"]})
    plain = {key: value for key, value in free.items() if key != "calibration"}
    armor_recipes.apply(plain, output=tmp_path / "plain")
    monkeypatch.setattr("armor_recipes.session.observing.open_stream", opened)
    armor_recipes.apply(free)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("free", "plain")]
    assert files[0] == files[1]
    observing = wanted(source, tmp_path / "other", GPTQModifier={"scheme": "W4A16", "ignore": ["lm_head"]})
    for part in ("passes", "statistics"):
        seconds = [make_job(one).estimate.cpu_seconds_by[part] for one in (free, plain, observing)]
        assert seconds[0] == seconds[1] == 0 < seconds[2]
    with pytest.raises(AssertionError, match="a stream was opened"):
        armor_recipes.apply(observing)


def test_packed_and_plain_layers_in_one_folder(source: Path, tmp_path: Path) -> None:
    armor = {"targets": [ATTENTION], "block_size": 8, "iterations": 2}
    plain = {"scheme": "W8A8", "targets": [MLP]}
    out = tmp_path / "out"
    result = armor_recipes.apply(wanted(source, out, ARMORModifier=armor, QuantizationModifier=plain))
    config = read_config(out)["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["sparse-24-bitmask", "int-quantized"]
    loaded = armor_recipes.load(out, backend="folded")
    sizes = inspect(out)
    found = {one.name: one.nbytes for one in sizes.layers} | {one.name: one.nbytes for one in sizes.plain}
    assert found == {name: row.bytes_after for name, row in result.plan.stored.items()}
    assert {layer.scheme for layer in sizes.plain} == {"int8 by channel; inputs int8 by token"}
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto")))


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "NVFP4A16"])
def test_exported_dense(source: Path, tmp_path: Path, scheme: str) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    armor_recipes.apply(wanted(source, out, QuantizationModifier={"scheme": scheme, "ignore": ["lm_head"]}))
    assert export_folder(out, dense, to="dense").layers == 7
    weights = load_file(dense / "model.safetensors")
    assert weights.keys() == load_file(source / "model.safetensors").keys()
    loaded = armor_recipes.load(out)
    for name, module in loaded.named_modules():
        weight = dequantized(module)
        assert weight is None or torch.equal(weight, weights[f"{name}.weight"])
    if scheme != "FP8_DYNAMIC":
        assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(dense, dtype="auto")))
    with pytest.raises(PlanError, match="export to dense"):
        export_folder(out, tmp_path / "no", to="dense-2of4")


def test_groups_of_several_schemes_and_cores(source: Path, tmp_path: Path) -> None:
    groups = {
        "core": {"targets": [ATTENTION], "weights": {"group_size": 64}},
        "plain": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
    }
    armor = {"targets": [ATTENTION], "block_size": 8, "iterations": 2}
    modifier = {"config_groups": groups, "ignore": ["lm_head"], "iterations": 1}
    out = tmp_path / "out"
    result = armor_recipes.apply(wanted(source, out, ARMORModifier=armor, QuantizationModifier=modifier))
    last = result.plan.stored
    assert {(row.stored_as, row.core, row.group_size) for row in last.values()} == {
        ("packed", "int8", 32),
        ("quantized", "float", None),
    }
    assert read_config(out)["quantization_config"]["config_groups"].keys() == {"group_0", "group_1"}


def test_the_last_quantiser_counts_and_what_it_overrides_is_told(source: Path, tmp_path: Path) -> None:
    both = {
        "QuantizationModifier@all": {"scheme": "FP8", "ignore": ["lm_head"]},
        "GPTQModifier": {"scheme": "W4A16", "targets": [MLP]},
        "QuantizationModifier@down": {"scheme": "W8A8", "targets": [r"re:.*down_proj$"]},
    }
    result = armor_recipes.apply(wanted(source, tmp_path / "out", **both))
    found = {name: row.quantized.described for name, row in result.plan.stored.items() if row.quantized}
    layer = "model.layers.0"
    assert found[f"{layer}.mlp.up_proj"] == "int4, groups of 128"
    assert found[f"{layer}.mlp.down_proj"] == "int8 by channel; inputs int8 by token"
    assert found[f"{layer}.self_attn.q_proj"] == "float8 by tensor; inputs float8 by tensor"
    assert [
        (one.name.rpartition(".")[2], one.what[:5], one.by.rpartition(".")[2]) for one in result.plan.overridden
    ] == [
        ("gate_proj", "float", "GPTQModifier"),
        ("up_proj", "float", "GPTQModifier"),
        ("down_proj", "float", "GPTQModifier"),
        ("down_proj", "int4,", "QuantizationModifier@down"),
    ]
    assert result.report["overridden"] == result.plan.to_dict()["overridden"]
    assert len(json.loads((tmp_path / "out" / "armor_manifest.json").read_text())["overridden"]) == 4
    lines = overridden_lines(result.plan)
    assert len(lines) == 2
    assert lines[1] == (
        "int4, groups of 128 of GPTQModifier is overridden for 1 module by QuantizationModifier@down: "
        "model.layers.0.mlp.down_proj"
    )


def test_of_groups_that_match_a_module_the_closest_counts(source: Path) -> None:
    weights = {"num_bits": 8, "strategy": "channel"}
    groups = {
        "a": {"targets": ["Linear"], "weights": weights},
        "b": {"targets": ["re:.*up_proj$"], "weights": {**weights, "num_bits": 4}},
        "c": {"targets": ["model.layers.0.mlp.up_proj", "Linear"], "weights": {**weights, "num_bits": 2}},
    }
    modifier = {"config_groups": groups, "ignore": ["lm_head"]}
    plan = make_job(wanted(source, QuantizationModifier=modifier)).plan
    assert {row.quantized.described for row in plan.modules} == {"int2 by channel"}
    assert {(one.name.rpartition(".")[2], one.what) for one in plan.overridden if "up_proj" in one.name} == {
        ("up_proj", "int8 by channel"),
        ("up_proj", "int4 by channel"),
    }
    assert "by a group of its own that matches them more closely: model.layers.0" in overridden_lines(plan)[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_with_static_and_dynamic_scales(source: Path, tmp_path: Path, dynamic: bool) -> None:
    outputs = {"num_bits": 8, "strategy": "token"} if dynamic else {"num_bits": 8, "observer": "static_minmax"}
    group = {"weights": {"strategy": "channel"}, "output_activations": {**outputs, "dynamic": dynamic}}
    out = tmp_path / "out"
    result = armor_recipes.apply(
        wanted(source, out, QuantizationModifier={"config_groups": {"g": group}, "ignore": ["lm_head"]})
    )
    tensors = load_file(out / "model.safetensors")
    assert sum(name.endswith("output_scale") for name in tensors) == (0 if dynamic else 7)
    assert sum(value.nbytes for name, value in tensors.items() if "_proj." in name) == result.plan.totals.bytes_after
    found = logits(armor_recipes.load(out))
    assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto")))
    assert not torch.equal(found, logits(armor_recipes.load(unquantized_outputs(out, tmp_path / "other"))))


def unquantized_outputs(folder: Path, copy: Path) -> Path:
    """The folder without scales of outputs."""
    shutil.copytree(folder, copy)
    (copy / "armor_manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["output_activations"] = None
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("output_scale")}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_equal_runs_write_equal_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        modifier = {"scheme": "FP8", "ignore": ["lm_head"]}
        armor_recipes.apply(wanted(source, tmp_path / name, QuantizationModifier=modifier))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_set_of_targets_chooses_the_modules_of_one_scheme(source: Path) -> None:
    plan = make_job(wanted(source, QuantizationModifier={"scheme": "W4A16", "targets": ["preset:mlp"]})).plan
    assert {row.name.split(".")[3] for row in plan.modules} == {"mlp"}
    weights = {"num_bits": 8, "group_size": 32}
    groups = {name: {"targets": [f"preset:{name}"], "weights": weights} for name in ("mlp", "attention")}
    with pytest.raises(PlanError, match=r"'preset:mlp' among the targets of one of 2 groups"):
        make_job(wanted(source, QuantizationModifier={"config_groups": groups}))


def scheme_of(**fields: Any) -> Scheme:
    found = QuantizationConfig.model_validate(fields).scheme_of("model.layers.0.mlp.up_proj")
    assert found is not None
    return found


def test_scales_are_those_of_the_largest_value() -> None:
    weight = torch.tensor([[1.0, -7.5, 2, 0, 15, 3, 0, 0]])
    found = quantized(weight, scheme_of(config_groups={"a": {"weights": {"num_bits": 4, "group_size": 4}}}), None)
    assert torch.equal(found.tensors["weight_scale"], torch.tensor([[1.0, 2.0]]))
    assert torch.equal(found.dequantize(torch.float32), torch.tensor([[1.0, -8, 2, 0, 14, 4, 0, 0]]))


def test_modules_that_read_the_same_tensor_have_one_global_scale(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    modifier = {"scheme": "NVFP4A16", "ignore": ["lm_head"]}
    armor_recipes.apply(wanted(source, out, QuantizationModifier=modifier))
    tensors = load_file(out / "model.safetensors")
    scales = {name: float(value) for name, value in tensors.items() if name.endswith("global_scale")}
    by_module = {name.split(".")[-2]: value for name, value in scales.items()}
    assert by_module["q_proj"] == by_module["k_proj"] == by_module["v_proj"]
    assert by_module["gate_proj"] == by_module["up_proj"] != by_module["down_proj"]


def test_ranges_of_inputs() -> None:
    one, two = InputRange("m", 2), InputRange("m", 2)
    one.update(torch.tensor([[1.0, -2.0]]))
    two.update(torch.tensor([[3.0, 0.0], [0.5, -1.0]]))
    one.merge(two)
    assert [float(value) for value in one.extremes()] == [-2.0, 3.0]
    assert [float(value) for value in one.extremes(moving=0.5)] == [-1.5, 2.0]
    again = InputRange("m", 2)
    again.load_state(one.state())
    assert (again.tokens, again.extremes()) == (3, one.extremes())
    with pytest.raises(NumericalError, match="no calibration token reaches m"):
        InputRange("m", 2).extremes()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scheme": "W4A16", "targets": ["re:.*down_proj"], "ignore": []}, ""),
        ({"config_groups": {"a": {"weights": {"group_size": 48}}}}, "groups of 48 do not divide the 128 columns"),
        ({"scheme": "W8A16", "weight_observer": "imatrix_mse"}, ""),
        ({"scheme": "W4A16", "bypass_divisibility_checks": True}, ""),
        ({"config_groups": {"a": {"weights": {"dynamic": True}}}}, "a weight has no dynamic scales"),
    ],
)
def test_refusals(source: Path, fields: dict[str, Any], text: str) -> None:
    mapping = wanted(source, QuantizationModifier={"ignore": ["lm_head"], **fields})
    if not text:
        assert make_job(mapping).plan.modules
        return
    with pytest.raises(PlanError) as caught:
        make_job(mapping)
    assert text in str(caught.value)


def test_static_scales_need_data(source: Path) -> None:
    static = wanted(source, QuantizationModifier={"scheme": "FP8", "ignore": ["lm_head"]})
    del static["calibration"]
    with pytest.raises(
        PlanError,
        match=r"inputs float8 by tensor\) has scales that come from calibration inputs, and the recipe has none",
    ):
        make_job(static)
    shared = wanted(source, QuantizationModifier={"scheme": "NVFP4A16", "ignore": ["lm_head"]})
    del shared["calibration"]
    with pytest.raises(PlanError, match="which a window of data tells"):
        make_job(shared)
    dynamic = wanted(source, QuantizationModifier={"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]})
    del dynamic["calibration"]
    assert make_job(dynamic).plan.modules
