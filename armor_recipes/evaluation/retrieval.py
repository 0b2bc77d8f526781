"""Retrieval: whether the document that belongs to a query is the nearest one by the cosine of their embeddings.

An embedding is one vector pooled from the last hidden states of the model without its head. Every document of the dataset is
ranked for every query; documents with equal text are one, and a document that is as near as the right one counts as nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from armor_recipes.compute import plain_torch
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation.classification import rate
from armor_recipes.evaluation.contract import Measure, Measurement, Reading, Room, Value
from armor_recipes.evaluation.intervals import bootstrap
from armor_recipes.evaluation.outputs import inference, outputs
from armor_recipes.evaluation.samples import Texts, hash_with, table, text_of, tokenised
from armor_recipes.model.facts import model_facts
from armor_recipes.model.replay import parameters_of
from armor_recipes.recipe.schema import RetrievalSpec, Strict

Pooling = Literal["mean", "cls", "last"]
#: Recall among 10 says something of more documents than these.
_FEW_DOCUMENTS = 10
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Retrieval(Measure[RetrievalSpec]):
    """Recall and mean reciprocal rank; `relevant` `(Q,)` int64 are the places of the queries' documents."""

    name: ClassVar[str] = "retrieval"
    spec_type: ClassVar[type[Strict]] = RetrievalSpec
    queries: Texts
    documents: Texts
    relevant: Tensor
    spec: RetrievalSpec

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Only a model that reads one text has an embedding of it."""
        if "input_ids" not in parameters_of(model) or model_facts(model).encoder_decoder:
            raise PlanError(
                f"evaluation.retrieval: {type(model).__name__} does not make one sequence of hidden states of a text, so that "
                "there is no embedding; give an encoder or a decoder of text"
            )

    @classmethod
    def read(cls, spec: RetrievalSpec, reading: Reading) -> Self:
        """Read queries and documents."""
        columns = ((spec.query_column, "query_column"), (spec.document_column, "document_column"))
        rows = table(spec.dataset, spec.split, columns, spec.samples)
        asked, there = ([text_of(row[n], key) for row in rows] for n, (_, key) in enumerate(columns))
        places = {text: place for place, text in enumerate(dict.fromkeys(there))}
        if len(places) < 2:
            raise InputError(f"{spec.dataset} has {len(places)} different documents; retrieval needs two or more")
        queries, documents = (
            tokenised([prompt + text for text in texts], reading, length=spec.sequence_length, dataset=spec.dataset)
            for prompt, texts in ((spec.query_prompt, asked), (spec.document_prompt, list(places)))
        )
        return cls(queries, documents, torch.tensor([places[text] for text in there]), spec)

    @property
    def sha256(self) -> str:
        """Of queries and documents, and which of these each query asks for."""
        return hash_with(f"{self.queries.hash()} {self.documents.hash()}", *self.relevant.tolist())

    @plain_torch()
    def after(self, model: nn.Module, room: Room) -> Measurement:
        """Embed queries and documents, and rank these."""
        queries, documents = (self._embedded(model, texts, room) for texts in (self.queries, self.documents))
        ranks = ranks_of(queries, documents, self.relevant)
        tops = (1, 10) if len(documents) > _FEW_DOCUMENTS else (1,)
        reciprocal = 1 / ranks.double().numpy()
        return Measurement(
            (
                *(rate(f"recall_at_{k}", int((ranks <= k).sum()), len(ranks)) for k in tops),
                Value("mean_reciprocal_rank", float(np.mean(reciprocal)), bootstrap(reciprocal)),
            ),
            (self.spec.dataset,),
            len(ranks),
            self.sha256,
            {
                "documents": len(documents),
                "pooling": self.spec.pooling,
                "texts_cut": self.queries.cut + self.documents.cut,
            },
            {
                **{f"recall_at_{k}": tuple((ranks <= k).double().tolist()) for k in tops},
                "mean_reciprocal_rank": tuple(reciprocal.tolist()),
            },
        )

    def _embedded(self, model: nn.Module, texts: Texts, room: Room) -> Tensor:
        """Embeddings `(N, H)` of length 1, float64, on the CPU."""
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        body = getattr(model, "base_model", model)
        done = 0
        with inference(body):
            for places, batch in texts.batches(self.spec.batch_size):
                hidden = outputs(body, batch).get("last_hidden_state")
                if hidden is None or hidden.ndim != 3:
                    raise InputError(f"evaluation.retrieval: {type(body).__name__} gives no last hidden states to pool")
                for place, vector in zip(places, pooled(hidden, self.spec.pooling).cpu(), strict=True):
                    rows[place] = vector
                done += len(places)
                if room.on_progress is not None:
                    room.on_progress(done, len(texts))
        found = torch.stack(rows)
        lengths = found.norm(dim=1, keepdim=True)
        if not bool(found.isfinite().all()) or not bool(lengths.all()):
            raise NumericalError(f"{self.spec.dataset}: an embedding is zero, or not finite, and has no direction")
        embeddings: Tensor = found / lengths
        return embeddings


def pooled(hidden: Tensor, pooling: Pooling) -> Tensor:
    """One float64 vector `(B, H)` of hidden states `(B, L, H)` without padding: their mean, the first, or the last."""
    match pooling:
        case "mean":
            return hidden.double().mean(1)
        case "cls":
            return hidden[:, 0].double()
        case "last":
            return hidden[:, -1].double()


def ranks_of(queries: Tensor, documents: Tensor, relevant: Tensor) -> Tensor:
    """The place, from 1, of each query's document: embeddings `(Q, H)` and `(D, H)`, `relevant` `(Q,)`; equals count as nearer."""
    ranks = []
    for some, right in zip(queries.split(_QUERIES_AT_ONCE), relevant.split(_QUERIES_AT_ONCE), strict=True):
        scores = some @ documents.T
        ranks.append((scores >= scores.gather(1, right[:, None])).sum(1))
    return torch.cat(ranks)
