"""What keeps a file of the caller's from being written, as an error of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from armor_recipes.errors import RecipeError, ResourceError
from armor_recipes.exhaustion import is_disk_full


@contextmanager
def writing(place: object, then: str = "") -> Iterator[None]:
    """Raise an OSError of what is done inside as ResourceError for a full disk, else as RecipeError.

    Args:
        place: what could not be written, as messages name it.
        then: ends the sentence.
    """
    try:
        yield
    except OSError as error:
        kind = ResourceError if is_disk_full(error) else RecipeError
        raise kind(f"{place} cannot be written ({error.strerror}){then}") from error
