"""Samples to calibrate on, chosen by a seed and hashed. `docs/calibration.md` states the rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from armor_recipes.calibration.inputs import (
    TOKENS,
    Batch,
    Form,
    InputSet,
    ModelInputs,
    Source,
    batched,
    form_of,
    hash_groups,
    places_by_form,
    stacked,
)
from armor_recipes.calibration.pools import Drawn, Part, Pool, Rule, Tools, open_pool, tensors_path
from armor_recipes.calibration.text import RANDOM_INPUTS
from armor_recipes.calibration.windows import window_ends
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import InputsSpec, Strict, datasets_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_tokens(spec: InputsSpec, *, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> InputSet:
    """Choose calibration samples for a language model of which nothing is known but `vocab_size`, rows of its embedding.

    Else as `build_inputs`.
    """
    return build_inputs(spec, ModelInputs(vocab_size=vocab_size), tokenizer=tokenizer)


def has_length(spec: Strict) -> bool:
    """Whether `sequence_length` says how long the texts of some dataset become; files of tensors have lengths of their own."""
    if not isinstance(spec, InputsSpec):
        images = getattr(spec, "image_column", None) is not None
        return not images and any(tensors_path(dataset) is None for dataset in datasets_of(spec))
    try:
        return any(part.has_text or part.reads_text_beside or part.dataset == RANDOM_INPUTS for part in _parts(spec))
    except InputError:
        return True  # which reading it tells


def build_inputs(
    spec: InputsSpec,
    inputs: ModelInputs,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Callable[[bool], Any] | None = None,
) -> InputSet:
    """Choose calibration samples. The same spec, data, model and tokenizer give the same ones; no global RNG is used.

    Args:
        spec: the `calibration` section, complete.
        inputs: what the model can be called with.
        tokenizer: the model's; None will do where there is no text.
        processor: gives the model's processor for images, alone (False) or with text (True); asked for where there are images.

    Raises:
        InputError: a dataset cannot be read or is too short, or does not fit the model or the other datasets.

    """
    parts = _parts(spec)
    tools = Tools(tokenizer, processor)
    rule = _rule(spec, parts, inputs, tokenizer)
    asked = spec.samples if isinstance(spec.samples, int) else spec.samples.at_most
    weights = [part.weight for part in parts]
    needed = most_of(weights, asked)
    pools = [open_pool(part, tools, rule, most) for part, most in zip(parts, needed, strict=True)]
    total = asked if isinstance(spec.samples, int) else _fitting(weights, asked, pools)
    counts = shares(weights, total)
    for pool, count in zip(pools, counts, strict=True):
        _check_count(pool, count, total)
    generator = torch.Generator().manual_seed(spec.seed)
    taken = [pool.draw(count, generator) for pool, count in zip(pools, counts, strict=True)]
    _check_alike(pools, taken)
    order = torch.randperm(total, generator=generator) if len(pools) > 1 else torch.arange(total)
    groups, order = _grouped([batch for each in taken for batch in each.batches], order)
    origins = torch.arange(len(pools)).repeat_interleave(torch.tensor(counts))[order]
    sources = tuple(starmap(_source, zip(pools, taken, strict=True)))
    has_text = any(pool.is_text for pool in pools)
    end = tokenizer.eos_token_id if tokenizer is not None and has_text else None
    return InputSet(
        groups[0],
        hash_groups(groups),
        asked,
        sources,
        tuple(origins.tolist()),
        rule.prefix,
        end,
        rule.suffix,
        groups[1:],
    )


def _grouped(batches: Sequence[Batch], order: Tensor) -> tuple[tuple[Batch, ...], Tensor]:
    """All samples in that order, but where they are of several shapes those of one shape together; and the order then."""
    if len(set(map(form_of, batches))) == 1:
        whole = stacked(batches)
        in_order = bool((order == torch.arange(len(order))).all())
        return (whole if in_order else {name: tensor[order] for name, tensor in whole.items()},), order
    samples = [row for batch in batches for row in batched([batch], 1)]
    samples = [samples[place] for place in order.tolist()]
    places = places_by_form(map(form_of, samples))
    groups = tuple(stacked([samples[place] for place in some]) for some in places)
    return groups, order[[place for some in places for place in some]]


def _rule(
    spec: InputsSpec, parts: Sequence[Part], inputs: ModelInputs, tokenizer: PreTrainedTokenizerBase | None
) -> Rule:
    """How samples are made; what windows begin and end with is asked of the tokenizer only where there are windows."""
    length = spec.sequence_length
    for part in parts:
        _check_columns(part, inputs)
    if not any(part.has_windows for part in parts):
        return Rule(length, (), spec.documents, spec.seed, inputs)
    size = inputs.vocabulary
    prefix, suffix = window_ends(spec.bos, tokenizer, length=length, vocab_size=size, closes=inputs.closes)
    return Rule(length, prefix, spec.documents, spec.seed, inputs, suffix)


def _check_columns(part: Part, inputs: ModelInputs) -> None:
    """Raise InputError where the columns named do not go together or with the model."""
    if (part.source_column is None) != (part.target_column is None):
        given, other = ("source", "target") if part.target_column is None else ("target", "source")
        raise InputError(f"{part.dataset}: `{given}_column` needs a `{other}_column`; name both, or neither")
    if part.image_column is not None and part.source_column is not None:
        raise InputError(f"{part.dataset}: `image_column` and `source_column` do not go together; take one out")
    if part.has_windows and inputs.encoder_decoder:
        raise InputError(
            f"{part.dataset}: {inputs.name} has an encoder and a decoder, and windows of text are for one of them; name rows with "
            "`source_column` and `target_column`, a .safetensors file of inputs, or builtin:random-inputs"
        )


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder; the earlier wins a tie."""
    whole = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * total / whole for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def most_of(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """What the shares of no smaller total exceed: each quota of `total`, rounded up."""
    whole = sum(map(Fraction, weights))
    return tuple(math.ceil(Fraction(weight) * total / whole) for weight in weights)


def _parts(spec: InputsSpec) -> tuple[Part, ...]:
    if isinstance(spec.dataset, str):
        return (
            Part(
                spec.dataset,
                1.0,
                spec.split,
                spec.text_column,
                spec.messages_column,
                spec.stream,
                spec.source_column,
                spec.target_column,
                spec.image_column,
                "text_column" in spec.model_fields_set or spec.messages_column is not None,
            ),
        )
    return tuple(
        Part(
            part.dataset,
            part.weight,
            part.split or spec.split,
            part.text_column or spec.text_column,
            part.messages_column or (None if part.text_column else spec.messages_column),
            spec.stream if part.stream is None else part.stream,
            part.source_column or spec.source_column,
            part.target_column or spec.target_column,
            part.image_column or spec.image_column,
            bool(part.text_column or part.messages_column or spec.messages_column)
            or "text_column" in spec.model_fields_set,
        )
        for part in spec.dataset
    )


def _fitting(weights: Sequence[float], at_most: int, pools: Sequence[Pool]) -> int:
    """Find the largest total up to `at_most` whose shares all exist, so that the mix keeps its proportions."""
    whole = sum(map(Fraction, weights))
    limits = [
        math.ceil((pool.count + 1) * whole / Fraction(weight))  # share ≥ ⌊total·weight/whole⌋
        for weight, pool in zip(weights, pools, strict=True)
        if pool.count is not None
    ]
    for total in range(min([at_most, *limits]), 0, -1):
        counts = shares(weights, total)
        if all(p.count is None or p.count >= c for p, c in zip(pools, counts, strict=True)):
            return total
    return 1


def _check_count(pool: Pool, count: int, total: int) -> None:
    if count == 0:
        raise InputError(
            f"{pool.dataset} gets none of the {total} samples by its weight; "
            "raise `samples` or its `weight`, or take it out of the list"
        )
    if pool.count is None or pool.count >= count:
        return
    raise InputError(
        f"{pool.dataset} has {pool.count} {pool.found}, but {count} are asked for; {pool.advice} "
        f"or fewer `samples`, or write `samples: {{at_most: {total}}}`"
    )


def _check_alike(pools: Sequence[Pool], taken: Sequence[Drawn]) -> None:
    """Raise InputError where the samples of a mix are not the same tensors; images may be of several shapes."""
    forms = [form_of(drawn.batches[0]) for drawn in taken]
    for pool, form in zip(pools, forms, strict=True):
        of_any_shape = pool.of_any_shape and pools[0].of_any_shape
        if form != forms[0] and not (of_any_shape and _kinds(form) == _kinds(forms[0])):
            raise InputError(
                f"the samples of {pool.dataset} ({_described(form)}) are not of the same form as those of {pools[0].dataset} "
                f"({_described(forms[0])}); a mix needs the same tensors, equal in shape and dtype: give each a modifier of its "
                "own, or make them alike"
            )


def _kinds(form: Form) -> list[tuple[str, int, torch.dtype]]:
    """Names, numbers of dimensions and dtypes."""
    return [(name, len(shape), dtype) for name, shape, dtype in form]


def _described(form: Form) -> str:
    return ", ".join(f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}" for name, shape, dtype in form)


def _source(pool: Pool, taken: Drawn) -> Source:
    samples, ids = len(taken), sum(map(_ids_in, taken.batches))
    if pool.count is None:
        return Source(pool.dataset, 0, 0, ids, samples, samples)
    tokens = pool.tokens if pool.is_text else ids
    available = None if pool.stream else pool.count
    return Source(
        pool.dataset, pool.documents, pool.empty, tokens, available, samples, pool.stream, pool.short, taken.cut
    )


def _ids_in(batch: Batch) -> int:
    """Token ids of a batch that no mask leaves out."""
    if TOKENS not in batch:
        return 0
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch[TOKENS].numel()
