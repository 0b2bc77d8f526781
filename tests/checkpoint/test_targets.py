"""Groups that name their layers by class or pattern, as llm-compressor writes them, are inspected, loaded and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.reader import inspect
from armor_recipes.checkpoint.targets import plain_schemes, quantized_names
from armor_recipes.errors import CheckpointError
from armor_recipes.integrations.exporting import export_folder
from tests.support import theirs
from tests.support.releases import since

ASYMMETRIC = {**theirs.INT4, "symmetric": False}
FOLDERS: dict[str, theirs.Groups] = {
    "class": {"Linear": theirs.INT4},
    "pattern": {r"re:.*self_attn\..*_proj$": {"num_bits": 8, "strategy": "channel"}, r"re:.*mlp\..*_proj$": ASYMMETRIC},
    "wide pattern": {r"re:.*self_attn\..*": {"num_bits": 8, "strategy": "channel"}, r"re:.*mlp\..*": ASYMMETRIC},
    "activations": {"Linear": "W8A8"},
    "float": {"Linear": "FP8_DYNAMIC"},
    "pattern before class": {r"re:.*\.down_proj$": {"num_bits": 8, "strategy": "channel"}, "Linear": theirs.INT4},
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=since("0.18")) if k.startswith("wide") else k for k in FOLDERS])
def test_inspected_loaded_and_exported(kind: str, tmp_path: Path) -> None:
    folder = theirs.save(tmp_path / "theirs", FOLDERS[kind])
    found = inspect(folder)
    assert (len(found.layers), len(found.plain)) == (0, 14)
    if kind == "pattern before class":
        eight = {layer.name for layer in found.plain if layer.scheme == "int8 by channel"}
        assert eight == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}
    loaded = theirs.logits(armor_recipes.load(folder, dtype=torch.float32))
    assert torch.equal(loaded, theirs.logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))
    done = export_folder(folder, tmp_path / "dense", to="dense")
    assert done.layers == 14
    dense = theirs.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    assert float((dense - loaded).norm() / loaded.norm()) < 0.1  # bfloat16 weights, and activations as they are


def group(*targets: str, bits: int = 4) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": True}
    return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}


def config(*groups: dict[str, Any], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {f"group_{n}": one for n, one in enumerate(groups)}
    return {"config_groups": found, "format": "pack-quantized", "ignore": list(ignore)}


def bits(quantization: dict[str, Any], *modules: str) -> dict[str, int]:
    found = plain_schemes(quantization, modules, where="config.json")
    return {name: scheme.args.weights.num_bits for name, scheme in found.items()}


def test_names_go_before_patterns_and_patterns_before_classes() -> None:
    groups = group("Linear"), group("re:a", bits=8), group("ab", bits=4)
    assert bits(config(*groups), "ab", "ac", "b.a") == {"ab": 4, "ac": 8, "b.a": 4}


def test_what_is_ignored_is_in_no_group() -> None:
    assert bits(config(group("Linear"), ignore=("re:.*head$", "x")), "lm_head", "x", "y") == {"y": 4}


def test_quantised_modules_are_those_with_packed_weights_or_scales() -> None:
    names = (
        "a.weight",
        "a.weight_scale",
        "b.weight_packed",
        "b.weight_scale",
        "c.weight",
        "d.k_scale",
        "e.weight_scale",
    )
    assert quantized_names(names) == ("a", "b")


def test_two_classes_are_told_apart_by_no_file() -> None:
    with pytest.raises(CheckpointError, match=r"by class .*'Linear'.* and .*'Embedding'"):
        bits(config(group("Linear"), group("Embedding", bits=8)), "a")


@pytest.mark.parametrize("pattern", ["re:[", "re:(?P<a"])
def test_a_pattern_that_is_none_is_an_error_of_the_folder(pattern: str, tmp_path: Path) -> None:
    folder = theirs.save(tmp_path / "theirs", {"Linear": theirs.INT4})
    file = folder / "config.json"
    file.write_text(file.read_text().replace(json.dumps("Linear"), json.dumps(pattern)))
    with pytest.raises(CheckpointError, match="no regular expression"):
        inspect(folder)


def test_a_layer_that_no_group_takes_is_an_error(tmp_path: Path) -> None:
    folder = theirs.save(tmp_path / "theirs", {"Linear": theirs.INT4})
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"Linear"', '"re:.*mlp.*"'))
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj\.weight_scale' belongs to no layer"):
        inspect(folder)
