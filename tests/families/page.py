"""Makes docs/support.md and expected.json of a folder of records: `python -m tests.families.page FOLDER`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import transformers

from tests.families.pipeline import Record, read_record
from tests.families.structures import EXPECTED, Structure, structures

PAGE = Path(__file__).parents[2] / "docs/support.md"
#: Families that the tests of vLLM run (docs/serving.md); none of the others was tried there.
SERVED = {"llama", "mixtral", "phi3", "qwen2", "qwen3_moe"}
UNMADE = "no small config or inputs with which transformers runs it are known to the tests"
WORDS = {"right": "yes", "skip": "with `unfit: skip`", "refused": "refused", "failed": "fails", "WRONG": "**wrong**"}
HEAD = """# Which models are supported

What became of a tiny random model of every family that transformers {version} has, with ARMOR at block 8 on every linear layer of
its repeated blocks: applied, loaded by `armor_recipes.load` and by `from_pretrained` of its class, compared bit for bit with the
model in memory, let generate, saved again, exported to dense and run in a process without this package. `make test-families` does
it again; this page and what is expected of each family are made of its records.

**Taken** is the share of the numbers in matrices of repeated blocks that were packed. **Loads** names what reads the result: `load`
and `from_pretrained` the checkpoint (with this package imported), `dense` is transformers alone on what
`armor export FOLDER OUT --to dense` makes of it. **vLLM** is `tested` where the tests of [the server](serving.md) run the family;
the others were not tried there.

"""


def main() -> None:
    """Write both files. Structures without a record are listed as not run yet."""
    folder = Path(sys.argv[1])
    records = {s: record for s in structures() if (record := read_record(s, folder)) is not None}
    rows = {str(s): [r.outcome, r.step, plain(r.reason)[:120]] for s, r in records.items() if r.outcome != "right"}
    EXPECTED.write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(rows.items())) + "\n}\n",
        encoding="utf-8",
    )
    PAGE.write_text(page(records), encoding="utf-8")


def page(records: Mapping[Structure, Record]) -> str:
    """The whole page."""
    run = {s: r for s, r in records.items() if r.outcome != "unavailable"}
    lines = [HEAD.format(version=transformers.__version__), *summary(run), *table(run), *unavailable(records)]
    return "\n".join(lines) + "\n"


def summary(run: Mapping[Structure, Record]) -> Iterator[str]:
    """How many of each outcome."""
    counts = {word: sum(r.outcome == outcome for r in run.values()) for outcome, word in WORDS.items()}
    yield (
        f"Of {len(run)} structures: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count) + ".\n"
    )


def table(run: Mapping[Structure, Record]) -> Iterator[str]:
    """A row for each structure that transformers can make and run."""
    yield "| model type | class | works | taken | loads | vLLM | notes |"
    yield "|---|---|---|---:|---|---|---|"
    for structure, record in sorted(run.items()):
        cells = (
            str(structure),
            record.model_class,
            WORDS[record.outcome],
            f"{record.share:.0%}",
            loads(record),
            vllm(structure, record),
            notes(record),
        )
        yield "| " + " | ".join(cells) + " |"


def loads(record: Record) -> str:
    """Which loaders were right."""
    steps = {"load": "load", "stock_load": "from_pretrained", "export": "dense"}
    return ", ".join(word for step, word in steps.items() if step in record.steps)


def vllm(structure: Structure, record: Record) -> str:
    """Whether a server was tried."""
    return (
        "tested" if structure.model_type in SERVED and not structure.model_class and record.outcome == "right" else ""
    )


def notes(record: Record) -> str:
    """Why it is not simply right, and what was not taken."""
    if record.outcome in ("right", "skip"):
        left = list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in record.untaken))
        why = "not called with these inputs" if record.outcome == "right" else "left as they are"
        return f"{why}: " + ", ".join(f"`{n}`" for n in left[:4]) + (", …" if len(left) > 4 else "") if left else ""
    return cell(f"{record.step}: {plain(record.reason)[:160]}")


def cell(text: str) -> str:
    """Text that a table and the page take."""
    return re.sub(r"([|<`*_])", r"\\\1", text)


def plain(reason: str) -> str:
    """A reason without folders, numbers of lines and addresses."""
    text = re.sub(r"(/[\w.-]+)+/", "", reason)
    return re.sub(r" \(\w+\.py:\d+\)", "", text)


def unavailable(records: Mapping[Structure, Record]) -> Iterator[str]:
    """What is no row of the table, by reason."""
    yield "\n## Not in the table\n"
    reasons: dict[str, list[str]] = {}
    missing = [f"`{structure}`" for structure in structures() if structure not in records]
    if missing:
        yield f"- not run yet: {', '.join(missing)}"
    for structure, record in records.items():
        if record.outcome == "unavailable":
            name = f"`{structure}`"
            reason = short(record)
            if reason == UNMADE:
                name += f" ({cell(plain(record.reason)[:90])} …)"
            reasons.setdefault(reason, []).append(name)
    for reason, names in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
        yield f"- {reason}: {', '.join(names)}"


def short(record: Record) -> str:
    """The kind of reason."""
    if package := re.search(r"requires the (\w+) library|No module named '(\w+)'", record.reason):
        return f"needs `{package[1] or package[2]}`"
    if "a part of other models" in record.reason or "no linear weights" in record.reason:
        return record.reason
    if record.step == "read_back":
        return "transformers does not read its own folder again"
    return UNMADE


if __name__ == "__main__":
    main()
