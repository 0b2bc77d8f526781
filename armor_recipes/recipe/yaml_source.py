"""A safe YAML reader that keeps the place of every key and value, and refuses what would be misread.

YAML 1.1 as PyYAML reads it (so that llm-compressor's recipes mean the same), but for three traps: `1e-4` is a number,
as in YAML 1.2; `010` and `1:30` are text and not numbers in base 8 and 60; dates are text. Tuples and words of
enumerations, as llm-compressor tags them, are lists and words, and nothing is ever called. Of Markdown the front matter
is read, and JSON as the YAML that it is. Refused: duplicate keys, keys that are not text, other tags beyond the plain
types, NaN and infinity, several documents, recursive aliases, aliases that expand beyond 10,000 nodes, nesting beyond
64 levels, files over 1 MB or not in UTF-8.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from armor_recipes.recipe.problems import Mark, Problems, show
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, Value

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 64
MAX_INT = 2**64

_TAG = "tag:yaml.org,2002:"
_LISTS = (f"{_TAG}seq", f"{_TAG}python/tuple")
_ENUMERATION = f"{_TAG}python/object/apply:compressed_tensors."
"""How llm-compressor writes a word of an enumeration: as a call of its class with the word. The word is read, nothing is called."""
_NOT_GIVEN = f"{_TAG}python/object/apply:llmcompressor.sentinel.Sentinel"
"""How llm-compressor writes a field that was not given."""
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT = re.compile(
    r"""(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_JSON = re.compile(r"""\\\\|\t|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}""")
_FRONT_MATTER = re.compile(
    r"\s*^(?P<fence>---|\+\+\+)[ \t]*\r?\n(?P<yaml>.*?)^(?P=fence)[ \t]*\r?$", re.DOTALL | re.MULTILINE
)
UNENCODABLE = re.compile("[\0\ud800-\udfff]")
_UNUSUAL_BREAK = re.compile("[\r\x85\u2028\u2029\ufeff]")
_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with bounds on depth and number of nodes; nothing is ever constructed from a tag."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, regexp) for tag, regexp in pairs if tag in (f"{_TAG}null", f"{_TAG}bool", f"{_TAG}merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.composed += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=self._here())
        if self.composed > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES:,} values", problem_mark=self._here())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _here(self) -> yaml.Mark:
        return _next_mark(self)


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without anchors; it quotes all that this reader, or PyYAML's, would not read as text."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        """Write every value out in full."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote a text with an unusual line break: PyYAML writes it raw in other styles, and reads that as a space."""
        style = '"' if _UNUSUAL_BREAK.search(text) else None
        return self.represent_scalar(f"{_TAG}str", text, style=style)


_Loader.add_implicit_resolver(f"{_TAG}int", _DECIMAL, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
Dumper.add_representer(str, Dumper.represent_text)
Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read_file(path: Path, problems: Problems) -> Table | None:
    """Return the mapping in the YAML, JSON or Markdown file at `path`, or None after noting what is wrong with the file."""
    text = read_text(path, problems)
    mark = Mark(str(path), None, path.parent)
    source = None if text is None else _yaml_of(text, path.suffix.lower(), mark, problems)
    return None if source is None else only_mapping(parse(source, Mark(str(path), 1, path.parent), problems), problems)


def read_text(path: Path, problems: Problems, *, limit: int = MAX_BYTES) -> str | None:
    """Return what is in the file at `path`, or None after noting why that cannot be read, or that it is larger than `limit`."""
    mark = Mark(str(path), None, path.parent)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        problems.add(mark, (), _why_unreadable(error))
        return None
    if len(data) > limit:
        problems.add(mark, (), f"larger than {limit:,} bytes; a recipe is a small file")
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.add(Mark(str(path), line, path.parent), (), "not UTF-8 text; save the recipe as UTF-8")
        return None


def _yaml_of(text: str, suffix: str, mark: Mark, problems: Problems) -> str | None:
    """The YAML in a file, line for line where it stands, or None after noting why there is none."""
    if suffix == ".py":
        problems.add(mark, (), f"is Python and not run: `armor convert {mark.source}` makes a recipe of it")
        return None
    if suffix == ".json":
        return _JSON.sub(_as_yaml, text)
    if suffix != ".md":
        return text
    found = _FRONT_MATTER.match(text)
    if found is None:
        problems.add(mark, (), "has no front matter: put the recipe between two lines of --- at its beginning")
        return None
    return "\n" * text.count("\n", 0, found.start("yaml")) + found["yaml"]


def _as_yaml(found: re.Match[str]) -> str:
    """What JSON allows and YAML does not: tabs between values, and characters as pairs of escapes."""
    match found[0]:
        case "\t":
            return " "
        case "\\\\" as backslash:
            return backslash
        case pair:
            return pair.encode().decode("unicode_escape").encode("utf-16", "surrogatepass").decode("utf-16")


def parse(text: str, start: Mark, problems: Problems) -> Node | None:
    """Return the tree of one YAML document, or None after noting its problems; empty text is null.

    `start` says where the text begins; a start without a line (an argument) marks every node alike.
    """
    try:
        document = _compose(text)
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        where = error.problem_mark or error.context_mark
        problems.add(_at(start, where.line if where else 0), (), f"not valid YAML: {what}")
        return None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        problems.add(_at(start, line), (), f"not valid YAML: the character {show(chr(error.character))} is not allowed")
        return None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets chr() of "\UFFFFFFFF" through
        problems.add(start, (), f"not valid YAML: {error}")
        return None
    if document is None:
        return Scalar(None, start)
    return _Builder(start, problems).build(document)


def _compose(text: str) -> yaml.Node | None:
    """Return the only document of `text`, None if there is none."""
    loader = _Loader(text)
    try:
        if not loader.check_node():
            return None
        document = loader.get_node()
        if loader.check_node():
            problem = "a second document begins here; put one recipe in a file"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=_next_mark(loader))
        return document
    finally:
        loader.dispose()


def _next_mark(loader: yaml.SafeLoader) -> yaml.Mark:
    """Return where the next event of the stream begins."""
    mark: yaml.Mark = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
    return mark


def only_mapping(node: Node | None, problems: Problems) -> Table | None:
    """Return the mapping that a recipe must be, or None after noting what it is instead."""
    if node is None or isinstance(node, Table):
        return node
    found = "is empty" if isinstance(node, Scalar) and node.value is None else "does not hold a mapping"
    if not (isinstance(node, Scalar) and node.bad):
        problems.add(node.mark, (), f"the recipe {found}; write keys such as `model:` and `output:` at its top level")
    return None


def _why_unreadable(error: OSError | ValueError) -> str:
    match error:
        case FileNotFoundError():
            return "no such file; check the path"
        case IsADirectoryError():
            return "is a folder; name the recipe file in it"
        case PermissionError():
            return "cannot be read: permission denied"
        case OSError():
            return f"cannot be read: {error.strerror or error}"
        case _:
            return "is not a possible file name"


def _at(start: Mark, line: int) -> Mark:
    """Return the mark `line` lines below `start`."""
    return start if start.line is None else Mark(start.source, start.line + line, start.folder)


@dataclass(slots=True)
class _Builder:
    """Turns PyYAML's nodes into our tree; every alias is expanded, and every expanded node counted."""

    start: Mark
    problems: Problems
    count: int = 0
    open: set[int] = field(default_factory=set)
    path: list[str] = field(default_factory=list)

    def build(self, node: yaml.Node) -> Node:
        mark = _at(self.start, node.start_mark.line)
        self.count += 1
        if self.count > MAX_NODES:
            if self.count == MAX_NODES + 1:
                self.problems.add(mark, (), f"aliases expand to more than {MAX_NODES:,} values; write fewer of them")
            return Scalar(None, mark, bad=True)
        if id(node) in self.open:
            return self._bad(mark, "an alias stands inside the value that it repeats; write the value out")
        self.open.add(id(node))
        try:
            return self._build_kind(node, mark)
        finally:
            self.open.remove(id(node))

    def _build_kind(self, node: yaml.Node, mark: Mark) -> Node:
        match node:
            case yaml.ScalarNode():
                return self._scalar(node, mark)
            case yaml.SequenceNode(tag=f) if f in _LISTS:
                return self._items(node, mark)
            case yaml.SequenceNode(tag=f, value=[yaml.ScalarNode() as word]) if f.startswith(_ENUMERATION):
                return self._scalar(word, mark)
            case yaml.MappingNode(tag=f) if f == f"{_TAG}map":
                return Table(self._entries(node), mark)
            case _:
                return self._bad(mark, _refused_tag(node.tag))

    def _items(self, node: yaml.SequenceNode, mark: Mark) -> Items:
        nodes = []
        for index, child in enumerate(node.value):
            with self._under(str(index)):
                nodes.append(self.build(child))
        return Items(tuple(nodes), mark)

    def _scalar(self, node: yaml.ScalarNode, mark: Mark) -> Scalar:
        read = _READERS.get(node.tag)
        if read is None:
            return self._bad(mark, _refused_tag(node.tag))
        if UNENCODABLE.search(node.value):
            return self._bad(mark, "a NUL character or half a surrogate pair is not text; remove it")
        try:
            return Scalar(read(node.value), mark, text=node.value)
        except (ValueError, KeyError):
            return self._bad(
                mark, f"{show(node.value)} is not a usable {_PLAIN_NAMES[node.tag]}; numbers are finite and below 2^64"
            )

    def _entries(self, node: yaml.MappingNode) -> dict[str, Entry]:
        """Return the entries of a mapping; those of a merge key (`<<`) come first and lose, as in YAML 1.1."""
        own: dict[str, Entry] = {}
        inherited: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            mark = _at(self.start, key_node.start_mark.line)
            if key_node.tag == f"{_TAG}merge":
                inherited |= self._inherited(value_node, mark)
                continue
            key = self._key(key_node, mark)
            if key is None or value_node.tag.startswith(_NOT_GIVEN):
                continue
            with self._under(key):
                entry = Entry(mark, self.build(value_node))
                if key in own:
                    self.problems.add(
                        mark, self.path, f"the key is already given at {own[key].mark}; keep one of the two"
                    )
            own.setdefault(key, entry)
        return inherited | own

    def _inherited(self, node: yaml.Node, mark: Mark) -> dict[str, Entry]:
        """Return the entries that a merge key brings in; of several mappings the earlier wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        entries: dict[str, Entry] = {}
        for source in reversed(sources):
            table = self.build(source)
            if isinstance(table, Table):
                entries |= table.entries
            else:
                self._bad(mark, "a merge key (<<) takes a mapping or a list of mappings")
        return entries

    def _key(self, node: yaml.Node, mark: Mark) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str" and not UNENCODABLE.search(node.value):
            return str(node.value)
        shown = (
            f"{node.value}, which YAML does not read as text; quote it"
            if isinstance(node, yaml.ScalarNode)
            else "no text"
        )
        self._bad(mark, f"a key must be text, and this is {shown}")
        return None

    def _bad(self, mark: Mark, text: str) -> Scalar:
        self.problems.add(mark, self.path, text)
        return Scalar(None, mark, bad=True)

    @contextlib.contextmanager
    def _under(self, key: str) -> Iterator[None]:
        self.path.append(key)
        yield
        self.path.pop()


def _refused_tag(tag: str) -> str:
    return (
        f"the YAML tag {show(tag.replace(_TAG, '!!'))} is refused; recipes hold plain text, numbers, lists and mappings"
    )


def _whole_number(text: str) -> int:
    digits = text.replace("_", "")
    number = int(digits, 10 if _is_decimal(digits) else 0)
    if abs(number) >= MAX_INT:
        raise ValueError(text)
    return number


def _is_decimal(digits: str) -> bool:
    return digits.lstrip("+-").isdecimal()


def _fraction(text: str) -> float:
    if text.lstrip("+-.").lower() in ("inf", "nan"):
        raise ValueError(text)
    number = float(text.replace("_", ""))
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_READERS: dict[str, Callable[[str], Value]] = {
    f"{_TAG}str": str,
    f"{_TAG}merge": str,
    f"{_TAG}null": lambda _: None,
    f"{_TAG}bool": lambda text: _BOOLEANS[text.lower()],
    f"{_TAG}int": _whole_number,
    f"{_TAG}float": _fraction,
}
_PLAIN_NAMES = {f"{_TAG}bool": "boolean", f"{_TAG}int": "whole number", f"{_TAG}float": "number"}
