"""Whether a store agrees with itself, and with the disk.

Everything here only reads: the store through a read-only connection and in one snapshot, so that a service may
run beside it, the disk by looking. What a history says is derived anew from its events, by the table of
`lifecycle.py`, and not by the triggers that keep row and history together; so a store that was altered past its
guards is found out. Nothing is mended: each complaint says what to do.
"""

import itertools
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal

import msgspec

from app import database
from app.sessions.lifecycle import EDGES, PHASES, TERMINAL, State
from app.steps import provenance, publish

Level = Literal["error", "warning", "note"]

_ENOUGH = 20
_STATE_OF_PHASE = {phase: state for state, phase in PHASES.items() if state not in TERMINAL}
_MOVES = {(before, after) for (before, _), after in EDGES.items() if before is not after}
_HAS_TREE = (State.PLUGIN_PASS, State.INPUT_REQUIRED, State.CACHE_WRITE, State.POST_VALIDATE)
_BACKUP = "stop the service, keep the file aside, and go back to a backup"
_MEDDLED = "somebody changed the store past its guards; ask for support before going on"


class Complaint(msgspec.Struct, frozen=True):
    """One thing that is not as it should be: an `error` is to be mended, a `note` only to be known."""

    level: Level
    what: str
    where: str
    advice: str


class _Row(msgspec.Struct, frozen=True):
    """What the row of a session claims."""

    session_id: str
    state: State
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


class _Reading(msgspec.Struct, frozen=True):
    """One snapshot of the store."""

    rows: Mapping[str, _Row]
    complaints: tuple[Complaint, ...]


def examine(store_path: Path, local_root: Path | None) -> list[Complaint]:
    """All that is wrong with the store and below its data roots. `local_root` is the one that the config names."""
    if not store_path.exists():
        return [Complaint("note", "there is no store yet", str(store_path), "the service makes it")]
    # Before the snapshot: a session has its row before it has a folder.
    residents = publish.residents(local_root) if local_root is not None else ()
    try:
        reading = _read(store_path)
        on_disk = _on_disk(reading.rows, local_root, residents)
        standing = _standing(store_path, {session_id: reading.rows[session_id] for session_id in on_disk})
    except sqlite3.DatabaseError as error:
        advice = f"run this as the account of the service; if that does not help, {_BACKUP}"
        return [Complaint("error", f"the store cannot be read: {error}", str(store_path), advice)]
    found = [*reading.complaints, *itertools.chain.from_iterable(on_disk[each] for each in standing)]
    return found + list(_left_over(reading.rows, local_root, residents))


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _read(path: Path) -> _Reading:
    with closing(_open(path)) as db:
        db.execute("BEGIN")
        foreign = list(_foreign(db, path))
        if foreign:
            return _Reading({}, tuple(foreign))
        damage = list(_damage(db, path))
        rows = {row.session_id: row for row in _rows(db)}
        return _Reading(rows, (*damage, *_in_histories(db, rows), *_in_prompts(db, rows)))


def _foreign(db: sqlite3.Connection, path: Path) -> Iterator[Complaint]:
    """Why the file is not a store that this release can read, and the guards that it lacks."""
    if db.execute("PRAGMA application_id").fetchone()[0] != database.APPLICATION_ID:
        yield Complaint("error", "the file is no store of this service", str(path), "name another database_url")
        return
    with tempfile.TemporaryDirectory() as folder:
        known = database.prepare(Path(folder) / "store").revision
    [found] = db.execute("SELECT version_num FROM alembic_version").fetchone()
    if found != known:
        what = f"the store has schema {found}, this release has {known}"
        yield Complaint("warning", what, str(path), "check with the release that the service runs")


def _damage(db: sqlite3.Connection, path: Path) -> Iterator[Complaint]:
    for [fault] in db.execute(f"PRAGMA integrity_check({_ENOUGH})"):
        if fault != "ok":
            yield Complaint("error", f"the file is damaged: {fault}", str(path), _BACKUP)
    orphans = db.execute("PRAGMA foreign_key_check").fetchall()
    for table, count in sorted((table, len([*rows])) for table, rows in itertools.groupby(orphans, key=lambda row: row[0])):
        yield Complaint("error", f"{count} rows of {table} belong to nothing", str(path), _MEDDLED)
    for kind, name in _altered(db):
        yield Complaint("error", f"the {kind} {name} is not that of this release", str(path), _MEDDLED)


def _altered(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """What stands differently in the schema than where it was made anew: a guard that was dropped, above all."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "store"
        database.prepare(fresh)
        with closing(_open(fresh)) as other:
            return sorted({entry[:2] for entry in _schema(other) ^ _schema(db)})


def _schema(db: sqlite3.Connection) -> set[tuple[str, str, str]]:
    return set(db.execute("SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"))


def _rows(db: sqlite3.Connection) -> Iterator[_Row]:
    columns = (
        "session_id, state, head_seq, updated_at, ended_at, error, result, destination, local_root, tree,"
        " partial_path, cancel_requested_at IS NOT NULL"
    )
    for row in db.execute(f"SELECT {columns} FROM sessions"):
        session_id, state, head_seq, updated_at, ended_at, error, result, *paths, cancelled = row
        yield _Row(
            session_id,
            State(state),
            head_seq,
            updated_at,
            ended_at,
            _json(error),
            _json(result),
            *(Path(path) if path is not None else None for path in paths),
            bool(cancelled),
        )


def _json(text: str | None) -> object:
    return None if text is None else msgspec.json.decode(text)


class _Frame(msgspec.Struct, frozen=True):
    """What a frame says that moves its session."""

    phase: str | None = None
    prompt_id: str | None = None
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
        self.head_seq = seq
        if self.state in TERMINAL:
            self.faults.append(f"event {seq} ({kind}) comes after the terminal one")
        lead = self._lead(kind, frame)
        if lead is None:
            return
        if (self.state, lead) not in _MOVES:
            self.faults.append(f"event {seq} leads from {self.state} to {lead}, which is no edge")
        self.state = lead
        if lead in TERMINAL:
            self.ended_at, self.error, self.result = at, frame.error, frame.result

    def _lead(self, kind: str, frame: _Frame) -> State | None:
        match kind:
            case "phase":
                return _STATE_OF_PHASE.get(frame.phase or "", self.state)
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
    told = dict.fromkeys(rows, _Fold())
    telling = "kind IN ('phase', 'input_required', 'done', 'failed')"
    events = db.execute(
        f"SELECT session_id, seq, kind, at, iif({telling}, frame, '{{}}') FROM events ORDER BY session_id, seq"
    )
    for session_id, history in itertools.groupby(events, key=lambda event: event[0]):
        told[session_id] = fold = _Fold()
        for _, seq, kind, at, frame in history:
            fold.add(seq, kind, at, msgspec.json.decode(frame, type=_Frame))
    for session_id, fold in told.items():
        for fault in [*fold.faults, *_differences(rows.get(session_id), fold)][:_ENOUGH]:
            yield Complaint("error", fault, f"session {session_id}", _MEDDLED)


def _differences(row: _Row | None, fold: _Fold) -> Iterator[str]:
    for name in ("state", "head_seq", "ended_at", "error", "result") if row is not None else ():
        claimed, told = getattr(row, name), getattr(fold, name)
        if claimed != told:
            yield f"its row says {name} {_shown(claimed)}, its events say {_shown(told)}"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _in_prompts(db: sqlite3.Connection, rows: Mapping[str, _Row]) -> Iterator[Complaint]:
    statuses: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for session_id, prompt_id, status in db.execute("SELECT session_id, prompt_id, status FROM prompts"):
        statuses[session_id][prompt_id] = status
    events: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for session_id, kind, prompt_id in db.execute(
        "SELECT session_id, kind, json_extract(frame, '$.prompt_id') FROM events"
        " WHERE kind IN ('input_required', 'input_received') ORDER BY session_id, seq"
    ):
        events[session_id][prompt_id] = kind
    for session_id in sorted({*statuses, *events} & {*rows}):
        waits = rows[session_id].state is State.INPUT_REQUIRED
        for fault in _prompt_faults(statuses[session_id], events[session_id], waits):
            yield Complaint("error", fault, f"session {session_id}", _MEDDLED)


def _prompt_faults(statuses: Mapping[str, str], events: Mapping[str, str], waits: bool) -> Iterator[str]:
    """`events` has the last event of each prompt, in the order in which the prompts were asked."""
    newest = next(reversed(events), None) if isinstance(events, dict) else None
    for prompt_id in statuses.keys() - events.keys():
        yield f"no event tells of the prompt {prompt_id}"
    for prompt_id, kind in events.items():
        if kind == "input_received":
            expected = "answered"
        else:
            expected = "open" if waits and prompt_id == newest else "withdrawn"
        found = statuses.get(prompt_id, "missing")
        if found != expected:
            yield f"the prompt {prompt_id} is {found}; by its events it is {expected}"


def _on_disk(rows: Mapping[str, _Row], local_root: Path | None, residents: Iterable[str]) -> dict[str, list[Complaint]]:
    """What is wrong with the folders of each session."""
    found: defaultdict[str, list[Complaint]] = defaultdict(list)
    present: dict[Path, bool] = {}
    for row in rows.values():
        root = row.local_root
        if root is None:
            continue
        if root not in present:
            present[root] = publish.root_present(root)
        ...
    return found
