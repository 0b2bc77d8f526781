"""The compiled kernel against the definition in float64: every dtype, path, shape mod 32, number of tokens and threads."""

from __future__ import annotations

import math
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear, pack_2of4
from armor_recipes.errors import RecipeError
from armor_recipes.runtime import kernel
from armor_recipes.runtime.kernel import PATH_VARIABLE, capabilities, kernel_available, run_kernel, unpack_into

pytestmark = pytest.mark.skipif(not kernel_available(), reason="the kernel was not built")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Largest relative error (Frobenius): one rounding of the result.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-6}


def packed(rows: int, columns: int, block_size: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2).view(rows, columns)
    values, bitmask = pack_2of4(torch.randn(rows, columns, generator=generator).to(dtype), mask)
    a, b = (
        (torch.eye(size) + 0.3 * torch.randn(side // size, size, size, generator=generator)).to(dtype)
        for side, size in zip((rows, columns), block_size, strict=True)
    )
    return PackedLinear(values, bitmask, a, b)


def expected(x: Tensor, layer: PackedLinear, bias: Tensor | None = None) -> Tensor:
    a, b = (torch.block_diag(*factor.double()) for factor in (layer.a, layer.b))
    y = x.double() @ (a @ layer.unpack()[0].double() @ b).T
    return y if bias is None else y + bias.double()


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


def paths() -> tuple[str, ...]:
    return capabilities().paths if kernel_available() else ()


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", range(8, 8 * 9, 8))
def test_all_columns_mod_32(columns: int, dtype: torch.dtype, path: str) -> None:
    layer = packed(12, columns, (4, 8), dtype, columns)
    for tokens in range(1, 18):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        # avx512 rounds B x to bfloat16, as plain torch does.
        most = 3 * TOLERANCE[dtype] if path == "avx512" else TOLERANCE[dtype]
        assert error(run_kernel(x, layer, path=path), expected(x, layer)) < most


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("rows", range(1, 34))
def test_all_rows_mod_32(rows: int, path: str) -> None:
    layer = packed(rows, 40, (rows, 5), torch.float32, rows)
    for tokens in (1, 2, 4, 8):
        x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens))
        assert error(run_kernel(x, layer, path=path), expected(x, layer)) < 1e-6


@pytest.mark.parametrize("block_size", [(1, 1), (3, 5), (96, 120), (32, 8), (12, 60)])
def test_block_sizes(block_size: tuple[int, int]) -> None:
    layer = packed(96, 120, block_size, torch.float32)
    x = torch.randn(2, 3, 120, generator=torch.Generator().manual_seed(1))
    y = run_kernel(x, layer)
    assert y.shape == (2, 3, 96)
    assert error(y, expected(x, layer)) < 1e-6


@pytest.mark.parametrize("activation", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_activations_and_layer_may_differ_in_dtype(stored: torch.dtype, activation: torch.dtype) -> None:
    layer, bias = packed(16, 24, (8, 8), stored), torch.arange(16.0).to(stored)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).to(activation)
    y = run_kernel(x, layer, bias)
    assert y.dtype == activation
    assert error(y, expected(x, layer, bias)) < 3 * TOLERANCE[activation]


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_threads_do_not_change_a_bit(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    layer = packed(90, 96, (3, 4), torch.bfloat16)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run_kernel(x, layer))
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("team", [True, False])
def test_threads_of_torch_and_of_our_own(team: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    layer = packed(90, 96, (3, 4), torch.bfloat16)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    y, calls, found = run_kernel(x, layer), [], kernel._team()
    if team and found is None:
        pytest.skip("torch runs on another OpenMP here, or none")

    def counted(function: object, task: object, threads: int, flags: int) -> None:
        calls.append(threads)
        assert found is not None
        found(function, task, threads, flags)

    monkeypatch.setattr(kernel, "_team", lambda: counted if team else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(run_kernel(x, layer), y)
    assert calls == [2] * team


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer, x = packed(90, 96, (3, 4), torch.bfloat16), torch.ones(1, 96, dtype=torch.bfloat16)
    y = run_kernel(x, layer)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(not torch.equal(run_kernel(x, layer), y))
    )
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_a_row_of_x_does_not_depend_on_strides_or_no_tokens() -> None:
    layer = packed(16, 24, (8, 8), torch.float32)
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(run_kernel(x, layer), run_kernel(x.contiguous(), layer))
    assert run_kernel(x[:0], layer).shape == (0, 16)


def test_tensors_at_odd_addresses() -> None:
    layer = packed(16, 24, (8, 8), torch.bfloat16)
    data = bytearray(1) + bytearray(layer.values.view(torch.uint8).numpy().tobytes())  # a mapped file starts anywhere
    moved = torch.frombuffer(data, dtype=torch.bfloat16, offset=1, count=layer.values.numel()).view_as(layer.values)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(run_kernel(x, PackedLinear(moved, layer.bitmask, layer.a, layer.b)), run_kernel(x, layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack(dtype: torch.dtype) -> None:
    layer = packed(6, 40, (2, 8), dtype)
    for out_dtype in (dtype, torch.float32):
        out = torch.full((6, 40), math.nan, dtype=out_dtype)
        unpack_into(layer, out)
        assert torch.equal(out, layer.unpack()[0].to(out_dtype))
    with pytest.raises(TypeError, match="cannot unpack"):
        unpack_into(layer, torch.empty(6, 39))


def test_refusals() -> None:
    layer = packed(8, 16, (8, 8), torch.bfloat16)
    with pytest.raises(TypeError, match=r"takes x \(..., 16\)"):
        run_kernel(torch.zeros(1, 8), layer)
    with pytest.raises(TypeError, match="takes x"):
        run_kernel(torch.zeros(1, 16, dtype=torch.float64), layer)
    with pytest.raises(TypeError, match="bias in one dtype"):
        run_kernel(torch.zeros(1, 16), layer, torch.zeros(8))
    with pytest.raises(TypeError, match="on the CPU in"):
        run_kernel(torch.zeros(1, 16, device="meta"), layer)


def test_a_path_that_disagrees_is_reported_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel._checked_paths.cache_clear()
    monkeypatch.setattr(kernel, "path_agrees", lambda path: False)
    try:
        found = capabilities()
        assert (found.path, found.paths) == ("scalar", ("scalar",))
        assert all("self-check" in line for line in found.lines()[1:])
        if found.rejected:
            monkeypatch.setenv(PATH_VARIABLE, found.rejected[0])
            with pytest.raises(RecipeError, match="gave wrong numbers in the self-check; choose one of scalar"):
                capabilities()
    finally:
        kernel._checked_paths.cache_clear()


def test_the_environment_names_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "scalar")
    assert capabilities().path == "scalar"
    monkeypatch.setenv(PATH_VARIABLE, "mmx")
    with pytest.raises(RecipeError, match="ARMOR_CPU_PATH 'mmx': this path is not there"):
        capabilities()


def test_best_path_passed_its_check() -> None:
    found = capabilities()
    assert found.rejected == ()
    assert found.path == found.paths[-1]
    assert found.lines()[0].startswith(f"cpu kernel: {found.path} ")


def test_a_kernel_of_an_older_build_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.ctypes, "CDLL", lambda _: SimpleNamespace(armor_paths=len, armor_run=len))
    with pytest.raises(RecipeError, match="of another version than this package: install armor-recipes again"):
        kernel._library.__wrapped__()
