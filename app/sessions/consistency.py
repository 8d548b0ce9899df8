"""Whether a store agrees with itself, and with the disk.

Everything here only reads: the store through a read-only connection and in one snapshot, so that a service may
run beside it, the disk by looking. What a history says is derived anew from its events, by the table of
`lifecycle.py` and not by the triggers that keep row and history together; so a store that was altered past its
guards is found out. Nothing is mended: each complaint says what to do.
"""

import functools
import itertools
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal

import msgspec

from app import database
from app.sessions.lifecycle import EDGES, PHASES, TERMINAL, State
from app.steps import provenance, publish

_LEVELS = ("error", "warning", "note")
_ENOUGH = 20
_LEAD_OF_PHASE = {phase: state for state, phase in PHASES.items() if state not in TERMINAL}
_MOVES = {(before, after) for (before, _), after in EDGES.items() if before is not after}
_HAS_TREE = (State.PLUGIN_PASS, State.INPUT_REQUIRED, State.CACHE_WRITE, State.POST_VALIDATE)

_BACKUP = "stop the service, keep the file aside, and go back to a backup"
_MEDDLED = "the store was changed past its guards: keep a copy of it, and ask for support"
_ASK = "look for who moved it; the session fails when it is taken up, and can be tried again"


class Complaint(msgspec.Struct, frozen=True):
    """One thing that is not as it should be: an `error` is to be mended, a `note` only to be known."""

    level: Literal["error", "warning", "note"]
    what: str
    where: str
    advice: str


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """What the row of a session claims, and where it keeps its files."""

    session_id: str
    state: str
    head_seq: int
    updated_at: str
    ended_at: str | None
    error: object
    result: object
    destination: Path | None
    local_root: Path | None
    tree: Path | None
    partial_path: Path | None
    cancelled: bool


class _Made(msgspec.Struct, frozen=True):
    """A store as this release makes it; its schema by type, name and statement."""

    revision: str
    schema: frozenset[tuple[str, str, str]]


def examine(store_path: Path, local_root: Path | None) -> list[Complaint]:
    """All that is wrong, the worst first. `local_root` is the data root that the config names, if it does."""
    if not store_path.exists():
        return [
            Complaint("note", "there is no store yet", str(store_path), "the service makes it at its start")
        ]
    found: list[Complaint] = []
    try:
        found.extend(_complaints(store_path, local_root))  # what was found before an error stays
    except (sqlite3.DatabaseError, msgspec.DecodeError) as error:
        advice = f"run this as the account that the service runs under; if that changes nothing, {_BACKUP}"
        found.append(Complaint("error", f"the store cannot be read: {error}", str(store_path), advice))
    return sorted(found, key=lambda complaint: _LEVELS.index(complaint.level))


def _complaints(store_path: Path, local_root: Path | None) -> Iterator[Complaint]:
    # Before the snapshot: a session has its row before it has a folder.
    residents = publish.residents(local_root) if local_root is not None else ()
    with closing(_open(store_path)) as db:
        db.execute("BEGIN")
        made = _made()
        foreign = _foreign(db, store_path, made)
        if foreign is not None:
            yield foreign
            return
        yield from _damage(db, store_path, made)
        rows = {row.session_id: row for row in _rows(db)}
        yield from _in_histories(db, rows)
        yield from _in_prompts(db, rows)
        yield from _in_plugins(db, rows)
    yield from _on_disk(store_path, rows)
    if local_root is not None:
        yield from _in_staging(local_root / publish.STAGING, residents, rows)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


# The file


@functools.cache
def _made() -> _Made:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        opened = database.prepare(path)
        with closing(_open(path)) as db:
            return _Made(opened.revision, _schema(db))


def _schema(db: sqlite3.Connection) -> frozenset[tuple[str, str, str]]:
    return frozenset(
        db.execute("SELECT type, name, sql FROM sqlite_schema WHERE substr(name, 1, 7) <> 'sqlite_'")
    )


def _foreign(db: sqlite3.Connection, path: Path, made: _Made) -> Complaint | None:
    """Why the file is not a store that this release can read."""
    if db.execute("PRAGMA application_id").fetchone()[0] != database.APPLICATION_ID:
        return Complaint(
            "error", "the file is no store of this service", str(path), "see service.database_url"
        )
    [found] = db.execute("SELECT version_num FROM alembic_version").fetchone()
    if found == made.revision:
        return None
    what = f"the store has schema {found}, and this release knows {made.revision}"
    return Complaint("warning", what, str(path), "check it with the release that the service runs")


def _damage(db: sqlite3.Connection, path: Path, made: _Made) -> Iterator[Complaint]:
    for [fault] in db.execute(f"PRAGMA integrity_check({_ENOUGH})").fetchall():
        if fault != "ok":
            yield Complaint("error", f"the file is damaged: {fault}", str(path), _BACKUP)
    orphans = Counter(table for table, *_ in db.execute("PRAGMA foreign_key_check"))
    for table, count in orphans.items():
        yield Complaint("error", f"{count} rows of {table} belong to no session", str(path), _MEDDLED)
    for kind, name in sorted({(kind, name) for kind, name, _ in _schema(db) ^ made.schema}):
        yield Complaint("error", f"the {kind} {name} is not as this release made it", str(path), _MEDDLED)


# The histories


def _rows(db: sqlite3.Connection) -> Iterator[_Row]:
    columns = (
        "session_id, state, head_seq, updated_at, ended_at, error, result,"
        " destination, local_root, tree, partial_path, cancel_requested_at IS NOT NULL"
    )
    for row in db.execute(f"SELECT {columns} FROM sessions ORDER BY session_id"):
        session_id, state, head_seq, updated_at, ended_at, error, result, *paths, cancelled = row
        destination, local_root, tree, partial_path = (path and Path(path) for path in paths)
        yield _Row(
            session_id=session_id,
            state=state,
            head_seq=head_seq,
            updated_at=updated_at,
            ended_at=ended_at,
            error=error and msgspec.json.decode(error),
            result=result and msgspec.json.decode(result),
            destination=destination,
            local_root=local_root,
            tree=tree,
            partial_path=partial_path,
            cancelled=bool(cancelled),
        )


class _Frame(msgspec.Struct, frozen=True):
    """What a frame says that may move its session."""

    phase: str = ""
    error: object = None
    result: object = None


class _Fold:
    """The row that a history amounts to, and what is wrong with the history on the way."""

    def __init__(self) -> None:
        self.state = State.PENDING
        self.head_seq = 0
        self.ended_at: str | None = None
        self.error: object = None
        self.result: object = None
        self.faults: list[str] = []

    def add(self, seq: int, kind: str, at: str, frame: _Frame) -> None:
        if seq != self.head_seq + 1:
            self.faults.append(f"after event {self.head_seq} comes event {seq}")
        if self.state in TERMINAL:
            self.faults.append(f"event {seq} ({kind}) comes after the terminal one")
        self.head_seq = seq
        lead = _lead(kind, frame)
        if lead is None:
            return
        if (self.state, lead) not in _MOVES:
            self.faults.append(f"event {seq} leads from {self.state} to {lead}, where there is no edge")
        self.state = lead
        if lead in TERMINAL:
            self.ended_at, self.error, self.result = at, frame.error, frame.result


def _lead(kind: str, frame: _Frame) -> State | None:
    """Where an event moves its session, None for one that does not."""
    match kind:
        case "phase":
            return _LEAD_OF_PHASE.get(frame.phase)
        case "input_required":
            return State.INPUT_REQUIRED
        case "done":
            return State.DONE
        case "failed":
            cancelled = isinstance(frame.error, dict) and frame.error.get("code") == "cancelled"
            return State.ABORTED if cancelled else State.FAILED
        case _:
            return None


def _in_histories(db: sqlite3.Connection, rows: Mapping[str, _Row]) -> Iterator[Complaint]:
    folds = {}
    events = db.execute(
        "SELECT session_id, seq, kind, at, iif(kind IN ('phase', 'done', 'failed'), frame, '{}')"
        " FROM events ORDER BY session_id, seq"
    )
    for session_id, history in itertools.groupby(events, key=lambda event: event[0]):
        folds[session_id] = fold = _Fold()
        for _, seq, kind, at, frame in history:
            fold.add(seq, kind, at, msgspec.json.decode(frame, type=_Frame))
    for session_id, row in rows.items():
        fold = folds.get(session_id) or _Fold()
        for fault in [*fold.faults[:_ENOUGH], *_differences(row, fold)]:
            yield _of(row, "error", fault, _MEDDLED)


def _differences(row: _Row, fold: _Fold) -> Iterator[str]:
    for name in ("state", "head_seq", "ended_at", "error", "result"):
        claimed, told = getattr(row, name), getattr(fold, name)
        if claimed != told:
            yield f"the row says {name} {_shown(claimed)}, its events say {_shown(told)}"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _in_prompts(db: sqlite3.Connection, rows: Mapping[str, _Row]) -> Iterator[Complaint]:
    events: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for session_id, kind, prompt_id in db.execute(
        "SELECT session_id, kind, json_extract(frame, '$.prompt_id') FROM events"
        " WHERE kind IN ('input_required', 'input_received') ORDER BY position"
    ):
        events[session_id][prompt_id] = kind
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for session_id, prompt_id, status in db.execute("SELECT session_id, prompt_id, status FROM prompts"):
        found[session_id][prompt_id] = status
    for session_id, row in rows.items():
        expected = _prompts_told(row, events[session_id])
        for prompt_id in sorted(expected.keys() | found[session_id].keys()):
            claimed, told = (each.get(prompt_id, "missing") for each in (found[session_id], expected))
            if claimed != told:
                fault = f"the prompt {prompt_id} is {claimed}; by the events of the session it is {told}"
                yield _of(row, "error", fault, _MEDDLED)


def _prompts_told(row: _Row, events: Mapping[str, str]) -> dict[str, str]:
    """The status of each prompt by its last event; `events` in the order in which the prompts were asked."""
    told = {
        prompt_id: "answered" if kind == "input_received" else "withdrawn"
        for prompt_id, kind in events.items()
    }
    if row.state == State.INPUT_REQUIRED:
        told |= dict.fromkeys(list(told)[-1:], "open")
    return told


def _in_plugins(db: sqlite3.Connection, rows: Mapping[str, _Row]) -> Iterator[Complaint]:
    """A session works in the tree that was sealed last: as it was rendered, or as a plugin left it."""
    newest = "SELECT session_id, tree, max(ordinal) FROM snapshots GROUP BY session_id"
    sealed = {session_id: Path(tree) for session_id, tree, _ in db.execute(newest)}
    for row in rows.values():
        if row.session_id in sealed and row.tree != sealed[row.session_id]:
            what = f"its tree is {row.tree}, but {sealed[row.session_id]} was sealed last"
            yield _of(row, "error", what, _MEDDLED)


# The disk


def _on_disk(store_path: Path, rows: Mapping[str, _Row]) -> Iterator[Complaint]:
    """What is wrong with the folders of the sessions, but for those that have moved on since the snapshot."""
    roots = {row.local_root for row in rows.values() if row.local_root is not None}
    away = {root for root in roots if not publish.root_present(root)}
    for root in sorted(away):
        advice = "mount it; what lies below it was not looked at"
        yield Complaint("warning", "the data root is not there", str(root), advice)
    looked_at = (row for row in rows.values() if row.local_root not in away)
    suspected = [(row, complaint) for row in looked_at for complaint in _in_folders(row)]
    if suspected:
        with closing(_open(store_path)) as db:
            now = dict(db.execute("SELECT session_id, updated_at FROM sessions"))
        yield from (complaint for row, complaint in suspected if now.get(row.session_id) == row.updated_at)


def _in_folders(row: _Row) -> Iterator[Complaint]:
    try:
        if row.state == State.DONE:
            yield from _published(row)
        elif row.state not in TERMINAL and not row.cancelled:
            yield from _being_built(row)
        elif row.partial_path is not None and not row.partial_path.is_dir():
            what = f"the partial tree {row.partial_path} is gone"
            yield _of(row, "warning", what, "nothing, if it was removed on purpose")
    except OSError as error:
        yield _of(row, "warning", f"{error.filename} cannot be looked at: {error.strerror}", "see its rights")


def _published(row: _Row) -> Iterator[Complaint]:
    destination = row.destination
    if destination is None:
        return
    if not destination.exists():
        what = f"{destination} is not there any more"
        yield _of(row, "note", what, "nothing, if the folder was moved or archived")
    elif provenance.session_of(destination) != row.session_id:
        what = f"{destination} does not say in its creation.json that this session made it"
        yield _of(row, "warning", what, "look whether another folder was put in its place")


def _being_built(row: _Row) -> Iterator[Complaint]:
    if row.local_root is None:
        return
    template = publish.session_folder(row.local_root, row.session_id) / "template"
    if row.state == State.RENDERING and not template.is_dir():
        yield _of(row, "error", f"its copy of the template is gone: {template}", _ASK)
    built = row.tree is not None and row.tree.is_dir()
    if row.state in _HAS_TREE and not built:
        yield _of(row, "error", f"its staging tree is gone: {row.tree}", _ASK)
    if row.state == State.SYNC_QUEUED and row.destination is not None:
        published = provenance.session_of(row.destination) == row.session_id
        if not built and not published:
            what = f"its folder is neither at {row.tree} nor at {row.destination}"
            yield _of(row, "error", what, _ASK)


def _in_staging(staging: Path, residents: Iterable[str], rows: Mapping[str, _Row]) -> Iterator[Complaint]:
    """Folders that belong to no session, or that one has left behind."""
    kept = 0
    for name in residents:
        row = rows.get(name)
        if not (staging / name).exists():
            continue
        if row is None:
            what = "no session of this store has this folder"
            yield Complaint(
                "warning", what, str(staging / name), "remove it, unless another store's session has it"
            )
        elif row.state in TERMINAL and row.partial_path is None:
            yield Complaint(
                "note", "an ended session left this", str(staging / name), "the service removes it"
            )
        elif row.partial_path is not None:
            kept += 1
    if kept:
        advice = "they are removed after service.keep_partial_days"
        yield Complaint("note", f"partial trees that are kept: {kept}", str(staging), advice)


def _of(row: _Row, level: Literal["error", "warning", "note"], what: str, advice: str) -> Complaint:
    return Complaint(level, what, f"session {row.session_id}", advice)
