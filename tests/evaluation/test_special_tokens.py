"""Windows that begin as the tokenizer begins a text: in perplexity, in `armor eval`, and in the manifest of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import armor_recipes
from armor_recipes.calibration import encoding
from armor_recipes.calibration.windows import pack
from armor_recipes.cli.evaluate import Bos, eval_command
from armor_recipes.errors import InputError
from armor_recipes.evaluation import evaluate, evaluation_windows, measure, perplexity
from armor_recipes.recipe.schema import PerplexitySpec

TEXT = "the cat sat under a warm grey roof while rain fell on long letters\n" * 30


def bytes_with(single: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes whose post-processor writes `single`."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.add_special_tokens(["<s>", "</s>"])
    if single is not None:
        bare.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 256), ("</s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=257,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


@pytest.fixture
def folder(tmp_path, model) -> Path:
    model.save_pretrained(tmp_path / "model")
    bytes_with("<s> $A").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def spec(dataset: Path, **keys) -> PerplexitySpec:
    return PerplexitySpec(dataset=str(dataset), **keys)


@pytest.mark.parametrize(
    ("single", "prefix"),
    [(None, ()), ("$A </s>", ()), ("<s> $A", (256,)), ("<s> $A </s>", (256,)), ("</s> <s> $A", (257, 256))],
)
def test_each_window_begins_with_the_prefix(text, single, prefix):
    tokenizer = bytes_with(single)
    found = evaluation_windows(spec(text, sequence_length=8), tokenizer)
    stream = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert found.ids.tolist() == [[*prefix, *row] for row in pack(stream, 8 - len(prefix)).tolist()]
    assert found.ids.shape[1] == 8
    assert (found.prefix, found.end_of_text) == (prefix, None)


def test_never_is_text_alone_and_equal_to_a_tokenizer_that_adds_nothing(text):
    never = evaluation_windows(spec(text, sequence_length=8, bos="never"), bytes_with("<s> $A"))
    assert never.prefix == ()
    assert never.sha256 == evaluation_windows(spec(text, sequence_length=8), bytes_with(None)).sha256


def test_a_text_that_begins_with_it_does_not_have_it_twice(tmp_path):
    (tmp_path / "a.txt").write_text("<s>abcdef")
    found = evaluation_windows(spec(tmp_path / "a.txt", sequence_length=4), bytes_with("<s> $A"))
    plain = bytes_with(None)
    assert found.ids.tolist() == [[256, *plain("abc")["input_ids"]], [256, *plain("def")["input_ids"]]]


def test_all_tokens_after_the_first_count(text, model):
    wanted = spec(text, sequence_length=16, windows=5)
    found = evaluate(model, wanted, bytes_with("</s> <s> $A"))
    windows = evaluation_windows(wanted, bytes_with("</s> <s> $A"))
    assert (found.tokens, found.windows, found.bos) == (5 * 15, 5, (257, 256))
    assert found.nll == perplexity(model, windows.ids)[0]
    assert found.sha256 == windows.sha256


@pytest.mark.parametrize("length", [2, 3])
def test_windows_need_room_for_text(text, length):
    tokenizer = bytes_with("</s> <s> $A")
    if length == 2:
        with pytest.raises(InputError, match=r"`sequence_length` 2 leaves no room .*\[257, 256\].*`bos: never`"):
            evaluation_windows(spec(text, sequence_length=length), tokenizer)
    else:
        assert len(evaluation_windows(spec(text, sequence_length=length), tokenizer).ids) == len(TEXT)


def test_a_prefix_that_the_model_does_not_embed(text):
    with pytest.raises(InputError, match="the id 256, but the model embeds 200 tokens"):
        evaluation_windows(spec(text, sequence_length=8), bytes_with("<s> $A"), vocab_size=200)


def test_a_long_text_is_encoded_in_pieces(text, monkeypatch):
    whole = evaluation_windows(spec(text, sequence_length=8), bytes_with("<s> $A"))
    sizes, call = [], encoding._call
    monkeypatch.setattr(encoding, "_PIECE", 256)
    monkeypatch.setattr(encoding, "_call", lambda one, batch: sizes.append(len(batch[0])) or call(one, batch))
    monkeypatch.setattr(encoding.encode_in_pieces, "__kwdefaults__", {"size": 256, "context": 64})
    assert evaluation_windows(spec(text, sequence_length=8), bytes_with("<s> $A")).sha256 == whole.sha256
    assert max(sizes) == 256 + 2 * 64


@pytest.mark.parametrize("bos", Bos)
def test_armor_eval_says_how_windows_begin(folder, text, model, bos, capsys):
    keys = {"sequence_length": 16, "windows": 3, "device": "cpu"}
    eval_command(str(folder), dataset=str(text), bos=bos, as_json=True, **keys)
    found = json.loads(capsys.readouterr().out)
    wanted = spec(text, sequence_length=16, windows=3, bos=bos.value)
    expected = measure(model, evaluation_windows(wanted, bytes_with("<s> $A")))
    figures = {value.name: value.to_dict() for value in expected.figures}
    assert json.dumps(found.pop("figures")) == json.dumps(figures)
    assert len(figures) == 3
    keys = ("value", "nll", "tokens", "windows", "dataset", "sha256")
    of_it = ("record", "measure", "keys", "model", "machine", "manifest_sha256", "origin_sha256")
    saved = {name: found.pop(name) for name in of_it}
    assert (saved["measure"], saved["keys"]["bos"]) == ("perplexity", bos.value)
    assert found == {**{key: getattr(expected, key) for key in keys}, "bos": [256] if bos is Bos.AUTO else []}


@pytest.mark.parametrize(("bos", "prefix"), [("auto", [256]), ("never", [])])
def test_a_run_calibrates_on_such_windows_and_its_manifest_says_so(folder, text, tmp_path, bos, prefix):
    loaded, firsts = LlamaForCausalLM.from_pretrained(folder), set()
    loaded.get_input_embeddings().register_forward_pre_hook(lambda _, args: firsts.update(args[0][:, 0].tolist()))
    targets = {"targets": ["re:.*q_proj$"], "pattern": "2:4"}
    mapping = {
        "model": str(folder),
        "calibration": {"dataset": str(text), "samples": 4, "sequence_length": 16, "bos": bos},
        "evaluation": {"perplexity": {"dataset": str(text), "sequence_length": 16, "windows": 2, "bos": bos}},
        "prune_stage": {"prune_modifiers": {"WandaPruningModifier": targets}},
        "output": {"path": str(tmp_path / "out"), "format": "dense"},
    }
    armor_recipes.apply(mapping, model=loaded)
    assert (firsts == {256}) == (bos == "auto")
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    (row,) = manifest["calibration"]
    assert (row["bos"], row["end_of_text"]) == (prefix, 257)
    assert [manifest["evaluation"][when]["bos"] for when in ("before", "after")] == [prefix, prefix]
