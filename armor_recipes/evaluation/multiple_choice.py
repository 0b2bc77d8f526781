"""Multiple choice: how often the right one of several continuations is the likeliest.

The log-likelihood of a choice c after a context x is Σ log p(token of c | x and the tokens of c before it), in nats. The likeliest
choice is the one with the largest, or with the largest a byte of c. x and c are tokenised together, and what goes beyond the
tokens of x is c's, as lm-eval does; x begins with what the tokenizer puts before a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from armor_recipes.calibration.encoding import encoded
from armor_recipes.calibration.files import Cell, Column, Columns
from armor_recipes.calibration.inputs import TOKENS
from armor_recipes.calibration.text import cells, encodable
from armor_recipes.calibration.windows import check_vocabulary, window_prefix
from armor_recipes.compute import plain_torch
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation.classification import rate
from armor_recipes.evaluation.contract import Measure, Measurement, Reading, Room
from armor_recipes.evaluation.outputs import inference, outputs, vocabulary
from armor_recipes.evaluation.perplexity import fitting_batch, why_none
from armor_recipes.evaluation.samples import Texts, first_rows, hash_with
from armor_recipes.recipe.schema import MultipleChoiceSpec, Strict


@dataclass(frozen=True, slots=True)
class Question:
    """A context, its choices, and the place of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True, eq=False)
class MultipleChoice(Measure[MultipleChoiceSpec]):
    """Accuracy on questions; `texts` are all contexts with each of their choices, which are the last `ends` of their tokens."""

    name: ClassVar[str] = "multiple_choice"
    spec_type: ClassVar[type[Strict]] = MultipleChoiceSpec
    questions: tuple[Question, ...]
    texts: Texts
    ends: tuple[int, ...]
    spec: MultipleChoiceSpec

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Only a model that predicts the next token of a text says how likely one is."""
        reason = why_none(model)
        if reason:
            raise PlanError(
                f"evaluation.multiple_choice: {type(model).__name__} {reason}, so that no choice has a likelihood; measure "
                "`fidelity` to the dense model instead"
            )

    @classmethod
    def read(cls, spec: MultipleChoiceSpec, reading: Reading) -> Self:
        """Read and tokenise the questions. Raises InputError."""
        names = (
            (spec.context_column, "context_column"),
            (spec.choices_column, "choices_column"),
            (spec.answer_column, "answer_column"),
        )
        columns = Columns(tuple(Column(*each) for each in names))
        rows = first_rows(spec.dataset, cells(spec.dataset, spec.split, columns), spec.samples)
        questions = tuple(map(question_of, rows))
        prefix = window_prefix(
            "auto", reading.tokenizer, length=spec.sequence_length, vocab_size=reading.model.vocabulary
        )
        ids, ends, cut = [], [], 0
        for row, (context, choices) in zip(rows, _tokens(questions, reading), strict=True):
            start = [*prefix, *context] or _start(reading, row)
            most = spec.sequence_length - max(1, len(prefix))
            for choice in choices:
                if not len(choice):
                    raise InputError(
                        f"{row.where}: the tokenizer makes no token of a choice behind its context; correct or remove the row"
                    )
                room = spec.sequence_length - len(choice)
                if len(choice) > most:
                    raise InputError(
                        f"{row.where}: a choice has {len(choice)} tokens, and may have {most} with `sequence_length` "
                        f"{spec.sequence_length}; raise that, or remove the row"
                    )
                cut += len(start) > room
                kept = start if len(start) <= room else [*prefix, *start[len(start) - room + len(prefix) :]]
                ids.append({TOKENS: [*kept, *choice]})
                ends.append(len(choice))
        check_vocabulary(torch.tensor([max(row[TOKENS]) for row in ids]), reading.model.vocabulary, spec.dataset)
        return cls(questions, Texts(tuple(ids), cut), tuple(ends), spec)

    @property
    def sha256(self) -> str:
        """Of contexts with choices, where each begins, how many a question has, and which are right."""
        right = [(len(question.choices), question.answer) for question in self.questions]
        return hash_with(self.texts.hash(), *self.ends, *(number for pair in right for number in pair))

    @property
    def tokens(self) -> int:
        """Of all contexts with each of their choices."""
        return sum(len(row[TOKENS]) for row in self.texts.rows)

    @plain_torch()
    def after(self, model: nn.Module, room: Room) -> Measurement:
        """Score every choice. Raises NumericalError where one's log-likelihood is not finite."""
        scores = self._scores(model, room)
        hits: dict[str, list[float]] = {"accuracy": [], "accuracy_by_bytes": []}
        for question, own in zip(
            self.questions, scores.split([len(each.choices) for each in self.questions]), strict=True
        ):
            sizes = torch.tensor([len(choice.encode()) for choice in question.choices], dtype=torch.float64)
            for figures, given in zip(hits.values(), (own, own / sizes), strict=True):
                others = given[[place for place in range(len(given)) if place != question.answer]]
                figures.append(float(given[question.answer] > others.max()))
        return Measurement(
            tuple(rate(name, int(sum(row)), len(row)) for name, row in hits.items()),
            (self.spec.dataset,),
            len(self.questions),
            self.sha256,
            {"choices": len(self.texts), "texts_cut": self.texts.cut, **self._repeated()},
            {name: tuple(row) for name, row in hits.items()},
        )

    def _repeated(self) -> dict[str, int]:
        """How many right answers stand among their choices twice, which no model can then tell apart; nothing for none."""
        count = sum(each.choices.count(each.choices[each.answer]) > 1 for each in self.questions)
        return {"answers_that_stand_twice": count} if count else {}

    def _scores(self, model: nn.Module, room: Room) -> Tensor:
        """The log-likelihood of every choice in nats, float64 `(N,)` on the CPU."""
        scores, done = torch.zeros(len(self.texts), dtype=torch.float64), 0
        longest = max(len(row[TOKENS]) for row in self.texts.rows)
        with inference(model):
            for places, batch in self.texts.batches(fitting_batch(self.spec.batch_size, longest, vocabulary(model))):
                logits = outputs(model, batch).get("logits")
                if logits is None or logits.ndim != 3:
                    raise InputError(f"evaluation.multiple_choice: {type(model).__name__} gives no logits of tokens")
                for place, row, ids in zip(places, logits, batch[TOKENS], strict=True):
                    end = self.ends[place]
                    losses = functional.cross_entropy(
                        row[-end - 1 : -1].float(), ids[-end:].to(row.device), reduction="none"
                    )
                    scores[place] = -losses.double().sum().cpu()
                done += len(places)
                if room.on_progress is not None:
                    room.on_progress(done, len(self.texts))
        if not bool(scores.isfinite().all()):
            raise NumericalError(f"{self.spec.dataset}: the log-likelihood of a choice is not finite")
        return scores


def question_of(row: Cell) -> Question:
    """What a row asks. Raises InputError."""
    assert isinstance(row.value, tuple)
    context, choices, answer = row.value
    if not isinstance(context, str):
        raise InputError(f"{row.where}: the context is {context!r:.80}, not text; correct or remove the row")
    if (
        not isinstance(choices, list | tuple)
        or len(choices) < 2
        or not all(isinstance(one, str) and one for one in choices)
    ):
        raise InputError(
            f"{row.where}: the choices are {choices!r:.80}, not two texts or more; correct or remove the row"
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(
            f"{row.where}: the answer is {answer!r:.80}, not the number of one of {len(choices)} choices, from 0; correct it"
        )
    for text in (context, *choices):
        encodable(text, row.where)
    return Question(context, tuple(choices), answer)


def _tokens(questions: tuple[Question, ...], reading: Reading) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Of each question the ids of its context, and of each choice those that go beyond them."""
    texts = ((each.context, [each.context + choice for choice in each.choices]) for each in questions)
    for context, together in texts:
        # A space at the end of a context belongs to the word behind it, as in lm-eval.
        own, *all_ids = (ids.tolist() for ids in encoded([context.rstrip(), *together], reading.tokenizer, end=False))
        yield own, [ids[len(own) :] for ids in all_ids]


def _start(reading: Reading, row: Cell) -> list[int]:
    """What the first token of a text without a context is predicted from. Raises InputError where there is nothing."""
    assert reading.tokenizer is not None
    for found in (reading.tokenizer.bos_token_id, reading.tokenizer.eos_token_id):
        if found is not None:
            return [int(found)]
    raise InputError(f"{row.where}: the context is empty, and the tokenizer has no token before a text; give a context")
