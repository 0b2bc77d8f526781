"""Causal language models out of GGUF files, as ordinary models in bfloat16. Needs the extra `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def load_dequantised(file: Path, *, parameters: int) -> PreTrainedModel:
    """Load the model in bfloat16 as an ordinary one: nothing about GGUF stays in its config.

    Exits with a message when it has another number of parameters than `parameters`.
    """
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    found = model.num_parameters()
    if found != parameters:  # transformers left the weights packed, or read another model
        raise SystemExit(f"{file.name} gave {found:,} parameters, expected {parameters:,}; nothing was written")
    dequantised: PreTrainedModel = model.to(torch.bfloat16)
    return dequantised


def save(file: Path, staged: Path, *, parameters: int) -> None:
    """Write model and tokenizer of the GGUF `file` into the folder `staged`."""
    load_dequantised(file, parameters=parameters).save_pretrained(staged)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(staged)
