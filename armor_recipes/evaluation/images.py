"""Labelled images, as the model's processor makes them: batch by batch, so that not all of them are in memory at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.calibration.files import Cell
from armor_recipes.calibration.images import (
    Picture,
    folder_cells,
    is_image_folder,
    made_processor,
    picture_of,
    processed,
)
from armor_recipes.calibration.inputs import Batch, form_of, hash_inputs, places_by_form, stacked
from armor_recipes.calibration.pools import tensors_path
from armor_recipes.calibration.tensors import check_arguments, check_values
from armor_recipes.calibration.text import local_path
from armor_recipes.errors import InputError
from armor_recipes.evaluation.contract import Reading
from armor_recipes.evaluation.samples import first_rows, label_of, table
from armor_recipes.recipe.schema import ClassificationSpec


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """N images; `groups` are the places of those that the processor makes equal in shape, in the order in which shapes are met."""

    pictures: tuple[Picture, ...]
    processor: Any
    groups: tuple[tuple[int, ...], ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Images of one shape in order, at most `size` at a time."""
        for group in self.groups:
            for start in range(0, len(group), size):
                some = list(group[start : start + size])
                yield some, stacked([processed(self.processor, self.pictures[place]) for place in some])

    def hash(self) -> str:
        """Of the number of images as a little-endian 64-bit integer, and of the hash of what the processor makes of each."""
        return self.sha256


def read_pictures(pictures: Sequence[Picture], reading: Reading, dataset: str) -> Pictures:
    """Put each image through the model's processor once, and keep its shapes. Raises InputError for what cannot be used."""
    processor = made_processor(reading.processor, with_text=False)
    digest = hashlib.sha256(len(pictures).to_bytes(8, "little"))
    forms = []
    for picture in pictures:
        made = processed(processor, picture)
        check_arguments(list(made), reading.model, f"what the processor makes of {dataset}")
        check_values(made, reading.model, picture.where)
        digest.update(bytes.fromhex(hash_inputs(made)))
        forms.append(form_of(made))
    return Pictures(tuple(pictures), processor, tuple(map(tuple, places_by_form(forms))), digest.hexdigest())


def labelled(spec: ClassificationSpec, image_column: str, reading: Reading) -> list[tuple[Picture, int]]:
    """The first images of a dataset, each with its class: of the row's label, or of the folder that an image file lies in.

    Raises InputError where a row has no image or no label, or the section's keys do not go with images.
    """
    if tensors_path(spec.dataset) is not None:
        raise InputError(f"{spec.dataset} holds tensors, which have no columns; take out `image_column`")
    if "text_column" in spec.model_fields_set:
        raise InputError(f"{spec.dataset}: `image_column` and `text_column` do not go together; take one out")
    path = local_path(spec.dataset)
    if path is not None and is_image_folder(path):
        files = first_rows(spec.dataset, folder_cells(path), spec.samples)
        return [(_picture(Path(), cell), _class_of_folder(path, spec, cell, reading)) for cell in files]
    columns = ((image_column, "image_column"), (spec.label_column or "label", "label_column"))
    folder = Path() if path is None else path if path.is_dir() else path.parent
    return [
        (_picture(folder, Cell((image.value,), image.where)), label_of(label, reading))
        for image, label in table(spec.dataset, spec.split, columns, spec.samples)
    ]


def _picture(folder: Path, cell: Cell) -> Picture:
    picture = picture_of(folder, cell)
    if picture is None:
        raise InputError(f"{cell.where}: `image_column` holds no image; correct or remove the row")
    return picture


def _class_of_folder(path: Path, spec: ClassificationSpec, cell: Cell, reading: Reading) -> int:
    """The class that is named, or else numbered, as the sub-folder is that an image lies in. Raises InputError."""
    if spec.label_column is not None:
        raise InputError(
            f"{spec.dataset} is a folder of images, without columns: the name of a sub-folder is the label of the images in it; "
            "take out `label_column`, or list the images in a .jsonl file"
        )
    folder = Path(cell.where).parent
    if not path.is_dir() or folder == path:
        raise InputError(
            f"{cell.where} has no label: of a folder of images the name of a sub-folder is the label of the images in it; put it "
            "into one, or list the images and labels in a .jsonl file"
        )
    name = folder.name
    number = name.isdecimal() and name.isascii() and name not in reading.labels
    return label_of(Cell(int(name) if number else name, cell.where), reading, "its folder is called")
