"""Runs the model of a folder: arguments `folder, class, inputs, outputs`; a script of a process without this package."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor


def tensors_of(output: Any) -> list[Tensor]:
    """Every float tensor of an output, in order; caches are no part of it."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if hasattr(output, "items"):
        output = [value for key, value in output.items() if "past_key_values" not in key and "cache" not in key]
    return [t for value in output for t in tensors_of(value)] if isinstance(output, (list, tuple)) else []


def run(folder: str, model_class: str, given: str, found: str) -> str:
    """Load, run, write; a sentence where something is wrong."""
    model, info = getattr(transformers, model_class).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(map(str, value))[:3] for key, value in info.items() if value and key != "error_msgs"}
    if wrong:
        return f"loading: {wrong}"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # in a file at an odd address, products may be rounded otherwise
    torch.manual_seed(0)  # as in the pipeline
    with torch.no_grad():
        output = model.eval()(**load_file(given))
    save_file({f"{at:04}": t.contiguous().clone() for at, t in enumerate(tensors_of(output))}, found)
    return "ok"


def main() -> None:
    """Print the answer."""
    assert "armor_recipes" not in sys.modules
    warnings.simplefilter("ignore")
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        answer = run(*sys.argv[1:])
    except Exception as error:
        answer = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print("ANSWER", answer)


if __name__ == "__main__":
    main()
