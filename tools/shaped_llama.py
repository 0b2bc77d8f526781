"""Write a Llama with generated weights as a folder, shard by shard: `python tools/shaped_llama.py FOLDER --shape 7b`.

Its weights are normal numbers of the scale that Llama is initialised with, drawn from a seed of their own for each tensor; no
tokenizer, so recipes calibrate it on `builtin:random-tokens`. No more than one tensor is in memory at a time in full precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

#: Layers, width, width of the MLP, heads, vocabulary: 12.6 GiB, 1.0 GiB and 66 MiB in bfloat16.
SHAPES = {"7b": (32, 4096, 11008, 32, 32000), "1g": (10, 2048, 5504, 16, 8192), "small": (8, 512, 1408, 8, 8192)}


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, help="other than the shape's")
    parser.add_argument("--shard-mib", type=int, default=2048, help="a file ends once it holds so much")
    options = parser.parse_args()
    layers, width, inner, heads, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        num_hidden_layers=options.layers or layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    options.folder.mkdir(parents=True)
    write(options.folder, shapes, options.shard_mib << 20)
    config.save_pretrained(options.folder)


def write(folder: Path, shapes: dict[str, torch.Size], most: int) -> None:
    """The tensors in files of about `most` bytes, and the index of them."""
    groups: list[list[str]] = [[]]
    held = total = 0
    for name, shape in shapes.items():
        if held >= most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += 2 * shape.numel()
        total += 2 * shape.numel()
    places: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: drawn(name, shapes[name]) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """Ones for a norm, else normal numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(sum((place + 1) * byte for place, byte in enumerate(name.encode())))
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


if __name__ == "__main__":
    main()
