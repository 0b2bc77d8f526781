"""What each runtime can load of a run's folder, as far as its configuration and names tell."""

from __future__ import annotations

from typing import Any

from torch import nn

from armor_recipes.plan import first_unservable
from armor_recipes.report.manifest import Facts

#: Numbers of processes that a server is asked about.
_WAYS = (1, 2, 4, 8)
_EXPORT = "after `armor export FOLDER OUT --to dense`"


def load_rows(facts: Facts, model: nn.Module) -> list[dict[str, Any]]:
    """Plain data for report.json: `runtime`, whether it `loads` the folder as it is, and `how`, or why not.

    `model` is on the meta device. What a server makes of packed layers of a model that came packed is not known, and left out.
    """
    packed = any(result.packed is not None for result in facts.modules.values())
    plain = facts.recipe.is_theirs or bool(facts.caches)
    plain = plain or any(result.quantized is not None for result in facts.modules.values())
    if packed:
        stock = (False, f"it stops with an error; {_EXPORT}")
    else:
        stock = (True, "by its own compressed-tensors integration" if plain else "as any dense model")
    rows = [
        ("transformers with `import armor_recipes`", True, "`from_pretrained`, or `armor_recipes.load`"),
        ("transformers alone", *stock),
    ]
    if not packed:
        rows.append(
            ("vLLM", True, "as transformers alone, where vLLM has the architecture and kernels for the formats")
        )
    elif not facts.plan.given:
        problem = first_unservable(facts.recipe, model, facts.plan, 1)
        ways = [n for n in _WAYS if not problem and first_unservable(facts.recipe, model, facts.plan, n) is None]
        how = f"over {', '.join(map(str, ways))} processes, where vLLM has the architecture"
        rows.append(("vLLM with this package's plugin", not problem, f"{problem}; or {_EXPORT}" if problem else how))
    dense = not (packed or plain)
    rows.append(("llama.cpp's converter", dense, "as any dense model" if dense else _EXPORT))
    return [{"runtime": runtime, "loads": loads, "how": how} for runtime, loads, how in rows]
