"""Our layers beside what people would pick instead, on a CPU: one run, the same shapes, in turns, ratios with intervals.

    python benchmarks/rivals.py --work FOLDER [--layers 8] [--vocabulary 49152] [--batch 1,8,32] [--turns 5] [--rows NAMES]
    python benchmarks/rivals.py --work FOLDER --checkpoint out/smollm2-135m-armor --dense models/smollm2-135m-instruct

The model is a Llama with the shapes of the 7B and generated weights, as in `benchmarks/runtime.py`, or the folders given. Rivals
are no dependencies of the project. Install those that are wanted beside it; a row whose rival is missing says so in the table:

    pip install 'gguf>=0.17' 'ctranslate2>=4.6' 'openvino>=2026.0' 'nncf>=3.3'
    npm install --prefix FOLDER/node --ignore-scripts 'node-llama-cpp@^3.22'  # llama.cpp, compiled; needs `node` 20 or later

`decode` is 64 tokens one by one after a context of 128 and a first token, `prompt` 512 tokens up to the first new one, both of
`batch` sequences at once, greedily. Each measurement is a process of its own that loads, warms up with as many sequences,
measures once and ends; in a turn each row has one, in the order of the table. What has a JSON file is not measured again.
Ratios are of times within a turn; the table has their medians and 95 % intervals from 10,000 bootstrap resamples of the turns.
`anonymous` and `resident` are the most that the process had at any time above what it had after its imports, sampled every 5 ms;
llama.cpp and transformers leave weights in the mapped file, which only `resident` counts. `weights` are bytes of files.

First each row is checked on a tiny Llama whose weights four bits hold exactly: the tokens that it generates in a batch, from a
prompt and its own cache, must be the most likely ones, or nearly, by transformers in float32 (ours: by the backend `reference`).

What differs, since the rivals do: the head has 8 bits in our integer rows, in Q8_0, Q4_0, CTranslate2's int8 and OpenVINO's
integers; of a checkpoint given it is as it was. A scale is of 64 columns in our int4 and OpenVINO's, of 32 in Q4_0. OpenVINO's
f16 computes in bf16 where the processor can; it keeps keys and values in 8 bits and rounds activations of integer layers, which
llama.cpp does, too. No rival has a product with 2:4 weights for CPUs without AMX: `plain 2:4` is ours without A and B, pruned by
magnitude. `dense by our kernels` is the dense folder by `armor_recipes.load`, so that what a row of ours is above it is by 2:4.
llama.cpp is called from JavaScript; what that costs at most is measured with a model of one tiny layer, and told below
the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from engines import write_ctranslate2
from gguf_files import write_gguf
from openvino_models import write_openvino
from runtime import (
    CONTEXT,
    FACTORED,
    FEW_TOKENS,
    NEW,
    PROMPT,
    SAMPLING_SECONDS,
    gaussian,
    generated,
    generated_folder,
    given_model,
    memory_of,
    packed_model,
    written,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from turns import DENSE, KERNELS, Row, figures, file_name, keep, origins, record_file, table, turns_in

import armor_recipes
from armor_recipes.checkpoint.staging import staged
from armor_recipes.integrations.exporting import export_folder

HERE = Path(__file__).parent
TOKENS = {"decode": NEW, "prompt": PROMPT}
OURS = {"ARMOR", "plain 2:4"}
#: Of the check: how far below the most likely token, in deviations of the logits, a token may be. Rounded activations gave up
#: to 0.05, rows of q and k in the wrong order 5.
TOLERANCE = 0.15
CHECKED = {"sequences": 2, "prompt": 24, "new": 24}


#: The forms of llama.cpp by our cores.
LIKE = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def rows_of(blocks: Sequence[int | None]) -> dict[str, Row]:
    """All rows by name, in the table's order; `blocks` are ARMOR's sizes, None for a checkpoint given."""
    rows = [
        DENSE,
        KERNELS,
        *(Row("ARMOR", core, like, block) for block in blocks for core, like in LIKE.items()),
        Row("plain 2:4", "bf16", "BF16"),
        *(Row("llama.cpp", like, like) for like in LIKE.values()),
        Row("CTranslate2", "bfloat16", "BF16"),
        Row("CTranslate2", "float32", "BF16"),
        Row("CTranslate2", "int8", "Q8_0"),
        Row("OpenVINO", "f16", "BF16"),
        Row("OpenVINO", "int8", "Q8_0"),
        Row("OpenVINO", "int4", "Q4_0"),
    ]
    return {row.name: row for row in rows}


def missing(row: Row, node: Path) -> str | None:
    """Why a row cannot be measured here."""
    needs = {"llama.cpp": ["gguf"], "CTranslate2": ["ctranslate2"], "OpenVINO": ["openvino"]}.get(row.engine, [])
    needs += ["nncf"] if row.engine == "OpenVINO" and row.form != "f16" else []
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (pip)"
    if row.engine == "llama.cpp":
        if shutil.which("node") is None:
            return "no `node` on PATH"
        if not (node / "package.json").exists():
            return f"not installed: node-llama-cpp (npm), looked for in {node}"
    if row.engine == "CTranslate2":
        import ctranslate2  # an optional rival

        kinds = sorted(ctranslate2.get_supported_compute_types("cpu"))
        if row.form not in kinds:
            return f"ctranslate2 {ctranslate2.__version__} has no {row.form} on this CPU, but {', '.join(kinds)}"
    return None


@dataclass(frozen=True, slots=True)
class Forms:
    """A model in the forms of all rows, each made when it is first asked for, in a process of its own."""

    dense: Path
    work: Path
    checkpoint: Path | None = None

    def path(self, row: Row) -> Path:
        """What the row's engine loads."""
        if row in (DENSE, KERNELS):
            return self.dense
        if row.engine == "ARMOR":
            return Path(alone(self._armor, row))
        ending = ".gguf" if row.engine == "llama.cpp" else ""
        place = self.work / f"{self.dense.resolve().name}-{file_name(row.name)}{ending}"
        if not place.exists():
            print(f"making {place} …", flush=True)
            alone(write, row, self.dense, place)
        return place

    def _armor(self, row: Row) -> Path:
        if self.checkpoint is not None:
            return given_model(self.checkpoint, self.dense, self.work).cores[row.form]
        assert row.block is not None
        return packed_model(self.dense.name, self.dense, row.block, head=True).cores[row.form]


def alone(do: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns that is made in a process of its own, whose memory is then given back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(do, *arguments).result()


def write(row: Row, dense: Path, place: Path) -> None:
    """Write the dense folder in a rival's form, whole or not at all."""
    match row.engine:
        case "plain 2:4":
            write_plain(dense, place)
        case "llama.cpp":
            write_gguf(dense, place, row.form)
        case "CTranslate2" | "OpenVINO":
            writer = write_ctranslate2 if row.engine == "CTranslate2" else write_openvino
            with staged(place, overwrite=False) as folder:
                writer(dense, folder, row.form)


def write_plain(dense: Path, folder: Path) -> None:
    """The model plain 2:4 by magnitude, packed as cores without A and B."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        pruned = Path(place) / "pruned"
        recipe = {
            "model": {"id": str(dense), "compute_dtype": "bfloat16"},
            "calibration": FEW_TOKENS,
            "prune_stage": {"plain_modifiers": {"MagnitudeModifier": {"targets": FACTORED["targets"]}}},
            "output": {"path": str(pruned)},
        }
        armor_recipes.apply(recipe)
        export_folder(pruned, folder, to="armor")


def measured(row: Row, path: Path, node: Path, jobs: Sequence[Mapping[str, Any]], *, threads: int) -> dict[str, Any]:
    """The answer of one process that does jobs, see `engines.py`, with `peak_bytes` above its memory after its imports.

    Raises:
        ChildProcessError: with its last words, where it fails.
    """
    own = ["node", str(HERE / "native" / "llama_cpp.mjs")]
    command = own if row.engine == "llama.cpp" else [sys.executable, str(HERE / "engines.py")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    spec = {
        "engine": row.engine,
        "path": str(path),
        "form": row.form,
        "package": str(node),
        "jobs": jobs,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as place:
        file, output, words = (Path(place) / name for name in ("spec.json", "output.json", "words"))
        file.write_text(json.dumps({**spec, "output": str(output)}), encoding="utf-8")
        peak: dict[str, int] = {}
        with words.open("wb") as log:
            child = subprocess.Popen([*command, str(file)], stdout=log, stderr=subprocess.STDOUT, env=environment)
            while child.poll() is None:
                for kind, nbytes in memory_of(child.pid).items():
                    peak[kind] = max(peak.get(kind, 0), nbytes)
                time.sleep(SAMPLING_SECONDS)
        if child.returncode:
            last = words.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ChildProcessError(f"its process ended with {child.returncode}: {''.join(last)}")
        answer: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    answer["peak_bytes"] = {kind: peak[kind] - answer["base"][kind] for kind in peak}
    return answer


def prompts(vocabulary: int, sequences: int, length: int) -> list[list[int]]:
    """Ids, the same for all rows; none of a tokenizer's special ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (sequences, length), generator=generator).tolist()


def vocabulary_of(dense: Path) -> int:
    """How many tokens a model knows."""
    return int(AutoConfig.from_pretrained(dense).vocab_size)


def check_model(work: Path) -> Path:
    """A tiny Llama whose weights are whole numbers from -8 to 7 times a power of two, with a -8 in each 32 of a row."""

    def whole(weight: Tensor, generator: torch.Generator) -> None:
        rows, columns = weight.shape
        found = torch.randint(-7, 8, (rows, columns // 32, 32), generator=generator)
        found.scatter_(2, torch.randint(32, (rows, columns // 32, 1), generator=generator), -8)
        weight.copy_(found.view(rows, columns) * 2.0 ** round(-math.log2(4.5 * columns**0.5)))

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
    )
    return written(work / "tiny-llama", config, whole)


def regret(row: Row, path: Path, dense: Path, node: Path) -> float:
    """How far the worst of the row's tokens is below the most likely one, in deviations of the reference's logits."""
    asked = prompts(vocabulary_of(dense), CHECKED["sequences"], CHECKED["prompt"])
    answer = measured(row, path, node, [{"prompts": asked, "new": CHECKED["new"]}], threads=1)
    reference = path if row.engine in OURS else None
    return float(alone(worst, reference, dense, asked, answer["jobs"][0]["tokens"]))


@torch.inference_mode()
def worst(armor: Path | None, dense: Path, asked: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> float:
    """See `regret`; the reference is the folder `armor` by the backend `reference`, or `dense` where there is none."""
    if armor is None:
        model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    else:
        model = armor_recipes.load(armor, backend="reference", dtype=torch.float32)
    new = torch.tensor(tokens)
    logits = model(torch.cat([torch.tensor(asked), new], dim=1)).logits[:, -1 - new.shape[1] : -1]
    below = logits.amax(-1) - logits.gather(2, new[..., None])[..., 0]
    return float((below / logits.std(-1)).max())


def jobs_of(tasks: Sequence[str], vocabulary: int, batch: int) -> list[dict[str, Any]]:
    """For each task one to warm up and the one that counts."""
    found: list[dict[str, Any]] = []
    if "decode" in tasks:
        found += [
            {"prompts": prompts(vocabulary, batch, length), "new": new} for length, new in ((8, 4), (CONTEXT, NEW + 1))
        ]
    if "prompt" in tasks:
        found += [{"prompts": prompts(vocabulary, batch, PROMPT), "new": 1}] * 2
    return found


def record(answer: Mapping[str, Any], tasks: Sequence[str], path: Path) -> dict[str, Any]:
    """What is kept of an answer."""
    part = {"decode": "rest", "prompt": "first"}
    counted = answer["jobs"][1::2]
    return {
        "seconds": {task: job[part[task]] for task, job in zip(tasks, counted, strict=True)},
        "peak_bytes": answer["peak_bytes"],
        "weight_bytes": weight_bytes(path),
        "info": answer["info"],
        "load_average": os.getloadavg()[0],
    }


def weight_bytes(path: Path) -> int:
    """Of a model's weights in its files."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in {".safetensors", ".bin"}]
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True, slots=True)
class Contest:
    """A dense model and its forms by row, at one batch size; records lie in `folder`."""

    dense: Path
    paths: Mapping[Row, Path]
    folder: Path
    batch: int
    tasks: Sequence[str]
    threads: int
    node: Path

    def turn(self, number: int) -> dict[str, str]:
        """Measure each row that this turn has not, in order; returns what failed, with the reason."""
        failed = {}
        for row, path in self.paths.items():
            file = record_file(self.folder, number, row.name)
            if file.exists():
                continue
            print(f"batch {self.batch}, turn {number}: {row.name} …", flush=True)
            jobs = jobs_of(self.tasks, vocabulary_of(self.dense), self.batch)
            try:
                answer = measured(row, path, self.node, jobs, threads=self.threads)
            except ChildProcessError as error:
                failed[row.name] = str(error)
                print(f"{row.name} failed: {error}", flush=True)
                continue
            keep(file, record(answer, self.tasks, path))
        return failed

    def javascript(self, work: Path) -> str:
        """What a step of llama.cpp takes beside the model's layers, as a sentence."""
        file = self.folder / "javascript.json"
        if not file.exists():
            row, vocabulary = Row("llama.cpp", "BF16", "BF16"), vocabulary_of(self.dense)
            config = LlamaConfig(
                vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
            )
            small = Forms(written(work / f"one-layer-{vocabulary}", config, gaussian), work)
            jobs = jobs_of(["decode"], vocabulary, self.batch)
            answer = measured(row, small.path(row), self.node, jobs, threads=self.threads)
            keep(file, {"seconds": answer["jobs"][1]["rest"] / NEW})
        seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return (
            "llama.cpp's time for a step outside of the layers (JavaScript, sampling, a layer of 32 columns and its head): "
            f"{1e3 * seconds:.2f} ms at batch {self.batch}."
        )


def made(rows: Sequence[Row], forms: Forms) -> tuple[dict[Row, Path], dict[str, str]]:
    """The rows' forms, and by name why others have none."""
    paths, wrong = {}, {}
    for row in rows:
        try:
            paths[row] = forms.path(row)
        except Exception as error:  # of a rival's converter: whatever it raises is told in the table
            wrong[row.name] = f"could not be made: {type(error).__name__}: {str(error).splitlines()[:1]}"
    return paths, wrong


def checked(rows: Sequence[Row], work: Path, node: Path) -> dict[str, str]:
    """Compare each row with its reference on the tiny model; returns what is wrong, with the reason."""
    tiny = {replace(row, block=row.block or 64) if row.engine == "ARMOR" else row: row.name for row in rows}
    dense = check_model(work)
    paths, wrong = made(list(tiny), Forms(dense, work))
    wrong = {tiny[row]: wrong[row.name] for row in tiny if row.name in wrong}
    for row, path in paths.items():
        try:
            found = regret(row, path, dense, node)
        except ChildProcessError as error:
            wrong[tiny[row]] = str(error)
            continue
        print(f"check: {tiny[row]}: worst token {found:.3f} deviations below the most likely", flush=True)
        if not found <= TOLERANCE:
            wrong[tiny[row]] = f"computes another model: a token {found:.2f} deviations below the most likely one"
    return wrong


def main() -> int:
    """Check the rows, make what is missing, measure in turns, then print the tables; 1 where a row that is installed failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models are made; node_modules in `node` of it")
    parser.add_argument("--checkpoint", type=Path, help="an ARMOR folder in the place of the generated model")
    parser.add_argument("--dense", type=Path, help="the dense folder that it was made from")
    parser.add_argument("--layers", type=int, default=8, help="of the generated model")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of the generated model")
    parser.add_argument("--batch", default="1,8,32", help="sequences at once, separated by commas")
    parser.add_argument("--tasks", default=",".join(TOKENS), help="separated by commas")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write each table's rows here, as NAME-BATCH.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", help="names, separated by commas; `none` measures nothing; left out, all")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/rivals"))
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.dense is None):
        parser.error("--checkpoint goes with --dense, the folder that it was made from")
    rows = rows_of((128, 64) if options.checkpoint is None else (None,))
    names = list(rows) if options.rows is None else [name for name in options.rows.split(",") if name != "none"]
    if not rows.keys() >= set(names):
        parser.error(f"unknown rows in {options.rows!r}; rows are: {', '.join(rows)}")
    tasks = options.tasks.split(",")
    if not TOKENS.keys() >= set(tasks):
        parser.error(f"unknown tasks in {options.tasks!r}; tasks are: {', '.join(TOKENS)}")
    if not all(size.isdecimal() and int(size) for size in options.batch.split(",")):
        parser.error(f"--batch {options.batch!r}: expected whole numbers above 0, separated by commas")
    return run(options, rows, names, [task for task in TOKENS if task in tasks])


def run(options: argparse.Namespace, rows: Mapping[str, Row], names: Sequence[str], tasks: Sequence[str]) -> int:
    """See `main`."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    node = (work / "node" / "node_modules" / "node-llama-cpp").resolve()
    absent = {name: reason for name in names if (reason := missing(rows[name], node)) is not None}
    wanted = [row for name, row in rows.items() if name in names and name not in absent]
    wrong = checked(wanted, work, node) if wanted else {}
    dense = options.dense or generated_folder(work, options.layers, options.vocabulary)
    if wanted and options.dense is None:
        alone(generated, work, options.layers, options.vocabulary)
    paths, unmade = made([row for row in wanted if row.name not in wrong], Forms(dense, work, options.checkpoint))
    wrong |= unmade
    lengths = {task: TOKENS[task] for task in tasks}
    shown = []
    for batch in [int(size) for size in options.batch.split(",")]:
        # Records of one task alone lie apart from those of both.
        parts = [f"batch{batch}", *(tasks if len(tasks) < len(TOKENS) else []), f"threads{options.threads}"]
        folder = options.results / (options.checkpoint or dense).resolve().name / "-".join(parts)
        contest = Contest(dense, paths, folder, batch, tasks, options.threads, node)
        for number in range(1, options.turns + 1):
            wrong |= contest.turn(number)
        turns = turns_in(folder, rows)
        shown += [table(rows, turns, absent | wrong, batch, lengths), origins(rows, turns)]
        if options.json is not None:
            kept = {name: [turn[name] for turn in turns.values() if name in turn] for name in rows}
            found = [figures(rows[name], turns, own, batch, lengths) for name, own in kept.items() if own]
            keep(options.json.with_stem(f"{options.json.stem}-{batch}"), {"rows": found})
        if any(row.engine == "llama.cpp" for row in paths):
            shown.append(contest.javascript(work))
    print("\n\n".join(part for part in shown if part))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
