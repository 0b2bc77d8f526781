"""The process that runs llm-compressor on a folder: `dense`, `recipe.json` and `samples.safetensors` become `result`.

It imports nothing of this package, whose pins its Python may not have.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class NoTokenizer:
    """In the place of one, which llm-compressor wants though samples are token ids."""

    def save_pretrained(self, folder: str) -> None:
        """Write nothing."""


def main(folder: Path) -> None:
    """Run `oneshot` without the network's help. Whatever goes wrong ends the process with a traceback."""
    from llmcompressor import oneshot

    options: dict[str, Any] = {}
    if not (folder / "dense" / "tokenizer_config.json").exists():
        options["processor"] = NoTokenizer()
    samples = folder / "samples.safetensors"
    if samples.exists():
        from safetensors.torch import load_file
        from torch.utils.data import DataLoader

        ids = load_file(samples)
        windows: Any = [{"input_ids": ids[str(number)]} for number in range(len(ids))]
        options["dataset"] = DataLoader(windows, batch_size=1)
    oneshot(
        model=str(folder / "dense"), recipe=str(folder / "recipe.json"), output_dir=str(folder / "result"), **options
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
