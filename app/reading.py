"""From the values of a YAML file to records.

A `Reading` takes what is right, and writes down what is wrong: with the key, its line, and what was expected.
It stops at nothing, so that whoever mends the file sees all of it at once. Records say by their types what they
take, and by the description of a `Meta` how that is told to people. What the records are for, and what must
hold between them, is left to the caller.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin

import msgspec

from app.errors import ConfigMistake
from app.yamltext import Document, Place

T = TypeVar("T", bound=msgspec.Struct)

_MAX_PATH = 4096
_PASSWORD = re.compile(r"(?<=:)[^@]*(?=@)")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_EXPECTED: dict[object, str] = {
    str: "text",
    bool: "true or false",
    dict: "keys with values",
    tuple: "a list",
    Path: "a path",
}


class Reading:
    """One pass over a document. Paths in it are relative to `folder`.

    `foreign` are the keys, by the place that they stand in without positions, that another program reads.
    """

    def __init__(self, document: Document, folder: Path, foreign: Mapping[Place, Collection[str]]) -> None:
        self._document = document
        self._folder = folder
        self._foreign = foreign
        self.mistakes: list[ConfigMistake] = []
        self.notes: list[str] = []

    def records(self, kind: type[T], given: object, at: Place) -> Iterator[tuple[Place, T]]:
        """The items of a list that are right, each with its place."""
        for position, item in enumerate(self.items(given, at)):
            record = self._record(kind, item, (*at, position))
            if record is not None:
                yield (*at, position), record

    def _record(self, kind: type[T], given: object, at: Place) -> T | None:
        found = self.values(kind, given, at)
        lacking = [
            field for field in msgspec.structs.fields(kind) if field.required and field.name not in found
        ]
        for field in lacking:
            if given is None or (isinstance(given, dict) and given.get(field.name) is None):
                self.mistake((*at, field.name), f"is missing; expected {_expected(field.type)}")
        return None if lacking else msgspec.convert(found, kind)

    def values(self, kind: type[msgspec.Struct], given: object, at: Place) -> dict[str, object]:
        """The keys of `kind` that are given, and right."""
        mapping = self.mapping(given, at)
        types = {field.name: field.type for field in msgspec.structs.fields(kind)}
        self.note_unknown(mapping, list(types), at)
        told = {name: value for name, value in mapping.items() if name in types and value is not None}
        values = {name: self._value(types[name], value, (*at, name)) for name, value in told.items()}
        return {name: value for name, value in values.items() if value is not None}

    def _value(self, kind: object, given: object, at: Place) -> object:
        """`given` as a `kind`; None where it is wrong, or a path that is left empty."""
        if get_origin(kind) in (Union, UnionType):
            kind = get_args(kind)[0]
        if get_origin(kind) is tuple:
            items = enumerate(self.items(given, at))
            taken = (self._value(get_args(kind)[0], item, (*at, position)) for position, item in items)
            return tuple(item for item in taken if item is not None)
        if isinstance(given, str):
            given = given.strip()
            given = _BOOLEANS.get(given.lower(), given) if kind is bool else given
        if kind is Path and isinstance(given, str):
            return self.path(given, at)
        try:
            return msgspec.convert(given, cast("type[object]", kind))
        except msgspec.ValidationError:
            self._wrong(kind, given, at)
            return None

    def path(self, text: str, at: Place) -> Path | None:
        """An absolute path; None where `text` is empty, or can be no path."""
        if len(text) > _MAX_PATH:
            self.mistake(at, f"expected a path of at most {_MAX_PATH} characters")
            return None
        try:
            return Path(os.path.normpath(self._folder / Path(text).expanduser())) if text else None
        except RuntimeError:
            self.mistake(at, f"expected a path, but no home folder is known for {shown(text)}")
            return None

    def mapping(self, given: object, at: Place) -> dict[str, object]:
        if isinstance(given, dict):
            return given
        if given is not None:
            self._wrong(dict, given, at)
        return {}

    def items(self, given: object, at: Place) -> list[object]:
        if isinstance(given, list):
            return given
        if given is not None:
            self._wrong(tuple, given, at)
        return []

    def _wrong(self, kind: object, given: object, at: Place) -> None:
        self.mistake(at, f"expected {_expected(kind)}, not {shown(given)}")

    def note_unknown(self, given: Collection[str], known: list[str], at: Place) -> None:
        foreign = self._foreign.get(tuple(part for part in at if isinstance(part, str)), ())
        for name in given:
            if name in foreign:
                self.note((*at, name), "is for another program, and means nothing here")
            elif name not in known:
                near = difflib.get_close_matches(name[:60], known, n=1)
                hint = f"; did you mean {named((*at, near[0]))}?" if near else ""
                self.note((*at, name), f"is no key that is known here{hint}")

    def mistake(self, at: Place, message: str) -> None:
        self.mistakes.append(ConfigMistake(key=named(at), line=self._line(at), message=message))

    def note(self, at: Place, message: str) -> None:
        self.notes.append(f"line {self._line(at)}: {named(at)} {message}")

    def _line(self, at: Place) -> int:
        """The line of a value; of what it should stand in where it is missing."""
        while at not in self._document.lines:
            at = at[:-1]
        return self._document.lines[at]


def named(at: Place) -> str:
    """The place as people write it: `equipment[0].id`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in at)
    return "".join(parts).removeprefix(".") or "file"


def _printable(text: str) -> str:
    short = text if len(text) <= 60 else text[:57] + "..."
    return short if short.isprintable() else ascii(short)


def shown(value: object) -> str:
    """The value as a message may show it: short, printable, without the password of a URL."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{_printable(_PASSWORD.sub('...', value))}'"
        case list():
            return "a list"
        case dict():
            return "keys with values"
    return str(value)


def _expected(kind: object) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].description)
    return _EXPECTED[get_origin(kind) or kind]
