"""A process that has transformers and not this package: what an exported folder gives there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

PROGRAM = Path(__file__).with_name("stock_program.py")


class StockProcess:
    """One process for many models, started when first used."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.communicate(timeout=30)

    def outputs(self, folder: Path, model_class: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """All float tensors of a forward pass there. Raises RuntimeError with what went wrong there."""
        if self.process is None:
            command = [sys.executable, "-P", str(PROGRAM)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        given, found = self.scratch / "given.safetensors", self.scratch / "found.safetensors"
        save_file({name: value.contiguous() for name, value in inputs.items()}, given)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(folder), model_class, str(given), str(found)]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '"the process is gone"')
        if answer != "ok":
            raise RuntimeError(answer)
        return [tensor for _, tensor in sorted(load_file(found).items())]
