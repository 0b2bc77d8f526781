"""What ships inside the package: a small language model and five texts. `NOTICE.md` names their source and licence.

In recipes they are written `builtin:stdlib-llama`, `builtin:pydoc` and so on; here without the prefix. `pydoc` and
`pydoc-heldout` are of the model's kind and kept as its token ids; the others are English prose of other kinds.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from armor_recipes.builtin.continuations import Question, questions
from armor_recipes.errors import InputError

_HERE = Path(__file__).parent
_MODEL = "stdlib-llama"
_TOKENS = ("pydoc", "pydoc-heldout")
_PROSE = ("jargon", "speeches", "rustbook")
_SEPARATOR = "\f"
_END_OF_TEXT = "<|endoftext|>"


def model_folder(name: str) -> Path:
    """Folder of an embedded model, for `AutoModelForCausalLM.from_pretrained`. Unknown names raise `InputError`."""
    _check(name, known=(_MODEL,), kind="model")
    return _HERE / name


def texts() -> tuple[str, ...]:
    """Names of the embedded texts."""
    return _TOKENS + _PROSE


def token_ids(name: str) -> NDArray[np.uint16]:
    """uint16 (T,): a text that is kept as ids of stdlib-llama's tokenizer, each document followed by the end-of-text id.

    Other names raise `InputError`.
    """
    _check(name, known=_TOKENS, kind="text of token ids")
    return np.fromfile(_HERE / f"{name}.bin", dtype="<u2").astype(np.uint16)


def documents(name: str) -> list[str]:
    """Decode the documents of an embedded text, in order, without special tokens. Unknown names raise `InputError`."""
    check_text(name)
    if name in _PROSE:
        return lzma.decompress((_HERE / f"{name}.txt.xz").read_bytes()).decode().split(_SEPARATOR)
    tokenizer = _tokenizer()
    ids = token_ids(name)
    ends = np.flatnonzero(ids == tokenizer.token_to_id(_END_OF_TEXT))
    pieces = [piece.tolist() for piece in np.split(ids, ends + 1)]
    return [text for text in tokenizer.decode_batch(pieces, skip_special_tokens=True) if text]


def continuations() -> list[Question]:
    """A thousand passages of `pydoc-heldout`, each with what follows it and three pieces of other documents: always the same."""
    return questions(documents("pydoc-heldout"), 1000)


def check_text(name: str) -> None:
    """Raise InputError where there is no embedded text of that name."""
    _check(name, known=texts(), kind="text")


def text(name: str) -> str:
    """Join the documents of an embedded text by blank lines. Unknown names raise `InputError`."""
    return "\n\n".join(documents(name))


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(_HERE / _MODEL / "tokenizer.json"))


def _check(name: str, *, known: tuple[str, ...], kind: str) -> None:
    if name not in known:
        listed = ", ".join(f"builtin:{each}" for each in known)
        raise InputError(f"there is no embedded {kind} {name!r}; known: {listed}")
