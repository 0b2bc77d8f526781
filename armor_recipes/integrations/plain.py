"""Plain quantised layers of a loaded folder, run on the weights that they stand for, and held as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from armor_recipes.checkpoint.quantized import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    ActivationQuantizer,
    QuantizedLinear,
    Scheme,
    packed_zero_point,
    word,
)
from armor_recipes.runtime.dense import is_worth, suits_kernel
from armor_recipes.runtime.kernel import run_dense_kernel
from armor_recipes.runtime.linear import ArmorLinear
from armor_recipes.runtime.state import TensorState

_DENSE = "_armor_dequantized"


class PlainLinear(nn.Linear):
    """A quantised linear layer of a loaded folder. Its parameters are the tensors as stored."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # stored under another name, or as integers
        """W `(O, I)` that they stand for, since some architectures read it (T5 the dtype of `wo`): a copy, not to be changed."""
        found: _Dense = self.__dict__[_DENSE]
        return found.weight(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """X Wᵀ + b, with activations quantised as the scheme says."""
        found: _Dense = self.__dict__[_DENSE]
        return found.run(self, input)


def run_plain(model: Any, dtype: torch.dtype, *, kernel: bool = False) -> None:
    """Let quantised layers that are no ARMOR layers compute in `dtype`, as compressed-tensors' own forward pass does.

    Its way is to decompress the whole model for good as it is first called. Here tensors stay as stored, so that a model
    that is saved after it has run is the folder that it came from; each weight is made when it is first needed. With `kernel`
    8-bit integers are multiplied as stored, where they meet a few tokens in bfloat16 on a CPU that `run_dense_kernel` runs on.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for module in layers:
        module.__class__ = PlainLinear
        module.__dict__.pop("forward", None)  # compressed-tensors'
        module.__dict__[_DENSE] = _Dense(module, dtype, kernel=kernel)
    hook = vars(model).pop("ct_decompress_hook", None) if layers else None
    if hook is not None:
        hook.remove()


def dequantized(module: nn.Module) -> Tensor | None:
    """The weight `(O, I)` that a quantised layer stands for; None where the module is none that `run_plain` has taken."""
    found: _Dense | None = module.__dict__.get(_DENSE)
    return None if found is None else found.weight(module)


def forget_dequantized(module: nn.Linear) -> None:
    """Leave a layer that `run_plain` has taken its bias alone, as an `nn.Linear`: no packed tensors, scheme or forward pass."""
    module.__class__ = nn.Linear
    for name in ("forward", _DENSE, "quantization_scheme", "quantization_status"):
        module.__dict__.pop(name, None)
    for name in [*module._parameters, *module._buffers]:
        if name != "bias":
            delattr(module, name)


def lay_out_zero_point(module: Any, shape: tuple[int, int]) -> None:
    """Give packed zero points the shape that they have in files, where compressed-tensors laid out others."""
    if not _is_plain(module) or module.quantization_scheme.weights.symmetric:
        return
    scheme = Scheme.of(module.quantization_scheme)
    for name, packed in packed_zero_point(scheme, shape, module._parameters).items():
        value = torch.empty(packed, dtype=torch.int32, device="meta")
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _is_plain(module: nn.Module) -> bool:
    from armor_recipes.integrations.upstream import is_module_quantized  # it imports what imports this

    return bool(is_module_quantized(module)) and not isinstance(module, ArmorLinear)


class _Dense:
    """A layer's weight in the dtype that it computes in, made on the device of its tensors when it is first needed."""

    def __init__(self, module: Any, dtype: torch.dtype, *, kernel: bool) -> None:
        self.scheme, self.dtype, self.kernel = Scheme.of(module.quantization_scheme), dtype, kernel
        self._made: _Made | None = None

    def weight(self, module: nn.Module) -> Tensor:
        """The weight."""
        made = self._found(module)
        if made.weight is None:
            made.weight = made.layer.dequantize(self.dtype)
        return made.weight

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """X Wᵀ + b, with activations quantised as the scheme says."""
        made, bias = self._found(module), module._parameters["bias"]
        before, after = (None, None) if made.quantizer is None else made.quantizer.hooks
        given = x if before is None else before(module, (x,))[0]
        if made.integers is not None and suits_kernel(given):
            weight, scale = made.integers
            output = run_dense_kernel(given, weight, bias, scale)
        else:
            output = linear(given, self.weight(module), bias)
        return output if after is None else after(module, (given,), output)

    def _found(self, module: nn.Module) -> _Made:
        found = {**module._parameters, **module._buffers}
        held = {name: tensor for name, tensor in found.items() if tensor is not None and name != "bias"}
        states = tuple(TensorState(tensor) for tensor in held.values())
        if self._made is None or self._made.states != states:
            tensors = {name: tensor.detach() for name, tensor in held.items()}
            layer = QuantizedLinear(self.scheme, tensors)
            integers = _integers(layer) if self.kernel and self.dtype == torch.bfloat16 else None
            self._made = _Made(states, layer, layer.activations(self.dtype), integers)
        return self._made


@dataclass(slots=True)
class _Made:
    states: tuple[TensorState, ...]
    """Of the tensors that it was made from."""
    layer: QuantizedLinear
    quantizer: ActivationQuantizer | None
    integers: tuple[Tensor, Tensor] | None
    """Weight and scale for `run_dense_kernel`, where it takes them."""
    weight: Tensor | None = None


def _integers(layer: QuantizedLinear) -> tuple[Tensor, Tensor] | None:
    """Symmetric 8-bit integers in the order of the columns and their scales, as `run_dense_kernel` takes them."""
    args, tensors = layer.scheme.args.weights, layer.tensors
    packed = layer.scheme.format == "pack-quantized"
    weight, scale = tensors.get(WEIGHT_PACKED if packed else "weight"), tensors.get(WEIGHT_SCALE)
    known = word(args.type) == "int" and args.num_bits == 8 and args.symmetric and "weight_g_idx" not in tensors
    if weight is None or scale is None or not known or word(args.strategy) not in ("channel", "group"):
        return None
    columns = 4 * weight.shape[1] if packed else weight.shape[1]
    whole = not packed or columns == int(tensors["weight_shape"][1])  # rows are packed 32 columns at a time
    fits = whole and (scale.shape[1] == 1 or columns % (32 * scale.shape[1]) == 0)
    return (weight, scale) if fits and is_worth(len(weight) * columns) else None
