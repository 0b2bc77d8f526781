"""How far blocks of the compressed model are from the dense one's on one sample: where error comes in, and how it adds up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch
from armor_recipes.compute import is_out_of_memory
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.calls import CALL_ERRORS, hidden_states
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.replay import feed_alike, on_device

#: Tokens that pass, and bytes that are kept of what the blocks make of them.
_TOKENS, _BYTES = 128, 8 * 2**20


@dataclass(slots=True)
class Depth:
    """Outputs of a dense model's blocks, to hold those of what it becomes against; `note` says why there are none, if so."""

    note: str = ""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def before(self, model: nn.Module, sample: Batch) -> None:
        """Look at the dense model."""
        if not self.note:
            self.outputs = self._outputs(model, sample)

    def after(self, model: nn.Module, sample: Batch) -> None:
        """Look at the compressed one: of each block the mean over positions of ‖x − x̂‖ / ‖x‖, x its output."""
        if self.note or not self.outputs:
            return
        for name, found in self._outputs(model, sample).items():
            dense = self.outputs.get(name)
            if dense is not None and dense.shape == found.shape:
                norms = dense.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
                self.blocks.append({"block": name, "error": float(((found - dense).norm(dim=1) / norms).mean())})
        self.outputs = {}

    def report(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {"blocks": self.blocks, "note": self.note}

    def _outputs(self, model: nn.Module, sample: Batch) -> dict[str, Tensor]:
        """By block the first tensor that it gives, `(positions, H)` float32, at evenly spaced positions."""
        found: dict[str, Tensor] = {}
        names = find_stacks(model).names

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                hidden = hidden_states(output)
                if isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.ndim > 1:
                    rows = hidden.flatten(0, -2)
                    most = max(1, _BYTES // (4 * rows.shape[1] * len(names)))
                    found[name] = rows[:: -(-rows.shape[0] // most)].float().clone()

            return hook

        with Hooks() as hooks, torch.inference_mode():
            for name in names:
                hooks.after(model.get_submodule(name), keep(name))
            try:
                feed_alike(model, on_device(_short(sample), model))
            except CALL_ERRORS as error:  # which the run itself meets, and tells, where it matters to it
                if is_out_of_memory(error):
                    raise
                self.note = f"the model could not be called on one sample ({type(error).__name__})"
        return found


def _short(sample: Batch) -> Batch:
    """The first tokens of a sample that is tokens alone; another as it is."""
    lengths = {x.shape[1] if x.ndim == 2 else None for x in sample.values()}
    return {name: x[:, :_TOKENS] for name, x in sample.items()} if len(lengths) == 1 and None not in lengths else sample
