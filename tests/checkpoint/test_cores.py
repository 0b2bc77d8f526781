"""`armor export --to armor` of quantised 2:4 folders: the same integers and scales in cores, the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import armor_recipes
from armor_recipes.checkpoint.reader import inspect
from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import PlanError
from armor_recipes.integrations.exporting import export_folder
from tests.support import theirs
from tests.support.commands import Shell
from tests.support.engine import MLP, recipe

EIGHT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
CORES: dict[str, tuple[theirs.Groups, set[tuple[str, int | None]]]] = {
    "int4 by group": ({"Linear": theirs.INT4}, {("int4", 16)}),
    "int8 by row": ({"Linear": EIGHT}, {("int8", None)}),
    "int8 with int8 inputs": ({"Linear": "W8A8"}, {("int8", None)}),
    "fp8 with fp8 inputs": ({"Linear": "FP8_DYNAMIC"}, {("fp8", None)}),
}


def same_logits(
    one: Path, other: Path, *, backend: str = "folded", dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> bool:
    """Bit for bit, by a backend whose products are those of a plain layer."""
    return all(
        torch.equal(*(theirs.logits(armor_recipes.load(f, backend=backend, dtype=dtype)) for f in (one, other)))
        for dtype in dtypes
    )


@pytest.mark.parametrize("kind", CORES)
def test_every_layer_becomes_a_core_with_equal_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups, wanted = CORES[kind]
    folder, out = theirs.save(tmp_path / "theirs", groups, sparse="_proj"), tmp_path / "out"
    done = Shell(monkeypatch, capsys)("armor", "export", folder, out, "--to", "armor")
    assert done.code == 0
    assert "14 layers to armor" in done.out
    assert "left as they are: 1 linear layers (lm_head): not 2:4" in done.out
    found = inspect(out)
    assert {(layer.core, layer.group_size) for layer in found.layers} == wanted
    assert (len(found.layers), len(found.plain)) == (14, 0)
    assert found.nbytes < inspect(folder).nbytes
    verify(out)
    if (
        "inputs" in kind
    ):  # `folded` rounds no activations, and in bfloat16 scales of inputs are rounded by compressed-tensors alone
        assert same_logits(folder, out, backend="reference", dtypes=(torch.float32,))
    else:
        assert same_logits(folder, out)


def test_what_is_not_2of4_or_has_no_core_stays_and_is_counted(tmp_path: Path) -> None:
    """2:4 are the MLP's layers; the first layer's have zero points, which a core has no place for; one is not quantised."""
    up = "model.layers.1.mlp.up_proj"
    groups = {r"re:.*layers\.0\.mlp\..*_proj$": {**theirs.INT4, "symmetric": False}, "Linear": theirs.INT4}
    folder = theirs.save(tmp_path / "theirs", groups, sparse="mlp", ignore=("lm_head", up))
    out = tmp_path / "out"
    done = export_folder(folder, out, to="armor")
    assert {reason: len(names) for reason, names in done.stay.items()} == {
        "not 2:4": 9,
        "2:4, but no core holds int4 asymmetric, groups of 32": 3,
    }
    found = inspect(out)
    assert {layer.name: layer.core for layer in found.layers} == {
        "model.layers.1.mlp.gate_proj": "int4",
        up: "bfloat16",
        "model.layers.1.mlp.down_proj": "int4",
    }
    assert len(found.plain) == 11
    assert same_logits(folder, out)
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    kept = {name for name in before if "layers.1.mlp" not in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_folder_without_a_2of4_layer_is_an_error(tmp_path: Path) -> None:
    folder = theirs.save(tmp_path / "theirs", {"Linear": theirs.INT4})
    with pytest.raises(PlanError, match=r"no linear layer with 2:4 weights.*\(15 not 2:4\)"):
        export_folder(folder, tmp_path / "out", to="armor")
    assert not (tmp_path / "out").exists()


def test_a_dense_folder_counts_what_it_does_not_pack(tmp_path: Path) -> None:
    folder = theirs.dense(tmp_path / "dense", sparse="mlp")
    done = export_folder(folder, tmp_path / "out", to="armor")
    assert (done.layers, {reason: len(names) for reason, names in done.stay.items()}) == (6, {"not 2:4": 9})


def test_armor_layers_beside_stay_as_they_are(tmp_path: Path) -> None:
    """A recipe of ours that stores plain quantised 2:4 layers beside packed ones."""
    source = theirs.dense(tmp_path / "dense", sparse="self_attn")
    whole = {"targets": [r"re:.*self_attn\..*_proj$"], "config_groups": {"a": {"weights": theirs.INT4}}}
    armor = {"targets": [MLP], "block_size": 8, "iterations": 2}
    armor_recipes.apply(recipe(source, tmp_path / "mixed", ARMORModifier=armor, QuantizationModifier=whole))
    done = export_folder(tmp_path / "mixed", tmp_path / "out", to="armor")
    assert done.layers == 8
    found = inspect(tmp_path / "out")
    assert {(layer.core, layer.block_size) for layer in found.layers} == {("bfloat16", (8, 8)), ("int4", (1, 1))}
    assert same_logits(tmp_path / "mixed", tmp_path / "out")
