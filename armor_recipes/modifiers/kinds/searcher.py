"""`Searcher`: a smoother that tries scales on what quantising the readers of a module costs at the output of their parent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.errors import NumericalError
from armor_recipes.modifiers.base import C, Needs
from armor_recipes.modifiers.kinds.contract import Planned, Planning, calibration_tokens, once
from armor_recipes.modifiers.kinds.parents import Calls, Wanted, expert_layer, parent_of
from armor_recipes.modifiers.kinds.smoother import Scales, Smoothed, Smoother, SmoothingPlan

#: Operations on each value of a weight that is scaled, rounded and scaled back.
_ROUNDING = 30.0


@dataclass(frozen=True, slots=True)
class SearchPlan(SmoothingPlan):
    """One module whose scales are searched. `quantised` are schemes of the readers' whole weights, each with those that
    have it; `paired` says that the readers are known, and `unequal` why it is left as it is, empty where it is not.
    """

    quantised: tuple[tuple[str, tuple[str, ...]], ...] = ()
    paired: bool = False
    unequal: str = ""

    @property
    def exact(self) -> bool:
        """Whether the readers are known."""
        return self.given or self.paired

    @property
    def misfit(self) -> str:
        """Why shapes forbid it."""
        return self.unequal

    @property
    def by_reader(self) -> dict[str, Scheme]:
        """The scheme of each reader that has one."""
        return {name: Scheme(text) for text, names in self.quantised for name in names}


Loss = Callable[[Tensor], float]


class Searcher(Smoother[C]):
    """Looks ahead at what the entries behind it quantise whole weights to."""

    ranges: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """Inputs of the block before anything else in it, and the rows of the entries behind."""
        config: Any = self.config
        return Needs(streams=(config.propagate,), when="before", ahead=True, because=f"propagate: {config.propagate}")

    @property
    @abstractmethod
    def tries(self) -> int:
        """Candidates of one search."""

    @abstractmethod
    def check_scheme(self, name: str, scheme: Scheme) -> None:
        """Raise PlanError where scales cannot be searched for a reader that is quantised so."""

    @abstractmethod
    def rounded(self, weights: Mapping[str, Tensor], scheme: Scheme) -> Mapping[str, Tensor]:
        """What quantising leaves of weights `(O, I)` of modules that read the same tensor, in the dtype that they are stored in."""

    @abstractmethod
    def search(self, sizes: Tensor, weights: Sequence[tuple[Tensor, Scheme]], loss: Loss) -> Scales:
        """The best scales by a loss, from the mean size of the channels `(I,)` and the weights that are quantised."""

    def planned(self, planning: Planning, rows: tuple[SmoothingPlan, ...]) -> Planned:
        """The rows of modules of which a targeted reader is quantised by an entry behind."""
        schemes = {name: scheme for row in planning.after for name, scheme in row.schemes.items()}
        found = tuple(self._rows(planning, rows, schemes))
        if not found and not planning.entry.config.optional:
            return Planned((), (self._nothing(planning, rows),))
        for row in found:
            for name, scheme in row.by_reader.items():
                self.check_scheme(name, scheme)
        return Planned(found)

    def _rows(
        self, planning: Planning, rows: Sequence[SmoothingPlan], schemes: Mapping[str, str]
    ) -> Iterator[SearchPlan]:
        costs = _Costs(planning, rows, self.tries)
        for row in rows:
            groups: dict[str, list[str]] = {}
            for name in row.readers:
                if name in schemes:
                    groups.setdefault(schemes[name], []).append(name)
            wanted = tuple(name for name in row.wanted if name in schemes)
            if wanted:
                flops, peak = costs.of(row)
                source = planning.model.get_submodule(row.source)
                given = row.given and not _fused(source, row, planning)
                yield SearchPlan(
                    **asdict(replace(row, wanted=wanted, given=given, flops=flops, peak_bytes=peak)),
                    quantised=tuple((text, tuple(names)) for text, names in groups.items()),
                    paired=isinstance(source, nn.Linear),
                    unequal=_unequal(source, row, planning),
                )

    def _nothing(self, planning: Planning, rows: Sequence[SmoothingPlan]) -> str:
        """Why there is nothing to do: no quantisation behind, or only that of cores."""
        names = {name for row in rows for name in row.wanted}
        cores = list(dict.fromkeys(name for row in planning.after for name in row.takes if name in names))
        text = "it chooses scales by what quantising whole weights costs, and quantises nothing itself"
        if cores and any(getattr(row, "core", "float") != "float" for row in planning.after):
            return (
                f"{text}, but of {once('{}', cores)} the entries behind it quantise the core that factors have, whose rounding no "
                "scale of the weight tells: remove it (QuantizationModifier's `gauge` chooses such scales inside of the "
                "factors), or put SmoothQuantModifier before the factors"
            )
        return f"{text}: put a QuantizationModifier or GPTQModifier that takes its modules after it"

    def scales(self, found: Smoothed) -> Scales:
        """Search, on all calls of the readers' parent."""
        row = found.row
        assert isinstance(row, SearchPlan)
        calls = found.calls.of(_wanted(row, found), _beside(row, found))
        if calls.sizes is None or not calls.sizes.tokens or not calls.arguments:
            return Scales(torch.ones(1), left="calibration does not reach it")
        weights = dict(zip(found.readers, found.weights, strict=True))
        quantised = {name: scheme for name, scheme in row.by_reader.items() if name in weights}
        loss = _Loss(self, found, calls, {name: weights[name] for name in quantised}, quantised)
        return self.search(calls.sizes.value, [(weights[name], scheme) for name, scheme in quantised.items()], loss)


class _Loss:
    """The mean squared difference of the parent's outputs when weights are scaled, quantised and scaled back."""

    def __init__(
        self,
        modifier: Searcher[Any],
        found: Smoothed,
        calls: Calls,
        weights: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
    ) -> None:
        self._modifier, self._found, self._calls, self._weights = modifier, found, calls, weights
        self._groups: dict[tuple[str, Scheme], list[str]] = {}
        for name, scheme in schemes.items():
            self._groups.setdefault((found.context.reader(name), scheme), []).append(name)
        self._before = list(calls.outputs(found.context.model, found.changed))
        if not all(bool(output.isfinite().all()) for output in self._before):
            raise NumericalError(f"the outputs of {calls.parent} are not finite: check the model's weights and data")

    def __call__(self, scales: Tensor) -> float:
        """The loss of scales `(I,)`."""
        model, stored = self._found.context.model, self._found.context.storage.dtype
        changed = dict(self._found.changed)
        for (_, scheme), names in self._groups.items():
            scaled = {name: (self._weights[name] * scales).to(stored) for name in names}
            for name, value in self._modifier.rounded(scaled, scheme).items():
                changed[f"{name}.weight"] = (value / scales).to(self._weights[name].dtype)
        total = torch.zeros((), dtype=torch.float64)
        for before, after in zip(self._before, self._calls.outputs(model, changed), strict=True):
            total += (before - after).square_().sum(dtype=torch.float64).cpu()
        return float(total) / max(1, sum(output.numel() for output in self._before))


def _wanted(row: SearchPlan, found: Smoothed) -> Wanted:
    """The readers' parent, and where the channels' sizes are measured."""
    return _wanted_of(row, found.readers, found.context.model)


def _wanted_of(row: SearchPlan, readers: Sequence[str], model: nn.Module) -> Wanted:
    if row.paired:
        return Wanted(parent_of(readers, model), readers[0], outputs=False)
    return Wanted(parent_of(readers, model), row.source, outputs=True)


def _beside(row: SearchPlan, found: Smoothed) -> list[Wanted]:
    """What the other experts' rows of the mixture will ask for."""
    layer = expert_layer(row.source)
    if not layer:
        return []
    rows = [other for other in found.share.rows if other.exact and expert_layer(other.source) == layer]
    return [_wanted_of(other, other.readers, found.context.model) for other in rows]


def _width(row: SmoothingPlan, planning: Planning) -> int:
    """Columns of the readers."""
    module: Any = planning.model.get_submodule(row.readers[0])
    return int(module.weight.shape[1])


def _fused(source: nn.Module, row: SmoothingPlan, planning: Planning) -> bool:
    """Whether a linear source has other rows beside those that are read, which rows only running tells."""
    return isinstance(source, nn.Linear) and source.out_features > _width(row, planning)


def _unequal(source: nn.Module, row: SmoothingPlan, planning: Planning) -> str:
    """Why a linear source does not fit its readers; empty where it does."""
    width = _width(row, planning)
    if not isinstance(source, nn.Linear) or source.out_features % width == 0:
        return ""
    return f"its {source.out_features} outputs are not the {width} inputs of {row.readers[0]}"


class _Costs:
    """What searching costs: a pass of the parent and a rounding of its readers for each candidate."""

    def __init__(self, planning: Planning, rows: Sequence[SmoothingPlan], tries: int) -> None:
        self._planning, self._tries = planning, tries
        spec = planning.entry.config.calibration
        self._tokens = 0 if spec is None else calibration_tokens(spec)
        self._norms: dict[int, int] = {}
        for row in rows:
            self._norms[row.layer] = self._norms.get(row.layer, 0) + self._is_open(row)

    def of(self, row: SmoothingPlan) -> tuple[float, int]:
        """Operations and bytes of a row."""
        planning = self._planning
        width = self._weight(row.readers[0]).shape[1]
        if self._is_open(row):
            # Each linear module of the block reads one of its norms, so that their parents make up the block.
            size = parent = _values(planning.stacks.block(row.layer)) // self._norms[row.layer]
            given = width
        else:
            size = sum(self._weight(name).numel() for name in row.readers)
            parent = _values(planning.model.get_submodule(parent_of(row.readers, planning.model)))
            given = max(self._weight(name).shape[0] for name in row.readers)
        held = (self._planning.facts.experts_per_token or 1) if expert_layer(row.source) else 1
        flops = self._tries * (2.0 * parent * self._tokens + _ROUNDING * size)
        return flops, 4 * (self._tokens * (held * width + given) + 3 * size)

    def _is_open(self, row: SmoothingPlan) -> bool:
        """Whether only running tells the readers."""
        return not row.given and not isinstance(self._planning.model.get_submodule(row.source), nn.Linear)

    def _weight(self, name: str) -> Tensor:
        module: Any = self._planning.model.get_submodule(name)
        found: Tensor = module.weight
        return found


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
