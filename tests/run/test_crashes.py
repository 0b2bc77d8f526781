"""However a run ends, there is a complete checkpoint at the output or none, and no hook on the model. Beside it is nothing, or the
journal alone where the run was cut short; a model in memory has none.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import InputError, NumericalError, ResourceError, VerificationError
from armor_recipes.events import Event, ModuleFinished, PhaseStarted
from armor_recipes.integrations.transformers import load
from armor_recipes.run import apply, data, job
from tests.support.engine import ARMOR, hook_count, make_model, recipe


class Stop:
    """An observer that raises when a phase begins, or in the middle of the solves."""

    def __init__(self, phase: str, error: BaseException) -> None:
        self.phase = phase
        self.error = error

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == self.phase:
            raise self.error
        if isinstance(event, ModuleFinished) and self.phase == "solve" and "layers.1" in event.module:
            raise self.error


BEFORE_ALL_IS_WRITTEN = ["load weights", "compress", "solve", "save"]
PHASES = [*BEFORE_ALL_IS_WRITTEN, "verify"]
JOURNAL = ".out.journal"


def journal_after(error: BaseException) -> list[str]:
    """What is left of a journal: nothing where the same run would end so again."""
    return [] if isinstance(error, Exception) else [JOURNAL]


@pytest.mark.parametrize("phase", BEFORE_ALL_IS_WRITTEN)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), NumericalError("nan")], ids=repr)
def test_an_end_in_any_phase_leaves_nothing(llama: Path, tmp_path: Path, phase: str, error: BaseException) -> None:
    model = make_model()
    with pytest.raises(type(error)):
        apply(recipe(llama, tmp_path / "deep" / "out"), model, observer=Stop(phase, error))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "out").exists()
    assert not list((tmp_path / "deep").glob(".*")) if (tmp_path / "deep").exists() else True
    assert hook_count(model) == 0


@pytest.mark.parametrize("phase", PHASES)
def test_an_old_checkpoint_stays_whole(llama: Path, tmp_path: Path, phase: str) -> None:
    apply(recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "iterations": 0}))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        apply(recipe(llama, tmp_path / "out"), overwrite=True, observer=Stop(phase, KeyboardInterrupt()))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    aside = ["out.unverified"] if phase == "verify" else []
    journal = [JOURNAL] if phase in ("solve", "save", "verify") else []  # before that nothing was done
    assert sorted(path.name for path in tmp_path.iterdir()) == [*journal, "out", *aside]
    load(tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NumericalError("nan"), RuntimeError("boom")], ids=repr)
def test_what_is_written_in_full_is_kept_aside(llama: Path, tmp_path: Path, error: BaseException) -> None:
    for number in range(2):
        with pytest.raises(type(error)) as raised:
            apply(recipe(llama, tmp_path / "out"), observer=Stop("verify", error))
        aside = tmp_path / ("out.unverified" if number == 0 else "out.unverified-2")
        assert str(aside) in str(raised.value) + "".join(getattr(raised.value, "__notes__", ()))
        assert verify(aside).layers == 14
        load(aside)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *journal_after(error),
        "out.unverified",
        "out.unverified-2",
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(28, "No space left on device", "out"),
    ],
    ids=repr,
)
def test_what_runs_out_while_verifying_loses_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(job, "verify_reloaded", fail_with(error))
    with pytest.raises(
        ResourceError,
        match=r"after the weights were written.*what was written is complete and kept in .*out\.unverified",
    ):
        apply(recipe(llama, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL, "out.unverified"]
    load(tmp_path / "out.unverified")


def fail_with(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk on fire")], ids=repr)
def test_an_end_before_the_weights_are_written_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(job, "write_checkpoint", fail_with(error))
    with pytest.raises(type(error)):
        apply(recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "iterations": 0}))
    assert [path.name for path in tmp_path.iterdir()] == journal_after(error)


@pytest.mark.parametrize("name", ["left_behind", "write_beside", "tensor_hashes", "build_manifest", "write_whole"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk on fire")], ids=repr)
def test_weights_that_are_written_are_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    monkeypatch.setattr(job, name, fail_with(error))
    with pytest.raises(type(error)) as raised:
        apply(recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "iterations": 0}))
    journal, notes = journal_after(error), raised.value.__notes__
    if journal:
        assert notes.pop().startswith(
            f"what was done is kept in {tmp_path / JOURNAL}: the same command goes on from there"
        )
    assert notes[-1:] == [f"the weights, written in full, are kept in {tmp_path / 'out.unverified'}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*journal, "out.unverified"]
    load(tmp_path / "out.unverified")


def test_a_checkpoint_that_reads_back_differently_is_not_put_in_place(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Any = vars(job)["write_checkpoint"]

    def write_another(model: PreTrainedModel, *args: Any, **options: Any) -> None:
        write(model, *args, **options)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)  # in memory, after it was written

    monkeypatch.setattr(job, "write_checkpoint", write_another)
    with pytest.raises(VerificationError, match=r"differs .* in \d+ of \d+ logits, by [\d.e+-]+ at most") as raised:
        apply(recipe(llama, tmp_path / "out"))
    assert "bug" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]


@pytest.mark.parametrize("output_format", ["compressed-tensors", "dense"])
def test_a_checkpoint_that_does_not_load_is_not_put_in_place(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output_format: str
) -> None:
    hashes: Any = vars(job)["tensor_hashes"]

    def hash_then_damage(folder: Path) -> Any:
        found = hashes(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        return found

    monkeypatch.setattr(job, "tensor_hashes", hash_then_damage)
    mapping = recipe(llama, tmp_path / "out")
    mapping["output"]["format"] = output_format
    with pytest.raises(VerificationError, match="cannot be loaded again"):
        apply(mapping)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MemoryError("no more"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (OSError(28, "No space left on device", "out"), "no space left"),
        (OSError(122, "Disk quota exceeded", "out"), "no space left"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("module", "name"), [(data, "build_inputs"), (job, "load_model"), (job, "write_checkpoint")])
def test_what_ran_out_is_told(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    error: Exception,
    word: str,
) -> None:
    monkeypatch.setattr(module, name, fail_with(error))
    with pytest.raises(ResourceError, match=word):
        apply(recipe(llama, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ([JOURNAL] if name == "write_checkpoint" else [])


def test_memory_that_torch_cannot_get_is_told(llama: Path, tmp_path: Path) -> None:
    mapping = recipe(llama, tmp_path / "out")
    mapping["calibration"]["samples"] = 10**12
    with pytest.raises(ResourceError, match="out of memory"):
        apply(mapping)


def test_memory_that_runs_out_while_loading_is_not_called_a_broken_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail_with(MemoryError("no more")))
    with pytest.raises(ResourceError, match="out of memory"):
        apply(recipe(llama, tmp_path / "out"))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_broken_weights(llama: Path, tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "m"
    broken.mkdir()
    (broken / "config.json").write_bytes((llama / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        apply(recipe(broken, tmp_path / "out"))


def test_weights_that_do_not_fit_their_configuration_are_named(llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "m"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    config = (llama / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 128'))
    with pytest.raises(InputError, match=r"mismatched_keys.*layers\.0\.mlp\.down_proj"):
        apply(recipe(broken, tmp_path / "out"))
    (broken / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(InputError, match=r"missing_keys.*layers\.2\.mlp"):
        apply(recipe(broken, tmp_path / "out"))
