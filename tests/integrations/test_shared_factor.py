"""A B that several modules share: stored once, used by all, in every way a model is copied, moved, trained and saved."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import armor_recipes
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import inspect, read_layers
from armor_recipes.errors import CheckpointError
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.packed import logits, made_up, write

KIND = "llama-attention-bias-gqa"
Q, K, O_, GATE, UP = (
    f"model.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("shared") / "model"
    return folder, logits(write(KIND, folder, share=True))


@pytest.fixture
def copied(written: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "model"))


def owners(folder: Path) -> dict[str, str]:
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    kwargs = [group["weights"]["observer_kwargs"] for group in groups]
    return {sharer: owner for group in kwargs for sharer, owner in group.get("armor_input_factor", {}).items()}


def test_stored_once_under_the_first(written: tuple[Path, torch.Tensor]) -> None:
    folder, _ = written
    expected = {UP: GATE, K: Q, K.replace("0", "1"): Q.replace("0", "1")}  # layer 1's up_proj is dense
    # In this sample all of one parent and block size share, so o_proj does, too.
    assert owners(folder) == {**expected, O_: Q, O_.replace("0", "1"): Q.replace("0", "1")}
    header = load_file(folder / "model.safetensors")
    assert f"{K}.armor_b" not in header
    sizes = {layer.name: layer for layer in inspect(folder).layers}
    assert sizes[K].input_factor == Q
    assert sizes[Q].input_factor is None
    assert sizes[K].nbytes == sum(header[f"{K}.{part}"].nbytes for part in ("weight", "bitmask", "armor_a"))
    layers = read_layers(folder)
    assert layers[K].b is layers[Q].b
    assert inspect(folder).nbytes == sum(tensor.nbytes for tensor in header.values())


def test_loaded_model_has_the_sessions_bits_and_saves_the_same(
    written: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, expected = written
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), expected)
    stored = armor_recipes.load(folder)
    logits(stored)
    stored.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert owners(tmp_path) == owners(folder)
    assert torch.equal(logits(armor_recipes.load(tmp_path, dtype=torch.float32)), expected)


def loaded(folder: Path) -> PreTrainedModel:
    return armor_recipes.load(folder, dtype=torch.float32)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(written: tuple[Path, torch.Tensor], copier: Callable) -> None:
    model = loaded(written[0])
    other = copier(model)
    assert torch.equal(logits(other), written[1])
    q, k = (other.get_submodule(name) for name in (Q, K))
    assert k._owner is q
    assert len(q._sharers) == 2
    with torch.no_grad():
        q.armor_b.zero_()
    assert not k.packed().b.any()
    assert torch.equal(logits(model), written[1])


def test_casting_a_model_and_a_lone_layer(written: tuple[Path, torch.Tensor]) -> None:
    model = loaded(written[0])
    layers: nn.Module = model.model.layers
    layers.double()
    assert model.get_submodule(K).packed().b.dtype == torch.float64
    layers.float()
    assert torch.equal(logits(model), written[1])
    lone = copy.deepcopy(model.get_submodule(K)).double()
    assert lone._owner.armor_b.dtype == torch.float32
    assert lone.packed().b.dtype == torch.float64


def test_gradients_of_all_sharers_reach_the_one_factor(written: tuple[Path, torch.Tensor]) -> None:
    model = loaded(written[0])
    q, k = (model.get_submodule(name).train() for name in (Q, K))
    q.armor_b.requires_grad_()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    k(x).square().sum().backward()
    assert q.armor_b.grad.abs().sum() > 0
    before = k(x)
    with torch.no_grad():
        q.armor_b.mul_(2)
    torch.testing.assert_close(k.eval()(x) - k.bias, 2 * (before - k.bias))


def test_decompressing_owner_first_or_model(written: tuple[Path, torch.Tensor]) -> None:
    model = loaded(written[0])
    model.get_submodule(Q).to_dense()
    assert "armor_b" in dict(model.get_submodule(K).named_parameters())
    assert torch.equal(logits(model), written[1])
    model = loaded(written[0])
    model.hf_quantizer.compressor.decompress_model(model)
    assert not any(isinstance(module, ArmorLinear) for module in model.modules())
    assert torch.equal(logits(model), written[1])


def test_format_version_1_still_loads(copied: Path, tmp_path: Path) -> None:
    """Version 1 named no core type and shared nothing."""
    old = tmp_path / "old"
    expected = logits(write(KIND, old))
    config = json.loads((old / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        assert group["weights"]["observer_kwargs"].pop("armor_core") == "float"
        assert set(group["weights"]["observer_kwargs"]) == {"armor_block_size"}
    (old / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(armor_recipes.load(old, dtype=torch.float32)), expected)


def group_with(config: dict, name: str) -> dict:
    groups = config["quantization_config"]["config_groups"].values()
    kwargs = next(group["weights"]["observer_kwargs"] for group in groups if name in group["targets"])
    return kwargs["armor_input_factor"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({K: K}, "must have a B of its own"),
        ({K: O_}, "must have a B of its own"),
        ({Q: K}, "must have a B of its own"),
        ({K: "no.such.module"}, "must be targets of this group"),
        ({"no.such.module": Q}, "must be targets of this group"),
        ({K: GATE}, "must be targets of this group"),
        ({K: 3}, "must map module names to module names"),
        ({Q.replace("0", "1"): Q}, "must have a B of its own|is no tensor of this layer"),
        ({K: None}, "must map module names to module names"),
    ],
)
def test_hostile_mappings(copied: Path, change: dict, says: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    group_with(config, K).update(change)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        armor_recipes.load(copied)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(copied)


def test_widths_must_be_equal(copied: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    down = "model.layers.0.mlp.down_proj"
    group_with(config, GATE)[down] = GATE
    (copied / "config.json").write_text(json.dumps(config))
    tensors = load_file(copied / "model.safetensors")
    del tensors[f"{down}.armor_b"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lets {down} use the B of {GATE}, but .* widths and dtypes"):
        read_layers(copied)
    with pytest.raises(CheckpointError, match=rf"{down} cannot use the B of {GATE}"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_sharer_with_a_factor_of_its_own_is_refused(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors[f"{K}.armor_b"] = tensors[f"{Q}.armor_b"].clone()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{K}.armor_b' is no tensor of this layer"):
        armor_recipes.load(copied)


def test_a_missing_owner_tensor_is_no_random_one(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors[f"{Q}.armor_b"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"no file holds its tensor {Q}.armor_b"):
        armor_recipes.load(copied)
    model = AutoModelForCausalLM.from_pretrained(copied)
    with pytest.raises(CheckpointError, match="holds no armor_b"):
        model.get_submodule(K)(torch.zeros(1, 32, dtype=torch.bfloat16))


def test_sharing_among_lone_layers() -> None:
    def layer(seed: int, columns: int = 16) -> ArmorLinear:
        factors = made_up(8, columns, (4, 8), torch.Generator().manual_seed(seed))
        return ArmorLinear.from_packed(
            nn.Linear(columns, 8), PackedLinear.from_factorization(factors, torch.float32)
        ).eval()

    first, second, third = layer(1), layer(2), layer(3)
    second.share_input_factor(first)
    second.share_input_factor(first)
    assert list(second.state_dict()) == ["weight", "bias", "bitmask", "armor_a"]
    for owner, sharer in ((second, third), (first, first), (third, first), (third, second)):
        with pytest.raises(CheckpointError, match="sharing already"):
            sharer.share_input_factor(owner)
    with pytest.raises(CheckpointError, match=r"it needs \(1, 8, 8\)"):
        layer(4, 8).share_input_factor(first)
