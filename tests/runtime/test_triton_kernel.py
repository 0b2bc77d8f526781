"""The Triton kernels against the definition: every core type, dtype and plan. On a GPU, or in Triton's interpreter.

`test_cuda.py` runs this module in the interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime import cuda
from armor_recipes.runtime.fragments import Fragments, lay_out
from armor_recipes.runtime.tuning import (
    CorePlan,
    FactorPlan,
    core_key,
    core_plan,
    core_plans,
    factor_plans,
    forget,
    tune,
)
from armor_recipes.solver.activations import round_activations
from armor_recipes.solver.blockdiag import apply_input_factor
from tests.runtime.test_cpu_backends import holding
from tests.runtime.test_integer_kernel import quantized
from tests.runtime.test_kernel import DTYPES, TOLERANCE, error, packed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALVES = (torch.bfloat16, torch.float16)
CORES = [("float", None), ("int8", None), ("int8", 8), ("int4", None), ("int4", 8)]
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and not TRITON_INTERPRET=1"),
]


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


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


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def check(tensors: PackedLinear, tokens: int, plan: CorePlan | None = None) -> None:
    from armor_recipes.runtime.triton_kernel import run_core

    dtype, x = tensors.dtype, inputs(tokens, tensors.shape[1], tensors.dtype)
    y = run_core(x.to(DEVICE), lay_out(moved(tensors)), moved(tensors), plan).cpu()
    if y.dim() == 3:
        assert y.dtype == torch.float32
        y = y.sum(0).to(dtype)
    assert y.dtype == dtype
    assert y.shape == (tokens, tensors.shape[0])
    core = tensors.unpack()[0].double()
    if tensors.group_size is not None:
        core = core.to(dtype).double()  # as the backend `reference` rounds it; whole rows are scaled after the sum
    assert error(y, x.double() @ core.T) < most(dtype)


def most(dtype: torch.dtype, roundings: int = 1) -> float:
    # The interpreter cuts numbers off to bfloat16 where a GPU rounds: the weights, and the result.
    return (3 if INTERPRETED and dtype == torch.bfloat16 else 1) * roundings * TOLERANCE[dtype]


def moved(tensors: PackedLinear) -> PackedLinear:
    scale = None if tensors.scale is None else tensors.scale.to(DEVICE)
    return PackedLinear(*(t.to(DEVICE) for t in (tensors.values, tensors.bitmask, tensors.a, tensors.b)), scale)


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_shapes_that_fill_no_record(dtype: torch.dtype, core: str, group: int | None) -> None:
    step = 16 if core == "int4" or group else 8
    for rows, columns in ((1, step), (15, 64 - step), (17, 256 + step), (33, 512)):
        check(layer(rows, columns, dtype, core, group), 3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_numbers_of_tokens(dtype: torch.dtype) -> None:
    for tokens in range(1, 17):
        check(layer(7, 40, dtype, "float", None), tokens)


@pytest.mark.parametrize(("core", "group"), [*CORES, ("int8", 96), ("int4", 96), ("int4", 24)])
def test_several_records_and_scales_that_change_within_one(core: str, group: int | None) -> None:
    check(layer(3, 576, torch.bfloat16, core, group), 1)


@pytest.mark.parametrize("plan", [(1, 3, 1), (2, 1, 1), (2, 2, 3), (4, 5, 1)])
@pytest.mark.parametrize(("core", "group"), [("float", None), ("int8", None), ("int4", 32)])
def test_plans(core: str, group: int | None, plan: tuple[int, int, int]) -> None:
    """Programs of several records, and columns in more parts than there are records."""
    check(layer(40, 1024, torch.bfloat16, core, group), 5, CorePlan(*plan))


def test_integers_are_exact() -> None:
    """Kept zeros, and the ends of int8 and int4: small integers, on which every sum is exact."""
    from armor_recipes.runtime.integer_problems import problem
    from armor_recipes.runtime.triton_kernel import apply_factor, run_core

    for core, groups in (("float", 0), ("int8", 1), ("int8", 2), ("int4", 1), ("int4", 4)):
        tensors = problem(torch.float32, core, groups)[0].to(torch.float16)
        x = (torch.arange(3 * tensors.shape[1]) % 3 - 1).view(3, -1).half()
        truth = x.double() @ tensors.unpack()[0].double().T
        for splits in (1, 2):
            y = run_core(x.to(DEVICE), lay_out(moved(tensors)), moved(tensors), CorePlan(1, splits, 1))
            if splits > 1:
                rows = tensors.shape[0]
                one = torch.ones(rows, 1, 1, dtype=torch.float16, device=DEVICE)
                assert torch.equal(y.sum(0).cpu(), truth.float())
                y = apply_factor(y, one, splits=splits)
            assert torch.equal(y.cpu(), truth.half())


def test_calls_give_equal_bits() -> None:
    from armor_recipes.runtime.triton_kernel import run_core

    tensors = moved(layer(33, 1024, torch.bfloat16, "int8", None))
    core, x = lay_out(tensors), inputs(4, 1024, torch.bfloat16).to(DEVICE)
    first, second = (run_core(x, core, tensors, CorePlan(1, 4, 1)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (16, 256), (37, 304)])
def test_the_unpacked_core(shape: tuple[int, int], dtype: torch.dtype, core: str, group: int | None) -> None:
    from armor_recipes.runtime.triton_kernel import unpack_core

    tensors = layer(*shape, dtype, core, group)
    found, wanted = unpack_core(moved(tensors)).cpu(), tensors.unpack()[0].to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found != 0, wanted != 0)
    # Float cores are copied bit for bit; the interpreter cuts an integer times its scale off to bfloat16 where a GPU rounds.
    cut_off = INTERPRETED and dtype == torch.bfloat16 and core != "float"
    torch.testing.assert_close(found, wanted, rtol=2**-7 if cut_off else 0, atol=0)


def factors(blocks: int, size: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(blocks, size, size, generator=torch.Generator().manual_seed(size))
    return (torch.eye(size) + 0.3 * made).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("blocks", "size"), [(3, 1), (2, 5), (2, 24), (1, 64), (2, 72), (1, 144)])
def test_a_factor(blocks: int, size: int, dtype: torch.dtype) -> None:
    from armor_recipes.runtime.triton_kernel import apply_factor

    factor, bias = factors(blocks, size, dtype), torch.arange(blocks * size).to(dtype)
    for tokens in (1, 17, 70):
        x = inputs(tokens, blocks * size, dtype)
        truth = apply_input_factor(x.double(), factor.double())
        assert error(apply_factor(x.to(DEVICE), factor.to(DEVICE)).cpu(), truth) < most(dtype)
        y = apply_factor(x.to(DEVICE), factor.to(DEVICE), bias.to(DEVICE)).cpu()
        assert error(y, truth + bias.double()) < most(dtype)


def test_the_plans_of_a_factor() -> None:
    from armor_recipes.runtime.triton_kernel import apply_factor

    factor, x = factors(2, 40, torch.bfloat16), inputs(20, 80, torch.bfloat16)
    truth = apply_input_factor(x.double(), factor.double())
    for tokens in (1, 20):
        for plan in factor_plans(factor, tokens):
            assert isinstance(plan, FactorPlan)
            y = apply_factor(x.to(DEVICE), factor.to(DEVICE), plan=plan).cpu()
            assert error(y, truth) < most(torch.bfloat16)


@pytest.mark.parametrize("numbers", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_factor_in_8_bits(dtype: torch.dtype, numbers: str) -> None:
    """What `round_activations` makes of the product."""
    from armor_recipes.runtime.triton_kernel import apply_factor, apply_factor_in_8_bits

    if not INTERPRETED and numbers == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this GPU")
    factor, x = factors(3, 40, dtype), inputs(21, 120, dtype)
    x[5] = 0
    found, scale = apply_factor_in_8_bits(x.to(DEVICE), factor.to(DEVICE), numbers)
    assert found.dtype == (torch.int8 if numbers == "int8" else torch.float8_e4m3fn)
    inner = apply_factor(x.to(DEVICE), factor.to(DEVICE)).cpu()
    wide = inner.float()
    largest = wide.abs().amax(-1)
    steps = torch.where(largest > 0, largest / (127.5 if numbers == "int8" else 448), 1)
    torch.testing.assert_close(scale.cpu(), steps)
    quotient, got = wide / steps[:, None], found.cpu().float()
    if numbers == "int8":
        assert torch.equal(got, quotient.round().clamp(-128, 127))
    else:
        rounded = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        # The interpreter (3.9) loses the carry of what is rounded up to a power of two, and rounds ties up.
        carried = (rounded.abs().log2() % 1 == 0) & (rounded.abs() > quotient.abs())
        spacing = 2.0 ** (quotient.abs().log2().floor().clamp(min=-6) - 3)
        theirs = carried | (2 * (rounded - quotient).abs() == spacing)
        assert float(theirs.float().mean()) < 0.1
        assert torch.equal(got[~theirs], rounded[~theirs])
        assert INTERPRETED or torch.equal(got, rounded)
    if numbers == "int8":
        torch.testing.assert_close((got * steps[:, None]).to(dtype), round_activations(inner, numbers))


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_around_the_kernels(dtype: torch.dtype, core: str, group: int | None) -> None:
    base = packed(12, 32, (4, 8), dtype) if core == "float" else quantized(12, 32, (4, 8), dtype, core, group)
    x, bias = inputs(6, 32, dtype).view(2, 3, 32), torch.arange(12).to(dtype)
    core_for_few = None if dtype == torch.float32 else lay_out(moved(base))
    for repeats in (1, 3):  # 6 tokens, and 18, which are more than the kernel for few takes
        many = x.repeat(repeats, 1, 1)
        y = cuda.run_cuda(many.to(DEVICE), core_for_few, moved(base), bias.to(DEVICE)).cpu()
        assert error(y, definition(many, base) + bias.double()) < 3 * TOLERANCE[dtype]
    assert cuda.run_cuda(x[:0].to(DEVICE), core_for_few, moved(base), None).shape == (0, 3, 12)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize(("core", "group"), CORES)
def test_a_fused(core: str, group: int | None, size: int) -> None:
    """Tuning keeps what is fastest, and a layer takes it."""
    blocks, dtype = (size, 16), torch.bfloat16
    base = packed(64, 512, blocks, dtype) if core == "float" else quantized(64, 512, blocks, dtype, core, group)
    tensors, x = moved(base), inputs(5, 512, dtype).to(DEVICE)
    laid = lay_out(tensors)
    plans = core_plans(tensors)
    fused = [plan for plan in plans if isinstance(plan, CorePlan) and plan.fused]
    assert [plan.tiles for plan in fused] == [size // 16] * 2

    def measure(run: Callable[[], object]) -> float:
        run()
        return 1.0 if run.args[0] == fused[0] else 2.0  # type: ignore[attr-defined]

    times = tune(
        plans, core_key(tensors, 5), tensors.a.device, lambda plan: run_core_by(plan, x, laid, tensors), measure
    )
    assert list(times) == plans
    assert core_plan(tensors, 5) == fused[0]
    bias = torch.arange(64).to(DEVICE, dtype)
    y = cuda.run_cuda(x, laid, tensors, bias).cpu()
    assert error(y, definition(x.cpu(), base) + bias.cpu().double()) < 3 * TOLERANCE[dtype]


def run_core_by(plan: object, x: Tensor, laid: Fragments, tensors: PackedLinear) -> Tensor:
    from armor_recipes.runtime.triton_kernel import run_core

    assert isinstance(plan, CorePlan)
    return run_core(x, laid, tensors, plan)


@pytest.mark.parametrize("core", ["float", "int4"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_torch_compile_takes_a_layer_whole(tokens: int, core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_check_device", lambda device, name: None)
    dtype = torch.bfloat16
    base = packed(48, 64, (16, 8), dtype) if core == "float" else quantized(48, 64, (16, 8), dtype, core, 8)
    layer = holding(base, "cuda").to(DEVICE)
    x = inputs(tokens, 64, dtype).to(DEVICE)
    with torch.no_grad():
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        assert compiled(x[:2]).shape == (2, 48)


def test_the_operator_is_what_its_fake_says() -> None:
    tensors = moved(quantized(48, 64, (16, 8), torch.bfloat16, "int8", 8))
    laid = lay_out(tensors)
    parts = (
        tensors.values,
        tensors.bitmask,
        tensors.a,
        tensors.b,
        tensors.scale,
        None,
        laid.words,
        laid.scale,
        laid.parts,
    )
    x = inputs(4, 64, torch.bfloat16).to(DEVICE).view(2, 2, 64)
    torch.library.opcheck(
        torch.ops.armor_recipes.cuda_linear.default, (x, *parts), test_utils=("test_schema", "test_faketensor")
    )


def definition(x: Tensor, tensors: PackedLinear) -> Tensor:
    a, b = (torch.block_diag(*factor.double()) for factor in (tensors.a, tensors.b))
    return x.double() @ (a @ tensors.unpack()[0].double() @ b).T
