"""The pages of the documentation and their code blocks."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
#: What README.md and the tutorial call `first.yaml`: other pages go on with it.
TUTORIAL = ROOT / "docs" / "tutorial.md"
RECIPES = tuple(sorted((ROOT / "recipes").glob("*.yaml")))
#: A recipe as llm-compressor writes it beside a checkpoint.
FROM_LLM_COMPRESSOR = """\
default_stage:
  default_modifiers:
    NoWagModifier: {requires_calibration_data: true, targets: ['re:.*_proj$']}
"""
_BLOCK = re.compile(
    r"(?:^ *<!-- run by (?P<tag>[^>]*) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page. `tag` names the targets of the Makefile that run it; without one the tests of `tests/docs` do."""

    page: Path
    line: int
    language: str
    text: str
    tag: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str, page: Path | None = None) -> list[Block]:
    """All blocks in these languages, of one page or of all."""
    found = []
    for path in PAGES if page is None else (page,):
        text = path.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("language")) + 1
                found.append(Block(path, line, match["language"], textwrap.dedent(match["text"]), match["tag"]))
    return found


def first_recipe() -> str:
    """The text of `first.yaml`."""
    return named_recipes(TUTORIAL)["first.yaml"]


def named_recipes(page: Path) -> dict[str, str]:
    """The recipes of a page that its first line gives a file name (`# NAME.yaml`), by that."""
    found = [(re.match(r"# ([\w-]+\.yaml)\n", block.text), block.text) for block in blocks("yaml", page=page)]
    return {match[1]: text for match, text in found if match}


def without_blocks(page: Path) -> str:
    """A page's prose."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def section(page: Path, heading: str) -> str:
    """What stands under a `## ` heading, up to the next one."""
    text = page.read_text(encoding="utf-8")
    assert f"\n## {heading}\n" in text, f"{page} has no section {heading!r}"
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def lines(block: Block) -> list[str]:
    """The commands of a shell block, continued lines joined, comments dropped."""
    whole = [line.split("  #")[0].strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in whole if line and not line.startswith("#")]


def commands() -> list[tuple[str, str]]:
    """(place, command) for every line of the shell blocks."""
    return [(str(block), line) for block in blocks("bash") for line in lines(block)]


def inline_commands() -> list[tuple[str, str]]:
    """(page, command) for every complete `armor…` command in running text; not names of verbs, nor with placeholders."""
    found = []
    for page in PAGES:
        for span in re.findall(r"`(armor-apply [^`]+|armor \w+ [^`]+)`", without_blocks(page)):
            if not re.search(r"\b[A-Z]{2,}\b|[\[…]", span):
                found.append((str(page.relative_to(ROOT)), span))
    return found


def planned_model(model: str, folder: Path, packed: Path | None = None) -> str:
    """A recipe's model where it is built in; `packed` for an output that a recipe goes on from; else a folder with the shapes of
    SmolLM2-135M, which may not have been fetched.
    """
    if model.startswith("builtin:"):
        return model
    if packed and model.startswith("out/"):
        return str(packed)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaConfig(**sizes, **heads, tie_word_embeddings=True, dtype="bfloat16").save_pretrained(folder)
    return str(folder)
