"""The plugins of a workstation, and what they say of themselves in their `manifest.yml`.

Whatever lies in the plugin folder, looking at it costs a bounded amount of time and memory, imports no code, and
ends in a manifest or in a problem that says what to mend. Whether the code of a plugin is any good is left to the
process that it runs in.
"""

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, get_args

import msgspec
from msgspec import Meta

from app import yamltext
from app.reading import Reading
from app.settings import Words
from app.steps.templates import READ_AT_ONCE, leads_nowhere

MANIFEST = "manifest.yml"
CODE = "__init__.py"

_TAKEN = sys.stdlib_module_names | {"app", "exlab_sessions", "exlab_wizard"}
_MOST_TOLD = 5


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What `manifest.yml` says. `folder` is absolute and has no links in it.

    `supported_extensions` are in small letters: last suffixes, or whole names for files that have none.
    """

    name: str
    version: str
    author: str = ""
    description: str = ""
    supported_extensions: tuple[str, ...]
    api_version: str
    required_variables: tuple[str, ...] = ()
    optional_variables: tuple[str, ...] = ()
    timeout_seconds: int = 30
    memory_mb: int = 512
    network: bool = False
    folder: Path

    def offered(self, files: Iterable[str]) -> tuple[str, ...]:
        """Those of `files`, paths with slashes, that the plugin wants to see; in the order of their paths."""
        found = (path for path in files if _ending(path) in self.supported_extensions)
        return tuple(sorted(found, key=lambda path: path.split("/")))


def _ending(path: str) -> str:
    name = PurePosixPath(path)
    return (name.suffix or name.name).lower()


class Problem(msgspec.Struct, frozen=True):
    """Why what lies at `path` cannot be used. `error` is the system's, where it is the one to blame."""

    path: Path
    message: str
    error: OSError | None = None


class Catalogue(msgspec.Struct, frozen=True):
    """The plugins that can be used, by name; and what else lies there."""

    plugins: tuple[Manifest, ...]
    problems: tuple[Problem, ...]

    def named(self, name: str) -> Manifest | None:
        return next((plugin for plugin in self.plugins if plugin.name == name), None)


class _Unusable(Exception):
    """The plugin cannot be used."""


def files_below(tree: Path) -> Iterator[str]:
    """The files of a tree, relative and with slashes; links are neither followed nor told."""
    for folder, _, names in os.walk(tree, onerror=_raise):
        for name in names:
            if not Path(folder, name).is_symlink():
                yield Path(folder, name).relative_to(tree).as_posix()


def _raise(error: OSError) -> None:
    """A folder that cannot be read must not pass for an empty one."""
    raise error


def catalogue(folder: Path | None, *, allow_network: bool) -> Catalogue:
    """Every plugin directly below `folder`; of two with one name the first by folder, and a problem."""
    plugins: dict[str, Manifest] = {}
    problems: list[Problem] = []
    for found in _listed(folder, allow_network) if folder else ():
        if isinstance(found, Problem):
            problems.append(found)
        elif found.name in plugins:
            other = plugins[found.name].folder.name
            problems.append(Problem(found.folder, f"has the name {found.name}, as the one in {other} has"))
        else:
            plugins[found.name] = found
    return Catalogue(tuple(plugins[name] for name in sorted(plugins)), tuple(problems))


def _listed(folder: Path, allow_network: bool) -> Iterator[Manifest | Problem]:
    try:
        root = Path(os.path.realpath(folder))
        children = sorted(path for path in root.iterdir() if not path.name.startswith((".", "_")))
    except OSError as error:
        yield Problem(folder, f"cannot be read: {error.strerror}", error)
        return
    for child in children:
        if found := _looked_at(child, root, allow_network):
            yield found


def _looked_at(child: Path, root: Path, allow_network: bool) -> Manifest | Problem | None:
    """None for a file: what else lies in the plugin folder is nobody's business."""
    try:
        if child.is_file():
            return None
    except OSError as error:
        return Problem(child, f"cannot be read: {error.strerror}", error)
    real = Path(os.path.realpath(child))
    if not real.is_relative_to(root) or real == root:
        return Problem(child, "is a link that leads out of the plugin folder")
    return load(child, allow_network=allow_network)


def load(folder: Path, *, allow_network: bool) -> Manifest | Problem:
    """Read the plugin's `manifest.yml`, and see that it has code."""
    try:
        path = Path(os.path.realpath(folder))
        return _manifest(path, allow_network)
    except _Unusable as unusable:
        return Problem(folder, str(unusable))
    except OSError as error:
        return Problem(folder, f"cannot be read: {error.strerror}", error)


def _manifest(folder: Path, allow_network: bool) -> Manifest:
    if not folder.is_dir():
        raise _Unusable("is not a folder")
    if folder.name in _TAKEN:
        raise _Unusable(f"the folder is called {folder.name}, as a module that plugins need; rename it")
    written = _written(_contents(folder / MANIFEST, folder), folder)
    if written.isolation.network and not allow_network:
        raise _Unusable(
            f"{MANIFEST} wants the network by isolation.network; expected plugins.allow_network in the config"
        )
    if not (folder / CODE).is_file():
        raise _Unusable(f"has no {CODE}")
    return Manifest(
        name=written.name,
        version=written.version,
        author=written.author,
        description=written.description,
        supported_extensions=tuple(dict.fromkeys(end.lower() for end in written.supported_extensions)),
        api_version=written.api_version,
        required_variables=written.required_variables,
        optional_variables=written.optional_variables,
        timeout_seconds=written.isolation.timeout_seconds,
        memory_mb=written.isolation.memory_mb,
        network=written.isolation.network,
        folder=folder,
    )


def _contents(path: Path, folder: Path) -> bytes:
    if not os.path.lexists(path):
        raise _Unusable(f"has no {path.name}")
    if not Path(os.path.realpath(path)).is_relative_to(folder):
        raise _Unusable(f"{path.name} is a link that leads out of the plugin")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _Unusable(f"{path.name} is not a regular file")
        with open(os.open(path, READ_AT_ONCE), "rb") as file:
            return file.read(yamltext.MAX_BYTES + 1)
    except OSError as error:
        if leads_nowhere(error):
            raise _Unusable(f"{path.name} leads nowhere") from error
        raise


_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z", description="1 to 64 letters, digits, _ or -")]
_Ending = Annotated[
    str,
    Meta(
        pattern=r"^[^/\\\x00-\x1f]{1,100}\Z",
        description="a suffix such as .csv, or the whole name of a file without one",
    ),
]


class _Isolation(msgspec.Struct, frozen=True, kw_only=True):
    timeout_seconds: Annotated[int, Meta(ge=1, le=300, description="whole seconds, 1 to 300")] = 30
    memory_mb: Annotated[int, Meta(ge=32, le=2048, description="whole megabytes, 32 to 2048")] = 512
    network: bool = False


class _Written(msgspec.Struct, frozen=True, kw_only=True):
    """The file as authors write it."""

    name: _Name
    version: Words
    author: str = ""
    description: str = ""
    supported_extensions: tuple[_Ending, ...]
    api_version: Annotated[str, Meta(pattern=r"^1\Z", description='"1"')]
    required_variables: tuple[Words, ...] = ()
    optional_variables: tuple[Words, ...] = ()
    isolation: _Isolation = _Isolation()


def _written(raw: bytes, folder: Path) -> _Written:
    try:
        document = yamltext.parse(raw)
    except yamltext.Unreadable as error:
        line = f" line {error.line}" if error.line else ""
        raise _Unusable(f"{MANIFEST}{line}: {error.message}") from error
    if not isinstance(document.value, dict):
        raise _Unusable(f"{MANIFEST} does not hold keys with values")
    reading = Reading(document, folder, {})
    found = _read(reading, document.value)
    if reading.mistakes:
        mistakes = sorted(reading.mistakes, key=lambda mistake: mistake.line or 0)[:_MOST_TOLD]
        told = (f"line {mistake.line}: {mistake.key}: {mistake.message}" for mistake in mistakes)
        raise _Unusable(f"{MANIFEST} " + "; ".join(told))
    return msgspec.convert(found, _Written)


def _read(reading: Reading, given: dict[str, object]) -> dict[str, object]:
    given = {name: _text_of_number(name, value) for name, value in given.items()}
    isolation = given.pop("isolation", None)
    found = reading.values(_Written, given, ())
    found["isolation"] = reading.values(_Isolation, isolation, ("isolation",))
    for field in msgspec.structs.fields(_Written):
        if field.required and given.get(field.name) is None:
            reading.mistake((field.name,), f"is missing; expected {_expected(field.type)}")
    if given.get("supported_extensions") == []:
        reading.mistake(("supported_extensions",), "expected at least one suffix, such as .csv")
    for name in ("version", "author", "description"):
        if isinstance(given.get(name), str) and not _is_readable(str(given[name])):
            reading.mistake((name,), "expected at most 2000 characters, without control characters")
    return found


def _expected(kind: object) -> str:
    return next((each.description for each in get_args(kind) if isinstance(each, Meta)), None) or "a list"


def _text_of_number(name: str, value: object) -> object:
    """Versions are often written without quotes."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and name in ("version", "api_version", "author") else value


def _is_readable(text: str) -> bool:
    return len(text) <= 2000 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
