"""Processes that have transformers and not this package: what an exported folder gives there."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.forks import Forks

PROGRAM = Path(__file__).with_name("stock_program.py")


class Stock:
    """One process for each model."""

    def __init__(self, scratch: Path, forks: Forks) -> None:
        self.scratch, self.forks = scratch, forks

    def outputs(self, folder: Path, model_class: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """All float tensors of a forward pass there. Raises RuntimeError with what went wrong there."""
        given, found = self.scratch / "given.safetensors", self.scratch / "found.safetensors"
        save_file({name: value.contiguous() for name, value in inputs.items()}, given)
        script = PROGRAM.read_text(encoding="utf-8")
        printed = self.forks.run(script, folder, model_class, given, found, folder=self.scratch)
        answer = printed.rpartition("ANSWER ")[2].strip()
        if answer != "ok":
            raise RuntimeError(answer)
        return [tensor for _, tensor in sorted(load_file(found).items())]
