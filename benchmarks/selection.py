"""How the sparse step of the paper's method chooses the group that it solves in each block, on modules of the embedded model.

    python benchmarks/selection.py [--steps 5000] [--seeds 3] [--results benchmarks/results/selection] [--output selection.json]

`random` draws a group, each as likely as another; `gradient random` draws with probability proportional to a norm of the group's
gradient, `gradient greedy` takes the one with the largest. `masks of the start` solves for values alone. What draws runs with so
many seeds. Block 32, statistics of 64 windows of 256 tokens of builtin:pydoc, one thread. One JSON file for each module, way and
seed; those that exist are not run again. `--output` gets a row for each way. Its losses are geometric means of modules and seeds.
`ratio` is the last one by that of `gradient random, L1`, the way of `solver: adam`; `lowest` and `highest` are the seeds' (of
means of modules).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor
from turns import keep

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.integrations.models import load_model, load_tokenizer, open_model
from armor_recipes.recipe.schema import CalibrationSpec, ModelSpec
from armor_recipes.solver.adam import AdamProblem, Selection, draw, draw_by_l1_norm, solve_adam
from armor_recipes.solver.entry import nowag_start
from armor_recipes.solver.normalize import fill_dead_channels, nowag_normalize
from armor_recipes.solver.patterns import magnitude_mask
from armor_recipes.solver.rows import stable_sum

MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
LAYER, BLOCK = 1, 32
MARKS = (100, 300, 1_000, 3_000, 5_000, 10_000, 20_000)
OURS, START = "gradient random, L1", "masks of the start"


def uniform(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """A `Selection`: each group is as likely as another."""
    return draw(torch.ones_like(gradient[..., 0]), generator)


def random_by(order: float) -> Selection:
    """Drawn with probability ∝ this norm of the gradient."""
    return lambda gradient, generator: draw(torch.linalg.vector_norm(gradient, order, dim=-1), generator)


def greedy_by(order: float) -> Selection:
    """The largest norm, of equal ones the first."""
    return lambda gradient, _: torch.linalg.vector_norm(gradient, order, dim=-1).flatten(2).argmax(-1)


WAYS: dict[str, Selection] = {
    START: draw_by_l1_norm,
    "random": uniform,
    OURS: draw_by_l1_norm,
    "gradient random, L2": random_by(2),
    "gradient random, L∞": random_by(float("inf")),
    "gradient greedy, L1": greedy_by(1),
    "gradient greedy, L2": greedy_by(2),
    "gradient greedy, L∞": greedy_by(float("inf")),
}


def seeds(way: str, count: int) -> range:
    """Those that a way runs with: one where nothing is drawn."""
    return range(1 if "greedy" in way else count)


@torch.no_grad()
def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Weights `(O, I)` and second moments `(I,)` of the modules, from the dense model, by name."""
    source = open_model(ModelSpec(id="builtin:stdlib-llama"), device=torch.device("cpu"))
    model = load_model(source, device=torch.device("cpu")).eval()
    spec = CalibrationSpec(dataset="builtin:pydoc", samples=64, sequence_length=256)
    tokens = build_tokens(spec, tokenizer=load_tokenizer(source), vocab_size=model.config.vocab_size)
    found = {}
    for name in MODULES:
        linear = model.get_submodule(f"model.layers.{LAYER}.{name}")
        weight = linear.get_parameter("weight")
        found[name] = weight, InputSecondMoment(name, weight.shape[1])
        linear.register_forward_pre_hook(lambda _, args, moment=found[name][1]: moment.update(args[0]))
    for batch in tokens.batches(8):
        model(**batch, use_cache=False)
    return {name: (weight.clone(), moment.value.clone()) for name, (weight, moment) in found.items()}


@torch.no_grad()
def run(weight: Tensor, moment: Tensor, way: str, *, seed: int, steps: int) -> dict[str, Any]:
    """One solve from NoWag-P's start: relative losses at the marks that it reached and at its end, as `factorize` states them."""
    h, _ = fill_dead_channels(moment.float())
    h, target = h / h.mean(), nowag_normalize(weight.float()).weight
    start = nowag_start(target, magnitude_mask(target.square() * h), (BLOCK, BLOCK))
    generator = torch.Generator().manual_seed(seed)
    problem = AdamProblem(target, h, generator, fixed_mask=way == START, select=WAYS[way])
    errors: list[float] = []
    started = time.perf_counter()
    found, reason = solve_adam(problem, start, iterations=steps, record=errors.append)
    seconds = time.perf_counter() - started
    losses = [error / stable_sum(target.square() * h) for error in errors]
    return {
        "losses": {str(mark): losses[min(mark, len(losses)) - 1] for mark in MARKS if mark <= steps},
        "steps": len(losses),
        "stop_reason": reason.value,
        "masks_changed": float((found.index != start.index).double().mean()),
        "seconds": seconds,
    }


def summary(found: dict[tuple[str, str, int], dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """A row for each way, of the runs by module, way and seed, with so many seeds."""

    def mean(way: str, mark: str, own: Iterable[int]) -> float:
        return geometric_mean(found[module, way, seed]["losses"][mark] for module in MODULES for seed in own)

    marks = list(next(iter(found.values()))["losses"])
    usual = mean(OURS, marks[-1], seeds(OURS, count))
    rows = []
    for way in WAYS:
        runs = [found[module, way, seed] for module in MODULES for seed in seeds(way, count)]
        ratios = [mean(way, marks[-1], (seed,)) / usual for seed in seeds(way, count)]
        rows.append(
            {
                "name": way,
                "losses": {f"{mark} steps": mean(way, mark, seeds(way, count)) for mark in marks},
                "ratio": mean(way, marks[-1], seeds(way, count)) / usual,
                "lowest": min(ratios),
                "highest": max(ratios),
                "masks_changed": fmean(run["masks_changed"] for run in runs),
                "steps": [run["steps"] for run in runs],
                "ms_per_step": 1e3 * fmean(run["seconds"] / run["steps"] for run in runs),
            }
        )
    return rows


def main() -> None:
    """Run what is missing, then print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/selection"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    found = {}
    weights = cases()
    ways = [(seed, way) for way in WAYS for seed in seeds(way, options.seeds)]
    for key in [(module, way, seed) for seed, way in sorted(ways, key=lambda own: own[0]) for module in MODULES]:
        module, way, seed = key
        file = options.results / f"{options.steps} {module} {way} {seed}.json".replace(" ", "-")
        if not file.exists():
            print(f"{module}, {way}, seed {seed} …", flush=True)
            row = run(*weights[module], way, seed=seed, steps=options.steps)
            file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        found[key] = json.loads(file.read_text(encoding="utf-8"))
    rows = summary(found, options.seeds)
    if options.output:
        keep(options.output, {"rows": rows})
    for row in rows:
        print(f"{row['name']:20}", *(f"{loss:.6f}" for loss in row["losses"].values()), f"{row['ratio']:.4f}")


if __name__ == "__main__":
    main()
