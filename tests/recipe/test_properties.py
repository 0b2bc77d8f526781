"""Whatever stands in a recipe, loading it returns a recipe or raises RecipeError, whose lines each name a place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import Recipe, load_recipe_mapping
from armor_recipes.recipe.problems import Mark, Problems
from armor_recipes.recipe.python_source import read_mapping
from armor_recipes.recipe.tree import merge, plain
from armor_recipes.recipe.yaml_source import Dumper, parse
from tests.support.recipes import REGISTRY, VALID, load, write

SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "exact", "builtin:pydoc", "Linear", "re:(", "12", "yes", "1e5", "x.txt"])
)
KEYS = "model id output path calibration dataset samples at_most evaluation perplexity extends args << @ a_stage"
keys = st.text(max_size=8) | st.sampled_from(
    [*KEYS.split(), "a_modifiers", "ARMORModifier", "QuantizationModifier@x", "targets", "block_size"]
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=25
)
mappings = st.dictionaries(keys, trees, max_size=5)


def refused_or_read(attempt: Callable[[], Recipe], place: str) -> None:
    """Run `attempt`; a RecipeError must name `place`, or a file beside it, in every line, and be encodable."""
    try:
        recipe = attempt()
    except RecipeError as error:
        message = str(error)
        message.encode("utf-8")
        assert message
        assert all(line.startswith(place) for line in message.split("\n")), message
    else:
        assert isinstance(recipe, Recipe)
        assert len(recipe.hash()) == 64


@SHARED
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes(tmp_path: Path, data: bytes) -> None:
    refused_or_read(lambda: load(tmp_path, data), str(tmp_path))


@SHARED
@given(text=st.text(max_size=200) | st.text(alphabet="ab:-[]{}&*!|>'\"%@`?#,\n\t 01.<\\xU", max_size=200))
def test_arbitrary_text(tmp_path: Path, text: str) -> None:
    refused_or_read(lambda: load(tmp_path, text.encode("utf-8", "surrogatepass")), str(tmp_path))


@SHARED
@given(mapping=mappings)
def test_arbitrary_structures(tmp_path: Path, mapping: dict[str, Any]) -> None:
    refused_or_read(lambda: load(tmp_path, yaml.safe_dump(mapping)), str(tmp_path))
    refused_or_read(lambda: load(tmp_path, json.dumps(mapping)), str(tmp_path))
    extends = isinstance(mapping.get("extends"), str | list)
    if not extends:
        refused_or_read(lambda: load_recipe_mapping(mapping, registry=REGISTRY), "the recipe mapping")


@SHARED
@given(
    overrides=st.lists(
        st.text(max_size=40) | st.builds("{}.{}={}".format, keys, keys, st.text(max_size=20)), min_size=1
    )
)
def test_arbitrary_overrides(tmp_path: Path, overrides: list[str]) -> None:
    refused_or_read(lambda: load(tmp_path, overrides=overrides), "--set ")


def paths_of(tree: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every value of a plain tree, but for the root's."""
    items: list[tuple[str | int, object]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    return [found for key, child in items for found in ((*path, key), *paths_of(child, (*path, key)))]


PATHS = paths_of(yaml.safe_load(VALID))


@SHARED
@given(path=st.sampled_from(PATHS), value=trees, extra=st.none() | keys, drop=st.booleans())
def test_mutations_of_a_valid_recipe(
    tmp_path: Path, path: tuple[str | int, ...], value: object, extra: str | None, drop: bool
) -> None:
    tree = copy.deepcopy(yaml.safe_load(VALID))
    parent: Any = tree
    for key in path[:-1]:
        parent = parent[key]
    if drop:
        del parent[path[-1]]
    elif extra is not None and isinstance(parent, dict):
        parent[extra] = value
    else:
        parent[path[-1]] = value
    refused_or_read(lambda: load(tmp_path, yaml.safe_dump(tree, sort_keys=False)), str(tmp_path))


@SHARED
@given(position=st.integers(0, len(VALID) - 1), removed=st.integers(0, 5), inserted=st.text(max_size=5))
def test_edits_of_a_valid_text(tmp_path: Path, position: int, removed: int, inserted: str) -> None:
    text = VALID[:position] + inserted + VALID[position + removed :]
    refused_or_read(lambda: load(tmp_path, text.encode("utf-8", "surrogatepass")), str(tmp_path))


names = st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text)
sizes = st.integers(-(2**63), 2**63)
configs = st.fixed_dictionaries(
    {"targets": names.filter(lambda name: not name.startswith("re:")) | st.just(["Linear", "re:.*_proj$"])},
    optional={
        "block_size": sizes | st.just("auto") | st.lists(sizes, min_size=2, max_size=2),
        "tolerance": st.floats(0, 1e300),
        "seed": st.integers(0, 2**63 - 1),
        "optional": st.booleans(),
        "calibration": st.fixed_dictionaries({}, optional={"dataset": names, "samples": st.integers(1, 10**9)}),
    },
)
valid = st.builds(
    lambda model, dataset, path, groups: {
        "model": model,
        "output": {"path": path},
        **{f"{stage}_stage": {"a_modifiers": modifiers} for stage, modifiers in groups.items()},
        "calibration": {"dataset": dataset},
    },
    names,
    names,
    names,
    st.dictionaries(
        names,
        st.dictionaries(st.sampled_from(["ARMORModifier", "ARMORModifier@a", "ARMORModifier@b"]), configs, min_size=1),
        min_size=1,
    ),
)


@SHARED
@given(mapping=valid)
def test_a_valid_recipe_survives_dump_and_load(tmp_path: Path, mapping: dict[str, Any]) -> None:
    recipe = load_recipe_mapping(mapping, registry=REGISTRY)
    again = load(tmp_path, recipe.resolved_yaml())
    assert again.resolved == recipe.resolved
    assert again.hash() == recipe.hash()
    assert [(m.name, m.stage) for m in again.modifiers] == [(m.name, m.stage) for m in recipe.modifiers]
    assert list(again.resolved) == list(recipe.resolved)


@SHARED
@given(value=trees)
def test_what_the_dumper_writes_the_reader_reads(tmp_path: Path, value: object) -> None:
    problems = Problems()
    first = plain(read_mapping({"x": value}, problems))
    assume(not problems.found)
    node = parse(yaml.dump(first, Dumper=Dumper, allow_unicode=True), Mark("t", 1, tmp_path), problems)
    assert node is not None
    assert not problems.found
    assert plain(node) == first


shapes = st.fixed_dictionaries(
    {},
    optional={
        "a": st.integers(0, 3),
        "b": st.lists(st.integers(0, 3), max_size=2),
        "c": st.dictionaries(st.sampled_from("xyz"), st.integers(0, 3)),
    },
)


@SHARED
@given(one=shapes, two=shapes, three=shapes)
def test_merging_is_associative_where_kinds_agree(
    one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]
) -> None:
    a, b, c = (read_mapping(mapping, Problems()) for mapping in (one, two, three))
    left, right = plain(merge(merge(a, b), c)), plain(merge(a, merge(b, c)))
    assert json.dumps(left) == json.dumps(right)
    assert plain(merge(a, a)) == plain(a)


@SHARED
@given(one=shapes, two=shapes)
def test_the_top_wins_in_every_key_it_gives(one: dict[str, Any], two: dict[str, Any]) -> None:
    merged: Any = plain(merge(read_mapping(one, Problems()), read_mapping(two, Problems())))
    assert set(merged) == set(one) | set(two)
    assert all(merged[key] == two[key] for key in two if key != "c")
    assert merged.get("c", {}) == {**one.get("c", {}), **two.get("c", {})}


def test_three_files_may_be_composed_in_two_steps(tmp_path: Path) -> None:
    texts = ["calibration: {samples: 1, seed: 1}", "calibration: {samples: 2}\nmodel: n", "model: {dtype: float16}"]
    base = write(tmp_path, VALID, "base.yaml").name
    for index, text in enumerate(texts):
        write(tmp_path, text, f"{index}.yaml")
    write(tmp_path, "extends: [base.yaml, 0.yaml]", "left.yaml")
    write(tmp_path, "extends: [1.yaml, 2.yaml]", "right.yaml")
    whole = load(tmp_path, f"extends: [{base}, 0.yaml, 1.yaml, 2.yaml]")
    assert load(tmp_path, "extends: [left.yaml, right.yaml]").resolved == whole.resolved
    assert whole.resolved["model"] == {"id": "n", "dtype": "float16"}


@pytest.mark.parametrize("cut", range(0, len(VALID), 7))
def test_every_truncation(tmp_path: Path, cut: int) -> None:
    refused_or_read(lambda: load(tmp_path, VALID[:cut]), str(tmp_path))
