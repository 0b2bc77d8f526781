"""Recipes whose model is compressed already: a folder of ours is gone on from, one of llm-compressor is decompressed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import armor_recipes
from armor_recipes.checkpoint.reader import inspect
from armor_recipes.checkpoint.verify import verify
from armor_recipes.cli.tables import size
from armor_recipes.errors import PlanError
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.models import load_model
from tests.support import theirs
from tests.support.commands import Shell, write_recipe
from tests.support.engine import ATTENTION, MLP, core, make_job, recipe
from tests.support.tokenizers import byte_tokenizer

ROW = {"config_groups": {"a": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
ARMOR = {"targets": [MLP], "block_size": 8, "iterations": 2, "share_input_factor": True}
CORES: dict[str, Any] = {"targets": [MLP], **core(4, 32)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.dense(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def ours(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLP's layers packed with factors, attention's quantised as plain layers."""
    out = tmp_path_factory.mktemp("ours") / "model"
    whole = {"targets": [ATTENTION], **ROW}
    armor_recipes.apply(recipe(dense, out, ARMORModifier=ARMOR, QuantizationModifier=whole))
    return out


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As llm-compressor writes W4A16."""
    return theirs.save(tmp_path_factory.mktemp("int4") / "model", {"Linear": theirs.INT4})


def refusal(mapping: Mapping[str, Any]) -> str:
    with pytest.raises(PlanError) as error:
        make_job(mapping)
    return str(error.value)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)) for name, value in one.items()
    )


def test_cores_are_quantised_as_in_a_later_stage_of_one_recipe(dense: Path, ours: Path, tmp_path: Path) -> None:
    """The same bytes; and what the recipe leaves alone is the folder's own, plain quantised layers among it."""
    whole = recipe(dense, tmp_path / "one", ARMORModifier=ARMOR, QuantizationModifier={"targets": [ATTENTION], **ROW})
    late = {"late_modifiers": {"QuantizationModifier": CORES}}
    stages = {**{key: value for key, value in whole.items() if key != "output"}, "late_stage": late}
    armor_recipes.apply({**stages, "output": whole["output"]})
    result = armor_recipes.apply(recipe(ours, tmp_path / "two", QuantizationModifier=CORES))
    assert equal(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    assert result.plan.notes == ("8 layers of the model stay as they are stored: int8 by channel",)
    found = inspect(tmp_path / "two")
    assert {(layer.core, layer.block_size) for layer in found.layers} == {("int4", (8, 8))}
    before, after = tensors(ours), tensors(tmp_path / "two")
    assert equal(*({n: x for n, x in each.items() if ".mlp." not in n} for each in (before, after)))
    verify(tmp_path / "two")


def test_bytes_are_as_planned(ours: Path, tmp_path: Path) -> None:
    result = armor_recipes.apply(
        recipe(ours, tmp_path / "out", QuantizationModifier={**CORES, "targets": ["re:.*up_proj$"]})
    )
    found = inspect(tmp_path / "out")
    written = sum(each.nbytes for each in (*found.layers, *found.plain))
    shared = 2 * 64 * 8 * 2  # a B that only one of its modules changes is stored for both: planned once
    assert result.plan.totals.modules == 14
    assert result.plan.totals.bytes_after <= written <= result.plan.totals.bytes_after + shared
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    gate = manifest["modules"]["model.layers.0.mlp.gate_proj"]
    assert (gate["modifier"], gate["last_loss"], gate["stop_reason"]) == ("model", 0.0, "as it was in the model")
    assert manifest["carried_over"] == []


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_model_in_memory_is_the_folder(dtype: str, ours: Path) -> None:
    job = make_job({**recipe(ours, QuantizationModifier=CORES), "model": {"id": str(ours), "dtype": dtype}})
    loaded = armor_recipes.load(ours, backend="folded", dtype=torch.float32)
    assert torch.equal(theirs.logits(load_model(job.source, device=job.device)), theirs.logits(loaded))


def test_a_dense_output_holds_what_the_folder_stands_for(ours: Path, tmp_path: Path) -> None:
    """Other layers may still be pruned; what came packed is folded, what came quantised is dequantised."""
    head = {"targets": ["lm_head"], "pattern": "2:4"}
    mapping = recipe(ours, tmp_path / "out", MagnitudeModifier=head)
    result = armor_recipes.apply({**mapping, "output": {"path": str(tmp_path / "out"), "format": "dense"}})
    assert "8 layers of the model are decompressed: int8 by channel" in result.plan.notes
    exported = export_folder(ours, tmp_path / "dense", to="dense")
    assert exported.layers == 14
    assert result.plan.totals.bytes_after == result.plan.totals.bytes_before > result.plan.bytes_given
    assert "6 of these weights are stored as the dense product" in (tmp_path / "out" / "README.md").read_text()
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "dense")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name != "lm_head.weight")


@pytest.mark.parametrize(
    ("modifiers", "words"),
    [
        ({"ARMORModifier": ARMOR}, r"gate_proj is already pruned in the model (a 2:4 core with factors of 8x8)"),
        ({"WandaPruningModifier": {"targets": [MLP], "pattern": "2:4"}}, "is already pruned in the model"),
        ({"QuantizationModifier": {"targets": [ATTENTION], **ROW}}, "q_proj is already quantised in the model (int8 by channel)"),
        ({"ARMORModifier": {**ARMOR, "targets": [ATTENTION]}}, "it would put unrounded numbers in the place of quantised ones"),
        ({"SmoothQuantModifier": {}}, "factors that were solved for a weight do not follow its scales"),
        ({"ChannelPermutationModifier": {"targets": ["re:.*down_proj$"]}}, "comes packed or quantised with the model, and"),
    ],
)  # fmt: skip
def test_what_was_done_is_not_done_again(modifiers: Any, words: str, ours: Path) -> None:
    assert words in refusal(recipe(ours, **modifiers))


def test_a_quantised_core_is_not_quantised_again(ours: Path, tmp_path: Path) -> None:
    armor_recipes.apply(recipe(ours, tmp_path / "once", QuantizationModifier=CORES))
    told = refusal(recipe(tmp_path / "once", QuantizationModifier=CORES))
    assert "gate_proj is already quantised in the model (a 2:4 core of int4 with factors of 8x8)" in told
    assert "(and 5 more like it" in told


def test_layers_of_llm_compressor_are_decompressed_and_counted(int4: Path, tmp_path: Path) -> None:
    result = armor_recipes.apply(recipe(int4, tmp_path / "out", ARMORModifier=ARMOR))
    assert result.plan.notes == ("14 layers of the model are decompressed: int4, groups of 32",)
    found = inspect(tmp_path / "out")
    assert (len(found.layers), len(found.plain)) == (6, 0)
    exported = export_folder(int4, tmp_path / "dense", to="dense")
    assert exported.layers == 14
    before, after = tensors(tmp_path / "dense"), tensors(tmp_path / "out")
    attention = {name: value for name, value in before.items() if "self_attn" in name}
    assert equal(attention, {name: after[name] for name in attention})


def test_decompressed_layers_are_not_rounded_twice(int4: Path) -> None:
    told = refusal(recipe(int4, QuantizationModifier={"targets": [MLP], **ROW}))
    assert "gate_proj is already quantised in the model (int4, groups of 32)" in told
    assert "armor export FOLDER OUT --to dense" in told
    make_job(recipe(int4, ARMORModifier=ARMOR, QuantizationModifier=CORES))  # of what was solved anew


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("quant_method", "gptq", "is quantised by 'gptq'"),
        ("kv_cache_scheme", {"num_bits": 8}, "a quantised cache of keys and values (kv_cache_scheme"),
        ("transform_config", {"config_groups": {"R3": {}}}, "transforms (transform_config"),
    ],
)
def test_what_would_be_lost_is_refused(key: str, value: object, words: str, tmp_path: Path) -> None:
    folder = theirs.save(tmp_path / "theirs", {"Linear": theirs.INT4})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert words in refusal(recipe(folder, ARMORModifier=ARMOR))


def test_through_the_commands(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(monkeypatch, capsys)
    file = write_recipe(tmp_path, ours, QuantizationModifier=CORES)
    plan = shell("armor-apply", file, "--plan")
    assert "8 layers of the model stay as they are stored: int8 by channel" in plan.out
    inspected = inspect(ours)
    given = sum(each.nbytes for each in (*inspected.layers, *inspected.plain))
    assert f"14 weights: {size(given)} (" in plan.out
    done = shell("armor-apply", file)
    assert (done.code, "mean relative loss" in done.out) == (0, False)
    assert f" {size(given)} " in done.out.partition("pruned weights")[2].partition("\n")[0]
    assert f" | {given} | " in (tmp_path / "out" / "README.md").read_text()
    assert shell("armor", "verify", tmp_path / "out").code == 0
    assert shell("armor-apply", write_recipe(tmp_path, ours, ARMORModifier=ARMOR), "--plan").code == 3


def test_both_kinds_are_evaluated(
    ours: Path, int4: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(monkeypatch, capsys)
    for folder in (ours, int4):
        byte_tokenizer().save_pretrained(folder)
        done = shell("armor", "eval", folder, "--windows", "2", "--sequence-length", "16")
        assert (done.code, "perplexity" in done.out) == (0, True), done.err
