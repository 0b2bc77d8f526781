from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation import Measurement, Reading, Room
from armor_recipes.evaluation.retrieval import Retrieval, pooled, ranks_of
from armor_recipes.recipe.schema import RetrievalSpec
from tests.evaluation.test_classification import MODEL, no_inputs
from tests.support.engine import make_model
from tests.support.tokenizers import byte_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ("stone", "river", "cloud", "grass", "light", "metal", "paper", "field", "ocean", "flame", "bread", "glass")


@pytest.fixture(scope="module")
def bert() -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=300, **SIZES)).eval()


def read(folder: Path, *pairs: tuple[str, str], **keys: Any) -> Retrieval:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"query": query, "document": document}) for query, document in pairs))
    return Retrieval.read(RetrievalSpec(dataset=str(path), **keys), Reading(byte_tokenizer(), MODEL, no_inputs))


def measured(measure: Retrieval, model: torch.nn.Module) -> Measurement:
    return measure.after(model, Room(Path()))


def test_a_text_is_nearest_to_itself(tmp_path: Path, bert: BertModel) -> None:
    found = measured(read(tmp_path, *((word, word) for word in WORDS)), bert)
    assert {value.name: value.value for value in found.values} == {
        "recall_at_1": 1.0,
        "recall_at_10": 1.0,
        "mean_reciprocal_rank": 1.0,
    }
    assert found.size == "12 samples (documents 12, pooling mean)"
    assert {value.name: value.value for value in found.against(found)} == {
        "recall_at_1_difference": 0.0,
        "recall_at_10_difference": 0.0,
        "mean_reciprocal_rank_difference": 0.0,
    }
    assert {name: np.mean(row) for name, row in found.rows.items()} == {v.name: v.value for v in found.values}


def test_plain_text_has_no_queries(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("One text.")
    for dataset in (str(tmp_path / "notes.txt"), "builtin:speeches"):
        with pytest.raises(InputError, match="is plain text and has no `query_column`"):
            Retrieval.read(RetrievalSpec(dataset=dataset, samples=1), Reading(byte_tokenizer(), MODEL, no_inputs))


def test_what_each_query_asks_for_is_hashed(tmp_path: Path) -> None:
    pairs = [("a", "one"), ("b", "two")]
    first, same, other = (read(tmp_path, *pairs), read(tmp_path, *pairs), read(tmp_path, *pairs, ("c", "one")))
    crossed = read(tmp_path, *pairs, ("c", "two"))
    assert first.sha256 == same.sha256
    assert len({first.sha256, other.sha256, crossed.sha256}) == 3


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_against_embeddings_one_by_one(tmp_path: Path, bert: BertModel, pooling: Any) -> None:
    pairs = [(f"a {word}", f"about the {other}") for word, other in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)]
    measure = read(tmp_path, *pairs, pooling=pooling, batch_size=3)
    found = measured(measure, bert)

    def embedding(text: str) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            hidden = bert(**byte_tokenizer()(text, return_tensors="pt")).last_hidden_state[0].double()
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling].numpy()
        return np.asarray(vector / np.linalg.norm(vector))

    queries, documents = (np.stack([embedding(pair[side]) for pair in pairs]) for side in (0, 1))
    ranks = 1 + ((scores := queries @ documents.T) > scores.diagonal()[:, None]).sum(1)
    assert found["mean_reciprocal_rank"].value == pytest.approx((1 / ranks).mean())
    assert found["recall_at_1"].value == (ranks == 1).mean()
    assert found["recall_at_10"].value == (ranks <= 10).mean()
    assert found == measured(measure, bert)


def test_queries_may_share_a_document_and_prompts_come_first(tmp_path: Path, bert: BertModel) -> None:
    measure = read(tmp_path, ("a", "x"), ("b", "y"), ("c", "x"), query_prompt="q: ", document_prompt="d: ")
    assert (len(measure.queries), len(measure.documents), measure.relevant.tolist()) == (3, 2, [0, 1, 0])
    assert len(measure.queries.rows[0]["input_ids"]) == len(measure.documents.rows[0]["input_ids"]) == 4
    found = measured(measure, bert)
    assert [value.name for value in found.values] == ["recall_at_1", "mean_reciprocal_rank"]


def test_a_causal_model_is_embedded_without_its_head(tmp_path: Path) -> None:
    model = make_model()
    model.resize_token_embeddings(300, mean_resizing=False)
    found = measured(read(tmp_path, *((word, word) for word in WORDS), pooling="last"), model)
    assert found["recall_at_1"].value == 1.0


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 10**6))
def test_ranks_lie_among_the_documents_and_equals_count_as_nearer(queries: int, documents: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    asked, there = (torch.randint(-2, 3, (n, 3), generator=generator).double() for n in (queries, documents))
    relevant = torch.randint(documents, (queries,), generator=generator)
    ranks = ranks_of(asked, there, relevant)
    scores = asked @ there.T
    expected = [sum(bool(s >= row[right]) for s in row) for row, right in zip(scores, relevant, strict=True)]
    assert ranks.tolist() == expected
    assert 1 <= int(ranks.min()) <= int(ranks.max()) <= documents
    assert ranks_of(asked, torch.ones(documents, 3).double(), relevant).tolist() == [documents] * queries


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    found = {name: pooled(hidden, name).tolist() for name in ("mean", "cls", "last")}  # type: ignore[arg-type]
    assert found == {"mean": [[2.0, 4.0]], "cls": [[1.0, 2.0]], "last": [[3.0, 6.0]]}


def test_what_will_not_do(tmp_path: Path, bert: BertModel) -> None:
    with pytest.raises(InputError, match="1 different documents; retrieval needs two or more"):
        read(tmp_path, ("a", "x"), ("b", "x"))
    with pytest.raises(InputError, match=r"pairs.jsonl:2: `query_column` holds an empty text"):
        read(tmp_path, ("a", "x"), ("", "y"))
    with pytest.raises(InputError, match="no column 'question'; set `query_column`"):
        read(tmp_path, ("a", "x"), query_column="question")
    measure = read(tmp_path, ("a", "x"), ("b", "y"))
    with torch.random.fork_rng():
        broken = BertModel(BertConfig(vocab_size=300, **SIZES))
    broken.encoder.layer[0].output.LayerNorm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="an embedding is zero, or not finite"):
        measured(measure, broken)


def test_models_without_embeddings_of_a_text_are_refused(bert: BertModel) -> None:
    Retrieval.check(bert)
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        vit = ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4))
    for model in (t5, vit):
        with pytest.raises(PlanError, match=f"evaluation.retrieval: {type(model).__name__} does not make one sequence"):
            Retrieval.check(model)
