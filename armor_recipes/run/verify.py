"""Load what was written, and hold it against the model in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from armor_recipes.errors import InputError, VerificationError
from armor_recipes.integrations.models import load_dense
from armor_recipes.integrations.transformers import load


def verify_reloaded(folder: Path, model: PreTrainedModel, *, packed: bool, seed_tokens: Tensor) -> None:
    """Raise VerificationError unless the folder, loaded in the model's compute dtype, gives the model's logits bit for bit.

    `seed_tokens` `(1, L)` are the ids to compare on; `packed` says whether the folder needs this package to load.
    """
    parameter = next(model.parameters())
    try:
        if packed:
            loaded = load(folder, backend="folded", dtype=parameter.dtype, device=parameter.device)
        else:
            loaded = load_dense(str(folder), dtype=parameter.dtype, device=parameter.device)
    except InputError as error:
        raise VerificationError(
            f"what was written cannot be loaded again: {error}; the checkpoint was not put in place"
        ) from error
    ids = seed_tokens.to(parameter.device)
    with torch.inference_mode():
        ours, theirs = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    if not torch.equal(ours, theirs):
        worst = float((ours.float() - theirs.float()).abs().max())
        raise VerificationError(
            f"the model loaded again differs from the one in memory (largest logit difference {worst:.3g}); "
            "the checkpoint was not put in place. This is a bug: please report it with the recipe"
        )
