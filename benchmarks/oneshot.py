"""Our modifiers in llm-compressor's `oneshot` on the embedded model: perplexity in memory and of the folder it saves, and bytes.

    python benchmarks/oneshot.py [--json FILE]

In a Python that has llm-compressor (`pip install 'armor-recipes[llmcompressor]'`). Blocks of 32, 64 windows of 256 tokens of
`builtin:pydoc`, perplexity on all of `builtin:pydoc-heldout` in windows of 256 tokens, in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from losses import Row, losses_of, show
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor_recipes.builtin import model_folder
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.checkpoint.files import read_header
from armor_recipes.evaluation import evaluation_windows
from armor_recipes.recipe.schema import CalibrationSpec, PerplexitySpec

LENGTH, SAMPLES = 256, 64
LAYERS: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
SMOOTH: dict[str, Any] = {"SmoothQuantModifier": {"smoothing_strength": 0.5}}
ARMOR: dict[str, Any] = {"ARMORModifier": {**LAYERS, "block_size": 32}}


def core(scheme: str) -> dict[str, Any]:
    """The modifier of llm-compressor that quantises S."""
    return {"QuantizationModifier": {**LAYERS, "scheme": scheme}}


ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "ARMOR": ARMOR,
    "ARMOR, W8A16": {**ARMOR, **core("W8A16")},
    "SmoothQuant, ARMOR, W8A16": {**SMOOTH, **ARMOR, **core("W8A16")},
    "ARMOR, W4A16": {**ARMOR, **core("W4A16")},
}


def run_row(name: str, modifiers: dict[str, Any], folder: Path) -> Row:
    """Prune the embedded model by the row's recipe, save it into `folder`, and load it again."""
    import llmcompressor  # an optional neighbour's

    import armor_recipes.integrations.llmcompressor  # registers our modifiers

    source = model_folder("stdlib-llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    spec = PerplexitySpec(dataset="builtin:pydoc-heldout", sequence_length=LENGTH)
    texts = {"pydoc": evaluation_windows(spec, tokenizer).ids}

    def perplexity(of: Any) -> float:
        (losses,) = losses_of(of, texts).values()
        return math.exp(sum(losses) / len(losses))

    loaded, stored = None, Path(source)
    if modifiers:
        windows = CalibrationSpec(dataset="builtin:pydoc", samples=SAMPLES, sequence_length=LENGTH)
        ids = build_tokens(windows, tokenizer=tokenizer, vocab_size=len(tokenizer)).ids
        recipe = yaml.safe_dump({"one_stage": {"one_modifiers": modifiers}}, sort_keys=False)
        samples: Any = [{"input_ids": window} for window in ids]
        loader: Any = DataLoader(samples, batch_size=1)
        llmcompressor.oneshot(
            model=model, recipe=recipe, dataset=loader, tokenizer=tokenizer, num_calibration_samples=SAMPLES
        )
        model.save_pretrained(folder)
        loaded = perplexity(armor_recipes.load(folder, backend="reference"))
        stored = folder
    size = sum(info.nbytes for info in read_header(stored).values())
    return {"recipe": name, "in memory ppl": perplexity(model), "loaded ppl": loaded, "MB": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    warnings.simplefilter("default")
    with tempfile.TemporaryDirectory() as place:
        rows = [run_row(name, modifiers, Path(place) / name) for name, modifiers in ROWS.items()]
    show(rows, {"ppl": ".2f", "MB": ".2f"}, options.json)


if __name__ == "__main__":
    main()
