"""`ArmorLinear`: a linear layer whose parameters are the packed tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.config import INPUT_FACTOR, SCALE, LayerSpec, PackedShapes, named_tensors, tensor_names
from armor_recipes.checkpoint.packing import QUANTIZED_DTYPES, FactorizationLike, PackedLinear
from armor_recipes.compute import plain_torch
from armor_recipes.errors import CheckpointError, PlanError
from armor_recipes.runtime.backends import choose_backend, environment, wants_gradients
from armor_recipes.runtime.state import TensorState


class ArmorLinear(nn.Linear):
    """`y = A (S (B x)) + bias` for x `(..., I)`, computed by a backend of `armor_recipes.runtime.backends`.

    Parameters: `weight` (packed values `(O, I/2)`; int4 `(O, I/16)`), `bitmask`, `armor_a`, `armor_b`, `bias`, and where the core
    is quantised `weight_scale`; so `state_dict` is the
    checkpoint, whatever the backend keeps beside it. What the backend prepares (the folded weight, say) is no
    parameter: it is made at the first forward pass, and again after the parameters were moved, cast, replaced or
    changed in place. In training mode it is made in every pass, inside autograd, if a parameter of the layer is trained.

    A layer that shares its B with another has no `armor_b`: it uses the other's, whatever that is at the moment, see
    `share_input_factor`.

    Made from an `nn.Linear` in place (`adopt`), so that names, hooks and bias stay as they were.
    """

    bitmask: nn.Parameter
    armor_a: nn.Parameter
    armor_b: nn.Parameter
    backend: str | None
    """Name of the backend; None asks the environment variable ARMOR_BACKEND, then takes `auto`."""
    label: str
    """The module's full name where known, for error messages."""
    activations: str | None
    """What Bx is rounded to in each pass, with one scale a token: `int8`, `fp8`, or None for nothing."""
    _loaded: bool
    _owner: ArmorLinear | None
    _sharers: list[ArmorLinear]
    _tied_to: ArmorLinear | None
    _prepared: tuple[tuple[str, object], Any] | None
    _call: _Call | None

    @classmethod
    def adopt(cls, linear: nn.Linear, spec: LayerSpec) -> ArmorLinear:
        """Turn `linear` into an `ArmorLinear` in place, with empty packed tensors (on the same device, meta as a rule).

        Raises:
            CheckpointError: if the sizes do not divide the weight, or its columns are no multiple of 8 (16 for int4).
        """
        shapes = PackedShapes.of((linear.out_features, linear.in_features), spec)
        weight = linear.weight.detach()
        stored = {core: dtype for dtype, core in QUANTIZED_DTYPES.items()}
        empty = PackedLinear(
            weight.new_empty(shapes.values, dtype=stored.get(spec.core, weight.dtype)),
            weight.new_empty(shapes.bitmask, dtype=torch.uint8),
            weight.new_empty(shapes.a),
            weight.new_empty(shapes.b),
            None if shapes.scale is None else weight.new_empty(shapes.scale),
            spec.activations,
        )
        layer = cls.from_packed(linear, empty)
        layer._loaded = False
        return layer

    @classmethod
    def from_packed(cls, linear: nn.Linear, packed: PackedLinear) -> ArmorLinear:
        """Turn `linear` into an `ArmorLinear` in place that holds `packed`; the bias stays."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        for name, tensor in named_tensors(packed).items():
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
        linear.backend, linear.label, linear._loaded, linear._prepared = None, "", True, None
        linear._owner, linear._sharers, linear._tied_to, linear._call = None, [], None, None
        linear.activations = packed.activations
        return linear

    def share_input_factor(self, owner: ArmorLinear) -> None:
        """Use the B of `owner` from now on; this layer's own `armor_b` goes. Again with the same owner does nothing.

        Raises:
            CheckpointError: if `owner` is this layer or a sharer itself, this layer shares or is shared already, or the two B
                differ in shape.
        """
        if self._owner is owner:
            return
        if owner is self or owner._owner is not None or self._owner is not None or self._sharers:
            raise CheckpointError(f"{self._name()} cannot use the B of {owner._name()}: one of them is sharing already")
        if owner.armor_b.shape != self.armor_b.shape:
            raise CheckpointError(
                f"{self._name()} cannot use the B of {owner._name()}, {tuple(owner.armor_b.shape)}: it needs "
                f"{tuple(self.armor_b.shape)}"
            )
        del self.armor_b
        self._join(owner)

    def tie(self, other: ArmorLinear) -> None:
        """Run from what `other` prepares, as long as the parameters of both are the same ones."""
        if other is not self:
            self.__dict__["_tied_to"] = other  # not by setattr, which would make it a submodule of this layer

    @property
    def tied_to(self) -> ArmorLinear | None:
        """The layer whose parameters this one has; None where it has its own."""
        other = self._tied_to
        if not isinstance(other, ArmorLinear):
            return None
        theirs = other._stored()
        return other if all(theirs.get(name) is tensor for name, tensor in self._stored().items()) else None

    def _join(self, owner: ArmorLinear) -> None:
        self.__dict__["_owner"] = owner  # not by setattr, which would make the owner a submodule of this layer
        owner._sharers.append(self)

    def _leave(self) -> None:
        """Take a B of one's own: the owner is about to lose its."""
        b = self.packed().b
        self._owner = None
        self.armor_b = nn.Parameter(b.detach(), requires_grad=False)

    @classmethod
    def from_factorization(
        cls,
        factorization: FactorizationLike,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
    ) -> ArmorLinear:
        """Make a layer from a solver's result: A `(J, b_o, b_o)`, S and mask `(O, I)`, B `(K, b_i, b_i)`.

        Args:
            factorization: what `armor_recipes.solver.factorize` returns, or anything with `a`, `core`, `mask`, `b`.
            bias: `(O,)` or None.
            dtype: to store and compute in: bfloat16, float16 or float32.
            backend: a name of `armor_recipes.runtime.backends.BACKENDS`; None asks ARMOR_BACKEND, then takes the default.

        Raises:
            CheckpointError: if a value overflows `dtype`, or the mask is not 2:4.
            RecipeError: if the backend is unknown.
        """
        name = None if backend is None else choose_backend(backend).name
        packed = PackedLinear.from_factorization(factorization, dtype)
        rows, columns = packed.shape
        linear = nn.Linear(columns, rows, bias=bias is not None, dtype=dtype, device="meta")
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(packed.values.device, dtype), requires_grad=False)
        layer = cls.from_packed(linear, packed)
        layer.backend = name
        return layer

    def to_dense(self) -> nn.Linear:
        """Turn this layer in place into a plain `nn.Linear` that holds the folded weight; the packed tensors go."""
        packed = self.packed()
        weight = packed.fold(packed.dtype, name=self._name())
        for sharer in self._sharers:
            sharer._leave()
        if self._owner is not None:
            self._owner._sharers.remove(self)
        for name in tensor_names(packed.core):
            if name != INPUT_FACTOR or self._owner is None:
                delattr(self, name)
        for name in (
            "backend",
            "label",
            "activations",
            "_loaded",
            "_prepared",
            "_owner",
            "_sharers",
            "_tied_to",
            "_call",
        ):
            del self.__dict__[name]
        dense: nn.Linear = self
        dense.__class__ = nn.Linear
        dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
        return dense

    def packed(self) -> PackedLinear:
        """Return the packed tensors, as they are now (not copied)."""
        b = self._stored()[INPUT_FACTOR]
        if b.is_meta and not self.armor_a.is_meta:
            raise PlanError(
                f"{self._name()} uses the B of another layer, which is offloaded: load the model without offloading, or let its "
                "modules have a B each"
            )
        # The same tensor, unless this layer was moved or cast without the one that it shares with.
        b = b.to(self.armor_a.device, self.armor_a.dtype)
        return PackedLinear(self.weight, self.bitmask, self.armor_a, b, self._parameters.get(SCALE), self.activations)

    def _stored(self) -> dict[str, Tensor]:
        """The parameters that this layer runs from, by name; B may be another layer's."""
        b = self.armor_b if self._owner is None else self._owner.armor_b
        return named_tensors(PackedLinear(self.weight, self.bitmask, self.armor_a, b, self._parameters.get(SCALE)))

    def prepare(self) -> None:
        """Do now what the first forward pass would do: check the tensors and let the backend prepare what it runs from.

        Raises:
            CheckpointError: if a tensor was not in the checkpoint, or breaks the format.
        """
        self._check_loaded()
        self._cached()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Compute `(..., O)` from `input` `(..., I)`."""
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        if plain and self._call is not None and self._call.still_right(self):
            return self._call.run(input)
        self._call = None
        self._check_loaded()
        backend = choose_backend(self.backend)
        packed = self.packed()
        if torch.compiler.is_compiling():
            # Whether a parameter was changed in place since it was prepared is nothing that a graph can ask.
            last = self._prepared[1] if self._prepared is not None and self._prepared[0][0] == backend.name else None
            if backend.traced(packed, last):
                return backend.run(input, last, packed, self.bias)
        training = self.training and torch.is_grad_enabled() and wants_gradients(packed)
        prepared = backend.prepare(packed, self._name()) if training else self._cached()
        if plain and not training and (run := backend.call(prepared, packed, self.bias)) is not None:
            self._call = _Call.of(self, run)
        return backend.run(input, prepared, packed, self.bias)

    def extra_repr(self) -> str:
        """Tell shape, block size and backend, for `print(model)`."""
        block_size = self.packed().block_size
        return f"{super().extra_repr()}, {block_size=}, backend={choose_backend(self.backend).name}"

    @torch.no_grad()
    def _cached(self) -> Any:
        backend, holder = choose_backend(self.backend), self.tied_to or self
        key = backend.name, tuple(TensorState(tensor) for tensor in self._stored().values())
        if holder._prepared is None or holder._prepared[0] != key:
            holder._prepared = None  # the old one is freed before the new one is made
            # What inference mode makes could not be used in a later backward pass, nor what autocast rounds.
            with plain_torch(), torch.no_grad():
                holder._prepared = key, backend.prepare(self.packed(), self._name())
        return holder._prepared[1]

    def _check_loaded(self) -> None:
        """Refuse a layer that transformers filled in part: of tensors that it does not find it only logs the names.

        It marks what it loaded; where some are marked and some are not, the others hold whatever was in memory.
        """
        if self._loaded:
            return
        marks = {name: hasattr(tensor, "_is_hf_initialized") for name, tensor in self._stored().items()}
        missing = [name for name, mark in marks.items() if not mark]
        if missing and any(marks.values()):
            raise CheckpointError(
                f"{self._name()}: the checkpoint holds no {', '.join(missing)} for this layer: it is damaged"
            )
        self._loaded = True

    def _name(self) -> str:
        return self.label or f"an ARMOR layer of shape ({self.out_features}, {self.in_features})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .half(), .cuda(): the prepared tensor follows from the packed ones, so it is made again, not moved.
        self._prepared = self._call = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what can be prepared again, and sharers, which a copy of one may go without."""
        return {**self.__dict__, "_prepared": None, "_call": None, "_sharers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A sharer's copy shares with the copy of its owner."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._owner is not None:
            self._owner._sharers.append(self)


def set_backend(model: nn.Module, name: str | None) -> int:
    """Let every ARMOR layer of a model run on the backend `name`, from the next forward pass on; returns their number.

    None asks the environment variable ARMOR_BACKEND, then takes the default. Raises `RecipeError` if it is unknown.
    """
    chosen = None if name is None else choose_backend(name).name
    layers = [module for module in model.modules() if isinstance(module, ArmorLinear)]
    for layer in layers:
        layer.backend = chosen
    return len(layers)


@dataclass(frozen=True, slots=True)
class _Call:
    """What computes a layer's y as long as nothing changes that it was made from: the usual way takes longer than a small layer."""

    run: Callable[[Tensor], Tensor]
    backend: str | None
    environment: tuple[str | None, ...]
    parameters: tuple[tuple[dict[str, Tensor | None], str, Tensor | None, TensorState | None], ...]
    """The dict that holds a parameter, its name, itself, and its state."""

    @classmethod
    def of(cls, layer: ArmorLinear, run: Callable[[Tensor], Tensor]) -> _Call:
        held: list[tuple[Any, str]] = [(layer._parameters, name) for name in layer._parameters]
        if layer._owner is not None:
            held.append((layer._owner._parameters, INPUT_FACTOR))
        found = ((place, name, place[name]) for place, name in held)
        return cls(
            run,
            layer.backend,
            environment(),
            tuple(
                (place, name, tensor, None if tensor is None else TensorState(tensor)) for place, name, tensor in found
            ),
        )

    def still_right(self, layer: ArmorLinear) -> bool:
        if layer.backend is not self.backend or environment() != self.environment:
            return False
        for place, name, tensor, state in self.parameters:
            if place[name] is not tensor or (state is not None and not state.holds()):
                return False
        return True
