"""Statistics that are written, read again, and merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from armor_recipes.calibration import InputGram, InputSecondMoment, SplitGram, StatisticState
from armor_recipes.calibration.statistics import CrossGram
from armor_recipes.modifiers import Statistic
from armor_recipes.modifiers.base import WithGradients

WIDTH, ORIGINS = 5, (2, 0, 0, 1, 2, 7, 1)


def split() -> SplitGram:
    return SplitGram("m", WIDTH)


def mixed() -> SplitGram:
    found = SplitGram("m", WIDTH)
    found.expect(ORIGINS)
    return found


def weighed() -> WithGradients:
    return WithGradients(InputSecondMoment("m", WIDTH), torch.tensor([0.5, 0.25]))


KINDS: dict[str, Callable[[], Any]] = {
    "moment": lambda: InputSecondMoment("m", WIDTH),
    "gram": lambda: InputGram("m", WIDTH),
    "split": split,
    "mixed": mixed,
    "weighed": weighed,
}
kinds = st.sampled_from(sorted(KINDS))


def windows(seed: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 1, 7, WIDTH, generator=torch.Generator().manual_seed(seed)) + 1)


def begin(kind: str, first: int = 0) -> Any:
    """An empty statistic that takes the windows from number `first` on."""
    found = KINDS[kind]()
    if isinstance(found, SplitGram):
        found.expect(ORIGINS if kind == "mixed" else (), first=first)
    return found


def feed(statistic: Any, batches: Iterable[Tensor]) -> Any:
    for batch in batches:
        if isinstance(statistic, SplitGram):
            statistic.update(batch, 2 * batch + 1)
        else:
            statistic.update(batch)
    return statistic


def assert_same(one: StatisticState, other: StatisticState, *, rtol: float = 0, atol: float = 0) -> None:
    assert (one.kind, one.module) == (other.kind, other.module)
    assert json.dumps(dict(one.numbers)) == json.dumps(dict(other.numbers))
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=rtol, atol=atol)


def through_files(state: StatisticState, folder: Path) -> StatisticState:
    save_file(dict(state.tensors), folder / "state.safetensors")
    text = json.dumps({"kind": state.kind, "module": state.module, "numbers": dict(state.numbers)})
    return StatisticState(**json.loads(text), tensors=load_file(folder / "state.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [0, 1, 6])
def test_what_was_read_again_goes_on_bit_for_bit(kind: str, seen: int, tmp_path: Path) -> None:
    stream = windows(0, 9)
    whole = feed(begin(kind), stream[:seen])
    read = KINDS[kind]()
    read.load_state(through_files(whole.state(), tmp_path))
    assert read.tokens == whole.tokens == 7 * seen
    assert_same(read.state(), whole.state())
    feed(whole, stream[seen:])
    feed(read, stream[seen:])
    assert_same(read.state(), whole.state())
    if isinstance(whole, SplitGram):
        for ours, theirs in zip(read.splits(), whole.splits(), strict=True):
            assert all(map(torch.equal, ours, theirs))
        moments = read.finish(), whole.finish()
        for name in ("gram", "cross", "dense"):
            assert torch.equal(*(getattr(found, name) for found in moments))


@given(kinds, st.integers(0, 2**31), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_merged_pieces_are_the_stream(kind: str, seed: int, sizes: Sequence[int]) -> None:
    """Up to the rounding of float64; and the same pieces give the same bits."""
    stream = windows(seed, sum(sizes))
    merged = []
    for _ in range(2):
        found, first = begin(kind), 0
        for size in sizes:
            found.merge(feed(begin(kind, first), stream[first : first + size]))
            first += size
        merged.append(found.state())
    assert_same(merged[0], merged[1])
    assert_same(merged[0], feed(begin(kind), stream).state(), rtol=1e-14, atol=1e-13)


@given(kinds, st.integers(0, 2**31), st.integers(0, 8))
def test_merged_one_by_one_they_have_the_bits_of_the_stream(kind: str, seed: int, count: int) -> None:
    stream = windows(seed, count)
    found = begin(kind)
    for first, batch in enumerate(stream):
        found.merge(feed(begin(kind, first), [batch]))
    assert_same(found.state(), feed(begin(kind), stream).state())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_or_loaded_is_copied(kind: str) -> None:
    stream = windows(3, 4)
    part = feed(begin(kind), stream[:2])
    merged, loaded = begin(kind), begin(kind)
    merged.merge(part)
    loaded.load_state(part.state())
    feed(part, stream[2:])
    for found in (merged, loaded):
        assert_same(found.state(), feed(begin(kind), stream[:2]).state())


def test_without_a_part_is_what_the_others_have_seen() -> None:
    stream = windows(4, 4)
    whole, part = (feed(InputGram("m", WIDTH), batches) for batches in (stream[:3], stream[3:]))
    whole.merge(part)
    left = whole.without(part)
    assert left.tokens == 21
    sums = {name: found.state().tensors["sum"] for name, found in (("whole", whole), ("part", part), ("left", left))}
    assert torch.equal(sums["left"], sums["whole"] - sums["part"])


OTHERS: list[tuple[Any, Any, str]] = [
    (InputGram("m", 4), InputSecondMoment("m", 4), "InputGram of m, 4 .* InputSecondMoment of m, 4"),
    (InputGram("m", 4), InputGram("n", 4), "InputGram of m, 4 channels wide and InputGram of n"),
    (InputSecondMoment("m", 4), InputSecondMoment("m", 5), "4 channels wide .* 5 channels wide"),
    (CrossGram("m", 4), CrossGram("m", 5), "8 channels wide .* 10 channels wide"),
    (SplitGram("m", 4), SplitGram("m", 5), "SplitGram .* 4 channels wide .* 5 channels wide"),
]


@pytest.mark.parametrize(("one", "other", "message"), OTHERS)
def test_statistics_of_other_inputs_are_refused(one: Statistic, other: Any, message: str) -> None:
    for refused in (lambda: one.merge(other), lambda: one.load_state(other.state())):
        with pytest.raises(ValueError, match=message):
            refused()


def test_other_windows_and_gradients_are_refused() -> None:
    unlike = WithGradients(InputSecondMoment("m", WIDTH), torch.tensor([0.5, 0.0]))
    other = SplitGram("m", WIDTH)
    other.expect((0, 1))
    for one, two, message in (
        (mixed(), other, "windows of other datasets"),
        (weighed(), unlike, "gradients .* differ"),
    ):
        for refused in (lambda one=one, two=two: one.merge(two), lambda one=one, two=two: one.load_state(two.state())):
            with pytest.raises(ValueError, match=message):
                refused()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_loaded_into_an_empty_statistic(kind: str) -> None:
    used = feed(begin(kind), windows(5, 2))
    with pytest.raises(ValueError, match="has seen 14 tokens: load into a new one"):
        used.load_state(feed(begin(kind), windows(6, 1)).state())


def test_a_state_that_was_changed_is_refused() -> None:
    state = feed(InputGram("m", WIDTH), windows(7, 1)).state()
    for changed, message in (
        (StatisticState(state.kind, "m", state.numbers, {"sum": torch.zeros(WIDTH)}), "torch.float32 .* not float64"),
        (StatisticState(state.kind, "m", {"d_in": WIDTH}, {}), "InputGram of m has no number 'tokens'"),
        (StatisticState("SplitGram", "m", {"d_in": WIDTH}, {}), "SplitGram of m has no list 'origins'"),
    ):
        kind = SplitGram if changed.kind == "SplitGram" else InputGram
        with pytest.raises(ValueError, match=message):
            kind("m", WIDTH).load_state(changed)
