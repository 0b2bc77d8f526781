"""`ChannelPermutationModifier`: reorder hidden channels so that the N:M masks of the module that reads them keep more.

The hidden channels of an MLP have no order of their own, nor have the value channels of an attention head: rows of the
modules that make them and columns of the one that reads them may be permuted together at no cost (Pool & Yu, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.errors import UnfitError
from armor_recipes.modifiers.base import CalibratedConfig, Estimate, ModuleShape
from armor_recipes.modifiers.kinds.rearranger import Chain, Rearrangement, Rearranger
from armor_recipes.modifiers.registry import register
from armor_recipes.recipe.schema import Name
from armor_recipes.solver.patterns import Pattern, parse_pattern
from armor_recipes.solver.permutation import choose_permutation, gather_alike, kept_share, weighted_channels

#: Working copies of an (O, I) float32 matrix, and of the (I, I) table of exchanges, that a choice holds at its peak.
_COPIES, _TABLES = 8, 4
#: What makes the inputs of what, in Llama and its many relatives.
_LLAMA = (("down_proj", ("gate_proj", "up_proj")), ("o_proj", ("v_proj",)))


def _as_pairs(value: object) -> object:
    """A mapping as pairs of tuples, which are hashable; one name stands for a list of one. Everything else untouched."""
    if not isinstance(value, Mapping):
        return value
    return tuple((key, (names,) if isinstance(names, str) else _as_tuple(names)) for key, names in value.items())


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_mapping(pairs: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, list[str]]:
    return {key: list(names) for key, names in pairs}


Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple, json_schema_input_type=tuple[Name, ...])]
Links = Annotated[
    tuple[tuple[Name, Annotated[tuple[Name, ...], Field(min_length=1)]], ...],
    BeforeValidator(_as_pairs, json_schema_input_type=dict[Name, Name | tuple[Name, ...]]),
    PlainSerializer(_as_mapping),
]


class ChannelPermutationConfig(CalibratedConfig):
    """Permute hidden channels before pruning, so that masks keep more. `targets` are the modules that read the channels."""

    producers: Links = Field(
        default=_LLAMA,
        json_schema_extra={"default": {key: list(names) for key, names in _LLAMA}},
        title="Producers",
        description="For the last part of a target's name those of the modules that make its inputs, beside it in the layer. "
        "Where something between them mixes channels the run ends with an error.",
    )
    within_heads: Names = Field(
        default=("o_proj",),
        title="Within heads",
        description="Targets, by the last part of their names, whose channels stay in their attention head. Query heads that "
        "read one key-value head share its order.",
    )
    head_dim: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=None,
        title="Head size",
        description="Channels of an attention head; left out, as the model's config says.",
    )
    block_size: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=0,
        title="Block size",
        description="Columns of a block of B where an ARMORModifier follows: groups of channels that resemble each other come "
        "into one block, where B makes up for more. 0 does not look at blocks.",
    )
    sweeps: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=10,
        title="Sweeps",
        description="Rounds of swaps of channels at most; it ends sooner once a round gains little.",
    )


@register
class ChannelPermutationModifier(Rearranger[ChannelPermutationConfig]):
    """Permutes hidden channels by what NoWag-P's mask of the consumer keeps."""

    config_type = ChannelPermutationConfig

    @property
    def pattern(self) -> Pattern:
        """The sparsity pattern that the masks will have."""
        return parse_pattern(self.config.pattern)

    def producers(self, consumer: str) -> tuple[str, ...]:
        """Full names of the modules that make the consumer's inputs, from the longest name that fits."""
        fitting = [key for key, _ in self.config.producers if _ends_with(consumer, key)]
        if not fitting:
            raise UnfitError(
                f"`producers` does not say what makes the inputs of {consumer}",
                f"give it there as {{{consumer.rsplit('.', 1)[-1]}: [NAME, …]}}, or add {consumer!r} to `ignore`",
            )
        key = max(fitting, key=len)
        return tuple(consumer.removesuffix(key) + name for name in dict(self.config.producers)[key])

    def plan(self, chain: Chain) -> Estimate:
        """Any producers with as many rows as the consumer has columns will do; within heads, with a whole number of heads."""
        width, heads, readers = self._layout(chain)
        group = self.pattern.group
        if width % group:
            raise UnfitError(
                f"{self.pattern} needs a multiple of {group} channels to permute, {chain.consumer.name} has {width}",
                f"add {chain.consumer.name!r} to `ignore`",
            )
        block = self.config.block_size
        if block and (block % group or (width % block and block % width)):
            raise UnfitError(
                f"block_size {block} must be a multiple of {group} that divides, or is a multiple of, the {width} channels of "
                f"{chain.consumer.name}"
            )
        scored = heads * readers * chain.consumer.d_out
        return Estimate(
            stored_bytes=sum(module.dense_bytes for module in (chain.consumer, *chain.producers)),
            flops=2.0 * (1 + self.config.sweeps) * scored * width**2,
            peak_bytes=4 * (_COPIES * chain.consumer.d_out * chain.consumer.d_in + _TABLES * width**2),
        )

    def statistic(self, module: ModuleShape) -> InputSecondMoment:
        """h: the mean of x² over the calibration tokens, `(I,)`."""
        return InputSecondMoment(module.name, module.d_in)

    def rearrange(self, chain: Chain, weight: Tensor, statistic: Any) -> Rearrangement:
        """An order of the channels of each head (of all, where heads do not matter), the same for all its readers."""
        width, heads, readers = self._layout(chain)
        channels = weighted_channels(weight, statistic.value.to(weight.device))
        columns = torch.arange(chain.consumer.d_in, device=weight.device).view(heads, readers, width)
        rows = columns.flatten()[: heads * width].view(heads, width)
        orders = [self._order(channels[:, own].transpose(0, 1).flatten(0, 1)) for own in columns]
        new = torch.cat([own[:, order].flatten() for own, order in zip(columns, orders, strict=True)])
        kept = tuple(kept_share(part, pattern=self.pattern) for part in (channels.square(), channels[:, new].square()))
        return Rearrangement(
            columns=new,
            rows=torch.cat([own[order] for own, order in zip(rows, orders, strict=True)]),
            kept=(kept[0], kept[1]),
        )

    def _order(self, channels: Tensor) -> Tensor:
        """An order of the columns of W̄·√h `(O, I)`."""
        order = choose_permutation(channels.square(), pattern=self.pattern, sweeps=self.config.sweeps)
        block = self.config.block_size
        if not block or block >= len(order):
            return order
        return gather_alike(channels, order, pattern=self.pattern, block=block)

    def _layout(self, chain: Chain) -> tuple[int, int, int]:
        """Channels permuted together, how many such sets there are, and how many times the consumer reads each."""
        consumer, rows = chain.consumer, {producer.d_out for producer in chain.producers}
        shapes = ", ".join(f"{p.name} {p.d_out}x{p.d_in}" for p in (consumer, *chain.producers))
        if len(rows) > 1:
            raise UnfitError(f"the producers differ in their rows: {shapes}", "correct `producers`")
        made = rows.pop()
        if not any(_ends_with(consumer.name, key) for key in self.config.within_heads):
            if made != consumer.d_in:
                raise UnfitError(f"the producers' rows are not the consumer's columns: {shapes}", "correct `producers`")
            return made, 1, 1
        width = self.config.head_dim or chain.head_dim
        if width is None:
            raise UnfitError(f"the model's config tells no head size for {consumer.name}", "set `head_dim`")
        if made % width or consumer.d_in % made:
            raise UnfitError(
                f"heads of {width} channels do not fit {shapes}: the producer's rows must be whole heads, and the consumer's "
                "columns a multiple of them",
                "correct `head_dim` or `producers`",
            )
        return width, made // width, consumer.d_in // made


def _ends_with(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)
