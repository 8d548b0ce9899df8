"""Templates: finding them, and what they say of themselves in their `copier.yml`.

Whatever a template holds, reading it costs a bounded amount of time and memory and ends in a record or in a
`Failure` that says what to mend; no Jinja is evaluated and no code of the template runs. Questions, their choices
and their defaults are told as Copier takes them. Keeping a copy of a template is left to `pinning`; rendering, and
what only Jinja can tell (computed choices, conditions), to `render`.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, cast

import msgspec
from msgspec import UNSET

from app import yamltext
from app.errors import Failure
from app.settings import Field
from app.steps import casting
from app.steps.casting import QuestionType

_CORE_FIELDS = ("label", "operator", "objective")
_SCOPES = ("experimental", "test", "both")
_NAMES_OF_COPIER = ("now", "make_secret")
_MARKS = tuple(
    f"{kind}_{end}_string" for kind in ("block", "variable", "comment") for end in ("start", "end")
)

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)

READ_AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Opening a named pipe waits for its other end, unless told not to; Windows has neither flag, but O_BINARY."""


class Choice(msgspec.Struct, frozen=True):
    label: str
    value: object


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question of the template.

    `required`: there is neither a default nor a condition, so that an answer must be given. `when` is text where
    it is a Jinja expression. `computed`: type or choices are Jinja expressions, so that only Copier can tell
    which answers fit.
    """

    name: str
    type: QuestionType = "yaml"
    help: str = ""
    choices: tuple[Choice, ...] = ()
    default: object = None
    required: bool = False
    multiselect: bool = False
    secret: bool = False
    computed: bool = False
    when: bool | str = True
    placeholder: str = ""


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """What `copier.yml` says. `path` has no links in it; `name` is its last part.

    `subdirectory`, `suffix` and `preserve_symlinks` are Copier's settings of these names.
    """

    name: str
    path: Path
    type: Literal["project", "run", "equipment"]
    version: str
    run_scope: Literal["experimental", "test", "both"] | None = None
    description: str | None = None
    plugins: tuple[str, ...] = ()
    plugins_fatal: bool = False
    readme_fields: tuple[Field, ...] = ()
    questions: tuple[Question, ...] = ()
    has_tasks: bool = False
    answers_file: str = ".copier-answers.yml"
    subdirectory: str = ""
    suffix: str = ".jinja"
    preserve_symlinks: bool = False


class Problem(msgspec.Struct, frozen=True):
    """Why what lies at `path` cannot be used."""

    path: Path
    message: str


class Catalogue(msgspec.Struct, frozen=True):
    templates: tuple[Template, ...]
    problems: tuple[Problem, ...]


class Unusable(Exception):
    """The template cannot be used."""

    code = "template_load_error"

    def failure(self) -> Failure:
        return Failure(code=self.code, message=str(self), field="template_path")


class _Redeclared(Unusable):
    code = "template_core_field_redeclared"


def shown(value: object) -> str:
    """`value` for a message: short, on one line, and free of what a terminal or a log would act on."""
    match value:
        case str():
            text = ascii(value[:80])
            return text if len(value) <= 80 and len(text) <= 80 else f"{text[:76]}...'"
        case None | bool() | float():
            return str(value)
        case int() if abs(value) < 2**64:
            return str(value)
    # Writing out a number of many digits, or a deep list, is more than a message is worth.
    return f"a value of type {type(value).__name__}"


def locate(template_path: str, *, templates_dir: Path, equipment_dir: Path) -> Path | Failure:
    """The template's folder without links, if it lies in one of the two folders; relative to `templates_dir`."""
    try:
        return _located(template_path, templates_dir, (templates_dir, equipment_dir))
    except Unusable as unusable:
        return unusable.failure()


def _located(template_path: str, base: Path, roots: tuple[Path, ...]) -> Path:
    if not template_path.strip():
        raise Unusable("no template is named")
    if "\0" in template_path or not encodable(template_path) or len(template_path) > 4096:
        raise Unusable(f"{shown(template_path)} is not a path")
    found = Path(os.path.realpath(base / template_path))
    # What lies elsewhere is refused unseen: the answer must not tell whether it is there.
    if not any(_is_below(found, Path(os.path.realpath(root))) for root in roots):
        raise Unusable(
            f"{shown(template_path)} does not lie in the templates folder or in the equipment's own"
        )
    if not _is_folder(found):
        raise Unusable(f"there is no template {shown(template_path)}")
    return found


def _is_below(path: Path, root: Path) -> bool:
    return path != root and path.is_relative_to(root)


def _is_folder(path: Path) -> bool:
    """Other errors than these are the file system's, and go to whoever can wait for it."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if leads_nowhere(error):
            return False
        raise


def leads_nowhere(error: OSError) -> bool:
    """Whether the path is to blame, and not the file system."""
    return error.errno in _NOT_THERE


def encodable(text: str) -> bool:
    """Whether there is no half of a character in it, which no file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def catalogue(folders: Iterable[Path]) -> Catalogue:
    """Every template directly below `folders`; a folder that does not exist holds none."""
    templates: list[Template] = []
    problems: list[Problem] = []
    for folder in folders:
        for found in _listed(folder):
            (templates if isinstance(found, Template) else problems).append(found)  # type: ignore[arg-type]
    return Catalogue(tuple(templates), tuple(problems))


def _listed(folder: Path) -> Iterator[Template | Problem]:
    try:
        children = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        yield Problem(folder, f"cannot be read: {error.strerror}")
        return
    for child in children:
        if child.is_dir():
            yield _looked_at(child, folder)


def _looked_at(child: Path, folder: Path) -> Template | Problem:
    try:
        place = locate(str(child), templates_dir=folder, equipment_dir=folder)
        found = load(place) if isinstance(place, Path) else place
    except OSError as error:
        return Problem(child, f"cannot be read: {error.strerror}")
    return Problem(child, found.message) if isinstance(found, Failure) else found


def load(folder: Path) -> Template | Failure:
    """Read the template's `copier.yml`."""
    try:
        path = Path(os.path.realpath(folder))
        return _template(path, _manifest(path))
    except Unusable as unusable:
        return unusable.failure()


def marks(folder: Path) -> dict[str, str]:
    """The texts of `_envops`: by which marks, if not the usual ones, Jinja knows what to evaluate."""
    told = _manifest(Path(os.path.realpath(folder))).get("_envops")
    given = told if isinstance(told, dict) else {}
    return {name: str(given[name]) for name in _MARKS if isinstance(given.get(name), str)}


def _manifest(folder: Path) -> dict[str, object]:
    path = _manifest_path(folder)
    try:
        content = casting.read(_contents(path))
    except yamltext.Unreadable as error:
        line = f" line {error.line}" if error.line else ""
        raise Unusable(f"{path.name}{line}: {error.message}") from error
    if not isinstance(content, dict):
        raise Unusable(f"{path.name} does not hold keys with values")
    for key in content:
        if not isinstance(key, str):
            raise Unusable(
                f"{path.name} has the key {shown(key)}, which is no text to Copier; put it in quotes"
            )
    return content


def _manifest_path(folder: Path) -> Path:
    if not _is_folder(folder):
        raise Unusable(f"{folder.name} is not a folder")
    found = [path for path in folder.iterdir() if re.fullmatch(r"copier\.ya?ml", path.name, re.IGNORECASE)]
    if len(found) != 1:
        raise Unusable("has no copier.yml" if not found else "has both a copier.yml and a copier.yaml")
    real = Path(os.path.realpath(found[0]))
    if not _is_below(real, folder):
        raise Unusable(f"{found[0].name} is a link that leads out of the template")
    return found[0]


def _contents(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unusable(f"{path.name} is not a regular file")
        with open(os.open(path, READ_AT_ONCE), "rb") as file:
            return file.read(yamltext.MAX_BYTES + 1)
    except OSError as error:
        if leads_nowhere(error):
            raise Unusable(f"{path.name} leads nowhere") from error
        raise


def _template(path: Path, manifest: dict[str, object]) -> Template:
    questions = _Questions(manifest)
    manifest = cast("dict[str, object]", _plain(manifest))
    kind = _one_of(manifest, "_exlab_type", ("project", "run", "equipment"))
    if manifest.get("_jinja_extensions"):
        raise Unusable("_jinja_extensions would run code of the template, which is never done")
    return Template(
        name=path.name,
        path=path,
        type=cast("Literal['project', 'run', 'equipment']", kind),
        version=_version(manifest),
        run_scope=_run_scope(manifest) if kind == "run" else None,
        description=_text(manifest, "_exlab_description", "").strip() or None,
        plugins=tuple(_names(manifest, "_exlab_plugins")),
        plugins_fatal=_flag(manifest, "_exlab_plugins_fatal"),
        readme_fields=tuple(_readme_fields(manifest)),
        questions=tuple(questions.read()),
        has_tasks=bool(manifest.get("_tasks")),
        answers_file=_inside(manifest, "_answers_file", ".copier-answers.yml"),
        subdirectory=_inside(manifest, "_subdirectory", ""),
        suffix=_text(manifest, "_templates_suffix", ".jinja"),
        preserve_symlinks=bool(manifest.get("_preserve_symlinks")),
    )


def _plain(value: object) -> object:
    try:
        return casting.plain(value)
    except ValueError as error:
        raise Unusable(f"copier.yml {error}") from error


def _one_of(manifest: dict[str, object], key: str, allowed: tuple[str, ...]) -> str:
    value = manifest.get(key)
    if value not in allowed:
        told = "is missing" if value is None else f"is {shown(value)}"
        raise Unusable(f"{key} {told}; expected one of {', '.join(allowed)}")
    return str(value)


def _run_scope(manifest: dict[str, object]) -> Literal["experimental", "test", "both"]:
    return cast("Literal['experimental', 'test', 'both']", _one_of(manifest, "_exlab_run_scope", _SCOPES))


def _version(manifest: dict[str, object]) -> str:
    value = manifest.get("_exlab_version")
    if not isinstance(value, str) or not value.strip():
        raise Unusable('_exlab_version is missing or no text; expected a version in quotes, such as "1.0"')
    if len(value) > 100 or not value.isprintable():
        raise Unusable("_exlab_version is no version; expected at most 100 printable characters")
    return value.strip()


def _text(manifest: dict[str, object], key: str, default: str) -> str:
    value = manifest.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise Unusable(f"{key} is {shown(value)}; expected text")
    return value


def _flag(manifest: dict[str, object], key: str) -> bool:
    value = manifest.get(key, False)
    if not isinstance(value, bool):
        raise Unusable(f"{key} is {shown(value)}; expected true or false")
    return value


def _inside(manifest: dict[str, object], key: str, default: str) -> str:
    """A path that cannot leave the folder which it is relative to."""
    value = _text(manifest, key, default)
    if re.match(r"[/\\~]|[A-Za-z]:", value) or ".." in re.split(r"[/\\]", value):
        raise Unusable(f"{key} is {shown(value)}; expected a path that stays inside")
    return value


def _names(manifest: dict[str, object], key: str) -> list[str]:
    value = manifest.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise Unusable(f"{key} is {shown(value)}; expected a list of names")
    return list(dict.fromkeys(name.strip() for name in value))


def _readme_fields(manifest: dict[str, object]) -> Iterator[Field]:
    section = manifest.get("_exlab_readme") or {}
    given = (section.get("fields") or []) if isinstance(section, dict) else None
    if not isinstance(given, list):
        raise Unusable("_exlab_readme is not as expected: {fields: [{id, label, type, ...}]}")
    seen: set[str] = set()
    for item in given:
        field = _readme_field(item)
        if field.id in seen:
            raise Unusable(f"the README field {shown(field.id)} stands twice")
        seen.add(field.id)
        yield field


def _readme_field(given: object) -> Field:
    if not isinstance(given, dict) or not isinstance(given.get("id"), str):
        raise Unusable(f"a README field is {shown(given)}; expected at least an id")
    name = given["id"].strip()
    if name in _CORE_FIELDS:
        raise _Redeclared(f"the README field {name} is asked for always, and cannot be declared again")
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise Unusable(f"the README field {shown(name)} has no usable id")
    told = {key: value for key, value in given.items() if value is not None}
    told = {"label": name} | told | {"id": name}
    if "options" in told:
        told["options"] = _options(name, told["options"])
    try:
        field = msgspec.convert(told, Field)
    except msgspec.ValidationError as error:
        raise Unusable(f"the README field {shown(name)} is not as expected: {error}") from error
    if field.type == "choice" and not field.options:
        raise Unusable(f"the README field {shown(name)} has no options to choose from")
    return field


def _options(name: str, given: object) -> list[str]:
    """Numbers as the text that they are shown as: laser lines are written without quotes."""
    if not isinstance(given, list):
        raise Unusable(f"the options of the README field {shown(name)} are {shown(given)}; expected a list")
    for option in given:
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise Unusable(f"the README field {shown(name)} has the option {shown(option)}; put it in quotes")
    return [str(option) for option in given]


class _Questions:
    """The questions of a manifest, as Copier will take them."""

    def __init__(self, manifest: dict[str, object]) -> None:
        self._given = {name: value for name, value in manifest.items() if not name.startswith("_")}
        self._secret = _names(manifest, "_secret_questions")
        envops = manifest.get("_envops")
        told = envops if isinstance(envops, dict) else {}
        starts = ("variable_start_string", "{{"), ("block_start_string", "{%")
        self._marks = tuple(str(told.get(key, mark)) for key, mark in starts)

    def read(self) -> Iterator[Question]:
        for name, given in self._given.items():
            if name in _NAMES_OF_COPIER or not 1 <= len(name) <= 100 or not name.isprintable():
                raise Unusable(f"the question {shown(name)} has a name that cannot be used")
            yield self._question(name, given if isinstance(given, dict) else {"default": given})

    def _question(self, name: str, given: dict[str, object]) -> Question:
        kind, when = self._type(name, given), self._when(name, given)
        secret = name in self._secret or _switch(name, "secret", given)
        if secret and "default" not in given:
            raise Unusable(f"the question {shown(name)} is secret; Copier wants a default for these")
        multiselect = _switch(name, "multiselect", given)
        choices = tuple(self._choices(name, kind, given.get("choices")))
        computed = kind is None or self._is_template(given.get("choices"))
        default = given.get("default", UNSET)
        if default is None and kind not in (None, "yaml", "json"):
            default = UNSET  # To Copier null is an answer to questions of these two types only.
        if kind is not None and not computed and not self._is_template(default):
            default = _start(kind, choices, multiselect, default)
        return Question(
            name=name,
            type=kind or "yaml",
            help=_words(name, "help", given),
            choices=choices,
            default=None if default is UNSET else _plain(default),
            required=default is UNSET and when is True,
            multiselect=multiselect,
            secret=secret,
            computed=computed,
            when=when,
            placeholder=_words(name, "placeholder", given),
        )

    def _is_template(self, value: object) -> bool:
        if isinstance(value, list):
            return any(self._is_template(item) for item in value)
        if isinstance(value, dict):
            return any(self._is_template(item) for pair in value.items() for item in pair)
        return isinstance(value, str) and any(mark in value for mark in self._marks)

    def _type(self, name: str, given: dict[str, object]) -> QuestionType | None:
        """None where it is a Jinja expression. Where it is not told, Copier takes that of the default."""
        kind = given.get("type", "")
        if self._is_template(kind):
            return None
        if kind == "":
            own = type(given.get("default")).__name__
            return cast("QuestionType", own if own in casting.TYPES else "yaml")
        if kind not in casting.TYPES:
            allowed = ", ".join(casting.TYPES)
            raise Unusable(f"the question {shown(name)} has type {shown(kind)}; expected one of {allowed}")
        return cast("QuestionType", kind)

    def _when(self, name: str, given: dict[str, object]) -> bool | str:
        when = given.get("when", True)
        if not isinstance(when, str | bool):
            raise Unusable(f"the question {shown(name)} has {shown(when)} for when; expected true or false")
        return when if self._is_template(when) else casting.truth(when)

    def _choices(self, name: str, kind: QuestionType | None, given: object) -> Iterator[Choice]:
        """Each with the value that answers are compared with, where that can be told without Jinja."""
        told = kind is not None and not self._is_template(given)
        for label, value in () if isinstance(given, str) else _pairs(name, given):
            try:
                yield Choice(str(label), _plain(_presented(kind, value) if kind and told else value))
            except ValueError as error:
                raise Unusable(
                    f"the choice {shown(label)} of the question {shown(name)} {error}; Copier would fail"
                ) from error


def _presented(kind: QuestionType, value: object) -> object:
    """What Copier makes of `value`; but what it would read again if it came back as an answer, as it stands."""
    taken = casting.cast(kind, value)
    return value if kind in ("yaml", "json") else taken


def _start(kind: QuestionType, choices: tuple[Choice, ...], multiselect: bool, default: object) -> object:
    """What Copier answers the question with where nobody else does; UNSET where it would fail to."""
    if default is UNSET or (multiselect and isinstance(default, str)):
        return default  # Copier reads such a text as a list
    if not multiselect:
        return _start_with(kind, choices, default)
    found = [_start_with(kind, choices, item) for item in default] if isinstance(default, list) else UNSET
    return UNSET if found is UNSET or UNSET in found else found


def _start_with(kind: QuestionType, choices: tuple[Choice, ...], value: object) -> object:
    try:
        taken = casting.cast(kind, value)
        fits = not choices or any(taken == casting.cast(kind, choice.value) for choice in choices)
        return _presented(kind, value) if fits else UNSET
    except ValueError:
        return UNSET


# Copier has pydantic check these, which knows them by its own words.
_ON = ("1", "on", "t", "true", "y", "yes")
_OFF = ("0", "off", "f", "false", "n", "no")


def _switch(name: str, key: str, given: dict[str, object]) -> bool:
    value = given.get(key, False)
    word = str(value).lower() if isinstance(value, str | bool | int) else ""
    if word not in _ON + _OFF:
        raise Unusable(f"the question {shown(name)} has {shown(value)} for {key}; expected true or false")
    return word in _ON


def _words(name: str, key: str, given: dict[str, object]) -> str:
    value = given.get(key, "")
    if not isinstance(value, str):
        raise Unusable(f"the question {shown(name)} has {shown(value)} for {key}; expected text, in quotes")
    return value


def _pairs(name: str, given: object) -> Iterator[tuple[object, object]]:
    """Labels and values of choices: these are given as values, as pairs of the two, or as a mapping."""
    if not isinstance(given, list | dict | None):
        raise Unusable(f"the choices of the question {shown(name)} are {shown(given)}; expected a list")
    for choice in list(given.items()) if isinstance(given, dict) else given or []:
        if not isinstance(choice, list | tuple):
            yield choice, choice
            continue
        if len(choice) != 2:
            raise Unusable(f"a choice of the question {shown(name)} is {shown(choice)}; expected two parts")
        label, value = choice
        if isinstance(value, dict) and "value" not in value:
            raise Unusable(f"the choice {shown(label)} of the question {shown(name)} has no value")
        yield label, value["value"] if isinstance(value, dict) else value
