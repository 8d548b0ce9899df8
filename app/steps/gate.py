"""The gate: are these inputs good, and where will the folder be?

Looks, and writes nothing. Every value that a client can send ends in `Passed` or in a `Failure` that names the
field; no value leads to an exception or to a destination outside the data root. Only the file system's own
errors leave as OSError, for whoever can wait for them. Whether a live session holds the destination is left to
the store, what only Jinja can tell to `render`, and whether a plugin likes its variables to the plugin.
"""

import ctypes
import datetime
import errno
import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from app import disk
from app.errors import Failure
from app.settings import Equipment, Field, Settings
from app.steps import fields, pinning, templates
from app.steps.pinning import Entry
from app.steps.plugins import registry
from app.steps.templates import Template, encodable, shown

_EQUIPMENT_ID = re.compile("[A-Z][A-Z0-9_]{0,31}")
_PROJECT_ID = re.compile("PROJ-[0-9]+")
_LONGEST_PROJECT_ID = 64
_LONGEST_LABEL = 100
_LONGEST_OBJECTIVE = 2000
_LONGEST_TEXT = 65_536
_DEEPEST = 32
_LARGEST = 2**63

_DEVICES = ("CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)))
"""Names that Windows keeps for itself, with any suffix; a data root is often shared with Windows."""

_RUN_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d|\d{8}|\d{4}-W\d\d-\d|\d{4}W\d{3})"
    r"(?:[T ]\d\d(:?\d\d(:?\d\d([.,]\d{1,9})?)?)?(Z|[+-]\d\d(:?\d\d)?)?)?",
    re.ASCII,
)
_SECONDS_TO_TRY = 3600

_SPARE_ROOM = 64 * 1024**2
_NAME_MARK = re.compile(r"\{\{\s*(\w+)\s*\}\}|\{\{.*?\}\}|\{%.*?%\}")
_PATH_OF_OURS = ".exlab-wizard/.readme_fields.json.tmp"
_ATTEMPT = "0" * 8


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for. `project_short_id`, `run_kind` and `run_date` belong to runs."""

    kind: Literal["project", "run"]
    equipment_id: str
    template_path: str
    label: str
    operator: str
    objective: str
    project_short_id: str | None = None
    run_kind: str | None = None
    run_date: str | None = None
    lims_project: dict[str, object] = {}
    variables: dict[str, object] = {}
    readme_extra: dict[str, object] = {}


class ReadmeValues(msgspec.Struct, frozen=True, kw_only=True):
    """`readme_extra` by who asked for it; `custom_fields` are {label, value} in the order that they came in."""

    template_fields: dict[str, object]
    config_fields: dict[str, object]
    custom_fields: tuple[dict[str, object], ...]


class Caution(msgspec.Struct, frozen=True):
    """What the operator should know of, and nothing stops for."""

    code: str
    message: str


class Planned(msgspec.Struct, frozen=True):
    """A plugin that will run, as it is now; `version` None where it is not there."""

    name: str
    version: str | None


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs that are good. The keys are equal for paths that some file system takes for the same.

    `run_at` is the wall clock that names a run, with the offset that it came with, if any. `answers` is what the
    template is rendered with: the variables, and where they lack them the values that every template may use.
    """

    template: Template
    equipment: Equipment
    project_short_id: str
    destination: Path
    destination_key: str
    project_key: str
    run_at: datetime.datetime | None
    label: str
    operator: str
    objective: str
    readme: ReadmeValues
    answers: dict[str, object]
    plugins: tuple[Planned, ...]
    warnings: tuple[Caution, ...]


class _Refused(Exception):
    """A value does not pass."""

    def __init__(
        self, code: str, message: str, field: str | None, details: dict[str, object] | None = None
    ) -> None:
        self.failure = Failure(code=code, message=message, field=field, details=details)
        super().__init__(message)


def examine(
    inputs: Inputs,
    settings: Settings,
    *,
    now: datetime.datetime,
    session_folder: Path,
    held: frozenset[str] = frozenset(),
) -> Passed | Failure:
    """Check everything, in this order; the first thing that is wrong is the answer.

    1. the equipment  2. the project's id  3. label, objective, operator  4. the template  5. the README fields
    6. the variables, also those of plugins  7. the destination  8. its longest path  9. the room on the disk

    Without a `run_date` a run gets the second of `now`, or the next one whose folder is neither there nor among
    the destination keys that are `held`. `now` has a time zone.
    """
    try:
        return _examine(inputs, settings, now, session_folder, held)
    except _Refused as refused:
        return refused.failure


def _examine(
    inputs: Inputs, settings: Settings, now: datetime.datetime, session_folder: Path, held: frozenset[str]
) -> Passed:
    root = _data_root(settings)
    equipment = _equipment(inputs, settings)
    project_id = _project_id(inputs)
    label = _words("label", inputs.label, _LONGEST_LABEL)
    objective = _words("objective", inputs.objective, _LONGEST_OBJECTIVE, lines=True)
    operator = _operator(inputs, settings)
    template, entries = _template(inputs, settings, root)
    readme = _readme(inputs, template, settings)
    project = root / equipment.id / project_id
    answers = _answers(inputs, {"label": label, "objective": objective, "operator": operator}, project_id)
    _check_variables(inputs, template, answers)
    plugins = tuple(_plugins(template, settings, answers))
    run_at, destination = _destination(inputs, root, project, now, held)
    answers.setdefault("destination", str(destination))
    _check_lengths(template, entries, answers, root, destination, session_folder)
    _check_room(entries, root)
    return Passed(
        template=template,
        equipment=equipment,
        project_short_id=project_id,
        destination=destination,
        destination_key=_key(destination),
        project_key=_key(project),
        run_at=run_at,
        label=label,
        operator=operator,
        objective=objective,
        readme=readme,
        answers=answers,
        plugins=plugins,
        warnings=tuple(_cautions(template)),
    )


def _key(path: Path) -> str:
    return disk.folded(os.path.abspath(path))


def _data_root(settings: Settings) -> Path:
    root = settings.paths.local_root
    if root is None:
        raise _Refused("validation_failed", "paths.local_root is not set in the config", None)
    if not root.is_dir():
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(root))
    return root


def _equipment(inputs: Inputs, settings: Settings) -> Equipment:
    wanted = inputs.equipment_id
    found = [equipment for equipment in settings.equipment if equipment.id == wanted]
    if not found:
        message = f"{shown(wanted)} is not among the configured equipment"
        raise _Refused("validation_failed", message, "equipment_id")
    if not _EQUIPMENT_ID.fullmatch(wanted) or wanted in _DEVICES:
        message = f"{shown(wanted)} cannot be the name of a folder; expected capital letters, digits and _"
        raise _Refused("equipment_id_invalid", message, "equipment_id")
    return found[0]


def _project_field(inputs: Inputs) -> str:
    return "project_short_id" if inputs.kind == "run" else "lims_project.short_id"


def _project_id(inputs: Inputs) -> str:
    field = _project_field(inputs)
    given = inputs.project_short_id if inputs.kind == "run" else inputs.lims_project.get("short_id")
    if not isinstance(given, str) or not _PROJECT_ID.fullmatch(given):
        told = "is missing" if given is None else f"is {shown(given)}"
        raise _Refused("validation_failed", f"the project id {told}; expected PROJ- and a number", field)
    if len(given) > _LONGEST_PROJECT_ID:
        message = f"the project id has more than {_LONGEST_PROJECT_ID} characters"
        raise _Refused("field_too_long", message, field, {"max_length": _LONGEST_PROJECT_ID})
    _check_plain_values("lims_project", inputs.lims_project)
    return given


def _words(field: str, given: str, longest: int, *, lines: bool = False) -> str:
    """`given` without blanks around it, if it is text that people can read; on one line unless `lines`."""
    text = given.strip()
    if not any(unicodedata.category(character)[0] not in "CZ" for character in text):
        raise _Refused("validation_failed", f"{field} must not be empty", field)
    if len(text) > longest:
        message = f"{field} has {len(text)} characters; at most {longest} are allowed"
        raise _Refused("field_too_long", message, field, {"max_length": longest})
    if problem := fields.unreadable(text, lines=lines):
        raise _Refused("validation_failed", f"{field} {problem}", field)
    return text


def _operator(inputs: Inputs, settings: Settings) -> str:
    operator = _words("operator", inputs.operator, _LONGEST_LABEL)
    allowed = settings.operators.allowlist
    if allowed and operator not in allowed:
        message = f"{shown(operator)} is not on the list of operators"
        raise _Refused("validation_failed", message, "operator", {"allowed": list(allowed)})
    return operator


def _template(inputs: Inputs, settings: Settings, root: Path) -> tuple[Template, tuple[Entry, ...]]:
    _check_kind(inputs)
    base = settings.paths.templates_dir
    if base is None:
        message = "paths.templates_dir is not set in the config"
        raise _Refused("template_load_error", message, "template_path")
    own = root / inputs.equipment_id / ".exlab-wizard" / "templates"
    folder = templates.locate(inputs.template_path, templates_dir=base, equipment_dir=own)
    if isinstance(folder, Failure):
        raise _refusal(folder)
    template = templates.load(folder)
    if isinstance(template, Failure):
        raise _refusal(template)
    _check_serves(template, inputs)
    entries = pinning.survey(folder, follow=not template.preserve_symlinks)
    if isinstance(entries, Failure):
        raise _refusal(entries)
    return template, entries


def _refusal(failure: Failure) -> _Refused:
    return _Refused(failure.code, failure.message, failure.field, failure.details)


def _check_kind(inputs: Inputs) -> None:
    if inputs.kind not in ("project", "run"):
        raise _Refused("validation_failed", "kind is neither project nor run", "kind")
    if inputs.kind == "run" and inputs.run_kind not in ("experimental", "test"):
        raise _Refused("validation_failed", "run_kind is neither experimental nor test", "run_kind")


def _check_serves(template: Template, inputs: Inputs) -> None:
    if template.type != inputs.kind:
        message = f"the template {template.name} is for {template.type}s, not for {inputs.kind}s"
        raise _Refused("template_load_error", message, "template_path")
    if inputs.kind == "run" and template.run_scope not in (inputs.run_kind, "both"):
        message = f"the template {template.name} is for {template.run_scope} runs, not for {inputs.run_kind}"
        raise _Refused("template_load_error", message, "template_path")


def _check_plain_values(prefix: str, values: dict[str, object]) -> None:
    for key, value in values.items():
        if not key.isprintable() or not 1 <= len(key) <= _LONGEST_LABEL:
            raise _Refused("validation_failed", f"{prefix} has the unusable key {shown(key)}", prefix)
        _check_plain(f"{prefix}.{key}", value)


def _check_plain(field: str, value: object, depth: int = 0) -> None:
    """Refuse what JSON, a database or a file could not hold, or only at a cost."""
    if depth > _DEEPEST:
        raise _Refused("validation_failed", f"{field} is nested deeper than {_DEEPEST} levels", field)
    match value:
        case None | bool():
            return
        case int() if -_LARGEST <= value < _LARGEST:
            return
        case float() if math.isfinite(value):
            return
        case str():
            _check_text(field, value)
        case list():
            for item in value:
                _check_plain(field, item, depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise _Refused("validation_failed", f"{field} has a key that is no text", field)
                _check_text(field, key)
                _check_plain(field, item, depth + 1)
        case int() | float():
            raise _Refused("validation_failed", f"{field} holds a number that cannot be kept", field)
        case _:
            message = f"{field} holds a {type(value).__name__}, which is no JSON"
            raise _Refused("validation_failed", message, field)


def _check_text(field: str, text: str) -> None:
    if len(text) > _LONGEST_TEXT:
        message = f"{field} has {len(text)} characters; at most {_LONGEST_TEXT} are allowed"
        raise _Refused("field_too_long", message, field, {"max_length": _LONGEST_TEXT})
    if "\0" in text or not encodable(text):
        raise _Refused("validation_failed", f"{field} holds a character that no file can hold", field)


def _readme(inputs: Inputs, template: Template, settings: Settings) -> ReadmeValues:
    """A field that the template and the config declare is the template's, and required if either says so."""
    given = inputs.readme_extra
    _check_plain_values("readme_extra", given)
    asked = [
        field for field in settings.readme.defaults if field.id not in ("label", "operator", "objective")
    ]
    required = {field.id for field in (*template.readme_fields, *asked) if field.required}
    own = {field.id for field in template.readme_fields}
    asked = [field for field in asked if field.id not in own]
    declared = own | {field.id for field in asked}
    return ReadmeValues(
        template_fields=dict(_field_values(template.readme_fields, given, required)),
        config_fields=dict(_field_values(tuple(asked), given, required)),
        custom_fields=tuple(_custom({key: given[key] for key in given if key not in declared})),
    )


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _field_values(
    asked: tuple[Field, ...], given: dict[str, object], required: set[str]
) -> Iterator[tuple[str, object]]:
    """What was given, without what was left blank. Defaults are what a form starts with, and fill nothing in."""
    for field in asked:
        value, name = given.get(field.id), f"readme_extra.{field.id}"
        if not _is_blank(value):
            yield field.id, _field_value(field, value, name)
        elif field.id in required:
            raise _Refused("validation_failed", f"the README field {field.id} is required", name)


def _field_value(field: Field, value: object, name: str) -> object:
    tidy = _tidied(field, value)
    if problem := fields.misfit(field, tidy):
        raise _Refused("validation_failed", f"the README field {field.id} is {shown(value)}: {problem}", name)
    return tidy


def _tidied(field: Field, value: object) -> object:
    """Without blanks around a date; a number among choices as the text that it is shown as."""
    match field.type, value:
        case "date", str():
            return value.strip()
        case "choice", int() | float() if not isinstance(value, bool):
            return str(value)
    return value


def _custom(given: dict[str, object]) -> Iterator[dict[str, object]]:
    for key, value in given.items():
        if isinstance(value, list | dict):
            message = f"the README field {shown(key)} is not declared, so that it takes text"
            raise _Refused("validation_failed", message, f"readme_extra.{key}")
        if not _is_blank(value):
            yield {"label": key, "value": value}


def _answers(inputs: Inputs, words: dict[str, object], project_id: str) -> dict[str, object]:
    core = {**words, "equipment_id": inputs.equipment_id, "project_short_id": project_id}
    if inputs.run_kind is not None:
        core["run_kind"] = inputs.run_kind
    return core | inputs.variables


def _check_variables(inputs: Inputs, template: Template, answers: dict[str, object]) -> None:
    _check_plain_values("variables", inputs.variables)
    for question in template.questions:
        name = f"variables.{question.name}"
        if question.name in answers:
            answer = answers[question.name]
            if problem := fields.wrong_answer(question, answer):
                message = f"{question.name} is {shown(answer)}: {problem}"
                raise _Refused("validation_failed", message, name)
        elif question.required and question.name != "destination":
            raise _Refused("validation_failed", f"the template asks for {question.name}", name)


def _plugins(template: Template, settings: Settings, answers: dict[str, object]) -> Iterator[Planned]:
    """Those that the template lists, in its order, then the others where the config has them run."""
    found = registry.catalogue(settings.paths.plugin_dir, allow_network=settings.plugins.allow_network)
    others = [plugin.name for plugin in found.plugins if plugin.name not in template.plugins]
    for name in dict.fromkeys((*template.plugins, *(others if settings.plugins.run_unlisted else ()))):
        plugin = found.named(name)
        if plugin is not None:
            _check_wants(plugin, template, answers)
        yield Planned(name, plugin.version if plugin else None)


def _check_wants(plugin: registry.Manifest, template: Template, answers: dict[str, object]) -> None:
    """What the template asks for is there when it is rendered; the plugin itself says whether it will do."""
    asked = {question.name for question in template.questions}
    for name in plugin.required_variables:
        if name not in asked and name != "destination" and _is_blank(answers.get(name)):
            message = f"the plugin {plugin.name} needs the variable {name}"
            raise _Refused("plugin_variable_validation_failed", message, f"variables.{name}")


def _destination(
    inputs: Inputs, root: Path, project: Path, now: datetime.datetime, held: frozenset[str]
) -> tuple[datetime.datetime | None, Path]:
    field = _project_field(inputs)
    equipment = (project.parent.name, "equipment_id")
    if inputs.kind == "project":
        if disk.folded(project.name) in _taken_below(root, [equipment]):
            raise _taken(project, field)
        return None, project
    tests = [("TestRuns", field)] if inputs.run_kind == "test" else []
    way = [equipment, (project.name, field), *tests]
    first = _run_at(inputs, now)
    taken = _taken_below(root, way)
    parent = root.joinpath(*(name for name, _ in way))
    for seconds in range(_SECONDS_TO_TRY if inputs.run_date is None else 1):
        run_at = first + datetime.timedelta(seconds=seconds)
        name = _run_name(inputs, run_at)
        free = inputs.run_date is not None or _key(parent / name) not in held
        if free and disk.folded(name) not in taken:
            return run_at, parent / name
    raise _taken(parent / _run_name(inputs, first), "run_date")


def _taken(path: Path, field: str) -> _Refused:
    message = f"{path} is there already, perhaps in other letters; nothing is ever written into it"
    return _Refused("destination_taken", message, field, {"path": str(path)})


def _taken_below(root: Path, way: list[tuple[str, str]]) -> set[str]:
    """The folded names in the folder that `way` leads to from `root`; each step with the field that it is from.

    A step that is not there yet will be made. One that is there in other letters, or as something else than a
    folder, or that leads out of the root, is refused.
    """
    folder, real = root, Path(os.path.realpath(root))
    names = set(os.listdir(root))
    for name, field in way:
        folder = folder / name
        if name not in names:
            if disk.folded(name) in {disk.folded(other) for other in names}:
                raise _taken(folder, field)
            return set()
        if not folder.is_dir():
            raise _taken(folder, field)
        if not Path(os.path.realpath(folder)).is_relative_to(real):
            raise _Refused("validation_failed", f"{folder} is a link that leads out of the data root", field)
        names = set(os.listdir(folder))
    return {disk.folded(name) for name in names}


def _run_name(inputs: Inputs, at: datetime.datetime) -> str:
    stamp = at.replace(tzinfo=None).isoformat(timespec="seconds").replace(":", "-")
    return f"{'Run' if inputs.run_kind == 'experimental' else 'TestRun'}_{stamp}"


def _run_at(inputs: Inputs, now: datetime.datetime) -> datetime.datetime:
    """The wall clock in `run_date`, to the second. A date alone is taken as its midnight."""
    if inputs.run_date is None:
        return now.astimezone(datetime.UTC).replace(microsecond=0)
    text = inputs.run_date.strip().upper()
    try:
        if not _RUN_DATE.fullmatch(text):
            raise ValueError("not ISO 8601")
        return datetime.datetime.fromisoformat(text).replace(microsecond=0)
    except ValueError as error:
        message = f"{shown(inputs.run_date)} is no date; expected ISO 8601, such as 2026-04-17T14:32:05"
        raise _Refused("validation_failed", message, "run_date") from error


def _check_lengths(
    template: Template,
    entries: tuple[Entry, ...],
    answers: dict[str, object],
    root: Path,
    destination: Path,
    session_folder: Path,
) -> None:
    """An estimate: names are worked out as far as that goes without Jinja."""
    longest_name, longest_path = _limits(root)
    values = {question.name: question.default for question in template.questions} | answers
    paths = [_Rendered(template, entry, values) for entry in entries]
    for path in paths:
        if any(_length(name) > longest_name for name in path.text.split("/")):
            raise path.too_long(f"the name {shown(path.text)} is longer than the disk takes")
    below = max([_PATH_OF_OURS, *(path.text for path in paths)], key=_length)
    raw = max((entry.path for entry in entries), key=_length, default="")
    tree = session_folder / _ATTEMPT / "tree"
    for path_ in (destination / below, tree / below, session_folder / "template.partial" / raw):
        if _length(str(path_)) > longest_path:
            message = (
                f"the path {shown(str(path_))} is longer than the {longest_path} characters that fit here"
            )
            guilty = next((path for path in paths if path.text == below), None)
            raise guilty.too_long(message) if guilty else _too_long_path(message)


def _too_long_path(message: str) -> _Refused:
    return _Refused("validation_failed", message, "template_path")


class _Rendered:
    """The path of one template file as it will come out, and which variable is in it."""

    def __init__(self, template: Template, entry: Entry, values: dict[str, object]) -> None:
        self._values = values
        self._variable: str | None = None
        path = entry.path.removeprefix(template.subdirectory.strip("/") + "/")
        path = path.removesuffix(template.suffix) if entry.kind == "file" else path
        self.text = _NAME_MARK.sub(self._value, path)

    def _value(self, mark: re.Match[str]) -> str:
        if mark[1] is None or mark[1] not in self._values:
            return ""
        self._variable = mark[1]
        return str(self._values[mark[1]])

    def too_long(self, message: str) -> _Refused:
        if self._variable is None:
            return _too_long_path(message)
        return _Refused("field_too_long", message, f"variables.{self._variable}")


if sys.platform == "win32":

    def _limits(_root: Path) -> tuple[int, int]:
        # MAX_PATH counts the NUL at the end.
        return 255, 32_000 if ctypes.windll.ntdll.RtlAreLongPathsEnabled() else 259

    def _length(path: str) -> int:
        return len(path.encode("utf-16-le")) // 2

else:

    def _limits(root: Path) -> tuple[int, int]:
        """The longest name and the longest path, in what `_length` counts; PATH_MAX counts the NUL at the end."""
        name, path = os.pathconf(root, "PC_NAME_MAX"), os.pathconf(root, "PC_PATH_MAX")
        return (name if name > 0 else 255), (path if path > 0 else 4096) - 1

    def _length(path: str) -> int:
        return len(os.fsencode(path))


def _check_room(entries: tuple[Entry, ...], root: Path) -> None:
    """Twice the template: its pinned copy, and the tree that is rendered from it."""
    needed = 2 * sum(entry.size for entry in entries) + _SPARE_ROOM
    free = shutil.disk_usage(root).free
    if free < needed:
        message = f"{root} has {free // 1024**2} MiB of room; {needed // 1024**2} MiB are needed"
        details: dict[str, object] = {"free_bytes": free, "needed_bytes": needed}
        raise _Refused("disk_space_insufficient", message, None, details)


def _cautions(template: Template) -> Iterator[Caution]:
    if template.has_tasks:
        yield Caution("template_has_tasks", f"the tasks of the template {template.name} are not run")
