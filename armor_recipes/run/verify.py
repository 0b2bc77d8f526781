"""Load what was written, and hold it against the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.inputs import Batch
from armor_recipes.errors import InputError, VerificationError
from armor_recipes.integrations.models import attention_of, load_dense
from armor_recipes.integrations.transformers import load
from armor_recipes.model.replay import feed, on_device


def verify_reloaded(folder: Path, model: PreTrainedModel, *, packed: bool, probe: Batch) -> None:
    """Raise VerificationError unless the folder, loaded in the model's compute dtype, gives the model's logits bit for bit.

    `probe` is what to compare on; `packed` says whether the folder needs this package to load. It is loaded
    with the attention implementation that the model runs on, into aligned memory; numbers that are NaN in both are equal.
    """
    parameter = next(model.parameters())
    options: dict[str, Any] = {
        "dtype": parameter.dtype,
        "device": parameter.device,
        "attention": attention_of(model),
    }
    try:
        loaded = load(folder, backend="folded", **options) if packed else load_dense(str(folder), **options)
    except InputError as error:
        raise VerificationError(f"what was written cannot be loaded again: {error}") from error
    batch = on_device(probe, model)
    with torch.inference_mode():
        ours, theirs = (feed(one, batch).logits for one in (model, loaded))
    equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if not bool(equal.all()):
        worst = float((ours.float() - theirs.float()).abs().nan_to_num().max())
        raise VerificationError(
            f"the model loaded again differs from the one in memory: in {int((~equal).sum())} of {equal.numel()} logits, by "
            f"{worst:.3g} at most, where the largest is {float(ours.float().abs().nan_to_num().max()):.3g}. A difference near "
            "rounding means that something here computes otherwise from one run to the next; a larger one that the folder is not "
            "this model"
        )
