"""Importing this registers our modifiers with llm-compressor, so that its `oneshot` runs them in its own pipeline.

Each stands under llm-compressor's base class, with its fields, lifecycle and hooks around our statistics and solvers. Needs the
extra `armor-recipes[llmcompressor]`; nothing else of this package imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from compressed_tensors.offload import update_offload_parameter
from pydantic import Field, PrivateAttr, create_model, field_serializer, model_validator
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.writer import check_layers
from armor_recipes.compute import plain_torch
from armor_recipes.errors import ArmorError, NumericalError, PlanError
from armor_recipes.integrations.oneshot.cores import attach, check_plain, check_unquantized, is_core
from armor_recipes.integrations.oneshot.order import check_alone, check_order
from armor_recipes.integrations.oneshot.saving import guard
from armor_recipes.model.blocks import find_stacks
from armor_recipes.modifiers import modifiers
from armor_recipes.modifiers.base import ModuleShape, SolveProgress, Statistic
from armor_recipes.modifiers.kinds.module import Modifier, Outcome
from armor_recipes.modifiers.kinds.pool import in_order
from armor_recipes.plan.targets import Tree, resolve_targets

try:
    from llmcompressor.core import Event, State, active_session
    from llmcompressor.modifiers import Modifier as TheirModifier
    from llmcompressor.modifiers.factory import ModifierFactory
    from loguru import logger
except ImportError as error:
    raise ArmorError(
        f"armor_recipes.integrations.llmcompressor needs llm-compressor, which cannot be imported ({error}): "
        "install 'armor-recipes[llmcompressor]'"
    ) from error

#: Fields of ours that a pipeline of llm-compressor answers by itself, or has no place for.
_NOT_THERE = {
    "propagate": "the pipeline decides it (`sequential`: as compressed so far, `basic`: the model as it was)",
    "calibration": "it is `oneshot`'s own: dataset, num_calibration_samples, max_seq_length",
    "gradient_power": "llm-compressor's pipelines have no backward pass: run the recipe with armor-apply",
    "share_input_factor": "llm-compressor's pipelines do not tell who reads the same input: run the recipe with armor-apply",
    "optional": "a target that matches nothing is an error here",
    "unfit": "name the modules in `ignore`",
}


class OneshotModifier(TheirModifier):  # type: ignore[misc]
    """One of our modifiers of linear modules in llm-compressor's pipeline. `method` is ours; each field is one of its own."""

    method: ClassVar[type[Modifier[Any]]]

    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    requires_calibration_data: bool = True

    _ours: Any = PrivateAttr(default=None)
    _shapes: dict[str, ModuleShape] = PrivateAttr(default_factory=dict)
    _modules: dict[str, nn.Linear] = PrivateAttr(default_factory=dict)
    _statistics: dict[str, Statistic] = PrivateAttr(default_factory=dict)
    _losses: dict[str, float] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_fields_that_are_not_there(cls, given: Any) -> Any:
        """Say why a field of ours is none here, and read a single target as a list."""
        for key in _NOT_THERE.keys() & set(given):
            raise ValueError(f"{cls.__name__} has no {key} in llm-compressor: {_NOT_THERE[key]}")
        lists = {key: [given[key]] for key in ("targets", "ignore") if isinstance(given.get(key), str)}
        return {**given, **lists}

    @model_validator(mode="after")
    def _make_ours(self) -> OneshotModifier:
        config = self.method.config_type
        fields = {key: getattr(self, key) for key in config.model_fields if key not in _NOT_THERE}
        self._ours = self.method(config.model_validate({**fields, "targets": self.targets, "ignore": self.ignore}))
        return self

    @field_serializer("*", when_used="always")
    def _without_tuples(self, value: Any) -> Any:
        """Lists for tuples, which llm-compressor would write into recipe.yaml under a tag that it does not read again."""
        return list(value) if isinstance(value, tuple) else value

    def on_initialize(self, state: State, **_: Any) -> bool:
        """Resolve the targets, and check modules, sizes and the recipe's order; nothing is changed. Raises PlanError."""
        model = state.model
        names = resolve_targets(Tree(tuple(model.named_modules()), find_stacks(model)), self._ours.config).names
        self._modules = {name: model.get_submodule(name) for name in names}
        for name, module in self._modules.items():
            check_plain(name, module)
            check_unquantized(name, module)
        self._shapes = {name: self._planned(name, module) for name, module in self._modules.items()}
        check_layers(model, self._modules)
        _check_structure(model, self._modules)
        for warning in check_order(self, active_session().lifecycle.recipe.modifiers, self._modules, model):
            logger.warning(warning)
        return True

    def on_calibration_start(self, state: State, event: Event, **_: Any) -> None:  # noqa: ARG002 - their signature
        """Let each module feed its statistic."""
        check_alone(self, active_session().lifecycle.recipe.modifiers)
        if not self.requires_calibration_data:
            return
        _refuse_padding(state)
        for name, module in self._modules.items():
            check_plain(name, module)
            self._statistics[name] = self._ours.statistic(self._shapes[name])
            self.register_hook(module, partial(_observe, self._statistics[name]), "forward_pre")

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,  # noqa: ARG002 - their signature
        modules: Sequence[nn.Module],
        **_: Any,
    ) -> None:
        """Solve those of these modules that are not solved yet."""
        here = {id(module) for module in modules}
        self._solve([n for n, m in self._modules.items() if id(m) in here and n not in self._losses], state.model)

    def on_calibration_end(self, state: State, event: Event, **_: Any) -> None:  # noqa: ARG002 - their signature
        """Solve what is left, and take the hooks away."""
        self._solve([name for name in self._modules if name not in self._losses], state.model)
        self.remove_hooks()
        self._statistics.clear()

    @property
    def losses(self) -> Mapping[str, float]:
        """The relative loss at which each module ended, by full name."""
        return dict(self._losses)

    def _planned(self, name: str, module: nn.Linear) -> ModuleShape:
        shape = ModuleShape(name, module.out_features, module.in_features, module.weight.itemsize)
        planned = self._ours.plan(shape)
        return ModuleShape(name, shape.d_out, shape.d_in, shape.itemsize, (), planned.block_size)

    @plain_torch()
    def _solve(self, names: Sequence[str], model: Any) -> None:
        if not names:
            return
        device = self._modules[names[0]].weight.device
        with torch.no_grad():
            for name, outcome in zip(names, in_order([partial(self._solved, n) for n in names], device), strict=True):
                self._write(name, outcome)
        if any(is_core(self._modules[name]) for name in names):
            guard(model)
        mean = sum(self._losses[name] for name in names) / len(names)
        logger.info(f"{type(self).__name__}: {len(names)} modules, relative loss {mean:.5f} on average")

    def _solved(self, name: str, stoppable: Callable[[SolveProgress], SolveProgress]) -> Outcome:
        weight = self._modules[name].weight.detach().float()
        statistic = self._statistics.get(name)
        found: Outcome = self._ours.solve(self._shapes[name], weight, statistic, stoppable(lambda *_: None))
        return found

    def _write(self, name: str, outcome: Outcome) -> None:
        """Put an outcome in its module's place, rounded as it is stored. Raises NumericalError where it does not fit the dtype."""
        module = self._modules[name]
        weight, found = outcome.weight, outcome.factorization
        if found is not None:
            weight = attach(module, PackedLinear.from_factorization(found, module.weight.dtype))
        rounded = weight.to(module.weight.dtype)
        if not bool(rounded.isfinite().all()):
            raise NumericalError(f"{name}: numbers do not fit {module.weight.dtype}: give the model a wider dtype")
        update_offload_parameter(module, "weight", rounded)
        self._losses[name] = outcome.losses[-1]
        self._statistics.pop(name, None)


def register() -> dict[str, type[OneshotModifier]]:
    """Register with llm-compressor's factory each of our modifiers of linear modules that is none of its own names."""
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    found = {name: _adapted(name, method) for name, method in modifiers().items() if _is_for_oneshot(method, name)}
    for name, adapted in found.items():
        ModifierFactory.register(name, adapted)
    return found


def _is_for_oneshot(method: type[Any], name: str) -> TypeGuard[type[Modifier[Any]]]:
    own: type[Any] = Modifier
    return method.kind is own.kind and method.category == "prune" and name not in ModifierFactory._main_registry


def _adapted(name: str, method: type[Modifier[Any]]) -> type[OneshotModifier]:
    config = method.config_type
    fields: dict[str, Any] = {
        key: (field.annotation, field)
        for key, field in config.model_fields.items()
        if key not in _NOT_THERE and key not in OneshotModifier.model_fields
    }
    made = create_model(
        name,
        __base__=OneshotModifier,
        __module__=__name__,
        __doc__=method.__doc__,
        requires_calibration_data=(bool, config.needs_calibration),
        **fields,
    )
    made.method = method
    return made


def _observe(statistic: Statistic, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    statistic.update(args[0])


def _refuse_padding(state: State) -> None:
    """Rows of padding are no tokens, and a hook on a linear layer cannot tell them apart."""
    with torch.random.fork_rng(devices=[]):  # a loader draws its order; that of the run is to stay
        for batch in state.data.calib or ():
            mask = batch.get("attention_mask")
            if mask is not None and not bool(mask.all()):
                raise PlanError(
                    "the calibration batches are padded, and padding would count as tokens: give `oneshot` batch_size=1, or "
                    'data_collator="truncation" without pad_to_max_length'
                )


def _check_structure(model: Any, taken: Mapping[str, nn.Linear]) -> None:
    """Raise PlanError where llm-compressor has changed the structure, so that a loader would not find these modules."""
    with torch.device("meta"):
        stock = type(model)(model.config)
    known = {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)}
    strange = sorted(taken.keys() - known)
    if strange:
        raise PlanError(
            f"{strange[0]} and {len(strange) - 1} more are linear layers in llm-compressor's pipeline alone (it takes fused "
            "experts apart), and a loader would not find them: add them to `ignore`, or run the recipe with armor-apply"
        )


registered = register()
"""Our modifiers as llm-compressor takes them, by name, which are names of this module. Its own names stay its own."""
globals().update(registered)
