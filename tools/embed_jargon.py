"""Turn the Jargon File into `armor_recipes/builtin/jargon.txt.xz`.

    python tools/embed_jargon.py jargon.txt --output armor_recipes/builtin

`jargon.txt` is the plain-text rendering of version 4.4.7 (29 December 2003), which is in the public domain. Its appendices,
its chapters on style and the first part of its lexicon are kept, one document each; lines are joined into paragraphs, tables
and drawings dropped, and the braces around cross-references removed.
"""

from __future__ import annotations

import argparse
import lzma
import re
from pathlib import Path

#: First and last heading of each document, in the order in which they are kept.
PARTS = (
    ("Appendix A. Hacker Folklore", "Appendix B. A Portrait of J. Random Hacker"),
    ("Appendix B. A Portrait of J. Random Hacker", "Appendix C. Helping Hacker Culture Grow"),
    ("Appendix C. Helping Hacker Culture Grow", "Bibliography"),
    ("Chapter 1. Hacker Slang and Hacker Culture", "Chapter 3. Revision History"),
    ("Chapter 4. Jargon Construction", "Chapter 10. Pronunciation Guide"),
    ("Glossary", "Appendix A. Hacker Folklore"),
)
CHARACTERS = 700_000
DRAWN = re.compile(r"[│┌┐└┘─═├┤]|[+|-]{12}")
SEPARATOR = "\f"


def document(text: str, first: str, last: str) -> str:
    """The text between two headings that stand at the start of a line, as paragraphs separated by blank lines."""
    inside = text[text.index(f"\n{first}\n") : text.index(f"\n{last}\n")]
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", inside) if not DRAWN.search(p))
    return "\n\n".join(re.sub(r"[{}]", "", p) for p in paragraphs if p)


def main() -> None:
    """Write the file and tell its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, default=Path("armor_recipes/builtin"))
    options = parser.parse_args()
    text = "\n" + options.text.read_text(encoding="utf-8").replace("\xa0", " ")
    joined = SEPARATOR.join(document(text, *part) for part in PARTS)
    kept = joined[: joined.rindex("\n\n", 0, CHARACTERS)]
    file = options.output / "jargon.txt.xz"
    file.write_bytes(lzma.compress(kept.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{file}: {kept.count(SEPARATOR) + 1} documents, {len(kept)} characters, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
