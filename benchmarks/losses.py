"""What programs that compare recipes share: a recipe in a process of its own, losses of models on held-out text, window by window,
and the bootstrap over windows that they are compared by.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

from armor_recipes.evaluation import evaluation_windows
from armor_recipes.evaluation.perplexity import window_losses
from armor_recipes.recipe.schema import PerplexitySpec

RESAMPLES = 1_000


def apply_apart(
    what: str, recipe: Mapping[str, Any], file: Path, *options: str, env: Mapping[str, str] | None = None
) -> None:
    """Write a recipe to a file and `armor-apply` it in a process of its own. Raises RuntimeError, which names `what` failed."""
    file.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("armor-apply")), str(file), "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{what} failed ({done.returncode}): {done.stderr.strip()}")


def read_texts(named: Sequence[str], tokenizer_folder: str | Path, *, windows: int, length: int) -> dict[str, Tensor]:
    """`NAME=PATH` to windows `(N, L)`, evenly spread over the text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    found = {}
    for text in named:
        name, _, path = text.partition("=")
        ids = evaluation_windows(PerplexitySpec(dataset=path, sequence_length=length), tokenizer).ids
        count = min(windows, len(ids))
        found[name] = ids[[i * len(ids) // count for i in range(count)]]
    return found


def losses_of(model: Any, texts: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Loss in nats a token of each window, by text."""
    return {
        name: [float(x) / (ids.shape[1] - 1) for x in window_losses(model, ids, batch_size=2)]
        for name, ids in texts.items()
    }


def bootstrap(values: Tensor) -> Tensor:
    """Means of 1,000 resamples of the last dimension's entries; `(..., N)` to `(..., 1000)`, resampled together."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(values.shape[-1], (RESAMPLES, values.shape[-1]), generator=generator)
    return values[..., picks].mean(-1)


def interval(resampled: Tensor) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return low, high
