"""A linear layer inside llm-compressor's pipeline after ARMOR: its weight is the core S, and hooks apply B before and A after it.

So modifiers that follow find a linear layer, and quantise S and its input Bx. Nothing of llm-compressor is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import QuantizedLinear, Scheme, word
from armor_recipes.errors import CheckpointError, PlanError, UnfitError
from armor_recipes.integrations.upstream import unwrap_offload_forward
from armor_recipes.modifiers.base import ModuleShape
from armor_recipes.modifiers.quantization.modifier import CoreScheme, core_of
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor
from armor_recipes.solver.quantize import kept
from armor_recipes.solver.result import QuantizedValues, SparseFactors

FACTORS = "armor_factors"
"""The attribute of a core's module that holds its factors. They are no parameters: nothing else is to change or to save them."""


@dataclass(slots=True)
class Factors:
    """A `(J, b_o, b_o)` and B `(K, b_i, b_i)` of a layer, and which entries of its weight are kept, bool `(O, I)`."""

    a: Tensor
    b: Tensor
    mask: Tensor

    def beside(self, x: Tensor) -> Factors:
        """Themselves, moved to the device and dtype of an activation, where they stay."""
        if self.a.device != x.device or self.a.dtype != x.dtype:
            self.a, self.b = self.a.to(x), self.b.to(x)
        return self


class CoreLinear(nn.Linear):
    """`S x` without the bias, which comes after A. A class of its own, because llm-compressor calls the class's `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """Of Bx `(..., I)`; returns `(..., O)`."""
        return functional.linear(x, self.weight)


def attach(linear: nn.Linear, packed: PackedLinear) -> Tensor:
    """Turn a linear layer into a core with its factors; returns S `(O, I)`, which the caller writes into its weight."""
    core, mask = packed.unpack()
    with unwrap_offload_forward(linear):  # which holds on to the class's forward as it finds it
        linear.__class__ = CoreLinear
        if linear.forward.__func__ is nn.Linear.forward:  # type: ignore[attr-defined]
            linear.forward = CoreLinear.forward.__get__(linear)  # type: ignore[method-assign]
    setattr(linear, FACTORS, Factors(packed.a, packed.b, mask))
    linear.register_forward_pre_hook(_apply_b)
    linear.register_forward_hook(_apply_a)
    return core


def is_core(module: nn.Module) -> bool:
    """Whether a module is a core with factors."""
    return isinstance(module, CoreLinear) and hasattr(module, FACTORS)


@torch.no_grad()
def packed_layer(name: str, module: nn.Module) -> PackedLinear:
    """What a checkpoint stores of a core, its scales as it stores them.

    Raises:
        CheckpointError: where the weight has values outside of its mask, or is quantised as the format does not know it.
    """
    factors: Factors = getattr(module, FACTORS)
    weight: Tensor = module.weight.detach()  # type: ignore[operator] # a linear layer's
    mask = factors.mask.to(weight.device)
    _check_mask(name, weight, mask)
    scheme: Any = getattr(module, "quantization_scheme", None)
    quantized = None if scheme is None else _quantized(name, module, weight, mask, scheme)
    core = weight if quantized is None else weight.masked_fill(~mask, 0)
    parts = SparseFactors(factors.a.to(weight), core, mask, factors.b.to(weight), quantized)
    return PackedLinear.from_factors(parts, weight.dtype)


def _check_mask(name: str, weight: Tensor, mask: Tensor) -> None:
    broken = (weight.masked_fill(mask, 0) != 0).unflatten(1, (-1, 4)).any(-1)
    if bool(broken.any()):
        raise CheckpointError(
            f"{name}: a modifier after ARMOR gave values to entries that 2:4 had taken away, in {int(broken.sum())} of "
            f"{broken.numel()} groups ({100 * float(broken.float().mean()):.1f} %): such a weight is no 2:4 core any more; take "
            "that modifier out of the recipe"
        )


def core_scheme(scheme: Any, module: ModuleShape) -> CoreScheme | None:
    """What a scheme of compressed-tensors makes of a module's core; None where it leaves the weight. Raises UnfitError."""
    weights = scheme.weights
    if weights is None and scheme.input_activations is None and scheme.output_activations is None:
        return None
    advice = f"give {module.name} a scheme that a core has, or add it to the quantiser's `ignore`"
    if weights is None or weights.dynamic or weights.actorder is not None:
        raise UnfitError(
            f"the core of {module.name} is stored with its own scales, in the order of its columns", advice
        )
    if word(weights.strategy) == "tensor":  # one scale for all rows, which are stored with a copy of it each
        scheme = scheme.model_copy(update={"weights": weights.model_copy(update={"strategy": "channel"})})
    return core_of(module, scheme)


def _quantized(name: str, module: Any, weight: Tensor, mask: Tensor, scheme: Any) -> QuantizedValues | None:
    try:
        core = core_scheme(scheme, ModuleShape(name, weight.shape[0], weight.shape[1], weight.itemsize))
    except UnfitError as error:
        raise CheckpointError(str(error)) from error
    if core is None:
        return None
    from compressed_tensors.quantization.lifecycle.forward import quantize

    scale = module.weight_scale.detach().to(weight.dtype)
    numbers = quantize(weight, scale, module.weight_zero_point, scheme.weights)
    rows = scale.expand(weight.shape[0], 1) if scale.numel() == 1 else scale
    dtype = torch.float8_e4m3fn if core.core == "fp8" else torch.int8
    return QuantizedValues(kept(numbers.float(), mask).to(dtype), rows.contiguous(), core.num_bits, core.activations)


def plain_layer(name: str, module: nn.Module) -> QuantizedLinear:
    """What a checkpoint stores of a quantised layer that is no core: as compressed-tensors packs it, with the scales that it has.

    Raises:
        CheckpointError: where it has no format for that.
    """
    state = {key: value.detach() for key, value in module.named_parameters(recurse=False) if key != "bias"}
    try:
        return QuantizedLinear.compress(Scheme.of(module.quantization_scheme), state)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def is_quantized_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a scheme, and no core."""
    scheme: Any = getattr(module, "quantization_scheme", None)
    return isinstance(module, nn.Linear) and not is_core(module) and scheme is not None and scheme.weights is not None


def check_plain(name: str, module: nn.Module) -> None:
    """Raise PlanError where a module cannot become a core: it is one, or some other kind of linear layer."""
    if is_core(module):
        raise PlanError(f"{name} has factors already: take it out of one of the two entries")
    if type(module) is not nn.Linear:
        raise PlanError(f"{name} is a {type(module).__name__}, not a plain nn.Linear: add it to `ignore`")


def check_unquantized(name: str, module: nn.Module) -> None:
    """Raise PlanError where a modifier has given a module a scheme already."""
    if getattr(module, "quantization_scheme", None) is not None:
        raise PlanError(
            f"{name} is quantised by an entry before this one, and would get unrounded numbers in the place of quantised ones: "
            "put the entry that quantises after this one"
        )


def _apply_b(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    return apply_input_factor(x, getattr(module, FACTORS).beside(x).b), *args[1:]


def _apply_a(module: nn.Linear, args: tuple[Any, ...], y: Tensor) -> Tensor:  # noqa: ARG001 - torch's signature
    found = apply_output_factor(y, getattr(module, FACTORS).beside(y).a)
    return found if module.bias is None else found + module.bias
