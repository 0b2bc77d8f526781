"""Plain linear layers that are quantised: schemes, packing and unpacking are compressed-tensors' own, imported when first used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.errors import CheckpointError

WEIGHT_PACKED, WEIGHT_SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
"""Formats of compressed-tensors that plain layers are written in and read from: names of its registry, which runs a file
that a name names, so nothing else of a checkpoint reaches it."""
DENSE = "dense"
"""What `quantization_config` says of itself where it has no group: keys and values alone are quantised."""
MIXED = "mixed-precision"
"""What `quantization_config` says of itself where its groups have several formats."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a layer is quantised to: a config group of compressed-tensors without its targets, as JSON with sorted keys."""

    text: str

    @classmethod
    def of(cls, scheme: Any) -> Scheme:
        """From compressed-tensors' `QuantizationScheme`; a format that it does not name is the one that is inferred for it."""
        from compressed_tensors.compressors.format import infer_module_format

        data = scheme.model_dump(mode="json")
        del data["targets"]
        chosen = scheme.format or infer_module_format(nn.Linear, scheme)
        data["format"] = getattr(chosen, "value", chosen)
        return cls(json.dumps(data, sort_keys=True))

    @property
    def format(self) -> str:
        """The format of its tensors."""
        return str(json.loads(self.text)["format"])

    @property
    def args(self) -> Any:
        """compressed-tensors' `QuantizationScheme`, without targets."""
        return _scheme(self.text)

    def group(self, targets: list[str]) -> dict[str, Any]:
        """The config group."""
        return {**json.loads(self.text), "targets": targets}

    @property
    def described(self) -> str:
        """In words, for people: `int4, groups of 128; inputs int8 by token`."""
        scheme = self.args
        words = [described(scheme.weights)]
        for part, args in (("inputs", scheme.input_activations), ("outputs", scheme.output_activations)):
            words += [] if args is None else [f"{part} {described(args)}"]
        return "; ".join(words)


def described(args: Any) -> str:
    """compressed-tensors' args of one of weights, inputs and outputs in words: `int4, groups of 128`."""
    name = f"{word(args.type)}{args.num_bits}{'' if args.symmetric else ' asymmetric'}"
    if args.strategy in ("group", "tensor_group"):
        return f"{name}, groups of {args.group_size}"
    if args.strategy == "block":
        return f"{name}, blocks of {'x'.join(map(str, args.block_structure))}"
    return f"{name} by {word(args.strategy)}"


def word(of: Any) -> Any:
    """The word for a value of compressed-tensors' enumerations, which its args hold as such or as that word."""
    return getattr(of, "value", of)


@lru_cache(maxsize=256)
def _scheme(text: str) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(**json.loads(text), targets=[])


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLinear:
    """One quantised layer as it is stored: its scheme, and its tensors by their names after the module's, bias aside."""

    scheme: Scheme
    tensors: Mapping[str, Tensor]

    @classmethod
    def compress(cls, scheme: Scheme, state: Mapping[str, Tensor]) -> QuantizedLinear:
        """Pack a weight `(O, I)` with its scales, by the names that compressed-tensors gives them. Raises CheckpointError."""
        try:
            made = _compressor(scheme).compress(dict(state), scheme.args)
        except (NotImplementedError, ValueError, RuntimeError, AssertionError) as error:
            raise CheckpointError(f"compressed-tensors cannot store this as {scheme.format}: {error}") from error
        for name, shape in packed_zero_point(scheme, state["weight"].shape, made).items():
            made[name] = torch.empty(shape, dtype=torch.int32, device="meta")
        return cls(scheme, {name: made[name].detach().contiguous() for name in sorted(made)})

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `(O, I)` that a loader computing in `dtype` makes of the tensors, bit for bit."""
        made = _compressor(self.scheme).decompress(_loaded(self.tensors, dtype), self.scheme.args)
        weight: Tensor = made["weight"]
        return weight.detach().to(dtype)

    def steps(self) -> Tensor:
        """The weight `(O, I)` in steps of its scales, float32: its integers, or 8-bit floats, less zero points."""
        ones = {
            name: torch.ones_like(x, dtype=torch.float32) for name, x in self.tensors.items() if name == "weight_scale"
        }
        made = _compressor(self.scheme).decompress({**self.tensors, **ones}, self.scheme.args)
        weight: Tensor = made["weight"]
        return weight.detach().float()

    def activations(self, dtype: torch.dtype) -> ActivationQuantizer | None:
        """What the loaded layer does to what comes in and goes out; None where it does nothing."""
        scheme = self.scheme.args
        if scheme.input_activations is None and scheme.output_activations is None:
            return None
        return ActivationQuantizer(self.scheme, _loaded(self.tensors, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedCache:
    """Keys and values of one attention module on their way into the cache: how they are quantised, as JSON of compressed-tensors'
    args, and the scales of those that are not dynamic (`k_scale`, `v_scale`, and zero points where they are not symmetric).
    """

    text: str
    tensors: Mapping[str, Tensor]

    @property
    def args(self) -> Any:
        """compressed-tensors' `QuantizationArgs`."""
        return cache_args(self.text)

    def states(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, heads, T, D)`, quantised and dequantised as compressed-tensors does it."""
        from compressed_tensors.quantization import QuantizationStatus
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        tensors = {name: tensor.to(keys.device) for name, tensor in _loaded(self.tensors, keys.dtype).items()}
        layer = SimpleNamespace(quantization_status=QuantizationStatus.DECOMPRESSED, **tensors)
        return forward_quantize(layer, keys, "k", self.args), forward_quantize(layer, values, "v", self.args)


@lru_cache(maxsize=16)
def cache_args(text: str) -> Any:
    """compressed-tensors' args of a cache, from their JSON. Raises ValueError for what it does not read."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**json.loads(text))


def described_cache(text: str) -> str:
    """How keys and values are quantised, for people: `float8 by tensor`."""
    return described(cache_args(text))


def cache_tensors(text: str) -> tuple[str, ...]:
    """The names of the tensors that an attention module has for its cache, after its own."""
    args = cache_args(text)
    parts = () if args.dynamic is True else ("scale",) if args.symmetric else ("scale", "zero_point")
    return tuple(f"{state}_{part}" for state in ("k", "v") for part in parts)


def packed_zero_point(
    scheme: Scheme, shape: Sequence[int], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """The shape of zero points that are on the meta device and not packed, which compressed-tensors (up to 0.20) packs
    on other devices only: by name, nothing where there are none.
    """
    weights, found = scheme.args.weights, tensors.get(ZERO_POINT)
    packs = scheme.format == "pack-quantized" and not weights.symmetric and weights.strategy in ("group", "channel")
    if not packs or found is None or not found.is_meta:
        return {}
    return {ZERO_POINT: (math.ceil(shape[0] * weights.num_bits / 32), found.shape[-1])}


def _compressor(scheme: Scheme) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    if scheme.format not in FORMATS:
        raise CheckpointError(
            f"format {scheme.format!r} is none of those that are read and written: {', '.join(FORMATS)}"
        )
    return BaseCompressor.get_value_from_registry(scheme.format)


def _loaded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as transformers loads them: floats of more than eight bits in the model's dtype, but for global scales."""
    wide = (torch.float16, torch.bfloat16, torch.float32)
    return {
        name: tensor.to(dtype) if tensor.dtype in wide and not name.endswith("global_scale") else tensor
        for name, tensor in tensors.items()
    }


class ActivationQuantizer:
    """Quantises what comes to a linear layer, and what it puts out, as compressed-tensors' own forward pass does.

    A hook of the layer and not a new `forward`, so that copies of the layer run on what they hold themselves.
    """

    def __init__(self, scheme: Scheme, tensors: Mapping[str, Tensor]) -> None:
        from compressed_tensors.quantization import QuantizationStatus

        self.scheme = scheme
        self._layer = SimpleNamespace(quantization_status=QuantizationStatus.DECOMPRESSED, **tensors)

    @property
    def hooks(self) -> tuple[Any, Any]:
        """A hook before the layer's forward pass and one after it, None where nothing is done."""
        args = self.scheme.args
        return (
            None if args.input_activations is None else self.inputs,
            None if args.output_activations is None else self.outputs,
        )

    def inputs(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The first argument, quantised and dequantised."""
        return (self._quantized(args[0], "input", self.scheme.args.input_activations), *args[1:])

    def outputs(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output, quantised and dequantised."""
        return self._quantized(output, "output", self.scheme.args.output_activations)

    def _quantized(self, value: Tensor, part: str, args: Any) -> Tensor:
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        found: Tensor = forward_quantize(self._layer, value, part, args)
        return found
