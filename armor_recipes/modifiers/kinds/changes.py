"""What a step gives: new weights and factors, and what was measured. A frozen value that can be written and read again."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armor_recipes.checkpoint.files import save_tensors
from armor_recipes.checkpoint.header import file_header
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import QuantizedCache, QuantizedLinear, Scheme
from armor_recipes.errors import CheckpointError


class StepResult:
    """What was measured of one step: a frozen dataclass of each kind. `section` is the manifest's list that it stands in."""

    __slots__ = ()
    section: ClassVar[str] = ""
    seconds: float
    known: ClassVar[dict[str, type[StepResult]]] = {}

    def __init_subclass__(cls) -> None:
        StepResult.known[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what is a function of the inputs, without the seconds."""
        return {key: value for key, value in self.record().items() if key != "seconds"}

    def record(self) -> dict[str, Any]:
        """All fields that count when two are compared, as plain data, from which `from_record` makes it again."""
        plain = {part.name: getattr(self, part.name) for part in fields(self) if part.compare}  # type: ignore[arg-type]
        data: dict[str, Any] = json.loads(json.dumps(plain, default=lambda value: value.record()))
        return data

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> Self:
        """The result of which `record` gave these data."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


@dataclass(frozen=True, slots=True)
class FactorChange(StepResult):
    """What a factor modifier did to one module.

    `losses` are against the product A · S · B before, relative to 0 in its place; `stored_loss` is that of what is stored.
    Modules that share a B are changed as one and have the same losses and counts.
    """

    modifier: str
    core: str
    losses: tuple[float, ...]
    stored_loss: float
    tokens: int
    iterations: int
    stop_reason: str
    counts: Mapping[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the seconds; of the losses the first and the last."""
        return _first_and_last(self)


@dataclass(frozen=True, slots=True)
class ModuleResult(StepResult):
    """What was done to one module.

    `losses` are relative to Ŵ = 0; `stored_loss` is the last one computed again after rounding to the stored dtype;
    `error` is ‖W − Ŵ‖ / ‖W‖ (Frobenius) of the stored weight; `packed` (of factors) or `quantized` (of a plain weight) is what the
    checkpoint keeps, both None for a dense weight: the commit puts it in, and it is no part of a record. `refined` names the
    refiners that trained the factors afterwards, and `changes` are what factor modifiers did to them then: losses and error are
    those from before.
    """

    name: str
    modifier: str
    losses: tuple[float, ...]
    stored_loss: float
    error: float
    tokens: int
    iterations: int
    stop_reason: str
    counts: Mapping[str, int]
    seconds: float
    packed: PackedLinear | None = field(default=None, compare=False)
    quantized: QuantizedLinear | None = field(default=None, compare=False)
    measures: Mapping[str, float] = field(default_factory=dict)
    refined: tuple[str, ...] = ()
    changes: tuple[FactorChange, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the seconds; of the losses the first and the last."""
        return {**_first_and_last(self), "changes": [change.to_dict() for change in self.changes]}

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> Self:
        """The result of which `record` gave these data."""
        changes = tuple(map(FactorChange.from_record, data["changes"]))
        return super(ModuleResult, cls).from_record({**data, "changes": changes})  # slots: no bare super()


def _first_and_last(result: FactorChange | ModuleResult) -> dict[str, Any]:
    data = {key: value for key, value in result.record().items() if key not in ("name", "seconds", "losses")}
    data |= {"relative_error": data.pop("error")} if "error" in data else {}
    return {"modifier": data.pop("modifier"), "first_loss": result.losses[0], "last_loss": result.losses[-1], **data}


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What one step wants changed. Nothing is changed before it is committed, and by the commit alone.

    Attributes:
        step: the unit's key, which names the step within its run.
        weights: new values by parameter, in compute dtype, each of the parameter's shape.
        factors: packed factors by module; None where a plain weight takes their place.
        quantized: plain weights as they are stored, by module.
        caches: how keys and values are quantised on their way into the cache, by attention module.
        packed: whether the weights of modules with factors are what a loader makes of the factors, bit for bit.
        sharing: for each module the first of those that share its B.
        gradients: g by module, in the order of new rows.
        modules: results by module.
        results: what was measured besides.
        same_function: whether the model with these weights gives what it gave before.
    """

    step: str
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, PackedLinear | None] = field(default_factory=dict)
    quantized: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    caches: Mapping[str, QuantizedCache] = field(default_factory=dict)
    packed: bool = False
    sharing: Mapping[str, str] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, ModuleResult] = field(default_factory=dict)
    results: tuple[StepResult, ...] = ()
    same_function: bool = False

    def save(self, path: Path) -> None:
        """Write one safetensors file. Weights that factors give are left out, and made of them again."""
        tensors = self._tensors()
        aliases = _aliases(tensors)
        own = {name: value.contiguous() for name, value in tensors.items() if name not in aliases}
        save_tensors(own, path, {"changes": json.dumps({**self._record(), "aliases": aliases})})

    def mapped(self, path: Path) -> dict[int, Tensor]:
        """The tensors in the file that `save` wrote, mapped and not to be changed, by the ids of those that are held here.

        Each has a storage of its own: transformers copies what shares one before it saves.
        """
        tensors = self._tensors()
        aliases, placed = _aliases(tensors), file_header(path)
        with path.open("r+b") as file:
            whole = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED)
        return {
            id(value): torch.frombuffer(whole, dtype=value.dtype, count=value.numel(), offset=info.begin).view(
                value.shape
            )
            for name, value in tensors.items()
            if name not in aliases and (info := placed[name]).nbytes
        }

    def _tensors(self) -> dict[str, Tensor]:
        """What `save` writes, by the names there; some may be one under several names."""
        tensors = {f"gradients/{name}": value for name, value in self.gradients.items()}
        for name, value in self.weights.items():
            if name not in self._folded:
                tensors[f"weights/{name}"] = value
        for name, factors in self.factors.items():
            for part in fields(PackedLinear):
                found = None if factors is None else getattr(factors, part.name)
                if isinstance(found, Tensor):
                    tensors[f"factors/{name}/{part.name}"] = found
        for name, layer in self.quantized.items():
            tensors |= {f"quantized/{name}/{part}": value for part, value in layer.tensors.items()}
        for name, cache in self.caches.items():
            tensors |= {f"caches/{name}/{part}": value for part, value in cache.tensors.items()}
        return tensors

    @property
    def _folded(self) -> dict[str, torch.dtype]:
        """Weights that their factors give, with their dtypes."""
        names = [f"{name}.weight" for name, factors in self.factors.items() if factors is not None and self.packed]
        return {name: self.weights[name].dtype for name in names if name in self.weights}

    def _record(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "packed": self.packed,
            "same_function": self.same_function,
            "sharing": dict(self.sharing),
            "factors": {name: factors is not None for name, factors in self.factors.items()},
            "activations": {name: factors.activations for name, factors in self.factors.items() if factors is not None},
            "folded": {name: str(dtype).removeprefix("torch.") for name, dtype in self._folded.items()},
            "quantized": {name: [one.scheme.text, *one.tensors] for name, one in self.quantized.items()},
            "caches": {name: [one.text, *one.tensors] for name, one in self.caches.items()},
            "weights": list(self.weights),
            "modules": {name: result.record() for name, result in self.modules.items()},
            "results": [[type(result).__name__, result.record()] for result in self.results],
        }

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Changes:
        """Read what `save` wrote, tensors bit for bit, in memory of their own on a device.

        Raises CheckpointError, naming the file, for anything else.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as opened:
                record = json.loads((opened.metadata() or {})["changes"])
                # Of a mapped file they would be at addresses on which BLAS may round otherwise.
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no mapping
            return _read(record, tensors | {name: tensors[first] for name, first in record["aliases"].items()})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} does not hold the changes of a step ({error!r}); remove it") from error


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name of a tensor that came under another name before, that name: a B that modules share is one."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(value), name) for name, value in tensors.items()}
    return {name: other for name, other in found.items() if other != name}


def _read(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Changes:
    names = [part.name for part in fields(PackedLinear)]
    factors = {
        name: PackedLinear(
            **{part: tensors[key] for part in names if (key := f"factors/{name}/{part}") in tensors},
            activations=record["activations"][name],
        )
        if there
        else None
        for name, there in record["factors"].items()
    }
    weights = {}
    for name in record["weights"]:
        found = factors.get(name.removesuffix(".weight")) if name in record["folded"] else None
        dtype = getattr(torch, record["folded"].get(name, "float32"))
        weights[name] = tensors[f"weights/{name}"] if found is None else loaded_weight(found, dtype)
    start = "gradients/"
    return Changes(
        step=record["step"],
        weights=weights,
        factors=factors,
        quantized={
            name: QuantizedLinear(Scheme(scheme), {part: tensors[f"quantized/{name}/{part}"] for part in parts})
            for name, (scheme, *parts) in record["quantized"].items()
        },
        caches={
            name: QuantizedCache(text, {part: tensors[f"caches/{name}/{part}"] for part in parts})
            for name, (text, *parts) in record["caches"].items()
        },
        packed=record["packed"],
        sharing=record["sharing"],
        gradients={name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)},
        modules={name: ModuleResult.from_record(data) for name, data in record["modules"].items()},
        results=tuple(StepResult.known[kind].from_record(data) for kind, data in record["results"]),
        same_function=record["same_function"],
    )


def loaded_weight(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight that a loader computing in `dtype` makes of the stored tensors, bit for bit."""
    return packed.to(dtype).fold(dtype)
