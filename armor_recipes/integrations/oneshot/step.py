"""Modifiers of llm-compressor as the first step of a run, or as all of it: its own `oneshot`, in a process of its own.

The model is written to a folder that vanishes, and `oneshot` runs on it. Of a first step the weights are read back into the model
in memory; of a whole run what `oneshot` writes is the result. The process may be of another Python, where pins differ from ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from armor_recipes.calibration.inputs import arguments
from armor_recipes.checkpoint.files import CONFIG_FILE, read_config, write_whole
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.errors import InputError, NumericalError, PlanError, ResourceError, VerificationError
from armor_recipes.integrations.models import load_dense
from armor_recipes.integrations.plain import run_plain
from armor_recipes.model.finite import first_broken, is_finite
from armor_recipes.model.replay import feed_alike, on_device
from armor_recipes.model.ties import tied_output, untie
from armor_recipes.recipe.llmcompressor import STEP_PYTHON

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROGRAM = Path(__file__).with_name("child.py")
#: Of what a failed process wrote, so much is told.
_TOLD = 2000
#: How far outputs may be from those in memory, by norm: those are computed in the stored dtype.
WITHIN = 0.1


@dataclass(frozen=True, slots=True)
class Step:
    """Modifiers of llm-compressor that follow each other, as its recipe has them: (kind, fields)."""

    modifiers: Sequence[tuple[str, Mapping[str, Any]]]
    tokenizer: Any | None
    samples: Sequence[Mapping[str, Tensor]]
    """What to call the model with, one by one, to calibrate on, as `arguments` makes it; none for modifiers without data."""

    @property
    def names(self) -> str:
        """For messages."""
        return ", ".join(kind for kind, _ in self.modifiers)


@torch.no_grad()
def run_step(model: PreTrainedModel, step: Step, *, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]) -> None:
    """Change the model's weights as llm-compressor does. An output layer that it unties from the embeddings is untied here.

    Args:
        model: a stock model in memory, in its compute dtype.
        step: what to run.
        dtype: what config.json names.
        dtypes: of float tensors on disk.

    Raises:
        InputError: where llm-compressor fails; its last lines are told.
        PlanError: where it leaves a quantised model, or one of another structure: nothing of ours could go on with it.
        NumericalError: where it leaves numbers that are not finite in a tensor that had none.
    """
    with tempfile.TemporaryDirectory(prefix="armor-oneshot-") as made:
        folder = Path(made)
        _write_dense(model, step, folder, dtype=dtype, dtypes=dtypes)
        _call(step, folder)
        _read_back(model, step, folder / "result")


@dataclass(frozen=True, slots=True)
class Taken:
    """What a whole run of llm-compressor left: its model, loaded in the compute dtype, and what made it."""

    model: PreTrainedModel
    versions: Mapping[str, str]
    """Of the packages there, by name."""
    error: float
    """‖outputs loaded - outputs in memory‖ ÷ ‖outputs in memory‖ of a probe, in the stored dtype, by transformers' own code."""


@torch.no_grad()
def run_whole(
    model: PreTrainedModel,
    step: Step,
    result: Path,
    *,
    probe: Mapping[str, Tensor],
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype],
) -> Taken:
    """Let llm-compressor make a folder of the model, which is left as it is.

    Args:
        model: a stock model in memory, in its compute dtype.
        step: all modifiers of a recipe.
        result: a folder that is not there yet.
        probe: a sample to call the model with.
        dtype: what config.json names.
        dtypes: of float tensors on disk.

    Raises:
        InputError: where llm-compressor fails; its last lines are told.
        VerificationError: where its folder does not load in transformers as the model that it had in memory.
        NumericalError: where what a module of it gives is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="armor-oneshot-") as made:
        folder = Path(made)
        _write_dense(model, step, folder, dtype=dtype, dtypes=dtypes)
        save_file({name: x.contiguous() for name, x in arguments(probe).items()}, folder / "probe.safetensors")
        _call(step, folder)
        shutil.copytree(folder / "result", result)
        wanted = load_file(folder / "outputs.safetensors")["output"]
        versions: dict[str, str] = json.loads((folder / "versions.json").read_text())
    parameter = next(model.parameters())
    error = _checked(step, _reloaded(result, dtype, parameter.device), probe, wanted)
    loaded = _reloaded(result, parameter.dtype, parameter.device)
    run_plain(loaded, parameter.dtype)  # compressed-tensors decompresses 4-bit floats to bfloat16 for any dtype
    return Taken(loaded, versions, error)


def _reloaded(result: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        return load_dense(str(result), dtype=dtype, device=device)
    except InputError as error:
        raise VerificationError(f"what llm-compressor wrote cannot be loaded: {error}") from error


def _checked(step: Step, loaded: PreTrainedModel, probe: Mapping[str, Tensor], wanted: Tensor) -> float:
    """How far the loaded model's first output is from the wanted one. Raises VerificationError where it is another model's."""
    try:
        found = feed_alike(loaded, on_device(probe, loaded))[0].float().cpu()
    except RuntimeError as failed:
        raise VerificationError(
            f"the folder that llm-compressor wrote after {step.names} does not run in transformers in {loaded.dtype}, the dtype "
            f"of the model's files: {failed}"
        ) from failed
    broken = first_broken(loaded, lambda: feed_alike(loaded, on_device(probe, loaded)))
    if broken:
        raise NumericalError(
            f"{step.names}: the output of {broken} is not finite in what llm-compressor wrote: check the model's weights, "
            "or change the recipe"
        )
    error = float((found - wanted).norm() / wanted.norm()) if found.shape == wanted.shape else float("inf")
    if not error <= WITHIN:
        raise VerificationError(
            f"the folder that llm-compressor wrote after {step.names} does not load in transformers as the model that it had in "
            f"memory: outputs differ by {error:.2g} of their norm ({WITHIN} is allowed, since it computes in the stored dtype); "
            "a loader of its own may read it: run the recipe by itself with llm-compressor"
        )
    return error


def _write_dense(
    model: PreTrainedModel, step: Step, folder: Path, *, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]
) -> None:
    (folder / "dense").mkdir()
    write_checkpoint(model, {}, folder / "dense", dtype=dtype, dtypes=dtypes)
    if step.tokenizer is not None:
        step.tokenizer.save_pretrained(str(folder / "dense"))


def _call(step: Step, folder: Path) -> None:
    """Run the other process on `dense`, so that it makes `result`."""
    stage = {"step_stage": {f"step{n}_modifiers": {kind: dict(f)} for n, (kind, f) in enumerate(step.modifiers)}}
    (folder / "recipe.json").write_text(json.dumps(stage))
    if step.samples:
        named = {f"{n}.{name}": x.clone() for n, sample in enumerate(step.samples) for name, x in sample.items()}
        save_file(named, folder / "samples.safetensors")
    python = os.environ.get(STEP_PYTHON) or sys.executable
    try:
        done = subprocess.run([python, "-P", str(_PROGRAM), str(folder)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(
            f"{STEP_PYTHON} is {python!r}, which cannot be run ({error.strerror}): name a Python"
        ) from error
    if done.returncode < 0:
        raise ResourceError(f"llm-compressor's oneshot with {step.names} was killed by signal {-done.returncode}")
    if done.returncode:
        raise InputError(f"llm-compressor's oneshot with {step.names} failed:\n{done.stderr.strip()[-_TOLD:]}")


def _read_back(model: PreTrainedModel, step: Step, result: Path) -> None:
    config = read_config(result)
    left = config.pop("quantization_config", None)
    if left is not None and _is_fused(left):
        write_whole(result / CONFIG_FILE, json.dumps(config).encode())
    elif left is not None:
        raise PlanError(
            f"{step.names} left a quantised model or online transforms, with which nothing here can go on: run it by itself with "
            "llm-compressor, or take a modifier of ours"
        )
    own: dict[str, Tensor] = model.state_dict()
    parameter = next(model.parameters())
    stepped = load_dense(str(result), dtype=parameter.dtype, device=parameter.device)
    output, found = tied_output(model), stepped.state_dict()
    if output is not None and tied_output(stepped) is None:
        untie(model, (output,))
        own = model.state_dict()
    changed = next(_other_shapes(own, found), None)
    if changed is None:
        for name, tensor in own.items():
            if not is_finite(found[name]) and is_finite(tensor):
                raise NumericalError(
                    f"{step.names} left numbers of {name} that are not finite: check the model's weights, or change the recipe"
                )
        for name, tensor in own.items():
            tensor.copy_(found[name])
        changed = next((name for name, tensor in own.items() if not torch.equal(tensor, found[name])), None)
    if changed is not None:
        raise PlanError(
            f"{step.names} left a model of another structure ({changed} is no tensor of its own here, or of another shape): run it "
            "by itself with llm-compressor, and give the folder that it writes as `model`"
        )


def _is_fused(quantization: Mapping[str, Any]) -> bool:
    """Whether it tells of rotations alone that lie in the weights already, so that a loader has nothing to do."""
    groups = (quantization.get("transform_config") or {}).get("config_groups") or {}
    places = {apply["location"] for group in groups.values() for apply in group["apply"]}
    return not quantization.get("config_groups") and places <= {"weight_input", "weight_output"}


def _other_shapes(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted({*own, *found}):
        if name not in own or name not in found or own[name].shape != found[name].shape:
            yield name
