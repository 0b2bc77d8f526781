"""Rows of images, with or without text, as inputs of a model that its processor makes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from armor_recipes.calibration.chat import messages_of
from armor_recipes.calibration.files import Cell, Column, Columns, files_of, shown
from armor_recipes.calibration.inputs import Batch
from armor_recipes.calibration.text import is_empty
from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Kinds of files that a folder of images may hold.
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as it lies in a dataset, bytes or a path, and the text or chat messages that go with it, if any."""

    image: bytes | Path
    text: object
    where: str


def image_columns(image: str, text: str | None, messages: str | None) -> Columns:
    """The columns that are read: the image's, and one of its text or messages if any."""
    columns = [Column(image, "image_column")]
    if messages is not None:
        columns.append(Column(messages, "messages_column"))
    elif text is not None:
        columns.append(Column(text, "text_column"))
    return Columns(tuple(columns))


def is_image_folder(path: Path) -> bool:
    """Whether a path is an image file, or a folder with one in it or in a sub-folder."""
    if path.is_dir():
        return any(file.suffix.lower() in IMAGES for file in path.rglob("*"))
    return path.suffix.lower() in IMAGES


def folder_cells(path: Path) -> Iterable[Cell]:
    """The images of a folder and its sub-folders, sorted by path. Raises InputError where it holds anything else."""
    for file in files_of(path):
        if file.suffix.lower() not in IMAGES:
            raise InputError(
                f"the folder {path} holds images and {file}, which is none ({', '.join(IMAGES)}); remove or convert it"
            )
        yield Cell((str(file),), str(file))


def picture_of(folder: Path, cell: Cell) -> Picture | None:
    """The row's image and text; None where one of them is null or blank. Paths are relative to `folder`.

    Raises InputError for what is no image.
    """
    assert isinstance(cell.value, tuple)
    image, *texts = cell.value
    if image is None or any(text is None or (isinstance(text, str) and is_empty(text)) for text in texts):
        return None
    text: object = texts[0] if texts else None
    match image:
        case {"bytes": bytes(data)} | bytes(data):
            return Picture(data, text, cell.where)
        case {"path": str(path)} | str(path):
            return Picture(folder / path, text, cell.where)
        case _:
            raise InputError(
                f"{cell.where}: the image column holds {shown(image)}, which is no image and no path of one; name another "
                "`image_column`"
            )


def load_images(pictures: Sequence[Picture], processor: Callable[[bool], Any] | None, length: int) -> tuple[Batch, ...]:
    """Named tensors of each image, and of its text padded to `length` tokens, as the model's processor makes them.

    `processor(texts)` gives it, with or without a tokenizer. Raises InputError where it cannot be had, an image cannot be read,
    or samples come out with different tensors; their shapes may differ.
    """
    made = made_processor(processor, with_text=any(picture.text is not None for picture in pictures))
    rows = [processed(made, picture, length) for picture in pictures]
    for row, picture in zip(rows, pictures, strict=True):
        _check_alike(row, rows[0], picture.where)
    return tuple(rows)


def made_processor(processor: Callable[[bool], Any] | None, *, with_text: bool) -> Any:
    """What `processor(texts)` gives. Raises InputError where there is none."""
    if processor is None:
        raise InputError(
            "images need a model with a processor, and here is none; give a .safetensors file of its inputs"
        )
    return processor(with_text)


def processed(processor: Any, picture: Picture, length: int = 0) -> Batch:
    """All tensors of one sample, whose dimension comes first; its text, if any, is filled up to `length` tokens.

    Raises InputError where the image cannot be read, the processor refuses it, or its text is longer.
    """
    options: dict[str, Any] = {"images": [_opened(picture)], "return_tensors": "pt"}
    if picture.text is not None:
        options |= {"text": [_written(processor, picture)], "padding": "max_length", "max_length": length}
    try:
        made = processor(**options)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{picture.where}: the model's processor refuses it ({reason}); correct or remove the row"
        ) from error
    tensors = {str(name): value for name, value in made.items() if isinstance(value, torch.Tensor)}
    _check_length(tensors, picture, length)
    patches = "image_grid_thw" in tensors and tensors["pixel_values"].ndim == 2
    return {**tensors, "pixel_values": tensors["pixel_values"][None]} if patches else tensors


def _written(processor: Any, picture: Picture) -> str:
    """The text that goes with an image: as it is, or by the chat template, with the image before the first text of a user."""
    if isinstance(picture.text, str):
        return picture.text
    messages: list[dict[str, Any]] = []
    for message in messages_of(Cell(picture.text, picture.where)):
        parts: list[dict[str, str]] = [{"type": "text", "text": message["content"]}]
        first = message["role"] == "user" and not any(each["role"] == "user" for each in messages)
        messages.append({**message, "content": [{"type": "image"}, *parts] if first else parts})
    try:
        return str(processor.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program that comes with the model, and raises what it likes
        raise InputError(
            f"{picture.where}: the processor's chat template refuses the messages: {error}; correct the row, or use `text_column`"
        ) from error


def _opened(picture: Picture) -> Image:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture.image) if isinstance(picture.image, bytes) else picture.image) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{picture.where}: cannot be read as an image: {error}; correct or remove it (sounds go into a .safetensors file of "
            "input_features)"
        ) from error


def _check_length(tensors: Batch, picture: Picture, length: int) -> None:
    """A text that is cut would lose the tokens that stand for its image, so none is."""
    ids = tensors.get("input_ids")
    if ids is not None and ids.shape[1] > length:
        raise InputError(
            f"{picture.where}: its text and image make {ids.shape[1]} tokens, more than `sequence_length` {length}; raise it, or "
            "shorten the text"
        )


def _check_alike(row: Batch, first: Batch, where: str) -> None:
    made, expected = ({name: (x.ndim, x.dtype) for name, x in batch.items()} for batch in (row, first))
    if made != expected:
        shapes = [{name: list(x.shape[1:]) for name, x in batch.items()} for batch in (row, first)]
        raise InputError(
            f"{where}: the processor makes {shapes[0]} of it, and {shapes[1]} of the first; give images of one kind"
        )
