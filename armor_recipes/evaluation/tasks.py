"""Tasks of lm-eval, measured by lm-eval itself of a model of ours: `pip install 'armor-recipes[eval]'`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from armor_recipes.errors import InputError, PlanError
from armor_recipes.evaluation.contract import Measurement, Value
from armor_recipes.evaluation.intervals import NORMAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> Measurement:
    """What lm-eval finds for each task, as `TASK METRIC`, with its standard error times 1.96 to both sides.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names that lm-eval knows, or those of the YAML files in `include`.
        include: a folder of tasks of one's own, which win over lm-eval's.
        batch_size: texts in one forward pass.
        limit: the first so many samples of each task; None takes all.

    Raises:
        PlanError: lm-eval is not installed.
        InputError: there is no such task, or lm-eval cannot measure it (its data are not here, say).

    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PlanError(
            f"--tasks hands over to lm-eval, which is not here ({error}): pip install 'armor-recipes[eval]'"
        ) from error
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so that lm-eval cannot give it text; add one")
    try:
        manager = TaskManager(include_path=None if include is None else str(include))
        _check_known(tasks, manager.all_tasks)
        with torch.random.fork_rng(devices=[]):
            found = lm_eval.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=True,
            )
    except InputError:
        raise
    except Exception as error:  # lm-eval's and datasets' own errors share no base class
        raise InputError(f"lm-eval cannot measure {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    assert found is not None, "of the first rank there is a result"
    return _measurement(found, tasks)


def _check_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            raise InputError(
                f"--tasks {task}: lm-eval has no such task (`lm-eval ls tasks` lists them); one of your own is named in a YAML "
                "file of the folder that --include names"
            )


def _measurement(found: Mapping[str, Any], tasks: Sequence[str]) -> Measurement:
    """Every number that lm-eval calls a metric (`acc,none`), in its order."""
    values = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, float | int):
                name = f"{task} {metric}" if kind == "none" else f"{task} {metric},{kind}"
                values.append(
                    Value(name, float(value), _interval(float(value), figures.get(f"{metric}_stderr,{kind}")))
                )
    samples = dict(sorted(found["samples"].items()))
    docs = {task: [row["doc_hash"] for row in rows] for task, rows in samples.items()}
    return Measurement(
        tuple(values),
        tuple(tasks),
        sum(map(len, samples.values())),
        hashlib.sha256(json.dumps(docs).encode()).hexdigest(),
        {"lm_eval": str(found["lm_eval_version"])},
    )


def _interval(value: float, error: Any) -> tuple[float, float] | None:
    return (value - NORMAL * error, value + NORMAL * error) if isinstance(error, float) else None
