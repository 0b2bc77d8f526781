"""The one command for a card: whether the backend `cuda` is right, then how fast; each part in a process, under a limit of its own.

    python benchmarks/gpu_check.py [--results benchmarks/results/gpu] [--seconds 540] [--only check tune …] [--dry]

Parts, in order of what is lost least without them:

- `check`: kernels and layers, every core and dtype, against float32. Where an error is too large the command ends with exit code 1.
- `tune`: plans of the kernels for the shapes and numbers of tokens below, which `armor_recipes.runtime.tuning` keeps.
- `few`, `many`: layers of the shapes of a 7B Llama, block 128: dense bf16, dense fp8 (the product alone), plain 2:4 (torch's, the
  product alone), ARMOR by core type, and its B, S and A alone. Microseconds in a CUDA graph, medians, after the cache was
  overwritten (cold) and not (warm); microseconds that an eager call keeps the CPU busy.
- `model`: a Llama of 7B shapes with 8 layers and made-up weights, whole forward passes: one token for each of 1, 8, 32 and 128
  sequences (no context), and a prompt of 2,048 tokens; tokens a second, eager and in a CUDA graph, and the most memory.
- `solver`: five cycles of `exact` and fifty steps of `adam` on 4096x4096.

A row is a JSON file in a folder named after the card; rows that exist are not measured again, so that a command that was cut short
goes on. `results.json` there holds all of them, and the tables are printed. Without a GPU the command says so, with exit code 0;
`--dry` runs all of it in Triton's interpreter instead, in float16 on tiny shapes, to know that it works: times then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel import CORES, made_up_layer
from torch import Tensor, nn

from armor_recipes.checkpoint.files import write_whole
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime import ArmorLinear, cuda, set_backend
from armor_recipes.runtime.backends import choose_backend
from armor_recipes.runtime.fragments import lay_out
from armor_recipes.runtime.tuning import (
    CorePlan,
    FactorPlan,
    captured,
    core_key,
    core_plans,
    factor_key,
    factor_plans,
    gpu_microseconds,
    tune,
)
from armor_recipes.solver import factorize
from armor_recipes.solver.activations import round_activations
from armor_recipes.solver.blockdiag import apply_input_factor

UNFINISHED = 3
"""Exit code of a part that ran out of time between two rows."""
#: Relative error (Frobenius) that a right layer stays below: a rounding for each of B, S and A.
MOST_ERROR = {torch.bfloat16: 1.2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured on a card, or in a dry run."""

    device: str
    half: torch.dtype
    block: int
    shapes: tuple[tuple[int, int], ...]
    odd: tuple[int, int, int]
    """Rows, columns and block of a layer that fills no tile, which is checked as well."""
    checked: tuple[int, ...]
    few: tuple[int, ...]
    many: tuple[int, ...]
    model: Mapping[str, int]
    batches: tuple[int, ...]
    prompt: int
    cycles: Mapping[str, int]
    repeats: int


CARD = Setting(
    device="cuda",
    half=torch.bfloat16,
    block=128,
    shapes=((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)),
    odd=(216, 312, 24),
    checked=(1, 8, 16, 17, 512),
    few=(1, 8, 16),
    many=(64, 512, 2048, 8192),
    model={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "layers": 8,
    },
    batches=(1, 8, 32, 128),
    prompt=2048,
    cycles={"exact": 5, "adam": 50},
    repeats=30,
)
DRY = replace(
    CARD,
    device="cpu",
    half=torch.float16,
    block=32,
    shapes=((64, 512),),
    odd=(24, 80, 8),
    checked=(1, 9, 17),
    few=(1, 9),
    many=(20,),
    model={"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 32, "layers": 1},
    batches=(1, 20),
    prompt=24,
    cycles={"exact": 1, "adam": 1},
    repeats=1,
)


class OutOfTimeError(Exception):
    """No row is begun any more."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where a part writes its rows, and until when it begins any."""

    setting: Setting
    folder: Path
    until: float

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a file says, measured first where it is missing."""
        file = self.folder / f"{name.replace(' ', '-')}.json"
        if not file.exists():
            if time.monotonic() > self.until:
                raise OutOfTimeError
            print(f"{name} …", flush=True)
            found = {"card": card(self.setting), "torch": torch.__version__, **measure()}
            write_whole(file, (json.dumps(found, indent=1) + "\n").encode())
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


def card(setting: Setting) -> str:
    return torch.cuda.get_device_name() if setting.device == "cuda" else "dry run"


_made: dict[tuple[tuple[int, int], str, int | None], PackedLinear] = {}


def made_up(setting: Setting, shape: tuple[int, int], core: str, block: int | None = None) -> PackedLinear:
    """A layer on the card, its floats in the half precision of the setting."""
    size, made = block or setting.block, _made.get((shape, core, block))
    if made is not None:
        return made
    if core == "int4" and shape[1] % 64:
        raise ValueError(f"made-up int4 cores have groups of 64 columns, which do not divide {shape[1]}")
    with torch.device(setting.device):
        generator = torch.Generator(setting.device).manual_seed(0)
        layer = made_up_layer(*shape, core, generator).to(setting.half)
        a, b = (
            (torch.eye(size) + 0.1 * torch.randn(side // size, size, size, generator=generator)).to(setting.half)
            for side in shape
        )
    made = _made[shape, core, block] = replace(layer, a=a, b=b)
    return made


def inputs(setting: Setting, tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    return x.to(setting.device, setting.half)


def microseconds(setting: Setting, run: Callable[[], object], *, cold: bool = True) -> float:
    if setting.device == "cuda":
        return gpu_microseconds(run, setting.repeats, cold=cold)
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)


def synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def host_microseconds(setting: Setting, run: Callable[[], object]) -> float:
    """How long a call keeps the CPU busy, which goes ahead of the GPU: the mean of calls in a row."""
    for _ in range(2):
        run()
    synchronize(setting)
    start = time.perf_counter()
    for _ in range(setting.repeats):
        run()
    taken = time.perf_counter() - start
    synchronize(setting)
    return 1e6 * taken / setting.repeats


# Right


def check(part: Part) -> None:
    """All layers and kernels; what is wrong ends the program with exit code 1."""
    setting = part.setting
    rows, columns, block = setting.odd
    cases = [(shape, setting.block, CORES) for shape in setting.shapes[:3]]
    for shape, size, cores in [((rows, columns), block, ("bf16", "int8")), *cases]:
        for core in cores:
            name = f"check {core} {shape[0]}x{shape[1]}"
            part.row(name, partial(check_layer, setting, shape, size, core))
    part.row("check 8 bits", partial(check_8_bits, setting))


@torch.inference_mode()
def check_layer(setting: Setting, shape: tuple[int, int], block: int, core: str) -> dict[str, Any]:
    """Relative errors of a layer by dtype and tokens, and of the core by plan."""
    from armor_recipes.runtime.triton_kernel import apply_factor, run_core

    stored, reference, errors = made_up(setting, shape, core, block), choose_backend("reference"), {}
    wide = stored.to(torch.float32)  # exact
    dense = reference.prepare(wide, "layer")
    for dtype in {torch.float16: (torch.float16, torch.float32)}.get(setting.half, tuple(MOST_ERROR)):
        layer = stored.to(dtype)
        prepared = cuda.prepare_cuda(layer, "layer")
        for tokens in setting.checked:
            x = inputs(setting, tokens, shape[1]).to(dtype)
            truth = reference.run(x.float(), dense, wide, None)
            y = cuda.run_cuda(x, prepared, layer, None)
            errors[f"{dtype} {tokens}"] = right(f"{shape} {core} {dtype} {tokens} tokens", y, truth, MOST_ERROR[dtype])
    laid, x = lay_out(stored), inputs(setting, setting.few[-1], shape[1])
    inner = apply_input_factor(x.float(), wide.b).to(setting.half)
    truth = apply_input_factor(nn.functional.linear(inner.float(), dense), wide.a)
    for plan in core_plans(stored):
        assert isinstance(plan, CorePlan)
        y = run_core(inner, laid, stored, plan)
        y = y if plan.fused else apply_factor(y, stored.a, splits=plan.splits)
        errors[str(plan)] = right(f"{shape} {core} {plan}", y, truth, MOST_ERROR[setting.half])
    return {"errors": errors}


def check_8_bits(setting: Setting) -> dict[str, Any]:
    """B in int8, and in fp8 where the card has it, against `round_activations`."""
    from armor_recipes.runtime.triton_kernel import apply_factor_in_8_bits

    layer, errors = made_up(setting, setting.shapes[0], "bf16"), {}
    x = inputs(setting, setting.few[-1], setting.shapes[0][1])
    for numbers in ("int8", "fp8") if has_fp8(setting) else ("int8",):
        y, scale = apply_factor_in_8_bits(x, layer.b, numbers)
        truth = round_activations(apply_input_factor(x.float(), layer.b.float()), numbers)
        # A number that rounding of Bx moves over the middle of two steps is a whole step off.
        errors[numbers] = right(f"B in {numbers}", y.float() * scale[:, None], truth, 2e-2)
    return {"errors": errors}


def has_fp8(setting: Setting) -> bool:
    """Not in the interpreter either, which rounds to fp8 otherwise than a card (`tests/runtime/test_triton_kernel.py`)."""
    return setting.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def right(what: str, y: Tensor, truth: Tensor, most: float) -> float:
    error = float((y.float() - truth).norm() / truth.norm())
    if not error < most:
        raise SystemExit(f"{what}: error {error:.2e}, must be < {most}")
    return error


# Fast


@torch.inference_mode()
def tuned(part: Part) -> None:
    """Few tokens first: shapes by turns, so that what is cut off is the last shape."""
    setting = part.setting
    for tokens in (setting.few[-2], setting.few[-1]):
        for shape in setting.shapes:
            for core in CORES:
                name = f"tune {core} {shape[0]}x{shape[1]} {tokens}"
                part.row(name, partial(tune_core, setting, shape, core, tokens))
            part.row(f"tune factors {shape[0]}x{shape[1]} {tokens}", partial(tune_factors, setting, shape, tokens))
    for tokens in setting.many:
        for shape in setting.shapes:
            part.row(f"tune factors {shape[0]}x{shape[1]} {tokens}", partial(tune_factors, setting, shape, tokens))


def tune_core(setting: Setting, shape: tuple[int, int], core: str, tokens: int) -> dict[str, Any]:
    """The core and what adds up its parts and multiplies by A are timed together: one is as fast as the other lets it be."""
    from armor_recipes.runtime.triton_kernel import apply_factor, run_core

    layer = made_up(setting, shape, core)
    laid, x = lay_out(layer), inputs(setting, tokens, shape[1])

    def run(plan: object) -> Tensor:
        assert isinstance(plan, CorePlan)
        y = run_core(x, laid, layer, plan)
        return y if plan.fused else apply_factor(y, layer.a, splits=plan.splits)

    key = core_key(layer, tokens)
    times = tune(core_plans(layer), key, layer.a.device, run, partial(microseconds, setting))
    return {"key": key, "microseconds": {str(plan): found for plan, found in times.items()}}


def tune_factors(setting: Setting, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """B and A of a shape."""
    from armor_recipes.runtime.triton_kernel import apply_factor

    layer, found = made_up(setting, shape, "bf16"), {}
    for factor in (layer.b, layer.a):
        x = inputs(setting, tokens, factor.shape[0] * factor.shape[1])

        def run(plan: object, factor: Tensor = factor, x: Tensor = x) -> Tensor:
            assert isinstance(plan, FactorPlan)
            return apply_factor(x, factor, plan=plan)

        key = factor_key(factor, tokens)
        times = tune(factor_plans(factor, tokens), key, factor.device, run, partial(microseconds, setting))
        found[key] = {str(plan): taken for plan, taken in times.items()}
    return {"microseconds": found}


def layers(part: Part, *, few: bool) -> None:
    setting = part.setting
    for shape in setting.shapes:
        for tokens in setting.few if few else setting.many:
            part.row(f"layer {shape[0]}x{shape[1]} {tokens}", partial(time_layer, setting, shape, tokens))


@torch.inference_mode()
def time_layer(setting: Setting, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Cold, warm and host microseconds by contender; of one that this torch or card does not run, why."""
    x = inputs(setting, tokens, shape[1])
    weight = torch.randn(shape, device=setting.device, dtype=setting.half)
    contenders: dict[str, Callable[[], Callable[[], object]]] = {
        "dense": lambda: partial(nn.functional.linear, x, weight),
        "dense fp8": lambda: dense_fp8(x, weight),
        "2:4": lambda: partial(nn.functional.linear, x, semi_structured(made_up(setting, shape, "bf16"))),
        **{f"ARMOR {core}": partial(armor, setting, shape, core, x) for core in CORES},
        **{f"{name} alone": partial(armor_piece, setting, shape, name, x) for name in ("B", "S", "A")},
    }
    return {"shape": shape, "block": setting.block, "tokens": tokens, "times": times_of(setting, contenders)}


def times_of(
    setting: Setting, contenders: Mapping[str, Callable[[], Callable[[], object]]]
) -> dict[str, dict[str, float] | str]:
    found: dict[str, dict[str, float] | str] = {}
    for name, make in contenders.items():
        try:
            run = make()
            found[name] = {
                "cold": microseconds(setting, run),
                "warm": microseconds(setting, run, cold=False),
                "host": host_microseconds(setting, run),
            }
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if name.startswith("ARMOR") or name == "dense":
                raise
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found


def armor(setting: Setting, shape: tuple[int, int], core: str, x: Tensor) -> Callable[[], object]:
    layer = made_up(setting, shape, core)
    return partial(cuda.run_cuda, x, cuda.prepare_cuda(layer, core), layer, None)


def armor_piece(setting: Setting, shape: tuple[int, int], name: str, x: Tensor) -> Callable[[], object]:
    """Of a layer with a bf16 core."""
    from armor_recipes.runtime.triton_kernel import apply_factor, run_core, unpack_core

    layer, few = made_up(setting, shape, "bf16"), x.shape[0] <= cuda.MOST_TOKENS
    if name == "S":
        laid = lay_out(layer)
        return (lambda: run_core(x, laid, layer)) if few else (lambda: nn.functional.linear(x, unpack_core(layer)))
    factor = layer.b if name == "B" else layer.a
    y = inputs(setting, x.shape[0], factor.shape[0] * factor.shape[1])
    return partial(apply_factor, y, factor)


def dense_fp8(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """The product alone: x comes as fp8."""
    eight, scale = torch.float8_e4m3fn, torch.ones((), device=x.device)
    left, right_side = x.to(eight), weight.to(eight).t()
    return lambda: torch._scaled_mm(left, right_side, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


def semi_structured(layer: PackedLinear) -> Tensor:
    """The core as torch's own 2:4 tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        return torch.sparse.to_sparse_semi_structured(layer.unpack()[0].to(layer.dtype))


# Whole models


def models(part: Part) -> None:
    for name in ("dense", "ARMOR bf16", "ARMOR int8", "ARMOR int4"):
        part.row(f"model {name}", partial(time_model, part.setting, name))
    if torch.backends.cusparselt.is_available():
        part.row("model 2of4", partial(time_model, part.setting, "2:4"))


@torch.inference_mode()
def time_model(setting: Setting, name: str) -> dict[str, Any]:
    """Tokens a second by batch, and the most bytes beside what was there before."""
    before = 0
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = made_up_model(setting, name)
    vocabulary = setting.model["vocab_size"]
    speeds = {}
    for batch, length in [*((batch, 1) for batch in setting.batches), (1, setting.prompt)]:
        ids = torch.arange(batch * length).view(batch, length).remainder(vocabulary).to(setting.device)
        run = partial(model, ids, use_cache=False, logits_to_keep=1)
        speeds[f"{batch} x {length}"] = {"eager": eager(setting, run, ids), "graph": in_graph(setting, run, ids)}
    peak = torch.cuda.max_memory_allocated() - before if setting.device == "cuda" else 0
    return {"model": name, "tokens_per_second": speeds, "peak_bytes": peak}


def eager(setting: Setting, run: Callable[[], object], ids: Tensor) -> float:
    times = []
    for _ in range(5):
        synchronize(setting)
        start = time.perf_counter()
        run()
        synchronize(setting)
        times.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(times[1:])


def in_graph(setting: Setting, run: Callable[[], object], ids: Tensor) -> float | str:
    if setting.device != "cuda":
        return "not in a dry run"
    try:
        graph = captured(run)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return eager(setting, graph.replay, ids)


def made_up_model(setting: Setting, name: str) -> Any:
    """A Llama whose linear layers, but for the head, hold made-up weights of one kind, each in memory of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = dict(setting.model)
    config = LlamaConfig(num_hidden_layers=fields.pop("layers"), max_position_embeddings=setting.prompt, **fields)
    with torch.device(setting.device):
        model: Any = LlamaForCausalLM(config)
    model.to(setting.half).eval()
    core = "bf16" if name == "2:4" else name.removeprefix("ARMOR ")
    for linear in [part for part in model.model.modules() if type(part) is nn.Linear] if name != "dense" else []:
        layer = made_up(setting, (linear.out_features, linear.in_features), core)
        scale = None if layer.scale is None else layer.scale.clone()
        own = PackedLinear(layer.values.clone(), layer.bitmask.clone(), layer.a.clone(), layer.b.clone(), scale)
        if name == "2:4":
            linear.weight = nn.Parameter(semi_structured(own), requires_grad=False)
        else:
            ArmorLinear.from_packed(linear, own)
    set_backend(model, "cuda")
    return model


# The solver


def solvers(part: Part) -> None:
    for solver in part.setting.cycles:
        part.row(f"solver {solver}", partial(time_solver, part.setting, solver))


def time_solver(setting: Setting, solver: str) -> dict[str, Any]:
    """Seconds of one solve, after a short one that does not count."""
    generator, shape = torch.Generator().manual_seed(0), setting.shapes[0]
    weight = torch.randn(shape, generator=generator).to(setting.device)
    moments = torch.exp(torch.randn(shape[1], generator=generator)).to(setting.device)
    solve = partial(factorize, weight, moments, block_size=setting.block, solver=solver, seed=0)
    solve(iterations=1)
    synchronize(setting)
    start = time.perf_counter()
    solve(iterations=setting.cycles[solver])
    synchronize(setting)
    taken = time.perf_counter() - start
    return {"solver": solver, "shape": shape, "iterations": setting.cycles[solver], "seconds": taken}


PARTS: dict[str, tuple[int, Callable[[Part], None]]] = {
    "check": (110, check),
    "tune": (150, tuned),
    "few": (70, partial(layers, few=True)),
    "many": (80, partial(layers, few=False)),
    "model": (100, models),
    "solver": (30, solvers),
}
"""Seconds, and what is done."""


# Tables


def tables(rows: Mapping[str, Mapping[str, Any]]) -> str:
    errors = [error for row in rows.values() for error in row.get("errors", {}).values()]
    parts = [f"checked: {len(errors)}, largest relative error {max(errors, default=0.0):.1e}"]
    found = [row for row in rows.values() if "times" in row]
    found.sort(key=lambda row: (row["shape"], row["tokens"]))
    if found:
        parts += [layer_table(found), ratio_table(found)]
    for row in rows.values():
        if "tokens_per_second" in row:
            speeds = ", ".join(f"{work}: {_speed(speed)}" for work, speed in row["tokens_per_second"].items())
            parts.append(f"{row['model']}: {row['peak_bytes'] / 1e6:.0f} MB at most; tokens a second (graph) {speeds}")
        if "solver" in row:
            parts.append(f"{row['solver']}: {row['seconds']:.3f} s for {row['iterations']} iterations")
    return "\n\n".join(parts)


def _speed(speed: Mapping[str, float | str]) -> str:
    graph = speed["graph"]
    return f"{speed['eager']:.0f} ({graph if isinstance(graph, str) else f'{graph:.0f}'})"


def layer_table(rows: list[Mapping[str, Any]]) -> str:
    names = list(rows[0]["times"])
    lines = ["| µs cold / warm (CPU) | tokens | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        cells = []
        for times in (row["times"].get(name, "") for name in names):
            cells.append("–" if isinstance(times, str) else "{cold:.1f} / {warm:.1f} ({host:.0f})".format(**times))
        lines.append(f"| {row['shape'][0]}x{row['shape'][1]} | {row['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_table(rows: list[Mapping[str, Any]]) -> str:
    """By number of tokens: how many times as fast as dense, cold, the median over the shapes."""
    names = ["2:4", *(f"ARMOR {core}" for core in CORES)]
    lines = [
        "| tokens | " + " | ".join(f"{name} / {base}" for base in ("dense", "dense fp8") for name in names) + " |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        mine = [row["times"] for row in rows if row["tokens"] == tokens]
        cells = []
        for base in ("dense", "dense fp8"):
            for name in names:
                pairs = [(times[base], times[name]) for times in mine if name in times]
                ratios = [b["cold"] / n["cold"] for b, n in pairs if isinstance(b, dict) and isinstance(n, dict)]
                cells.append(f"{statistics.median(ratios):.2f}" if ratios else "–")
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def do_part(name: str, setting: Setting, folder: Path, seconds: float) -> None:
    if setting.device != "cuda":
        cuda._check_device = lambda *_: None  # the interpreter's tensors are the CPU's
    try:
        PARTS[name][1](Part(setting, folder, time.monotonic() + seconds))
    except OutOfTimeError:
        raise SystemExit(UNFINISHED) from None


def run_parts(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Each part in a process of its own: what breaks one, or a GPU's state, breaks no other."""
    ends, until = {}, time.monotonic() + options.seconds
    for name in options.only:
        limit = min(PARTS[name][0] if not options.dry else options.seconds, until - time.monotonic())
        if limit < 5:
            ends[name] = "no time was left"
            continue
        command = [sys.executable, __file__, "--part", name, "--folder", str(folder), "--limit", str(0.85 * limit)]
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if options.dry else {})
        try:
            done = subprocess.run([*command, *["--dry"] * options.dry], env=environment, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            ends[name] = f"stopped after {limit:.0f} s"
            continue
        ends[name] = {0: "done", UNFINISHED: "unfinished"}.get(done.returncode, f"failed, {done.returncode}")
        if name == "check" and ends[name].startswith("failed"):
            break  # what is wrong need not be fast
    return ends


def main() -> None:
    """Run the parts, then print the tables of all rows; without a GPU, say so and return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--seconds", type=float, default=540.0, help="for all parts")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="in Triton's interpreter, on tiny shapes")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = DRY if options.dry else CARD
    if options.part:
        do_part(options.part, setting, options.folder, options.limit)
        return
    if not options.dry and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was checked")
        return
    folder = options.results / "-".join(re.findall(r"[\w.]+", card(setting)))
    folder.mkdir(parents=True, exist_ok=True)
    ends = run_parts(options, folder)
    rows = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("*-*.json"))
        if file.is_file()
    }
    content = {"card": card(setting), "parts": ends, "rows": rows}
    write_whole(folder / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    print(tables(rows), *(f"{name}: {end}" for name, end in ends.items()), sep="\n\n")
    if any(end.startswith("failed") for end in ends.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
