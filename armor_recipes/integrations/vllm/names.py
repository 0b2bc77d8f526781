"""What vLLM calls modules that transformers calls otherwise: its classes go by the names of checkpoints on the hub.

A checkpoint of packed layers has transformers' names, since config.json names layers by their modules. Where transformers renames
a family's tensors as it loads them, vLLM does not, so its class is told here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

_EXPERTS = {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}
_BLOCK = {".mlp.": ".block_sparse_moe."}

#: By architecture, parts of names in the order in which they are replaced.
_RENAMED: Mapping[str, Mapping[str, str]] = {
    "MixtralForCausalLM": {**_BLOCK, **_EXPERTS},
    "PhiMoEForCausalLM": {".mlp.router.": ".block_sparse_moe.gate.", **_BLOCK, **_EXPERTS},
    "PhimoeForCausalLM": {".mlp.router.": ".block_sparse_moe.gate.", **_BLOCK, **_EXPERTS},
    "MiniMaxM2ForCausalLM": {**_BLOCK, **_EXPERTS},
}


def take_our_names(architectures: Iterable[str]) -> None:
    """Let vLLM's class of a model read checkpoints with transformers' names, too; those of the hub it reads as before."""
    for architecture in architectures:
        renamed = _RENAMED.get(architecture)
        if renamed is None or architecture not in ModelRegistry.models:
            continue
        served = ModelRegistry.models[architecture].load_model_cls()
        for part in vars(sys.modules[served.__module__]).values():
            if isinstance(part, type) and part.__module__ == served.__module__ and hasattr(part, "hf_to_vllm_mapper"):
                part.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_substr=renamed)
