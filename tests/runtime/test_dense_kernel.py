"""The kernel for layers that stay dense, and where a loaded model takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import armor_recipes
from armor_recipes.run import apply
from armor_recipes.runtime import dense, kernel
from armor_recipes.runtime.dense import DenseLinear, adopt_dense
from armor_recipes.runtime.kernel import kernel_available, run_dense_kernel
from tests.support.engine import ALL, ARMOR, recipe

pytestmark = pytest.mark.skipif(
    not kernel_available() or "avx512" not in kernel.capabilities().paths, reason="no kernel for AVX-512 BF16 here"
)


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("columns", [1, 31, 32, 40, 97])
@pytest.mark.parametrize("rows", [1, 3, 34, 130])
def test_it_is_exact_on_small_integers(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = integers(rows, columns), integers(rows)
    for tokens in (0, *range(1, 20)):
        x = integers(tokens, columns)
        wanted = (x.double() @ weight.double().T + bias.double()).bfloat16()
        assert torch.equal(run_dense_kernel(x, weight, bias), wanted)
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(run_dense_kernel(x, weight, bias), wanted)


def test_refusals() -> None:
    weight = integers(4, 8)
    for x, bias in ((integers(1, 8).float(), None), (integers(1, 7), None), (integers(1, 8), integers(3))):
        with pytest.raises(TypeError, match="the dense kernel takes x"):
            run_dense_kernel(x, weight, bias)
    with pytest.raises(TypeError, match="contiguous weight"):
        run_dense_kernel(integers(1, 4), weight.T, None)


def test_only_few_tokens_without_gradients_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_WORTH", 1)
    model = nn.Sequential(nn.Linear(40, 6, dtype=torch.bfloat16), nn.Linear(6, 6))
    assert adopt_dense(model) == 1
    layer, calls = model[0], []
    assert isinstance(layer, DenseLinear)

    def counted(*tensors: Tensor) -> Tensor:
        calls.append(len(tensors[0]))
        return run_dense_kernel(*tensors)

    monkeypatch.setattr(dense, "run_dense_kernel", counted)
    with torch.no_grad():
        for tokens in (1, 8, 9):
            layer(integers(tokens, 40))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(integers(1, 40))
    layer(integers(1, 40)).sum().backward()
    assert layer.weight.grad is not None
    assert calls == [1, 8]


def test_the_head_of_a_loaded_model_takes_it(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_WORTH", 1)
    mapping = recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "targets": [ALL]})
    apply(mapping)
    for backend, taken in (("auto", True), ("folded", False)):
        model = armor_recipes.load(tmp_path / "out", backend=backend, dtype=torch.bfloat16)
        assert isinstance(model.get_output_embeddings(), DenseLinear) is taken
