"""How many bytes packed layers take, part by part, and of the dense bfloat16 weights of a model's shapes: made-up layers, packed.

    python benchmarks/sizes.py [--json-parts FILE] [--json-models FILE]

A core is stored as bf16, as int8 with a scale a row, or as int4 with a scale for each 32 kept values; A and B are bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from kernel import CORES, made_up_layer
from losses import Row, show

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime.fragments import lay_out

#: Outputs and inputs of the linear layers of one decoder layer.
LLAMA_7B = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
SMOLLM2 = ((576, 576),) * 2 + ((192, 576),) * 2 + ((1536, 576),) * 2 + ((576, 1536),)
MODELS = {
    "7B shapes, block 128": (LLAMA_7B, 128),
    "7B shapes, block 64": (LLAMA_7B, 64),
    "SmolLM2-135M, block 64": (SMOLLM2, 64),
}
SHAPE, BLOCK = (4096, 4096), 128


def made(shape: tuple[int, int], core: str, block: int) -> PackedLinear:
    return made_up_layer(*shape, core, torch.Generator().manual_seed(0), block)


def parts(layer: PackedLinear) -> Mapping[str, float]:
    """Bytes a weight of `SHAPE`, each row with all that stands in those above it."""
    weights = layer.shape[0] * layer.shape[1]
    values = layer.values.nbytes + layer.bitmask.nbytes
    second = lay_out(layer)
    copies = [layer.scale, second.words, second.scale]
    scale, words, placed = (0 if copy is None else copy.nbytes for copy in copies)
    same = second.scale is layer.scale  # whole rows' scales are not laid out anew
    found = {
        "values and masks": values,
        "with scales": values + scale,
        f"with A and B, {SHAPE[0]}×{SHAPE[1]}, block {BLOCK}": layer.nbytes,
        "in memory with the backend `cuda`": layer.nbytes + words + (0 if same else placed),
        "in memory with the backend `folded`": layer.nbytes + 2 * weights,
    }
    return {name: size / weights for name, size in found.items()}


def share(shapes: tuple[tuple[int, int], ...], core: str, block: int) -> float:
    """Bytes of layers, of those of their dense bfloat16 weights."""
    sizes = {shape: made(shape, core, block).nbytes for shape in set(shapes)}
    return sum(sizes[shape] for shape in shapes) / sum(2 * rows * columns for rows, columns in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-parts", type=Path, help="also write the first table's rows there")
    parser.add_argument("--json-models", type=Path, help="also write the second table's rows there")
    options = parser.parse_args()
    by_core = {core: parts(made(SHAPE, core, BLOCK)) for core in CORES}
    names = list(by_core[CORES[0]])
    first: list[Row] = [{"bytes a weight": n, **{core: by_core[core][n] for core in CORES}} for n in names]
    second: list[Row] = [
        {"of dense": name, **{core: share(shapes, core, block) for core in CORES}}
        for name, (shapes, block) in MODELS.items()
    ]
    for rows, file in ((first, options.json_parts), (second, options.json_models)):
        show(rows, dict.fromkeys(CORES, ".3f"), file)


if __name__ == "__main__":
    main()
