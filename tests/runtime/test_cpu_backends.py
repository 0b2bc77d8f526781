"""`ArmorLinear` on `cpu` and `auto`: the torch features that models use, and what is taken when."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from armor_recipes.checkpoint.packing import PackedLinear, pack_2of4
from armor_recipes.errors import CheckpointError, RecipeError
from armor_recipes.runtime import ArmorLinear, auto, backends, kernel, set_backend
from armor_recipes.runtime.auto import CHOICES, KEEP_VARIABLE, Situation, choices, tell
from armor_recipes.runtime.kernel import kernel_available
from armor_recipes.runtime.validation import check_packed
from tests.runtime.test_integer_kernel import quantized
from tests.runtime.test_kernel import DTYPES, TOLERANCE, error, expected, packed

needs_kernel = pytest.mark.skipif(not kernel_available(), reason="the kernel was not built")
BACKENDS = ("cpu", "auto")
X = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))


def layer(backend: str, dtype: torch.dtype = torch.float32) -> ArmorLinear:
    return holding(packed(16, 24, (4, 8), dtype), backend)


def holding(tensors: PackedLinear, backend: str) -> ArmorLinear:
    rows, columns = tensors.shape
    linear = nn.Linear(columns, rows, dtype=tensors.dtype, device="meta")
    linear.bias = nn.Parameter(torch.arange(rows).to(tensors.dtype), requires_grad=False)
    made = ArmorLinear.from_packed(linear, tensors)
    made.backend = backend
    return made.eval()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_right(backend: str, dtype: torch.dtype) -> None:
    armor, x = layer(backend, dtype), X.to(dtype)
    assert error(armor(x), expected(x, armor.packed(), armor.bias)) < 3 * TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_pickles_and_casts(backend: str) -> None:
    armor = layer(backend, torch.bfloat16)
    before = armor(X.bfloat16())
    for other in (copy.deepcopy(armor), pickle.loads(pickle.dumps(armor))):
        assert torch.equal(other(X.bfloat16()), before)
    cast = copy.deepcopy(armor).to(torch.float32)
    assert error(cast(X), expected(X, cast.packed(), cast.bias)) < 1e-6
    assert torch.equal(cast.to("cpu").bfloat16()(X.bfloat16()), before)


@needs_kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break(backend: str) -> None:
    armor = layer(backend)
    compiled = torch.compile(armor, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(X), armor(X), atol=1e-5)
        assert torch.allclose(compiled(X[:1]), armor(X[:1]), atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_reference(backend: str) -> None:
    found = {}
    for name in (backend, "reference"):
        armor, x = layer(name).train(), X.clone().requires_grad_()
        trained = [x, *(getattr(armor, part).requires_grad_() for part in ("weight", "armor_a", "armor_b", "bias"))]
        found[name] = torch.autograd.grad(armor(x).square().sum(), trained)
    for ours, theirs in zip(found[backend], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


QUANTIZED = [(core, group) for core in ("int8", "int4") for group in (None, 8, 16)]
WIDE = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))


def quantized_layer(
    backend: str, core: str, group: int | None = None, dtype: torch.dtype = torch.float32
) -> ArmorLinear:
    return holding(quantized(16, 32, (4, 8), dtype, core, group), backend)


@needs_kernel
@pytest.mark.parametrize(("core", "group"), QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_cores_are_right_and_run_from_their_integers(
    backend: str, dtype: torch.dtype, core: str, group: int | None
) -> None:
    armor, x = quantized_layer(backend, core, group, dtype), WIDE.to(dtype)
    truth = expected(x, armor.packed(), armor.bias)
    assert error(armor(x), truth) < 3 * TOLERANCE[dtype]
    assert armor._prepared is not None
    assert not isinstance(armor._prepared[1], torch.Tensor)  # nothing was folded
    assert error(copy.deepcopy(armor)(x), truth) < 3 * TOLERANCE[dtype]
    cast = pickle.loads(pickle.dumps(armor)).to(torch.float32)
    assert error(cast(WIDE), expected(WIDE, cast.packed(), cast.bias)) < 1e-6


@needs_kernel
@pytest.mark.parametrize("core", ["int8", "int4"])
def test_every_way_of_auto_is_right_for_quantized_cores(core: str) -> None:
    for dtype in DTYPES:
        armor, x = quantized_layer("auto", core, 8, dtype), WIDE.to(dtype)
        situation = Situation.of(x, armor.packed())
        assert (situation.dtype, situation.core, situation.group_size) == (dtype, core, 8)
        for choice in CHOICES:
            tell({situation: choice})
            assert error(armor(x), expected(x, armor.packed(), armor.bias)) < 3 * TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("core", ["int8", "int4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_cores_compile_without_a_graph_break(backend: str, core: str) -> None:
    armor = quantized_layer(backend, core, 16)
    compiled = torch.compile(armor, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(WIDE), armor(WIDE), atol=1e-5)


@needs_kernel
@pytest.mark.parametrize(("core", "group"), QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_around_a_quantized_core_are_those_of_the_reference(
    backend: str, dtype: torch.dtype, core: str, group: int | None
) -> None:
    found = {}
    for name in (backend, "reference"):
        armor, x = quantized_layer(name, core, group, dtype).train(), WIDE.to(dtype).requires_grad_()
        trained = [x, *(getattr(armor, part).requires_grad_() for part in ("armor_a", "armor_b", "bias"))]
        found[name] = torch.autograd.grad(armor(x).float().square().sum(), trained)
    for ours, theirs in zip(found[backend], found["reference"], strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert error(ours, theirs.double()) < (1e-5 if dtype == torch.float32 else 0.03)


@needs_kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_are_not_trained_in_silence(backend: str) -> None:
    armor = quantized_layer(backend, "int8")
    armor.weight_scale.requires_grad_()
    y = armor(WIDE)
    with pytest.raises(RecipeError, match="no gradient of weight_scale: choose `reference`"):
        y.sum().backward()


class Adapted(nn.Module):
    """What a LoRA adapter does to a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(24, 2, bias=False), nn.Linear(2, 16, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@needs_kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_trains_on_top(backend: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Adapted(layer(backend)), nn.Linear(16, 24), Adapted(layer(backend))).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(3):
        loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@needs_kernel
def test_peft_adapter_trains_on_top() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("proj", layer("auto"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["proj"], r=2))
    adapted(X).square().mean().backward()
    assert any(p.grad is not None for p in adapted.parameters())


@needs_kernel
def test_prepared_in_inference_mode_and_trained_later() -> None:
    for backend in ("cpu", "auto", "folded", "reference"):
        armor, x = layer(backend), X.clone().requires_grad_()
        with torch.inference_mode():
            armor(X)
        armor(x).sum().backward()
        assert x.grad is not None


@needs_kernel
def test_frozen_layers_are_prepared_once_in_training_mode() -> None:
    armor = layer("folded").train()
    armor(X)
    assert armor._prepared is not None
    first = armor._prepared[1]
    armor(X)
    assert armor._prepared[1] is first


def test_from_factorization_and_set_backend() -> None:
    source = packed(16, 24, (4, 8), torch.float32)
    core, mask = source.unpack()

    class Made:
        a, b = source.a, source.b

    made = Made()
    made.core, made.mask = core, mask  # type: ignore[attr-defined]
    armor = ArmorLinear.from_factorization(made, bias=torch.ones(16), dtype=torch.float32, backend="reference")  # type: ignore[arg-type]
    torch.testing.assert_close(armor(X).double(), expected(X, source, torch.ones(16)), rtol=1e-4, atol=1e-4)
    assert "backend='reference'" not in armor.extra_repr()
    model = nn.Sequential(armor, nn.Linear(16, 4))
    assert set_backend(model, "folded") == 1
    assert armor.backend == "folded"
    with pytest.raises(RecipeError, match="unknown"):
        set_backend(model, "fast")
    without = ArmorLinear.from_factorization(made)  # type: ignore[arg-type]
    assert without.bias is None
    assert without.weight.dtype == torch.bfloat16


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backends, kernel):
        monkeypatch.setattr(module, "kernel_available", lambda: False)


@pytest.mark.usefixtures("no_kernel")
def test_without_a_compiler() -> None:
    armor = layer("auto")
    with pytest.warns(UserWarning, match="installed without a C compiler"):
        y = armor(X)
    assert torch.equal(y, layer("folded")(X))
    with pytest.raises(RecipeError, match="the backend cpu needs the compiled kernel"):
        layer("cpu")(X)
    assert kernel.capabilities().lines()[0].startswith("cpu kernel: not built")


@needs_kernel
def test_auto_measures_once_and_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    measure = auto._measure
    monkeypatch.setattr(auto, "_measure", lambda *args: (next(calls), measure(*args))[1])
    first, second = layer("auto"), layer("auto")
    first(X), second(X)
    assert next(calls) == 1
    ((situation, choice),) = choices().items()
    assert situation == Situation.of(X, first.packed())
    assert (situation.tokens, choice in CHOICES) == (8, True)
    truth = expected(X, first.packed(), first.bias)
    for name in CHOICES:
        tell({situation: name})
        assert error(first(X), truth) < 1e-6
    with pytest.raises(RecipeError, match="choice 'magic' is unknown"):
        tell({situation: "magic"})


@needs_kernel
def test_dense_cores_are_kept_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    armor = layer("auto")
    for keep in ("0", "1"):
        monkeypatch.setenv(KEEP_VARIABLE, keep)
        tell({Situation.of(X, armor.packed()): "dense"})
        y = armor(X)
        assert armor._prepared is not None
        assert len(armor._prepared[1].kept) == int(keep)
        assert error(y, expected(X, armor.packed(), armor.bias)) < 1e-6


def test_quantized_cores_are_checked_without_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [quantized(16, 32, (4, 8), torch.bfloat16, core, group) for core, group in QUANTIZED]
    monkeypatch.setattr(PackedLinear, "unpack", lambda *_, **__: pytest.fail("unpacked"))
    for made in layers:
        check_packed(made)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("zero scale", r"proj: weight_scale: 1 of 32 scales are not positive"),
        ("infinite scale", "proj: weight_scale: 1 of 32 numbers are not finite"),
        ("scale dtype", r"proj: armor_a is \(4, 4, 4\) torch.float32"),
        ("scale groups", r"proj: weight_scale is \(16, 3\)"),
        ("scale rows", r"proj: weight_scale is \(15, 2\)"),
        ("bitmask", "proj: bitmask: row 3, columns 8 to 11 keep 3 entries"),
        ("armor_b", r"proj: armor_b is \(2, 8, 8\)"),
        ("values", r"proj: weight is \(16, 16\) torch.int16"),
    ],
)
def test_a_damaged_quantized_core_is_refused(part: str, message: str) -> None:
    made = quantized(16, 32, (4, 8), torch.float32, "int8", 8)
    assert made.scale is not None
    values, bitmask, b, scale = made.values.clone(), made.bitmask.clone(), made.b, made.scale.clone()
    if part == "zero scale":
        scale[2, 1] = 0
    elif part == "infinite scale":
        scale[2, 1] = torch.inf
    elif part == "bitmask":
        bitmask[3, 1] = 0b00110111
    elif part == "armor_b":
        b = b[:2]
    elif part == "values":
        values = values.to(torch.int16)
    else:
        scale = {
            "scale dtype": scale.half(),
            "scale groups": torch.ones(16, 3),
            "scale rows": scale[:15],
        }[part]
    with pytest.raises(CheckpointError, match=message):
        check_packed(PackedLinear(values, bitmask, made.a, b, scale), name="proj")


def damaged(part: str) -> PackedLinear:
    made = packed(16, 24, (4, 8), torch.float32)
    values, bitmask, a, b = made.values, made.bitmask.clone(), made.a.clone(), made.b
    if part == "bitmask":
        bitmask[3, 1] = 0b00110111
    elif part == "values":
        values = values.clone()
        values[2, 5] = torch.inf
    elif part == "armor_a":
        a[1, 2, 3] = torch.nan
    else:
        b = b[:2]
    return PackedLinear(values, bitmask, a, b)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("bitmask", "proj: bitmask: row 3, columns 8 to 11 keep 3 entries"),
        ("values", "proj: weight .* not finite"),
        ("armor_a", "proj: armor_a: 1 of 64 numbers are not finite"),
        ("armor_b", r"proj: armor_b is \(2, 8, 8\)"),
    ],
)
def test_checked_by_parts_as_by_unpacking(part: str, message: str) -> None:
    check_packed(packed(16, 24, (4, 8), torch.float32))
    with pytest.raises(CheckpointError, match=message):
        check_packed(damaged(part), name="proj")


def test_every_byte_of_a_mask_is_judged_as_by_packing() -> None:
    for byte in range(256):
        bits = [byte >> i & 1 for i in range(8)]
        made = PackedLinear.plain(torch.ones(1, 4), torch.tensor([[byte]], dtype=torch.uint8))
        if sum(bits[:4]) == sum(bits[4:]) == 2:
            check_packed(made)
            assert torch.equal(pack_2of4(*made.unpack())[1], made.bitmask)
        else:
            with pytest.raises(CheckpointError):
                check_packed(made)


def test_folded_is_a_plain_layer_bit_for_bit_for_transposed_inputs_too() -> None:
    tensors = packed(64, 64, (8, 8), torch.float32)
    armor, plain = holding(tensors, "folded"), holding(tensors, "folded").to_dense()
    plain.weight.requires_grad_()
    x = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(3)).mT
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(armor(x), plain(x))
    armor(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert armor._cached().grad is None


@pytest.mark.parametrize("backend", ["cpu", "auto", "folded"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_an_output_may_be_changed_in_place(backend: str, tokens: int) -> None:
    packed_layer = layer(backend)
    x = torch.randn(1, tokens, packed_layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = packed_layer(x)
    y += 1
    y.sum().backward()
    assert x.grad is not None
