"""`QuantizationModifier` from the plan to the folder: bytes to the last one, refusals, shared B, later stages, equal bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import yaml

import armor_recipes
from armor_recipes.checkpoint.reader import inspect, read_layers
from armor_recipes.checkpoint.staging import REPORT_FILES
from armor_recipes.errors import PlanError
from armor_recipes.modifiers import FactorModifier, ModuleShape, Quantizer, modifiers
from armor_recipes.modifiers.quantization import QuantizationConfig, QuantizationModifier
from tests.support.engine import (
    ALL,
    ARMOR,
    ATTENTION,
    MLP,
    core,
    hook_count,
    make_job,
    make_session,
    recipe,
    rng_states,
    save_model,
)

CASES: list[dict[str, Any]] = [
    {},
    core(group_size=16),
    core(4),
    core(4, 32),
    core(4, objective="hessian", rounding="gptq"),
    core(4, objective="hessian"),
    core(4, resolve=False),
    core(4, resolve=False, rounding="nearest"),
]
REFINE = {"targets": [ALL], "epochs": 1, "held_out": 0.4}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def wanted(source: Path, output: Path | str = "out", **fields: Any) -> dict[str, Any]:
    armor = fields.pop("armor", ARMOR)
    return recipe(source, output, ARMORModifier=armor, QuantizationModifier={"targets": [ALL], **core(), **fields})


def refusal(mapping: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        make_job(mapping)
    return str(caught.value)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_from_plan_to_folder(source: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    result = armor_recipes.apply(
        wanted(source, tmp_path / "out", **fields)
    )  # the run verifies the folder's logits bit for bit
    last = {row.name: row for row in result.plan.modules}
    wanted_core = "int4" if "'num_bits': 4" in str(fields) else "int8"
    assert len(last) == 14
    assert len(result.plan.modules) == 28
    sizes = {layer.name: layer for layer in inspect(tmp_path / "out").layers}
    for name, row in last.items():
        assert (row.core, sizes[name].core, sizes[name].nbytes) == (wanted_core, wanted_core, row.bytes_after)
        first, change = result.modules[name], result.modules[name].changes[0]
        assert first.losses[-1] > 0
        assert change.modifier == row.modifier
        assert change.core == wanted_core
        assert change.tokens == 60
        assert change.stored_loss <= change.losses[0] * (1 + 1e-5)
        assert len(change.losses) == change.iterations + 1
        assert (change.iterations > 0) == (
            fields.get("resolve", True) or fields.get("rounding", "descent") == "descent"
        )
    assert result.plan.totals.bytes_after == sum(layer.nbytes for layer in sizes.values())
    assert result.plan.totals.bytes_before == sum(layer.dense_nbytes for layer in sizes.values())
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    row = next(iter(manifest["modules"].values()))["changes"][0]
    assert (row["core"], row["modifier"]) == (wanted_core, next(iter(last.values())).modifier)
    assert f"stored as {wanted_core} by QuantizationModifier" in (tmp_path / "out" / "README.md").read_text()


def test_equal_runs_write_equal_bytes(source: Path, tmp_path: Path) -> None:
    before = rng_states()
    for name in ("one", "two"):
        armor_recipes.apply(wanted(source, tmp_path / name, **core(4)))
    assert rng_states() == before
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    differ = {name for name in files[0] if files[0][name] != files[1][name]}
    assert differ <= {*REPORT_FILES, "recipe.yaml", "README.md", "armor_manifest.json"}
    tensors = [json.loads(file["armor_manifest.json"])["tensors"] for file in files]
    assert tensors[0] == tensors[1]


def test_a_later_stage_gives_the_factors_of_the_first(source: Path, tmp_path: Path) -> None:
    mapping = recipe(source, tmp_path / "out")
    mapping["pack_stage"] = {
        "late_modifiers": {"QuantizationModifier": core(targets=[ALL], rounding="nearest", resolve=False, gauge=False)}
    }
    result = armor_recipes.apply(mapping)
    armor_recipes.apply(recipe(source, tmp_path / "float"))
    floats, integers = read_layers(tmp_path / "float"), read_layers(tmp_path / "out")
    for name, layer in integers.items():
        assert layer.core == "int8"
        assert torch.equal(layer.a, floats[name].a)
        assert torch.equal(layer.bitmask, floats[name].bitmask)
        error = layer.unpack()[0] - floats[name].unpack()[0].float()
        assert float(error.abs().max()) < 0.6 * float(layer.scale.float().max())  # type: ignore[union-attr]
    assert [row.stage for row in result.plan.modules] == ["prune_stage"] * 14 + ["pack_stage"] * 14


def test_after_a_refiner_of_the_layer(source: Path, tmp_path: Path) -> None:
    mapping = recipe(
        source,
        tmp_path / "out",
        ARMORModifier=ARMOR,
        BlockRefineModifier=REFINE,
        QuantizationModifier=core(targets=[MLP]),
    )
    result = armor_recipes.apply(mapping)
    assert {name for name, module in result.modules.items() if module.changes} == {
        name for name in result.modules if ".mlp." in name
    }
    assert {layer.core for layer in inspect(tmp_path / "out").layers} == {"int8", "bfloat16"}


def test_modules_that_share_a_b_go_on_sharing(source: Path, tmp_path: Path) -> None:
    shared = {**ARMOR, "share_input_factor": True}
    armor_recipes.apply(wanted(source, tmp_path / "out", armor=shared))
    owners = {layer.name: layer.input_factor for layer in inspect(tmp_path / "out").layers if layer.input_factor}
    assert len(owners) == 2 * 3
    assert {layer.core for layer in inspect(tmp_path / "out").layers} == {"int8"}
    part = wanted(source, tmp_path / "part", armor=shared)
    part["prune_stage"]["armor_modifiers"]["QuantizationModifier"]["targets"] = [r"re:.*q_proj$"]
    result = armor_recipes.apply(part)
    counts = {name: dict(m.changes[0].counts) for name, m in result.modules.items() if m.changes}
    assert counts == {f"model.layers.{i}.self_attn.q_proj": {"input_factors_no_longer_shared": 1} for i in (0, 1)}


def test_the_model_in_memory_is_what_a_loader_makes(source: Path) -> None:
    job = make_job(wanted(source, **core(4, 16)))
    with make_session(job) as session:
        session.run()
    assert hook_count(session.model) == 0
    for name, result in session.results.items():
        assert result.packed is not None
        assert result.packed.core == "int4"
        weight = session.model.get_parameter(f"{name}.weight")
        assert torch.equal(weight, result.packed.to(torch.float32).fold(torch.float32))


PRESETS = {
    "W8A8": ("int8", "int8", None),
    "fp8_dynamic": ("fp8", "fp8", None),
    "W8A16": ("int8", None, 8),
    "W4A16": ("int4", None, 8),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_compressed_tensors_are_cores(source: Path, tmp_path: Path, preset: str) -> None:
    core_type, activations, group = PRESETS[preset]
    fields: dict[str, Any] = {"scheme": preset, "config_groups": None}
    if group is not None:  # the presets' groups of 128 columns are wider than the model
        fields = core(8 if core_type == "int8" else 4, 16)
    result = armor_recipes.apply(wanted(source, tmp_path / "out", **fields))
    rows = {row.name: row for row in result.plan.modules}
    assert {(row.core, row.activations, row.group_size) for row in rows.values()} == {(core_type, activations, group)}
    read = read_layers(tmp_path / "out")
    assert {(layer.core, layer.activations, layer.group_size) for layer in read.values()} == {
        (core_type, activations, group)
    }
    assert ("activations" in json.dumps(next(iter(rows.values())).to_dict())) == (activations is not None)


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        ("NVFP4", "not as float4 by tensor_group"),
        ("W4A16_ASYM", "not as asymmetric int4 by group"),
        ("FP8", "not as float8 by tensor"),
        ("FP8_BLOCK", "not as float8 by block"),
        ("W4A8", "sizes that fit"),
    ],
)
def test_schemes_that_no_core_has_are_refused(source: Path, scheme: str, told: str) -> None:
    assert told in refusal(wanted(source, scheme=scheme, config_groups=None))


def test_static_activations_and_outputs_are_refused(source: Path) -> None:
    weights, eight = {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    for part, told in (
        ("input_activations", "not static int8 by tensor"),
        ("output_activations", "outputs of a layer"),
    ):
        groups = {"core": {"weights": weights, part: eight}}
        assert told in refusal(wanted(source, config_groups=groups))
    fields = {"scheme": "FP8_DYNAMIC", "config_groups": None, "objective": "hessian", "rounding": "gptq"}
    assert "set rounding: descent" in refusal(wanted(source, **fields))


def test_the_gauge_can_be_left(source: Path, tmp_path: Path) -> None:
    losses = {}
    for gauge in (False, True):
        out = tmp_path / str(gauge)
        result = armor_recipes.apply(wanted(source, out, **core(4, 16), gauge=gauge, resolve=False))
        losses[gauge] = sum(module.changes[0].losses[0] for module in result.modules.values())
    assert losses[True] < losses[False]


def test_refusals_say_what_to_do(source: Path) -> None:
    text = refusal(wanted(source, **core(group_size=48)))
    assert "group_size 48 is no multiple of 16 that divides the 32 columns of" in text
    assert "sizes that fit: [16, 32], or strategy: channel" in text
    dense = wanted(source)
    dense["output"]["format"] = "dense"
    assert "set output.format: compressed-tensors" in refusal(dense)
    twice = recipe(
        source,
        ARMORModifier=ARMOR,
        QuantizationModifier__a=core(targets=[ALL]),
        QuantizationModifier__b=core(4, targets=[ATTENTION]),
    )
    assert "both quantize" in refusal(twice)


def test_refiners_of_a_stage_stand_after_it_and_train_no_core(source: Path) -> None:
    refiner = {"targets": [ALL], "core": True}
    after = recipe(source, ARMORModifier=ARMOR, QuantizationModifier=core(targets=[ALL]), BlockRefineModifier=refiner)
    assert "the core of model.layers.0.self_attn.q_proj is int8 by QuantizationModifier before it" in refusal(after)
    same = recipe(
        source, ARMORModifier=ARMOR, DistillationModifier={"targets": [ALL]}, QuantizationModifier=core(targets=[ALL])
    )
    assert "put this one into a later stage" in refusal(same)


def test_sizes_of_a_7b_model_at_block_128() -> None:
    """All linear weights of a Llama 7B layer together, as a share of their bytes in bfloat16."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    for fields, most in ((core(), 0.40), (core(4, 64), 0.27)):
        modifier = QuantizationModifier(QuantizationConfig.model_validate({"targets": "Linear", **fields}))
        core_of = modifier.core(modifier.config.scheme_of("m"))  # type: ignore[arg-type]
        costs = [core_of.plan(ModuleShape("m", *shape, 2), (128, 128)) for shape in shapes]
        assert sum(cost.stored_bytes for cost in costs) <= most * 2 * sum(a * b for a, b in shapes)


def test_int4_rows_of_no_multiple_of_16_are_refused() -> None:
    modifier = QuantizationModifier(QuantizationConfig.model_validate(core(4)))
    with pytest.raises(PlanError, match=r"multiple of 16 entries, model\.odd has 24.*`ignore`"):
        modifier.core(modifier.config.scheme_of("model.odd")).plan(ModuleShape("model.odd", 16, 24, 2), (8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scheme": "W4A16", **core()},
        {"scheme": "W1A1"},
        {"config_groups": {"a": {"targets": ["x"]}}},
        {"observer": {"weights": "mse"}, "input_observer": "mse", "scheme": "FP8"},
        {"observer": {"weight": "mse"}, "scheme": "FP8"},
        {"weight_observer": "percentile", "scheme": "W4A16"},
        {"config_groups": {"a": {"weights": {"observer": "mse", "observer_kwargs": {"bins": 3}}}}},
        core(rounding="gptq"),
    ],
)
def test_fields_that_do_not_fit_together(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        QuantizationConfig.model_validate({"targets": "Linear", **fields})


def test_every_modifier_of_factors_is_tested_here() -> None:
    taken = {name for name, kind in modifiers().items() if issubclass(kind, (FactorModifier, Quantizer))}
    assert taken - {"GPTQModifier"} == {
        "QuantizationModifier"
    }  # GPTQ takes plain weights alone: tests/modifiers/test_gptq.py


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"num_bits": 4}, "{num_bits: 4, strategy: channel}"),
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, "{num_bits: 4, group_size: 64}"),
        ({"strategy": "channel"}, "{num_bits: 8, strategy: channel}"),
    ],
)
def test_the_spelling_of_earlier_releases_is_refused_with_the_new_line(old: dict[str, Any], new: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        QuantizationConfig.model_validate({"targets": ["Linear"], **old})
    line = f"`config_groups: {{core: {{weights: {new}}}}}`"
    assert line in str(caught.value)
    QuantizationConfig.model_validate({"targets": ["Linear"], **yaml.safe_load(line.strip("`"))})
