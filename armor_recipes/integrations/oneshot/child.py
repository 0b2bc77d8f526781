"""The process that runs llm-compressor on a folder: `dense`, `recipe.json` and `samples.safetensors` become `result`.

Where there is a `probe.safetensors`, `outputs.safetensors` tells what the model in memory puts out for it, before it is written. It
imports nothing of this package, whose pins its Python may not have.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


class NoTokenizer:
    """In the place of one, which llm-compressor wants though samples are token ids."""

    def save_pretrained(self, folder: str) -> None:
        """Write nothing."""


def main(folder: Path) -> None:
    """Run `oneshot` without the network's help. Whatever goes wrong ends the process with a traceback."""
    from llmcompressor import oneshot

    probe = folder / "probe.safetensors"
    options: dict[str, Any] = {}
    if not (folder / "dense" / "tokenizer_config.json").exists():
        options["processor"] = NoTokenizer()
    samples = folder / "samples.safetensors"
    if samples.exists():
        from torch.utils.data import DataLoader

        given: Any = _samples(samples)
        options["dataset"] = DataLoader(given, batch_size=1, collate_fn=_only)
    if not probe.exists():
        options["output_dir"] = str(folder / "result")
    model = oneshot(model=_model(folder / "dense"), recipe=str(folder / "recipe.json"), **options)
    if probe.exists():
        _look(model, probe, folder)
        model.save_pretrained(str(folder / "result"), save_compressed=True)


def _model(dense: Path) -> Any:
    """What `oneshot` is given: the folder, which it loads as a causal language model, or a model of any other class."""
    named = json.loads((dense / "config.json").read_text()).get("architectures") or [""]
    if named[0].endswith("ForCausalLM"):
        return str(dense)
    import transformers

    return getattr(transformers, named[0]).from_pretrained(str(dense), dtype="auto")


def _samples(file: Path) -> list[dict[str, Any]]:
    """What the model is called with, one sample after the other; tensors are `number.name`."""
    from safetensors.torch import load_file

    found: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(file).items():
        number, _, name = key.partition(".")
        found.setdefault(int(number), {})[name] = tensor
    return [found[number] for number in sorted(found)]


def _only(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The one sample of a batch, which has that dimension already."""
    return samples[0]


def _look(model: Any, probe: Path, folder: Path) -> None:
    """Write what the model puts out for the probe, and by which releases it was made."""
    import torch
    from safetensors.torch import load_file, save_file

    given = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in load_file(probe).items()}
    with torch.no_grad():
        output = model(**given)[0]
    save_file({"output": output.float().contiguous()}, folder / "outputs.safetensors")
    (folder / "versions.json").write_text(json.dumps({name: version(name) for name in PACKAGES}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
