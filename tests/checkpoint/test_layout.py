"""config.json and the tensor files: what is written, how it is read back, and what a damaged folder says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

from armor_recipes.checkpoint.config import LayerSpec, layer_specs, named_tensors, quantization_config
from armor_recipes.checkpoint.reader import check_folder, inspect, read_header, read_layers
from armor_recipes.checkpoint.writer import check_layers, tensor_hashes, write_beside, write_checkpoint
from armor_recipes.errors import CheckpointError, PlanError
from tests.support.packed import IGNORED, MODELS, changed, session_model, write

KIND = "llama-attention-bias-gqa"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "model"
    write(KIND, folder)
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_config_survives_compressed_tensors_schema() -> None:
    _, layers = session_model(KIND)
    config = quantization_config(layers, ["lm_head"])

    kept = json.loads(json.dumps(QuantizationConfig.model_validate(config).model_dump()))

    assert changed(config, kept) == {"version"}, (
        "the schema changed what it keeps: `version` alone is known to be dropped"
    )
    assert layer_specs(kept, where="config.json") == {
        name: LayerSpec(layer.block_size) for name, layer in layers.items()
    }


def test_groups_name_every_module_once_by_block_size() -> None:
    _, layers = session_model(KIND)
    config = quantization_config(dict(reversed(layers.items())), ["lm_head"])
    assert config == quantization_config(layers, ["lm_head"])
    groups = config["config_groups"]
    sizes = [group["weights"]["observer_kwargs"]["armor_block_size"] for group in groups.values()]
    assert sizes == [[4, 32], [8, 8], [16, 8]]
    assert sorted(target for group in groups.values() for target in group["targets"]) == sorted(layers)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, layers = session_model(kind)
    write_checkpoint(model, layers, tmp_path, dtype=torch.bfloat16)
    read = read_layers(tmp_path)
    assert list(read) == sorted(layers)
    for name, layer in layers.items():
        assert named_tensors(read[name]).keys() == named_tensors(layer).keys()
        for part, tensor in named_tensors(layer).items():
            assert torch.equal(named_tensors(read[name])[part], tensor), (name, part)
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == sorted(IGNORED)
    assert ("lm_head.weight" in read_header(tmp_path)) != model.config.tie_word_embeddings


def test_equal_runs_write_equal_bytes_and_leave_the_model_alone(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        model, layers = session_model(KIND)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, dict(model.config.__dict__)
        folder.mkdir()
        write_checkpoint(model, layers, folder, dtype=torch.bfloat16)
        write_beside(folder, {"notes.txt": b"hello"})
        assert model.config.__dict__ == before[1]
        assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())
    names = sorted(file.name for file in folders[0].iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert tensor_hashes(folders[0]) == tensor_hashes(folders[1])


def test_hashes_are_of_the_bytes(checkpoint: Path) -> None:
    import hashlib

    hashes = tensor_hashes(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert list(hashes) == sorted(tensors)
    name = "model.layers.0.self_attn.q_proj.bitmask"
    assert hashes[name] == hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()


def test_shards_hold_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    write(KIND, folder, max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert tensor_hashes(folder) == tensor_hashes(checkpoint)
    assert inspect(folder) == inspect(checkpoint)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*is missing"):
        check_folder(folder)


def test_dense_output_is_a_plain_model(tmp_path: Path) -> None:
    model, layers = session_model(KIND)
    write_checkpoint(model, {}, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(iter(layers))
    assert torch.equal(tensors[f"{name}.weight"], layers[name].fold(torch.bfloat16))
    check_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not an ARMOR checkpoint"):
        read_layers(tmp_path)


def test_sizes_add_up(checkpoint: Path) -> None:
    size = inspect(checkpoint)
    layer = next(layer for layer in size.layers if layer.name == "model.layers.0.mlp.up_proj")
    assert (layer.shape, layer.block_size, layer.core) == ((64, 32), (16, 8), "bfloat16")
    assert layer.nbytes == 64 * 16 * 2 + 64 * 4 + 64 * 16 * 2 + 32 * 8 * 2
    assert layer.dense_nbytes == 64 * 32 * 2
    assert size.nbytes == sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())
    assert layer.ratio == layer.nbytes / layer.dense_nbytes
    assert size.dense_nbytes - size.nbytes == sum(layer.dense_nbytes - layer.nbytes for layer in size.layers)


UP = "model.layers.0.mlp.up_proj"


def group_of(config: dict, index: int = 0) -> dict:
    return config["quantization_config"]["config_groups"][f"group_{index}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("quantization_config"), r"config.json: .*not an ARMOR checkpoint"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "not an ARMOR checkpoint"),
        (lambda c: c["quantization_config"].update(format="evil.py:run"), r"format is 'evil.py:run'"),
        (lambda c: group_of(c).update(format="evil.py:run"), r"config_groups.group_0: format is 'evil.py:run'"),
        (lambda c: group_of(c).update(format=["x"]), r"format is \['x'\]"),
        (lambda c: c["quantization_config"].update(quantization_status="frozen"), "quantization_status is 'frozen'"),
        (lambda c: c["quantization_config"].update(config_groups={}), "at least one group"),
        (lambda c: c["quantization_config"].update(config_groups=[1]), r"config_groups is \[1\]"),
        (lambda c: c["quantization_config"]["config_groups"].update(group_0=7), "group_0 is 7"),
        (lambda c: group_of(c).update(targets="Linear"), "targets is 'Linear'"),
        (lambda c: group_of(c).update(targets=["re:.*"]), "'re:.*' is not a full module name"),
        (lambda c: group_of(c).update(targets=["no.such"]), r"layer no.such, but no file holds"),
        (lambda c: group_of(c).update(weights=None), "armor_block_size is None"),
        (lambda c: group_of(c)["weights"]["observer_kwargs"].update(armor_block_size=[8, 0]), r"is \[8, 0\]"),
        (lambda c: group_of(c)["weights"]["observer_kwargs"].update(armor_block_size=[True, 8]), r"is \[True, 8\]"),
        (
            lambda c: group_of(c)["weights"]["observer_kwargs"].update(armor_block_size=[8, 16]),
            "armor_a is .* it must be",
        ),
        (lambda c: group_of(c)["weights"]["observer_kwargs"].update(armor_block_size=[5, 8]), "does not divide"),
        (lambda c: group_of(c)["targets"].pop(), "belongs to no layer"),
    ],
)
def test_wrong_config_is_explained(copied: Path, change: Callable[[dict], None], says: str) -> None:
    edit_config(copied, change)
    for read in (read_layers, inspect):
        with pytest.raises(CheckpointError, match=says):
            read(copied)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{UP}.armor_b"), rf"no file holds its tensor {UP}.armor_b"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, :8].clone()}), rf"{UP}.bitmask is"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(7)}), rf"{UP}.weight is \(7,\)"),
        (lambda t: t.update({f"{UP}.bitmask": t[f"{UP}.bitmask"].int()}), rf"{UP}.bitmask is .*I32"),
        (lambda t: t.update({f"{UP}.armor_a": t[f"{UP}.armor_a"].float()}), rf"{UP}.armor_a is .*F32"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].double()}), rf"{UP}.weight is .*F64"),
        (lambda t: t.update({"model.extra.armor_a": torch.zeros(1)}), r"model.extra.armor_a' belongs to no layer"),
    ],
)
def test_wrong_tensors_are_named(copied: Path, change: Callable[[dict], None], says: str) -> None:
    edit_tensors(copied, change)
    with pytest.raises(CheckpointError, match=says):
        check_folder(copied)


def test_damaged_contents_are_named(copied: Path) -> None:
    edit_tensors(copied, lambda t: t[f"{UP}.bitmask"].fill_(0xFF))
    check_folder(copied)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {UP}: bitmask: row 0, columns 0 to 3 keep 4"):
        read_layers(copied)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_tensor_file(copied: Path, size: int) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        check_folder(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_json(copied: Path, content: bytes) -> None:
    (copied / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json"):
        check_folder(copied)


@pytest.mark.parametrize("version", [0, 5, "2", None, True])
def test_versions_that_are_not_known(copied: Path, version: object) -> None:
    manifest = copied / "armor_manifest.json"
    for known in (1, 2, 3, 4):
        manifest.write_text(json.dumps({"format_version": known}))
        check_folder(copied)
    manifest.write_text(json.dumps({"format_version": version}))
    with pytest.raises(CheckpointError, match=r"armor_manifest.json: format_version is .* reads 1 to 4"):
        check_folder(copied)


def test_folder_without_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        check_folder(copied)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        check_folder(copied / "nowhere")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "no file of this folder"),
        ({"weight_map": {"a": "model.safetensors"}}, "do not belong together"),
        ({"weight_map": ["a"]}, "weight_map is no mapping"),
        ({}, "weight_map is no mapping"),
    ],
)
def test_wrong_index(copied: Path, index: dict, says: str) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says):
        check_folder(copied)


def test_modules_that_cannot_be_packed() -> None:
    model, layers = session_model("llama-tied")
    layer = next(iter(layers.values()))
    with pytest.raises(PlanError, match=r"lm_head shares its weight"):
        check_layers(model, {"lm_head": layer})
    with pytest.raises(PlanError, match="no linear layer"):
        check_layers(model, {"model.norm": layer})
    model.Linear = nn.Linear(8, 8)  # type: ignore[assignment]
    with pytest.raises(PlanError, match="name of a class"):
        check_layers(model, {"Linear": layer})


def test_numbers_that_do_not_fit_the_stored_dtype(tmp_path: Path) -> None:
    model, _ = session_model(KIND)
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(CheckpointError, match=r"model.norm.weight: 1 numbers do not fit torch.float16"):
        write_checkpoint(model, {}, tmp_path, dtype=torch.float16)


def test_layers_packed_in_another_dtype_are_refused(tmp_path: Path) -> None:
    model, layers = session_model(KIND)
    with pytest.raises(CheckpointError, match=r"written in torch.float16"):
        write_checkpoint(model, layers, tmp_path, dtype=torch.float16)
