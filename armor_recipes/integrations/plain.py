"""Plain quantised layers of a loaded folder, run on the weights that they stand for, and held as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from armor_recipes.checkpoint.quantized import QuantizedLinear, Scheme, packed_zero_point
from armor_recipes.runtime.linear import ArmorLinear

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


def run_plain(model: Any, dtype: torch.dtype) -> None:
    """Let quantised layers that are no ARMOR layers compute in `dtype`, as compressed-tensors' own forward pass does.

    Its way is to decompress the whole model for good as it is first called. Here tensors stay as stored, so that a model
    that is saved after it has run is the folder that it came from; each weight is made when its layer is first called.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for module in layers:
        module.__class__ = PlainLinear
        module.__dict__.pop("forward", None)  # compressed-tensors'
        module.__dict__[_DENSE] = _Dense(module, dtype)
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
    """A layer's weight in the dtype that it computes in, made on the device of its tensors."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.scheme = Scheme.of(module.quantization_scheme)
        self.dtype = dtype
        self._made: tuple[torch.device, Tensor, Any] | None = None

    def weight(self, module: nn.Module) -> Tensor:
        """The weight."""
        return self._found(module)[1]

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """X Wᵀ + b, with activations quantised as the scheme says."""
        _, weight, quantizer = self._found(module)
        before, after = (None, None) if quantizer is None else quantizer.hooks
        given = x if before is None else before(module, (x,))[0]
        output = linear(given, weight, module._parameters["bias"])
        return output if after is None else after(module, (given,), output)

    def _found(self, module: nn.Module) -> tuple[torch.device, Tensor, Any]:
        tensors = {name: value.detach() for name, value in module.named_parameters(recurse=False) if name != "bias"}
        tensors |= dict(module.named_buffers(recurse=False))
        device = next(iter(tensors.values())).device
        if self._made is None or self._made[0] != device:
            layer = QuantizedLinear(self.scheme, tensors)
            self._made = device, layer.dequantize(self.dtype), layer.activations(self.dtype)
        return self._made
