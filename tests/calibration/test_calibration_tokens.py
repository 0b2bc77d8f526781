from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from armor_recipes import builtin
from armor_recipes.calibration.encoding import encode
from armor_recipes.calibration.inputs import InputSet, hash_tokens
from armor_recipes.calibration.tokens import build_tokens, shares
from armor_recipes.calibration.windows import pack
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import AtMost, CalibrationSpec, WeightedDataset

VOCAB = 257
RANDOM = "builtin:random-tokens"
SAME_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def spec(dataset, **keys) -> CalibrationSpec:
    return CalibrationSpec(dataset=str(dataset) if isinstance(dataset, Path) else dataset, **keys)


def build(dataset, tokenizer, *, vocab_size=VOCAB, **keys) -> InputSet:
    return build_tokens(spec(dataset, **keys), tokenizer=tokenizer, vocab_size=vocab_size)


def rows_of(ids: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, ids.tolist()))


@pytest.fixture
def letters(tmp_path) -> Path:
    """Documents of 5, 0 and 8 letters: with an end token after each, a stream of 15 tokens."""
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["abcde", " ", "fghijklm"]))
    return path


def test_documents_are_joined_by_the_end_token_and_packed(letters, tokenizer):
    found = build(letters, tokenizer, samples=3, sequence_length=4)
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklm"}
    end = tokenizer.eos_token_id
    words = [["a", "b", "c", "d"], ["e", None, "f", "g"], ["h", "i", "j", "k"]]
    expected = {tuple(end if letter is None else ids[letter] for letter in word) for word in words}
    assert rows_of(found.ids) == expected
    assert found.ids.dtype == torch.int64
    (source,) = found.sources
    assert found.origins == (0,) * len(found.ids)
    assert (source.documents, source.empty, source.tokens, source.available, source.taken) == (2, 1, 15, 3, 3)
    assert found.dataset == str(letters)


def test_without_an_end_token_documents_follow_each_other(letters, tokenizer_without_end):
    found = build(letters, tokenizer_without_end, samples=1, sequence_length=13)
    assert tokenizer_without_end.decode(found.ids[0]) == "abcdefghijklm"


def test_builtin_text_gives_the_ids_that_ship_with_it():
    own = AutoTokenizer.from_pretrained(builtin.model_folder("stdlib-llama"))
    stream = encode(builtin.documents("pydoc-heldout"), own, end=True)
    assert stream.tolist() == builtin.token_ids("pydoc-heldout").tolist()


def test_a_document_longer_than_the_context_warns_nobody(tokenizer, caplog):
    assert tokenizer.model_max_length == 16
    with caplog.at_level(logging.DEBUG, logger="transformers"):
        assert len(encode(["x" * 100], tokenizer, end=False)) == 100
    assert not caplog.records


def test_the_order_is_that_of_the_draw(tmp_path, tokenizer_without_end):
    (tmp_path / "a.txt").write_bytes(bytes(range(32, 112)))
    found = build(tmp_path / "a.txt", tokenizer_without_end, samples=6, sequence_length=8, seed=3)
    stream = encode([bytes(range(32, 112)).decode()], tokenizer_without_end, end=False)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.ids, pack(stream, 8)[order[:6]])


def test_hash_is_of_shape_and_little_endian_ids():
    ids = torch.tensor([[1, 2, 3], [4, 5, 258]])
    assert hash_tokens(ids) == hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 258)).hexdigest()
    assert hash_tokens(ids) != hash_tokens(ids.view(3, 2))
    assert hash_tokens(ids.t()) == hash_tokens(ids.t().contiguous())


@given(st.integers(0, 2**63 - 1), st.integers(1, 20), st.integers(2, 12), st.integers(1, 300))
def test_random_tokens_follow_from_the_seed(seed, samples, length, vocab_size):
    keys = {"samples": samples, "sequence_length": length, "vocab_size": vocab_size}
    state = torch.random.get_rng_state()
    one, again = build(RANDOM, None, seed=seed, **keys), build(RANDOM, None, seed=seed, **keys)
    assert torch.equal(one.ids, again.ids)
    assert one.sha256 == again.sha256
    assert one.ids.shape == (samples, length)
    assert 0 <= int(one.ids.min()) <= int(one.ids.max()) < vocab_size
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_tokens_reach_the_whole_vocabulary_and_at_most_is_all():
    found = build(RANDOM, None, samples=AtMost(at_most=64), sequence_length=64, vocab_size=40)
    assert found.ids.unique().tolist() == list(range(40))
    assert found.asked == len(found.ids) == 64
    assert found.sources[0].taken == 64


@given(seed=st.integers(0, 2**32), other=st.integers(0, 2**32))
@SAME_FIXTURE
def test_windows_are_drawn_without_replacement_by_the_seed(tmp_path, tokenizer, seed, other):
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i:04}" for i in range(100)))
    state = torch.random.get_rng_state()
    one, again = (build(path, tokenizer, samples=50, sequence_length=4, seed=seed) for _ in range(2))
    different = build(path, tokenizer, samples=50, sequence_length=4, seed=other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.ids, again.ids)
    assert len(rows_of(one.ids)) == 50
    assert (one.sha256 == different.sha256) == (seed == other)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=6), st.integers(1, 9))
@SAME_FIXTURE
def test_packing_loses_the_tail_only(tokenizer, texts, length):
    stream = encode(texts, tokenizer, end=True)
    windows = pack(stream, length)
    kept = windows.numel()
    assert windows.shape == (len(stream) // length, length)
    assert torch.equal(windows.reshape(-1), stream[:kept])
    assert len(stream) - kept < length
    assert len(stream) == sum(len(text.encode()) + 1 for text in texts)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8), st.integers(0, 1000))
def test_shares_sum_and_are_near_their_quota(weights, total):
    counts = shares(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1.0], 7, (7,)),
        ([3.0, 1.0], 8, (6, 2)),
        ([1.0, 1.0], 3, (2, 1)),
        ([0.5, 0.3, 0.2], 7, (4, 2, 1)),
        ([1.0, 1.0, 1.0], 2, (1, 1, 0)),
        ([1e-12, 1.0], 3, (0, 3)),
    ],
)
def test_shares_by_the_largest_remainder(weights, total, expected):
    assert shares(weights, total) == expected


@pytest.fixture
def mix(tmp_path) -> tuple[WeightedDataset, ...]:
    """20 windows of 4 letters `a`, 20 of `b` in another column, and random tokens, 2 : 1 : 1."""
    (tmp_path / "a.txt").write_text("a" * 79)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "b" * 79}) + "\n")
    return (
        WeightedDataset(dataset=str(tmp_path / "a.txt"), weight=2),
        WeightedDataset(dataset=str(tmp_path / "b.jsonl"), weight=1, text_column="body"),
        WeightedDataset(dataset=RANDOM, weight=1),
    )


def test_a_mix_is_shared_out_by_weight_and_interleaved(mix, tokenizer):
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    found = build(mix, tokenizer, samples=16, sequence_length=4)
    firsts = found.ids[:, 0].tolist()
    assert [source.taken for source in found.sources] == [8, 4, 4]
    assert [(found.ids[:, :3] == i).all(1).sum().item() for i in (a, b)] == [8, 4]
    for origin, letter in enumerate((a, b)):
        assert [o == origin for o in found.origins] == (found.ids[:, :3] == letter).all(1).tolist()
    assert firsts[:8] != [a] * 8
    assert found.sha256 == build(mix, tokenizer, samples=16, sequence_length=4).sha256
    assert found.sha256 != build(mix, tokenizer, samples=16, sequence_length=4, seed=1).sha256


def test_at_most_keeps_the_proportions_of_a_mix(mix, tokenizer):
    found = build(mix, tokenizer, samples=AtMost(at_most=1000), sequence_length=4)
    assert [source.taken for source in found.sources] == [20, 10, 10]
    assert (found.asked, len(found.ids)) == (1000, 40)


@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    at_most=st.integers(1, 60),
)
@SAME_FIXTURE
def test_at_most_takes_the_largest_mix_that_there_is(tmp_path, tokenizer_without_end, weights, sizes, at_most):
    parts = []
    for i, weight in enumerate(weights):
        path = tmp_path / f"{i}.txt"
        path.write_text("xy" * sizes[i])
        parts.append(WeightedDataset(dataset=str(path), weight=weight))
    fits = [n for n in range(1, at_most + 1) if all(c <= s for c, s in zip(shares(weights, n), sizes, strict=False))]
    total = max(fits, default=1)
    if min(shares(weights, total)) == 0:
        with pytest.raises(InputError, match="gets none of the"):
            build(tuple(parts), tokenizer_without_end, samples=AtMost(at_most=at_most), sequence_length=2)
    else:
        found = build(tuple(parts), tokenizer_without_end, samples=AtMost(at_most=at_most), sequence_length=2)
        assert tuple(source.taken for source in found.sources) == shares(weights, total)


def test_at_most_takes_what_there_is(letters, tokenizer):
    found = build(letters, tokenizer, samples=AtMost(at_most=128), sequence_length=4)
    assert (found.asked, len(found.ids)) == (128, 3)
    assert len(build(letters, tokenizer, samples=AtMost(at_most=2), sequence_length=4).ids) == 2


def test_fewer_than_asked_says_how_many_there_are(letters, tokenizer):
    with pytest.raises(InputError, match=r"has 3 windows of 4 tokens \(15 tokens\), but 5 are asked.*at_most: 5"):
        build(letters, tokenizer, samples=5, sequence_length=4)


@pytest.mark.parametrize("samples", [1, AtMost(at_most=9)])
def test_less_than_one_window_says_so(letters, tokenizer, samples):
    with pytest.raises(InputError, match=r"only 15 tokens, less than one window.*smaller than 16"):
        build(letters, tokenizer, samples=samples, sequence_length=16)


def test_a_dataset_of_a_mix_that_would_get_nothing(mix, tokenizer):
    with pytest.raises(InputError, match=r"random-tokens gets none of the 2 samples by its weight"):
        build(mix, tokenizer, samples=2, sequence_length=4)


def test_text_needs_a_tokenizer(letters):
    with pytest.raises(InputError, match=r"no tokenizer.*builtin:random-tokens"):
        build(letters, None, samples=1, sequence_length=4)


def test_a_tokenizer_of_another_model(letters, tokenizer):
    with pytest.raises(InputError, match=r"the id \d+, but the model embeds 50 tokens.*does not belong"):
        build(letters, tokenizer, samples=1, sequence_length=4, vocab_size=50)
    assert build(letters, tokenizer, samples=1, sequence_length=4, vocab_size=tokenizer.eos_token_id + 1).asked == 1


def test_messages_of_the_calibration_reach_the_parts_of_a_mix(tmp_path, tokenizer):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"turns": [{"role": "user", "content": "abcdefgh"}]}) + "\n")
    (tmp_path / "a.txt").write_text("abcdefgh")
    parts = (
        WeightedDataset(dataset=str(chat), weight=1),
        WeightedDataset(dataset=str(tmp_path / "a.txt"), weight=1, text_column="text"),
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        found = build(parts, tokenizer, samples=2, sequence_length=8, messages_column="turns")
    finally:
        tokenizer.chat_template = None
    assert [tokenizer.decode(ids) for ids in found.ids] == ["abcdefgh"] * 2


def test_windows_begin_as_the_tokenizer_begins_a_text(letters, tokenizer, with_bos):
    bos, size = with_bos.bos_token_id, {"sequence_length": 4, "vocab_size": VOCAB + 1}
    found = build(letters, with_bos, samples=AtMost(at_most=9), **size)
    stream = encode(["abcde", "fghijklm"], tokenizer, end=True)
    assert rows_of(found.ids) == {(bos, *row) for row in pack(stream, 3).tolist()}
    assert (found.prefix, found.end_of_text) == ((bos,), with_bos.eos_token_id)
    assert found.sha256 == hash_tokens(found.ids)
    (source,) = found.sources
    assert (source.tokens, source.available, source.taken) == (15, 5, 5)


def test_never_and_a_tokenizer_that_adds_nothing_give_text_alone(letters, tokenizer, with_bos):
    plain = build(letters, tokenizer, samples=3, sequence_length=4)
    never = build(letters, with_bos, samples=3, sequence_length=4, bos="never")
    assert plain.sha256 == never.sha256
    assert plain.prefix == never.prefix == ()


def test_a_document_that_spells_the_beginning_does_not_bring_it_twice(tmp_path, with_bos):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "<bos>abc"}\n{"text": "de<bos>f"}\n')
    found = build(path, with_bos, samples=1, sequence_length=10, vocab_size=VOCAB + 1)
    assert with_bos.decode(found.ids[0]) == "<bos>abc<end>de<bos>f<end>"
    kept = build(path, with_bos, samples=1, sequence_length=10, vocab_size=VOCAB + 1, bos="never")
    assert with_bos.decode(kept.ids[0]) == "<bos>abc<end>de<bos>f<end>"


def test_a_chat_template_that_writes_the_beginning(tmp_path, with_bos):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"turns": [{"role": "user", "content": "abcdef"}]}) + "\n")
    with_bos.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    found = build(chat, with_bos, samples=2, sequence_length=4, messages_column="turns", vocab_size=VOCAB + 1)
    assert {with_bos.decode(ids) for ids in found.ids} == {"<bos>abc", "<bos>def"}


def test_random_tokens_begin_with_it_too(tokenizer, with_bos):
    keys = {"samples": 5, "sequence_length": 6, "vocab_size": VOCAB + 1}
    plain, found = build(RANDOM, tokenizer, **keys), build(RANDOM, with_bos, **keys)
    assert found.ids[:, 0].tolist() == [with_bos.bos_token_id] * 5
    assert torch.equal(found.ids[:, 1:], plain.ids[:, 1:])
    assert (found.prefix, found.end_of_text) == ((with_bos.bos_token_id,), None)
    assert build(RANDOM, with_bos, bos="never", **keys).sha256 == plain.sha256 == build(RANDOM, None, **keys).sha256


def test_windows_need_room_for_text_after_the_prefix(letters, with_bos):
    bos, end = with_bos.bos_token_id, with_bos.eos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> <bos> $A", special_tokens=[("<bos>", bos), ("<end>", end)]
    )
    with pytest.raises(InputError, match=rf"`sequence_length` 2 leaves no room.*\[{end}, {bos}\].*`bos: never`"):
        build(letters, with_bos, samples=1, sequence_length=2, vocab_size=VOCAB + 1)
    found = build(letters, with_bos, samples=15, sequence_length=3, vocab_size=VOCAB + 1)
    assert found.prefix == (end, bos)
    assert sorted(found.ids[:, 2].tolist()) == sorted(encode(["abcde", "fghijklm"], with_bos, end=True).tolist())


def test_a_prefix_that_the_model_does_not_embed(with_bos):
    with pytest.raises(InputError, match=rf"the id {VOCAB}, but the model embeds {VOCAB} tokens"):
        build(RANDOM, with_bos, samples=1, sequence_length=4)


def test_all_windows_of_a_mix_begin_alike(mix, with_bos):
    found = build(mix, with_bos, samples=16, sequence_length=4, vocab_size=VOCAB + 1)
    assert found.ids.shape == (16, 4)
    assert found.ids[:, 0].unique().tolist() == [with_bos.bos_token_id]
    assert [source.taken for source in found.sources] == [8, 4, 4]
    assert found.end_of_text == with_bos.eos_token_id
