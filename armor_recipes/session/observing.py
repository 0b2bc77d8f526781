"""What a block's modifiers learn of it: streams of activations, statistics of modules' inputs, the block as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from armor_recipes.calibration.inputs import InputSet
from armor_recipes.model.blocks import Stack
from armor_recipes.model.experts import every_expert
from armor_recipes.model.hooks import Hooks, feeding
from armor_recipes.model.replay import Stream, capture_stream
from armor_recipes.modifiers.kinds.contract import BlockContext, Original, Share, Statistics, StreamKey
from armor_recipes.recipe.schema import CalibrationSpec


def open_streams(
    model: nn.Module, stack: Stack, shares: Sequence[Share], tokens: Mapping[CalibrationSpec, InputSet], hooks: Hooks
) -> dict[StreamKey, Stream]:
    """The activations at the door of a stack that the shares ask for, each once."""
    keys = dict.fromkeys(share.stream_key(kind) for share in shares for kind in share.modifier.needs.streams)
    return {
        key: capture_stream(model, stack, tokens[key[0]].tensors, batch_size=key[0].batch_size, hooks=hooks)
        for key in keys
    }


def original_of(block: nn.Module, shares: Sequence[Share], streams: Mapping[StreamKey, Stream]) -> Original | None:
    """The block as it is now, where a modifier compares with it."""
    if not any(share.modifier.needs.dense == "block" for share in shares):
        return None
    dense = {key: list(stream.hidden) for key, stream in streams.items() if key[1] == "dense"}
    return Original(copy.deepcopy(block), dense)


def observe(stream: Stream, shares: Sequence[Share], context: BlockContext, *, advance: bool) -> dict[str, Statistics]:
    """Run the block once with a hook on every module that one of the shares observes; statistics by entry and module.

    With `advance` the stream goes on to the next block.
    """
    every = any(share.every_expert for share in shares)  # those that read one stream share their calibration
    with every_expert(context.module, wanted=every), context.hooks:
        collected = {share.entry.key: _statistics(share, context) for share in shares}
        if advance:
            stream.advance(context.index)
        elif shares:
            stream.observe(context.index)
    return collected


def _statistics(share: Share, context: BlockContext) -> Statistics:
    """A statistic for each module, one for all that read the same input, with the hook that feeds it."""
    found: dict[str, Any] = {}
    statistics = {}
    for shape in (shape for row in share.rows for shape in row.observed):
        reader = context.fed_with(shape.name, share)
        if reader not in found:
            found[reader] = context.statistic(share, shape)
            context.hooks.before(context.model.get_submodule(shape.name), feeding(found[reader], shape.name))
        statistics[shape.name] = found[reader]
    return statistics
