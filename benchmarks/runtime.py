"""Whole models on the CPU: tokens per second, memory and disk of every core type, against the same model dense.

    python benchmarks/runtime.py --checkpoint out/smollm2-135m-armor --dense models/smollm2-135m-instruct --work FOLDER

Two models: the checkpoint given, and a Llama with the shapes of the 7B (hidden 4096, intermediate 11008, 32 heads, vocabulary
32,000, a head of its own, `--layers` layers) with generated weights, factored by a recipe with one cycle at block 64; and one
layer of it at block 128, for its size. Models that are missing in `--work` are made first (12 GB).

`dense by our kernels` is the dense folder by `armor_recipes.load(folder, backend="auto")`, whose plain layers and attention run by
kernels of this package, too: what a row of ours is above that is by 2:4, and not by them.
A row has a process of its own, and so has the dense model that it is compared with: the two take turns, and a ratio is the median
of the ratios within turns. `decode` is 64 new tokens one by one after a context of 128, `prefill` one pass over 512 tokens with the
logits of the last. `anonymous` is the most anonymous memory that the process had at any time, above what it had after its imports,
sampled every 5 ms; `resident` counts the pages of mapped files, too, which is where transformers leaves weights that it need not
convert. `cpu load` is both of a process that does no more than load with `backend="cpu"`, in sizes of the file.
A row is one JSON file; rows that exist are not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from losses import Row, show
from quantizing import CORES, calibration_of, quantise
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from turns import interval

import armor_recipes
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.checkpoint.reader import inspect, read_layers
from armor_recipes.checkpoint.staging import staged
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.integrations.transformers import load
from armor_recipes.modifiers.plain import quantized
from armor_recipes.runtime import auto
from armor_recipes.solver.quantize import kept, round_to_nearest

CONTEXT, NEW, PROMPT = 128, 64, 512
HEAD = Scheme.of(QuantizationScheme(targets=[], weights=QuantizationArgs(num_bits=8, strategy="channel")))
SAMPLING_SECONDS = 0.005
#: Of the generated model. Its figures depend on shapes alone, so few tokens will do, and one cycle.
FEW_TOKENS = {"dataset": "builtin:random-tokens", "samples": 2, "sequence_length": 16, "batch_size": 2}
FACTORED = {"targets": [r"re:.*(self_attn|mlp)\..*_proj$"], "iterations": 1, "propagate": "dense"}
#: Cores beside bf16: weights alone, which the compiled kernel runs.
INTEGERS = {core: CORES[core] for core in ("int8", "int4")}
ROWS = ("dense", "dense by our kernels", "folded", "bf16 core", "int8 core", "int4 core")
Task = Literal["load", "prepare", "decode", "prefill", "choices"]
TOKENS: dict[Task, int] = {"decode": NEW, "prefill": PROMPT}
#: How numbers of a column are printed, by the last word of its name.
DIGITS = {"tok/s": ".2f", "dense": ".2f", "MB": ".0f"}


@dataclass(frozen=True, slots=True)
class Contender:
    """What one process loads: a folder, by stock transformers where `backend` is None."""

    folder: Path
    backend: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's weights."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def load(self) -> Any:
        """The model in its stored dtype, in evaluation mode."""
        if self.backend is None:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto").eval()
        return load(self.folder, backend=self.backend)


class Runner:
    """Does the work in the contender's process."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender

    def do(self, task: Task) -> Any:
        """`prepare` reads the context; `decode` and `prefill` return seconds; `choices` what `auto` took."""
        match task:
            case "load":
                self._model = self._contender.load()
            case "prepare":
                self._prepare()
            case "decode":
                return self._decode()
            case "prefill":
                return self._prefill()
            case "choices":
                return chosen()
        return None

    def _prepare(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._prompt = torch.randint(self._model.config.vocab_size, (1, PROMPT), generator=generator)
        self._cache = DynamicCache(config=self._model.config)
        self._run(self._prompt[:, :CONTEXT], self._cache)

    def _decode(self) -> float:
        token = self._prompt[:, CONTEXT : CONTEXT + 1]
        start = time.perf_counter()
        for _ in range(NEW):
            token = self._run(token, self._cache)
        seconds = time.perf_counter() - start
        self._cache.crop(-NEW)
        return seconds

    def _prefill(self) -> float:
        start = time.perf_counter()
        self._run(self._prompt, DynamicCache(config=self._model.config))
        return time.perf_counter() - start

    def _run(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """The most likely next token `(1, 1)`."""
        # By position: transformers 5.24 has another name for the cache.
        logits = self._model(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits
        next_token: Tensor = logits[:, -1:].argmax(-1)
        return next_token


def serve(pipe: Connection, contender: Contender, threads: int) -> None:
    """The contender's process: says that it has its imports, then does what it is told until the other end is closed."""
    torch.set_num_threads(threads)
    runner = Runner(contender)
    pipe.send(None)
    with torch.inference_mode(), suppress(EOFError):
        while True:
            pipe.send(runner.do(pipe.recv()))


def chosen() -> dict[str, str]:
    """What `auto` took for one token and for a long prompt, all shapes together; empty where it never had a choice."""
    found: dict[str, set[str]] = {}
    for situation, choice in auto.choices().items():
        work = {1: "decode", PROMPT: "prefill"}.get(situation.tokens)
        if work is not None:
            found.setdefault(work, set()).add(choice)
    return {work: ", ".join(sorted(names)) for work, names in found.items()}


class Process:
    """A contender's process, seen from here. `peak` is the most memory it had so far above that after its imports, in bytes."""

    def __init__(self, contender: Contender, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.contender = contender
        self.peak = {"anonymous": 0, "resident": 0}
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, contender, threads))
        self._process.start()
        theirs.close()
        self._pipe.recv()
        self._base = self._memory()

    def ask(self, task: Task) -> Any:
        """Have a task done and return its answer. Raises EOFError where the process ended instead; it says why itself."""
        self._pipe.send(task)
        while not self._pipe.poll(SAMPLING_SECONDS):
            self._sample()
        self._sample()
        return self._pipe.recv()

    def close(self) -> None:
        """Let it end."""
        self._pipe.close()
        self._process.join()

    def _sample(self) -> None:
        for kind, found in self._memory().items():
            self.peak[kind] = max(self.peak[kind], found - self._base[kind])

    def _memory(self) -> dict[str, int]:
        return memory_of(self._process.pid)


def memory_of(pid: int | str | None) -> dict[str, int]:
    """Bytes of a process by kind; none for one that has ended."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    kinds = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {kind: 1024 * int(sizes[name].split()[0]) for kind, name in kinds.items() if name in sizes}


@contextmanager
def process(contender: Contender, threads: int) -> Iterator[Process]:
    """A contender's process for the length of a block."""
    found = Process(contender, threads)
    try:
        yield found
    finally:
        found.close()


def measure(contender: Contender, dense: Contender, *, turns: int, threads: int) -> dict[str, Any]:
    """A row: times in turns with the dense model (unless it is the contender), memory and disk of both."""
    both = [contender] if contender == dense else [contender, dense]
    with ExitStack() as stack:
        runners = [stack.enter_context(process(one, threads)) for one in both]
        for runner in runners:
            runner.ask("load")
        load_peaks = [dict(runner.peak) for runner in runners]
        for runner in runners:
            runner.ask("prepare")
        turns_taken = [{work: [r.ask(work) for r in runners] for work in TOKENS} for _ in range(turns + 1)]
        sides = [
            {
                "folder": runner.contender.folder.name,
                "backend": runner.contender.backend or "stock",
                "seconds": {work: [turn[work][i] for turn in turns_taken[1:]] for work in TOKENS},  # the first warms up
                "peak_bytes": runner.peak,
                "load_peak_bytes": load_peaks[i],
                "disk_bytes": runner.contender.nbytes,
            }
            for i, runner in enumerate(runners)
        ]
        choices = runners[0].ask("choices")
    return {"own": sides[0], "dense": sides[-1], "choices": choices, "threads": threads}


def cpu_load_peak(folder: Path, threads: int) -> dict[str, int]:
    """Peaks of a process that only loads with `backend="cpu"`."""
    with process(Contender(folder, "cpu"), threads) as runner:
        runner.ask("load")
        return runner.peak


@dataclass(frozen=True, slots=True)
class Model:
    """A model in all its forms: the dense folder, and ARMOR folders by core type."""

    name: str
    dense: Path
    cores: Mapping[str, Path]

    def contenders(self) -> dict[str, Contender]:
        """Those of ROWS, by name."""
        packed = [Contender(folder, "auto") for folder in self.cores.values()]
        dense = [Contender(self.dense, backend) for backend in (None, "auto")]
        found = [*dense, Contender(self.cores["bf16"], "folded"), *packed]
        return dict(zip(ROWS, found, strict=True))


def generated(work: Path, layers: int, vocabulary: int = 32_000) -> Path:
    """A Llama with 7B shapes, each weight Gaussian of deviation 1/√(fan in), in bfloat16; made once."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        dtype="bfloat16",
    )
    return written(generated_folder(work, layers, vocabulary), config, gaussian)


def generated_folder(work: Path, layers: int, vocabulary: int = 32_000) -> Path:
    """Where that model lies."""
    suffix = "" if vocabulary == 32_000 else f"-vocabulary{vocabulary}"
    return work / f"llama-7b-shapes-{layers}{suffix}"


def gaussian(weight: Tensor, generator: torch.Generator) -> None:
    """Fill `(rows, fan in)` with deviation 1/√(fan in)."""
    weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)


def written(folder: Path, config: LlamaConfig, fill: Callable[[Tensor, torch.Generator], None]) -> Path:
    """A Llama in bfloat16 whose matrices `fill` fills, its vectors 1; made once."""
    if folder.exists():
        return folder
    print(f"making {folder} …", flush=True)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                fill(parameter, generator)
    with staged(folder, overwrite=False) as place:
        model.save_pretrained(place)
    return folder


def factored(dense: Path, block: int) -> Path:
    """The generated model factored by a recipe; made once."""
    folder = dense.with_name(f"{dense.name}-block{block}-bf16")
    if not folder.exists():
        print(f"making {folder} …", flush=True)
        armor_recipes.apply(
            {
                "model": {"id": str(dense), "compute_dtype": "bfloat16"},
                "calibration": FEW_TOKENS,
                "prune_stage": {"armor_modifiers": {"ARMORModifier": {**FACTORED, "block_size": block}}},
                "output": {"path": str(folder)},
            }
        )
    return folder


def with_cores(bf16: Path, place: Path, make: Callable[[Path, Mapping[str, Any]], None]) -> dict[str, Path]:
    """Folders by core type: `bf16`, and `place` with the core's name for the others, each made by `make` once."""
    folders = {"bf16": bf16}
    for core, fields in INTEGERS.items():
        folders[core] = place.with_name(f"{place.name}-{core}")
        if not folders[core].exists():
            print(f"making {folders[core]} …", flush=True)
            make(folders[core], fields)
    return folders


def generated_model(work: Path, layers: int, block: int) -> Model:
    """The generated model at one block size, all forms."""
    return packed_model(f"7B shapes, block {block}, layers: {layers}", generated(work, layers), block)


def packed_model(name: str, dense: Path, block: int, *, head: bool = False) -> Model:
    """A dense folder at one block size, all forms; its integers are the nearest ones with scales that reach the
    largest values: speed and size do not depend on them.

    With `head` the head beside an integer core is of 8-bit integers, too, one scale a row.
    """
    bf16 = factored(dense, block)

    def make(folder: Path, fields: Mapping[str, Any]) -> None:
        weights = fields["config_groups"]["core"]["weights"]
        size = weights.get("group_size")
        rounded(dense, bf16, folder, num_bits=weights["num_bits"], group_size=size and size // 2, head=head)

    place = bf16.with_name(bf16.name.removesuffix("-bf16") + ("-head8" if head else ""))
    return Model(name, dense, with_cores(bf16, place, make))


@torch.no_grad()
def rounded(dense: Path, packed: Path, folder: Path, *, num_bits: int, group_size: int | None, head: bool) -> None:
    """The folder `packed` with every kept value rounded to the nearest integer, A and B as they are."""
    layers = {}
    for name, layer in read_layers(packed).items():
        factors = layer.factors(name=name)
        values = kept(factors.core.float(), factors.mask)
        integers = round_to_nearest(
            values,
            torch.ones_like(values),
            num_bits=num_bits,
            group_size=group_size,
            dtype=layer.dtype,
            ratios=(1.0,),
        )
        layers[name] = PackedLinear.from_factors(replace(factors, quantized=integers), layer.dtype)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    plain = {"lm_head": quantized(model.lm_head.weight, HEAD, None)} if head else {}
    with staged(folder, overwrite=False) as place:
        write_checkpoint(model, layers, place, dtype=torch.bfloat16, quantized=plain)


def given_model(checkpoint: Path, dense: Path, work: Path) -> Model:
    """The checkpoint given, all forms; its cores are quantised on 8 windows of its recipe's calibration."""
    name = checkpoint.resolve().name

    def make(folder: Path, fields: Mapping[str, Any]) -> None:
        quantise(checkpoint, folder, fields, calibration_of(checkpoint, samples=8))

    return Model(name, dense, with_cores(checkpoint, work / name, make))


def speed_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Tokens per second, memory and disk of one model's rows, each as a ratio to the dense model's, too."""
    return [{"row": name, "runs": runs_on(row), **sizes_and_speeds(row)} for name, row in rows.items()]


def sizes_and_speeds(row: Mapping[str, Any]) -> Row:
    """A row's figures by their columns' names; ratios are medians within turns with 95 % intervals of the turns resampled."""
    own, dense, found = row["own"], row["dense"], Row()
    for work, tokens in TOKENS.items():
        mine, theirs = own["seconds"][work], dense["seconds"][work]
        ratios = [d / m for m, d in zip(mine, theirs, strict=True)]
        found[f"{work} tok/s"] = tokens / statistics.median(mine)
        found[f"{work} of dense"] = {"value": statistics.median(ratios), "interval": list(interval(ratios))}
    sizes = [{**side["peak_bytes"], "disk": side["disk_bytes"]} for side in (own, dense)]
    for kind, mine in sizes[0].items():
        found[f"{kind} MB"] = mine / 1e6
        found[f"{kind} of dense"] = mine / sizes[1][kind]
    peaks = row.get("cpu_load_peak_bytes", {}).values()
    return found | {"cpu load": ", ".join(f"{peak / own['disk_bytes']:.2f}" for peak in peaks) or None}


def runs_on(row: Mapping[str, Any]) -> str:
    """The backend, and what `auto` took of ARMOR layers; one that gave it no choice runs folded."""
    backend: str = row["own"]["backend"]
    if backend != "auto" or row["own"]["folder"] == row["dense"]["folder"]:
        return backend
    took = [f"{work} {names}" for work, names in row["choices"].items()]
    return f"auto: {'; '.join(took) or 'folded'}"


def size_table(models: Sequence[Model]) -> str:
    """Linear weights on disk relative to dense bfloat16, from the folders' headers, as Markdown."""
    cores = ["bf16", *INTEGERS]
    lines = ["| linear weights on disk, of dense | " + " | ".join(cores) + " |", "|---" * (1 + len(cores)) + "|"]
    for model in models:
        shares = []
        for core in cores:
            layers = inspect(model.cores[core]).layers
            shares.append(sum(layer.nbytes for layer in layers) / sum(layer.dense_nbytes for layer in layers))
        lines.append(f"| {model.name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return "\n".join(lines)


def plain_name(model: Model) -> str:
    """A model's name for a file."""
    return "-".join(re.findall(r"[\w.-]+", model.name))


def measured(model: Model, names: Iterable[str], results: Path, *, turns: int, threads: int) -> dict[str, Any]:
    """Rows by name: those named are measured unless their file exists, all that exist are returned."""
    folder = results / plain_name(model)
    folder.mkdir(parents=True, exist_ok=True)
    contenders, rows = model.contenders(), {}
    for name, contender in contenders.items():
        file = folder / f"{name.replace(' ', '-')}.json"
        if not file.exists() and name in names:
            print(f"{model.name}: {name} …", flush=True)
            row = measure(contender, contenders["dense"], turns=turns, threads=threads)
            if contender.backend == "auto":
                row["cpu_load_peak_bytes"] = cpu_load_peak(contender.folder, threads)
            file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        if file.exists():
            rows[name] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def main() -> None:
    """Make the models that are missing, measure the rows that are missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an ARMOR folder; left out, the generated model alone")
    parser.add_argument("--dense", type=Path, help="the dense folder that it was made from")
    parser.add_argument("--work", type=Path, required=True, help="where models are made")
    parser.add_argument("--layers", type=int, default=8, help="of the generated model; 0 for the checkpoint alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas; `none` measures nothing")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/runtime"))
    parser.add_argument("--json", type=Path, help="also write each table's rows here, as NAME-MODEL.json")
    options = parser.parse_args()
    wanted = [] if options.rows == "none" else options.rows.split(",")
    if not set(ROWS) >= set(wanted):
        parser.error(f"unknown rows in {options.rows!r}; rows are: {', '.join(ROWS)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the contenders; torch here has started already
    options.work.mkdir(parents=True, exist_ok=True)
    models, sizes = [], []
    if options.checkpoint is not None:
        if options.dense is None:
            parser.error("--checkpoint goes with --dense, the folder that it was made from")
        models.append(given_model(options.checkpoint, options.dense, options.work))
    if options.layers:
        models.append(generated_model(options.work, options.layers, 64))
        sizes.append(generated_model(options.work, 1, 128))  # sizes of all layers are alike
    for model in models:
        rows = measured(model, wanted, options.results, turns=options.turns, threads=options.threads)
        print(f"{model.name}\n")
        show(
            speed_rows(rows),
            DIGITS,
            options.json and options.json.with_stem(f"{options.json.stem}-{plain_name(model)}"),
        )
        print()
    print(size_table([*models, *sizes]))


if __name__ == "__main__":
    main()
