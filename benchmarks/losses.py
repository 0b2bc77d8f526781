"""What programs that compare recipes share: a recipe in a process of its own, losses of models on held-out text, window by window,
and the bootstrap over windows that they are compared by; tables of results, printed as Markdown and kept as JSON.
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
from turns import keep

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


Row = dict[str, Any]
"""Of a table: cells by the columns' names. A figure is `{"value": x, "interval": [low, high]}`; null is a dash."""


def compared(own: Sequence[float], base: Sequence[float]) -> tuple[float, Row, Row]:
    """Perplexity of windows' losses, and what it is above the base's, window by window: in nats a token, and in per cent."""
    losses = torch.tensor(own, dtype=torch.float64)
    gap = losses - torch.tensor(base, dtype=torch.float64)
    resampled = bootstrap(gap)
    percent = {
        "value": float(100 * torch.expm1(gap.mean())),
        "interval": list(interval(100 * torch.expm1(resampled))),
    }
    return float(losses.mean().exp()), {"value": float(gap.mean()), "interval": list(interval(resampled))}, percent


def markdown(rows: Sequence[Row], digits: Mapping[str, str]) -> str:
    """A table; how a number is written is said by the last word of its column's name. Without rows it says that there is none."""
    if not rows:
        return "no table yet: a row that the others are compared with is missing"
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += [
        "| " + " | ".join(cell(own, digits.get(name.split()[-1], "")) for name, own in row.items()) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def cell(value: Any, digits: str) -> str:
    """A number, a figure with its interval, or a name, as a table shows it."""
    if isinstance(value, Mapping):
        ends = value["interval"] or (value["value"], value["value"])
        return f"{value['value']:{digits}} [{ends[0]:{digits}}, {ends[1]:{digits}}]"
    return "–" if value is None else value if isinstance(value, str) else f"{value:{digits}}"


def show(rows: Sequence[Row], digits: Mapping[str, str], file: Path | None) -> None:
    """Print a table, and write its rows as JSON where `tools/tables.py` reads them, if a file is given."""
    print(markdown(rows, digits))
    if file is not None:
        keep(file, {"rows": list(rows)})
