"""Our modifiers in llm-compressor's own `oneshot`, in an environment that has it (`make test-llmcompressor`)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from armor_recipes import apply, load
from armor_recipes.builtin import model_folder
from armor_recipes.checkpoint.files import read_config
from armor_recipes.checkpoint.reader import read_layers
from armor_recipes.errors import CheckpointError, NumericalError, PlanError
from tests.support.engine import logits, save_model
from tests.support.engine import recipe as run_recipe

# llm-compressor and what it imports warn of much; its own suite is the place for that.
pytestmark = [pytest.mark.llmcompressor, pytest.mark.filterwarnings("default")]

ARMOR: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"], "block_size": 8, "iterations": 3}
SMOOTH: dict[str, Any] = {"smoothing_strength": 0.5}
KEYS = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}}
BUT_HEAD: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}


def eight_bits(targets: str = "Linear", **weights: Any) -> dict[str, Any]:
    given = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, **weights}
    return {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": [targets], "weights": given}}}


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    import llmcompressor

    return llmcompressor


@pytest.fixture(scope="module", params=["qwen2-bias", "llama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("source") / "model", request.param, torch.float32)


def tokenizer() -> Any:
    """Any: llm-compressor asks for one, and the samples are token ids."""
    return AutoTokenizer.from_pretrained(model_folder("stdlib-llama"))


def windows(count: int = 6, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(96, (length,), generator=generator)} for _ in range(count)]


def recipe(*modifiers: tuple[str, dict[str, Any]]) -> str:
    return yaml.safe_dump({"a_stage": {"a_modifiers": dict(modifiers)}}, sort_keys=False)


def compressed(theirs: ModuleType, source: Path, given: Any, samples: Any = None, **options: Any) -> PreTrainedModel:
    import armor_recipes.integrations.llmcompressor  # noqa: F401 - registers

    model = AutoModelForCausalLM.from_pretrained(source).eval()
    loader = DataLoader(windows() if samples is None else samples, batch_size=options.pop("batch", 1))
    theirs.oneshot(model=model, recipe=given, dataset=loader, tokenizer=tokenizer(), **options)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "modifiers",
    [
        (("ARMORModifier", ARMOR),),
        (("ARMORModifier", {**ARMOR, "objective": "hessian", "shrinkage": "auto"}),),
        (("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits())),
        (("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits(strategy="channel", group_size=None))),
        (("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits(strategy="tensor", group_size=None))),
        (("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits(num_bits=4, group_size=32))),
        (("SmoothQuantModifier", SMOOTH), ("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits())),
        (("ARMORModifier", ARMOR), ("QuantizationModifier", {"scheme": "W8A8", **BUT_HEAD})),
        (("ARMORModifier", ARMOR), ("QuantizationModifier", {"scheme": "FP8_DYNAMIC", **BUT_HEAD})),
    ],
    ids=lambda modifiers: "-".join(name.removesuffix("Modifier") for name, _ in modifiers),
)
def test_what_is_saved_gives_the_logits_of_the_model_in_memory(
    theirs: ModuleType, source: Path, tmp_path: Path, modifiers: Any
) -> None:
    model = compressed(theirs, source, recipe(*modifiers), output_dir=str(tmp_path / "out"))
    found = load(tmp_path / "out", backend="reference")  # which rounds activations, too
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    layers = read_layers(tmp_path / "out")
    assert len(layers) == 14
    assert {layer.core for layer in layers.values()} == {_core(modifiers[-1])}
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    if "scheme" not in modifiers[-1][1]:  # no activations are rounded
        torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in read_config(tmp_path / "dense")
    beside = (tmp_path / "out/recipe.yaml").read_text()
    assert "tuple" not in beside.partition("ARMORModifier")[2]  # that tag llm-compressor writes and does not read


def _core(last: tuple[str, dict[str, Any]]) -> str:
    if last[0] != "QuantizationModifier":
        return "float"
    if "scheme" in last[1]:
        return {"W8A8": "int8", "FP8_DYNAMIC": "fp8"}[last[1]["scheme"]]
    return f"int{last[1]['config_groups']['group_0']['weights']['num_bits']}"


MLP_ALONE = {**ARMOR, "targets": ["re:.*mlp.*"]}


@pytest.mark.parametrize(
    ("quantiser", "core"),
    [
        (("QuantizationModifier", {"scheme": "W8A8", **BUT_HEAD}), "int8"),
        (("QuantizationModifier", {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]}), "fp8"),
        (("QuantizationModifier", eight_bits("re:.*self_attn.*_proj$")), "float"),
        (("GPTQModifier", eight_bits("re:.*self_attn.*_proj$")), "float"),
    ],
    ids=["W8A8", "FP8_DYNAMIC and the head", "integers beside", "GPTQ beside"],
)
def test_cores_and_layers_that_are_quantised_beside_them_are_stored_together(
    theirs: ModuleType, source: Path, tmp_path: Path, quantiser: Any, core: str
) -> None:
    model = compressed(
        theirs, source, recipe(("ARMORModifier", MLP_ALONE), quantiser), output_dir=str(tmp_path / "out")
    )
    found = load(tmp_path / "out", backend="reference")
    torch.testing.assert_close(logits(found), logits(model), atol=2e-5, rtol=1e-4)
    layers = read_layers(tmp_path / "out")
    assert {(name.split(".")[3], layer.core) for name, layer in layers.items()} == {("mlp", core)}
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    if core == "float":  # no activations are rounded
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        torch.testing.assert_close(logits(stock), logits(model), atol=2e-5, rtol=1e-4)


def test_scales_are_those_of_the_dtype_that_is_stored(theirs: ModuleType, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.bfloat16)
    given = recipe(("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits()))
    model = compressed(theirs, source, given, output_dir=str(tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj"
    layer = read_layers(tmp_path / "out")[name]
    module: Any = model.get_submodule(name)
    assert layer.scale is not None
    assert layer.scale.dtype == torch.bfloat16
    assert torch.equal(layer.scale, module.weight_scale.to(torch.bfloat16))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=0.05, rtol=0.05)


def test_modifier_objects_do_as_yaml_does(theirs: ModuleType, source: Path) -> None:
    from armor_recipes.integrations.llmcompressor import registered

    made = registered["ARMORModifier"](**{**ARMOR, "block_size": [8, 8]})
    first, second = compressed(theirs, source, made), compressed(theirs, source, recipe(("ARMORModifier", ARMOR)))
    assert torch.equal(logits(first), logits(second))
    assert made.losses.keys() == {name for name, _ in made._modules.items()}


@pytest.mark.parametrize("kind", ["NoWagModifier", "MagnitudeModifier"])
def test_methods_without_factors_give_an_ordinary_model(
    theirs: ModuleType, source: Path, tmp_path: Path, kind: str
) -> None:
    model = compressed(theirs, source, recipe((kind, {"targets": ["Linear"], "ignore": ["lm_head"]})))
    weight: Any = model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


def test_theirs_of_a_name_that_both_have_stays_theirs(theirs: ModuleType) -> None:
    from llmcompressor.modifiers.factory import ModifierFactory

    from armor_recipes.integrations.llmcompressor import registered

    assert {"ARMORModifier", "NoWagModifier", "MagnitudeModifier"} <= registered.keys()
    assert not registered.keys() & ModifierFactory._main_registry.keys()


@pytest.mark.parametrize(
    ("modifiers", "options", "message"),
    [
        ((("ARMORModifier", ARMOR), ("SmoothQuantModifier", SMOOTH)), {}, "perplexity 40.3"),
        ((("ARMORModifier", ARMOR), ("GPTQModifier", eight_bits())), {}, r"in 9\.6 % of all groups"),
        ((("SmoothQuantModifier", SMOOTH), ("ARMORModifier", ARMOR)), {"pipeline": "sequential"}, "perplexity 653"),
        ((("QuantizationModifier", eight_bits()), ("ARMORModifier", ARMOR)), {}, "put the entry that quantises after"),
        (
            (("ARMORModifier", ARMOR), ("QuantizationModifier", {"scheme": "NVFP4A16", "ignore": ["lm_head"]})),
            {},
            "would quantise ARMOR's cores: .* not as float4 by tensor_group",
        ),
        (
            (("ARMORModifier", ARMOR), ("QuantizationModifier", {"scheme": "W4A16", "ignore": ["lm_head"]})),
            {},
            "group_size 128 is no multiple of 16 that divides the 32 columns",
        ),
        (
            (("ARMORModifier", ARMOR), ("QuantizationModifier", {**KEYS, "ignore": ["lm_head"]})),
            {},
            r"also quantises keys and values \(kv_cache_scheme\)",
        ),
        ((("ARMORModifier", {**ARMOR, "block_size": 7}),), {}, "block_size 7 does not fit"),
        ((("ARMORModifier", {**ARMOR, "targets": ["re:nothing"]}),), {}, "matches"),
        ((("ARMORModifier", ARMOR),), {"batch": 2, "samples": "padded"}, "padding would count as tokens"),
    ],
)
def test_what_was_measured_to_go_wrong_is_refused(
    theirs: ModuleType, tmp_path: Path, modifiers: Any, options: dict[str, Any], message: str
) -> None:
    source = save_model(tmp_path / "source", "llama", torch.float32)
    samples = options.pop("samples", None)
    if samples == "padded":
        samples = [{**one, "attention_mask": torch.arange(12) < 8} for one in windows()]
    with pytest.raises(PlanError, match=message):
        compressed(theirs, source, recipe(*modifiers), samples, **options)


def test_weights_alone_may_be_quantised_in_one_pipeline_with_armor(
    theirs: ModuleType, source: Path, tmp_path: Path
) -> None:
    given = recipe(("ARMORModifier", ARMOR), ("QuantizationModifier", eight_bits()))
    both = [compressed(theirs, source, given, pipeline=name) for name in ("independent", "sequential")]
    assert torch.equal(logits(both[0]), logits(both[1]))


def test_no_inputs_at_all_are_an_error(theirs: ModuleType, source: Path) -> None:
    with pytest.raises(NumericalError, match="no calibration token reached"):
        compressed(theirs, source, recipe(("ARMORModifier", ARMOR)), pipeline="datafree")


def test_fields_that_a_pipeline_of_theirs_has_no_place_for(theirs: ModuleType, source: Path) -> None:
    with pytest.raises(ValueError, match="ARMORModifier has no propagate in llm-compressor: the pipeline decides it"):
        compressed(theirs, source, recipe(("ARMORModifier", {**ARMOR, "propagate": "dense"})))
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        compressed(theirs, source, recipe(("ARMORModifier", {**ARMOR, "blocksize": 8})))


def test_transformers_own_saving_is_refused(theirs: ModuleType, source: Path, tmp_path: Path) -> None:
    model = compressed(theirs, source, recipe(("ARMORModifier", ARMOR)))
    with pytest.raises(CheckpointError, match="would load as garbage"):
        PreTrainedModel.save_pretrained(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="would load as garbage"):
        torch.save(model.state_dict(), tmp_path / "state.pt")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_second_run_of_oneshot_finds_the_layers_as_they_are(theirs: ModuleType, source: Path, tmp_path: Path) -> None:
    model = compressed(theirs, source, recipe(("ARMORModifier", ARMOR)))
    theirs.oneshot(model=model, recipe=recipe(("QuantizationModifier", eight_bits())))
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(PlanError, match="has factors already"):
        theirs.oneshot(
            model=model, recipe=recipe(("ARMORModifier", ARMOR)), dataset=DataLoader(windows()), tokenizer=tokenizer()
        )


def test_theirs_runs_as_the_first_step_of_a_run_of_ours(tmp_path: Path) -> None:
    """A method that leaves the function as it was, in other coordinates, and nothing behind it."""
    source = save_model(tmp_path / "source", "llama", torch.float32)
    apply(run_recipe(source, tmp_path / "out", LogarithmicEqualizationModifier={}))
    found, plain = load(tmp_path / "out"), load(source)
    assert not torch.equal(*(m.get_submodule("model.layers.0.self_attn.q_proj").weight for m in (found, plain)))
    torch.testing.assert_close(logits(found), logits(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "llama-gqa-tied"])
def test_rotations_that_lie_in_the_weights_come_before_ours(kind: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", kind, torch.float32)
    magnitude = {"targets": [r"re:.*mlp\..*_proj$"]}
    apply(run_recipe(source, tmp_path / "out", SpinQuantModifier={}, MagnitudeModifier=magnitude))
    found = load(tmp_path / "out")
    assert bool((found.get_parameter("model.layers.0.input_layernorm.weight") == 1).all())  # it lies in the weights
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert logits(found).isfinite().all()
