"""Questions made of a text: which of four pieces follows a passage. Three of them stand elsewhere in the text.

All pieces of a question have the same number of words and of bytes, so that neither says which one is right.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

from armor_recipes.errors import InputError

#: `context`, `choices` and `answer`, the place of the right one among these.
Question: TypeAlias = dict[str, str | list[str] | int]

#: Words of a passage, of what follows it, and from one passage's start to that of the next.
_CONTEXT, _CHOICE, _STEP = 24, 8, 12
_CHOICES = 4


def questions(documents: Sequence[str], count: int, *, seed: int = 0) -> list[Question]:
    """So many questions, in the order of the text; equal texts, counts and seeds give equal ones.

    False pieces are of other documents. Passages of which there are no three of the right length are passed over. Raises
    InputError where the text has too few.
    """
    generator = random.Random(seed)
    words = [re.findall(r"\s*\S+", text) for text in documents]
    pieces: dict[int, dict[str, int]] = defaultdict(dict)  # by bytes, with the document in which each stands first
    for document, row in enumerate(words):
        for start in range(1, len(row) - _CHOICE + 1):
            piece = "".join(row[start : start + _CHOICE])
            pieces[len(piece.encode())].setdefault(piece, document)
    found = []
    for document, row in enumerate(words):
        for start in range(_CONTEXT, len(row) - _CHOICE + 1, _STEP):
            right = "".join(row[start : start + _CHOICE])
            others = [
                piece for piece, place in pieces[len(right.encode())].items() if place != document and piece != right
            ]
            if len(others) >= _CHOICES - 1:
                found.append(("".join(row[start - _CONTEXT : start]), right, others))
    if len(found) < count:
        raise InputError(f"the text has passages for {len(found)} questions, and {count} are asked for; give more text")
    return [_question(*found[place], generator) for place in sorted(generator.sample(range(len(found)), count))]


def _question(context: str, right: str, others: Sequence[str], generator: random.Random) -> Question:
    choices = generator.sample(others, _CHOICES - 1)
    answer = generator.randrange(_CHOICES)
    return {"context": context, "choices": [*choices[:answer], right, *choices[answer:]], "answer": answer}
