"""The config file, read once into frozen records, and the setup state that follows from it.

A file is taken whole or not at all: `load` tells every mistake in it, with its key and line. Keys that are
ExLab-Wizard's own, or nobody's, are no mistakes but notes. `ConfigFile` follows the file while the service
runs, and keeps the last good reading in force. What the settings are used for, and which of them take effect
before the next start, is left to those who read them.
"""

import asyncio
import os
import re
import stat
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, cast
from urllib.parse import quote

import msgspec
import platformdirs
from msgspec import Meta

from app import yamltext
from app.errors import ConfigInvalid, ConfigMistake
from app.reading import Reading, shown
from app.yamltext import Place

FieldType = Literal["string", "text", "choice", "date", "boolean", "number"]

Words = Annotated[str, Meta(min_length=1, description="text that is not empty")]
EquipmentId = Annotated[
    str,
    Meta(
        pattern=r"^[A-Z][A-Z0-9_]{0,31}$",
        description="a capital letter, then at most 31 capital letters, digits or _",
    ),
]
Suffix = Annotated[str, Meta(pattern=r"^\..", description="a suffix that begins with a dot, such as .csv")]
Origin = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+$",
        description="an origin in small letters without a path, such as https://lab.example:8443",
    ),
]
DatabaseUrl = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9_]*(\+[a-z0-9_]+)?://",
        description="a database URL, such as sqlite+aiosqlite:////var/lib/exlab/sessions.sqlite3",
    ),
]


class Field(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One value that an operator is asked for: in a README, by the config or a template."""

    id: str
    label: str
    type: FieldType = "string"
    required: bool = False
    options: tuple[str, ...] | None = None
    default: object = None
    hint: str | None = None


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute folders; None where the config does not say."""

    templates_dir: Path | None = None
    plugin_dir: Path | None = None
    local_root: Path | None = None


class Equipment(msgspec.Struct, frozen=True, kw_only=True):
    """One instrument. `transport` is kept as it stands for the copy to the NAS."""

    id: EquipmentId
    label: Words
    local_root: Words
    nas_root: Words
    completeness_signal: Literal["sentinel_file", "manifest"] = "sentinel_file"
    sentinel_filename: str | None = None
    manifest_filename: str | None = None
    sync_mode: Literal["nas", "stage"] = "nas"
    transport: dict[str, object] | None = None


class Operators(msgspec.Struct, frozen=True, kw_only=True):
    allowlist: tuple[Words, ...] = ()


class Readme(msgspec.Struct, frozen=True, kw_only=True):
    defaults: tuple[Field, ...] = ()


class Validator(msgspec.Struct, frozen=True, kw_only=True):
    """Which files the check of the built tree reads; sizes in bytes."""

    # fmt: off
    content_scan_extensions: tuple[Suffix, ...] = (
        ".txt", ".md", ".csv", ".tsv", ".json", ".yaml", ".yml",
        ".toml", ".ini", ".cfg", ".conf", ".xml", ".sh", ".py",
    )
    # fmt: on
    content_scan_max_bytes: int = 5 * 1024 * 1024


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    """Which plugins may run, and on which interpreter: `python` None is that of the service."""

    allow_network: bool = False
    run_unlisted: bool = False
    python: Path | None = None


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """How the service itself runs. Times in the unit that their name ends with."""

    host: Words = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="a port from 0 (any free one) to 65535")] = 8321
    state_dir: Path
    database_url: DatabaseUrl
    origins: tuple[Origin, ...] = ()
    require_prompt_id: bool = False
    keep_partial_days: Annotated[float, Meta(ge=0, le=36500, description="days, 0 to 36500")] = 14
    render_workers: Annotated[int, Meta(ge=1, le=32, description="a whole number from 1 to 32")] = 2
    render_timeout_seconds: Annotated[
        float, Meta(gt=0, le=86400, description="seconds, above 0 and at most 86400")
    ] = 120
    render_memory_mb: Annotated[
        int, Meta(ge=256, le=1_048_576, description="whole megabytes, 256 to 1048576")
    ] = 1024
    render_file_mb: Annotated[int, Meta(ge=1, le=1_048_576, description="whole megabytes, 1 to 1048576")] = (
        256
    )
    drain_seconds: Annotated[float, Meta(ge=0, le=3600, description="seconds, 0 to 3600")] = 20


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the config file. `notes` are what `check` tells of keys that mean nothing here."""

    source: Path | None
    paths: Paths
    equipment: tuple[Equipment, ...]
    operators: Operators
    readme: Readme
    validator: Validator
    plugins: Plugins
    service: Service
    notes: tuple[str, ...] = ()


SetupState = Literal["incomplete_no_config", "incomplete_missing_paths", "incomplete_no_equipment", "ready"]


class Missing(msgspec.Struct, frozen=True):
    """One key that keeps the service from creating folders, and why."""

    field: str
    reason: str


class SetupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far the workstation is set up; the first state that applies."""

    state: SetupState
    missing: tuple[Missing, ...] = ()
    next_action: Literal["set_paths", "add_equipment"] | None = None
    ready: bool = False


def default_path() -> Path:
    """Where the config file is looked for when nobody names one."""
    return platformdirs.user_config_path("exlab-sessions") / "config.yaml"


def defaults() -> Settings:
    """The settings when there is no config file."""
    return Settings(
        source=None,
        paths=Paths(),
        equipment=(),
        operators=Operators(),
        readme=Readme(),
        validator=Validator(),
        plugins=Plugins(),
        service=_service({}),
    )


def load(path: Path) -> Settings:
    """Read the config file, or raise `ConfigInvalid` with its mistakes in the order of their lines."""
    settings, problem = _read(path)
    if problem is not None:
        raise problem
    return settings


def setup_status(settings: Settings) -> SetupStatus:
    """Look at the disk for what `settings` still lacks."""
    if settings.source is None:
        return _incomplete_no_config((Missing("config.yaml", "missing"),))
    if missing := _missing_paths(settings.paths):
        return SetupStatus(state="incomplete_missing_paths", missing=missing, next_action="set_paths")
    if not settings.equipment:
        missing = (Missing("equipment", "empty"),)
        return SetupStatus(state="incomplete_no_equipment", missing=missing, next_action="add_equipment")
    return SetupStatus(state="ready", ready=True)


def _incomplete_no_config(missing: tuple[Missing, ...]) -> SetupStatus:
    return SetupStatus(state="incomplete_no_config", missing=missing, next_action="set_paths")


def _missing_paths(paths: Paths) -> tuple[Missing, ...]:
    needs = (
        ("templates_dir", paths.templates_dir, os.R_OK | os.X_OK, "read"),
        ("plugin_dir", paths.plugin_dir, os.R_OK | os.X_OK, "read"),
        ("local_root", paths.local_root, os.R_OK | os.W_OK | os.X_OK, "written to"),
    )
    looked = ((name, _unusable(folder, mode, verb)) for name, folder, mode, verb in needs)
    return tuple(Missing(f"paths.{name}", reason) for name, reason in looked if reason)


def _unusable(folder: Path | None, mode: int, verb: str) -> str | None:
    if folder is None:
        return "unset"
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{folder} does not exist"
    except OSError as error:
        return f"{folder} cannot be looked at: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    effective = os.access in os.supports_effective_ids
    return None if os.access(folder, mode, effective_ids=effective) else f"{folder} cannot be {verb}"


class _View(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at the config file and the disk gave. `seen` None: too fresh to rely on, read it again."""

    seen: tuple[int, ...] | None
    settings: Settings
    problem: ConfigInvalid | None
    status: SetupStatus


class ConfigFile:
    """The config file of a running service.

    The first reading happens when it is made; `refresh` takes up later changes of the file and of the folders
    that it names. A file that breaks or goes away leaves the last good reading in force and is told as
    `problem`. One that is broken from the beginning counts as none, but what is right in its `service`
    section holds, so that the service does not open another database for a typing mistake elsewhere.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path or default_path()
        self._view = _look(self.path, None)
        self._one_at_a_time = asyncio.Lock()

    @property
    def current(self) -> Settings:
        return self._view.settings

    @property
    def problem(self) -> ConfigInvalid | None:
        return self._view.problem

    @property
    def status(self) -> SetupStatus:
        """The setup status as of the last look."""
        return self._view.status

    async def refresh(self) -> None:
        async with self._one_at_a_time:
            self._view = await asyncio.to_thread(_look, self.path, self._view)


def _look(path: Path, before: _View | None) -> _View:
    seen = _identity(path)
    if before is not None and seen is not None and seen == before.seen:
        settings, problem = before.settings, before.problem
    else:
        settings, problem = _reread(path, before.settings if before else defaults())
    if problem is not None and settings.source is None:
        status = _incomplete_no_config(tuple(_missing(mistake) for mistake in problem.mistakes))
    else:
        status = setup_status(settings)
    return _View(seen=seen, settings=settings, problem=problem, status=status)


def _missing(mistake: ConfigMistake) -> Missing:
    field = "config.yaml" if mistake.key == "file" else mistake.key
    place = f"line {mistake.line}: " if mistake.line else ""
    return Missing(field, place + mistake.message)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does; () where there is none, None where that cannot be told.

    File systems keep times as coarse as two seconds: a file that was changed just now may change again without
    looking different, and is not given an identity yet.
    """
    try:
        found = path.stat()
    except OSError:
        return () if _absent(path) else None
    if abs(time.time() - found.st_mtime) < 2:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _absent(path: Path) -> bool:
    """Whether nobody has put a file there; a link that leads nowhere is one that broke."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _reread(path: Path, before: Settings) -> tuple[Settings, ConfigInvalid | None]:
    """The settings that are in force now, and what is wrong with the file."""
    if before.source is None:
        return (defaults(), None) if _absent(path) else _read(path)
    # A file that had content and has none may be in the middle of being written.
    settings, problem = _read(path, may_be_blank=False)
    return (settings, None) if problem is None else (before, problem)


def _of_file(path: Path, message: str, line: int | None = None) -> ConfigInvalid:
    return ConfigInvalid(path, (ConfigMistake(key="file", line=line, message=message),))


def _read(path: Path, *, may_be_blank: bool = True) -> tuple[Settings, ConfigInvalid | None]:
    """The settings in the file. With a problem: the defaults, and what is right in the `service` section."""
    try:
        document = yamltext.parse(_contents(path))
    except OSError as error:
        return defaults(), _of_file(path, f"cannot be read: {error.strerror}")
    except yamltext.Unreadable as error:
        return defaults(), _of_file(path, error.message, error.line)
    if document.value is None and not may_be_blank:
        return defaults(), _of_file(path, "is empty")
    reading = Reading(document, path.absolute().parent, _OF_EXLAB_WIZARD)
    settings = _settings(reading, document.value, path)
    if not reading.mistakes:
        return settings, None
    mistakes = sorted(reading.mistakes, key=lambda mistake: mistake.line or 0)[:_MAX_TOLD]
    return msgspec.structs.replace(defaults(), service=settings.service), ConfigInvalid(path, tuple(mistakes))


def _contents(path: Path) -> bytes:
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise yamltext.Unreadable("is not a regular file")
        return file.read(yamltext.MAX_BYTES + 1)


def _open_at_once(path: str, flags: int) -> int:
    # Opening a named pipe waits for its other end, unless told not to.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class _ValidatorKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The `validator` section as ExLab-Wizard writes it."""

    content_scan_extensions: tuple[Suffix, ...] = Validator().content_scan_extensions
    content_scan_max_mib: Annotated[int, Meta(ge=1, le=1024, description="whole mebibytes, 1 to 1024")] = 5


_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "paths": Paths,
    "operators": Operators,
    "validator": _ValidatorKeys,
    "plugins": Plugins,
    "service": Service,
}
_OF_EXLAB_WIZARD: dict[Place, tuple[str, ...]] = {
    (): ("lims", "nas", "nas_cleanup", "logging", "orchestrator", "sync"),
    ("equipment",): ("orchestrator_staging_transport",),
}
_MAX_TOLD = 100
_CORE_FIELDS = ("label", "operator", "objective")
_FILENAME_OF_SIGNAL = {"sentinel_file": "sentinel_filename", "manifest": "manifest_filename"}


def _settings(reading: Reading, value: object, source: Path) -> Settings:
    top = reading.mapping(value, ())
    reading.note_unknown(top, [*_SECTIONS, "readme", "equipment"], ())
    found = {name: reading.values(kind, top.get(name), (name,)) for name, kind in _SECTIONS.items()}
    paths = msgspec.convert(found["paths"], Paths)
    return Settings(
        source=source,
        paths=paths,
        equipment=_equipment(reading, top.get("equipment"), paths),
        operators=msgspec.convert(found["operators"], Operators),
        readme=_readme(reading, top.get("readme")),
        validator=_validator(msgspec.convert(found["validator"], _ValidatorKeys)),
        plugins=msgspec.convert(found["plugins"], Plugins),
        service=_service(_anchored(reading, found["service"])),
        notes=tuple(reading.notes[:_MAX_TOLD]),
    )


def _equipment(reading: Reading, given: object, paths: Paths) -> tuple[Equipment, ...]:
    taken: dict[str, Equipment] = {}
    for at, equipment in reading.records(Equipment, given, ("equipment",)):
        if equipment.id in taken:
            reading.mistake((*at, "id"), f"{equipment.id} stands twice; expected an id of its own")
        taken[equipment.id] = equipment
        _check_equipment(reading, equipment, at, paths)
    return tuple(taken.values())


def _check_equipment(reading: Reading, equipment: Equipment, at: Place, paths: Paths) -> None:
    if "password" in (equipment.transport or {}):
        message = "passwords are not kept in this file; expected a key, by ssh_key_path"
        reading.mistake((*at, "transport", "password"), message)
    filename = _FILENAME_OF_SIGNAL[equipment.completeness_signal]
    if not getattr(equipment, filename):
        reading.note((*at, filename), "is not set, so nothing will tell when an acquisition is complete")
    root = reading.path(equipment.local_root, (*at, "local_root"))
    if paths.local_root and root and root != paths.local_root:
        reading.note((*at, "local_root"), "is not paths.local_root, which is where folders are made")


def _readme(reading: Reading, given: object) -> Readme:
    section = reading.mapping(given, ("readme",))
    reading.note_unknown(section, ["defaults"], ("readme",))
    fields: dict[str, Field] = {}
    for at, field in reading.records(Field, section.get("defaults"), ("readme", "defaults")):
        if field.id in fields:
            reading.mistake((*at, "id"), f"{field.id} stands twice; expected an id of its own")
        fields[field.id] = _checked_field(reading, field, at)
    return Readme(defaults=tuple(fields.values()))


def _checked_field(reading: Reading, field: Field, at: Place) -> Field:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", field.id):
        reading.mistake((*at, "id"), f"expected small letters, digits and _, not {shown(field.id)}")
    if field.id in _CORE_FIELDS:
        reading.mistake((*at, "id"), f"{field.id} is asked for always; expected another id")
    if not field.label:
        reading.mistake((*at, "label"), "expected text that is not empty")
    if field.type == "choice" and not field.options:
        reading.mistake((*at, "options"), "expected a list of what can be chosen")
    if field.default in (None, "") or _default_fits(field):
        return field if field.default != "" else msgspec.structs.replace(field, default=None)
    reading.note((*at, "default"), f"does not fit the type {field.type}, and is left out")
    return msgspec.structs.replace(field, default=None)


def _anchored(reading: Reading, service: dict[str, object]) -> dict[str, object]:
    """With the file of an SQLite URL found as every other path is, and not from the working directory."""
    found = re.fullmatch(r"(sqlite[^:]*:///)(?!:memory:|file:)([^?]+)(.*)", str(service.get("database_url")))
    file = reading.path(found[2], ("service", "database_url")) if found else None
    if not found or not file:
        return service
    return service | {"database_url": f"{found[1]}{file.as_posix()}{found[3]}"}


def _default_fits(field: Field) -> bool:
    match field.type, field.default:
        case "boolean", value:
            return isinstance(value, bool)
        case "number", value:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "choice", value:
            return value in (field.options or ())
        case "date", str(value):
            return _is_date(value)
        case _, value:
            return isinstance(value, str)


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _validator(keys: _ValidatorKeys) -> Validator:
    return Validator(
        content_scan_extensions=keys.content_scan_extensions,
        content_scan_max_bytes=keys.content_scan_max_mib * 1024 * 1024,
    )


def _service(found: dict[str, object]) -> Service:
    """With the state folder and the database in it where `found` does not say."""
    state_dir = cast("Path", found.get("state_dir") or platformdirs.user_state_path("exlab-sessions"))
    file = quote((state_dir / "sessions.sqlite3").as_posix(), safe="/: ")
    database_url = f"sqlite+aiosqlite:///{file}"
    return msgspec.convert({"database_url": database_url, **found, "state_dir": state_dir}, Service)
