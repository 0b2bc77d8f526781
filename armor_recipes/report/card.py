"""The model card: base model, licence, recipe and figures, for whoever finds the folder."""

from __future__ import annotations

import yaml

from armor_recipes.modifiers.kinds.module import GIVEN, ModulePlan
from armor_recipes.recipe.llmcompressor import ROTATING
from armor_recipes.report.evaluation import evaluation_rows
from armor_recipes.report.licence import Licence
from armor_recipes.report.manifest import Facts, sections


def model_card(facts: Facts, licence: Licence, *, base_model: str | None) -> str:
    """Markdown with the front matter that the hub reads. Depends on the run's inputs alone, and names no path of this machine.

    `base_model` is the hub id of the dense model; None leaves it out, since the hub refuses anything else.
    """
    name = base_model or facts.model_name
    patterns = sorted({module.pattern for module in facts.plan.stored.values() if module.pattern is not None})
    named = ", ".join(patterns) or "N:M"
    header = {
        **licence.fields,
        **({} if base_model is None else {"base_model": base_model, "base_model_relation": "quantized"}),
        "library_name": "transformers",
        "tags": ["llmcompressor"] if facts.recipe.is_theirs else ["armor", *patterns, "sparse", "compressed-tensors"],
    }
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---
{_by_llmcompressor(name, facts) if facts.recipe.is_theirs else _pruned(name, named, facts)}
{_evaluation(facts)}
{_dense_note(facts)}{_skipped_note(facts)}{_refined_note(facts)}{_changed_note(facts)}
## Use

{_usage(facts)}

## Recipe

```yaml
{facts.shared_recipe().strip()}
```

## Licence

{licence.sentence}
"""


def _pruned(name: str, named: str, facts: Facts) -> str:
    """The title, what was done, and what the weights take."""
    totals = facts.totals
    given = f"{facts.plan.bytes_given} | " if facts.plan.given else ""
    return f"""# {name}, pruned to {named}

Made with [armor-recipes](https://pypi.org/project/armor-recipes/) from `{name}`: {totals.modules} linear
weights in {named} sparsity, each written as `A · S · B` with a core S in that pattern and block-diagonal A and B (ARMOR, arXiv
2510.05528), or plainly pruned
where the recipe says so. The recipe is in `recipe.yaml`, hashes and losses in `armor_manifest.json`.

{_heading(facts)}
| bytes of those weights | {totals.bytes_before} | {given}{totals.bytes_after} |"""


def _heading(facts: Facts) -> str:
    """The head of the table: a compressed model has a column of its own between the dense one and the result."""
    names = ["dense", *(["the compressed model it was made from"] if facts.plan.given else []), "this checkpoint"]
    return f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}"


def _by_llmcompressor(name: str, facts: Facts) -> str:
    """The same of a recipe that llm-compressor ran."""
    kinds = ", ".join(f"`{step.kind}`" for step in facts.recipe.steps)
    rotating = (
        f"\n\n**{ROTATING[0].upper()}{ROTATING[1:]}.**" if any(step.rotates for step in facts.recipe.steps) else ""
    )
    return f"""# {name}, compressed by llm-compressor

Made with [armor-recipes](https://pypi.org/project/armor-recipes/) from `{name}`: all modifiers of the recipe ({kinds}) ran in
llm-compressor's own `oneshot`, which wrote the weights. The recipe is in `recipe.yaml`, hashes in `armor_manifest.json`.{rotating}

| | dense | this checkpoint |
|---|---|---|"""


def _evaluation(facts: Facts) -> str:
    """Rows of what was measured before and after."""
    if not facts.evaluations:
        return "\nNothing was evaluated: the recipe has no `evaluation`."
    dense = "| " if facts.plan.given else ""
    return "\n".join(
        f"| {name} {dense}| {before} | {after} |" for name, before, after, _ in evaluation_rows(facts.evaluations)
    )


def _dense_note(facts: Facts) -> str:
    """What is said of weights without factors in the checkpoint: plainly pruned or quantised ones, and products A·S·B."""
    stored = facts.plan.stored
    rows = [stored[name] for name, result in facts.modules.items() if result.packed is None]
    quantized = sum(row.stored_as == "quantized" for row in rows)
    folded = sum(row.stored_as != "quantized" and row.block_size not in _plain_sizes(row) for row in rows)
    masked = len(rows) - quantized - folded
    notes = [f"\n{masked} of these weights are stored dense (zeros kept where they were pruned).\n"] if masked else []
    if quantized:
        notes.append(f"\n{quantized} of these weights are quantised, in formats of compressed-tensors.\n")
    if folded:
        notes.append(
            f"\n{folded} of these weights are stored as the dense product `A · S · B`: their factors are not in the checkpoint, "
            "and the product has no zeros, so it is no smaller and no faster than the original.\n"
        )
    return "".join(notes)


def _plain_sizes(row: ModulePlan) -> tuple[tuple[int, int] | None, ...]:
    """Block sizes of weights without factors: a compressed model's core of block size 1 has none, and keeps zeros when dense."""
    return (None, (1, 1)) if row.modifier == GIVEN else (None,)


def _skipped_note(facts: Facts) -> str:
    """How many targeted modules were left as they are."""
    count = len(dict.fromkeys(one.name for one in facts.plan.skipped))
    if not count:
        return ""
    return f"\n{count} targeted modules were left as they are; `armor_manifest.json` says which and why, under `skipped`.\n"


def _refined_note(facts: Facts) -> str:
    """What was trained afterwards, and by what."""
    names = dict.fromkeys(row["modifier"].split(".", 2)[-1] for row in sections(facts.results)["refinements"])
    count = sum(bool(result.refined) for result in facts.modules.values())
    return f"\nThe factors of {count} of these weights were trained afterwards: {', '.join(names)}.\n" if names else ""


def _changed_note(facts: Facts) -> str:
    """Which cores are integers, and what made them so."""
    changes = [change for result in facts.modules.values() for change in result.changes[-1:]]
    kinds = sorted({f"{change.core} by {change.modifier.split('.', 2)[-1]}" for change in changes})
    return f"\nThe kept values of {len(changes)} of these weights were stored as {', '.join(kinds)}.\n" if kinds else ""


def _usage(facts: Facts) -> str:
    load = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)"
    if all(result.packed is None for result in facts.modules.values()):
        return f"```python\n{load}\n```"
    return (
        f"```python\nimport armor_recipes  # makes the format known to transformers\n{load}\n```\n\n"
        "Without the package every stock loader raises; `ignore_mismatched_sizes=True` asks for new, random weights: do not use it."
    )
