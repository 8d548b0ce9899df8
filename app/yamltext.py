"""YAML that a stranger wrote, read into plain values with the line that each stands on.

The result holds nothing but what JSON has: None, bool, int, float, str, list and dict with text keys. Scalars
are read as YAML 1.2 does, so that `no` and `12:30` are text. The size of the text, its nesting and the number
of values after aliases are bounded; what exceeds them, or is no YAML, is `Unreadable`. What the values mean is
left to the caller.
"""

import math
import re
from collections.abc import Callable, Iterator

import msgspec
import yaml

Place = tuple[str | int, ...]
"""The way to a value: keys of mappings, and positions in lists from 0."""

MAX_BYTES = 256 * 1024
_MAX_DEPTH = 32
_MAX_VALUES = 10_000
_MAX_INTEGER = 2**63
_TOO_DEEP = f"is nested deeper than {_MAX_DEPTH} levels"

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"


class Document(msgspec.Struct, frozen=True):
    """A text that could be read. `lines` count from 1 and are those of the key, or of the item of a list."""

    value: object
    lines: dict[Place, int]


class Unreadable(Exception):
    """The text is not YAML, or more than a text of this kind may be."""

    def __init__(self, message: str, line: int | None = None) -> None:
        self.message = message
        self.line = line
        super().__init__(message)


def parse(raw: bytes) -> Document:
    """Read the one document in `raw`, UTF-8 with or without a byte order mark; blank text reads as None."""
    if len(raw) > MAX_BYTES:
        raise Unreadable(f"is larger than {MAX_BYTES // 1024} KiB")
    node = _compose(_decode(raw))
    lines: dict[Place, int] = {(): 1}
    return Document(None if node is None else _Walk(lines).value(node, (), 0), lines)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Unreadable("is not UTF-8 text", raw.count(b"\n", 0, error.start) + 1) from error


def _compose(text: str) -> yaml.Node | None:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _refusal(error) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(
            f"holds the character U+{error.character:04X}, which YAML does not allow", line
        ) from error


def _refusal(error: yaml.MarkedYAMLError) -> Unreadable:
    mark = error.problem_mark or error.context_mark
    message = error.problem or "is not YAML"
    if message.startswith("but ") and error.context:
        message = f"{error.context}, {message}"
    if "escape character" in message:
        message += r" (in double quotes a backslash begins an escape: write 'C:\data' in single quotes)"
    return Unreadable(message, mark.line + 1 if mark else None)


class _Loader(yaml.SafeLoader):
    """PyYAML's reader in Python: the one in C recurses on the C stack, where depth cannot be refused in time."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self._depth > _MAX_DEPTH:
            raise Unreadable(_TOO_DEEP, _line(parent) if parent else None)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
_DIGITS = list("-+.0123456789")
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    _TAG + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), _DIGITS)
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), _DIGITS
)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])


def _integer(text: str) -> int:
    number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if not -_MAX_INTEGER <= number < _MAX_INTEGER:
        raise ValueError
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(text: str) -> str:
    # Escapes can spell both; neither fits into a path, a database or a JSON text.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError
    return text


_SCALARS: dict[str, Callable[[str], object]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": _integer,
    _TAG + "float": _number,
    _TAG + "str": _text,
    _MERGE: _text,
}


def _strange_tag(node: yaml.Node) -> Unreadable:
    return Unreadable(f"the tag {node.tag[:60]!r} means nothing here", _line(node))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _scalar(node: yaml.ScalarNode) -> object:
    if node.tag not in _SCALARS:
        raise _strange_tag(node)
    try:
        return _SCALARS[node.tag](node.value)
    except ValueError as error:
        kind = {"int": "whole number", "float": "number"}.get(node.tag.removeprefix(_TAG), "text")
        raise Unreadable(f"holds a {kind} that cannot be used", _line(node)) from error


def _key(node: yaml.Node) -> str:
    """The text of a key as it was written, whatever it might mean as a value: `on`, `5` and `null` are names."""
    if not isinstance(node, yaml.ScalarNode):
        raise Unreadable("a key must be text", _line(node))
    return str(_scalar(yaml.ScalarNode(_TAG + "str", node.value, node.start_mark, node.end_mark)))


class _Walk:
    """From nodes to values. An alias counts each time that it is met, so that a bomb meets the bound."""

    def __init__(self, lines: dict[Place, int]) -> None:
        self._lines = lines
        self._left = _MAX_VALUES

    def value(self, node: yaml.Node, at: Place, depth: int) -> object:
        self._spend(node, depth)
        match node:
            case yaml.ScalarNode():
                return _scalar(node)
            case yaml.SequenceNode(tag=yaml.Loader.DEFAULT_SEQUENCE_TAG):
                return list(self._items(node, at, depth))
            case yaml.MappingNode(tag=yaml.Loader.DEFAULT_MAPPING_TAG):
                return self._mapping(node, at, depth)
        raise _strange_tag(node)

    def _spend(self, node: yaml.Node, depth: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise Unreadable(f"holds more than {_MAX_VALUES} values", _line(node))
        if depth > _MAX_DEPTH:
            raise Unreadable(_TOO_DEEP, _line(node))

    def _items(self, node: yaml.SequenceNode, at: Place, depth: int) -> Iterator[object]:
        for position, item in enumerate(node.value):
            self._lines[*at, position] = _line(item)
            yield self.value(item, (*at, position), depth + 1)

    def _mapping(self, node: yaml.MappingNode, at: Place, depth: int) -> dict[str, object]:
        merged = [value for key, value in node.value if key.tag == _MERGE]
        own = [(_key(key), key, value) for key, value in node.value if key.tag != _MERGE]
        found = self._inherited(merged, at, depth)
        seen: set[str] = set()
        for name, key, value in own:
            if name in seen:
                raise Unreadable(f"the key {name[:60]!r} stands twice in one place", _line(key))
            seen.add(name)
            self._lines[*at, name] = _line(key)
            found[name] = self.value(value, (*at, name), depth + 1)
        return found

    def _inherited(self, merged: list[yaml.Node], at: Place, depth: int) -> dict[str, object]:
        sources: list[yaml.Node] = []
        for node in merged:
            sources += node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, object] = {}
        # Of several sources the first one wins, so it is read last.
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise Unreadable("<< takes a mapping, or a list of mappings", _line(source))
            self._spend(source, depth)
            found |= self._mapping(source, at, depth + 1)
        return found
