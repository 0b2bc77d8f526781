"""How many calibration tokens an expert needs before its own statistic is better for it than that of its whole layer.

    python benchmarks/experts.py [--layers 1 2] [--json FILE]

No mixture of experts is at hand, so clusters of the embedded model's hidden states stand for the tokens of experts: spherical
k-means with 8 clusters at the door of a layer's MLP, on 96 windows of 256 tokens. For each of four clusters with enough tokens,
gate and down projections are factorised (block 32, 8 cycles) on the first n tokens of the cluster in half of the windows, and on
all tokens of that half. The table has the squared error of outputs on the cluster's tokens of the other half, as a multiple of
what all tokens give (mean of the clusters): below 1 the expert's own tokens are better. `hessian` chooses its shrinkage as a run
does. About two minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch
from losses import Row, show
from torch import Tensor
from torch.nn.functional import normalize

from armor_recipes.calibration.split import SplitGram
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.integrations.models import load_model, load_tokenizer, open_model
from armor_recipes.model.experts import in_parts
from armor_recipes.recipe.schema import CalibrationSpec, ModelSpec
from armor_recipes.solver import factorize
from armor_recipes.solver.hessian import choose_shrinkage, regularize

SIZES = (16, 32, 64, 128, 256, 512, 1024)
CLUSTERS, TRIED = 8, 4
BLOCK, CYCLES, DAMPING = 32, 8, 0.01


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    heads = [f"{size} tokens" for size in SIZES] + ["all tokens"]
    table: list[Row] = []
    for layer in options.layers:
        inputs, weights = observed(layer)
        labels = clusters(inputs["gate_proj"])
        for part, x in inputs.items():
            for objective in ("diagonal", "hessian"):
                ratios = measured(x, weights[part], labels, objective)
                names = {"module": f"layer {layer} {part}", "channels": x.shape[1], "objective": objective}
                table.append({**names, **dict(zip(heads, ratios, strict=True))})
    show(table, {"tokens": ".2f"}, options.json)


@torch.no_grad()
def observed(layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs `(T, I)` and weights `(O, I)` of the layer's gate and down projection."""
    source = open_model(ModelSpec(id="builtin:stdlib-llama"), device=torch.device("cpu"))
    model = load_model(source, device=torch.device("cpu")).eval()
    spec = CalibrationSpec(dataset="builtin:pydoc", samples=96, sequence_length=256)
    tokens = build_tokens(spec, tokenizer=load_tokenizer(source), vocab_size=model.config.vocab_size)
    seen: dict[str, list[Tensor]] = {"gate_proj": [], "down_proj": []}
    modules = {part: model.get_submodule(f"model.layers.{layer}.mlp.{part}") for part in seen}
    for part, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, part=part: seen[part].append(args[0].flatten(0, -2)))
    for batch in tokens.batches(8):
        model(**batch, use_cache=False)
    weights = {part: module.get_parameter("weight").detach() for part, module in modules.items()}
    return {part: torch.cat(rows) for part, rows in seen.items()}, weights


def clusters(x: Tensor) -> Tensor:
    """The cluster of each row `(T,)`."""
    rows = normalize(x, dim=-1)
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:CLUSTERS]
    centres = rows[start]
    for _ in range(20):
        labels = (rows @ centres.T).argmax(1)
        means = [rows[labels == number].mean(0) for number in range(CLUSTERS)]
        centres = normalize(torch.stack(means).nan_to_num(), dim=-1)
    return labels


def measured(x: Tensor, weight: Tensor, labels: Tensor, objective: str) -> list[float]:
    """For each number of own tokens, and for all of them, the held-out error as a multiple of that with the layer's."""
    half = len(x) // 2
    found: list[list[float]] = []
    for number in range(CLUSTERS):
        own, test = x[:half][labels[:half] == number], x[half:][labels[half:] == number]
        if len(own) >= SIZES[-1] and len(test) >= SIZES[-1] // 4 and len(found) < TRIED:
            layer = error(solved(x[:half], weight, objective), weight, test)
            given = [*(own[:size] for size in SIZES), own]
            found.append([error(solved(rows, weight, objective), weight, test) / layer for rows in given])
    return [fmean(ratios) for ratios in zip(*found, strict=True)]


def solved(rows: Tensor, weight: Tensor, objective: str) -> Tensor:
    """Ŵ `(O, I)` by the statistic of these rows."""
    statistic = SplitGram("expert", rows.shape[1], choose_shrinkage)
    for (part,) in in_parts("experts.0.part", rows):
        statistic.update(part)
    seen = statistic.finish()
    assert seen.choice is not None
    gram = regularize(seen.gram, shrinkage=seen.choice, damping=DAMPING)[0] if objective == "hessian" else None
    h = seen.gram.diagonal().contiguous()
    return factorize(weight, h, gram=gram, block_size=(BLOCK, BLOCK), iterations=CYCLES, seed=0).dense()


def error(approximation: Tensor, weight: Tensor, x: Tensor) -> float:
    """‖(W − Ŵ) Xᵀ‖² / ‖W Xᵀ‖²."""
    return float((x @ (weight - approximation).T).square().sum() / (x @ weight.T).square().sum())


if __name__ == "__main__":
    main()
