"""What differs between two folders, from recipe to tensors: one layer of each is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.export import Source
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_config, read_tensor
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.verify import RECIPE_FILE, has_recipe, read_resolved
from armor_recipes.errors import CheckpointError
from armor_recipes.paths import user_path
from armor_recipes.recipe.leaves import Differing, differing, of_the_run
from armor_recipes.solver.patterns import TWO_OF_FOUR
from armor_recipes.solver.rows import stable_sum

#: Of the manifest, what a run was given and what it measured. The rest says what became of modules, as the tensors do.
_OF_A_RUN = (
    "format_version",
    "armor_recipes",
    "versions",
    "compute",
    "machine",
    "recipe_sha256",
    "model",
    "calibration",
)
_MEASURED = "evaluation"
#: The key of config.json by which equal tensors are read as other layers.
_LOADED_BY = "quantization_config"


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """A linear layer that is packed or quantised in one of the folders, and whose tensors differ.

    Distances are ‖X₁ − X₂‖ / ‖X₁‖ (Frobenius), of A, S, B and the weight Ŵ that the layer stands for; None where the two cannot be
    compared (other block sizes, or only one is packed).
    """

    name: str
    groups: int | None = None
    """Groups of four, each with a mask of its own; None where not both are packed."""
    masks: int | None = None
    """Of them those with another mask."""
    integers: int | None = None
    """Kept entries of S, of either, with another integer (or 8-bit float), where both cores are quantised alike."""
    a: float | None = None
    s: float | None = None
    b: float | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """A tensor outside of such layers: `distance` as above, `zeros` that only one of the two has; or what keeps them from it."""

    name: str
    distance: float | None
    zeros: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs: keys of the recipes, of what the manifests say of the runs and of their evaluations, layers, tensors."""

    recipe: tuple[Differing, ...]
    run: tuple[Differing, ...]
    evaluation: tuple[Differing, ...]
    modules: tuple[ModuleDiff, ...]
    tensors: tuple[TensorDiff, ...]
    compared: int
    """Tensors and layers that both folders have."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.recipe or self.run or self.evaluation or self.modules or self.tensors)

    def near(self, tolerance: float) -> bool:
        """Whether two runs of one recipe on the same tokens, on whatever machines, gave weights of layers that are so near."""
        elsewhere = all(each.path[0] == "machine" or each.path == ("compute", "sweep") for each in self.run)
        weights = all(row.weight is not None and row.weight <= tolerance for row in self.modules)
        return elsewhere and weights and not self.recipe and not self.tensors


def diff(first: Path, second: Path) -> Diff:
    """Compare two checkpoint folders; manifests and recipes where both have them or one does.

    Raises:
        CheckpointError: where a folder, its manifest or its recipe is damaged.
    """
    folders = user_path(first), user_path(second)
    manifests = [read_json(f / MANIFEST_FILE) if (f / MANIFEST_FILE).exists() else {} for f in folders]
    told = [{key: each.get(key) for key in _OF_A_RUN} for each in manifests]
    one, two = map(Source.open, folders)
    if one.tensors.keys() == two.tensors.keys():  # else they tell it
        loaded = [read_config(folder).get(_LOADED_BY) for folder in folders]
        for each, found in zip(told, loaded, strict=True):
            each[_LOADED_BY] = found if all(loaded) else "some" if found else None  # of one alone that it is there
    layers = dict.fromkeys(sorted({*one.specs, *one.plain, *two.specs, *two.plain}))
    others = [name for name in sorted({*one.tensors, *two.tensors}) if _owner(name) not in layers]
    modules = [found for name in layers for found in _module(name, one, two)]
    tensors = [found for name in others for found in _tensor(name, one, two)]
    alone = sum(bool(found.reason) for found in tensors)
    return Diff(
        recipe=tuple(differing(*map(_recipe, folders))),
        run=tuple(differing(*told)),
        evaluation=tuple(differing(*(each.get(_MEASURED) for each in manifests))),
        modules=tuple(modules),
        tensors=tuple(tensors),
        compared=len(layers) + len(others) - alone,
    )


def _recipe(folder: Path) -> dict[str, Any]:
    """What `of_the_run` leaves of the resolved recipe; empty without one."""
    found = read_resolved(folder / RECIPE_FILE) if has_recipe(folder) else {}
    if found is None:
        raise CheckpointError(f"{folder / RECIPE_FILE} holds no recipe: restore it, or remove it to leave it out")
    return of_the_run(found)


def _owner(tensor: str) -> str:
    """The layer that a tensor would be a part of; a bias stands by itself."""
    name, _, part = tensor.rpartition(".")
    return "" if part == "bias" else name


def _module(name: str, one: Source, two: Source) -> Iterator[ModuleDiff]:
    first, second = (each.layer(name) if name in each.specs else None for each in (one, two))
    if first is not None and second is not None:
        parts = zip(_parts(first), _parts(second), strict=True)  # B may be another layer's tensor
        if any(_differ(*pair) for pair in parts):
            yield _packed(name, first, second)
        return
    own = [{key for key in each.tensors if _owner(key) == name} for each in (one, two)]
    if own[0] != own[1] or any(_differ(*(read_tensor(x.tensors, key) for x in (one, two))) for key in own[0]):
        yield ModuleDiff(name, weight=_distance(_weight(name, one, first), _weight(name, two, second)))


def _parts(layer: PackedLinear) -> tuple[Tensor | None, ...]:
    return layer.values, layer.bitmask, layer.a, layer.b, layer.scale


def _packed(name: str, one: PackedLinear, two: PackedLinear) -> ModuleDiff:
    first, second = one.factors(name=name), two.factors(name=name)
    same = first.core.shape == second.core.shape
    masks = (first.mask != second.mask).unflatten(1, (-1, TWO_OF_FOUR.group)).any(-1) if same else None
    return ModuleDiff(
        name,
        None if masks is None else masks.numel(),
        None if masks is None else int(masks.sum()),
        _integers(one, two) if same and one.core == two.core != "float" else None,
        _distance(first.a, second.a),
        _distance(first.core, second.core),
        _distance(first.b, second.b),
        _distance(one.fold(torch.float32, name=name), two.fold(torch.float32, name=name)),
    )


def _integers(one: PackedLinear, two: PackedLinear) -> int:
    """How many entries of two quantised cores are other numbers, of those that either keeps."""
    found = []
    for layer in (one, two):
        factors = layer.factors()
        assert factors.quantized is not None, "the core is quantised"
        kept = factors.quantized.integers.float()
        # NaN outside of the mask differs from every integer, a kept zero among them.
        found.append(torch.full(factors.mask.shape, torch.nan).masked_scatter(factors.mask, kept))
    return int(((found[0] != found[1]) & ~(found[0].isnan() & found[1].isnan())).sum())


def _weight(name: str, source: Source, layer: PackedLinear | None) -> Tensor | None:
    """Ŵ `(O, I)` in float32, whatever it is stored as; None where the folder has no such layer."""
    if layer is not None:
        return layer.fold(torch.float32, name=name)
    if name in source.plain:
        return source.dequantized(name).float()
    return read_tensor(source.tensors, f"{name}.weight").float() if f"{name}.weight" in source.tensors else None


def _tensor(name: str, one: Source, two: Source) -> Iterator[TensorDiff]:
    if name not in one.tensors or name not in two.tensors:
        yield TensorDiff(name, None, None, f"only in the {'second' if name not in one.tensors else 'first'}")
        return
    first, second = read_tensor(one.tensors, name), read_tensor(two.tensors, name)
    if not _differ(first, second):
        return
    if first.shape != second.shape or first.dtype != second.dtype:
        kinds = (f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (first, second))
        yield TensorDiff(name, _distance(first, second), None, " and ".join(kinds))
        return
    zeros = int(((first.float() == 0) != (second.float() == 0)).sum())
    yield TensorDiff(name, _distance(first, second), zeros)


def _differ(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors are of other shapes, dtypes or bytes, or only one is there."""
    if first is None or second is None:
        return first is not second
    if first.shape != second.shape or first.dtype != second.dtype:
        return True
    return not torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (first, second)))


def _distance(first: Tensor | None, second: Tensor | None) -> float | None:
    """‖X₁ − X₂‖ / ‖X₁‖, or / ‖X₂‖ where X₁ is zero; None of other shapes, or where a number is not finite."""
    if first is None or second is None or first.shape != second.shape:
        return None
    one, two = (torch.atleast_2d(x.float()).flatten(1) for x in (first, second))
    apart, size, other = (stable_sum(x.square()) for x in (one - two, one, two))
    share = (apart / (size or other or 1.0)) ** 0.5
    return share if share < float("inf") else None
