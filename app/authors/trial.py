"""A plugin tried out by its author, on a copy of a folder, as a session would have it.

The folder itself is read and never written. What the plugin asks goes to whoever called, and the plugin runs again on
a fresh copy, until it is through; then what became of the copy is told, file by file. How that is shown, and where an
answer comes from, is left to the command line.
"""

import difflib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec

from app.sessions.prompts import PromptField, accepted
from app.settings import Settings
from app.steps import changes
from app.steps.plugins import registry
from app.steps.plugins.host import Asked, Broken, Context, Host, Line, Ran, Task, Usage
from app.steps.plugins.registry import Manifest, Problem

_MOST_COMPARED = 256 * 1024
_CHUNK = 1024 * 1024


def find(named: str, now: Settings) -> Manifest | Problem:
    """The plugin in the folder `named`, or of that name in the plugin folder of the config."""
    allow_network = now.plugins.allow_network
    if Path(named).is_dir():
        return registry.load(Path(named), allow_network=allow_network)
    found = registry.catalogue(now.paths.plugin_dir, allow_network=allow_network)
    if manifest := found.named(named):
        return manifest
    missing = Problem(Path(named), "is no folder, and no plugin in the plugin folder is called so")
    return next((problem for problem in found.problems if problem.path.name == named), missing)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a plugin asks; `file` None where it asks for all of them."""

    reason: str
    file: str | None
    fields: tuple[PromptField, ...]


def fitting(field: PromptField, value: object) -> object:
    """`value`, or the default where it is None, if it fits the field; else InputInvalid says why not."""
    given = field.default if value is None else value
    accepted((field,), {field.id: given})
    return given


Answering = Callable[[Question], dict[str, object]]
"""Gives values that fit the fields, those of secret ones included."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one file: as a unified diff where both are text, else in words."""

    path: str
    kind: Literal["added", "changed", "removed"]
    text: tuple[str, ...]


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """What a session would have recorded, and what the plugin did to the copy. `files` are what it was offered."""

    plugin: str
    version: str
    status: Literal["success", "skipped", "failed", "timeout", "policy_violation"]
    message: str | None
    files: tuple[str, ...]
    usage: Usage | None
    log: tuple[Line, ...] = ()
    described: tuple[dict[str, object], ...] = ()
    changes: tuple[Change, ...] = ()


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be tried: on a copy of `folder`, which is kept as `keep` if that is named."""

    manifest: Manifest
    folder: Path
    variables: dict[str, object]
    dry_run: bool = False
    keep: Path | None = None


async def execute(attempt: Attempt, now: Settings, answering: Answering) -> Execution:
    """Run the plugin until it is through, each time on a copy of the folder as it is.

    Raises what `answering` raises, `Unavailable`, and OSError for what stands in the way of the copies.
    """
    host = Host(lambda: now.plugins.python, count=1)
    await host.start()
    try:
        with TemporaryDirectory(prefix="exlab-plugin-", ignore_cleanup_errors=True) as aside:
            return await _executed(host, attempt, Path(os.path.realpath(aside)), answering)
    finally:
        await host.close()


async def _executed(host: Host, attempt: Attempt, aside: Path, answering: Answering) -> Execution:
    before = Path(shutil.copytree(attempt.folder, aside / "before", symlinks=True))
    answers_file = _answers_file(before)
    protected = changes.protected(answers_file)
    offered = attempt.manifest.offered(path for path in registry.files_below(before) if not protected(path))
    told = Execution(
        plugin=attempt.manifest.name,
        version=attempt.manifest.version,
        status="skipped",
        message="none of the files is for this plugin",
        files=offered,
        usage=None,
    )
    complaints = _lacking(attempt) or await host.validate(
        attempt.manifest, attempt.variables, aside / "validation"
    )
    if isinstance(complaints, Broken):
        return msgspec.structs.replace(told, status=complaints.status, message=complaints.message)
    if complaints:
        return msgspec.structs.replace(told, status="failed", message="; ".join(complaints))
    if not offered:
        return told
    learned = _Learned()
    while True:
        tree = Path(shutil.copytree(before, _fresh(aside) / "tree", symlinks=True))
        ended = await host.run(task(attempt, tree, offered, answers_file, learned), lambda *_: None)
        outcome = _question(ended)
        if isinstance(outcome, Question) and not learned.more(outcome, answering(outcome)):
            outcome = _broken(ended, "it asks again for what it was told, and would do so for ever")
        if not isinstance(outcome, Question):
            break
    if attempt.keep is not None:
        shutil.copytree(tree, attempt.keep, symlinks=True, dirs_exist_ok=True, ignore=_strange)
    return _judged(told, outcome, before, tree, protected)


def _lacking(attempt: Attempt) -> tuple[str, ...]:
    names = attempt.manifest.required_variables
    return tuple(
        f"it needs the variable {name}" for name in names if attempt.variables.get(name) in (None, "")
    )


def _strange(folder: str, names: list[str]) -> list[str]:
    """What cannot be copied: pipes, sockets, devices."""
    places = {name: Path(folder, name) for name in names}
    return [
        name
        for name, place in places.items()
        if not (place.is_symlink() or place.is_file() or place.is_dir())
    ]


class _Learned:
    """What a plugin was told so far, by file."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, object]] = {}
        self.secrets: set[str] = set()
        self._asked: set[tuple[str | None, ...]] = set()

    def more(self, question: Question, values: dict[str, object]) -> bool:
        """Take the answers; whether they tell the plugin anything that it was not told before."""
        known = self.answers.setdefault(question.file or "", {})
        asked = (question.file, *(field.id for field in question.fields))
        is_new = asked not in self._asked or known | values != known
        self._asked.add(asked)
        known.update(values)
        self.secrets |= {
            str(values[each.id]) for each in question.fields if each.secret and each.id in values
        }
        return is_new


def _fresh(aside: Path) -> Path:
    made = aside / str(sum(1 for _ in aside.iterdir()))
    made.mkdir()
    return made


def _answers_file(tree: Path) -> str:
    names = (".exlab-answers.yml", ".copier-answers.yml")
    return next((name for name in names if (tree / name).exists()), names[0])


def task(
    attempt: Attempt,
    tree: Path,
    files: tuple[str, ...],
    answers_file: str = "",
    learned: _Learned | None = None,
) -> Task:
    """What a host is given to do, with what is known of a session where there is none."""
    given = attempt.variables
    context = Context(
        variables=given,
        answers_file=answers_file,
        template_name=str(given.get("template_name", "")),
        template_version=str(given.get("template_version", "")),
        run_kind=str(given.get("run_kind", "experimental")),
        equipment_id=str(given.get("equipment_id", "")),
        project=str(given.get("project_short_id", "")),
        destination=Path(str(given.get("destination", attempt.folder.absolute()))),
        dry_run=attempt.dry_run,
    )
    return Task(
        manifest=attempt.manifest,
        tree=tree,
        scratch=tree.parent / "scratch",
        files=files,
        context=context,
        answers=learned.answers if learned else {},
        secrets=tuple(learned.secrets) if learned else (),
    )


def _question(ended: Ran | Asked | Broken) -> Question | Ran | Broken:
    """A question with fields that can be shown; one that cannot fails the plugin, as it does in a session."""
    if not isinstance(ended, Asked):
        return ended
    try:
        fields = msgspec.convert(ended.fields, tuple[PromptField, ...])
    except (msgspec.ValidationError, ValueError) as error:
        return _broken(ended, f"it asked with fields that cannot be shown: {error}")
    if len({field.id for field in fields}) < len(fields):
        return _broken(ended, "it asked with two fields of one id")
    return Question(reason=ended.reason, file=ended.file, fields=fields)


def _broken(ended: Ran | Asked | Broken, message: str) -> Broken:
    return Broken(status="failed", message=message, usage=ended.usage, log=ended.log)


def _judged(
    told: Execution, ended: Ran | Broken, before: Path, tree: Path, protected: Callable[[str], bool]
) -> Execution:
    told = msgspec.structs.replace(told, usage=ended.usage, log=ended.log)
    if isinstance(ended, Broken):
        return msgspec.structs.replace(told, status=ended.status, message=ended.message)
    found = changes.compare(before, tree, protected=protected)
    violated = "; ".join(found.violations) or None
    return msgspec.structs.replace(
        told,
        status="policy_violation" if violated else "success",
        message=violated,
        described=ended.described,
        changes=tuple(_changes(before, tree, found.affected)),
    )


def _changes(before: Path, after: Path, affected: Iterable[str]) -> Iterator[Change]:
    for path in affected:
        old, new = before / path, after / path
        if old.is_dir() and new.is_dir():
            continue
        kind: Literal["added", "changed", "removed"] = "changed"
        if not os.path.lexists(old):
            kind = "added"
        elif not os.path.lexists(new):
            kind = "removed"
        yield Change(path=path, kind=kind, text=tuple(_differences(old, new, path)))


def _differences(old: Path, new: Path, path: str) -> Iterator[str]:
    one, other = _text(old), _text(new)
    if one is not None and other is not None:
        diff = difflib.unified_diff(
            one.splitlines(), other.splitlines(), f"before/{path}", f"after/{path}", lineterm=""
        )
        yield from diff
        return
    for place, name in ((old, "before"), (new, "after")):
        if os.path.lexists(place):
            yield f"{name}: {_described(place)}"


def _text(path: Path) -> str | None:
    """What a file holds; nothing where there is no file, None where it is no text of a size to be shown."""
    if not os.path.lexists(path):
        return ""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_COMPARED:
        return None
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _described(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if not path.is_file():
        return "folder"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
    return f"{path.stat().st_size} bytes, sha256 {digest.hexdigest()}"
