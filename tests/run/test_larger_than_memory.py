"""`model.memory`: weights, activations and results in mapped files, to the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from armor_recipes.checkpoint import writer
from armor_recipes.compute import scratch
from armor_recipes.compute.limit import limited, private_bytes
from armor_recipes.errors import PlanError, RecipeError, ResourceError
from armor_recipes.run import apply
from tests.support.engine import ARMOR, MLP, core, make_job, make_model, recipe, save_model

NAMED = {"recipe.yaml", "README.md", "armor_manifest.json", "report.json"}


@pytest.fixture(autouse=True)
def all_in_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """However small a tensor is; the list is the bytes of each that went into a file."""
    found: list[int] = []
    empty = scratch.Scratch.empty

    def counted(self: scratch.Scratch, *args: Any) -> Any:
        tensor = empty(self, *args)
        found.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(scratch, "_SMALL", 1)
    monkeypatch.setattr(scratch.Scratch, "empty", counted)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NAMED}


def asked(model: Path, output: Path, memory: str | None, compute: str, **fields: Any) -> dict[str, Any]:
    made = recipe(model, output, **fields)
    made["model"] = {"id": str(model), "compute_dtype": compute, **({"memory": memory} if memory else {})}
    return made


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama-gqa-tied"])
@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
def test_a_run_with_memory_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_in_files: list[int], kind: str, compute: str, form: str
) -> None:
    monkeypatch.setattr(
        writer.write_checkpoint, "__kwdefaults__", {**writer.write_checkpoint.__kwdefaults__, "max_shard_bytes": 40_000}
    )
    model = save_model(tmp_path / "model", kind)
    written = []
    for memory in (None, "16GiB"):
        made = asked(model, tmp_path / f"out-{memory}", memory, compute)
        made["output"]["format"] = form
        assert not all_in_files
        written.append(files(apply(made).output))
    assert written[0] == written[1]
    assert sum(name.endswith(".safetensors") for name in written[0]) > 1
    assert sum(all_in_files) > sum(len(one) for name, one in written[0].items() if name.endswith(".safetensors"))
    assert not list(tmp_path.glob(".armor-scratch*"))


@pytest.mark.parametrize("memory", ["4", "4 gib", "-1GiB", "0GiB", "4GiBs", "1e3GB", "nanGiB"])
def test_what_is_no_amount_of_memory_is_told(tmp_path: Path, memory: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.memory.*is no amount of memory.*4GiB"):
        make_job(asked(save_model(tmp_path / "model"), tmp_path / "out", memory, "auto"))


@pytest.mark.parametrize(
    ("modifier", "fields", "reason"),
    [
        ("DistillationModifier", {}, "trains through the whole model"),
        ("QuantizationModifier", core(), "writes quantised weights"),
    ],
)
def test_what_does_not_go_with_memory_is_refused_by_name(
    tmp_path: Path, modifier: str, fields: dict[str, Any], reason: str
) -> None:
    made = asked(
        save_model(tmp_path / "model"), tmp_path / "out", "4GiB", "auto", ARMORModifier=ARMOR, **{modifier: fields}
    )
    with pytest.raises(PlanError, match=rf"model\.memory 4GiB: .*{modifier} {reason}"):
        make_job(made)


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    made = asked(
        save_model(tmp_path / "model"), tmp_path / "out", "4GiB", "auto", ARMORModifier={**ARMOR, "targets": [MLP]}
    )
    with pytest.raises(RecipeError, match="this one is in memory"):
        apply(made, make_model())


def test_too_little_memory_is_refused_with_what_would_do(tmp_path: Path) -> None:
    made = asked(save_model(tmp_path / "model"), tmp_path / "out", "10MiB", "auto")
    with pytest.raises(PlanError, match=r"model\.memory 10MiB is too little .*: set [0-9]+MiB or more") as told:
        make_job(made)
    found = re.search(r"set ([0-9]+)MiB", str(told.value))
    assert found is not None
    made["model"]["memory"] = f"{int(found[1]) + 64}MiB"
    make_job(made)


def test_what_runs_out_all_the_same_is_an_error_of_its_own(tmp_path: Path) -> None:
    held = private_bytes()
    with pytest.raises(ResourceError, match=r"model\.memory 4GiB ran out"), limited(held + 2**26, "model.memory 4GiB"):
        torch.ones(2**26, dtype=torch.float32)
    assert ResourceError.exit_code == 7
    assert float(torch.ones(2**26, dtype=torch.float32)[-1]) == 1.0  # no bound any more
