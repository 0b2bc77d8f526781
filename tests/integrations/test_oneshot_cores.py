"""A linear layer with its factors as hooks, and what may be saved of it: the parts that need no llm-compressor."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from armor_recipes import load
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError, PlanError
from armor_recipes.integrations.oneshot import cores, order, saving
from armor_recipes.modifiers.base import ModuleShape
from armor_recipes.modifiers.kinds.changes import loaded_weight
from armor_recipes.solver import factorize
from tests.support.engine import logits, make_model


def packed(weight: Tensor, block_size: int = 8) -> PackedLinear:
    h = torch.ones(weight.shape[1])
    found = factorize(weight, h, block_size=(block_size, block_size), iterations=2, seed=0)
    return PackedLinear.from_factorization(found, weight.dtype)


def attached(linear: nn.Linear) -> PackedLinear:
    made = packed(linear.weight.detach())
    linear.weight.data = cores.attach(linear, made)
    return made


@given(st.booleans(), st.sampled_from([(16, 16), (32, 16), (16, 32)]), st.integers(0, 3))
def test_a_core_with_its_factors_gives_what_the_product_gives(bias: bool, sides: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(*sides, bias=bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 3, sides[0], generator=generator)
    made = attached(linear)
    expected = nn.functional.linear(x, loaded_weight(made, torch.float32), linear.bias)
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(linear)(x), expected, atol=1e-5, rtol=1e-5)
    again = cores.packed_layer("layer", linear)
    assert all(torch.equal(getattr(again, part), getattr(made, part)) for part in ("values", "bitmask", "a", "b"))


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    found = make_model("qwen2-bias", torch.float32)
    for name, module in list(found.named_modules()):
        if name.endswith(("q_proj", "down_proj")):
            assert isinstance(module, nn.Linear)
            attached(module)
    saving.guard(found)
    return found


@pytest.mark.parametrize("compressed", [True, False])
def test_a_saved_model_gives_the_logits_of_the_one_in_memory(
    model: PreTrainedModel, tmp_path: Path, compressed: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("old")
    model.save_pretrained(tmp_path / "out", save_compressed=compressed)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "kept.txt" in names
    assert "model-00001-of-00002.safetensors" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copy", save_compressed=compressed)
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_every_other_way_of_saving_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an ARMOR layer, whose weight is a core without its factors"):
        model.state_dict()
    with pytest.raises(CheckpointError, match=r"call model\.save_pretrained\(folder\)"):
        PreTrainedModel.save_pretrained(model, tmp_path / "theirs")
    assert not list((tmp_path / "theirs").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="does not know state_dict, variant"):
        model.save_pretrained(tmp_path / "out", state_dict={}, variant="fp16")
    assert not (tmp_path / "out").exists()


def test_a_core_that_is_no_2of4_any_more_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    weight: Any = module.weight
    weight.data[0, :4] = 1.0
    with pytest.raises(CheckpointError, match=r"down_proj: a modifier after ARMOR gave values .* in 1 of 512 groups"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@dataclass(eq=False)
class Fake:
    """Stands for a modifier of llm-compressor, told by its class's name."""

    targets: list[str]
    ignore: list[str] = field(default_factory=list)
    requires_calibration_data: bool = True
    scheme: Any = None
    cache: Any = None

    @property
    def resolved_config(self) -> Any:
        groups = {"group_0": self.scheme}
        return SimpleNamespace(config_groups=groups, kv_cache_scheme=self.cache, ignore=self.ignore)


def fake(name: str, targets: list[str], *, quantizes: bool = False, **fields: Any) -> Fake:
    bases = (type("QuantizationMixin", (), {}), Fake) if quantizes else (Fake,)
    found: Fake = type(name, bases, {"__hash__": object.__hash__})(targets, **fields)
    return found


def weights(inputs: dict[str, Any] | None = None, **fields: Any) -> QuantizationScheme:
    given = QuantizationArgs(**{"num_bits": 8, "strategy": "channel", **fields})
    args = (
        None if inputs is None else QuantizationArgs(**{"num_bits": 8, "strategy": "token", "dynamic": True, **inputs})
    )
    return QuantizationScheme(targets=[], weights=given, input_activations=args)


def checked(other: Fake, *, before: bool = False) -> list[str]:
    model = make_model("qwen2-bias")
    taken: dict[str, Any] = {n: m for n, m in model.named_modules() if n.endswith("down_proj")}
    own = fake("ARMORModifier", ["re:.*down_proj$"])
    return order.check_order(own, [other, own] if before else [own, other], taken, model)


@pytest.mark.parametrize("name", ["SmoothQuantModifier", "LogarithmicEqualizationModifier", "AWQModifier"])
def test_smoothing_comes_before(name: str) -> None:
    other = fake(name, [])
    assert checked(other, before=True) == []
    with pytest.raises(
        PlanError, match=rf"{name} after ARMORModifier scales the core .* perplexity 40\.3 .* put it before"
    ):
        checked(other)


def test_gptq_after_armor_breaks_the_mask() -> None:
    with pytest.raises(
        PlanError, match=r"in 9\.6 % of all groups.* perplexity 43\.9.*both take model\.layers\.0\.mlp\.down_proj"
    ):
        checked(fake("GPTQModifier", ["Linear"], quantizes=True))


def test_modifiers_that_were_not_tried_are_refused_after_armor() -> None:
    with pytest.raises(PlanError, match="QuIPModifier after ARMORModifier changes the core, which has not been tried"):
        checked(fake("QuIPModifier", []))
    assert checked(fake("WandaPruningModifier", ["re:.*up_proj$"])) == []


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        (weights(num_bits=4, type="float"), "not as float4 by channel"),
        (weights(symmetric=False), "not as asymmetric int8 by channel"),
        (weights(num_bits=6), "not as int6 by channel"),
        (weights(strategy="block", block_structure=[8, 8]), "not as int8 by block"),
        (weights(strategy="group", group_size=128), "group_size 128 is no multiple of 16 that divides the 64 columns"),
        (weights(strategy="group", group_size=8), "group_size 8 is no multiple of 16"),
        (weights(strategy="group", group_size=16, actorder="static"), "in the order of its columns"),
        (weights({"symmetric": False}), "not dynamic asymmetric int8 by token"),
        (weights({"dynamic": False, "strategy": "tensor"}), "not static int8 by tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "scheme",
)
def test_schemes_that_a_core_cannot_be_stored_in_are_refused_first(scheme: Any, problem: str) -> None:
    scheme.targets = ["re:.*down_proj$"]
    with pytest.raises(PlanError, match=rf"would quantise ARMOR's cores: .*{problem}"):
        checked(fake("QuantizationModifier", ["re:.*down_proj$"], quantizes=True, scheme=scheme))


@pytest.mark.parametrize("inputs", [None, {}, {"type": "float"}], ids=["none", "int8", "fp8"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_schemes_that_a_core_has_a_place_for(strategy: str, inputs: dict[str, Any] | None) -> None:
    kind = "float" if inputs else "int"
    scheme = weights(inputs, strategy=strategy, type=kind)
    scheme.targets = ["re:.*down_proj$"]
    assert checked(fake("QuantizationModifier", ["re:.*down_proj$"], quantizes=True, scheme=scheme)) == []
    shape = ModuleShape("down_proj", 32, 64, 2)
    found = cores.core_scheme(scheme, shape)
    assert found is not None
    assert (found.core, found.activations) == (
        ("fp8", "fp8") if inputs else ("int8", None if inputs is None else "int8")
    )


def test_four_bits_are_warned_of_and_eight_are_not() -> None:
    by_bits = {}
    for bits in (8, 4):
        scheme = weights(num_bits=bits)
        scheme.targets = ["re:.*down_proj$"]
        by_bits[bits] = checked(fake("QuantizationModifier", ["re:.*down_proj$"], quantizes=True, scheme=scheme))
    assert by_bits[8] == []
    assert "perplexity 41.5 from 39.4" in by_bits[4][0]


def test_other_layers_may_be_quantised_beside_them_and_keys_and_values_not() -> None:
    scheme = weights()
    scheme.targets = ["re:.*(up|down)_proj$"]
    assert checked(fake("QuantizationModifier", ["re:.*(up|down)_proj$"], quantizes=True, scheme=scheme)) == []
    other = fake("QuantizationModifier", [], quantizes=True, scheme=scheme, cache=QuantizationArgs(num_bits=8))
    with pytest.raises(PlanError, match=r"also quantises keys and values \(kv_cache_scheme\)"):
        checked(other)


def test_a_joint_pipeline_is_refused_where_both_learn_from_inputs() -> None:
    own, data_free = fake("ARMORModifier", []), fake("QuantizationModifier", [], requires_calibration_data=False)
    order.check_alone(own, [own, data_free])
    with pytest.raises(PlanError, match=r"joint pipeline .* perplexity 653 .* leave `pipeline` at \"independent\""):
        order.check_alone(own, [own, fake("GPTQModifier", [])])


def test_what_cannot_become_a_core() -> None:
    core, linear = nn.Linear(16, 16), nn.Linear(16, 16)
    attached(core)
    with pytest.raises(PlanError, match="has factors already"):
        cores.check_plain("a", core)
    with pytest.raises(PlanError, match=r"is a Bilinear, not a plain nn\.Linear"):
        cores.check_plain("a", nn.Bilinear(4, 4, 4))
    linear.quantization_scheme = object()  # type: ignore[assignment]
    with pytest.raises(PlanError, match="put the entry that quantises after this one"):
        cores.check_unquantized("a", linear)
