"""The Triton kernel against the definition: every core type and dtype, all shapes mod 32. On a GPU, or in Triton's interpreter.

`test_cuda.py` runs this module in the interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime import cuda
from tests.runtime.test_integer_kernel import quantized
from tests.runtime.test_kernel import DTYPES, TOLERANCE, error, packed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CORES = [("float", None), ("int8", None), ("int8", 8), ("int4", None), ("int4", 8)]
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and not TRITON_INTERPRET=1"),
]


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.9) stores bfloat16 as uint16, and its `tl.dot` multiplies those: give it the numbers instead."""
    if INTERPRETED:
        from triton import language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

        theirs = InterpreterBuilder.create_dot

        def widened(part: TensorHandle) -> TensorHandle:
            if part.dtype.scalar != tl.bfloat16:
                return part
            return TensorHandle(_convert_float(part.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

        def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
            return theirs(self, widened(a), widened(b), *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def layer(rows: int, columns: int, dtype: torch.dtype, core: str, group: int | None) -> PackedLinear:
    blocks = (1, 4)
    if core == "float":
        return packed(rows, columns, blocks, dtype, rows + columns)
    return quantized(rows, columns, blocks, dtype, core, group, rows + columns)


def check(tensors: PackedLinear, tokens: int, dtype: torch.dtype) -> None:
    from armor_recipes.runtime.triton_kernel import run_core

    x = torch.randn(tokens, tensors.shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
    core = tensors.unpack()[0].to(dtype)
    y = run_core(x.to(DEVICE), moved(tensors, DEVICE))
    assert y.dtype == dtype
    assert y.shape == (tokens, tensors.shape[0])
    # The interpreter cuts numbers off to bfloat16 where a GPU rounds: the weights, and the result.
    most = 3 * TOLERANCE[dtype] if INTERPRETED and dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert error(y.cpu(), x.double() @ core.double().T) < most


def moved(tensors: PackedLinear, device: str) -> PackedLinear:
    scale = None if tensors.scale is None else tensors.scale.to(device)
    return PackedLinear(*(t.to(device) for t in (tensors.values, tensors.bitmask, tensors.a, tensors.b)), scale)


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_columns_mod_32(dtype: torch.dtype, core: str, group: int | None) -> None:
    step = 16 if core == "int4" or group else 8
    for columns in range(step, 8 * 9, step):
        check(layer(5, columns, dtype, core, group), 3, dtype)


@pytest.mark.parametrize(("core", "group"), CORES)
def test_all_rows_mod_32(core: str, group: int | None) -> None:
    for rows in range(1, 34) if core == "float" or not INTERPRETED else (1, 2, 15, 16, 17, 31, 32, 33):
        check(layer(rows, 32, torch.float32, core, group), 2, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_numbers_of_tokens(dtype: torch.dtype) -> None:
    for tokens in range(1, 17):
        check(layer(7, 40, dtype, "float", None), tokens, dtype)


@pytest.mark.parametrize(("core", "group"), [*CORES, ("int8", 96), ("int4", 96)])
def test_several_steps_and_scales_that_change_within_one(core: str, group: int | None) -> None:
    check(layer(3, 576, torch.float32, core, group), 1, torch.float32)


def test_integers_are_exact() -> None:
    """Kept zeros, and the ends of int8 and int4: small integers, on which every sum is exact."""
    from armor_recipes.runtime.integer_problems import problem
    from armor_recipes.runtime.triton_kernel import run_core

    for core, groups in (("float", 0), ("int8", 1), ("int8", 2), ("int4", 1), ("int4", 4)):
        tensors, _ = problem(torch.float32, core, groups)
        x = (torch.arange(3 * tensors.shape[1]) % 7 - 3).view(3, -1).float()
        y = run_core(x.to(DEVICE), moved(tensors, DEVICE))
        assert torch.equal(y.cpu(), x @ tensors.unpack()[0].T)


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (16, 256), (37, 304)])
def test_the_unpacked_core(shape: tuple[int, int], dtype: torch.dtype, core: str, group: int | None) -> None:
    from armor_recipes.runtime.triton_kernel import unpack_core

    tensors = layer(*shape, dtype, core, group)
    found, wanted = unpack_core(moved(tensors, DEVICE)).cpu(), tensors.unpack()[0].to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found != 0, wanted != 0)
    # Float cores are copied bit for bit; the interpreter cuts an integer times its scale off to bfloat16 where a GPU rounds.
    cut_off = INTERPRETED and dtype == torch.bfloat16 and core != "float"
    torch.testing.assert_close(found, wanted, rtol=2**-7 if cut_off else 0, atol=0)


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_around_the_kernel(dtype: torch.dtype, core: str, group: int | None) -> None:
    base = packed(12, 32, (4, 8), dtype) if core == "float" else quantized(12, 32, (4, 8), dtype, core, group)
    x, bias = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(12).to(dtype)
    for repeats in (1, 3):  # 6 tokens, and 18, which are more than the first kernel takes
        many = x.repeat(repeats, 1, 1)
        y = cuda.run_cuda(many.to(DEVICE), None, moved(base, DEVICE), bias.to(DEVICE)).cpu()
        assert error(y, definition(many, base) + bias.double()) < 3 * TOLERANCE[dtype]
    assert cuda.run_cuda(x[:0].to(DEVICE), None, moved(base, DEVICE), None).shape == (0, 3, 12)


def definition(x: Tensor, tensors: PackedLinear) -> Tensor:
    a, b = (torch.block_diag(*factor.double()) for factor in (tensors.a, tensors.b))
    return x.double() @ (a @ tensors.unpack()[0].double() @ b).T
