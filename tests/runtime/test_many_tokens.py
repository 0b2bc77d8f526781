"""The kernel for many tokens (`armor_many`): shapes, cores, tokens and threads; and what it leaves to others."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime import kernel
from armor_recipes.runtime.kernel import kernel_available, run_kernel
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor
from tests.runtime.test_integer_kernel import product, quantized, tokens_of, truth
from tests.runtime.test_kernel import packed

pytestmark = pytest.mark.skipif(
    not kernel_available() or "avx512" not in kernel.capabilities().paths, reason="no kernel for AVX-512 BF16 here"
)
TOKENS = (13, 16, 17, 48, 64, 65, 130, 256, 300)


def layer(core: str, block_size: tuple[int, int], rows: int, columns: int, group: int | None) -> PackedLinear:
    if core == "float":
        return packed(rows, columns, block_size, torch.bfloat16, 3)
    return quantized(rows, columns, block_size, torch.bfloat16, core, group, 3)


def bound(x: Tensor, made: PackedLinear, wanted: Tensor) -> Tensor:
    """Of all roundings: Bx to bf16 or 16-bit integers, S Bx to bf16, y to bf16; sums of float32 are well below them."""
    inner = apply_input_factor(x.double(), made.b.double())
    rounded = inner.abs() * 2.0**-8
    if made.core != "float":  # half a unit of the largest of 64 columns
        blocks = inner.unflatten(1, (-1, 64))
        rounded = (blocks.abs().amax(-1, keepdim=True) * 2.0**-15).expand_as(blocks).flatten(1)
    core, a = made.unpack()[0].double(), made.a.double()
    middle = rounded @ core.abs().T + (inner @ core.T).abs() * 2.0**-8
    return (
        apply_output_factor(middle, a.abs())
        + wanted.abs() * 2.0**-8
        + 1e-5 * product(x.double().abs(), a.abs(), core.abs(), made.b.double().abs())
    )


@pytest.mark.parametrize("core", ["float", "int8", "int4"])
def test_all_block_sizes_groups_and_tokens(core: str) -> None:
    shapes = [((1, 1), 5), ((2, 2), 6), ((6, 8), 18), ((4, 64), 260), ((520, 128), 520), ((64, 32), 320)]
    for ((block_size, rows), columns), group in itertools.product(
        itertools.product(shapes, (128, 384)), (None, 32, 64) if core != "float" else (None,)
    ):
        made = layer(core, block_size, rows, columns, group)
        assert kernel._many_sizes(made) is not None
        bias = tokens_of(1, rows)[0].bfloat16()
        for count in TOKENS:
            x = tokens_of(count, columns).bfloat16()
            wanted = truth(x, made) + bias.double()
            found = run_kernel(x, made, bias, path="avx512")
            assert ((found.double() - wanted).abs() <= bound(x, made, wanted)).all(), (
                block_size,
                columns,
                group,
                count,
            )


def test_what_it_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that chunks cut, odd blocks of A, scales within a chunk, other dtypes and paths, and few tokens."""
    calls = []
    monkeypatch.setattr(kernel, "_run_many", lambda job, *_: calls.append(job.tokens))
    for block_size, columns, group in (
        ((3, 8), 128, None),
        ((2, 96), 192, None),
        ((2, 8), 136, None),
        ((2, 8), 128, 16),
    ):
        made = layer("int8", block_size, 6, columns, group)
        assert kernel._many_sizes(made) is None
        run_kernel(tokens_of(20, columns).bfloat16(), made)
    for core, least in (("float", 13), ("int8", 13), ("int4", 7)):
        made = layer(core, (2, 8), 6, 128, None)
        run_kernel(tokens_of(20, 128), made)
        for path in ("scalar", "avx2"):
            run_kernel(tokens_of(20, 128).bfloat16(), made, path=path)
        run_kernel(tokens_of(least - 1, 128).bfloat16(), made, path="avx512")
        assert not calls
        run_kernel(tokens_of(300 + least, 128).bfloat16(), made, path="avx512")
        assert calls == [256, 44 + least]
        calls.clear()


@pytest.mark.parametrize("core", ["float", "int8", "int4"])
def test_neither_threads_nor_parts_change_a_bit(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    x = tokens_of(150, 256).bfloat16()
    made = layer(core, (4, 32), 72, 256, 64 if core != "float" else None)
    found = []
    for threads, rows in itertools.product((1, 2, 3), (4, 12, 256)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(kernel, "_MANY_ROWS", rows)
        found.append(run_kernel(x, made))
    assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(found[0][:64], run_kernel(x[:64], made))


@pytest.mark.parametrize("core", ["float", "int8"])
def test_a_token_that_is_not_finite_spoils_itself_alone(core: str) -> None:
    made = layer(core, (4, 64), 8, 128, None)
    x = tokens_of(70, 128).bfloat16()
    clean = run_kernel(x, made)
    x[3, 5], x[66, 100] = float("nan"), float("inf")
    found = run_kernel(x, made)
    others = [token for token in range(70) if token not in (3, 66)]
    assert torch.equal(found[others], clean[others])
    assert not found[3].isfinite().any()
    assert not found[66].isfinite().any()
