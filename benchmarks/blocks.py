"""Where in a model the errors of its factors cost most, and what wider blocks take off them: figures to choose block sizes by.

    python benchmarks/blocks.py --model models/smollm2-135m-instruct --checkpoint out/FOLDER [--layer 14]

`out/FOLDER` holds the model with ARMOR's factors, all of one block size and none trained afterwards. Two tables:

- `cost`: KL(dense ‖ model) in nats a token, float32, where one module alone is replaced by the checkpoint's A · S · B, for each
  kind of module in the first layer and in the mean of the others; and that divided by its weights, in 1e-9 a weight.
- `blocks`: the relative loss of `exact` on one layer's modules at pairs of block sizes, beside `f`, the share of the weight's
  values that A and B have, and the rate r of loss ~ exp(-r f) against the checkpoint's block size.

Where the loss falls by the same rate everywhere, bytes are spent best where the cost of a weight is the same in all modules. A
module is one JSON file; those that exist are not measured again. Windows are of four kinds of text, evenly mixed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality import TEXTS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import read_layers
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.solver import factorize

#: Sides to try; those that do not divide the module's side are left out.
SIDES = (32, 64, 96, 128, 192)
ITERATIONS = 25


class Dense:
    """The dense model in float32 with its log-probabilities `(T, V)` on some windows."""

    def __init__(self, folder: Path, *, windows: int, length: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        mix = [{"dataset": text, "weight": 1} for text in TEXTS]
        spec = CalibrationSpec.model_validate({"dataset": mix, "samples": windows, "sequence_length": length})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.ids = build_tokens(spec, tokenizer=tokenizer, vocab_size=self.model.config.vocab_size).ids
        self.expected = self.log_probabilities()

    @torch.no_grad()
    def log_probabilities(self) -> Tensor:
        """Of all tokens, one window after the other."""
        parts = [self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1) for ids in self.ids.split(1)]
        return torch.cat(parts).log_softmax(-1)

    @torch.no_grad()
    def cost(self, name: str, packed: PackedLinear) -> float:
        """KL(dense ‖ model) with this module's weight alone replaced."""
        weight = self.model.get_parameter(f"{name}.weight")
        own = weight.clone()
        weight.copy_(packed.fold(torch.float32, name=name))
        found = self.log_probabilities()
        weight.copy_(own)
        return float((self.expected.exp() * (self.expected - found)).sum(-1).mean())

    @torch.no_grad()
    def second_moments(self, names: list[str]) -> dict[str, Tensor]:
        """Mean squares `(I,)` of the modules' inputs on the same windows."""
        found = {name: InputSecondMoment(name, self.model.get_submodule(name).in_features) for name in names}
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda _, args, s=statistic: s.update(args[0]))
            for name, statistic in found.items()
        ]
        self.log_probabilities()
        for handle in handles:
            handle.remove()
        return {name: statistic.value for name, statistic in found.items()}


def losses(weight: Tensor, second_moment: Tensor) -> dict[str, float]:
    """Relative loss at each pair of sides, as `b_o x b_i`."""
    found = {}
    for b_o in (side for side in SIDES if weight.shape[0] % side == 0):
        for b_i in (side for side in SIDES if weight.shape[1] % side == 0):
            solved = factorize(weight, second_moment, block_size=(b_o, b_i), iterations=ITERATIONS, seed=0)
            found[f"{b_o}x{b_i}"] = min(solved.losses)
    return found


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """What the file holds, or else what is measured now, and written there."""
    if not file.exists():
        file.write_text(json.dumps(measure()) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def cost_table(costs: Mapping[str, float], weights: Mapping[str, int]) -> str:
    """By kind of module: the first layer's, the mean of the others, and both for 1e9 weights."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in costs:
        kinds[name.rpartition(".")[2]].append(name)
    lines = ["| module | first layer | others, mean | first, 1e-9 a weight | others |", "|---|---|---|---|---|"]
    for kind, (first, *others) in kinds.items():
        mean = statistics.fmean(costs[name] for name in others)
        shares = (1e9 * cost / weights[first] for cost in (costs[first], mean))
        lines.append(f"| {kind} | {costs[first]:.5f} | {mean:.5f} | " + " | ".join(f"{x:.1f}" for x in shares) + " |")
    return "\n".join(lines)


def block_table(name: str, shape: tuple[int, int], found: Mapping[str, float], block: tuple[int, int]) -> str:
    """Losses of one module, by the share of its values that A and B have."""

    def share(b_o: int, b_i: int) -> float:
        return b_o / shape[1] + b_i / shape[0]

    base, own = found["{}x{}".format(*block)], share(*block)
    lines = [f"\n{name} {shape[0]}x{shape[1]}\n", "| blocks | f | loss | rate |", "|---|---|---|---|"]
    rows = [(share(*(int(side) for side in sides.split("x"))), sides) for sides in found]
    for f, sides in sorted(rows):
        rate = "-" if abs(f - own) < 0.01 else f"{math.log(base / max(found[sides], 1e-9)) / (f - own):.1f}"
        lines.append(f"| {sides} | {f:.3f} | {found[sides]:.5f} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=14, help="whose modules are solved at other block sizes")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/blocks"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    packed = read_layers(options.checkpoint)
    dense = Dense(options.model, windows=options.windows, length=options.length)
    names = [name for name, _ in dense.model.named_modules() if name in packed]
    weights = {name: dense.model.get_parameter(f"{name}.weight").detach() for name in names}
    costs = {
        name: kept(options.results / f"cost-{name}.json", partial(dense.cost, name, packed[name])) for name in names
    }
    print(cost_table(costs, {name: weight.numel() for name, weight in weights.items()}), flush=True)
    layer = [name for name in names if f".{options.layer}." in name]
    moments = dense.second_moments(layer)
    for name in layer:
        file = options.results / f"blocks-{name}.json"
        found = kept(file, partial(losses, weights[name], moments[name]))
        block = (packed[name].a.shape[-1], packed[name].b.shape[-1])
        print(block_table(name, tuple(weights[name].shape), found, block), flush=True)


if __name__ == "__main__":
    main()
