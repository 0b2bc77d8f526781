"""Under which names a model's tensors lie in files: transformers renames, splits and merges some as it loads and saves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def stored_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Map each tensor of `model.state_dict()` → the names under which saving writes it: usually one, its own."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    if _reverted(model, state) == state.keys():
        return {name: (name,) for name in state}
    return {name: tuple(sorted(_reverted(model, {name: tensor}))) for name, tensor in state.items()}


def _reverted(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Names after transformers' reversal of its conversions; empty where it fails (a tensor that it splits oddly)."""
    try:
        return set(revert_weight_conversion(model, dict(state)))
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError):
        return set()


def experts(model: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts in three dimensions. Those of convolutions hold none."""
    found = []
    for name, module in model.named_modules():
        if "expert" not in type(module).__name__.lower() and not hasattr(module, "num_experts"):
            continue
        own = module.named_parameters(prefix=name, recurse=False)
        found += [parameter for parameter, value in own if value.ndim == 3]
    return found
