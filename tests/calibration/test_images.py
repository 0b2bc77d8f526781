"""Rows of images, alone and with text."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import CLIPProcessor, PreTrainedTokenizerFast, ViTConfig

from armor_recipes.calibration.inputs import InputSet, ModelInputs
from armor_recipes.calibration.tokens import build_inputs, has_length
from armor_recipes.errors import InputError
from armor_recipes.integrations.models import ModelSource, load_processor
from armor_recipes.recipe.schema import AtMost, CalibrationSpec
from tests.support.images import needs_processors
from tests.support.tokenizers import byte_tokenizer

Image = pytest.importorskip("PIL.Image")

MODEL = ModelInputs("TinyViT", None, ("pixel_values",))
BOTH = ModelInputs("TinyCLIP", 300, ("input_ids", "attention_mask", "pixel_values"))
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}


def png(shade: int) -> bytes:
    """An image of one shade of grey, 6 pixels by 5."""
    file = io.BytesIO()
    Image.new("L", (6, 5), shade).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in two sub-folders."""
    for i, name in enumerate(("a/0.png", "a/1.png", "b/2.png", "b/3.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(60 * i))
    return tmp_path / "images"


@pytest.fixture
def processor(tmp_path: Path) -> Callable[[bool], Any]:
    """What reads the processor of a folder that has one for images alone."""
    home = tmp_path / "model"
    home.mkdir()
    (home / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    ViTConfig().save_pretrained(home)
    source = ModelSource(str(home), None, ViTConfig(), torch.float32, torch.float32)
    return lambda text: load_processor(source, text)


@pytest.fixture
def both() -> Callable[[bool], Any]:
    """A processor of images and text; text is padded by a tokenizer of bytes."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    images = CLIPImageProcessorPil(size={"height": 4, "width": 4}, crop_size={"height": 4, "width": 4})
    made = CLIPProcessor(images, tokenizer)
    text = "{{ '[image]' if p.type == 'image' else p.text }}"
    made.chat_template = f"{{% for m in messages %}}{{% for p in m.content %}}{text}{{% endfor %}}{{% endfor %}}"
    return lambda text: made if text else images


def build(dataset: Path, inputs: ModelInputs, processor: Callable[[bool], Any] | None, **keys: Any) -> InputSet:
    spec = CalibrationSpec(dataset=str(dataset), **{"image_column": "image", **keys})
    return build_inputs(spec, inputs, processor=processor)


def shades(found: InputSet) -> list[int]:
    """The shade of grey of each sample, as it was before the processor."""
    return [round(255 * (float(each.mean()) * 0.5 + 0.5)) for each in found.tensors["pixel_values"]]


@needs_processors
def test_a_folder_of_images_is_drawn_from_by_the_seed(folder: Path, processor: Callable[[bool], Any]) -> None:
    found = build(folder, MODEL, processor, samples=3, seed=5)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(5))[:3]
    assert shades(found) == [60 * i for i in order.tolist()]
    assert found.tensors["pixel_values"].shape == (3, 3, 4, 4)
    (source,) = found.sources
    assert (source.documents, source.available, source.taken, source.tokens) == (4, 4, 3, 0)
    assert build(folder, MODEL, processor, samples=3, seed=5).sha256 == found.sha256


@needs_processors
def test_tables_hold_bytes_or_paths(folder: Path, processor: Callable[[bool], Any], tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(60 * i), "path": None}} for i in range(4)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    listed = [f"images/{name}" for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png")]
    lines = [json.dumps({"image": path}) for path in listed] + ['{"image": null}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    expected = build(folder, MODEL, processor, samples=4)
    assert build(tmp_path / "rows.parquet", MODEL, processor, samples=4).sha256 == expected.sha256
    found = build(tmp_path / "rows.jsonl", MODEL, processor, samples=4)
    assert found.sha256 == expected.sha256
    assert found.sources[0].empty == 1
    streamed = build(tmp_path / "rows.jsonl", MODEL, processor, samples=2, stream=True)
    assert set(shades(streamed)) < set(shades(expected))


class AsItIs:
    """A processor that leaves sizes as they are."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        (image,) = images
        return {"pixel_values": torch.full((1, 3, image.height, image.width), float(image.getpixel((0, 0))[0]))}


def test_images_of_several_sizes_are_batched_by_shape(tmp_path: Path) -> None:
    sizes = [(2, 2), (4, 2), (2, 2), (2, 6), (4, 2)]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.new("L", size, i).save(tmp_path / f"{i % 2}" / f"{i}.png")
    found = build(tmp_path, MODEL, lambda _: AsItIs(), samples=5, seed=3)
    drawn = torch.tensor([0, 2, 4, 1, 3])[torch.randperm(5, generator=torch.Generator().manual_seed(3))].tolist()
    shapes = list(dict.fromkeys(sizes[i] for i in drawn))
    expected = [[i for i in drawn if sizes[i] == shape] for shape in shapes]
    assert [group["pixel_values"][:, 0, 0, 0].tolist() for group in found.groups] == expected
    assert [found.sample(place)["pixel_values"][0, 0, 0, 0] for place in range(5)] == [*chain(*expected)]
    assert [len(batch["pixel_values"]) for batch in found.batches(1)] == [1] * 5
    assert (len(found), len(found.batches(2)), found.sources[0].taken) == (5, 3, 5)
    assert found.sha256 == build(tmp_path, MODEL, lambda _: AsItIs(), samples=5, seed=3).sha256
    assert found.sha256 != build(tmp_path, MODEL, lambda _: AsItIs(), samples=5, seed=4).sha256
    mix = [{"dataset": str(tmp_path / name), "weight": weight} for name, weight in (("0", 3), ("1", 2))]
    spec = CalibrationSpec(dataset=mix, image_column="image", samples=5)
    mixed = build_inputs(spec, MODEL, processor=lambda _: AsItIs())
    numbers = [int(mixed.sample(place)["pixel_values"][0, 0, 0, 0]) for place in range(5)]
    assert [number % 2 for number in numbers] == list(mixed.origins)
    assert sorted(numbers) == [0, 1, 2, 3, 4]


def test_text_goes_with_images(folder: Path, both: Callable[[bool], Any], tmp_path: Path) -> None:
    rows = [
        {"image": f"images/a/{i}.png", "text": "ab"[: i + 1], "chat": [{"role": "user", "content": "hi"}]}
        for i in (0, 1)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = build(tmp_path / "rows.jsonl", BOTH, both, samples=2, text_column="text", sequence_length=4)
    assert set(found.tensors) == {"input_ids", "attention_mask", "pixel_values"}
    assert found.tensors["attention_mask"].sum(dim=1).sort().values.tolist() == [1, 2]
    assert found.sources[0].tokens == 3
    chat = build(tmp_path / "rows.jsonl", BOTH, both, samples=1, messages_column="chat", sequence_length=12)
    assert both(True).tokenizer.decode(chat.ids[0]) == "[image]hi<pad><pad><pad>"
    with pytest.raises(InputError, match=r"its text and image make 9 tokens, more than `sequence_length` 8"):
        build(tmp_path / "rows.jsonl", BOTH, both, samples=1, messages_column="chat", sequence_length=8)


def test_a_length_counts_only_where_there_is_text(folder: Path) -> None:
    assert not has_length(CalibrationSpec(dataset=str(folder), image_column="image"))
    assert has_length(CalibrationSpec(dataset=str(folder), image_column="image", text_column="text"))


@needs_processors
def test_what_is_no_image_is_told(folder: Path, processor: Callable[[bool], Any], tmp_path: Path) -> None:
    sound = {"bytes": base64.b64encode(b"RIFF"), "path": "a.wav"}
    parquet.write_table(pa.Table.from_pylist([{"image": sound}]), tmp_path / "sound.parquet")
    with pytest.raises(InputError, match=r"sound.parquet, row 1: cannot be read as an image: .*input_features"):
        build(tmp_path / "sound.parquet", MODEL, processor, samples=1)
    (tmp_path / "rows.jsonl").write_text('{"image": 3}\n')
    with pytest.raises(
        InputError, match=r"rows.jsonl:1: the image column holds 3, which is no image and no path of one"
    ):
        build(tmp_path / "rows.jsonl", MODEL, processor, samples=1)
    (tmp_path / "rows.jsonl").write_text('{"image": "missing.png"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: cannot be read as an image: .*No such file"):
        build(tmp_path / "rows.jsonl", MODEL, processor, samples=1)
    with pytest.raises(InputError, match="is a folder of images, without text"):
        build(folder, BOTH, processor, samples=1, text_column="text")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds images and .*notes\.txt"):
        build(folder, MODEL, processor, samples=1)


class Gated:
    """What transformers gives out where a library is missing."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> None:
        raise ImportError("AutoImageProcessor requires the Torchvision library\n")


@needs_processors
def test_processors_that_cannot_be_used_are_told(
    folder: Path, processor: Callable[[bool], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="images need a model with a processor"):
        build(folder, MODEL, None, samples=AtMost(at_most=1))
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"the processor of .* cannot be read .*preprocessor_config\.json"):
        build(folder, MODEL, processor, samples=1)
    monkeypatch.setattr("armor_recipes.integrations.models.AutoImageProcessor", Gated)
    with pytest.raises(InputError, match=r"transformers 5\.18 or later, or torchvision"):
        build(folder, MODEL, processor, samples=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'armor-recipes\[vision\]'"):
        load_processor(SimpleNamespace(location="x"), False)
