"""Streams: what is drawn follows from the seed alone, and no more is read or tokenised than that takes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from armor_recipes.calibration import encoding, pools, sections, stream
from armor_recipes.calibration.encoding import encode
from armor_recipes.calibration.files import Cell
from armor_recipes.calibration.inputs import InputSet
from armor_recipes.calibration.sections import Sections
from armor_recipes.calibration.stream import Stream
from armor_recipes.calibration.tokens import build_tokens, most_of, shares
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import AtMost, CalibrationSpec, WeightedDataset

VOCAB = 257
SAME_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def build(dataset, tokenizer, *, vocab_size=VOCAB, stream=True, **keys) -> InputSet:
    spec = CalibrationSpec(dataset=str(dataset) if isinstance(dataset, Path) else dataset, stream=stream, **keys)
    return build_tokens(spec, tokenizer=tokenizer, vocab_size=vocab_size)


def streamed(rows: list[list[str]], *, longest: int = 1000, beginnings: bool = False) -> Stream:
    """A stream of sections that are given."""
    of = Sections(len(rows), lambda number: (Cell(row, "here") for row in rows[number]))
    return Stream(of, lambda cell: str(cell.value), longest, beginnings)


def drawn(of: Stream, seed: int = 0) -> list[str]:
    return [text for batch in of.batches(seed) for text in batch]


@pytest.fixture
def numbers(tmp_path) -> Path:
    """600 documents of five digits: with an end token after each, windows of six tokens are one document each."""
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"{row:05}"}) + "\n" for row in range(600)))
    return path


def texts_of(found: InputSet, tokenizer) -> list[str]:
    return [tokenizer.decode(row) for row in found.ids]


@given(count=st.integers(0, 60), seed=st.integers(0, 2**63 - 1))
def test_sections_are_shuffled(count, seed):
    one, again = (list(stream._shuffled(count, torch.Generator().manual_seed(seed))) for _ in range(2))
    assert one == again
    assert sorted(one) == list(range(count))


def test_every_order_of_sections_is_as_likely():
    generator = torch.Generator().manual_seed(0)
    orders = [tuple(stream._shuffled(4, generator)) for _ in range(24 * 200)]
    assert len(set(orders)) == 24
    assert all(140 < orders.count(order) < 260 for order in set(orders))


def test_the_shuffle_of_many_sections_holds_few():
    order = stream._shuffled(10**12, torch.Generator().manual_seed(0))
    assert len(set(islice(order, 1000))) == 1000


def expected(rows: list[list[str]], seed: int) -> list[str]:
    """The rule of docs/calibration.md once more, on all rows at once: sections, turns, draws."""
    generator = torch.Generator().manual_seed(seed)
    waiting, place = list(range(len(rows))), 0

    def following() -> list[list[str]]:
        nonlocal place
        if place == len(waiting):
            return []
        other = int(torch.randint(place, len(waiting), (1,), generator=generator))
        waiting[place], waiting[other] = waiting[other], waiting[place]
        place += 1
        return [list(rows[waiting[place - 1]])]

    turns = [section for _ in range(stream._OPEN) for section in following()]
    found: list[str] = []
    read: list[str] = []

    def draw() -> None:
        order = torch.randperm(len(read), generator=generator)
        found.extend(read[i] for i in order.tolist())
        read.clear()

    while turns:
        section = turns.pop(0)
        if not section:
            turns = following() + turns
            continue
        read.append(section.pop(0))
        turns.append(section)
        if len(read) == stream._ROWS:
            draw()
    draw()
    return found


@given(sizes=st.lists(st.integers(0, 9), max_size=20), seed=st.integers(0, 99), held=st.integers(1, 30))
@SAME_FIXTURE
def test_documents_are_drawn_by_the_rule(monkeypatch, sizes, seed, held):
    monkeypatch.setattr(stream, "_ROWS", held)
    rows = [[f"{section}.{row}" for row in range(size)] for section, size in enumerate(sizes)]
    of = streamed(rows)
    found = drawn(of, seed)
    assert found == expected(rows, seed)
    assert sorted(found) == sorted(row for section in rows for row in section)
    assert of.documents == sum(sizes)


def test_rows_are_counted_as_they_are_read(monkeypatch):
    monkeypatch.setattr(stream, "_ROWS", 4)
    of = streamed([["a", " ", "", "b", "c", "d", " "]])
    batches = of.batches(0)
    assert sorted(next(batches)) == ["a", "b"]
    assert (of.documents, of.empty) == (2, 2)
    assert sorted(next(batches)) == ["c", "d"]
    assert next(batches, None) is None
    assert (of.documents, of.empty) == (4, 3)


def test_characters_bound_what_is_read_at_once(monkeypatch):
    monkeypatch.setattr(stream, "_CHARACTERS", 100)
    of = streamed([["x" * 40] * 9])
    assert [len(batch) for batch in of.batches(0)] == [3, 3, 3]


@pytest.mark.timeout(20)
def test_empty_rows_without_end_are_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(stream, "_ROWS", 50)
    endless = Sections(1, lambda _: (Cell("", "here") for _ in count()))
    of = Stream(endless, str, 10, beginnings=False)
    of.text = lambda cell: ""
    assert drawn(of) == []
    assert of.empty == 50


def test_empty_rows_between_others_are_passed_over(monkeypatch):
    monkeypatch.setattr(stream, "_ROWS", 50)
    of = streamed([["a", *[" "] * 500, "b"]])
    assert drawn(of) == ["a", "b"]
    assert (of.documents, of.empty) == (2, 500)


@given(words=st.lists(st.text("ab ", max_size=30), max_size=20), longest=st.integers(1, 40))
def test_long_texts_are_cut_near_spaces(words, longest):
    text = " ".join(words)
    parts = list(streamed([], longest=longest)._parts(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= longest for part in parts)
    assert all(part.endswith(" ") or " " not in part for part in parts[:-1])
    assert list(streamed([], longest=longest, beginnings=True)._parts(text)) == ([text[:longest]] if text else [])


@given(seed=st.integers(0, 2**32), other=st.integers(0, 2**32), samples=st.integers(1, 200))
@settings(SAME_FIXTURE, max_examples=15, deadline=None)
def test_windows_follow_from_the_seed_and_fewer_are_the_first_of_more(numbers, tokenizer, seed, other, samples):
    keys = {"sequence_length": 6}
    state = torch.random.get_rng_state()
    some, more = (build(numbers, tokenizer, samples=n, seed=seed, **keys) for n in (samples, 200))
    different = build(numbers, tokenizer, samples=200, seed=other, **keys)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(some.ids, more.ids[:samples])
    assert len(set(texts_of(more, tokenizer))) == 200
    assert (more.sha256 == different.sha256) == (seed == other)
    (source,) = some.sources
    assert (source.stream, source.available, source.taken, source.tokens) == (True, None, samples, samples * 6)


def test_all_of_a_stream_is_what_is_in_it(numbers, tokenizer):
    found = build(numbers, tokenizer, samples=AtMost(at_most=5000), sequence_length=6)
    assert sorted(texts_of(found, tokenizer)) == [f"{row:05}<end>" for row in range(600)]
    assert (found.asked, found.sources[0].documents, found.sources[0].tokens) == (5000, 600, 3600)


def test_windows_come_from_all_over_the_data(tmp_path, tokenizer):
    rows = ["{:05} {}\n".format(row, "x" * 90) for row in range(40_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "a.txt").write_text("".join(rows))
    for name in ("a.jsonl", "a.txt"):
        found = build(tmp_path / name, tokenizer, samples=320, sequence_length=20)
        words = "".join(texts_of(found, tokenizer)).replace("<end>", " ").split()
        places = [int(word) for word in words if word.isdigit() and len(word) == 5]
        assert len({place * 8 // 40_000 for place in places}) == 8
        assert found.sources[0].documents <= 4096


def test_a_text_is_cut_at_its_lines(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"line {row:04} of a text\n" for row in range(2000)))
    found = build(tmp_path / "a.txt", tokenizer, samples=300, sequence_length=16)
    pieces = "".join(texts_of(found, tokenizer)).split("<end>")[:-1]
    assert len(pieces) > 20
    assert all(piece.startswith("line ") and piece.endswith("of a text\n") for piece in pieces)
    assert all(len(piece) <= 16 * 16 for piece in pieces)


def test_windows_do_not_depend_on_how_much_is_read_or_tokenised_at_once(tmp_path, monkeypatch, tokenizer):
    draw = random.Random(0)
    rows = ["".join(draw.choices("abcdefgh \n", k=draw.randrange(400))) for _ in range(500)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": rows}), path, row_group_size=30)
    keys = {"samples": 40, "sequence_length": 20}
    before = build(path, tokenizer, **keys)
    monkeypatch.setattr(sections, "_ROWS", 7)
    monkeypatch.setattr(encoding, "_BATCH", 3)
    monkeypatch.setattr(encoding, "_PIECE", 500)
    after = build(path, tokenizer, **keys)
    assert (before.sha256, before.sources) == (after.sha256, after.sources)


def recorded(monkeypatch) -> list[int]:
    """Characters of each call of a tokenizer from now on."""
    sizes, call = [], encoding._call

    def record(tokenizer, batch):
        sizes.append(sum(map(len, batch)))
        return call(tokenizer, batch)

    monkeypatch.setattr(encoding, "_call", record)
    return sizes


def test_no_more_is_read_or_tokenised_than_the_windows_need(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(stream, "_ROWS", 100)
    read: list[str] = []

    def rows(number: int) -> Iterator[Cell]:
        for row in count():
            read.append(f"{number}.{row}")
            yield Cell("x" * 2000, "here")

    monkeypatch.setattr(stream, "path_sections", lambda *_: Sections(10**9, rows))
    sizes = recorded(monkeypatch)
    found = build("./endless", tokenizer, samples=50, sequence_length=512)
    assert found.ids.shape == (50, 512)
    assert len(read) == found.sources[0].documents == 100
    assert len({row.partition(".")[0] for row in read}) == stream._OPEN
    assert sum(sizes) <= 50 * 512 + encoding._PIECE


def test_a_long_document_is_tokenised_in_parts(tmp_path, monkeypatch, tokenizer):
    rows = ["ab " * 400_000, "cd " * 400_000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sizes = recorded(monkeypatch)
    found = build(tmp_path / "a.jsonl", tokenizer, samples=40, sequence_length=64)
    assert sum(sizes) <= encoding._PIECE
    texts = texts_of(found, tokenizer)
    assert any("a" in text for text in texts)
    assert any("c" in text for text in texts)
    runs = "".join(texts).split("<end>")
    assert all(len(run) == 16 * 64 - 1 for run in runs[1:-1])  # 1024, after the last space


def test_text_of_the_package_and_random_tokens_in_a_stream(tokenizer):
    mix = tuple(WeightedDataset(dataset=f"builtin:{name}", weight=1) for name in ("pydoc", "random-tokens"))
    found = build(mix, tokenizer, samples=10, sequence_length=32)
    assert [source.stream for source in found.sources] == [True, False]
    with pytest.raises(InputError, match="nothing"):
        build("builtin:nothing", tokenizer)


def test_each_dataset_of_a_mix_says_whether_it_is_a_stream(numbers, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"a{row:04}" for row in range(100)))
    parts = (
        WeightedDataset(dataset=str(numbers), weight=2),
        WeightedDataset(dataset=str(tmp_path / "a.txt"), weight=1, stream=False),
        WeightedDataset(dataset=str(numbers), weight=1, stream=True),
    )
    found = build(parts, tokenizer, samples=40, sequence_length=6)
    assert [source.stream for source in found.sources] == [True, False, True]
    assert [source.taken for source in found.sources] == [20, 10, 10]
    texts = texts_of(found, tokenizer)
    alone = texts_of(build(numbers, tokenizer, samples=20, sequence_length=6), tokenizer)
    assert sorted(text for text, origin in zip(texts, found.origins, strict=True) if origin == 0) == sorted(alone)
    auto = build(parts, tokenizer, samples=40, sequence_length=6, stream=None)
    assert [source.stream for source in auto.sources] == [False, False, True]


@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    at_most=st.integers(1, 60),
)
@SAME_FIXTURE
def test_at_most_takes_the_largest_mix_that_streams_have(tmp_path, tokenizer_without_end, weights, sizes, at_most):
    parts = []
    for i, weight in enumerate(weights):
        (tmp_path / f"{i}.txt").write_text("xy" * sizes[i])
        parts.append(WeightedDataset(dataset=str(tmp_path / f"{i}.txt"), weight=weight))
    keys = {"samples": AtMost(at_most=at_most), "sequence_length": 2}
    fits = [n for n in range(1, at_most + 1) if all(c <= s for c, s in zip(shares(weights, n), sizes, strict=False))]
    total = max(fits, default=1)
    if min(shares(weights, total)) == 0:
        with pytest.raises(InputError, match="gets none of the"):
            build(tuple(parts), tokenizer_without_end, **keys)
    else:
        found = build(tuple(parts), tokenizer_without_end, **keys)
        assert tuple(source.taken for source in found.sources) == shares(weights, total)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8), st.integers(1, 300))
def test_no_share_of_a_smaller_total_is_above_the_most(weights, total):
    most = most_of(weights, total)
    for smaller in range(1, total + 1, max(1, total // 30)):
        assert all(share <= bound for share, bound in zip(shares(weights, smaller), most, strict=True))
    assert sum(most) < total + len(weights)


def test_streams_that_are_too_short(numbers, tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"has 600 windows of 6 tokens \(3600 tokens\), but 601 are asked.*at_most"):
        build(numbers, tokenizer, samples=601, sequence_length=6)
    with pytest.raises(InputError, match=r"only 3600 tokens, less than one window.*smaller than 20000"):
        build(numbers, tokenizer, samples=1, sequence_length=20000)
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, as far as it was read, holds no text: 2 rows, all.*`text_column`"):
        build(tmp_path / "a.jsonl", tokenizer)
    with pytest.raises(InputError, match=r"no tokenizer"):
        build(numbers, None)
    with pytest.raises(InputError, match=r"the id \d+, but the model embeds 20 tokens"):
        build(numbers, tokenizer, samples=1, sequence_length=6, vocab_size=20)


@pytest.fixture
def documents(tmp_path) -> Path:
    """Documents of 3, 7, 8, 0, 9 and 100 letters."""
    path = tmp_path / "documents.jsonl"
    rows = [letter * size for letter, size in zip("abcdef", (3, 7, 8, 0, 9, 100), strict=True)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streamed", [False, True])
def test_truncated_windows_are_beginnings_of_documents(documents, tokenizer, with_bos, streamed):
    keys = {"stream": streamed, "documents": "truncated", "sequence_length": 8}
    found = build(documents, tokenizer, samples=4, **keys)
    assert sorted(texts_of(found, tokenizer)) == ["bbbbbbb<end>", "cccccccc", "eeeeeeee", "ffffffff"]
    (source,) = found.sources
    assert (source.documents, source.empty, source.tokens, source.taken) == (5, 1, 32, 4)
    assert source.short <= 1 if streamed else source.short == 1
    all_of_them = build(documents, tokenizer, samples=AtMost(at_most=9), **keys)
    assert (len(all_of_them.ids), all_of_them.sources[0].short) == (4, 1)
    begun = build(documents, with_bos, samples=AtMost(at_most=9), vocab_size=VOCAB + 1, **keys)
    assert sorted(texts_of(begun, with_bos)) == [f"<bos>{letter * 7}" for letter in "bcef"]


@pytest.mark.parametrize("streamed", [False, True])
def test_documents_that_are_too_short_to_be_truncated(documents, tokenizer, streamed):
    keys = {"stream": streamed, "documents": "truncated"}
    message = r"has 4 documents of 8 tokens or more \(1 are shorter\), but 5 are asked for.*at_most: 5"
    with pytest.raises(InputError, match=message):
        build(documents, tokenizer, samples=5, sequence_length=8, **keys)
    with pytest.raises(InputError, match=r"no document of 200 tokens or more \(5 are shorter\).*`documents: packed`"):
        build(documents, tokenizer, samples=1, sequence_length=200, **keys)


@pytest.mark.parametrize("streamed", [False, True])
def test_of_a_document_that_is_truncated_only_the_beginning_is_tokenised(tmp_path, monkeypatch, tokenizer, streamed):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter * 300_000}) + "\n" for letter in "abc"))
    sizes = recorded(monkeypatch)
    found = build(
        tmp_path / "a.jsonl", tokenizer, stream=streamed, samples=3, sequence_length=10, documents="truncated"
    )
    assert sorted(texts_of(found, tokenizer)) == ["a" * 10, "b" * 10, "c" * 10]
    assert sum(sizes) == 3 * 160


@pytest.mark.timeout(60)
def test_short_documents_without_end_are_not_read_for_ever(monkeypatch, tokenizer):
    monkeypatch.setattr(stream, "_ROWS", 64)
    monkeypatch.setattr(pools, "_TOO_SHORT", 200)
    rows = (Cell("x" * (50 if row == 100 else 5), "here") for row in count())
    monkeypatch.setattr(stream, "path_sections", lambda *_: Sections(1, lambda _: rows))
    found = build("./endless", tokenizer, samples=AtMost(at_most=9), sequence_length=20, documents="truncated")
    assert (len(found.ids), found.sources[0].taken) == (1, 1)
    assert 200 <= found.sources[0].short < 200 + 192
    with pytest.raises(InputError, match=r"no document of 20 tokens or more \(200 are shorter\)"):
        build("./endless", tokenizer, samples=1, sequence_length=20, documents="truncated")


def test_packed_windows_of_whole_files_stay_what_they_were(numbers, tokenizer):
    found = build(numbers, tokenizer, samples=7, sequence_length=40, seed=3, stream=None)
    ids = encode([f"{row:05}" for row in range(600)], tokenizer, end=True)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.ids, ids.view(90, 40)[order[:7]])
    assert (found.sources[0].stream, found.sources[0].available) == (False, 90)


def test_messages_of_a_stream(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"{row:03}"}, {"role": "assistant", "content": "yes"}] for row in range(60)]
    path.write_text("".join(json.dumps({"turns": turn}) + "\n" for turn in [*turns, None, []]))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        found = build(path, tokenizer, messages_column="turns", samples=AtMost(at_most=99), sequence_length=7)
        path.write_text(json.dumps({"turns": [{"role": "user"}]}) + "\n")
        with pytest.raises(InputError, match=r"chat\.jsonl, line at byte 0.*list of \{role, content\}"):
            build(path, tokenizer, messages_column="turns")
    finally:
        tokenizer.chat_template = None
    assert sorted(texts_of(found, tokenizer)) == [f"{row:03}yes<end>" for row in range(60)]
    assert (found.sources[0].documents, found.sources[0].empty) == (60, 2)
    with pytest.raises(InputError, match="no chat template"):
        build(path, tokenizer, messages_column="turns")
