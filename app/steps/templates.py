"""Templates: finding them, reading their `copier.yml`, and keeping a copy of one.

Whatever a template holds, reading it costs a bounded amount of time and memory and ends in a record or in a
`Failure` that says what to mend; no Jinja is evaluated and no code of the template runs. Questions mean what
Copier takes them to mean. A pinned copy is whole or absent, also after a power cut. Rendering, and what only
Jinja can tell (computed choices, conditions), are left to `render`.
"""

import datetime
import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, cast

import msgspec
import yaml

from app import disk, yamltext
from app.errors import Failure
from app.settings import Field

QuestionType = Literal["str", "int", "float", "bool", "yaml", "json", "path"]

_QUESTION_TYPES = ("str", "int", "float", "bool", "yaml", "json", "path")
_CORE_FIELDS = ("label", "operator", "objective")
_SCOPES = ("experimental", "test", "both")
_YES = ("1", "y", "yes", "t", "true", "on")
_NO = ("0", "", "n", "no", "f", "false", "off", "~", "null", "none")
_NAMES_OF_COPIER = ("now", "make_secret")

_MOST_FILES = 10_000
_MOST_BYTES = 1024**3
_DEEPEST = 64
_CHUNK = 1024 * 1024
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
# The owner of the copy must be able to read it; Windows syncs only what may be written.
_KEPT = stat.S_IRUSR if os.name == "posix" else stat.S_IRUSR | stat.S_IWUSR
_CHANGED = "{} changed while the template was being copied"

# Opening a named pipe waits for its other end, unless told not to; Windows has neither flag, but O_BINARY.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_READ_ITSELF = _READ | getattr(os, "O_NOFOLLOW", 0)


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


class Entry(msgspec.Struct, frozen=True):
    """One file, folder or link of a template; `path` is relative to it, `size` in bytes."""

    path: str
    kind: Literal["file", "folder", "link"]
    size: int
    mode: int


class _Unusable(Exception):
    """The template cannot be used."""

    code = "template_load_error"

    def failure(self) -> Failure:
        return Failure(code=self.code, message=str(self), field="template_path")


class _Redeclared(_Unusable):
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
    except _Unusable as unusable:
        return unusable.failure()


def _located(template_path: str, base: Path, roots: tuple[Path, ...]) -> Path:
    if not template_path.strip():
        raise _Unusable("no template is named")
    if "\0" in template_path or not _encodable(template_path) or len(template_path) > 4096:
        raise _Unusable(f"{shown(template_path)} is not a path")
    found = Path(os.path.realpath(base / template_path))
    # What lies elsewhere is refused unseen: the answer must not tell whether it is there.
    if not any(_is_below(found, Path(os.path.realpath(root))) for root in roots):
        raise _Unusable(
            f"{shown(template_path)} does not lie in the templates folder or in the equipment's own"
        )
    if not _is_folder(found):
        raise _Unusable(f"there is no template {shown(template_path)}")
    return found


def _is_below(path: Path, root: Path) -> bool:
    return path != root and path.is_relative_to(root)


def _is_folder(path: Path) -> bool:
    """Other errors than these are the file system's, and go to whoever can wait for it."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise


def _encodable(text: str) -> bool:
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
    except _Unusable as unusable:
        return unusable.failure()


def _manifest(folder: Path) -> dict[str, object]:
    path = _manifest_path(folder)
    raw = _contents(path)
    try:
        # The bounded reader judges size, depth and aliases; what passes it is read again as Copier reads it,
        # because the two disagree on what `no` or 1:30 means.
        yamltext.parse(raw)
        content = _CopierLoader(raw).get_single_data()
    except yamltext.Unreadable as error:
        line = f" line {error.line}" if error.line else ""
        raise _Unusable(f"{path.name}{line}: {error.message}") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise _Unusable(f"{path.name} holds a value that cannot be read: {shown(str(error))}") from error
    if not isinstance(content, dict):
        raise _Unusable(f"{path.name} does not hold keys with values")
    return cast("dict[str, object]", _plain(content))


def _manifest_path(folder: Path) -> Path:
    if not _is_folder(folder):
        raise _Unusable(f"{folder.name} is not a folder")
    found = [path for path in folder.iterdir() if re.fullmatch(r"copier\.ya?ml", path.name, re.IGNORECASE)]
    if len(found) != 1:
        raise _Unusable("has no copier.yml" if not found else "has both a copier.yml and a copier.yaml")
    real = Path(os.path.realpath(found[0]))
    if not _is_below(real, folder):
        raise _Unusable(f"{found[0].name} is a link that leads out of the template")
    return found[0]


def _contents(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _Unusable(f"{path.name} is not a regular file")
        with open(os.open(path, _READ), "rb") as file:
            return file.read(yamltext.MAX_BYTES + 1)
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise _Unusable(f"{path.name} leads nowhere") from error
        raise


class _CopierLoader(yaml.SafeLoader):
    """Copier's own reading, YAML 1.1, without its `!include`."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        # A number of 100,000 digits takes minutes where it is written 1:1:1... or 0xFFF...
        if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":str") and len(node.value) > 100:
            raise yaml.constructor.ConstructorError(
                None, None, "a number with too many digits", node.start_mark
            )
        return str(super().construct_scalar(node))


def _plain(value: object) -> object:
    """Only what JSON has, so that it can be stored and shown; dates as ISO 8601 text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case datetime.date():
            return value.isoformat()
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {_key(key): _plain(item) for key, item in value.items()}
    raise _Unusable(f"copier.yml holds a {type(value).__name__}, which means nothing there")


def _key(key: object) -> str:
    # Copier fails on these at the top, and wherever else they stand they are labels of choices.
    return key if isinstance(key, str) else str(_plain(key))


def _template(path: Path, manifest: dict[str, object]) -> Template:
    kind = _one_of(manifest, "_exlab_type", ("project", "run", "equipment"))
    questions = _Questions(manifest)
    if manifest.get("_jinja_extensions"):
        raise _Unusable("_jinja_extensions would run code of the template, which is never done")
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


def _one_of(manifest: dict[str, object], key: str, allowed: tuple[str, ...]) -> str:
    value = manifest.get(key)
    if value not in allowed:
        told = "is missing" if value is None else f"is {shown(value)}"
        raise _Unusable(f"{key} {told}; expected one of {', '.join(allowed)}")
    return str(value)


def _run_scope(manifest: dict[str, object]) -> Literal["experimental", "test", "both"]:
    return cast("Literal['experimental', 'test', 'both']", _one_of(manifest, "_exlab_run_scope", _SCOPES))


def _version(manifest: dict[str, object]) -> str:
    value = manifest.get("_exlab_version")
    if not isinstance(value, str) or not value.strip():
        raise _Unusable('_exlab_version is missing or no text; expected a version in quotes, such as "1.0"')
    if len(value) > 100 or not value.isprintable():
        raise _Unusable("_exlab_version is no version; expected at most 100 printable characters")
    return value.strip()


def _text(manifest: dict[str, object], key: str, default: str) -> str:
    value = manifest.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _Unusable(f"{key} is {shown(value)}; expected text")
    return value


def _flag(manifest: dict[str, object], key: str) -> bool:
    value = manifest.get(key, False)
    if not isinstance(value, bool):
        raise _Unusable(f"{key} is {shown(value)}; expected true or false")
    return value


def _inside(manifest: dict[str, object], key: str, default: str) -> str:
    """A path that cannot leave the folder which it is relative to."""
    value = _text(manifest, key, default)
    if re.match(r"[/\\~]|[A-Za-z]:", value) or ".." in re.split(r"[/\\]", value):
        raise _Unusable(f"{key} is {shown(value)}; expected a path that stays inside")
    return value


def _names(manifest: dict[str, object], key: str) -> list[str]:
    value = manifest.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise _Unusable(f"{key} is {shown(value)}; expected a list of names")
    return list(dict.fromkeys(name.strip() for name in value))


def _readme_fields(manifest: dict[str, object]) -> Iterator[Field]:
    section = manifest.get("_exlab_readme") or {}
    given = (section.get("fields") or []) if isinstance(section, dict) else None
    if not isinstance(given, list):
        raise _Unusable("_exlab_readme is not as expected: {fields: [{id, label, type, ...}]}")
    seen: set[str] = set()
    for item in given:
        field = _readme_field(item)
        if field.id in seen:
            raise _Unusable(f"the README field {shown(field.id)} stands twice")
        seen.add(field.id)
        yield field


def _readme_field(given: object) -> Field:
    if not isinstance(given, dict) or not isinstance(given.get("id"), str):
        raise _Unusable(f"a README field is {shown(given)}; expected at least an id")
    name = given["id"].strip()
    if name in _CORE_FIELDS:
        raise _Redeclared(f"the README field {name} is asked for always, and cannot be declared again")
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise _Unusable(f"the README field {shown(name)} has no usable id")
    told = {key: value for key, value in given.items() if value is not None}
    told = {"label": name} | told | {"id": name}
    if "options" in told:
        told["options"] = _options(name, told["options"])
    try:
        field = msgspec.convert(told, Field)
    except msgspec.ValidationError as error:
        raise _Unusable(f"the README field {shown(name)} is not as expected: {error}") from error
    if field.type == "choice" and not field.options:
        raise _Unusable(f"the README field {shown(name)} has no options to choose from")
    return field


def _options(name: str, given: object) -> list[str]:
    """Numbers as the text that they are shown as: laser lines are written without quotes."""
    if not isinstance(given, list):
        raise _Unusable(f"the options of the README field {shown(name)} are {shown(given)}; expected a list")
    for option in given:
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise _Unusable(
                f"the README field {shown(name)} has the option {shown(option)}; put it in quotes"
            )
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
                raise _Unusable(f"the question {shown(name)} has a name that cannot be used")
            yield self._question(name, given if isinstance(given, dict) else {"default": given})

    def _question(self, name: str, given: dict[str, object]) -> Question:
        kind, choices, when = self._type(name, given), given.get("choices"), self._when(given)
        secret = name in self._secret or given.get("secret") is True
        if secret and "default" not in given:
            raise _Unusable(f"the question {shown(name)} is secret; Copier wants a default for these")
        default = given.get("default")
        # To Copier null is an answer to questions of these two types only.
        lacking = default is None and ("default" not in given or kind not in (None, "yaml", "json"))
        return Question(
            name=name,
            type=kind or "yaml",
            help=str(given.get("help") or ""),
            choices=() if isinstance(choices, str) else tuple(_choices(name, choices)),
            default=default,
            required=lacking and when is True,
            multiselect=given.get("multiselect") is True,
            secret=secret,
            computed=kind is None or self._is_template(choices),
            when=when,
            placeholder=str(given.get("placeholder") or ""),
        )

    def _is_template(self, value: object) -> bool:
        if isinstance(value, list):
            return any(self._is_template(item) for item in value)
        if isinstance(value, dict):
            return any(self._is_template(item) for pair in value.items() for item in pair)
        return isinstance(value, str) and any(mark in value for mark in self._marks)

    def _type(self, name: str, given: dict[str, object]) -> QuestionType | None:
        """None where it is a Jinja expression. Where it is not told, Copier takes that of the default."""
        kind = given.get("type") or type(given.get("default")).__name__
        if self._is_template(kind):
            return None
        if "type" in given and kind not in _QUESTION_TYPES:
            allowed = ", ".join(_QUESTION_TYPES)
            raise _Unusable(f"the question {shown(name)} has type {shown(kind)}; expected one of {allowed}")
        return cast("QuestionType", kind if kind in _QUESTION_TYPES else "yaml")

    def _when(self, given: dict[str, object]) -> bool | str:
        when = given.get("when", True)
        if isinstance(when, str) and self._is_template(when):
            return when
        # To Copier every other text is a yes.
        return when.strip().lower() not in _NO if isinstance(when, str) else bool(when)


def truth(text: str) -> bool:
    """What Copier makes of a text where it wants yes or no; ValueError where it would be surprising."""
    word = text.strip().lower()
    if word not in _YES + _NO:
        raise ValueError(f"{shown(text)} is neither yes nor no")
    return word in _YES


def _choices(name: str, given: object) -> Iterator[Choice]:
    """Choices are given as values, as pairs of label and value, or as a mapping of the two."""
    if not isinstance(given, list | dict | None):
        raise _Unusable(f"the choices of the question {shown(name)} are {shown(given)}; expected a list")
    for choice in list(given.items()) if isinstance(given, dict) else given or []:
        if isinstance(choice, list | tuple) and len(choice) != 2:
            raise _Unusable(f"a choice of the question {shown(name)} is {shown(choice)}; expected two parts")
        label, value = choice if isinstance(choice, list | tuple) else (choice, choice)
        if isinstance(choice, list | tuple) and isinstance(value, dict):
            if "value" not in value:
                raise _Unusable(f"the choice {shown(label)} of the question {shown(name)} has no value")
            value = value["value"]
        yield Choice(str(label), value)


def survey(folder: Path, *, follow: bool) -> tuple[Entry, ...] | Failure:
    """All that a template consists of, folders before what is in them; what lies in `.git` is left out.

    With `follow` a link stands for what it leads to, which is how Copier sees it; without, for itself.
    """
    try:
        return tuple(_survey(folder, follow=follow))
    except _Unusable as unusable:
        return unusable.failure()


def _survey(folder: Path, *, follow: bool) -> Iterator[Entry]:
    root = Path(os.path.realpath(folder))
    size = 0
    for count, entry in enumerate(_walk(root, root, "", (root,), follow), 1):
        size += entry.size
        if count > _MOST_FILES:
            raise _Unusable(f"the template has more than {_MOST_FILES} files")
        if size > _MOST_BYTES:
            raise _Unusable("the template is larger than 1 GiB")
        yield entry


def _walk(folder: Path, root: Path, prefix: str, above: tuple[Path, ...], follow: bool) -> Iterator[Entry]:
    if len(above) > _DEEPEST:
        raise _Unusable(f"the template has more than {_DEEPEST} folders in each other")
    with os.scandir(folder) as listing:
        # A folder is listed whole before it is sorted; one that is too large is not read to its end.
        found = sorted(itertools.islice(listing, _MOST_FILES + 1), key=lambda one: one.name)
    for item in found:
        if item.name == ".git":
            continue
        path, name = Path(item.path), prefix + item.name
        if not _encodable(item.name):
            raise _Unusable(f"the template holds a name that is not UTF-8 text: {shown(name)}")
        if item.is_symlink():
            real = _led_to(path, root, name)
            if not follow:
                yield Entry(name, "link", 0, 0)
                continue
            if real in above:
                raise _Unusable(f"the link {shown(name)} in the template leads round in a circle")
            path = real
        yield from _entries(path, root, name, above, follow)


def _entries(path: Path, root: Path, name: str, above: tuple[Path, ...], follow: bool) -> Iterator[Entry]:
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise _Unusable(f"{shown(name)} in the template leads nowhere") from error
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if stat.S_ISDIR(found.st_mode):
        yield Entry(name, "folder", 0, mode)
        yield from _walk(path, root, name + "/", (*above, path), follow)
    elif stat.S_ISREG(found.st_mode):
        yield Entry(name, "file", found.st_size, mode)
    else:
        raise _Unusable(f"{shown(name)} in the template is neither a file nor a folder")


def _led_to(path: Path, root: Path, name: str) -> Path:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root) or ".git" in real.relative_to(root).parts:
        raise _Unusable(f"the link {shown(name)} leads out of the template")
    return real


def pin(template: Path, target: Path) -> Failure | None:
    """Copy the template's folder to `target`, whose parent is made; nothing is done where it is already there.

    The copy is built beside `target` and synced before it takes that name, so that it is whole wherever it is.
    """
    if os.path.lexists(target):
        return None
    partial = target.with_name(f"{target.name}.partial")
    _make_room(partial)
    try:
        _copy(Path(os.path.realpath(template)), partial)
    except _Unusable as unusable:
        shutil.rmtree(partial, ignore_errors=True)
        return unusable.failure()
    disk.rename_new(partial, target)
    disk.sync_folder(target.parent)
    return None


def _make_room(partial: Path) -> None:
    session, staging = partial.parent, partial.parent.parent
    # Below the mount point of a disk that is away nothing may be made.
    if not staging.is_dir():
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(staging))
    session.mkdir(exist_ok=True)
    disk.sync_folder(staging)
    if os.path.lexists(partial):
        shutil.rmtree(partial)


def _copy(source: Path, target: Path) -> None:
    entries = tuple(_survey(source, follow=False))
    target.mkdir()
    for entry in entries:
        match entry.kind:
            case "folder":
                (target / entry.path).mkdir()
            case "link":
                (target / entry.path).symlink_to(_target_of(source, entry.path))
            case "file":
                _copy_file(source, target, entry)
    # A folder gets its mode, and is synced, when all that belongs into it is there.
    for folder in [entry for entry in reversed(entries) if entry.kind == "folder"]:
        (target / folder.path).chmod(folder.mode | stat.S_IRWXU)
        disk.sync_folder(target / folder.path)
    disk.sync_folder(target)


def _target_of(source: Path, name: str) -> str:
    """Where a link of the copy leads: within the copy, also if the original was written from outside."""
    link = source / name
    written = os.readlink(link)
    landing = os.path.normpath(Path(name).parent / written)
    if not os.path.isabs(written) and landing.split(os.sep)[0] != "..":
        return written
    return os.path.relpath(os.path.realpath(link), link.parent)


def _copy_file(source: Path, target: Path, entry: Entry) -> None:
    copy = target / entry.path
    try:
        descriptor = os.open(source / entry.path, _READ_ITSELF)
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise _Unusable(_CHANGED.format(shown(entry.path))) from error
        raise
    with open(descriptor, "rb") as reader, open(copy, "xb") as writer:
        if not _copied(reader, writer, entry.size):
            raise _Unusable(_CHANGED.format(shown(entry.path)))
    copy.chmod(entry.mode | _KEPT)
    disk.sync_file(copy)


def _copied(reader: BinaryIO, writer: BinaryIO, size: int) -> bool:
    """Whether there were `size` bytes. No more are taken: what grows while it is read must not fill the disk."""
    left = size
    while left > 0 and (chunk := reader.read(min(left, _CHUNK))):
        writer.write(chunk)
        left -= len(chunk)
    return left == 0 and not reader.read(1)
