"""A model's forward pass for evaluation, and which of its outputs is looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch
from armor_recipes.errors import InputError
from armor_recipes.model.replay import feed_alike, forward_errors, on_device, parameters_of

#: Outputs by what they say of a model, the most telling first; then whatever comes first.
PREFERRED = ("logits", "last_hidden_state", "image_embeds", "text_embeds", "pooler_output")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with torch.inference_mode(), evaluating(model):
        yield


def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The float tensors that a model gives for a batch, by name, in its order; nested ones are left out.

    Raises InputError where the model refuses the batch.
    """
    takes = parameters_of(model)
    by_name = "return_dict" in takes or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    given: dict[str, Any] = {**on_device(batch, model), **({"return_dict": True} if by_name else {})}
    with forward_errors(model, batch):
        found = feed_alike(model, given)
    return {name: t for name, t in _named(found).items() if isinstance(t, Tensor) and t.is_floating_point() and t.ndim}


def _named(found: Any) -> Mapping[str, Any]:
    """A model's outputs by name; those of a tuple by their place."""
    if isinstance(found, (tuple, Tensor)):
        parts = found if isinstance(found, tuple) else (found,)
        return {f"output_{place}": part for place, part in enumerate(parts)}
    return found if isinstance(found, Mapping) else vars(found)


def chosen(found: Mapping[str, Tensor], samples: int, name: str | None = None) -> tuple[str, Tensor]:
    """The output of that name, or the most telling one that has a row for each of the samples; raises InputError without it."""
    rows = {key: tensor for key, tensor in found.items() if len(tensor) == samples}
    if name is not None:
        if name not in rows:
            raise InputError(f"the model gives no output {name!r}; it gives {', '.join(rows) or 'none'}")
        return name, rows[name]
    for key in (*PREFERRED, *rows):
        if key in rows and key != "loss":
            return key, rows[key]
    raise InputError("the model gives no tensor with a row for each sample")


def counted(batch: Batch, name: str, output: Tensor) -> Tensor | None:
    """Which positions `(B, L)` of an output `(B, L, D)` are no padding; None where all count, or the mask has other positions."""
    decodes = any(key.startswith("decoder_") for key in batch) and not name.startswith("encoder_")
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None or output.ndim != 3 or mask.shape != output.shape[:2]:
        return None
    return mask.bool()


def vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding; None for a model that does not tell."""
    return _rows(model, "get_input_embeddings")


def head_rows(model: nn.Module) -> int | None:
    """Rows of the head that predicts tokens; None where there is none."""
    return _rows(model, "get_output_embeddings")


def _rows(model: nn.Module, getter: str) -> int | None:
    try:
        module = getattr(model, getter, lambda: None)()
    except (NotImplementedError, AttributeError):  # transformers' own answer of a model without one
        return None
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None
