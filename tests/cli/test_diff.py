"""`armor diff`: what differs between two folders, against what was changed."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from armor_recipes.checkpoint.diff import diff
from armor_recipes.checkpoint.export import Source
from armor_recipes.errors import CheckpointError
from tests.support.commands import Shell, write_recipe
from tests.support.engine import ARMOR, MLP, core

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def made(shell: Shell, llama: Path, tmp_path: Path) -> Path:
    """A folder `out`, and its copy `two`, to be changed."""
    assert shell("armor-apply", write_recipe(tmp_path, llama), "--quiet").code == 0
    copy(tmp_path / "out", tmp_path / "two")
    return tmp_path / "two"


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def change(folder: Path, **tensors: Any) -> None:
    """Give tensors new values; `__` in a name stands for a dot."""
    state = load_file(folder / "model.safetensors")
    for name, make in tensors.items():
        known = name.replace("__", ".")
        state[known] = make(state[known].clone())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_equal_folders(shell: Shell, made: Path, tmp_path: Path) -> None:
    done = shell("armor", "diff", "out", "two")
    said = "nothing differs: 21 layers and other tensors are equal byte for byte\n"
    assert (done.code, done.out) == (0, said)
    again = shell("armor-apply", "recipe.yaml", "--quiet", "--output", "again")
    assert again.code == 0
    assert diff(tmp_path / "out", tmp_path / "again").equal  # but for output.path, which is no difference


def test_recipe_tokens_and_machine(shell: Shell, made: Path, tmp_path: Path) -> None:
    key = "prune_stage.armor_modifiers.ARMORModifier.iterations"
    options = ("--set", f"{key}=1", "--set", "calibration.seed=1", "--output", "other", "--quiet")
    assert shell("armor-apply", "recipe.yaml", *options).code == 0
    manifest = json.loads((tmp_path / "other" / "armor_manifest.json").read_text())
    manifest["machine"]["level"] = "none"
    (tmp_path / "other" / "armor_manifest.json").write_text(json.dumps(manifest))
    done = shell("armor", "diff", "out", "other")
    assert done.code == 6
    assert f"recipe: {key}: 3 | 1\n" in done.out
    assert "recipe: calibration.seed: nothing | 1\n" in done.out
    assert "run: calibration.0.sha256: " in done.out
    assert 'run: machine.level: "' in done.out
    assert f"\n{Q}: masks of " in done.out
    found = json.loads(shell("armor", "diff", "out", "other", "--json").out)
    assert (found["equal"], len(found["modules"]), found["tensors"]) == (False, 14, [])
    assert {"path": key.split("."), "first": "3", "second": "1"} in found["recipe"]


def test_masks_are_counted_and_distances_measured(made: Path, tmp_path: Path) -> None:
    def other_masks(bitmask: torch.Tensor) -> torch.Tensor:
        bitmask[0, :2] = 0x33  # two groups of 0011 a byte; what was there may be that already
        bitmask[1, :2] = 0x55
        return bitmask

    def doubled(a: torch.Tensor) -> torch.Tensor:
        return a * 2

    before = load_file(made / "model.safetensors")
    change(made, **{f"{Q}.bitmask".replace(".", "__"): other_masks, f"{Q}.armor_a".replace(".", "__"): doubled})
    (found,) = diff(tmp_path / "out", made).modules
    after = load_file(made / "model.safetensors")[f"{Q}.bitmask"]
    nibbles = [(each & 15, each >> 4) for each in (before[f"{Q}.bitmask"], after)]
    assert found.masks == sum(int((one != two).sum()) for one, two in zip(*nibbles, strict=True)) > 0
    assert (found.name, found.groups, found.integers) == (Q, 32 * 32 // 4, None)
    assert (found.a, found.b) == (1.0, 0.0)
    assert found.s is not None
    assert found.weight is not None
    assert 0 < found.s < found.weight


def test_a_factor_alone(made: Path, tmp_path: Path) -> None:
    change(made, **{f"{Q}.armor_a".replace(".", "__"): lambda a: a * 2})
    (found,) = diff(tmp_path / "out", made).modules
    assert (found.masks, found.a, found.s, found.b, found.weight) == (0, 1.0, 0.0, 0.0, 1.0)


def test_a_run_on_another_class_is_held_to_a_tolerance(shell: Shell, made: Path, tmp_path: Path) -> None:
    manifest = json.loads((made / "armor_manifest.json").read_text())
    manifest["machine"]["level"] = "another"
    (made / "armor_manifest.json").write_text(json.dumps(manifest))
    change(made, **{f"{Q}.armor_a".replace(".", "__"): lambda a: a * 1.125})
    for options, code in (((), 6), (("--tolerance", "0.1"), 6), (("--tolerance", "0.13"), 0)):
        assert shell("armor", "diff", "out", "two", *options).code == code
    manifest["calibration"][0]["sha256"] = "0" * 64  # other tokens
    (made / "armor_manifest.json").write_text(json.dumps(manifest))
    assert shell("armor", "diff", "out", "two", "--tolerance", "0.13").code == 6
    assert shell("armor", "diff", "out", "two", "--tolerance", "-1").code == 2


def test_integers_are_counted(shell: Shell, llama: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, llama, ARMORModifier=ARMOR, QuantizationModifier=core(8, targets=[MLP]))
    assert shell("armor-apply", "recipe.yaml", "--quiet").code == 0
    copy(tmp_path / "out", tmp_path / "two")
    name = "model.layers.1.mlp.up_proj"

    def other(integers: torch.Tensor) -> torch.Tensor:
        integers[0, :3] = torch.where(integers[0, :3] == 5, 6, 5).to(integers.dtype)
        return integers

    change(tmp_path / "two", **{f"{name}.weight".replace(".", "__"): other})
    (found,) = diff(tmp_path / "out", tmp_path / "two").modules
    assert (found.name, found.masks, found.integers, found.a) == (name, 0, 3, 0.0)


def test_a_dense_output_against_a_packed_one(shell: Shell, made: Path, tmp_path: Path) -> None:
    assert shell("armor", "export", "out", "dense", "--to", "dense").code == 0
    found = diff(tmp_path / "out", tmp_path / "dense")
    assert len(found.modules) == 14
    assert all(row.masks is None and row.weight is not None and row.weight < 0.01 for row in found.modules)
    assert found.tensors == ()  # norms and embeddings are the same
    assert found.recipe == ()


def test_other_tensors(shell: Shell, made: Path, tmp_path: Path) -> None:
    def without_two(x: torch.Tensor) -> torch.Tensor:
        x[:2] = 0
        return x

    change(made, model__norm__weight=without_two, lm_head__weight=lambda x: x[:-1])
    state = load_file(made / "model.safetensors")
    del state["model.layers.0.input_layernorm.weight"]
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    done = shell("armor", "diff", "out", "two")
    assert done.code == 6
    assert "model.layers.0.input_layernorm.weight: only in the first\n" in done.out
    assert "2 zeros of one alone\n" in done.out
    assert "lm_head.weight: (96, 32) bfloat16 and (95, 32) bfloat16\n" in done.out


def test_a_folder_without_a_manifest_and_one_that_is_none(shell: Shell, made: Path, tmp_path: Path) -> None:
    (made / "armor_manifest.json").unlink()
    (made / "recipe.yaml").unlink()
    found = diff(tmp_path / "out", made)
    assert (found.modules, found.tensors) == ((), ())
    assert {each.second for each in found.run} <= {"null", "nothing"}
    assert found.run
    assert shell("armor", "diff", "out", "nowhere").code == 5
    with pytest.raises(CheckpointError):
        diff(tmp_path, made)


def test_a_config_that_reads_equal_tensors_otherwise_differs(shell: Shell, made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    del config["quantization_config"]
    (other / "config.json").write_text(json.dumps(config))
    done = shell("armor", "diff", made, other)
    assert (done.code, done.out.count("quantization_config")) == (6, 1), done.out


def test_a_recipe_that_is_none_is_told(shell: Shell, made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    (other / "recipe.yaml").write_text("{a: [")
    done = shell("armor", "diff", made, other)
    assert (done.code, "recipe.yaml holds no recipe" in done.err) == (5, True), done.err


def test_a_recipe_that_is_a_link_out_of_the_folder_is_not_read(made: Path, tmp_path: Path) -> None:
    recipe = made / "recipe.yaml"
    (tmp_path / "elsewhere.yaml").write_bytes(recipe.read_bytes())
    recipe.unlink()
    recipe.symlink_to(tmp_path / "elsewhere.yaml")
    assert {each.second for each in diff(tmp_path / "out", made).recipe} <= {"nothing", "{}"}
    assert diff(tmp_path / "out", made).recipe


def test_one_layer_of_each_is_in_memory(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Source.layer

    def layer(source: Source, name: str) -> Any:
        nonlocal most
        packed = read(source, name)
        alive.append(weakref.ref(packed.values))
        most = max(most, sum(ref() is not None for ref in alive))
        return packed

    monkeypatch.setattr(Source, "layer", layer)
    assert diff(tmp_path / "out", made).equal
    assert len(alive) == 28
    assert most <= 4  # two, and two of the layer before
