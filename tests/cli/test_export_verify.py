"""`armor export`, `armor verify`, and what `armor inspect` shows of shared factors, legacy folders and the runtime."""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from armor_recipes.checkpoint.export import Source
from armor_recipes.checkpoint.verify import verify
from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.runtime import capabilities
from tests.support.commands import Shell, write_recipe
from tests.support.engine import ARMOR, MLP


@pytest.fixture
def shared(shell: Shell, llama: Path, tmp_path: Path) -> Path:
    file = write_recipe(tmp_path, llama, ARMORModifier={**ARMOR, "share_input_factor": True})
    assert shell("armor-apply", file, "--quiet").code == 0
    return tmp_path / "out"


def test_shared_factors_are_shown_and_stored_once(shell: Shell, shared: Path) -> None:
    found = json.loads(shell("armor", "inspect", "out", "--json").out)
    owners = {layer["name"]: layer["input_factor"] for layer in found["layers"]}
    prefix = "model.layers.0"
    assert owners[f"{prefix}.self_attn.k_proj"] == owners[f"{prefix}.self_attn.v_proj"] == f"{prefix}.self_attn.q_proj"
    assert owners[f"{prefix}.mlp.up_proj"] == f"{prefix}.mlp.gate_proj"
    assert owners[f"{prefix}.mlp.gate_proj"] is None
    assert found["format"] == "armor"
    lines = [line.split() for line in shell("armor", "inspect", "out", "--all").out.splitlines()]
    assert ["layers.0.self_attn.k_proj", "32x32", "8x8", "q_proj"] in [line[:4] for line in lines]


@pytest.mark.parametrize("dtype", ["float99", "Tensor", 16])
def test_a_dtype_that_torch_does_not_have_is_told(shell: Shell, llama: Path, tmp_path: Path, dtype: object) -> None:
    file = write_recipe(tmp_path, llama, QuantizationModifier={"scheme": "W8A8", "targets": [MLP]})
    assert shell("armor-apply", file, "--quiet").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    for words, said in (
        (("inspect", "out"), "config.json: dtype is "),
        (("export", "out", "dense", "--to", "dense"), ""),
    ):
        done = shell("armor", *words)
        assert (done.code, done.out, said in done.err, "Traceback" in done.err) == (5, "", True, False), done.err
    assert not (tmp_path / "dense").exists()
    del config["dtype"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for words in (("inspect", "out"), ("export", "out", "dense", "--to", "dense")):
        done = shell("armor", *words)
        assert done.code == 0, done.err


def test_export_and_verify(shell: Shell, shared: Path, tmp_path: Path) -> None:
    done = shell("armor", "verify", "out")
    assert (done.code, "14 packed layers are well formed" in done.out, "format version 2" in done.out) == (
        0,
        True,
        True,
    )
    done = shell("armor", "export", "out", "--to", "dense", "dense")
    assert (done.code, done.out.startswith("14 layers to dense: dense, ")) == (0, True)
    assert (tmp_path / "dense" / "recipe.yaml").read_bytes() == (shared / "recipe.yaml").read_bytes()
    assert json.loads(shell("armor", "verify", "dense", "--json").out)["layers"] == 0
    assert shell("armor", "export", "out", "dense", "--to", "dense").code == 2
    assert (
        json.loads(shell("armor", "export", "out", "dense", "--to", "dense", "--overwrite", "--json").out)["layers"]
        == 14
    )
    done = shell("armor", "export", "out", "other", "--to", "dense-2of4")
    assert (done.code, "factors other than the identity" in done.err) == (3, True)
    assert shell("armor", "export", "out", "other", "--to", "marlin-24").code == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["dense", "out"]


def test_a_plain_result_becomes_a_legacy_folder(shell: Shell, llama: Path, tmp_path: Path) -> None:
    shell("armor-apply", write_recipe(tmp_path, llama, MagnitudeModifier={"targets": [MLP]}), "--quiet")
    done = shell("armor", "export", "out", "legacy", "--to", "sparse-24-bitmask")
    assert (done.code, "6 layers to sparse-24-bitmask" in done.out, "transformers 5" in done.out) == (0, True, True)
    assert "6 plain 2:4 layers (legacy format)" in shell("armor", "inspect", "legacy").out
    for folder in ("out", "legacy"):
        assert shell("armor", "export", folder, f"{folder}-armor", "--to", "armor").code == 0
        assert shell("armor", "verify", f"{folder}-armor").code == 0
        assert "6 ARMOR layers" in shell("armor", "inspect", f"{folder}-armor").out
    ignored = json.loads((tmp_path / "legacy" / "config.json").read_text())["quantization_config"]["sparsity_config"][
        "ignore"
    ]
    assert len(ignored) == 9


def test_a_changed_byte_is_found(shell: Shell, shared: Path) -> None:
    file = shared / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = shell("armor", "verify", "out")
    assert (done.code, "has SHA-256" in done.err) == (6, True)
    file.write_bytes(content[:-1])
    assert shell("armor", "verify", "out").code == 5


def test_what_the_runtime_can_do(shell: Shell) -> None:
    done = shell("armor", "inspect", "--runtime")
    assert (done.code, len(done.out.splitlines())) == (0, len(asdict(capabilities())))
    assert json.loads(shell("armor", "inspect", "--runtime", "--json").out).keys() == asdict(capabilities()).keys()
    for words in ((), ("out", "--runtime")):
        done = shell("armor", "inspect", *words)
        assert (done.code, "one of the two" in done.err) == (2, True)


def test_a_changed_file_beside_the_weights_is_found(shell: Shell, shared: Path) -> None:
    config = shared / "generation_config.json"
    before = config.read_bytes()
    config.write_bytes(before + b" ")
    done = shell("armor", "verify", "out")
    assert (done.code, "generation_config.json: has SHA-256" in done.err) == (6, True)
    config.unlink()
    done = shell("armor", "verify", "out")
    assert (done.code, "not there: generation_config.json" in done.out) == (0, True)
    config.write_bytes(before)
    (shared / "README.md").write_text("A card that somebody wrote.\n")
    recipe = shared / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("path:", "path: elsewhere #"))
    assert shell("armor", "verify", "out").code == 0
    for changed in (text.replace("iterations: 3", "iterations: 4"), "x", "output: 1\n", "a_stage: 1\noutput: {}\n"):
        recipe.write_text(changed)
        done = shell("armor", "verify", "out")
        assert (done.code, "recipe.yaml: its hash is" in done.err) == (6, True)


def test_numbers_that_are_not_finite_are_found(shell: Shell, shared: Path) -> None:
    weights = load_file(shared / "model.safetensors")
    name = "model.norm.weight"
    manifest = json.loads((shared / "armor_manifest.json").read_text())
    for value, code, said in (
        (float("inf"), 0, "1 numbers are infinite"),
        (float("nan"), 6, "1 of 32 numbers are NaN"),
    ):
        weights[name][3] = value
        save_file(weights, shared / "model.safetensors", metadata={"format": "pt"})
        manifest["tensors"] = tensor_hashes(shared)  # as if a run had written it so
        (shared / "armor_manifest.json").write_text(json.dumps(manifest))
        done = shell("armor", "verify", "out")
        assert (done.code, f"{name}: {said}" in done.out + done.err) == (code, True)


@pytest.mark.parametrize("name", ["../recipe.yaml", "/etc/hostname", "a\0b", "link", "../" + "x" * 300])
def test_a_manifest_leads_to_no_file_outside_of_the_folder(shell: Shell, shared: Path, name: str) -> None:
    (shared / "link").symlink_to(shared.parent / "recipe.yaml")
    manifest = json.loads((shared / "armor_manifest.json").read_text())
    manifest["file_hashes"] = {name: "0" * 64}
    (shared / "armor_manifest.json").write_text(json.dumps(manifest))
    done = shell("armor", "verify", "out")
    assert (done.code, "is no file of this folder" in done.err) == (5, True)


def test_layers_are_verified_one_at_a_time(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a folder larger than memory can be."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = Source.layer

    def layer(source: Source, name: str) -> Any:
        nonlocal most
        packed = read(source, name)
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(packed.values))
        return packed

    monkeypatch.setattr(Source, "layer", layer)
    assert (verify(shared).layers, len(alive)) == (14, 14)
    assert most <= 1


def test_a_name_that_no_file_can_have_is_of_one_that_is_missing(shared: Path) -> None:
    manifest = json.loads((shared / "armor_manifest.json").read_text())
    manifest["file_hashes"] = {"x" * 300: "0" * 64}
    manifest["files"].append("x" * 300)
    (shared / "armor_manifest.json").write_text(json.dumps(manifest))
    assert verify(shared).missing == ("x" * 300,)
