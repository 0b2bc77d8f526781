"""Seconds and peak memory of drawing 128 windows from a small file and from one a thousand times as large, by kind of file.

    python benchmarks/streams.py [--length 512 2048] [--work FOLDER] [--json FILE]

A process of its own draws from a stream (`calibration.stream`) of the package's texts in rows of 3 kB, by the tokenizer of the
embedded model, on one thread. Linux alone: peak memory is read from /proc. The large file takes 5 GB in `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from losses import Row, show
from pyarrow import parquet

from armor_recipes import builtin

SMALL, LARGE = 5_000_000, 5_000_000_000
SUFFIXES = (".jsonl", ".parquet", ".txt")
DRAW = """
import sys, time
import pyarrow.parquet
from pathlib import Path
from transformers import AutoTokenizer
from armor_recipes import builtin
from armor_recipes.calibration import build_tokens
from armor_recipes.recipe.schema import CalibrationSpec

path, length = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(builtin.model_folder("stdlib-llama"))
spec = CalibrationSpec(dataset=path, stream=True, samples=128, sequence_length=int(length))
begun = time.perf_counter()
found = build_tokens(spec, tokenizer=tokenizer, vocab_size=len(tokenizer))
seconds = time.perf_counter() - begun
assert tuple(found.ids.shape) == (128, int(length))
# not ru_maxrss, which holds what the process was before it became this program
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024)
"""


def texts(characters: int) -> list[str]:
    """Pieces of the package's texts of all lengths, 3 kB on average."""
    draw = random.Random(0)
    whole = [text for name in ("jargon", "speeches", "rustbook") for text in builtin.documents(name)]
    found: list[str] = []
    while characters > 0:
        text, size = draw.choice(whole), int(draw.lognormvariate(7.6, 0.9))
        start = draw.randrange(max(1, len(text) - size))
        found.append(text[start : start + size])
        characters -= len(found[-1])
    return found


def make(path: Path, size: int) -> Path:
    """A file of about that many bytes, the same rows again and again."""
    rows = texts(SMALL - SMALL // 50)
    if path.suffix == ".parquet":
        table = pa.table({"text": rows})
        with parquet.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
            for _ in range(size // SMALL):
                writer.write_table(table, row_group_size=1000)
        return path
    lines = [row.replace("\n", " ") if path.suffix == ".txt" else json.dumps({"text": row}) for row in rows]
    block = "".join(f"{line}\n" for line in lines).encode()
    with path.open("wb") as file:
        for _ in range(size // SMALL):
            file.write(block)
    return path


def measured(path: Path, length: int) -> tuple[float, float]:
    """Seconds, and MB at the peak, of a process of its own that draws 128 windows."""
    command = [sys.executable, "-c", DRAW, str(path), str(length)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"drawing from {path} failed ({done.returncode}): {done.stderr.strip()}")
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def row(folder: Path, suffix: str, lengths: Sequence[int]) -> Row:
    """Of one kind of file, which is deleted again."""
    found: Row = {"file": suffix}
    for name, size in (("5 MB", SMALL), ("5 GB", LARGE)):
        path = make(folder / f"file{suffix}", size)
        for length in lengths:
            seconds, peak = measured(path, length)
            found |= {f"{length} of {name}, s": seconds, f"{length} of {name}, MB": peak}
        path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048], help="tokens of a window")
    parser.add_argument("--work", type=Path, help="where files are made; left out, a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        rows = [row(Path(place), suffix, options.length) for suffix in SUFFIXES]
    show(rows, {"s": ".1f", "MB": ".0f"}, options.json)


if __name__ == "__main__":
    main()
