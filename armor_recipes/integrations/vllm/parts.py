"""A layer of a server: packed tensors of one module or of several that run as one, and of each the part that a process holds.

Values, bitmasks, scales and blocks of A of all modules stand below each other; each B stands once, however many of the modules
use it. Modules beside each other that use one B run as one: stacked, they are a packed layer like any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.config import (
    BITMASK,
    INPUT_FACTOR,
    OUTPUT_FACTOR,
    SCALE,
    VALUES,
    LayerSpec,
    PackedShapes,
)
from armor_recipes.checkpoint.packing import INTEGER_DTYPES, KEPT_PER_VALUE, PackedLinear
from armor_recipes.checkpoint.serving import Side, describe, split_problem
from armor_recipes.errors import CheckpointError

COMPRESS_AGAIN = (
    "compress the model with `serve: {tensor_parallel: [...]}` in the recipe, which checks this when it is planned, or serve what "
    "`armor export FOLDER OUT --to dense` makes of the folder"
)
_SHARDS: Mapping[object, int] = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True, slots=True)
class Share:
    """One of `ways` equal parts, the one with this `index`, of `size` rows or columns that begin at `offset`."""

    size: int
    ways: int = 1
    index: int = 0
    offset: int = 0

    @property
    def count(self) -> int:
        """Rows or columns of the part."""
        return self.size // self.ways

    @property
    def start(self) -> int:
        """The first of them."""
        return self.offset + self.index * self.count


@dataclass(frozen=True, slots=True)
class Part:
    """What a process holds of one module."""

    name: str
    """Full name in the checkpoint."""
    spec: LayerSpec
    shape: tuple[int, int]
    """`(O, I)` of the module."""
    rows: Share
    columns: Share

    @property
    def owner(self) -> str:
        """The module whose B it uses."""
        return self.spec.input_factor or self.name

    def check(self) -> None:
        """Raise `CheckpointError` where the part is not made of whole blocks, or the module does not fit its description."""
        PackedShapes.of(self.shape, self.spec, name=self.name)
        sides: tuple[tuple[Side, Share], ...] = ("rows", self.rows), ("columns", self.columns)
        for side, share in sides:
            problem = split_problem(self.name, share.size, self.spec, side=side, ways=share.ways)
            problem = problem or split_problem(self.name, share.offset, self.spec, side=side, ways=1)
            if problem is not None:
                raise CheckpointError(f"{problem}; {COMPRESS_AGAIN}")

    def cut(self, tensor: str, whole: Tensor) -> Tensor:
        """Return this part of one of the module's tensors, a view.

        Raises:
            CheckpointError: if the tensor has another shape or kind of numbers than the module's description says.
        """
        shape, dtype = _layout(self.spec, self.shape, self.name)[tensor]
        fits = whole.is_floating_point() if dtype is None else whole.dtype == dtype
        if tuple(whole.shape) != shape or not fits:
            raise CheckpointError(
                f"{self.name}.{tensor} is {tuple(whole.shape)} {whole.dtype}; by config.json it is {shape} {dtype or 'float'}: the "
                "tensor is damaged, or config.json does not belong to it"
            )
        for dim, (share, step) in enumerate(self._shares(tensor)):
            whole = whole.narrow(dim, share.start // step, share.count // step)
        return whole

    def _shares(self, tensor: str) -> tuple[tuple[Share, int], ...]:
        """Of each dimension that is cut, the share and how many rows or columns of the weight one entry stands for."""
        spec, rows = self.spec, (self.rows, 1)
        if tensor == SCALE:
            return (rows,) if spec.group_size is None else (rows, (self.columns, 2 * spec.group_size))
        return {
            VALUES: (rows, (self.columns, 2 * KEPT_PER_VALUE[spec.core])),
            BITMASK: (rows, (self.columns, 8)),
            OUTPUT_FACTOR: ((self.rows, spec.block_size[0]),),
            INPUT_FACTOR: ((self.columns, spec.block_size[1]),),
        }[tensor]


def lay_out(members: Mapping[str, LayerSpec], rows: Sequence[Share], columns: Share) -> tuple[Part, ...]:
    """What a process holds of each module of a layer, by name; `rows` are those of each part of the layer.

    Where one module is stored as the whole layer, each part has its rows at another place of that module.
    """
    if len(members) == len(rows):
        pairs = zip(members.items(), rows, strict=True)
        return tuple(Part(name, spec, (held.size, columns.size), held, columns) for (name, spec), held in pairs)
    ((name, spec),) = members.items()
    ends = list(accumulate(held.size for held in rows))
    return tuple(
        Part(name, spec, (ends[-1], columns.size), replace(held, offset=end - held.size), columns)
        for held, end in zip(rows, ends, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Modules beside each other that use one B, as the one packed layer that they make."""

    name: str
    packed: PackedLinear
    rows: slice
    """Its rows in the whole layer."""


class FusedLinear:
    """The tensors of one layer, empty at first and filled part by part.

    All parts have one description but for the B that they use, and the same columns. `tensors` are parameters by name; B is
    `(owners, I/b_i, b_i, b_i)`.
    """

    def __init__(self, parts: Sequence[Part], factors: InputFactors, dtype: torch.dtype) -> None:
        """Make the tensors, floats in `dtype`, and ask `factors` for each B. Raises `CheckpointError` for what cannot be split."""
        for part in parts:
            part.check()
        self.parts = tuple(parts)
        self.owners = tuple(dict.fromkeys(part.owner for part in parts))
        self.factors = factors
        self.tensors = {
            name: nn.Parameter(torch.empty(shape, dtype=kind or dtype), requires_grad=False)
            for name, (shape, kind) in self._layout().items()
        }
        rows = {(part.name, tensor, i) for tensor in self.tensors for i, part in enumerate(parts)}
        self._missing = {key for key in rows if key[1] != INPUT_FACTOR}
        for index, owner in enumerate(self.owners):
            self._missing.add((owner, INPUT_FACTOR, index))
            factors.ask(owner, partial(self._take_factor, owner, index))

    def load(self, tensor: str, whole: Tensor, shard: object = None) -> None:
        """Copy what this process holds of a tensor on disk; a B goes to every layer that uses it.

        Args:
            tensor: its name after the module's.
            whole: of one module.
            shard: which part it is of: q, k or v, or a number from 0; None where one module has all parts.

        Raises:
            CheckpointError: if it does not fit, or belongs to a module that uses the B of another.
        """
        wanted = _SHARDS.get(shard, shard)
        chosen = [(i, part) for i, part in enumerate(self.parts) if wanted in (None, i)]
        if len({part.name for _, part in chosen}) != 1:
            raise CheckpointError(
                f"{self.parts[0].name}.{tensor}: the server loads it as part {shard!r} of a layer of {len(self.parts)} modules, "
                "which is not known here; serve what `armor export FOLDER OUT --to dense` makes of the folder"
            )
        if tensor == INPUT_FACTOR:
            self.factors.give(chosen[0][1], whole)
            return
        step = self.parts[0].spec.block_size[0] if tensor == OUTPUT_FACTOR else 1
        for index, part in chosen:
            cut = part.cut(tensor, whole)
            start = sum(other.rows.count for other in self.parts[:index])
            self.tensors[tensor].data.narrow(0, start // step, cut.shape[0]).copy_(cut)
            self._missing.discard((part.name, tensor, index))

    def pieces(self) -> list[Piece]:
        """The packed layers to run one by one, their outputs in the order of the parts; all tensors are views.

        Raises:
            CheckpointError: where a tensor was not in the checkpoint: it would be whatever was in memory.
        """
        if self._missing:
            names = sorted({f"{module}.{tensor}" for module, tensor, _ in self._missing})
            raise CheckpointError(f"the checkpoint holds no {', '.join(names)}: it is damaged")
        found, end = [], 0
        for owner, group in groupby(self.parts, key=lambda part: part.owner):
            parts = list(group)
            rows = slice(end, end := end + sum(part.rows.count for part in parts))
            name = ", ".join(dict.fromkeys(part.name for part in parts))
            found.append(Piece(name, self._packed(rows, self.owners.index(owner)), rows))
        return found

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        first = self.parts[0]
        rows = sum(part.rows.count for part in self.parts)
        layout = _layout(first.spec, (rows, first.columns.count), first.name)
        shape, dtype = layout[INPUT_FACTOR]
        return {**layout, INPUT_FACTOR: ((len(self.owners), *shape), dtype)}

    def _take_factor(self, owner: str, index: int, whole: Tensor) -> None:
        part = next(part for part in self.parts if part.owner == owner)
        self.tensors[INPUT_FACTOR].data[index].copy_(part.cut(INPUT_FACTOR, whole))
        self._missing.discard((owner, INPUT_FACTOR, index))

    def _packed(self, rows: slice, factor: int) -> PackedLinear:
        b_o = self.parts[0].spec.block_size[0]
        data = {name: parameter.data for name, parameter in self.tensors.items()}
        return PackedLinear(
            data[VALUES][rows],
            data[BITMASK][rows],
            data[OUTPUT_FACTOR][rows.start // b_o : rows.stop // b_o],
            data[INPUT_FACTOR][factor],
            data[SCALE][rows] if SCALE in data else None,
        )


class PlainLinear:
    """A layer of modules that are dense, beside packed ones of its kind: `weight` `(O, I)`, filled module by module."""

    def __init__(self, names: Sequence[str], rows: Sequence[Share], columns: Share, dtype: torch.dtype) -> None:
        self.names, self.rows, self.columns = tuple(names), tuple(rows), columns
        self.weight = torch.empty(sum(share.count for share in rows), columns.count, dtype=dtype)
        self._missing = set(range(len(rows)))

    def load(self, tensor: str, whole: Tensor, shard: object = None) -> None:
        """Copy what this process holds of a module's weight. Raises `CheckpointError` if it does not fit."""
        (index,) = [i for i in range(len(self.names)) if shard in (None, i)]
        rows, columns = self.rows[index], self.columns
        if tensor != VALUES or tuple(whole.shape) != (rows.size, columns.size) or not whole.is_floating_point():
            raise CheckpointError(
                f"{self.names[index]}.{tensor} is {tuple(whole.shape)} {whole.dtype}; by config.json the module is dense, with a "
                f"weight {(rows.size, columns.size)}: the tensor is damaged, or config.json does not belong to it"
            )
        part = whole.narrow(0, rows.start, rows.count).narrow(1, columns.start, columns.count)
        start = sum(share.count for share in self.rows[:index])
        self.weight.narrow(0, start, rows.count).copy_(part)
        self._missing.discard(index)

    def loaded(self) -> Tensor:
        """The weight. Raises `CheckpointError` where a module's was not in the checkpoint."""
        if self._missing:
            names = ", ".join(f"{self.names[index]}.{VALUES}" for index in sorted(self._missing))
            raise CheckpointError(f"the checkpoint holds no {names}: it is damaged")
        return self.weight


class InputFactors:
    """Brings each B to all layers that use it, whatever order the files have. One for a model."""

    def __init__(self) -> None:
        self._takers: dict[str, list[Callable[[Tensor], None]]] = defaultdict(list)

    def ask(self, owner: str, take: Callable[[Tensor], None]) -> None:
        """Let `take` have the B of module `owner` once it is read."""
        self._takers[owner].append(take)

    def give(self, part: Part, whole: Tensor) -> None:
        """Hand out the B of a part's module. Raises `CheckpointError` where that module uses another's."""
        if part.owner != part.name:
            raise CheckpointError(
                f"{part.name}.{INPUT_FACTOR} is no tensor of this layer, which uses the B of {part.owner}: config.json does not "
                "belong to this checkpoint"
            )
        for take in self._takers[part.name]:
            take(whole)

    def forget(self) -> None:
        """Let go of the layers that asked, once all is read."""
        self._takers.clear()


def _layout(
    spec: LayerSpec, shape: tuple[int, int], name: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of each tensor of a weight `(O, I)`; None stands for the float dtype of the layer."""
    if spec.core == "fp8" or spec.activations is not None:
        raise CheckpointError(
            f"{name} has {describe(spec)}, which the plugin does not run yet: it takes float, int8 and int4 cores and no 8-bit "
            "activations; serve a folder that was written without them"
        )
    shapes = PackedShapes.of(shape, spec, name=name)
    integers = {core: dtype for dtype, core in INTEGER_DTYPES.items()}
    layout: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        VALUES: (shapes.values, integers.get(spec.core)),
        BITMASK: (shapes.bitmask, torch.uint8),
        OUTPUT_FACTOR: (shapes.a, None),
        INPUT_FACTOR: (shapes.b, None),
    }
    return layout if shapes.scale is None else {**layout, SCALE: (shapes.scale, None)}
