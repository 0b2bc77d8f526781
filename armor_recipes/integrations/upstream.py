"""What this package uses of compressed-tensors. Some of it is not public, and another version may lack it: then this says so."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from armor_recipes.checkpoint.config import FORMAT
from armor_recipes.errors import ArmorError

VERSIONS = ">=0.17,<0.21"
"""Those that were tried, as in pyproject.toml."""


def other_version(reason: object) -> ArmorError:
    """The error for a compressed-tensors that is not as this package knows it."""
    try:
        found = (
            f"the installed compressed-tensors {version('compressed-tensors')} is none that armor_recipes works with"
        )
    except PackageNotFoundError:
        found = "armor_recipes needs compressed-tensors, which is not installed"
    return ArmorError(f"{found} ({reason}): install 'compressed-tensors{VERSIONS}', or a later armor_recipes")


try:
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.offload.module import unwrap_offload_forward
    from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
    from compressed_tensors.quantization.utils.helpers import is_module_quantized
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer as HfQuantizer

    USED = (
        CompressionFormat(FORMAT),
        ModelCompressor.add_decompress_hook,
        ModelCompressor.compress_model,
        BaseCompressor.register_value,
        BaseCompressor.registered_names,
        BaseCompressor.get_value_from_registry,
        QuantizationStatus.COMPRESSED,
        QuantizationStatus.DECOMPRESSED,
        HfQuantizer._process_model_before_weight_loading,
        HfQuantizer._process_model_after_weight_loading,
        HfQuantizer.update_weight_conversions,
    )
    """What is wrapped or called of these, looked at here so that it is missed here."""
except (ImportError, AttributeError, ValueError) as error:
    raise other_version(f"{type(error).__name__}: {error}") from error


def release(name: str) -> None:
    """Let a name of the compressors' registry be registered again, as far as this version keeps it where others do."""
    from compressed_tensors.registry import registry

    for table in ("_REGISTRY", "_ALIAS_REGISTRY"):
        entries: Any = getattr(registry, table, {})
        entries.get(BaseCompressor, {}).pop(name, None)


__all__ = [
    "BaseCompressor",
    "HfQuantizer",
    "ModelCompressor",
    "QuantizationScheme",
    "QuantizationStatus",
    "is_module_quantized",
    "other_version",
    "release",
    "unwrap_offload_forward",
]
