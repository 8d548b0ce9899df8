"""In a plugin's own process: its class is loaded, its hooks are called in order, their outcome is told.

Promises that whatever a plugin raises ends as a value that is told once, that nothing of this service
is left for the plugin to import but the API, that a fork which comes back out of a hook tells nothing,
and that success is told when the plugin's threads have ended and its files are written to their end.
What the process may reach and use is `supervision.py`'s affair, what is told its reader's to judge: a
plugin can make this process say anything.
"""

import errno
import gc
import importlib.util
import io
import json
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from app.steps.child import frame
from exlab_sessions import plugins as api

_PROGRESS_SECONDS = 0.25
_LOG_LINES = 500
_LOG_BYTES = 256 * 1024
_LONGEST = 8000
_TRACEBACK_LINES = 8

LARGEST_FRAME = 1024 * 1024


# What a report may take up of the memory that the plugin was left with.
_RESERVE = 2 * 1024 * 1024

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV)
_FULL = (errno.ENOSPC, errno.EDQUOT)

Report = dict[str, object]


class Telling:
    """The way back, for frames of JSON: whole ones also from threads, none from a fork of this process."""

    def __init__(self, pipe: int, mark: bytes = b"") -> None:
        self._pipe = pipe
        self._mark = mark
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._lines = _LOG_LINES
        self._bytes = _LOG_BYTES
        self._full = False

    @property
    def at_home(self) -> bool:
        return os.getpid() == self._owner

    def tell(self, report: Report) -> None:
        text = json.dumps(report, ensure_ascii=False, allow_nan=False).encode(errors="replace")
        if len(text) > LARGEST_FRAME:
            text = json.dumps(_failed("The plugin says more at once than anybody could read.")).encode()
        rest = memoryview(frame(self._mark + text))
        with self._lock:
            while rest:
                rest = rest[os.write(self._pipe, rest) :]

    def log(self, level: str, text: str) -> None:
        if not self.at_home:
            sys.stderr.write(f"{level}: {text[:_LONGEST]}\n")
            return
        if self._full:
            return
        text = text[:_LONGEST]
        self._lines -= 1
        self._bytes -= len(text)
        if self._lines < 0 or self._bytes < 0:
            self._full = True
            level, text = "warning", "What the plugin logs from here on is left out."
        self.tell({"kind": "log", "level": level, "text": text})


def perform(task: dict[str, Any], telling: Telling) -> NoReturn:
    """Do the task and end this process, at once: not even what the plugin left for its exit is waited for."""
    reserve = bytearray(_RESERVE)
    pass_ = Pass(task, telling)
    try:
        report = pass_.validated() if task["validate"] else pass_.run()
    except BaseException as error:  # noqa: BLE001 - the edge of the process, and plugins may raise anything
        del reserve
        report = pass_.outcome_of(error)
    if not telling.at_home:
        os._exit(0)
    _flush()
    telling.tell(report)
    os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001 - a plugin may have put anything there
            continue


def _let_threads_end() -> None:
    """Wait for threads and executors, as an interpreter does before it ends; daemons it leaves."""
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way


def _write_to_the_end() -> None:
    """Write what the plugin's open files have not yet written. Raises PluginError, and OSError where the disk is full.

    What is made of Python, such as a compressed file, is complete only when it is closed, and writes
    into others then.
    """
    left = [each for each in _open_files() if _wants_writing(each)]
    for file in left:
        _finish(file, file.flush)
    for file in left:
        if type(file).__module__ != "_io" and _wants_writing(file):
            _finish(file, file.close)
    for file in left:
        if _wants_writing(file):
            _finish(file, file.flush)


def _open_files() -> list[Any]:
    """Those of the plugin: what this process had before it came is frozen, and not listed.

    By their types, as to ask a foreign object for its class can run code of its own.
    """
    kind = io.IOBase.__base__
    return [each for each in gc.get_objects() if kind in type(each).__mro__]


def _wants_writing(file: Any) -> bool:
    try:
        return not file.closed and bool(file.writable())
    except Exception:  # noqa: BLE001 - detached, or never quite opened
        return False


def _finish(file: Any, how: Callable[[], object]) -> None:
    try:
        how()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        name, why = _text(getattr(file, "name", type(file).__name__)), _text(error)
        raise api.PluginError(f"{name} was left open and cannot be written to its end: {why}") from error


class Pass:
    """One plugin and its files."""

    def __init__(self, task: dict[str, Any], telling: Telling) -> None:
        self._task = task
        self._telling = telling
        self._tree = Path(task["tree"])
        self._inside = (os.path.realpath(task["tree"]), os.path.realpath(task["scratch"]))
        self._variables: dict[str, Any] = task["context"]["variables"]
        self._answers: dict[str, dict[str, Any]] = task["answers"]
        self._log = api.PluginLogger(telling.log)
        self._plugin: Any = None
        self._at: int | None = None

    def validated(self) -> Report:
        """What `validate_variables` complains of."""
        self._plugin = loaded(self._task)
        validate = getattr(self._plugin, "validate_variables", None)
        if validate is None:
            complaints: object = api.Plugin.validate_variables(self._plugin, self._variables)
        else:
            complaints = validate(self._variables)
        if not isinstance(complaints, list | tuple) or not all(isinstance(each, str) for each in complaints):
            return _failed("validate_variables did not answer a list of texts.")
        return {"kind": "complained", "complaints": complaints}

    def run(self) -> Report:
        """All hooks, in their order."""
        self._plugin = loaded(self._task)
        described: list[Report] = []
        self._call("pre_transform_all")
        for number, path in self._files():
            self._at = number
            context = self._context()
            if not self._plugin.can_handle(path, context.variables):
                continue
            if context.dry_run:
                described += self._described(path, context)
            else:
                self._plugin.transform(path, context)
        self._at = None
        self._call("post_transform_all")
        self._only_at_home()
        _let_threads_end()
        _write_to_the_end()
        return {"kind": "ran", "described": described}

    def outcome_of(self, error: BaseException) -> Report:
        """What `error`, raised by the plugin, means; the plugin hears of it first."""
        if self._plugin is not None and not self._task["validate"] and self._telling.at_home:
            self._let_go(error)
        if isinstance(error, api.PluginInputRequired):
            return self._asked(error)
        if isinstance(error, api.PluginError):
            return _failed(_text(error) or "The plugin gave up without a reason.")
        if isinstance(error, MemoryError):
            traceback.clear_frames(error.__traceback__)
            return _failed("The plugin ran out of the memory that its manifest asks for.")
        self._log.error("".join(_last_lines(error)).rstrip())
        if isinstance(error, OSError) and error.errno in _FULL:
            return {
                "kind": "obstructed",
                "number": error.errno,
                "reason": os.strerror(error.errno),
                "path": _text(error.filename or ""),
            }
        if (place := self._outside(error)) is not None:
            return {"kind": "violated", "path": place}
        return _failed(f"{_name(error)}: {_text(error)}".rstrip(": "))

    def _files(self) -> Iterator[tuple[int, Path]]:
        told_at = float("-inf")
        for number, name in enumerate(self._task["files"]):
            if (now := time.monotonic()) - told_at >= _PROGRESS_SECONDS:
                told_at = now
                self._telling.tell({"kind": "progress", "at": number})
            yield number, self._tree / name

    def _call(self, hook: str) -> None:
        if (found := getattr(self._plugin, hook, None)) is not None:
            found(self._context())

    def _context(self) -> api.PluginContext:
        """Made anew for each call, around the one dict of variables, as plugins may keep things in it."""
        self._only_at_home()
        at = None if self._at is None else self._task["files"][self._at]
        extra = {**self._answers.get("", {}), **(self._answers.get(at, {}) if at else {})}
        self._variables.pop("__extra_inputs__", None)
        if extra:
            self._variables["__extra_inputs__"] = extra
        told = self._task["context"]
        return api.PluginContext(
            variables=self._variables,
            dst_root=self._tree,
            answers_file=self._tree / told["answers_file"],
            template_name=told["template_name"],
            template_version=told["template_version"],
            run_kind=told["run_kind"],
            equipment_id=told["equipment_id"],
            project=told["project"],
            dry_run=told["dry_run"],
            log=self._log,
            extra_inputs=extra,
            destination=Path(told["destination"]),
        )

    def _only_at_home(self) -> None:
        """End a fork that has come back out of a hook."""
        if not self._telling.at_home:
            os._exit(0)

    def _described(self, path: Path, context: api.PluginContext) -> list[Report]:
        describe = getattr(self._plugin, "describe_changes", None)
        changes = (
            api.Plugin.describe_changes(self._plugin, path, context)
            if describe is None
            else describe(path, context)
        )
        return [
            {
                "path": os.path.relpath(change.path, self._tree).replace(os.sep, "/"),
                "kind": str(change.kind),
                "summary": str(change.summary),
                "detail": _plain(change.detail),
            }
            for change in changes
        ]

    def _let_go(self, error: BaseException) -> None:
        try:
            if (hook := getattr(self._plugin, "on_plugin_failure", None)) is not None:
                hook(error, self._context())
        except BaseException as another:  # noqa: BLE001 - what the plugin does about its failure changes nothing
            self._log.warning(f"on_plugin_failure failed: {_name(another)}: {_text(another)}")

    def _asked(self, error: api.PluginInputRequired) -> Report:
        fields: object = error.fields
        reason: object = error.reason
        if not isinstance(fields, list | tuple) or not all(isinstance(field, dict) for field in fields):
            return _failed(
                "The plugin asks in a way that is not understood: fields is not a list of objects."
            )
        if not isinstance(reason, str):
            return _failed("The plugin asks in a way that is not understood: the reason is no text.")
        try:
            json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as wrong:
            return _failed(
                f"The plugin asks in a way that is not understood: fields is no JSON: {_text(wrong)}"
            )
        return {"kind": "asked", "fields": fields, "reason": reason, "at": self._at}

    def _outside(self, error: BaseException) -> str | None:
        """The place that was refused to the plugin, if it is one that it must not reach for."""
        if not isinstance(error, OSError) or error.errno not in _FORBIDDEN:
            return None
        names = [
            name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
        ]
        for name in names:
            place = _text(os.path.realpath(os.fsdecode(name)))
            if not any(place == each or place.startswith(each + os.sep) for each in self._inside):
                return place
        # Not all of Python's calls name the file; and nothing of the plugin's own is read-only.
        return "a place that is read-only" if error.errno == errno.EROFS and not names else None


def put_in_place(task: dict[str, Any]) -> None:
    """The plugin's environment and working directory; the folders were made by the service."""
    scratch = Path(task["scratch"])
    kept = {name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ}
    temporary = str(scratch / "tmp")
    os.environ.clear()
    os.environ.update(
        PATH="/usr/local/bin:/usr/bin:/bin",
        HOME=str(scratch / "home"),
        TMPDIR=temporary,
        LC_ALL="C.UTF-8",
        **kept,
    )
    if sys.platform == "win32":
        os.environ.update(TEMP=temporary, TMP=temporary, USERPROFILE=str(scratch / "home"))
    os.chdir(task["tree"])


def loaded(task: dict[str, Any]) -> Any:
    """An instance of the class that the plugin's package exports. Raises PluginError, and what the package raises."""
    folder = Path(task["folder"])
    sys.path.append(str(folder.parent))
    place = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        folder.name, place, submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise api.PluginError(f"{place} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = module
    spec.loader.exec_module(module)
    kind = getattr(module, "Plugin", None)
    if not isinstance(kind, type):
        raise api.PluginError("The package exports no class Plugin.")
    for hook in ("can_handle", "transform"):
        if not callable(getattr(kind, hook, None)):
            raise api.PluginError(f"The class Plugin has no method {hook}.")
    for key in ("name", "version"):
        said = getattr(kind, key, None)
        if isinstance(said, str) and said != task[key]:
            raise api.PluginError(f"The class Plugin says {key} {said!r}, the manifest {task[key]!r}.")
    return kind()


def leave_only_the_api() -> None:
    """Give the API all the names that plugins know it by, and forget all else of this service.

    The script too: `multiprocessing` has the processes that it spawns run the file of `__main__` again.
    """
    sys.modules["__main__"] = types.ModuleType("__main__")
    for name in [name for name in sys.modules if name.split(".")[0] == "app"]:
        del sys.modules[name]
    for package in ("exlab_sessions", "exlab_wizard"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
        for name in ("plugins", "errors"):
            setattr(sys.modules[package], name, api)
            sys.modules[f"{package}.{name}"] = api
        for name in ("base", "logger"):
            setattr(api, name, api)
            sys.modules[f"{package}.plugins.{name}"] = api


def _failed(message: str) -> Report:
    return {"kind": "failed", "message": message}


def _name(error: BaseException) -> str:
    return type(error).__name__


def _text(thing: object) -> str:
    """What `thing` says of itself, as far as that is worth keeping; plugins may have made it."""
    try:
        return str(thing)[:_LONGEST]
    except BaseException:  # noqa: BLE001
        return "(it cannot be shown)"


def _last_lines(error: BaseException) -> list[str]:
    try:
        return traceback.format_exception(error, limit=-_TRACEBACK_LINES, chain=False)
    except BaseException as another:  # noqa: BLE001 - formatting asks the plugin's own exception for its text
        return [f"{_name(error)}, whose traceback cannot be shown ({_name(another)})"]


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=str, allow_nan=False))
