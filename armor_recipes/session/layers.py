"""Find the decoder layers on the module tree: no tracing, no list of architectures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from armor_recipes.errors import PlanError


@dataclass(frozen=True, slots=True)
class DecoderLayers:
    """The layers in order, with their full names."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    def layer_of(self, module_name: str) -> int | None:
        """Index of the layer that holds the module, or None where it is outside of all layers."""
        for index, name in enumerate(self.names):
            if module_name.startswith(name + "."):
                return index
        return None


def find_decoder_layers(model: nn.Module) -> DecoderLayers:
    """The one `nn.ModuleList` whose members transformers must not split, or else the largest list of equals.

    Raises PlanError where no list or more than one qualifies (an encoder and a decoder, say).
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    found = [(name, m) for name, m in lists if all(type(layer).__name__ in unsplit for layer in m)]
    if not found:
        found = _largest([(name, m) for name, m in lists if len({type(layer) for layer in m}) == 1])
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise PlanError(
            f"{type(model).__name__}: expected one list of decoder layers on the module tree, found {names}; "
            "only decoder-only language models are supported"
        )
    name, layers = found[0]
    return DecoderLayers(tuple(f"{name}.{i}" for i in range(len(layers))), tuple(layers))


def _largest(lists: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in lists]
    return [entry for entry, size in zip(lists, sizes, strict=True) if size == max(sizes) and size > 0][:1]
