"""A stream of 5 GB takes the memory of one of 5 MB, and seconds: figures by `pytest -m slow -s` of this file."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from armor_recipes import builtin

SMALL, LARGE = 5_000_000, 5_000_000_000
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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stdout.split())
    print(
        f"{path.name}, {path.stat().st_size / 1e6:.0f} MB, 128 windows of {length}: {seconds:.1f} s, peak {peak:.0f} MB"
    )
    return seconds, peak


@pytest.fixture(params=["jsonl", "parquet", "txt"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file of 5 MB and one of 5 GB, of the same kind."""
    if shutil.disk_usage(tmp_path).free < 2 * LARGE:
        pytest.skip("less than 10 GB of disk are free")
    names = [tmp_path / f"{name}.{request.param}" for name in ("small", "large")]
    try:
        yield make(names[0], SMALL), make(names[1], LARGE)
    finally:
        for path in names:
            path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_five_gigabytes_take_the_memory_of_five_megabytes_and_seconds(files: tuple[Path, Path]) -> None:
    small, large = files
    for length in (512, 2048):
        _, few = measured(small, length)
        seconds, many = measured(large, length)
        assert many - few < 50
        assert seconds < 60
