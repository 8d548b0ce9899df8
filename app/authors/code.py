"""A plugin looked over by its author, before a session runs it.

Only looks, and says what it finds: the manifest, the code as text, and last how it loads. The code runs nowhere but
in the process that sessions would run it in. How a plugin does its work is left to `trial`.
"""

import ast
import json
import os
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from app.checkup import Subject
from app.sessions.consistency import Complaint
from app.settings import Settings
from app.steps.plugins import registry
from app.steps.plugins.host import Broken, Host
from app.steps.plugins.registry import Manifest, Problem

_MOST_FILES = 2000
_MOST_CODE = 1024 * 1024
_SECONDS = 30

_ATTRIBUTES = (
    *("name", "version", "api_version"),
    *("supported_extensions", "required_variables", "optional_variables"),
)
_API = ("plugins", "plugins.base", "plugins.logger", "errors")
_PACKAGES = ("exlab_sessions", "exlab_wizard")
_FOUND = tuple(f"{package}.{each}" for package in _PACKAGES for each in _API)
"""What plugins are built on."""
_OURS = (*_PACKAGES, "app")
"""Nothing else below these names is for plugins, be it installed or not."""

_THERE = """
import importlib.util, json, sys

def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # so says one that is there and has no spec, such as __main__
        return name in sys.modules

print(json.dumps([name for name in sys.argv[1:] if there(name)]))
"""


async def look_over(folder: Path, now: Settings) -> Subject:
    """All that can be said of the plugin in `folder` before it works on files."""
    return Subject("plugin", str(folder), tuple([each async for each in _of_plugin(folder, now)]))


async def _of_plugin(folder: Path, now: Settings) -> AsyncIterator[Complaint]:
    manifest = registry.load(folder, allow_network=True)
    if isinstance(manifest, Problem):
        yield _error(manifest.message, folder / registry.MANIFEST)
    elif manifest.network and not now.plugins.allow_network:
        what = "wants the network: it runs only where the config has plugins.allow_network"
        yield Complaint("warning", what, str(folder / registry.MANIFEST), "")
    parsed, unread = _parsed(folder)
    for complaint in unread:
        yield complaint
    if not unread:
        for complaint in _of_code(folder, parsed, manifest, now.plugins.python or Path(sys.executable)):
            yield complaint
    if isinstance(manifest, Manifest) and not unread:
        for complaint in await _of_loading(manifest, now, folder / registry.CODE):
            yield complaint


def _error(what: str, where: Path | str, advice: str = "") -> Complaint:
    return Complaint("error", what, str(where), advice)


def _parsed(folder: Path) -> tuple[dict[Path, ast.Module], tuple[Complaint, ...]]:
    """The code of a plugin as trees, and what could not be read of it. Nothing of it runs."""
    parsed: dict[Path, ast.Module] = {}
    complaints: list[Complaint] = []
    for path in [each for each in sorted(folder.rglob("*.py")) if os.path.isfile(each)][:_MOST_FILES]:
        try:
            if path.stat().st_size > _MOST_CODE:
                raise ValueError("is larger than 1 MiB")
            source = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(source, str(path), "exec", dont_inherit=True)
                parsed[path] = ast.parse(source, str(path))
        except SyntaxError as error:
            complaints.append(_error(f"is no Python: {error.msg}", f"{path}:{error.lineno or 1}"))
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            complaints.append(_error(f"cannot be read: {error}", path))
    return parsed, tuple(complaints)


def _of_code(
    folder: Path, parsed: dict[Path, ast.Module], manifest: Manifest | Problem, python: Path
) -> Iterator[Complaint]:
    start = folder / registry.CODE
    if start in parsed:
        yield from _of_exports(start, parsed[start])
    if isinstance(manifest, Manifest):
        for path, tree in parsed.items():
            yield from _of_attributes(path, tree, manifest)
    yield from _of_imports(folder, parsed, python)


def _of_exports(path: Path, tree: ast.Module) -> Iterator[Complaint]:
    origins = list(_origins(tree.body))
    if not origins:
        yield _error("exports no Plugin", path, "end it with: from .plugin import MyPlugin as Plugin")
    elif set(origins) <= set(_FOUND):
        what = "exports the Plugin that it imports, and none of its own"
        yield _error(what, path, "call your class Plugin, or import it under this name")


def _origins(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """Where each Plugin of a module comes from: the name of a module, or nothing where it is made in place."""
    for statement in statements:
        match statement:
            case ast.ClassDef(name="Plugin"):
                yield ""
            case ast.Assign(targets=targets):
                yield from (
                    "" for target in targets if isinstance(target, ast.Name) and target.id == "Plugin"
                )
            case ast.AnnAssign(target=ast.Name(id="Plugin"), value=ast.expr()):
                yield ""
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                origin = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
                yield from (origin for each in names if (each.asname or each.name) in ("Plugin", "*"))
            case ast.If() | ast.Try() | ast.With():
                inner = (each for each in ast.iter_child_nodes(statement) if isinstance(each, ast.stmt))
                yield from _origins(inner)


def _of_attributes(path: Path, tree: ast.Module, manifest: Manifest) -> Iterator[Complaint]:
    for made in (each for each in ast.walk(tree) if isinstance(each, ast.ClassDef)):
        if not any(isinstance(each, ast.FunctionDef) and each.name == "transform" for each in made.body):
            continue
        for name, line, value in _literals(made):
            told = getattr(manifest, name)
            if _compared(name, value) != _compared(name, told):
                shown = list(told) if isinstance(told, tuple) else told
                what = f"{made.name}.{name} is {value!r}, and {shown!r} in {registry.MANIFEST}"
                yield _error(what, f"{path}:{line}", "the manifest is what counts")


def _literals(made: ast.ClassDef) -> Iterator[tuple[str, int, object]]:
    for statement in made.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in _ATTRIBUTES:
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if name in _ATTRIBUTES:
                pass
            case _:
                continue
        try:
            literal = ast.literal_eval(value)
            repr(literal)
        # Computed, or nothing that can be or be shown: only running it can tell.
        except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError):
            continue
        yield name, statement.lineno, literal


def _compared(name: str, value: object) -> object:
    if not isinstance(value, list | tuple | set | frozenset):
        return value
    return {repr(each).lower() if name == "supported_extensions" else repr(each) for each in value}


def _of_imports(folder: Path, parsed: dict[Path, ast.Module], python: Path) -> Iterator[Complaint]:
    wanted = [(path, line, name) for path, tree in parsed.items() for line, name in _imports(tree)]
    tops = {name.split(".")[0] for _, _, name in wanted} - {*_OURS, folder.absolute().name}
    # A plugin finds what lies beside it, too.
    asked = sorted(top for top in tops if not os.path.exists(folder.parent / top))
    own = folder.absolute().name
    there = _there(python, [own, *asked])
    missing = set(asked).difference(there) if there is not None else set()
    if own in (there or ()) and own not in {*sys.stdlib_module_names, *_OURS}:
        what = f"has the name of a module of {python}, which its imports of {own} then do not find"
        yield Complaint("warning", what, str(folder), "give its folder another name")
    for path, line, name in wanted:
        top = name.split(".")[0]
        if top in missing:
            advice = f"install it where {python} finds it, or name another interpreter by plugins.python"
            yield _error(f"imports {name}, which is not there", f"{path}:{line}", advice)
        elif top in _OURS and not any(each == name or each.startswith(f"{name}.") for each in _FOUND):
            advice = f"plugins find {', '.join(_FOUND)}"
            yield _error(f"imports {name}, which is not for plugins", f"{path}:{line}", advice)


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What a module cannot do without: not what it tries, or leaves to the type checker."""
    spared = {
        id(inner)
        for each in ast.walk(tree)
        if isinstance(each, ast.Try) or (isinstance(each, ast.If) and _is_for_types(each.test))
        for inner in ast.walk(each)
    }
    for each in ast.walk(tree):
        if id(each) in spared:
            continue
        if isinstance(each, ast.Import):
            yield from ((each.lineno, alias.name) for alias in each.names)
        elif isinstance(each, ast.ImportFrom) and each.level == 0 and each.module:
            yield each.lineno, each.module


def _is_for_types(test: ast.expr) -> bool:
    return any(
        isinstance(each, ast.Name | ast.Attribute)
        and (each.id if isinstance(each, ast.Name) else each.attr) == "TYPE_CHECKING"
        for each in ast.walk(test)
    )


def _there(python: Path, names: list[str]) -> set[str] | None:
    """Those of `names` that an interpreter has a module for; None where it cannot be asked."""
    command = [str(python), "-I", "-c", _THERE, *(name for name in names if name.isidentifier())]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
        return set(json.loads(asked.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


async def _of_loading(manifest: Manifest, now: Settings, where: Path) -> list[Complaint]:
    """Have it loaded, and asked what it thinks of variables that are made up."""
    variables: dict[str, object] = dict.fromkeys(manifest.required_variables, "example")
    host = Host(lambda: now.plugins.python, count=1)
    await host.start()
    try:
        with TemporaryDirectory(prefix="exlab-plugin-", ignore_cleanup_errors=True) as aside:
            said = await host.validate(manifest, variables, Path(os.path.realpath(aside), "validation"))
    finally:
        await host.close()
    if isinstance(said, Broken):
        return [_error(said.message, where)]
    return [Complaint("warning", f"says of made-up variables: {each}", str(where), "") for each in said]
