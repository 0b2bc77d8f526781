"""benchmarks/sizes.py: bytes of packed layers, against the format's own account of them."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.benchmarks.test_rivals import benchmark


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    return benchmark("sizes")


@pytest.mark.parametrize(("core", "bits", "scales"), [("bf16", 16, 0), ("int8", 8, 1), ("int4", 4, 256 // 64)])
def test_layers_take_what_the_format_says(sizes: ModuleType, core: str, bits: int, scales: int) -> None:
    shapes, block = ((128, 256), (256, 128), (256, 128)), 32
    wanted = 0.0
    for rows, columns in shapes:
        groups = scales * columns // 256 if scales > 1 else scales
        wanted += rows * columns * (bits / 16 + 1 / 8) + 2 * rows * groups + 2 * block * (rows + columns)
    assert sizes.share(shapes, core, block) == wanted / (2 * 3 * 128 * 256)


def test_each_row_of_parts_holds_those_above_it(sizes: ModuleType) -> None:
    packed = sizes.made((128, 256), "int4", 32)
    *stored, cuda, folded = sizes.parts(packed).values()
    assert stored == sorted(stored)
    assert stored[-1] == packed.nbytes / (128 * 256)
    assert cuda > stored[-1]
    assert folded == stored[-1] + 2
