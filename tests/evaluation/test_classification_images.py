"""Accuracy on labelled images: folders, tables, and images of several sizes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from armor_recipes.calibration.inputs import InputSet, ModelInputs
from armor_recipes.calibration.tokens import has_length
from armor_recipes.errors import InputError
from armor_recipes.evaluation import Reading, Room
from armor_recipes.evaluation.classification import Classification
from armor_recipes.evaluation.images import Pictures
from armor_recipes.integrations.models import load_processor, open_model
from armor_recipes.recipe.schema import ClassificationSpec, InputsSpec, ModelSpec
from armor_recipes.run import apply
from armor_recipes.run.measure import evaluate_model
from tests.support.images import needs_processors

Image = pytest.importorskip("PIL.Image")

MODEL = ModelInputs("TinyViT", None, ("pixel_values",))
LABELS = {"cat": 0, "dog": 1, "7": 2}


def png(shade: int, size: tuple[int, int] = (6, 5)) -> bytes:
    """An image of one shade of grey."""
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier and its processor."""
    home = tmp_path_factory.mktemp("vit")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=4, patch_size=2)
    config.id2label = {number: name for name, number in LABELS.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ViTForImageClassification(config)
        torch.nn.init.normal_(made.get_parameter("classifier.weight"))
    made.save_pretrained(home)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}
    (home / "preprocessor_config.json").write_text(json.dumps(processor))
    return home


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images in sub-folders that are called as classes are, or numbered."""
    for i, name in enumerate(("0/a.png", "7/b.png", "cat/c.png", "cat/d.png", "dog/e.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(50 * i))
    return tmp_path / "images"


def no_inputs(spec: InputsSpec) -> InputSet:
    raise AssertionError(spec)


def reading(model: Path) -> Reading:
    source = open_model(ModelSpec(id=str(model)), device=torch.device("cpu"))
    return Reading(None, MODEL, no_inputs, LABELS, lambda text: load_processor(source, text))


def read(dataset: Path, read_with: Reading, **keys: Any) -> Classification:
    spec = ClassificationSpec(dataset=str(dataset), **{"image_column": "image", **keys})
    return Classification.read(spec, read_with)


@needs_processors
def test_a_folder_has_a_sub_folder_for_each_class(model: Path, images: Path, tmp_path: Path) -> None:
    measure = read(images, reading(model), batch_size=2)
    assert measure.labels.tolist() == [0, 2, 0, 0, 1]
    classifier = ViTForImageClassification.from_pretrained(model)
    processor = reading(model).processor
    assert processor is not None
    found = measure.after(classifier, Room(tmp_path))
    opened = [Image.open(path).convert("RGB") for path in sorted(images.rglob("*.png"))]
    with torch.no_grad():
        logits = classifier(**processor(False)(opened, return_tensors="pt")).logits
    hits = (logits.argmax(-1) == measure.labels).double().mean()
    assert (found["top1_accuracy"].value, found.samples) == (float(hits), 5)
    assert len(read(images, reading(model), samples=2).samples) == 2


@needs_processors
def test_tables_hold_images_and_labels(model: Path, images: Path, tmp_path: Path) -> None:
    names = ["0/a.png", "7/b.png", "cat/c.png", "cat/d.png", "dog/e.png"]
    kinds = ["cat", "7", "cat", "cat", "dog"]
    lines = [{"file": f"images/{name}", "kind": kind} for name, kind in zip(names, kinds, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [
        {"image": {"bytes": (images / n).read_bytes(), "path": None}, "label": LABELS[k]}
        for n, k in zip(names, kinds, strict=True)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = read(images, reading(model))
    for found in (
        read(tmp_path / "rows.jsonl", reading(model), image_column="file", label_column="kind"),
        read(tmp_path / "rows.parquet", reading(model)),
    ):
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.samples.hash() == expected.samples.hash()


def test_images_of_one_shape_are_batched(tmp_path: Path) -> None:
    def processor(images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        (image,) = images
        return {"pixel_values": torch.full((1, 3, image.height, image.width), float(image.getpixel((0, 0))[0]))}

    rows = []
    for i, size in enumerate([(2, 2), (4, 2), (2, 2), (2, 2), (4, 2)]):
        (tmp_path / f"{i}.png").write_bytes(png(i, size))
        rows.append({"image": f"{i}.png", "label": 0})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = read(tmp_path / "rows.jsonl", Reading(None, MODEL, no_inputs, LABELS, lambda _: processor)).samples
    assert isinstance(samples, Pictures)
    batches = list(samples.batches(2))
    assert [places for places, _ in batches] == [[0, 2], [3], [1, 4]]
    assert [batch["pixel_values"][:, 0, 0, 0].tolist() for _, batch in batches] == [[0, 2], [3], [1, 4]]


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"image": None, "label": 0}, {}, "rows.jsonl:1: `image_column` holds no image"),
        ({"image": "a.png", "label": None}, {}, "`label_column` holds None, neither"),
        ({"image": "a.png", "label": "cow"}, {}, "`label_column` holds 'cow', no class of the model"),
        pytest.param(
            {"image": "missing.png", "label": 0}, {}, "cannot be read as an image", marks=needs_processors, id="row3"
        ),
        ({"picture": "a.png", "label": 0}, {}, "no column 'image'; set `image_column`"),
        ({"image": "a.png"}, {}, "no column 'label'; set `label_column`"),
        (
            {"image": "a.png", "label": 0},
            {"text_column": "text"},
            "`image_column` and `text_column` do not go together",
        ),
        ({"image": "a.png", "label": 0}, {"samples": 2}, "has 1 rows, but 2 are asked for"),
    ],
)
def test_rows_that_will_not_do(model: Path, tmp_path: Path, row: Any, keys: dict[str, Any], said: str) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=said):
        read(tmp_path / "rows.jsonl", reading(model), **keys)


def spare(folder: Path) -> None:
    (folder / "x.png").write_bytes(png(0))


def unknown(folder: Path) -> None:
    (folder / "dog").rename(folder / "doge")


@pytest.mark.parametrize(
    ("change", "keys", "said"),
    [
        (spare, {}, r"x\.png has no label: of a folder of images the name of a sub-folder"),
        (unknown, {}, r"e\.png: its folder is called 'doge', no class of the model; nearest.*dog"),
        (lambda _: None, {"label_column": "kind"}, "is a folder of images, without columns.*take out `label_column`"),
    ],
)
def test_folders_that_will_not_do(
    model: Path, images: Path, change: Callable[[Path], None], keys: dict[str, Any], said: str
) -> None:
    change(images)
    with pytest.raises(InputError, match=said):
        read(images, reading(model), **keys)


def test_tensors_have_no_images_and_some_models_no_processor(model: Path, images: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds tensors, which have no columns"):
        read(tmp_path / "a.safetensors", reading(model))
    with pytest.raises(InputError, match="images need a model with a processor"):
        read(images, Reading(None, MODEL, no_inputs, LABELS))


def test_images_have_no_length() -> None:
    assert not has_length(ClassificationSpec(dataset="./photos", image_column="image"))


@needs_processors
def test_of_a_recipe_and_of_a_folder(model: Path, images: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(model),
        "calibration": {"dataset": str(images), "image_column": "image", "samples": 4},
        "evaluation": {"classification": {"dataset": str(images), "image_column": "image"}},
        "prune_stage": {
            "armor_modifiers": {
                "ARMORModifier": {"targets": [r"re:.*(query|q_proj|fc1)$"], "block_size": 8, "iterations": 1}
            }
        },
        "output": {"path": str(tmp_path / "out")},
    }
    result = apply(recipe)
    (found,) = result.evaluations
    assert found.before is not None
    keys = {"dataset": str(images)}
    again = evaluate_model(
        str(result.output), "classification", keys, overrides=["image_column=image"], against=str(model)
    )
    assert again.before is not None
    assert [v.value for v in again.before.values] == [v.value for v in found.before.values]
    assert [v.value for v in again.after.values] == [v.value for v in found.after.values]
    assert math.isfinite(again.after.values[0].value)
