"""Decoding's attention, one query a head, by a kernel of our own in models that `armor_recipes.load` has loaded for a CPU.

Torch's takes ten times as long as reading keys and values does. A model's `attn_implementation` stays `sdpa`, a name that some
architectures compare with: what transformers runs by that name looks at the module that calls it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from armor_recipes.runtime.kernel import attention_runs, run_attention_kernel

_OURS = "_armor_attention"


def adopt_attention(model: nn.Module) -> None:
    """Let modules of a model, which ask for transformers' `sdpa`, take the kernel wherever it suits."""
    interface = AttentionInterface()
    sdpa = interface["sdpa"]
    if not hasattr(sdpa, _OURS):
        AttentionInterface.register("sdpa", _with_kernel(sdpa))
    for module in model.modules():
        module.__dict__[_OURS] = True


def _with_kernel(sdpa: Any) -> Any:
    @wraps(sdpa)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if _OURS not in module.__dict__ or attention_mask is not None or not _suits(query, key, value, options):
            return sdpa(module, query, key, value, attention_mask, **options)
        scale = options.get("scaling")
        return run_attention_kernel(query, key, value, query.shape[3] ** -0.5 if scale is None else scale), None

    setattr(attend, _OURS, True)
    return attend


def _suits(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether the kernel computes what is asked for: no option but the scale that says anything of one query without a mask."""
    plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    asked = any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    return plain and not asked and not options.get("dropout") and attention_runs(query, key, value)
