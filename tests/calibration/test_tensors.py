"""Samples of safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from armor_recipes.calibration.inputs import InputSet, ModelInputs, hash_inputs, hash_tokens
from armor_recipes.calibration.tensors import load_tensors
from armor_recipes.calibration.tokens import build_inputs
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import AtMost, CalibrationSpec, WeightedDataset

MODEL = ModelInputs("TinyModel", 50, ("input_ids", "attention_mask", "pixel_values"))


def build(dataset: Any, inputs: ModelInputs = MODEL, **keys: Any) -> InputSet:
    return build_inputs(CalibrationSpec(dataset=str(dataset) if isinstance(dataset, Path) else dataset, **keys), inputs)


def numbered(first: int, count: int) -> dict[str, torch.Tensor]:
    """Samples whose values tell which they are."""
    numbers = torch.arange(first, first + count)
    return {"input_ids": numbers[:, None].repeat(1, 3), "pixel_values": numbers.half()[:, None, None].repeat(1, 2, 2)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, first, count in (("a", 0, 4), ("b", 4, 1), ("c", 5, 5)):
        save_file(numbered(first, count), folder / f"{name}.safetensors")
    return folder


def test_samples_are_drawn_by_the_seed_with_all_their_tensors(shards: Path) -> None:
    found = build(shards, samples=6, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))[:6]
    assert found.ids[:, 0].tolist() == order.tolist()
    assert found.tensors["pixel_values"][:, 1, 1].tolist() == order.tolist()
    assert found.tensors["pixel_values"].dtype == torch.float16
    (source,) = found.sources
    assert (source.documents, source.available, source.taken, source.tokens) == (10, 10, 6, 18)
    assert found.sha256 == hash_inputs(found.tensors)
    assert not found.is_windows
    assert (found.prefix, found.end_of_text) == ((), None)


def test_a_pattern_takes_the_files_that_match(shards: Path) -> None:
    assert sorted(build(shards / "[ab].safetensors", samples=5).ids[:, 0].tolist()) == [0, 1, 2, 3, 4]


def test_at_most_takes_what_there_is(shards: Path) -> None:
    found = build(shards, samples=AtMost(at_most=64))
    assert (len(found), found.asked) == (10, 64)
    with pytest.raises(InputError, match=r"has 10 samples, but 11 are asked for; name more or fewer `samples`"):
        build(shards, samples=11)


def test_a_mix_of_files_is_shared_out_and_shuffled(shards: Path) -> None:
    mix = (
        WeightedDataset(dataset=str(shards / "a.safetensors"), weight=3),
        WeightedDataset(dataset=str(shards / "c.safetensors"), weight=1),
    )
    found = build(mix, samples=4, seed=1)
    assert [source.taken for source in found.sources] == [3, 1]
    assert [int(number) >= 5 for number in found.ids[:, 0]] == [bool(origin) for origin in found.origins]
    assert found.sha256 != build(mix, samples=4, seed=2).sha256


def test_a_mix_of_other_forms_is_an_error(shards: Path) -> None:
    mix = (WeightedDataset(dataset=str(shards), weight=1), WeightedDataset(dataset="builtin:random-tokens", weight=1))
    with pytest.raises(
        InputError, match=r"random-tokens \(input_ids \[8\] int64\) are not of the same form as those of"
    ):
        build(mix, samples=4, sequence_length=8)


def test_token_ids_alone_have_the_hash_of_windows(tmp_path: Path) -> None:
    save_file({"input_ids": torch.arange(12).view(4, 3)}, tmp_path / "ids.safetensors")
    found = build(tmp_path / "ids.safetensors", samples=4)
    assert found.is_windows
    assert found.sha256 == hash_tokens(found.ids)


def test_the_hash_is_of_names_dtypes_shapes_and_values() -> None:
    one = {"a": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.int64)}
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].view(2, 3, 1), "b": one["b"]},
        {"a": one["a"].double(), "b": one["b"]},
        {"a": one["a"], "b": one["b"] + 1},
    ]
    assert hash_inputs(one) == hash_inputs(dict(reversed(one.items())))
    assert len({hash_inputs(each) for each in (one, *others)}) == 5


def test_labels_are_not_for_the_model(tmp_path: Path) -> None:
    save_file({**numbered(0, 2), "labels": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert set(build(tmp_path / "x.safetensors", samples=2).tensors) == {"input_ids", "pixel_values"}
    assert load_tensors("x", tmp_path / "x.safetensors").names == ("input_ids", "labels", "pixel_values")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"pixel_value": torch.ones(2, 3)},
            r"'pixel_value', which the forward pass of TinyModel does not take.*'pixel_values'",
        ),
        ({"input_ids": torch.tensor([[3, 50]])}, "input_ids holds the id 50, but the model embeds 50 tokens"),
        ({"input_ids": torch.tensor([[3, -1]])}, "input_ids holds the id -1"),
        ({"pixel_values": torch.tensor([[1.0], [float("nan")]])}, "not finite in 1 of 2 samples"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(3, 3)}, r"\(attention_mask 3, input_ids 2\)"),
        ({"input_ids": torch.tensor(3)}, r"input_ids is I64 of shape \[\]; the first dimension"),
        ({"input_ids": torch.ones(0, 3)}, "holds no samples"),
        ({"labels": torch.ones(2)}, "holds labels alone"),
        ({}, "holds no tensor"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        build(tmp_path / "x.safetensors", samples=AtMost(at_most=2))


def test_files_that_do_not_fit_each_other_are_told(shards: Path) -> None:
    save_file({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, shards / "d.safetensors")
    with pytest.raises(
        InputError, match=r"d.safetensors holds input_ids I64 \[4\], and .*a.safetensors holds input_ids I64 \[3\]"
    ):
        build(shards, samples=1)
    (shards / "d.safetensors").unlink()
    (shards / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt, which is none"):
        build(shards, samples=1)


def test_damaged_missing_and_streamed_files_are_told(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"as safetensors: .*write the file again"):
        build(tmp_path / "x.safetensors", samples=1)
    with pytest.raises(InputError, match="no such file or folder"):
        build("missing.safetensors", samples=1)
    with pytest.raises(InputError, match=r"no file is called .*x-\*"):
        build(tmp_path / "x-*.safetensors", samples=1)
    with pytest.raises(InputError, match="needs no `stream: true`"):
        build(shards, samples=1, stream=True)


def test_a_model_without_tokens_takes_no_text() -> None:
    with pytest.raises(InputError, match=r"TinyViT embeds no tokens .*`image_column`, a .safetensors file"):
        build("builtin:pydoc", ModelInputs("TinyViT"))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12, unique=True))
@settings(max_examples=20)
def test_rows_come_in_the_order_asked(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp() / "ordered"
    if not folder.exists():
        folder.mkdir()
        save_file(numbered(0, 3), folder / "a.safetensors")
        save_file(numbered(3, 7), folder / "b.safetensors")
    assert load_tensors("x", folder).rows(numbers)["input_ids"][:, 0].tolist() == numbers
