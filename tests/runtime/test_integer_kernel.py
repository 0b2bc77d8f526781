"""The compiled kernel on quantised cores: int8 and int4, with a scale for each row or for each group of kept values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear, pack_int4
from armor_recipes.runtime import kernel
from armor_recipes.runtime.kernel import kernel_available, run_kernel, unpack_into
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor
from tests.runtime.test_kernel import DTYPES, TOLERANCE, error, packed, paths

pytestmark = pytest.mark.skipif(not kernel_available(), reason="the kernel was not built")

CORES = ("int8", "int4")
LEAST, MOST = {"int8": -128, "int4": -8}, {"int8": 127, "int4": 7}


def quantized(
    rows: int,
    columns: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
    core: str = "int8",
    group: int | None = None,
    seed: int = 0,
) -> PackedLinear:
    """A valid layer; `group` kept values have one scale, None for a whole row."""
    generator = torch.Generator().manual_seed(seed)
    base, kept = packed(rows, columns, block_size, dtype, seed), columns // 2
    integers = torch.randint(LEAST[core], MOST[core] + 1, (rows, kept), generator=generator, dtype=torch.int8)
    scale = ((0.5 + torch.rand(rows, kept // (group or kept), generator=generator)) / MOST[core]).to(dtype)
    values = integers if core == "int8" else pack_int4(integers)
    made = PackedLinear(values, base.bitmask, base.a, base.b, scale)
    made.validate()
    return made


def truth(x: Tensor, layer: PackedLinear) -> Tensor:
    return product(x.double(), layer.a.double(), layer.unpack()[0].double(), layer.b.double())


def product(x: Tensor, a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    return apply_output_factor(apply_input_factor(x, b) @ core.T, a)


def close(y: Tensor, x: Tensor, layer: PackedLinear) -> bool:
    """Whether every number of y, float32, is right to 16 roundings of what its sum would be if nothing in it cancelled."""
    parts = (x, layer.a, layer.unpack()[0], layer.b)
    uncancelled = product(*(part.double().abs() for part in parts))
    return bool(((y.double() - truth(x, layer)).abs() <= 16 * 2**-24 * uncancelled).all())


def of_eight_bits(x: Tensor, layer: PackedLinear) -> Tensor:
    """What `A S` makes at most of Bx rounded to 8 bits, with a scale for each 64 columns."""
    inner = apply_input_factor(x.double(), layer.b.double())
    blocks = torch.nn.functional.pad(inner, (0, -inner.shape[1] % 64)).unflatten(1, (-1, 64))
    most = (blocks.abs().amax(-1, keepdim=True) / 254).expand_as(blocks).flatten(1)[:, : inner.shape[1]]
    return apply_output_factor(most @ layer.unpack()[0].double().abs().T, layer.a.double().abs())


def tokens_of(count: int, columns: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("core", CORES)
def test_all_columns_mod_32_and_group_sizes(core: str, dtype: torch.dtype, path: str) -> None:
    for columns in range(16 if core == "int4" else 8, 8 * 17, 16 if core == "int4" else 8):
        kept = columns // 2
        for group in (None, *(size for size in range(8, kept, 8) if kept % size == 0)):
            layer = quantized(12, columns, (4, 8), dtype, core, group, columns)
            for count in (1, 2, 3, 4, 7, 8, 15, 17):
                x = tokens_of(count, columns).to(dtype)
                y, wanted, most = run_kernel(x, layer, path=path), truth(x, layer), TOLERANCE[dtype]
                if (path, dtype, core) == ("avx512", torch.bfloat16, "int4") and (group is None or group % 32 == 0):
                    rounded = (y.double() - wanted).abs() <= of_eight_bits(x, layer) + most * wanted.abs()
                    assert bool(rounded.all()), (columns, group, count)
                else:
                    assert error(y, wanted) < most, (columns, group, count)


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("core", CORES)
def test_all_rows_mod_32(core: str, path: str) -> None:
    for rows in range(1, 34):
        for group in (None, 8, 16):
            layer = quantized(rows, 64, (rows, 8), torch.float32, core, group, rows)
            for count in (1, 2, 4, 8):
                x = tokens_of(count, 64)
                assert close(run_kernel(x, layer, path=path), x, layer)


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("group", [None, 8, 32, 48, 4608])
@pytest.mark.parametrize("core", CORES)
def test_rows_longer_than_what_is_taken_at_once(core: str, group: int | None, path: str) -> None:
    layer = quantized(5, 9216 * 2, (5, 16), torch.float32, core, group)
    for count in (1, 3, 8):
        x = tokens_of(count, 9216 * 2)
        assert close(run_kernel(x, layer, path=path), x, layer)


@pytest.mark.parametrize("activation", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("core", CORES)
def test_activations_and_floats_may_differ_in_dtype(core: str, stored: torch.dtype, activation: torch.dtype) -> None:
    layer, bias = quantized(16, 64, (8, 8), stored, core, 16), torch.arange(16.0).to(stored)
    x = tokens_of(5, 64).to(activation)
    y = run_kernel(x, layer, bias)
    assert y.dtype == activation
    assert error(y, truth(x, layer) + bias.double()) < 3 * TOLERANCE[activation]


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize(("core", "number"), [(core, n) for core in CORES for n in (LEAST[core], -1, 0, 1, MOST[core])])
def test_extreme_integers(core: str, number: int, path: str) -> None:
    """One column of x at a time: y is the row's value there, exactly."""
    integers = torch.full((3, 32), number, dtype=torch.int8)
    values = integers if core == "int8" else pack_int4(integers)
    mask = packed(3, 64, (1, 1), torch.float32).bitmask
    layer = PackedLinear(values, mask, torch.ones(3, 1, 1), torch.ones(64, 1, 1), torch.tensor([[0.5], [1.0], [2.0]]))
    assert torch.equal(run_kernel(torch.eye(64), layer, path=path), layer.unpack()[0].T)
    assert torch.equal(run_kernel(torch.eye(64)[:1], layer, path=path), layer.unpack()[0].T[:1])


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("core", CORES)
def test_threads_do_not_change_a_bit(core: str, group: int | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    layer = quantized(90, 96, (3, 4), torch.bfloat16, core, group)
    found, unpacked = [], []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run_kernel(tokens_of(count, 96).bfloat16(), layer))
        unpacked.append(torch.empty(90, 96))
        unpack_into(layer, unpacked[-1])
    assert all(torch.equal(y, found[0]) for y in found)
    assert all(torch.equal(core, unpacked[0]) for core in unpacked)


@pytest.mark.parametrize("core", CORES)
def test_tensors_at_odd_addresses(core: str) -> None:
    layer = quantized(16, 64, (8, 8), torch.bfloat16, core, 16)

    def moved(tensor: Tensor) -> Tensor:
        data = bytearray(1) + bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(data, dtype=tensor.dtype, offset=1, count=tensor.numel()).view_as(tensor)

    assert layer.scale is not None
    other = PackedLinear(moved(layer.values), layer.bitmask, layer.a, layer.b, moved(layer.scale))
    for count in (1, 3):
        x = tokens_of(count, 64).bfloat16()
        assert torch.equal(run_kernel(x, other), run_kernel(x, layer))


@pytest.mark.parametrize("group", [None, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("core", CORES)
def test_unpack(core: str, dtype: torch.dtype, group: int | None) -> None:
    layer = quantized(6, 96, (2, 8), dtype, core, group)
    for out_dtype in (dtype, torch.float32):
        out = torch.full((6, 96), math.nan, dtype=out_dtype)
        unpack_into(layer, out)
        assert torch.equal(out, layer.unpack()[0].to(out_dtype))


def test_refusals() -> None:
    x, layer = torch.zeros(1, 64), quantized(8, 64, (8, 8), torch.bfloat16, "int8", 8)

    def changed(values: Tensor = layer.values, scale: Tensor | None = layer.scale) -> PackedLinear:
        return PackedLinear(values, layer.bitmask, layer.a, layer.b, scale)

    assert layer.scale is not None
    for scale in (layer.scale[:, :3], layer.scale[:4], layer.scale[:, :0], layer.scale[0]):
        for run in (lambda made: run_kernel(x, made), lambda made: unpack_into(made, torch.empty(8, 64))):
            with pytest.raises(
                TypeError, match=r"takes scales \(8, groups\) of whole rows or of a multiple of 8 values"
            ):
                run(changed(scale=scale))
    for made in (changed(scale=None), changed(layer.values.to(torch.int16)), changed(scale=layer.scale.float())):
        with pytest.raises(TypeError, match="values in the factors' dtype, or int8 or int4"):
            run_kernel(x, made)
        with pytest.raises(TypeError, match="values in the factors' dtype, or int8 or int4"):
            unpack_into(made, torch.empty(8, 64))
    with pytest.raises(TypeError, match="bias in one dtype"):
        run_kernel(x, layer, torch.zeros(8))
