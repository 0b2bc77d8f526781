"""Block sizes by a budget against sizes by hand of as many bytes: what both leave of a model, and what choosing takes.

    python benchmarks/budget.py smollm2 --text handbook=handbook.txt --text essays=essays.txt --work FOLDER

Both recipes are equal but for `block_size`, and have no distillation. By hand are, on

- `smollm2` (models/smollm2-135m-instruct), sizes for a kind of module, layers 0 and 1 to 5 apart, found from the tables of
  `benchmarks/blocks.py`;
- `embedded` (builtin:stdlib-llama) block 32 throughout, as in recipes/quickstart.yaml;
- `gqa` and `qwen3`, small models of other shapes that are trained for some minutes first, the largest block that divides all.

The budget is the share of bytes that those take, rounded down. `gap` is the loss in nats a token above the dense model, with a 95 %
interval from 1,000 bootstrap resamples of the windows; `less` is what the budget's gap is less than that by hand, resampled
together. What exists in FOLDER is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from losses import Row, apply_apart, compared, losses_of, read_texts, show
from quality import TEXTS, dense_model, model_folder
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import armor_recipes
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.recipe.schema import CalibrationSpec

Sizes = Mapping[str, int | list[int]]
#: Block sizes by target.
BY_HAND: Sizes = {
    r"re:.*layers\.0\.mlp\.(gate|up|down)_proj$": 192,
    r"re:.*self_attn\.q_proj$": 16,
    r"re:.*self_attn\.(k|v)_proj$": 48,
    r"re:.*self_attn\.o_proj$": 64,
    r"re:.*layers\.[1-5]\.mlp\.gate_proj$": [96, 144],
    r"re:.*layers\.[1-5]\.mlp\.up_proj$": 96,
    r"re:.*layers\.[1-5]\.mlp\.down_proj$": [144, 96],
    r"re:.*layers\.([6-9]|\d\d)\.mlp\.gate_proj$": [48, 64],
    r"re:.*layers\.([6-9]|\d\d)\.mlp\.up_proj$": [64, 96],
    r"re:.*layers\.([6-9]|\d\d)\.mlp\.down_proj$": [96, 64],
}
COMMON: Mapping[str, Any] = {"gradient_power": 0.5, "propagate": "dense"}
SMALL: Mapping[str, Any] = {
    "vocab_size": 2048,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its sizes by hand, the length of calibration windows, and how to make it where it is not there."""

    model: str
    sizes: Sizes
    length: int
    make: Callable[[], PreTrainedModel] | None = None


def gqa() -> PreTrainedModel:
    """A Llama with one key-value head for five, and an MLP 2.7 times as wide as the stream."""
    heads: dict[str, Any] = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **heads, hidden_size=160, intermediate_size=432))


def qwen3() -> PreTrainedModel:
    """A Qwen3 whose heads are together wider than the stream, and whose MLP is 8 times a prime wide."""
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24}
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, **heads, hidden_size=120, intermediate_size=328))


CASES = {
    "smollm2": Case("models/smollm2-135m-instruct", BY_HAND, 512),
    "embedded": Case("builtin:stdlib-llama", {"preset:all-linear": 32}, 256),
    "gqa": Case("", {"preset:all-linear": 16}, 256, gqa),
    "qwen3": Case("", {"preset:all-linear": 8}, 256, qwen3),
}


def train(make: Callable[[], PreTrainedModel], folder: Path, steps: int) -> None:
    """Make the model, train it on the embedded texts with the embedded tokenizer, and save it in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("builtin:stdlib-llama"))
    torch.manual_seed(0)
    model: Any = make()
    mix = [{"dataset": text, "weight": 1} for text in TEXTS]
    spec = CalibrationSpec.model_validate({"dataset": mix, "samples": 8 * steps, "sequence_length": 128})
    batches = build_tokens(spec, tokenizer=tokenizer, vocab_size=2048).ids.split(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50, 0.02 + 1.5 * (1 - step / len(batches)))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(model: str, entries: Mapping[str, Any], length: int, windows: int, output: Path) -> dict[str, Any]:
    """A recipe of these ARMOR modifiers, as a mapping."""
    return {
        "model": model,
        "calibration": {
            "dataset": [{"dataset": text, "weight": 1} for text in TEXTS],
            "samples": windows,
            "sequence_length": length,
            "batch_size": 1,
        },
        "prune_stage": {"armor_modifiers": dict(entries)},
        "output": {"path": str(output)},
    }


def run(mapping: Mapping[str, Any], output: Path) -> None:
    """Apply it in a process of its own, which finds no measurement of an earlier run."""
    if (output / "armor_manifest.json").exists():
        return
    file = output.with_suffix(".yaml")
    with tempfile.TemporaryDirectory() as cache:
        apply_apart(str(file), mapping, file, env={**os.environ, "XDG_CACHE_HOME": cache})


def both(case: Case, model: str, work: Path, windows: int) -> tuple[Path, Path]:
    """Run the recipe by hand, and the one with a budget of its bytes."""
    hand, budget = work / "hand", work / "budget"
    entries = {
        f"ARMORModifier@sizes-{place}": {"targets": [target], "block_size": size, **COMMON}
        for place, (target, size) in enumerate(case.sizes.items())
    }
    run(recipe(model, entries, case.length, windows, hand), hand)
    totals = json.loads((hand / "armor_manifest.json").read_text(encoding="utf-8"))["totals"]
    share = math.floor(1e4 * totals["bytes_after"] / totals["bytes_before"]) / 1e4
    own = {"targets": "preset:all-linear", "block_size": {"budget": share}, **COMMON}
    run(recipe(model, {"ARMORModifier": own}, case.length, windows, budget), budget)
    return hand, budget


def losses(folder: Path, texts: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Losses of a checkpoint's windows by text, kept beside it."""
    file = folder.with_suffix(".losses.json")
    if not file.exists():
        model = armor_recipes.load(folder, backend="folded", dtype=torch.float32)
        file.write_text(json.dumps(losses_of(model, texts)), encoding="utf-8")
    found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def summary(folders: Mapping[str, Path], dense: Mapping[str, list[float]], texts: Mapping[str, Tensor]) -> list[Row]:
    """Bytes, gaps and times by the way that sizes were chosen, and what the budget's gap is less, window by window."""
    table: list[Row] = []
    for name, folder in folders.items():
        totals, figures = (
            json.loads((folder / file).read_text(encoding="utf-8")) for file in ("armor_manifest.json", "report.json")
        )
        own = losses(folder, texts)
        gaps = {f"{text} gap": compared(own[text], dense[text])[1] for text in texts}
        choosing = sum(one["seconds"] for one in figures.get("measured", ()))
        table.append(
            {
                "sizes": name,
                "bytes": totals["totals"]["bytes_after"],
                **gaps,
                "seconds": figures["seconds"],
                "choosing seconds": choosing,
            }
        )
    hand, budget = (losses(folder, texts) for folder in folders.values())
    less = {f"{text} gap": compared(hand[text], budget[text])[1] for text in texts}
    saved = table[0]["bytes"] - table[1]["bytes"]
    return [*table, {"sizes": "less by the budget", "bytes": saved, **less, "seconds": None, "choosing seconds": None}]


def main() -> None:
    """Make what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--model", help="another folder of the same model")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--steps", type=int, default=550, help="of training, for models that are made")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    case, work = CASES[options.case], options.work / options.case
    work.mkdir(parents=True, exist_ok=True)
    model = options.model or case.model or str(work / "model")
    if case.make is not None and not Path(model).exists():
        train(case.make, Path(model), options.steps)
    texts = read_texts(options.text, model_folder(model), windows=options.windows, length=case.length)
    hand, budget = both(case, model, work, options.samples)
    file = work / "dense.losses.json"
    if not file.exists():
        file.write_text(json.dumps(losses_of(dense_model(model_folder(model), "cpu"), texts)), encoding="utf-8")
    table = summary({"given": hand, "by a budget": budget}, json.loads(file.read_text(encoding="utf-8")), texts)
    show(table, {"gap": ".4f", "bytes": ",", "seconds": ".1f"}, options.json)


if __name__ == "__main__":
    main()
