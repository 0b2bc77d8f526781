"""`plain_torch`: whatever a caller has set, we compute in the state of a new process, and everything is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from armor_recipes.compute import check_tensors, plain_torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def low_precision() -> Iterator[None]:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


SET_BY_A_CALLER: dict[str, AbstractContextManager[object]] = {
    "nothing": nullcontext(),
    "bfloat16": default_dtype(torch.bfloat16),
    "meta": torch.device("meta"),
    "autocast": torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode(),
    "no_grad": torch.no_grad(),
    "precision": low_precision(),
}


def state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none"),
    )


@pytest.mark.parametrize("name", SET_BY_A_CALLER)
def test_a_callers_state_is_put_aside_and_put_back(name: str) -> None:
    plain = state()
    with SET_BY_A_CALLER[name]:
        before = state()
        with plain_torch():
            assert state() == plain
        assert state() == before
        with pytest.raises(RuntimeError, match="boom"), plain_torch():
            raise RuntimeError("boom")
        assert state() == before
    assert state() == plain


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "torch.float64 on cpu"),
        (torch.zeros(3, 2), r"\(3, 2\)"),
        (torch.zeros(3, 2).T, "not contiguous"),
        (torch.zeros(2, 3, device="meta"), "on meta"),
    ],
)
def test_compiled_code_gets_what_it_takes_or_an_error(tensor: torch.Tensor, found: str) -> None:
    check_tensors("the kernel", {"x": (torch.zeros(2, 3), torch.float32, (2, 3))})
    with pytest.raises(
        TypeError, match=rf"the kernel takes x \(2, 3\) torch.float32 on cpu, contiguous; got .*{found}"
    ):
        check_tensors("the kernel", {"x": (tensor, torch.float32, (2, 3))})
