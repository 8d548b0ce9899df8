"""The store against the disk: what section 7 says of destinations, of the staging folder, and of what stays in both.

It promises to find a folder that is there in part, that nobody made, or that should be gone. It takes what
`histories.py` has read, and what somebody knows of the data root; of the files themselves it only reads what the
service tells of itself.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tests.survival.histories import (
    TERMINAL,
    Prompt,
    Session,
    Store,
    as_dict,
    as_list,
    of_session,
    parsed,
    short,
)

_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SECOND = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"
_SCHEMA = "1.9"
_OURS = ".exlab-wizard"
_STAGING = ".exlab-sessions"
_PROVENANCE = (_OURS, "README.md")
_NAMES = re.compile(rb"PROJ-[0-9]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|/\S*/lab[0-9]*/")
"""What is another one in each session, or in each laboratory."""


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """A data root, what the store says of it, and what somebody else has made there."""

    store: Store
    root: Path
    complete: Mapping[str, frozenset[str]]
    foreign: frozenset[str]
    untouched: frozenset[str]
    live: bool

    def is_foreign(self, path: Path) -> bool:
        """Whether somebody else made it, or the folder around it."""
        return any(str(each) in self.foreign | self.untouched for each in (path, *path.parents))

    def owner(self, folder: Path) -> Session | None:
        """The session that a folder belongs to, by the store and by its own word."""
        session = self.store.sessions.get(str(_creation(folder).get("session_id")))
        states = ("done", "sync_queued") if self.live else ("done",)
        rightful = session is not None and session.state in states and session.destination == str(folder)
        return session if rightful else None


def on_disk(ground: Ground) -> Iterator[str]:
    looks: tuple[Callable[[Ground, Session], Iterator[str]], ...] = (
        _in_place,
        _in_destination,
        _in_published,
        _in_provenance,
        _in_partial,
        _in_copies,
    )
    for session in ground.store.sessions.values():
        for look in looks:
            yield from of_session(session, looked(look(ground, session)))
    for general in (_shared, _completeness, _in_folders, _in_staging, _leftovers):
        yield from looked(general(ground))


def looked(facts: Iterator[str]) -> Iterator[str]:
    try:
        yield from facts
    except OSError as error:
        yield f"{error.filename} cannot be looked at: {error.strerror}"


def _creation(folder: Path) -> dict[str, Any]:
    """What a folder's creation.json says; nothing when it has none that can be read."""
    path = folder / _OURS / "creation.json"
    return as_dict(parsed(path.read_bytes())) if path.is_file() else {}


def _is_made(folder: Path) -> bool:
    return os.path.lexists(folder / _OURS / "creation.json")


def _in_place(ground: Ground, session: Session) -> Iterator[str]:
    """A destination lies where the contract says."""
    if session.destination is None or session.local_root is None:
        return
    way = "/".join(re.escape(str(each)) for each in (session.equipment_id, session.project_short_id))
    below = {None: "", "experimental": f"/Run_{_SECOND}", "test": f"/TestRuns/TestRun_{_SECOND}"}
    told = Path(session.destination)
    relative = told.relative_to(session.local_root) if told.is_relative_to(session.local_root) else told
    if not re.fullmatch(way + below.get(session.run_kind, "/"), relative.as_posix()):
        yield f"its destination {told} is no place for {session.run_kind or 'a project'}"


def _in_destination(ground: Ground, session: Session) -> Iterator[str]:
    """A destination that is not this session's own work is another's, or nobody's."""
    if session.destination is None:
        return
    folder = Path(session.destination)
    there = os.path.lexists(folder)
    if session.state == "done":
        if not there:
            yield f"it is done, and its destination {folder} is not there"
        elif folder.is_symlink() or not folder.is_dir() or ground.owner(folder) is not session:
            yield f"it is done, and the creation.json at {folder} does not name it: {short(_creation(folder))}"
    elif session.state in TERMINAL and there:
        if _creation(folder).get("session_id") == session.session_id:
            yield f"it is {session.state}, and its folder stands at its destination {folder}"
        elif not ground.is_foreign(folder) and ground.owner(folder) is None and not _is_way(ground, folder):
            yield f"it is {session.state}, and at its destination {folder} stands what nobody made"


def _in_published(ground: Ground, session: Session) -> Iterator[str]:
    if session.state != "done":
        return
    folder, result = Path(str(session.destination)), as_dict(session.result)
    if result.get("path") != session.destination:
        yield f"its result says {result.get('path')}, and its destination is {folder}"
    told = _creation(folder)
    if not told:
        return
    wanted = {
        "schema_version": _SCHEMA,
        "level": session.kind,
        "sync_status": result.get("sync_status"),
        "paths": session.destination,
    }
    found = {name: told.get(name) for name in wanted} | {"paths": as_dict(told.get("paths")).get("local")}
    found["sync_status"] = told.get("sync_status", "pending")
    for name, value in wanted.items():
        if found[name] != value:
            yield f"its creation.json says {name} {found[name]}, and it should be {value}"
    for name in ("README.md", f"{_OURS}/readme_fields.json"):
        if not (folder / name).is_file():
            yield f"its folder {folder} has no {name}"
    yield from _in_equipment(session, Path(str(session.local_root)) / session.equipment_id)


def _in_equipment(session: Session, folder: Path) -> Iterator[str]:
    warned = any(event.frame.get("code") == "equipment_not_noted" for event in session.events)
    path = folder / _OURS / "equipment.json"
    told = as_dict(parsed(path.read_bytes())) if path.is_file() else {}
    if told.get("id") != session.equipment_id and not warned:
        yield f"{path} does not tell of its equipment {session.equipment_id}"


def _in_provenance(ground: Ground, session: Session) -> Iterator[str]:
    """What plugins did and were told stands in the folder as in the store."""
    if session.state != "done" or session.destination is None:
        return
    planned = as_list(as_dict(session.pinned).get("plugins"))
    names = [each if isinstance(each, str) else as_dict(each).get("name") for each in planned]
    if names != [run.plugin for run in session.runs]:
        yield f"it is done, its plugins are {names}, and through are {[run.plugin for run in session.runs]}"
    told = _creation(Path(session.destination))
    if not told:
        return
    shown = ("plugin", "version", "status", "files_affected")
    applied = [
        tuple(as_dict(each).get(name) for name in shown) for each in as_list(told.get("plugins_applied"))
    ]
    ran = [
        (run.plugin, run.version, run.status, run.files) for run in session.runs if run.version is not None
    ]
    if applied != ran:
        yield f"its creation.json tells of the plugins {short(applied)}, the store of {short(ran)}"
    given = [_input(each) for each in as_list(told.get("plugin_inputs"))]
    kept = [each for prompt in session.prompts if prompt.status == "answered" for each in _inputs(prompt)]
    if sorted(given, key=str) != sorted(kept, key=str):
        yield f"its creation.json tells of the answers {short(given)}, the store of {short(kept)}"


def _input(entry: object) -> tuple[object, ...]:
    return tuple(as_dict(entry).get(name) for name in ("plugin", "file", "field", "value", "operator"))


def _inputs(prompt: Prompt) -> Iterator[tuple[object, ...]]:
    kept = as_dict(prompt.answer)
    for field in prompt.fields:
        name, secret = str(as_dict(field).get("id")), as_dict(field).get("secret")
        if secret or name in kept:
            value = None if secret else kept.get(name)
            yield prompt.plugin, prompt.file, name, value, prompt.operator


def _in_partial(ground: Ground, session: Session) -> Iterator[str]:
    """What is kept of a session that came to nothing is where it says, alone; what is not kept is gone."""
    if session.state not in ("failed", "aborted"):
        return
    error = as_dict(session.error)
    details = as_dict(error.get("details"))
    told, kept = details.get("partial_path"), session.partial_path
    if kept != told:
        yield f"its row keeps a partial tree at {kept}, its error says {told}"
    if kept is not None and not Path(kept).is_relative_to(ground.root / _STAGING / session.session_id):
        yield f"its partial tree {kept} is not where its own files are"
    if kept is not None and not Path(kept).is_dir():
        yield f"its partial tree {kept} is not there"
    discarded = bool(as_dict(session.cancel).get("discard_files")) and session.state == "aborted"
    if discarded and (told is not None or kept is not None):
        yield f"it was cancelled to be discarded, and keeps {told or kept}"
    lost = error.get("code") == "staging_lost"
    if session.passed("plugin_pass") and not discarded and not lost and told is None:
        yield f"it was rendered and is {session.state}, and nothing says where its partial tree is"


def _in_copies(ground: Ground, session: Session) -> Iterator[str]:
    if not session.terminal or _is_cleared_later(ground, session):
        return
    for tree in session.sealed:
        if os.path.lexists(tree) and tree != session.partial_path:
            yield f"it is {session.state}, and its snapshot {tree} is still there"


def _is_cleared_later(ground: Ground, session: Session) -> bool:
    """What a failed session leaves is cleared after its commit; what could not be, by the sweep."""
    told = any(event.frame.get("code") == "staging_left" for event in session.events)
    away = "left" in as_dict(as_dict(session.error).get("details"))
    return ground.live and (session.state == "failed" or told or away)


def _shared(ground: Ground) -> Iterator[str]:
    done = [session for session in ground.store.sessions.values() if session.state == "done"]
    for destination, times in Counter(session.destination for session in done).items():
        if times > 1:
            yield f"the destination {destination} is owned by {times} sessions that are done"


def _completeness(ground: Ground) -> Iterator[str]:
    """A destination is absent or complete, whatever became of its session."""
    projects = {
        session.destination for session in ground.store.sessions.values() if session.kind == "project"
    }
    for destination, wanted in ground.complete.items():
        folder = Path(destination)
        if not folder.is_dir() or destination in ground.foreign:
            continue
        if destination in projects and not _is_made(folder):
            continue  # a way to runs, which is looked at as such
        found = contents(folder)
        if found != wanted:
            lacking, more = sorted(wanted - found), sorted(found - wanted)
            yield f"the folder {destination} is not complete: it lacks {lacking} and has besides {more}"


def contents(folder: Path) -> frozenset[str]:
    """The files of a published folder, each with its content as far as all folders of its kind have it.

    Left out are the runs of a project; of provenance, which tells of times and ids, is said whether it is filled.
    """
    return frozenset(
        _described(path, path.relative_to(folder)) for path in folder.rglob("*") if _is_kept(folder, path)
    )


def _is_kept(folder: Path, path: Path) -> bool:
    top = path.relative_to(folder).parts[0]
    return (path.is_symlink() or not path.is_dir()) and top != "TestRuns" and not top.startswith("Run_")


def _described(path: Path, name: Path) -> str:
    if path.is_symlink():
        return f"{name} -> {os.readlink(path)}"
    content = path.read_bytes()
    if name.parts[0] in _PROVENANCE:
        filled = content and b"\0" not in content
        return f"{name} ({'filled' if filled else 'rubble'})"
    return f"{name} ({hashlib.sha256(_NAMES.sub(b'ID', content)).hexdigest()[:8]})"


def _in_folders(ground: Ground) -> Iterator[str]:
    """Every project and every run is one of ours, or somebody's who said so."""
    for equipment in _subfolders(ground.root):
        if equipment.name == _STAGING or ground.is_foreign(equipment):
            continue
        yield from _strange_files(ground, equipment)
        for project in _subfolders(equipment):
            if project.name == _OURS:
                continue
            if _is_made(project) or not _is_way(ground, project):
                yield from _in_folder(ground, project)
            yield from _in_runs(ground, project)
    for text in ground.foreign:
        session_id = str(_creation(Path(text)).get("session_id"))
        if session_id in ground.store.sessions:
            yield f"session {session_id}: {text}, which somebody else made, names it in its creation.json"


def _in_runs(ground: Ground, project: Path) -> Iterator[str]:
    theirs = _is_made(project) or ground.is_foreign(project)
    for child in _subfolders(project):
        if child.name == "TestRuns":
            for run in _subfolders(child):
                yield from _in_folder(ground, run)
            yield from _strange_files(ground, child)
        elif not theirs or child.name.startswith("Run_"):
            yield from _in_folder(ground, child)
    if not theirs:
        yield from _strange_files(ground, project)


def _in_folder(ground: Ground, folder: Path) -> Iterator[str]:
    if not _is_made(folder):
        if not ground.is_foreign(folder):
            yield f"the folder {folder} has no creation.json, and nobody else made it"
        return
    session_id = str(_creation(folder).get("session_id"))
    if ground.owner(folder) is None and not (
        ground.is_foreign(folder) and session_id not in ground.store.sessions
    ):
        session = ground.store.sessions.get(session_id)
        state = session.state if session else "unknown"
        yield f"session {session_id}: {folder} names it as its maker, and it is {state}, or is to make another"


def _is_way(ground: Ground, project: Path) -> bool:
    """Whether a folder is only there for the runs in it, or for one that got as far as being published."""
    if _is_made(project) or not project.is_dir():
        return False
    runs = [run for child in _subfolders(project) for run in _runs_in(child)]
    published = (s.destination for s in ground.store.sessions.values() if s.passed("sync_queued"))
    wanted = any(each is not None and project in Path(each).parents for each in published)
    return wanted or any(_is_made(run) or ground.is_foreign(run) for run in runs)


def _runs_in(child: Path) -> list[Path]:
    return list(_subfolders(child)) if child.name == "TestRuns" else [child]


def _subfolders(folder: Path) -> Iterator[Path]:
    """Not those of a dead attempt, which are a matter of their own."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink() and not _temporary(path.name):
            yield path


def _strange_files(ground: Ground, folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        real_folder = path.is_dir() and not path.is_symlink()
        if not real_folder and not ground.is_foreign(path) and not _temporary(path.name):
            yield f"{path} lies where only folders are, and nobody else made it"


def _in_staging(ground: Ground) -> Iterator[str]:
    """Only live sessions have a folder there, and those that keep a partial tree, with nothing else in it."""
    staging = ground.root / _STAGING
    for name in sorted(os.listdir(staging)) if staging.is_dir() else ():
        session, folder = ground.store.sessions.get(name), staging / name
        if session is None:
            if not ground.is_foreign(folder) and not (ground.live and _temporary(name)):
                yield f"{folder} belongs to no session"
        elif not session.terminal:
            yield from of_session(session, _in_waiting(ground, session, folder))
        elif _is_cleared_later(ground, session):
            continue
        elif session.partial_path is None:
            yield from of_session(session, [f"it is {session.state}, and {folder} is still there"])
        else:
            yield from of_session(session, _besides(folder, Path(session.partial_path)))


def _in_waiting(ground: Ground, session: Session, folder: Path) -> Iterator[str]:
    """Nothing runs for a session that waits, so nothing is there for it but its template and its tree."""
    if ground.live or session.state != "input_required" or session.tree is None:
        return
    more = sorted(set(os.listdir(folder)) - {"template", Path(session.tree).parent.name})
    if more:
        yield f"it waits for its operator, and in {folder} are besides its tree {more}"
    if not Path(session.tree).is_dir():
        yield f"it waits for its operator, and its tree {session.tree} is gone"


def _besides(folder: Path, kept: Path) -> Iterator[str]:
    way = [each for each in (kept, *kept.parents) if each.is_relative_to(folder)]
    for inner, outer in itertools.pairwise(way):
        more = sorted(set(os.listdir(outer)) - {inner.name}) if outer.is_dir() else []
        if more:
            yield f"it keeps {kept}, and in {outer} are besides it {more}"


def _temporary(name: str) -> bool:
    """A name that the service gives to what will be renamed, or is about to be removed."""
    drafted = name.startswith(".") and name.endswith(".tmp")
    made_there = name.startswith(".exlab-") and bool(_ID.fullmatch(name.removeprefix(".exlab-")))
    return drafted or made_there or name.endswith(".gone") or name == "template.partial"


def _leftovers(ground: Ground) -> Iterator[str]:
    """Partial trees may hold anything; and what a running service works with comes and goes."""
    kept = {session.partial_path for session in ground.store.sessions.values()}
    for place, folders, files in os.walk(ground.root):
        here = Path(place)
        if place in kept or ground.is_foreign(here) or (ground.live and _is_worked_in(ground.root, here)):
            folders.clear()
            continue
        for name in sorted(filter(_temporary, (*folders, *files))):
            if not (ground.live and name.startswith(".exlab-")):
                yield f"{here / name} was left over"


def _is_worked_in(root: Path, folder: Path) -> bool:
    """Staging, and what is told of an equipment."""
    return folder == root / _STAGING or (folder.name == _OURS and folder.parent.parent == root)
