"""A packed weight that several modules have: stored once, one in memory, however a model is loaded, saved, copied and exported."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Zamba2ForCausalLM

import armor_recipes
from armor_recipes.checkpoint.config import LayerSpec, layer_specs, quantization_config, version_of
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import inspect, read_layers
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.errors import CheckpointError, PlanError
from armor_recipes.integrations.dense import to_dense
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.run import apply
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.engine import SIZES, core, recipe
from tests.support.packed import logits, made_up, quantized
from tests.support.stacks import make_stacked

FIRST, AGAIN = (f"model.layers.{layer}.shared_transformer.self_attn" for layer in (1, 3))
Q, K, V = (f"{FIRST}.{name}_proj" for name in "qkv")
USES = {f"{AGAIN}.{name}_proj": f"{FIRST}.{name}_proj" for name in "qkv"}
ALONE = "model.layers.1.linear"


def packed(name: str, module: nn.Linear, generator: torch.Generator) -> PackedLinear:
    """V has int4, and K the B of Q."""
    factors = made_up(module.out_features, module.in_features, (8, 8), generator)
    if name == V:
        return quantized(factors, torch.bfloat16, bits=4, group=8)
    return PackedLinear.from_factorization(factors, torch.bfloat16)


def written(model: PreTrainedModel, names: tuple[str, ...], folder: Path, **same_b: str) -> PreTrainedModel:
    """The model with made-up layers, in memory as a session holds it and in a folder."""
    generator, layers = torch.Generator().manual_seed(1), {}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for name in names:
        module: Any = model.get_submodule(name)
        layers[name] = packed(name, module, generator)
        if name in same_b:
            other = layers[same_b[name]]
            layers[name] = PackedLinear(layers[name].values, layers[name].bitmask, layers[name].a, other.b.clone())
        module.weight.data.copy_(layers[name].fold(torch.float32))
    folder.mkdir(parents=True)
    write_checkpoint(model, layers, folder, dtype=torch.bfloat16)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("tied") / "model"
    model: Any = make_stacked("zamba2")
    return folder, logits(written(model, (Q, K, V, ALONE), folder, **{K: Q}))


@pytest.fixture
def copied(made: tuple[Path, Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "model"))


def loaded(folder: Path) -> PreTrainedModel:
    return armor_recipes.load(folder, dtype=torch.float32, backend="folded")


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def kwargs_with(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    groups = config["quantization_config"]["config_groups"].values()
    found: dict[str, Any] = next(g["weights"]["observer_kwargs"] for g in groups if name in g["targets"])
    return found


# --- in files -------------------------------------------------------------------------------------------------------------


def test_stored_once_under_the_name_that_saving_keeps(made: tuple[Path, Tensor]) -> None:
    folder, _ = made
    config = config_of(folder)
    specs = layer_specs(config["quantization_config"], where="x")
    assert {name: spec.tied_to for name, spec in specs.items() if spec.tied_to} == USES
    assert specs[f"{AGAIN}.k_proj"].input_factor == specs[K].input_factor == Q
    assert not set(USES) & set(config["quantization_config"]["ignore"])
    held = tensors(folder)
    assert not any(name.startswith(f"{AGAIN}.{q}_proj") for name in held for q in "qkv")
    assert list(read_layers(folder)) == sorted([Q, K, V, ALONE])
    size = inspect(folder)
    assert [layer.name for layer in size.layers] == sorted([Q, K, V, ALONE])
    assert size.nbytes == sum(value.nbytes for value in held.values())


def test_the_format_version_is_the_lowest_that_describes_a_folder() -> None:
    layers = {"a": LayerSpec((8, 8)), "b": LayerSpec((8, 8))}
    assert version_of(None) == version_of(quantization_config(layers, [], {"b": "a"})) == 2
    assert version_of(quantization_config({"a": LayerSpec((8, 8))}, [], None, {"b": "a"})) == 3


# --- in memory ------------------------------------------------------------------------------------------------------------


def same(model: PreTrainedModel) -> bool:
    pairs = [(model.get_submodule(use), model.get_submodule(owner)) for use, owner in USES.items()]
    return all(use.tied_to is owner for use, owner in pairs)


def test_loaded_layers_are_one_and_are_saved_as_one(made: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = made
    model, info = Zamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(model), expected)
    model = loaded(folder)
    assert same(model)
    assert torch.equal(logits(model), expected)
    assert all(model.get_submodule(use)._prepared is None for use in USES)  # folded once
    stored = armor_recipes.load(folder)
    logits(stored)
    stored.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert kwargs_with(config_of(tmp_path), Q) == kwargs_with(config_of(folder), Q)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_casts_stay_one(made: tuple[Path, Tensor], copier: Callable[[Any], Any]) -> None:
    other = copier(loaded(made[0]))
    assert same(other)
    assert torch.equal(logits(other), made[1])
    assert same(nn.Module.bfloat16(other))


def test_a_layer_that_is_parted_runs_from_its_own(made: tuple[Path, Tensor]) -> None:
    model: Any = loaded(made[0])
    use, owner = model.get_submodule(f"{AGAIN}.v_proj"), model.get_submodule(V)
    use.armor_a = nn.Parameter(2 * use.armor_a.detach())
    assert use.tied_to is None
    x = torch.randn(3, use.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(use(x), 2 * owner(x))


def test_dense_again_the_weights_stay_tied(made: tuple[Path, Tensor], tmp_path: Path) -> None:
    model = to_dense(loaded(made[0]))
    assert torch.equal(logits(model), made[1])
    assert all(model.get_submodule(use).weight is model.get_submodule(owner).weight for use, owner in USES.items())
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    export_folder(made[0], tmp_path / "exported", to="dense")
    assert tensors(tmp_path / "dense").keys() == tensors(tmp_path / "exported").keys()
    found = Zamba2ForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(found), made[1])


def test_the_legacy_format_has_no_place_for_them(made: tuple[Path, Tensor], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"{AGAIN}.k_proj under the name of another module.*export to dense-2of4"):
        export_folder(made[0], tmp_path / "out", to="sparse-24-bitmask")


# --- how else transformers ties -------------------------------------------------------------------------------------------

UP, UP_AGAIN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


class WeightsTied(LlamaForCausalLM):
    """Ties a weight by its own name."""

    _tied_weights_keys = {  # noqa: RUF012 - theirs
        "lm_head.weight": "model.embed_tokens.weight",
        f"{UP_AGAIN}.weight": f"{UP}.weight",
    }


class ModulesTied(LlamaForCausalLM):
    """Has one module at two places."""

    _tied_weights_keys = {  # noqa: RUF012 - theirs
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj": UP,
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].mlp.up_proj = self.model.layers[0].mlp.up_proj
        self.post_init()


@pytest.mark.parametrize("kind", [WeightsTied, ModulesTied])
def test_other_ways_to_tie(kind: type[LlamaForCausalLM], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=True)).eval()
    expected = logits(written(model, (UP, "model.layers.0.mlp.gate_proj"), tmp_path / "model"))
    held = tensors(tmp_path / "model")
    assert not any(name.startswith(UP_AGAIN) for name in held)
    found, info = kind.from_pretrained(tmp_path / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert found.get_submodule(UP_AGAIN).armor_a is found.get_submodule(UP).armor_a
    torch.testing.assert_close(logits(found), expected)
    kind.from_pretrained(tmp_path / "model", dtype="auto").save_pretrained(tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert held.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in held.items())


# --- damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{AGAIN}.q_proj": f"{AGAIN}.q_proj"}, "must have a weight of its own"),
        ({f"{AGAIN}.q_proj": "no.such.module"}, "must be targets of this group"),
        ({f"{AGAIN}.q_proj": 3}, "must map module names to module names"),
        ({f"{AGAIN}.q_proj": K}, "is not that of the other"),
        ({ALONE: Q}, f"{ALONE}.armor_a' is no tensor of this layer"),
    ],
)
def test_hostile_mappings(copied: Path, change: dict[str, Any], says: str) -> None:
    config = config_of(copied)
    kwargs_with(config, Q)["armor_tied_weights"].update(change)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        loaded(copied)
    with pytest.raises(CheckpointError):
        Zamba2ForCausalLM.from_pretrained(copied)


def test_without_the_mapping_tensors_are_missing(copied: Path) -> None:
    config = config_of(copied)
    del kwargs_with(config, Q)["armor_tied_weights"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"no file holds its tensor {AGAIN}"):
        loaded(copied)


def test_tensors_under_the_other_name_are_refused(copied: Path) -> None:
    held = tensors(copied)
    held[f"{AGAIN}.q_proj.armor_a"] = held[f"{Q}.armor_a"].clone()
    save_file(held, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj.armor_a' is no tensor of this layer"):
        loaded(copied)


def test_a_model_that_does_not_tie_them(copied: Path) -> None:
    config = config_of(copied)
    (copied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"which this Zamba2ForCausalLM does not tie.*tie_word_embeddings"):
        loaded(copied)


# --- by a recipe ----------------------------------------------------------------------------------------------------------


def test_a_recipe_packs_them_once_also_where_the_source_has_them_twice(tmp_path: Path) -> None:
    model: Any = make_stacked("zamba2")
    model.bfloat16().save_pretrained(tmp_path / "source")
    held = tensors(tmp_path / "source")
    twice = {use: held[f"{owner}.weight"].clone() for use, owner in ((f"{u}.weight", o) for u, o in USES.items())}
    save_file({**held, **twice}, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    own = {"targets": [r"re:.*shared_transformer\.(self_attn|feed_forward)\.[a-z_]*proj$"], "block_size": 8}
    mapping = recipe(
        tmp_path / "source",
        tmp_path / "out",
        ARMORModifier={**own, "iterations": 1},
        QuantizationModifier=core(targets=[r"re:.*q_proj$"]),
    )
    result = apply(mapping)
    rows = {row.name: row for row in result.plan.modules}
    assert rows[Q].uses == (f"{AGAIN}.q_proj",)
    assert rows.keys() == result.modules.keys() == read_layers(tmp_path / "out").keys()
    manifest = json.loads((tmp_path / "out/armor_manifest.json").read_text())
    assert (manifest["format_version"], manifest["carried_over"]) == (3, [])
    assert manifest["modules"].keys() == rows.keys()
    found = loaded(tmp_path / "out")
    assert isinstance(found.get_submodule(f"{AGAIN}.q_proj"), ArmorLinear)
    assert same(found)
