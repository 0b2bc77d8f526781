"""Adapters on ARMOR layers: those beside the weight train as on the dense model; those that need the weight are refused in time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import armor_recipes
from armor_recipes.errors import PlanError
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.packed import logits, write

peft = pytest.importorskip("peft")

KINDS = {str(getattr(key, "value", key)): kind for key, kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
KIND = "llama-attention-bias-gqa"
TARGETS = ["q_proj", "down_proj"]
DENSE = "model.layers.1.mlp.up_proj"  # which the sample leaves dense
WAY = r"armor_recipes\.to_dense\(model\).*`armor export FOLDER OUT --to dense`"
IDS = (torch.arange(48) * 7 % 96).view(2, 24)
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own, of which there are many


@pytest.fixture(scope="module", params=[None, 8], ids=["float", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    write(KIND, path, torch.float32, bits=request.param)
    return path


def config_of(kind: str, **fields: Any) -> Any:
    return KINDS[kind](**{"target_modules": TARGETS, **fields})


def trained(model: PreTrainedModel, config: Any) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """The model with an adapter that is not zero, its logits, and the gradients of one backward pass."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    out = adapted(input_ids=IDS).logits
    out.square().sum().backward()
    return adapted, out.detach(), [p.grad for p in adapted.parameters() if p.grad is not None]


def weights(model: nn.Module) -> dict[str, tuple[type, int, int]]:
    """Everything that an adapter could change."""
    found = {name: (type(module), 0, 0) for name, module in model.named_modules()}
    state = model.state_dict(keep_vars=True)
    return {**found, **{name: (type(tensor), id(tensor), tensor._version) for name, tensor in state.items()}}


BESIDE: list[tuple[str, Mapping[str, Any]]] = [
    ("LORA", {}),
    ("LORA", {"init_lora_weights": "gaussian"}),
    ("LORA", {"init_lora_weights": False}),
    ("LORA", {"use_rslora": True}),
    ("LORA", {"target_modules": "all-linear"}),
    ("LORA", {"modules_to_save": ["lm_head"]}),
    ("IA3", {"feedforward_modules": ["down_proj"]}),
    ("VERA", {"r": 8}),
    ("VBLORA", {"vector_length": 16, "num_vectors": 8}),
    ("FOURIERFT", {"n_frequency": 10}),
    ("RANDLORA", {"r": 4}),
    ("OFT", {"oft_block_size": 8}),
    ("MISS", {"r": 8}),
    ("ROAD", {"group_size": 16}),
    ("LN_TUNING", {"target_modules": ["norm"]}),
]


@pytest.mark.parametrize(("kind", "fields"), [one for one in BESIDE if one[0] in KINDS], ids=str)
def test_adapters_beside_the_weight_train_as_on_the_dense_model(
    folder: Path, kind: str, fields: Mapping[str, Any]
) -> None:
    _, expected, gradients = trained(armor_recipes.to_dense(armor_recipes.load(folder)), config_of(kind, **fields))
    adapted, found, here = trained(armor_recipes.load(folder), config_of(kind, **fields))
    assert torch.equal(found, expected)  # the backend folded has the bits of a dense layer
    assert len(here) == len(gradients) > 0
    assert all(torch.equal(one, two) for one, two in zip(here, gradients, strict=True))
    if kind == "LN_TUNING":  # is nowhere near our layers
        return
    before = weights(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(PlanError, match=rf"layers\.0\.\S+ is an ARMOR layer.* merging an adapter .*{WAY}"):
            merge()
    assert weights(adapted) == before
    bare = adapted.unload()  # which needs no weight
    if "modules_to_save" not in fields:
        assert torch.equal(logits(bare), logits(armor_recipes.load(folder)))


READING: list[tuple[str, Mapping[str, Any], str]] = [
    ("LORA", {"use_dora": True}, "use_dora"),
    *[
        ("LORA", {"init_lora_weights": init}, f"init_lora_weights='{init}'")
        for init in ("pissa", "pissa_niter_2", "olora")
    ],
    ("LORA", {"init_lora_weights": "corda"}, "corda"),
    ("LORA", {"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ("LORA", {"modules_to_save": ["up_proj"]}, "modules_to_save"),
    *[(kind, {}, kind) for kind in ("LOHA", "LOKR", "HRA", "BOFT", "DELORA", "SHIRA", "OSF")],
    ("MISS", {"init_weights": "bat"}, "init_weights='bat'"),
]


@pytest.mark.parametrize(("kind", "fields", "word"), [one for one in READING if one[0] in KINDS], ids=str)
def test_what_needs_the_weight_is_refused_before_anything_is_changed(
    folder: Path, kind: str, fields: Mapping[str, Any], word: str
) -> None:
    config = config_of(kind, **fields)
    model = armor_recipes.load(folder)
    before = weights(model)
    with pytest.raises(PlanError, match=rf"is an ARMOR layer, whose weight is packed, and .*{re.escape(word)}.*{WAY}"):
        peft.get_peft_model(model, config)
    assert weights(model) == before
    assert torch.equal(logits(model), logits(armor_recipes.load(folder)))


def test_a_start_that_takes_integers_dtype_is_refused_on_integers(folder: Path) -> None:
    model = armor_recipes.load(folder)
    config = config_of("LORA", init_lora_weights="orthogonal")
    if model.model.layers[0].self_attn.q_proj.weight.is_floating_point():
        peft.get_peft_model(model, config)
        return
    with pytest.raises(PlanError, match=r"init_lora_weights='orthogonal'"):
        peft.get_peft_model(model, config)


def test_a_second_adapter_is_checked_too(folder: Path) -> None:
    adapted = peft.get_peft_model(armor_recipes.load(folder), config_of("LORA"))
    before = weights(adapted)
    with pytest.raises(PlanError, match="use_dora"):
        adapted.add_adapter("second", config_of("LORA", use_dora=True))
    assert weights(adapted) == before
    assert list(adapted.peft_config) == ["default"]
    adapted.add_adapter("second", config_of("LORA", target_modules=["k_proj", "q_proj"]))


def test_dense_layers_beside_take_everything(folder: Path) -> None:
    config = config_of("LORA", use_dora=True, target_modules=[DENSE, "lm_head"])
    adapted, before, _ = trained(armor_recipes.load(folder), config)
    merged = adapted.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, ArmorLinear)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


def test_other_models_are_peft_s_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    adapted = peft.get_peft_model(model, config_of("LORA", target_modules=["0"], use_dora=True))
    assert not isinstance(adapted.merge_and_unload()[0].weight, type(None))


def test_a_single_layer_is_not_merged_either(folder: Path) -> None:
    adapted = peft.get_peft_model(armor_recipes.load(folder), config_of("LORA"))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.q_proj is an ARMOR layer"):
        layer.merge()


def test_what_is_measured_before_a_start_is_refused_at_once(folder: Path) -> None:
    if not hasattr(peft, "preprocess_loraga"):  # came with 0.19
        return
    config = config_of("LORA", init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with pytest.raises(PlanError, match="lora_ga"):
        peft.preprocess_loraga(armor_recipes.load(folder), config, lambda: pytest.fail("it ran"))


def test_a_kind_that_this_release_does_not_know_is_refused(folder: Path) -> None:
    config = config_of("LORA")
    config.peft_type = "TOMORROWS"
    with pytest.raises(PlanError, match=r"this adapter \(TOMORROWS\) needs the weight itself"):
        peft.LoraModel(armor_recipes.load(folder), {"default": config}, "default")


def test_an_adapter_is_saved_and_loaded_and_merged_after_to_dense(folder: Path, tmp_path: Path) -> None:
    adapted, before, _ = trained(armor_recipes.load(folder), config_of("LORA"))
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(armor_recipes.load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), before)
    assert armor_recipes.to_dense(again) is again
    assert not any(isinstance(module, ArmorLinear) for module in again.modules())
    assert torch.equal(logits(again), before)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_it_trains_with_gradient_checkpointing(folder: Path) -> None:
    _, _, expected = trained(armor_recipes.load(folder), config_of("LORA"))
    model = armor_recipes.load(folder)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    _, _, found = trained(model.train(), config_of("LORA"))
    assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-5) for one, two in zip(found, expected, strict=True))


def test_the_example_of_the_docs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in found if "import LoraConfig" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/runtime.md", "exec"), {"folder": str(folder)})
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained("merged")),  # LoRA starts at zero
        logits(armor_recipes.to_dense(armor_recipes.load(folder))),
    )
