"""The site of the documentation, before and after zensical builds it: `make docs`.

    python tools/site.py gather TREE   pages, and the files that they link, with links that fit the site
    python tools/site.py check SITE    no link of the built site leads nowhere, and no page fetches anything

Pages are written to be read in the repository too, where README.md, CONTRIBUTING.md and `examples` lie beside `docs`. The site has
one tree: `docs/` is its root, and README.md its first page.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
FIRST = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
_ROW = re.compile(r"^ *\|.*$", re.MULTILINE)


def place(source: PurePosixPath) -> PurePosixPath:
    """Where a file of the repository is in the site."""
    if source.parts[0] == "docs":
        return PurePosixPath(*source.parts[1:])
    return source.with_name("index.md") if source.name == "README.md" else source


def gather(tree: Path) -> None:
    """Write the tree that the site is built of. Raises `FileNotFoundError` for a link to what is not there."""
    shutil.rmtree(tree, ignore_errors=True)
    waiting = [*map(PurePosixPath, FIRST)]
    waiting += [PurePosixPath(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.*"))]
    done: set[PurePosixPath] = set()
    while waiting:
        source = waiting.pop()
        if source in done:
            continue
        done.add(source)
        written = tree / place(source)
        written.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, written)
        if source.suffix == ".md":
            text, linked = moved(written.read_text(encoding="utf-8"), source)
            written.write_text(text, encoding="utf-8")
            waiting += linked


def moved(text: str, source: PurePosixPath) -> tuple[str, list[PurePosixPath]]:
    """A page as the site has it, and the files of the repository that it links."""
    linked: list[PurePosixPath] = []

    def link(match: re.Match[str]) -> str:
        path = PurePosixPath(os.path.normpath(source.parent / match["path"]))
        linked.append(path / "README.md" if (ROOT / path).is_dir() else path)
        return os.path.relpath(place(linked[-1]), place(source).parent) + (match["anchor"] or "")

    def row(
        match: re.Match[str],
    ) -> str:  # GitHub wants pipes in a table's code escaped, Python-Markdown shows the backslash
        return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), match[0])

    parts = _FENCE.split(text)  # prose, block, prose, …
    parts[::2] = [_ROW.sub(row, _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts), linked


@dataclass
class _Page(HTMLParser):
    """What a page names, links and loads."""

    names: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names.add(found.get("id", ""))
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        self.loads += [found[name] for name in ("src", "srcset") if name in found]
        self.loads += [found["href"]] if tag == "link" and found.get("rel") != "canonical" else []


def complaints(site: Path) -> list[str]:
    """Links of a built site that lead nowhere, and what its pages would fetch from elsewhere, a line each."""
    pages: dict[Path, _Page] = {}
    for file in sorted(site.resolve().rglob("*.html")):
        pages[file] = _Page()
        pages[file].feed(file.read_text(encoding="utf-8"))
    found = []
    for file, page in pages.items():
        found += [f"{file.name}: fetches {url}" for url in page.loads if re.match(r"(https?:)?//", url)]
        for link in page.links if file.name != "404.html" else ():  # whose links begin at the root
            path, _, anchor = unquote(link).partition("#")
            target = (file.parent / path).resolve() if path else file
            if re.match(r"\w+:", link) or (target.exists() and (not anchor or anchor in pages[target].names)):
                continue
            found.append(f"{file.name}: {link} leads nowhere")
    return found


if __name__ == "__main__":
    if sys.argv[1] == "gather":
        gather(Path(sys.argv[2]))
    elif wrong := complaints(Path(sys.argv[2])):
        sys.exit("\n".join(wrong))
