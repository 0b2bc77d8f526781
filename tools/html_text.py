"""Plain text of a folder of HTML pages, in the order of their names: `python tools/html_text.py FOLDER OUT.txt`.

The README's held-out figures are measured on the English pages of Debian's packages debian-handbook and anarchism, taken out with
this script (of the latter `usr/share/doc/anarchism/html`):

    apt-get download debian-handbook && dpkg-deb --extract debian-handbook_*.deb handbook
    python tools/html_text.py handbook/usr/share/doc/debian-handbook/html/en-US handbook.txt
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

_HIDDEN = ("script", "style", "head")
_BREAKS = ("p", "li", "h1", "h2", "h3", "h4", "div", "tr")


class _Text(HTMLParser):
    """Collects what a reader sees, a line break before each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        """Enter an element."""
        self.hidden += tag in _HIDDEN
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        self.hidden -= tag in _HIDDEN

    def handle_data(self, data: str) -> None:
        """Take text."""
        if not self.hidden:
            self.parts.append(data)


def page_text(html: str) -> str:
    """The visible text of one page, runs of blanks and of empty lines folded."""
    parser = _Text()
    parser.feed(html)
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", "".join(parser.parts))).strip()


def main() -> None:
    """Convert a folder."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    pages = [page_text(page.read_text(encoding="utf-8")) for page in sorted(folder.glob("*.html"))]
    out.write_text("\n\n".join(pages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
