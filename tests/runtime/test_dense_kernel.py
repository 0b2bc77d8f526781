"""The kernel for layers that stay dense, and where a loaded model takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import armor_recipes
from armor_recipes.integrations import plain
from armor_recipes.integrations.plain import PlainLinear
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


@pytest.mark.parametrize(("columns", "groups"), [(4, 1), (36, 1), (64, 1), (100, 1), (128, 2), (192, 6), (17_000, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_exact_on_8_bit_integers(columns: int, groups: int, packed: bool) -> None:
    """X is small enough to be exact in fixed point, scales are powers of two, and sums reach the most that 32 bits hold."""
    rows = 35
    weight = integers(rows, columns).to(torch.int8) * 15
    weight[0] = -128
    scale = 2.0 ** integers(rows, groups).bfloat16()
    bias = integers(rows)
    spread = (weight.double().view(rows, groups, -1) * scale.double()[..., None]).view(rows, columns)
    stored = (weight.short() + 128).to(torch.uint8).view(torch.int32) if packed else weight
    for tokens in (0, *range(1, 12)):
        x = integers(tokens, columns)
        x[:1] = 15.9375
        wanted = (x.double() @ spread.T + bias.double()).float().bfloat16()
        found = run_dense_kernel(x, stored, bias, scale)
        assert torch.equal(found, wanted)


def test_8_bit_integers_of_any_activations() -> None:
    """The fixed point has 15 bits of the largest: its error is within half a unit of each weight."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-128, 128, (40, 96), generator=generator, dtype=torch.int8)
    scale = torch.rand(40, 1, generator=generator).bfloat16()
    x = (torch.randn(8, 96, generator=generator) * 2.0 ** torch.arange(-60, 60, 15)[:, None]).bfloat16()
    x[3] = 0
    found = run_dense_kernel(x, weight, None, scale)
    exact = x.double() @ (weight.double() * scale.double()).T
    unit = x.abs().amax(1, keepdim=True).double() * 2.0**-14
    bound = unit / 2 * (weight.double().abs() * scale.double()).sum(1) + exact.abs() * 2.0**-8
    assert ((found.double() - exact).abs() <= bound).all()
    for wrong in (float("inf"), float("-inf"), float("nan")):
        x[5, 17] = wrong
        broken = run_dense_kernel(x, weight, None, scale)
        assert broken[5].isnan().all()
        assert torch.equal(broken[:5], found[:5])


def test_refusals_of_integers() -> None:
    weight, scale, x = integers(4, 64).to(torch.int8), torch.ones(4, 1).bfloat16(), integers(1, 64)
    wrong = [
        (weight, None),
        (weight, scale.float()),
        (weight, scale[:3]),
        (weight, scale[:, 0]),
        (weight, scale.expand(4, 4)),
        (weight, scale[:, :0]),
        (weight.bfloat16(), scale),
        (weight.to(torch.uint8), scale),
        (weight[:, :32], scale),
    ]
    for given, by in wrong:
        with pytest.raises(TypeError, match="the dense kernel takes x"):
            run_dense_kernel(x, given, None, by)


@pytest.mark.parametrize("scheme", ["channels", "groups", "W8A8"])
def test_8_bit_layers_of_a_loaded_model_take_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """It is nearer to what is stored than the dense way, whose weights are rounded to bfloat16; many tokens take that way."""
    monkeypatch.setattr(dense, "_WORTH", 1)
    size = {"channels": {"strategy": "channel"}, "groups": {"group_size": 32}}.get(scheme)
    how = {"config_groups": {"all": {"weights": {"num_bits": 8, **size}}}} if size else {"scheme": scheme}
    quantised = {"targets": ["re:.*proj", "lm_head"], "ignore": [], **how}
    apply(recipe(llama, tmp_path / "out", QuantizationModifier=quantised))
    ours, other = (
        armor_recipes.load(tmp_path / "out", backend=name, dtype=torch.bfloat16) for name in ("auto", "reference")
    )
    calls = []

    def counted(*tensors: Tensor) -> Tensor:
        calls.append(tensors[1].dtype)
        return run_dense_kernel(*tensors)

    monkeypatch.setattr(plain, "run_dense_kernel", counted)
    names = [name for name, module in ours.named_modules() if isinstance(module, PlainLinear)]
    assert "lm_head" in names
    with torch.no_grad():
        ours(torch.arange(8)[None])
        assert calls == [torch.int8 if scheme == "W8A8" else torch.int32] * len(names)
        assert torch.equal(*(model(torch.arange(9)[None]).logits for model in (ours, other)))
        assert len(calls) == len(names)
        layers = dict(ours.named_modules()), dict(other.named_modules())
        errors = torch.zeros(2)
        for name in names:
            x = integers(8, layers[0][name].in_features)
            made = layers[0][name]._armor_dequantized._found(layers[0][name])
            given = x if made.quantizer is None else made.quantizer.inputs(layers[0][name], (x,))[0]
            exact = given.double() @ made.layer.dequantize(torch.float32).double().T
            errors += torch.stack([(model[name](x) - exact).norm() for model in layers])
    assert errors[0] < 0.8 * errors[1]
