"""Load what was written, and hold it against the model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from armor_recipes.calibration.inputs import Batch
from armor_recipes.checkpoint.config import VALUES
from armor_recipes.checkpoint.files import read_config, read_header, read_tensor
from armor_recipes.checkpoint.reader import checked_layers, read_layer, stored_names
from armor_recipes.compute.scratch import Scratch
from armor_recipes.errors import ArmorError, InputError, NumericalError, VerificationError
from armor_recipes.integrations.models import attention_of, kept_in_float32, load_dense
from armor_recipes.integrations.plain import dequantized
from armor_recipes.integrations.transformers import load
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.finite import ADVICE, first_broken
from armor_recipes.model.replay import feed_alike, on_device


def verify_reloaded(
    folder: Path, model: PreTrainedModel, *, packed: bool, probe: Batch, scratch: Scratch | None = None
) -> None:
    """Raise VerificationError unless the folder, loaded in the model's compute dtype, puts out what the model does, bit for bit;
    and NumericalError where what the model's blocks give is not finite.

    All tensors of the output are compared, and all weights that are not packed. `probe` is what to call both with; `packed` says
    whether the folder needs this package to load. It is loaded with the attention implementations that the model runs on, into
    aligned memory, or with a `scratch` layer by layer into that; numbers that are NaN in both are equal, and random numbers that a
    model draws are the same for both.
    """
    parameter = next(model.parameters())
    options: dict[str, Any] = {
        "dtype": parameter.dtype,
        "device": parameter.device,
        "attention": attention_of(model),
    }
    try:
        if scratch is not None:
            loaded = load_dense(str(folder), state=_folded_state(folder, parameter.dtype, model, scratch), **options)
        else:
            loaded = load(folder, backend="folded", **options) if packed else load_dense(str(folder), **options)
    except InputError as error:
        raise VerificationError(f"what was written cannot be loaded again: {error}") from error
    batch = on_device(probe, model)
    with _wanting_gradients(model), _wanting_gradients(loaded):
        _compare_outputs(model, loaded, batch)
    held = loaded.state_dict() | {f"{name}.weight": weight for name, weight in _dequantized(loaded)}
    # What the probe does not pass through, a tower say, is compared here.
    for name, tensor in model.state_dict().items():
        if name in held and held[name].shape == tensor.shape:
            _compare(name, tensor, held[name])


def _dequantized(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights that plain quantised layers stand for, by module."""
    for name, module in model.named_modules():
        weight = dequantized(module)
        if weight is not None:
            yield name, weight


def _folded_state(folder: Path, dtype: torch.dtype, model: PreTrainedModel, scratch: Scratch) -> dict[str, Tensor]:
    """The folder's tensors, in the place of packed layers the weights that they give in `dtype`: those of the model where they are
    equal bit for bit, in its own memory, others in the scratch.
    """
    tensors, quantization = read_header(folder), read_config(folder).get("quantization_config")
    specs = checked_layers(folder, quantization, tensors) if quantization else {}
    packed = {f"{name}.{part}" for name, spec in specs.items() for part in stored_names(spec)}
    kept, own, state = kept_in_float32(model, dtype), model.state_dict(), {}

    def held(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        there, found = own.get(name), tensor if dtype is None else tensor.to(dtype)
        return there if there is not None and _equal(there, found) else scratch.keep(found)

    for name in tensors:
        if name not in packed:
            tensor = read_tensor(tensors, name)
            state[name] = held(name, tensor, dtype if tensor.is_floating_point() and not kept(name) else None)
    for name, spec in specs.items():
        owner = None if spec.input_factor is None else read_layer(spec.input_factor, tensors)
        layer = read_layer(name, tensors, owner, activations=spec.activations)
        weight = f"{name}.{VALUES}"
        state[weight] = held(weight, layer.to(dtype).fold(dtype), None)
    return state


@contextmanager
def _wanting_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Let all parameters want gradients, as a loader leaves them: where a weight wants none torch rounds products otherwise."""
    frozen = [each for each in model.parameters() if each.is_floating_point() and not each.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _compare_outputs(model: PreTrainedModel, loaded: PreTrainedModel, batch: Batch) -> None:
    """Raise VerificationError unless both put out the same for the batch, NumericalError where what blocks give is not finite."""
    ours, theirs = _finite_outputs(model, batch), _reloaded_outputs(loaded, batch)
    if ours.keys() != theirs.keys() or not ours:
        raise VerificationError(
            f"the model loaded again puts out {sorted(theirs) or 'no tensor'}, and the one in memory {sorted(ours) or 'none'}: "
            "they cannot be compared"
        )
    if not all(_equal(tensor, theirs[name]) for name, tensor in ours.items()):
        _check_repeats(model, batch, ours)
    for name, tensor in ours.items():
        _compare(name, tensor, theirs[name])


def _outputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """All tensors that a model puts out; one that draws random numbers draws those of any other call."""
    with torch.inference_mode():
        return _tensors(feed_alike(model, batch))


def _finite_outputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """`_outputs`, looked at in those of blocks, and for one of which no number is finite: a head may have rows without meaning."""
    found: dict[str, Tensor] = {}
    broken = first_broken(model, lambda: found.update(_outputs(model, batch)), among=find_stacks(model).names)
    lost = [name for name, x in found.items() if x.is_floating_point() and x.numel() and not bool(x.isfinite().any())]
    if broken or lost:
        inner = first_broken(model, lambda: _outputs(model, batch))
        broken = broken or f"{type(model).__name__} ({lost[0]})"
        raise NumericalError(
            f"the output of {inner or broken} in the compressed model is not finite on one sample; {ADVICE}"
        )
    return found


def _reloaded_outputs(loaded: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """What the model loaded again puts out. Raises VerificationError where it cannot be called as the one in memory can."""
    try:
        return _outputs(loaded, batch)
    except (ArmorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the architecture's code may read a weight in a way that packed ones do not stand
        raise VerificationError(
            f"the model loaded again ({type(loaded).__name__}) cannot be run as the one in memory: {type(error).__name__}: {error}"
        ) from error


def _check_repeats(model: PreTrainedModel, batch: Batch, before: dict[str, Tensor]) -> None:
    """Raise VerificationError where the model in memory does not put out what it did `before`."""
    again = _outputs(model, batch)
    for name, tensor in before.items():
        if name not in again or not _equal(tensor, again[name]):
            raise VerificationError(
                f"the model in memory ({type(model).__name__}) puts out other {name} each time that it is called with the "
                "same inputs: what was written cannot be held against it. Load the folder and look at what it gives"
            )


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same bits, or NaN in the same places."""
    same_kind = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_kind and not bool(_differing(ours, theirs).any())


def _differing(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours != theirs) & ~(ours.isnan() & theirs.isnan())


def _tensors(output: object, name: str = "") -> dict[str, Tensor]:
    """All tensors of a model's output, by the names of their fields and their places in tuples."""
    if isinstance(output, Tensor):
        return {name or "output": output}
    inner = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    found: dict[str, Tensor] = {}
    for key, value in inner:
        found |= _tensors(value, f"{name}.{key}" if name else str(key))
    return found


def _compare(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise VerificationError unless the two are equal bit for bit, or NaN in the same places."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise VerificationError(
            f"the model loaded again differs from the one in memory: its {name} are {tuple(theirs.shape)} {theirs.dtype} instead "
            f"of {tuple(ours.shape)} {ours.dtype}"
        )
    differing = _differing(ours, theirs)
    if bool(differing.any()):
        worst = float((ours.float() - theirs.float()).abs().nan_to_num().max())
        one_sided = int((ours.isnan() != theirs.isnan()).sum())
        count = f"{int(differing.sum())} of {differing.numel()} {name}"
        count += f" ({one_sided} of them no numbers in one of the two)" if one_sided else ""
        raise VerificationError(
            f"the model loaded again differs from the one in memory: in {count}, by "
            f"{worst:.3g} at most, where the largest is {float(ours.float().abs().nan_to_num().max()):.3g}. A difference near "
            "rounding means that something here computes otherwise from one run to the next; a larger one that the folder is not "
            "this model"
        )
