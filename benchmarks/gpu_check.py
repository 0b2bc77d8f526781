"""The backend `cuda` on a GPU: whether it is right, and times of layers, models and the solver. Without a GPU: one line.

    python benchmarks/gpu_check.py --work FOLDER [--results benchmarks/results/gpu] [--layers 2] [--repeats 50]

Layers have the shapes of Llama-7B and block 128. `check` compares every dtype, core and number of tokens with the backend
`reference` in float32, and ends the program where the error is too large. `layer` times dense bf16, the bare 2:4 product of
torch (where it has cuSPARSELt) and ARMOR by core type: what the GPU needs for a call, captured in a CUDA graph and timed with
events after the cache was overwritten, the median of `--repeats`; and how long a call keeps the CPU busy. `model` makes the
generated models of `runtime.py` in `--work` where they are missing (on the CPU, some GB) and runs them: 64 new tokens after a
context of 128, one prompt of 512, and the most memory that torch allocated. `solver` is five cycles of `exact` and fifty steps
of `adam` on 4096x4096. A row is one JSON file in a folder named after the card; rows that exist are not measured again. Without
a GPU the exit code is 0, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel import CORES, made_up_layer
from runtime import CONTEXT, NEW, PROMPT, Contender, generated_model
from torch import Tensor
from transformers import DynamicCache

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.integrations.transformers import load
from armor_recipes.runtime.backends import choose_backend
from armor_recipes.runtime.cuda import prepare_cuda, run_cuda
from armor_recipes.solver import factorize

DEVICE = "cuda"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
BLOCK = 128
TOKENS = (1, 8, 64, 512, 2048)
CHECKED_TOKENS = (1, 8, 16, 17, 512)
#: Relative error (Frobenius) that a right layer stays below: a rounding for each of B, S and A.
MOST_ERROR = {torch.bfloat16: 1.2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
CYCLES = {"exact": 5, "adam": 50}
_CACHE_BYTES = 256 << 20
"""Written before each call that is timed; larger than any card's cache, so that weights come from memory."""


def made_up(shape: tuple[int, int], core: str) -> PackedLinear:
    """A layer at block 128 on the GPU, its floats in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    layer = made_up_layer(*shape, core, generator)
    a, b = (
        (torch.eye(BLOCK) + 0.1 * torch.randn(side // BLOCK, BLOCK, BLOCK, generator=generator)).bfloat16().to(DEVICE)
        for side in shape
    )
    scale = None if layer.scale is None else layer.scale.to(DEVICE)
    return replace(layer, values=layer.values.to(DEVICE), bitmask=layer.bitmask.to(DEVICE), a=a, b=b, scale=scale)


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(DEVICE, torch.bfloat16)


@torch.inference_mode()
def check(shape: tuple[int, int]) -> dict[str, Any]:
    """Relative errors by core, dtype and number of tokens. Ends the program where one is too large."""
    errors, reference = {}, choose_backend("reference")
    for core in CORES:
        stored = made_up(shape, core)
        wide = stored.to(torch.float32)  # exact
        dense = reference.prepare(wide, "layer")
        for dtype, most in MOST_ERROR.items():
            layer = stored.to(dtype)
            prepare_cuda(layer, "layer")
            for tokens in CHECKED_TOKENS:
                x = inputs(tokens, shape[1])
                truth = reference.run(x.float(), dense, wide, None)
                error = float((run_cuda(x.to(dtype), None, layer, None).float() - truth).norm() / truth.norm())
                if not error < most:
                    raise SystemExit(f"{shape}, {core}, {dtype}, {tokens} tokens: error {error:.2e}, must be < {most}")
                errors[f"{core} {dtype} {tokens}"] = error
    return {"shape": shape, "errors": errors}


def gpu_microseconds(run: Callable[[], Tensor], repeats: int) -> float:
    """What the GPU needs for a call: the median over replays of a graph of it, each after the cache was overwritten."""
    cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=DEVICE)
    graph = captured(run)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(1e3 * statistics.median(times))


def captured(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of one call, after calls on another stream that compile what has to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph


def cpu_microseconds(run: Callable[[], Tensor], repeats: int) -> float:
    """How long a call keeps the CPU busy, which goes ahead of the GPU: the mean of calls in a row."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / repeats


@torch.inference_mode()
def time_layers(shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Microseconds of GPU and CPU by contender and number of tokens; `2:4` is missing where torch has no such product."""
    layers = {core: made_up(shape, core) for core in CORES}
    for core, layer in layers.items():
        prepare_cuda(layer, core)
    weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    pruned = semi_structured(layers["bf16"]) if torch.backends.cusparselt.is_available() else None
    times: dict[str, dict[str, tuple[float, float]]] = {}
    for tokens in TOKENS:
        x = inputs(tokens, shape[1])
        contenders: dict[str, Callable[[], Tensor]] = {"dense": partial(torch.nn.functional.linear, x, weight)}
        if pruned is not None:
            contenders["2:4"] = partial(torch.nn.functional.linear, x, pruned)
        for core in CORES:
            contenders[f"ARMOR {core}"] = partial(run_cuda, x, None, layers[core], None)
        times[str(tokens)] = {
            name: (gpu_microseconds(run, repeats), cpu_microseconds(run, repeats)) for name, run in contenders.items()
        }
    return {"shape": shape, "block": BLOCK, "microseconds": times}


def semi_structured(layer: PackedLinear) -> Tensor:
    """The core as torch's own 2:4 tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        return torch.sparse.to_sparse_semi_structured(layer.unpack()[0].to(layer.dtype))


@torch.inference_mode()
def time_model(contender: Contender) -> dict[str, Any]:
    """Tokens per second of one model, and the most bytes that it took beside what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if contender.backend is None:
        model: Any = contender.load().to(DEVICE)
    else:
        model = load(contender.folder, backend=contender.backend, device=DEVICE)
    loaded = torch.cuda.memory_allocated() - before
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator).to(DEVICE)
    prefill = [seconds(lambda: step(model, prompt, DynamicCache(config=model.config))) for _ in range(4)]
    decode = [seconds(partial(decoded, model, cache, token)) for cache, token in contexts(model, prompt, 4)]
    return {
        "folder": contender.folder.name,
        "backend": contender.backend or "stock",
        "prefill_tokens_per_second": PROMPT / statistics.median(prefill[1:]),  # the first warms up
        "decode_tokens_per_second": NEW / statistics.median(decode[1:]),
        "loaded_bytes": loaded,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }


def contexts(model: Any, prompt: Tensor, count: int) -> list[tuple[DynamicCache, Tensor]]:
    """Caches that hold the context, each with the next token `(1, 1)`."""
    found = []
    for _ in range(count):
        cache = DynamicCache(config=model.config)
        found.append((cache, step(model, prompt[:, :CONTEXT], cache)))
    return found


def decoded(model: Any, cache: DynamicCache, token: Tensor) -> None:
    for _ in range(NEW):
        token = step(model, token, cache)


def step(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The most likely next token `(1, 1)`."""
    # By position: transformers 5.24 has another name for the cache.
    logits = model(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits
    next_token: Tensor = logits[:, -1:].argmax(-1)
    return next_token


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def time_solver(solver: str) -> dict[str, Any]:
    """Seconds of one solve on the GPU, after a short one that does not count."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPES[0], generator=generator).to(DEVICE)
    moments = torch.exp(torch.randn(SHAPES[0][1], generator=generator)).to(DEVICE)
    solve = partial(factorize, weight, moments, block_size=BLOCK, solver=solver, seed=0)
    solve(iterations=1)
    taken = seconds(lambda: solve(iterations=CYCLES[solver]))
    return {"solver": solver, "shape": SHAPES[0], "block": BLOCK, "iterations": CYCLES[solver], "seconds": taken}


def row(folder: Path, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file says, measured first where it is missing."""
    file = folder / f"{name.replace(' ', '-').replace(':', '')}.json"
    if not file.exists():
        print(f"{name} …", flush=True)
        found = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, **measure()}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def layer_table(rows: Sequence[dict[str, Any]]) -> str:
    names = ("dense", "2:4", *(f"ARMOR {core}" for core in CORES))
    lines = ["| GPU (CPU) µs | tokens | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for found in rows:
        for tokens, times in found["microseconds"].items():
            cells = ("{:.0f} ({:.0f})".format(*times[name]) if name in times else "-" for name in names)
            lines.append(f"| {found['shape'][0]}x{found['shape'][1]} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | backend | decode tok/s | prefill tok/s | MB loaded | MB at most |", "|---|---|---|---|---|---|"]
    for name, found in rows.items():
        speeds = (f"{found[f'{work}_tokens_per_second']:.1f}" for work in ("decode", "prefill"))
        sizes = (f"{found[f'{size}_bytes'] / 1e6:.0f}" for size in ("loaded", "peak"))
        lines.append(f"| {name} | {found['backend']} | " + " | ".join([*speeds, *sizes]) + " |")
    return "\n".join(lines)


def model_contenders(work: Path, layers: int) -> dict[str, Contender]:
    model = generated_model(work, layers, BLOCK)
    packed = {f"{core} core": Contender(folder, "cuda") for core, folder in model.cores.items()}
    return {"dense": Contender(model.dense, None), "folded": Contender(model.cores["bf16"], "folded"), **packed}


def report(folder: Path, options: argparse.Namespace) -> str:
    """Measure what is missing, checks first, and return the tables as Markdown."""
    checks = [row(folder, f"check {r}x{c}", partial(check, (r, c))) for r, c in SHAPES]
    worst = max(max(found["errors"].values()) for found in checks)
    layers = [row(folder, f"layer {r}x{c}", partial(time_layers, (r, c), options.repeats)) for r, c in SHAPES]
    parts = [f"{torch.cuda.get_device_name()}: all right, largest relative error {worst:.1e}", layer_table(layers)]
    if options.layers:
        contenders = model_contenders(options.work, options.layers)
        names = {name: f"model {options.layers} {name}" for name in contenders}
        parts.append(
            model_table({name: row(folder, names[name], partial(time_model, one)) for name, one in contenders.items()})
        )
    for solver in CYCLES:
        found = row(folder, f"solver {solver}", partial(time_solver, solver))
        parts.append(f"{solver}: {found['seconds']:.2f} s for {found['iterations']} iterations on 4096x4096")
    return "\n\n".join(parts)


def main() -> None:
    """Measure the rows that are missing, then print the tables of all; without a GPU, say so and return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/gpu-check"), help="where models are made")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--layers", type=int, default=2, help="of the generated model; 0 for none")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was checked")
        return
    card = "-".join(re.findall(r"[\w.]+", torch.cuda.get_device_name()))
    folder = options.results / card
    folder.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    print(report(folder, options))


if __name__ == "__main__":
    main()
