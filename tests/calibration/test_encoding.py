from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from armor_recipes.calibration import encoding
from armor_recipes.calibration.encoding import encode, encode_in_pieces, special_ends
from armor_recipes.errors import InputError

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    *("the", "cat", "don't", "I'll", "LIGHT", "Über", "naïve", "12", "1234567", "3.14", "walks_quickly", "__init__"),
    *(
        "bird\tsings",
        "stone,under",
        "你好世界",
        "哈哈哈",
        "東京都",
        "한국어",
        "العربية",
        "हिन्दी",
        "😀😀",
        "👨\u200d👩\u200d👧",
    ),
    *("é", "e\u0301", "ﬁne", "½"),
]
#: As in Llama 3: digits go by threes from the left, and a space goes with the word after it.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: As in DeepSeek V3: which of two patterns takes a run of letters depends on the character before it.
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+(?!\S)|\s+",
)
RIGHT_TO_LEFT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))"


def corpus() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(300):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(3, 14)))
        yield words + draw.choice(["", ".", "\n", "\n\n", "  x", "    y"]) + "a" * draw.choice([0, 3, 17])


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(model, trainer, *, words=None, normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the corpus, with added tokens that swallow the white space beside them."""
    bare = Tokenizer(model)
    if words is not None:
        bare.pre_tokenizer = words
    if normalizer is not None:
        bare.normalizer = normalizer
    bare.train_from_iterator(corpus(), trainer)
    bare.add_tokens(
        [
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("one_word", single_word=True),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def byte_level(words: pre_tokenizers.PreTokenizer, **keys) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False, **keys
    )
    return trained(models.BPE(), trainer, words=words)


def characters(words: pre_tokenizers.PreTokenizer | None, normalizer=None) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *BYTES], max_token_length=12, show_progress=False
    )
    model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return trained(model, trainer, words=words, normalizer=normalizer)


def dropping() -> PreTrainedTokenizerFast:
    """BPE over whole texts that leaves out what it does not know, and then gives wrong places."""
    trainer = trainers.BpeTrainer(
        vocab_size=200, limit_alphabet=30, special_tokens=SPECIAL, max_token_length=8, show_progress=False
    )
    return trained(models.BPE(), trainer)


def pieces_of_words() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20),
        trainer,
        words=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(),
    )


def unigram(words: pre_tokenizers.PreTokenizer, normalizer=None) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, words=words, normalizer=normalizer)


def whole_words() -> PreTrainedTokenizerFast:
    return trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
        words=pre_tokenizers.Whitespace(),
        normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Strip()]),
    )


LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
METASPACE = pre_tokenizers.Metaspace
MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2-prefix-space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(split(LLAMA3)),
    "deepseek": lambda: byte_level(split(*DEEPSEEK)),
    "right-to-left": lambda: byte_level(split(RIGHT_TO_LEFT, LLAMA3)),
    "llama2": lambda: characters(None, LLAMA2),
    "gemma": lambda: characters(pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    "metaspace-first": lambda: characters(METASPACE(prepend_scheme="first")),
    "metaspace-first-unsplit": lambda: characters(METASPACE(prepend_scheme="first", split=False)),
    "metaspace-always": lambda: characters(METASPACE(prepend_scheme="always"), normalizers.NFKC()),
    "spaces-collapsed": lambda: characters(METASPACE(), normalizers.Replace(Regex(" {2,}"), " ")),
    "dropping": dropping,
    "wordpiece": pieces_of_words,
    "unigram": lambda: unigram(METASPACE(), normalizers.NFKC()),
    "unigram-unsplit": lambda: unigram(METASPACE(split=False)),
    "unigram-scripts": lambda: unigram(pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), METASPACE()])),
    "wordlevel": whole_words,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    return MAKERS["gpt2"]()


def whole(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer([text], add_special_tokens=False)["input_ids"][0]


UNITS = [
    *("a", "aa", "ab", "aab", "A", " ", "\n", "\r\n", "\t", "哈", "哈你", "😀", "0", "12", "123", " a", "e\u0301"),
    *("\u0301\u0323", "-", "'s", "  x", "1,", "한", "\u200b", "ﬁ", "ab\n", "<s>", "▁"),
]
MARKS = ["</s>", "<s>", " <left>", "    <left>", "<right>    ", "one_word", "<s", "</", "<left"]
PARTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=25).map("".join),
    st.tuples(st.sampled_from(UNITS), st.sampled_from([1, 2, 7, 50, 300])).map(lambda run: run[0] * run[1]),
    st.text("0123456789", max_size=90),
    st.text("aab ", max_size=90),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(MARKS),
)


@given(parts=st.lists(PARTS, min_size=1, max_size=14))
@settings(max_examples=80, deadline=None)
def test_ids_of_pieces_are_those_of_the_whole(tokenizer, parts):
    text = "".join(parts)
    if text:
        assert encode_in_pieces(text, tokenizer, size=128, context=96).tolist() == whole(text, tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        " ".join(WORDS) * 40,
        "\n".join(WORDS) * 40,
        "你好世界哈哈東京都" * 200,
        "你好，世界。" * 300,
        "a" * 3000,
        "ab" * 1501,
        " " * 2000,
        "\n" * 2001,
        "x" + " " * 1500 + "<left>",
        "<right>" + " " * 1500 + "x",
        "1234567890" * 200 + "x" + "7" * 1001,
        "😀" * 700,
        "e\u0301" * 900,
        "the " + "aab" * 600 + "e\u0301" * 300,
        "<s>" * 500,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_long_runs(tokenizer, text):
    assert encode_in_pieces(text, tokenizer, size=128, context=96).tolist() == whole(text, tokenizer)


class Recorder:
    """Hands texts on, and notes how many characters came at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.call = encoding._call
        monkeypatch.setattr(encoding, "_call", self)

    def __call__(self, tokenizer, batch):
        self.sizes.append(sum(map(len, batch)))
        return self.call(tokenizer, batch)


def test_a_long_text_reaches_the_tokenizer_in_pieces(monkeypatch, gpt2):
    text = "".join(corpus()) * 40
    assert len(text) > 2 * encoding._PIECE
    expected, recorder = whole(text, gpt2), Recorder(monkeypatch)
    assert encode([text], gpt2, end=False).tolist() == expected
    assert max(recorder.sizes) <= encoding._PIECE + 2 * encoding._CONTEXT
    assert sum(recorder.sizes) < 1.05 * len(text)


@pytest.mark.parametrize("name", ["llama2", "llama3", "wordpiece", "unigram", "wordlevel"])
def test_ordinary_text_is_joined_at_every_cut(monkeypatch, name):
    tokenizer, text = MAKERS[name](), "".join(corpus())
    recorder = Recorder(monkeypatch)
    encode_in_pieces(text, tokenizer, size=2048, context=512)
    assert max(recorder.sizes) <= 2048 + 2 * 512


def test_pieces_that_do_not_agree_grow_by_doubling(monkeypatch):
    tokenizer, text = whole_words(), "a" * 20_000
    recorder = Recorder(monkeypatch)
    assert encode_in_pieces(text, tokenizer, size=100, context=50).tolist() == whole(text, tokenizer)
    assert sum(recorder.sizes) < 4 * len(text)


def test_documents_are_handed_over_by_number_and_by_characters(monkeypatch, gpt2):
    recorder = Recorder(monkeypatch)
    texts = ["the cat " * 1000] * 100 + ["a"] * 1500
    stream = encode(texts, gpt2, end=False)
    assert stream.tolist() == whole(texts[0], gpt2) * 100 + whole("a", gpt2) * 1500
    assert max(recorder.sizes) <= encoding._PIECE
    assert len(recorder.sizes) == 4 + 2


class Slow(PreTrainedTokenizer):
    """Letters as code points, in Python: `<s>` before a text and `</s>` after it."""

    def __init__(self) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>")

    @property
    def vocab_size(self) -> int:
        return 300

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 1, "</s>": 2, **{chr(i): i for i in range(32, 300)}}

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {i: token for token, i in self.get_vocab().items()}[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0, 2]


def test_a_slow_tokenizer_gets_long_texts_whole(monkeypatch):
    monkeypatch.setattr(encoding, "_PIECE", 8)
    recorder = Recorder(monkeypatch)
    assert encode(["abcdefghijkl", "m"], Slow(), end=True).tolist() == [*map(ord, "abcdefghijkl"), 2, ord("m"), 2]
    assert recorder.sizes == [12, 1]


def template(single: str | None, *, vocabulary: str = "abcA0") -> PreTrainedTokenizerFast:
    """A tokenizer of single letters whose post-processor writes `single`."""
    special = {"<s>": 0, "</s>": 1, "<g>": 2}
    bare = Tokenizer(models.BPE(vocab=special | {letter: 10 + i for i, letter in enumerate(vocabulary)}, merges=[]))
    bare.add_special_tokens(list(special))
    if single is not None:
        bare.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(special.items()))
    return PreTrainedTokenizerFast(tokenizer_object=bare)


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        (None, ()),
        ("$A", ()),
        ("<s> $A", (0,)),
        ("<s> $A </s>", (0,)),
        ("$A </s>", ()),
        ("<g> <s> $A", (2, 0)),
        ("<s> <s> $A", (0, 0)),
    ],
)
def test_the_prefix_is_what_comes_before_the_text_by_itself(single, expected):
    tokenizer = template(single)
    assert tokenizer.bos_token is None
    assert special_ends(tokenizer)[0] == expected


def test_the_prefix_of_a_slow_tokenizer():
    assert special_ends(Slow())[0] == (1,)


def test_a_probe_that_the_tokenizer_does_not_know():
    assert special_ends(template("<s> $A </s>", vocabulary="CGT0"))[0] == (0,)
    assert special_ends(template("$A", vocabulary="xyz")) == ((), ())
    with pytest.raises(InputError, match=r"as \[0, 1\] with its special tokens and as \[\] without.*`bos: never`"):
        special_ends(template("<s> $A </s>", vocabulary="xyz"))


def test_a_text_that_begins_with_the_prefix_gives_it_up():
    tokenizer = template("<g> <s> $A")
    texts = ["<g><s>ab", "<s>b", "a<g><s>", "<g>", "", "<g><s><g><s>a"]
    assert encode(texts, tokenizer, end=False, prefix=(2, 0)).tolist() == [10, 11, 0, 11, 10, 2, 0, 2, 2, 0, 10]
    assert encode(texts[:1], tokenizer, end=False).tolist() == [2, 0, 10, 11]


def test_the_beginning_spelled_for_a_tokenizer_that_puts_a_space_before_texts():
    """As Llama 2's: the space comes before a text, and after each special token."""
    tokenizer = MAKERS["llama2"]()
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert special_ends(tokenizer)[0] == (bos,)
    assert encode(["<s>the cat"], tokenizer, end=False, prefix=(bos,)).tolist() == whole("the cat", tokenizer)
