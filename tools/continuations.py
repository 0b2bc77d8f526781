"""Write a set for `evaluation.multiple_choice`: which of four pieces follows a passage, of texts of one's own.

    python tools/continuations.py notes/*.txt --count 500 --output continuations.jsonl

`builtin:continuations` is made in the same way of `builtin:pydoc-heldout`, with 1,000 questions and seed 0, whenever it is read;
without texts this writes that one. Each file is a document, and false pieces come from other documents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from armor_recipes import builtin
from armor_recipes.builtin.continuations import questions


def main(arguments: list[str] | None = None) -> None:
    """Read the texts, and write the questions as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, help="files of text in UTF-8, two or more")
    parser.add_argument("--count", type=int, default=1000, help="questions (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which passages and which false pieces (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    given = parser.parse_args(arguments)
    texts = [text.read_text(encoding="utf-8") for text in given.texts] or builtin.documents("pydoc-heldout")
    rows = questions(texts, given.count, seed=given.seed)
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
