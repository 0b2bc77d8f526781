"""`serve` in a recipe: what a server could not fuse or split is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.run import Job, prepare
from armor_recipes.run.job import read_recipe
from tests.support.engine import ARMOR, ATTENTION, core, recipe, save_model
from tests.support.stacks import make_stacked

L0 = "model.layers.0"


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads of 8, 2 key-value heads; hidden 32, intermediate 64; 2 layers."""
    return save_model(tmp_path_factory.mktemp("gqa") / "m", "llama-gqa-tied")


def plan(model: Path, ways: list[Any], **modifiers: dict[str, Any]) -> Job:
    return prepare(read_recipe({**recipe(model, **modifiers), "serve": {"tensor_parallel": ways}}))


def refusal(model: Path, ways: list[Any], **modifiers: dict[str, Any]) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(model, ways, **modifiers)
    return str(caught.value).splitlines()


def armor(*names: str, **fields: Any) -> dict[str, Any]:
    return {**ARMOR, "targets": [rf"re:.*({'|'.join(names)})_proj$"], **fields}


@pytest.mark.parametrize("ways", [[1], [1, 2], [4, 2, 1]])
def test_what_fits_is_planned(gqa: Path, ways: list[int]) -> None:
    """With 4 processes two hold the same key-value head, of 8 rows: one block."""
    assert len(plan(gqa, ways).plan.modules) == 14
    assert len(plan(gqa, ways, ARMORModifier=armor("q", "k", "v", "o")).plan.modules) == 8


def test_a_block_that_is_cut_names_module_place_and_sizes(gqa: Path) -> None:
    lines = refusal(gqa, [1, 2], ARMORModifier={**ARMOR, "block_size": 16})
    assert lines == [
        f"the recipe mapping: ARMORModifier: serve.tensor_parallel 2: {L0}.self_attn.{name}_proj: 16 rows over 2 processes are not "
        "whole blocks for each: they would have to be a multiple of 2 x 16, with block size [16, 16], float core; choose a block "
        f"size (and group size) that fits, or add '{L0}.self_attn.{name}_proj' to `ignore` (and 1 more like it: model.layers.1)"
        for name in ("k", "v")
    ]


def test_columns_are_split_too(gqa: Path) -> None:
    (line,) = refusal(gqa, [2], ARMORModifier=armor("o", block_size=[8, 32]))
    assert f"{L0}.self_attn.o_proj: 32 columns over 2 processes" in line
    assert "a multiple of 2 x 32" in line
    assert plan(gqa, [2], ARMORModifier=armor("q", "k", "v", block_size=[8, 32]))


def test_groups_of_scales_are_not_cut(gqa: Path) -> None:
    def modifiers(group_size: int) -> dict[str, Any]:
        quantization = core(group_size=2 * group_size, targets=[r"re:.*down_proj$"])
        return {"ARMORModifier": armor("down"), "QuantizationModifier": quantization}

    (line,) = refusal(gqa, [1, 2, 4], **modifiers(16))
    assert f"QuantizationModifier: serve.tensor_parallel 4: {L0}.mlp.down_proj: 64 columns" in line
    assert "a multiple of 4 x 32, with block size [8, 8], int8 core in groups of 16" in line
    assert plan(gqa, [1, 2], **modifiers(16))
    assert plan(gqa, [4], **modifiers(32))  # one scale for a whole row, which every process has


def test_heads_are_not_cut(gqa: Path) -> None:
    lines = refusal(gqa, [8], ARMORModifier=armor("q"), ARMORModifier__kv=armor("k", "v", block_size=4))
    assert "4 heads and 2 key-value heads cannot be split over 8 processes; leave 8 out" in lines[0]


@pytest.mark.parametrize(
    ("modifiers", "entry", "first", "other"),
    [
        ({"ARMORModifier": armor("q", "v")}, "ARMORModifier", "q", "k_proj (dense)"),
        ({"ARMORModifier": armor("v", "o")}, "ARMORModifier", "v", "v_proj (block size [8, 8], float core)"),
        (
            {"ARMORModifier": armor("q", "k"), "ARMORModifier__v": armor("v", block_size=[8, 16])},
            "ARMORModifier",
            "q",
            "v_proj (block size [8, 16], float core)",
        ),
        (
            {"ARMORModifier": armor("q", "k", "v"), "QuantizationModifier": core(targets=[r"re:.*q_proj$"])},
            "QuantizationModifier",
            "q",
            "k_proj (block size [8, 8], float core)",
        ),
    ],
)
def test_groups_that_are_mixed(gqa: Path, modifiers: dict[str, Any], entry: str, first: str, other: str) -> None:
    (line,) = refusal(gqa, [1], **modifiers)
    assert line.startswith(f"the recipe mapping: {entry}: serve: {L0}.self_attn.")
    assert f"{L0}.self_attn.{other}" in line
    assert "runs as one layer with" in line
    assert "(and 1 more like it: model.layers.1)" in line


def test_plain_pruning_beside_packed_members_is_mixed(gqa: Path) -> None:
    (line,) = refusal(gqa, [1], ARMORModifier=armor("gate"), NoWagModifier={"targets": [r"re:.*up_proj$"]})
    assert "mlp.up_proj (dense) runs as one layer" in line


def test_names_that_no_server_is_known_to_split(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "gpt-neox")
    (line,) = refusal(model, [1], ARMORModifier={**ARMOR, "targets": [r"re:.*query_key_value$"]})
    assert "query_key_value: how a server fuses and splits a module of this name is not known" in line
    assert "leave out `serve`" in line


def test_a_weight_of_several_layers_is_not_served(tmp_path: Path) -> None:
    model: Any = make_stacked("zamba2")
    model.save_pretrained(tmp_path / "m")
    targets = [r"re:.*shared_transformer\.self_attn\.o_proj$"]
    (line,) = refusal(tmp_path / "m", [1], ARMORModifier={**ARMOR, "targets": targets})
    assert (
        "layers.1.shared_transformer.self_attn.o_proj: its weight is that of model.layers.3.shared_transformer" in line
    )


def test_without_serve_and_dense_nothing_is_asked(gqa: Path) -> None:
    mapping = recipe(gqa, ARMORModifier=armor("q", block_size=16))
    assert prepare(read_recipe(mapping)).plan.modules
    dense = {**mapping, "serve": {"tensor_parallel": [7]}, "output": {"path": "out", "format": "dense"}}
    assert prepare(read_recipe(dense)).plan.modules


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "serve.tensor_parallel: required, but missing; name the numbers of processes"),
        ({"tensor_parallel": []}, "must not be empty"),
        ({"tensor_parallel": [0]}, "at least 1"),
        ({"tensor_parallel": 2}, "must be a list"),
        ({"tensor_parallel": ["2"]}, "must be a whole number"),
        ({"tensor_paralel": [2]}, "nearest valid key: tensor_parallel"),
        ([1, 2], "must be a mapping"),
    ],
)
def test_the_field_is_strict(gqa: Path, value: object, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read_recipe({**recipe(gqa, ARMORModifier={**ARMOR, "targets": [ATTENTION]}), "serve": value})


def test_it_belongs_to_the_recipe(gqa: Path) -> None:
    with_serve, without = (
        read_recipe({**recipe(gqa), **extra}) for extra in ({"serve": {"tensor_parallel": [1, 2]}}, {})
    )
    assert with_serve.serve is not None
    assert with_serve.serve.tensor_parallel == (1, 2)
    assert without.serve is None
    assert with_serve.hash() != without.hash()
    assert "serve:" in with_serve.resolved_yaml()
