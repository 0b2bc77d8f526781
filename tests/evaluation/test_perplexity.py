from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from armor_recipes.calibration.inputs import hash_tokens
from armor_recipes.errors import InputError, NumericalError
from armor_recipes.evaluation import evaluate, evaluation_windows, measure, perplexity
from armor_recipes.recipe.schema import PerplexitySpec


class Bigram(nn.Module):
    """Gives the same logits after the same token: row i of a table `(V, V)` after token i."""

    def __init__(self, table: list[list[float]], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.tensor(table, dtype=dtype))
        self.dropout = nn.Dropout(0.5)
        self.batches: list[int] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, *, input_ids: torch.Tensor, use_cache: bool, return_dict: bool) -> SimpleNamespace:
        assert torch.is_inference_mode_enabled()
        assert not use_cache
        assert return_dict
        self.batches.append(len(input_ids))
        return SimpleNamespace(logits=self.dropout(self.embed(input_ids)))


#: After token 0, P(1) = 3/4; after token 1, P(0) = 1/2.
TABLE = [[0.0, math.log(3.0)], [1.0, 1.0]]


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    vocab = {"?": 0, **{letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}}
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=8)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def spec(dataset, **keys) -> PerplexitySpec:
    return PerplexitySpec(dataset=str(dataset), **keys)


def test_a_hand_computed_value():
    windows = torch.tensor([[0, 1, 0], [0, 0, 1]])
    nll, tokens = perplexity(Bigram(TABLE), windows)
    # targets: 1 after 0 (3/4), 0 after 1 (1/2); 0 after 0 (1/4), 1 after 0 (3/4)
    assert tokens == 4
    assert nll == pytest.approx(-math.log(3 / 4 * 1 / 2 * 1 / 4 * 3 / 4) / 4, rel=1e-6)


def test_outputs_by_name_are_asked_for():
    """Where config.json says `return_dict: false`, a model gives a tuple unless it is asked."""

    class Tuples(Bigram):
        def forward(self, *, return_dict: bool = False, **inputs: object) -> object:
            found = super().forward(return_dict=True, **inputs)
            return found if return_dict else (found.logits,)

    windows = torch.tensor([[0, 1, 0]])
    assert perplexity(Tuples(TABLE), windows) == perplexity(Bigram(TABLE), windows)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(tmp_path, words):
    (tmp_path / "a.txt").write_text("any text at all")
    found = evaluate(Bigram([[0.0] * 300] * 300), spec(tmp_path / "a.txt", sequence_length=5), words)
    assert found.value == pytest.approx(300, rel=1e-5)
    assert found.value == math.exp(found.nll)
    assert (found.windows, found.tokens) == (3, 12)


def test_it_is_the_loss_that_transformers_computes(llama):
    windows = torch.randint(300, (5, 17), generator=torch.Generator().manual_seed(1))
    nll, tokens = perplexity(llama, windows, batch_size=2)
    with torch.no_grad():
        expected = llama(input_ids=windows, labels=windows).loss.item()
    assert tokens == 5 * 16
    assert nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_and_progress(batch_size):
    model, seen = Bigram(TABLE), []
    windows = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    nll, _ = perplexity(
        model, windows, batch_size=batch_size, on_progress=lambda done, total: seen.append((done, total))
    )
    assert nll == perplexity(Bigram(TABLE), windows, batch_size=3)[0]
    assert max(model.batches) <= batch_size
    assert seen == [(done, 3) for done in torch.tensor(model.batches).cumsum(0).tolist()]


def test_logits_of_a_narrow_dtype_are_taken_in_float32():
    table = [[0.0] * 1000] * 2
    nll, _ = perplexity(Bigram(table, dtype=torch.bfloat16), torch.tensor([[0, 1, 0, 1]]))
    assert nll == pytest.approx(math.log(1000), rel=1e-6)


def test_modes_gradients_and_the_global_generator_come_back():
    model = Bigram(TABLE)
    model.train()
    model.embed.eval()
    state = torch.random.get_rng_state()
    perplexity(model, torch.tensor([[0, 1, 0]]))
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_mode_comes_back_after_an_error():
    model = Bigram(TABLE)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perplexity(model, torch.tensor([[0, 1, 0]]), on_progress=stop)
    assert model.training


def test_windows_are_contiguous_and_rows_are_joined_by_blank_lines(tmp_path, words):
    (tmp_path / "a.jsonl").write_text('{"body": "abc"}\n{"body": ""}\n{"body": "def"}\n')
    found = evaluation_windows(spec(tmp_path / "a.jsonl", text_column="body", sequence_length=4), words)
    stream = words("abc\n\n\n\ndef")["input_ids"]
    assert found.ids.tolist() == [stream[:4], stream[4:8]]
    assert found.sha256 == hash_tokens(found.ids)
    (source,) = found.sources
    assert (source.documents, source.empty, source.tokens, source.available, source.taken) == (2, 1, 10, 2, 2)


def test_the_first_windows_only(tmp_path, words):
    (tmp_path / "a.txt").write_text("abcdefghij")
    whole = evaluation_windows(spec(tmp_path / "a.txt", sequence_length=3), words)
    first = evaluation_windows(spec(tmp_path / "a.txt", sequence_length=3, windows=2), words)
    assert len(whole.ids) == 3
    assert torch.equal(first.ids, whole.ids[:2])
    assert first.sha256 != whole.sha256


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sequence_length": 11}, r"has 0 windows of 11 tokens \(10 tokens\), but 1 are needed"),
        ({"sequence_length": 3, "windows": 4}, r"has 3 windows of 3 tokens \(10 tokens\), but 4 are needed"),
    ],
)
def test_a_text_that_is_too_short(tmp_path, words, keys, message):
    (tmp_path / "a.txt").write_text("abcdefghij")
    with pytest.raises(InputError, match=message):
        evaluation_windows(spec(tmp_path / "a.txt", **keys), words)


def test_text_needs_a_tokenizer_that_fits(tmp_path, words, llama):
    (tmp_path / "a.txt").write_text("abcdefghij")
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate(llama, spec(tmp_path / "a.txt", sequence_length=3), None)
    with pytest.raises(InputError, match="embeds 2 tokens"):
        evaluate(Bigram(TABLE), spec(tmp_path / "a.txt", sequence_length=3), words)
    with pytest.raises(InputError, match="embeds 2 tokens"):
        perplexity(Bigram(TABLE), torch.tensor([[0, 2]]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 1)])
def test_windows_without_a_target(shape):
    with pytest.raises(InputError, match="at least one window of two tokens"):
        perplexity(Bigram(TABLE), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_window(bad):
    model = Bigram([[0.0, 0.0], [bad, 0.0]])
    with pytest.raises(NumericalError, match=r"on 2 of 3 windows, first on window 1"):
        perplexity(model, torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0]]))


def test_a_perplexity_that_overflows(tmp_path, words):
    (tmp_path / "a.txt").write_text("aaaa")
    table = torch.zeros(300, 300)
    table[:, 0] = 1e4
    windows = evaluation_windows(spec(tmp_path / "a.txt", sequence_length=4), words)
    with pytest.raises(NumericalError, match=r"overflows: the mean loss is 10000 nats"):
        measure(Bigram(table.tolist()), windows)


def test_the_result_names_its_data(tmp_path, words, llama):
    (tmp_path / "a.txt").write_text("abcdefghij" * 4)
    wanted = spec(tmp_path / "a.txt", sequence_length=8, windows=3)
    found = evaluate(llama, wanted, words)
    assert found.dataset == str(tmp_path / "a.txt")
    assert found.sha256 == evaluation_windows(wanted, words).sha256
    assert (found.windows, found.tokens) == (3, 21)
    assert found == evaluate(llama, wanted, words)
