"""A valid recipe: what it becomes, how files compose, what is hashed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import AtMost, builtin_recipes, load_recipe, load_recipe_mapping
from tests.support.recipes import REGISTRY, VALID, PruneConfig, errors, load, write


def test_every_section_is_read(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.model.id == "builtin:stdlib-llama"
    assert recipe.model.dtype == "auto"
    assert recipe.stages == ("prune_stage", "quantize_stage")
    assert [entry.name for entry in recipe.modifiers] == ["ARMORModifier", "ARMORModifier@mlp", "QuantizationModifier"]
    assert [entry.kind for entry in recipe.modifiers] == ["ARMORModifier", "ARMORModifier", "QuantizationModifier"]
    assert [entry.group for entry in recipe.modifiers] == ["armor_modifiers", "armor_modifiers", "quant_modifiers"]
    assert recipe.modifiers[0].where == f"{tmp_path}/recipe.yaml:8"
    assert recipe.output.path == "out/smollm2-armor"
    assert recipe.evaluation is not None
    assert recipe.evaluation.perplexity.windows is None
    first, second, third = (entry.config for entry in recipe.modifiers)
    assert isinstance(first, PruneConfig)
    assert isinstance(second, PruneConfig)
    assert (first.block_size, second.block_size) == (64, (32, 64))
    assert third.targets == ("Linear",)


def test_a_modifiers_calibration_is_completed_from_the_default(tmp_path: Path) -> None:
    own = load(tmp_path).modifiers[1].config.calibration
    assert own is not None
    assert own.samples == AtMost(at_most=4)
    assert own.text_column == "content"
    partial = (
        load(tmp_path, VALID.replace("{dataset: my_code.jsonl, text_column: content, ", "{"))
        .modifiers[1]
        .config.calibration
    )
    assert partial is not None
    assert partial.dataset == "builtin:pydoc"
    default = load(tmp_path).modifiers[0].config.calibration
    assert default is not None
    assert default.samples == 16


def test_a_null_calibration_means_the_default(tmp_path: Path) -> None:
    recipe = load(tmp_path, overrides=["prune_stage.armor_modifiers.ARMORModifier.calibration=null"])
    assert recipe.modifiers[0].config.calibration == recipe.calibration


def test_local_data_is_absolute_in_the_specs_and_as_written_in_resolved(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    own = recipe.modifiers[1].config.calibration
    assert own is not None
    assert own.dataset == str(tmp_path / "my_code.jsonl")
    fields = recipe.resolved["prune_stage"]["armor_modifiers"]["ARMORModifier@mlp"]
    assert fields["calibration"]["dataset"] == "my_code.jsonl"


@pytest.mark.parametrize(
    ("name", "is_file"),
    [
        ("./data", True),
        ("../data", True),
        ("here.csv", True),
        ("data.txt", True),
        ("data.md", True),
        ("data.json", True),
        ("data.parquet", True),
        ("org/dataset", False),
        ("builtin:pydoc.txt", False),
        ("https://example.org/a.jsonl", False),
        ("folder", False),
    ],
)
def test_which_datasets_are_local_files(tmp_path: Path, name: str, is_file: bool) -> None:
    (tmp_path / "here.csv").write_text("x")
    (tmp_path / "folder").mkdir()
    recipe = load(tmp_path, VALID.replace("dataset: builtin:pydoc\n", f"dataset: {name}\n"))
    assert recipe.calibration is not None
    assert recipe.calibration.dataset == (str((tmp_path / name).resolve()) if is_file else name)


def test_a_mix_of_datasets_is_resolved_item_by_item(tmp_path: Path) -> None:
    mix = "[{dataset: a.txt, weight: 1}, {dataset: builtin:pydoc, weight: 2.5, split: dev}]"
    recipe = load(tmp_path, VALID.replace("dataset: builtin:pydoc\n", f"dataset: {mix}\n"))
    assert recipe.calibration is not None
    assert isinstance(recipe.calibration.dataset, tuple)
    assert [item.dataset for item in recipe.calibration.dataset] == [str(tmp_path / "a.txt"), "builtin:pydoc"]
    assert recipe.calibration.dataset[1].weight == 2.5


def test_data_files_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, VALID, "base/base.yaml")
    top = write(tmp_path, "extends: base/base.yaml\nevaluation: {perplexity: {dataset: test.txt}}")
    monkeypatch.chdir(tmp_path.parent)
    recipe = load_recipe([top], overrides=["calibration.dataset=set.txt"], registry=REGISTRY)
    own = recipe.modifiers[1].config.calibration
    assert own is not None
    assert recipe.calibration is not None
    assert recipe.evaluation is not None
    assert own.dataset == str(tmp_path / "base" / "my_code.jsonl")
    assert recipe.evaluation.perplexity.dataset == str(tmp_path / "test.txt")
    assert recipe.calibration.dataset == str(tmp_path.parent / "set.txt")


def test_files_are_laid_over_each_other_in_order(tmp_path: Path) -> None:
    base = write(tmp_path, VALID, "a.yaml")
    top = write(
        tmp_path,
        "prune_stage: {armor_modifiers: {ARMORModifier: {block_size: 32, targets: [Linear]}}}\n"
        "extra_stage: {m_modifiers: {QuantizationModifier: {targets: [x]}}}",
        "b.yaml",
    )
    recipe = load_recipe([base, top], registry=REGISTRY)
    config = recipe.modifiers[0].config
    assert isinstance(config, PruneConfig)
    assert (config.block_size, config.targets) == (32, ("Linear",))
    assert recipe.stages == ("prune_stage", "quantize_stage", "extra_stage")
    assert recipe.modifiers[0].where == f"{tmp_path}/a.yaml:8"


def test_extends_takes_a_list_and_the_file_itself_wins(tmp_path: Path) -> None:
    write(tmp_path, VALID, "a.yaml")
    write(tmp_path, "calibration: {samples: 3, seed: 4}", "b.yaml")
    recipe = load(tmp_path, "extends: [a.yaml, b.yaml]\ncalibration: {seed: 5}")
    assert recipe.calibration is not None
    assert (recipe.calibration.samples, recipe.calibration.seed) == (3, 5)
    assert "extends" not in recipe.resolved


def test_a_section_that_is_null_is_removed(tmp_path: Path) -> None:
    recipe = load(tmp_path, overrides=["evaluation="])
    assert recipe.evaluation is None
    assert recipe.hash() == load(tmp_path, VALID[: VALID.index("evaluation:")]).hash()


def test_overrides_win_in_order_and_make_what_is_missing(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        VALID[: VALID.index("evaluation:")],
        overrides=[
            "prune_stage.armor_modifiers.ARMORModifier.block_size=32",
            "prune_stage.armor_modifiers.ARMORModifier.block_size=[16, 8]",
            "evaluation.perplexity.dataset=builtin:pydoc-heldout",
            "model.dtype=float16",
            "prune_stage.armor_modifiers.ARMORModifier.tolerance=1e-4",
        ],
    )
    config = recipe.modifiers[0].config
    assert isinstance(config, PruneConfig)
    assert (config.block_size, config.tolerance) == ((16, 8), 1e-4)
    assert recipe.evaluation is not None
    assert (recipe.model.id, recipe.model.dtype) == ("builtin:stdlib-llama", "float16")


def test_flags_come_last_and_may_give_required_sections(tmp_path: Path) -> None:
    text = VALID.replace("model: builtin:stdlib-llama\n", "").replace(
        "output: {path: out/smollm2-armor", "output: {path: a"
    )
    recipe = load(tmp_path, text, overrides=["output.path=b"], model="m", output="c")
    assert (recipe.model.id, recipe.output.path) == ("m", "c")
    assert recipe.resolved["output"] == {"path": "c", "format": "compressed-tensors"}


def test_a_group_may_be_a_list_whose_names_are_numbered(tmp_path: Path) -> None:
    text = """
    default_stage:
      default_modifiers:
        - QuantizationModifier: {targets: [a]}
        - QuantizationModifier@x: {targets: [b]}
        - QuantizationModifier: {targets: [c]}
    """
    recipe = load(tmp_path, text, model="m", output="o")
    names = [entry.name for entry in recipe.modifiers]
    assert names == ["QuantizationModifier", "QuantizationModifier@x", "QuantizationModifier@2"]
    mapping = text.replace("- ", "").replace("Modifier: {targets: [c", "Modifier@2: {targets: [c")
    assert load(tmp_path, mapping, model="m", output="o").hash() == recipe.hash()


def test_an_llm_compressor_recipe_with_flags_is_a_recipe(tmp_path: Path) -> None:
    text = (
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n      targets: Linear\n      ignore: [lm_head]\n"
    )
    assert load(tmp_path, text, model="m", output="o").modifiers[0].config.ignore == ("lm_head",)


def test_merge_keys_work_as_in_yaml(tmp_path: Path) -> None:
    text = """
    model: m
    output: {path: o}
    a_stage:
      a_modifiers:
        QuantizationModifier: &base {targets: [a], scheme: A, seed: 1}
        QuantizationModifier@b: {<<: *base, scheme: B}
        QuantizationModifier@c: {<<: [{seed: 3}, *base]}
    """
    configs = [entry.config for entry in load(tmp_path, text).modifiers]
    assert [(config.seed, config.model_dump()["scheme"]) for config in configs] == [(1, "A"), (1, "B"), (3, "A")]


def test_a_file_wins_over_a_builtin_name_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builtin = tmp_path / "builtin"
    write(builtin, VALID, "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_recipe(["quickstart"], registry=REGISTRY, builtin_dir=builtin).model.id == "builtin:stdlib-llama"
    (tmp_path / "quickstart").rmdir()
    write(tmp_path, VALID.replace("builtin:stdlib-llama", "other"), "quickstart")
    assert load_recipe("quickstart", registry=REGISTRY, builtin_dir=builtin).model.id == "other"
    assert list(builtin_recipes(builtin)) == ["quickstart"]


def test_a_file_may_extend_a_builtin_recipe(tmp_path: Path) -> None:
    write(tmp_path / "builtin", VALID, "quickstart.yaml")
    assert load(tmp_path, "extends: quickstart", builtin_dir=tmp_path / "builtin").model.id == "builtin:stdlib-llama"


def test_a_python_mapping_is_the_same_recipe(tmp_path: Path) -> None:
    mapping = yaml.safe_load(VALID)
    recipe = load_recipe_mapping(mapping, registry=REGISTRY)
    assert recipe.hash() == load(tmp_path).hash()
    assert recipe.modifiers[0].where == "the recipe mapping"
    with_path = load_recipe_mapping({**mapping, "output": {"path": tmp_path}}, registry=REGISTRY)
    assert with_path.output.path == str(tmp_path)


def test_resolved_yaml_loads_to_the_same_hash(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    again = load(tmp_path / "elsewhere", recipe.resolved_yaml())
    assert again.hash() == recipe.hash()
    assert again.resolved == recipe.resolved


def test_the_hash_leaves_out_the_output_path_and_nothing_else(tmp_path: Path) -> None:
    reference = load(tmp_path).hash()
    assert load(tmp_path, output="elsewhere").hash() == reference
    assert load(tmp_path, VALID.replace("builtin:stdlib-llama", "{id: builtin:stdlib-llama}")).hash() == reference
    changed = [
        "model=x",
        "output.format=dense",
        "calibration.seed=1",
        "quantize_stage.quant_modifiers.QuantizationModifier.seed=1",
    ]
    hashes = [load(tmp_path, overrides=[override]).hash() for override in changed]
    assert len({reference, *hashes}) == 5


def test_the_hash_knows_the_order_of_modifiers_but_not_of_other_keys(tmp_path: Path) -> None:
    head = "model: m\noutput: {path: o}\n"
    pair = "QuantizationModifier@{}: {{targets: [x]}}, QuantizationModifier@{}: {{targets: [x]}}"
    group = "a_stage: {{a_modifiers: {{" + pair + "}}}}"
    one = load(tmp_path, head + group.format("a", "b"))
    assert load(tmp_path, head + group.format("b", "a")).hash() != one.hash()
    assert load(tmp_path, "output: {path: o}\nmodel: m\n" + group.format("a", "b")).hash() == one.hash()


@pytest.mark.parametrize(
    "name",
    [
        "yes",
        "1e5",
        "1.5e3",
        "010",
        "1:30",
        "2024-01-01",
        "~",
        "<<",
        "=",
        "null",
        "a: b",
        "\x85",
        "\x85\t",
        "a\rb",
        "\ufeff",
        "é\u2028",
    ],
)
def test_odd_texts_survive_the_dump(tmp_path: Path, name: str) -> None:
    mapping = {**yaml.safe_load(VALID), "model": name}
    recipe = load_recipe_mapping(mapping, registry=REGISTRY)
    assert load(tmp_path, recipe.resolved_yaml()).model.id == name


def test_numbers_are_read_as_they_look(tmp_path: Path) -> None:
    recipe = load(tmp_path, overrides=["calibration.seed=0x10", "calibration.samples=1_000"])
    assert recipe.calibration is not None
    assert (recipe.calibration.seed, recipe.calibration.samples) == (16, 1000)
    lines = errors(tmp_path, overrides=["calibration.seed=010"])
    assert lines == ["--set calibration.seed=010: calibration.seed: must be a whole number (value '010')"]


def test_no_recipe_at_all() -> None:
    with pytest.raises(RecipeError, match="no recipe is given"):
        load_recipe([], registry=REGISTRY)
