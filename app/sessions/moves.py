"""What one transaction does to a session: the verbs of its life, as units of the writer.

It promises that a session is moved only from where its caller saw it, together with the events that tell
of the move, and with the audit of the command that caused it. Committing, and telling others after the
commit, is the store's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uuid_utils
from sqlalchemy import Connection, Select, and_, insert, or_, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from app import database
from app.database import (
    audit,
    copy_jobs,
    idempotency_keys,
    log_lines,
    plugin_runs,
    prompts,
    sessions,
    snapshots,
)
from app.errors import (
    IdempotencyKeyReused,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    SessionNotFound,
    TooLateToCancel,
)
from app.sessions import events, lifecycle, requests
from app.sessions.lifecycle import LIVE, Outcome, State
from app.sessions.prompts import PromptField, accepted
from app.sessions.session import Caller, Cancel, Frame, Session, session_of, sessions_of


class Moved(Exception):
    """The session is no longer where the caller saw it; nothing was written."""


class DestinationHeld(Exception):
    """A live session holds the destination, its project, or a folder below it."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(session_id)


class Transaction:
    """One unit of the writer: its connection, its time, and the frames that it adds to histories."""

    def __init__(self, db: Connection, now: str) -> None:
        self.db = db
        self.now = now
        self.frames: list[Frame] = []


def create(
    tx: Transaction, body: requests.CreateBody, caller: Caller, key: str | None, retry_of: str | None
) -> tuple[Session, bool]:
    """A new session in `validating`, or the one that this idempotency key made before; whether it is new."""
    request = requests.encode(body)
    digest = requests.digest(request + (retry_of or ""))
    if key is not None and (earlier := _by_key(tx, caller.principal, key, digest)) is not None:
        return earlier, False
    session_id = str(uuid_utils.uuid7())
    tx.db.execute(insert(sessions), _new_row(session_id, body, request, tx.now, caller, retry_of))
    if key is not None:
        entry = {"principal": caller.principal, "key": key, "body_digest": digest}
        tx.db.execute(insert(idempotency_keys), entry | {"session_id": session_id, "created_at": tx.now})
    details = {"retry_of": retry_of} if retry_of else {}
    _audit(tx, caller, "retry" if retry_of else "create", session_id, body.operator, details)
    return advance(tx, load(tx.db, session_id), (lifecycle.Begun(),)), True


def advance(tx: Transaction, seen: Session, outcomes: Sequence[Outcome]) -> Session:
    """Move a session by what happened to it; Moved if it no longer stands where it was `seen`."""
    _claim(tx, seen)
    own = select(sessions.c.head_seq).where(sessions.c.session_id == seen.session_id)
    state, head = seen.state, tx.db.execute(own).scalar_one()
    for outcome in outcomes:
        lead = lifecycle.after(state, outcome)
        _write_columns(tx, seen.session_id, outcome, moves=lead is not state)
        for event in events.told(state, outcome, seq=head + 1, at=tx.now):
            _append(tx, seen.session_id, event)
            head = event.seq
        state = lead
    return load(tx.db, seen.session_id)


def answer(tx: Transaction, session_id: str, body: requests.ResumeBody, caller: Caller) -> Session:
    """Take an operator's answer to the open prompt; the refusals in the order in which they are checked."""
    session = load(tx.db, session_id)
    if body.prompt_id is not None and _is_repeat(tx, session_id, body):
        return session
    if session.terminal:
        raise SessionAlreadyCompleted
    if session.prompt is None or session.cancel is not None:
        raise SessionNotAwaitingInput
    if body.prompt_id is not None and body.prompt_id != session.prompt.prompt_id:
        raise PromptNotOpen(details={"prompt_id": session.prompt.prompt_id})
    answered = lifecycle.Answered(
        prompt_id=session.prompt.prompt_id,
        plugin=session.prompt.plugin,
        operator=body.operator,
        values=accepted(session.prompt.fields, body.extra_inputs),
        digest=_answer_digest(session.prompt.fields, body),
    )
    _audit(tx, caller, "resume", session_id, body.operator, {"prompt_id": answered.prompt_id})
    return advance(tx, session, (answered,))


def request_cancel(tx: Transaction, session_id: str, body: requests.CancelBody, caller: Caller) -> Session:
    """Write a cancel down before it acts; a second one joins the first."""
    session = load(tx.db, session_id)
    if session.terminal:
        raise SessionAlreadyCompleted
    if not lifecycle.cancellable(session.state):
        raise TooLateToCancel
    details = {"discard_files": body.discard_files, "joined": session.cancel is not None}
    _audit(tx, caller, "cancel", session_id, body.operator, details)
    if session.cancel is None:
        cancel = _json(Cancel(discard_files=body.discard_files, operator=body.operator))
        write_row(tx.db, session_id, {"cancel_requested_at": tx.now, "cancel": cancel, "updated_at": tx.now})
    return load(tx.db, session_id)


def take_stock(tx: Transaction) -> list[Session]:
    """Count the deaths of the last service, and give back what is unfinished, oldest first.

    A service that stopped in good order has left no session marked as driven. Of those that an uncleanly
    ended one was driving, the one that was driven alone is the only suspect.
    """
    alone = tx.db.execute(select(sessions.c.session_id).where(sessions.c.alone == 1)).first()
    suspects = sessions.c.driven == 1 if alone is None else sessions.c.alone == 1
    tx.db.execute(update(sessions).where(suspects).values(step_deaths=sessions.c.step_deaths + 1))
    marked = or_(sessions.c.driven == 1, sessions.c.alone == 1)
    tx.db.execute(update(sessions).where(marked).values(driven=0, alone=0))
    return sessions_of(tx.db.execute(whole(sessions.c.state.in_(LIVE)).order_by(sessions.c.session_id)))


def holders(session_id: str, destination_key: str, project_key: str) -> Select[tuple[str]]:
    """One live session to a destination; a project that is being made is closed, and closes what is below."""
    row = sessions.c
    below = row.destination_key.startswith(destination_key + "/", autoescape=True)
    held = or_(row.destination_key.in_((destination_key, project_key)), below)
    return select(row.session_id).where(row.session_id != session_id, row.state.in_(LIVE), held)


def whole(*conditions: Any) -> Select[Any]:
    """Rows of sessions, each with its open prompt."""
    open_prompt = and_(prompts.c.session_id == sessions.c.session_id, prompts.c.status == "open")
    prompt = [
        prompts.c.prompt_id,
        prompts.c.plugin,
        prompts.c.file,
        prompts.c.reason,
        prompts.c.fields,
    ]
    return select(sessions, *prompt).select_from(sessions.outerjoin(prompts, open_prompt)).where(*conditions)


def load(db: Connection, session_id: str) -> Session:
    row = db.execute(whole(sessions.c.session_id == session_id)).first()
    if row is None:
        raise SessionNotFound
    return session_of(row)


def write_row(db: Connection, session_id: str, values: Mapping[str, object]) -> None:
    db.execute(update(sessions).where(sessions.c.session_id == session_id).values(dict(values)))


def _claim(tx: Transaction, seen: Session) -> None:
    """Touch the row if it still stands where the caller saw it.

    A cancel that was recorded meanwhile is a race that the caller has lost, unless it is the one who
    finishes that cancel and so has seen it.
    """
    still = and_(sessions.c.session_id == seen.session_id, sessions.c.state == seen.state)
    if seen.cancel is None:
        still = and_(still, sessions.c.cancel_requested_at.is_(None))
    if tx.db.execute(update(sessions).where(still).values(updated_at=tx.now)).rowcount != 1:
        raise Moved(seen.session_id)


def _append(tx: Transaction, session_id: str, event: events.Event) -> None:
    data = events.encode(event)
    kind = str(type(event).__struct_config__.tag)
    row = {"session_id": session_id, "seq": event.seq, "kind": kind, "at": event.at, "frame": data.decode()}
    position = tx.db.execute(insert(database.events), row).lastrowid
    tx.frames.append(Frame(position, session_id, event.seq, kind, data))


def _write_columns(tx: Transaction, session_id: str, outcome: Outcome, *, moves: bool) -> None:
    """What an outcome leaves in the tables besides its events, before they move the row."""
    values: dict[str, object] = {"blocked_on": None, "step_deaths": 0} if moves else {}
    match outcome:
        case lifecycle.Accepted():
            holder = tx.db.execute(holders(session_id, outcome.destination_key, outcome.project_key)).first()
            if holder is not None:
                raise DestinationHeld(holder.session_id)
            values |= {
                "destination": str(outcome.destination),
                "destination_key": outcome.destination_key,
                "project_key": outcome.project_key,
                "project_short_id": outcome.project_short_id,
                "local_root": str(outcome.local_root),
                "pinned": bytes(outcome.pinned).decode(),
            }
        case lifecycle.Rendered():
            values |= {"tree": str(outcome.tree), "rendered": _json(outcome.rendered)}
            values |= {"answers": _json(outcome.answers)}
            _snapshot(tx, session_id, outcome.tree, outcome.manifest)
            _log(tx, session_id, "render", [("info", line) for line in outcome.log])
        case lifecycle.PluginRan():
            values |= {"step_deaths": 0, "blocked_on": None}
            values |= {"tree": str(outcome.tree)} if outcome.tree else {}
            _plugin_ran(tx, session_id, outcome)
        case lifecycle.Asked():
            values |= {"driven": 0, "alone": 0}
            _log(tx, session_id, outcome.plugin, [(said.level, said.text) for said in outcome.log])
        case lifecycle.Answered():
            _keep_answer(tx, outcome)
            values |= {"driven": 1}
        case lifecycle.Checked(findings=findings):
            values |= {"findings": _json(findings)}
        case lifecycle.Published():
            values |= {"sync_status": outcome.result["sync_status"], "driven": 0, "alone": 0}
            tx.db.execute(insert(copy_jobs), _copy_row(session_id, outcome, tx.now))
        case lifecycle.Failed(error=error) | lifecycle.Cancelled(error=error):
            partial = (error.details or {}).get("partial_path")
            values |= {"partial_path": partial, "driven": 0, "alone": 0}
        case lifecycle.Recovered():
            values |= {"recoveries": sessions.c.recoveries + 1, "driven": 1, "alone": int(outcome.alone)}
        case lifecycle.Blocked(code=code, message=message, since=since, retry_at=retry_at):
            blocked = {"code": code, "message": message, "since": since, "retry_at": retry_at}
            values |= {"blocked_on": _json(blocked), "driven": 0, "alone": 0}
    if values:
        write_row(tx.db, session_id, values)


def _plugin_ran(tx: Transaction, session_id: str, ran: lifecycle.PluginRan) -> None:
    told = "ordinal plugin version status message duration_ms exit_code peak_memory_mb"
    row = {name: getattr(ran, name) for name in told.split()}
    row |= {"session_id": session_id, "files_affected": _json(ran.files_affected), "ended_at": tx.now}
    tx.db.execute(insert(plugin_runs), row)
    _log(tx, session_id, ran.plugin, [(said.level, said.text) for said in ran.log])
    if ran.tree is not None:
        _snapshot(tx, session_id, ran.tree, ran.manifest, plugin=ran)


def _snapshot(
    tx: Transaction,
    session_id: str,
    tree: Path,
    manifest: str | None,
    plugin: lifecycle.PluginRan | None = None,
) -> None:
    row = {
        "session_id": session_id,
        "ordinal": plugin.ordinal if plugin else 0,
        "step": "plugin_pass" if plugin else "rendering",
        "plugin": plugin.plugin if plugin else None,
        "tree": str(tree),
        "manifest": manifest,
        "taken_at": tx.now,
    }
    tx.db.execute(
        upsert(snapshots)
        .values(row)
        .on_conflict_do_update(index_elements=["session_id", "ordinal"], set_=row)
    )


def _log(tx: Transaction, session_id: str, source: str, lines: Sequence[tuple[str, str]]) -> None:
    rows = [
        {"session_id": session_id, "at": tx.now, "source": source, "level": level, "text": text}
        for level, text in lines
    ]
    if rows:
        tx.db.execute(insert(log_lines), rows)


def _keep_answer(tx: Transaction, answered: lifecycle.Answered) -> None:
    """What the event of the answer does not tell; it is that event that closes the prompt."""
    values = {"answer": _json(answered.values), "answer_digest": answered.digest}
    tx.db.execute(update(prompts).where(prompts.c.prompt_id == answered.prompt_id).values(values))


def _copy_row(session_id: str, published: lifecycle.Published, now: str) -> dict[str, object]:
    return {
        "session_id": session_id,
        "source": published.result["path"],
        "target": published.nas_path,
        "status": published.result["sync_status"],
        "attempts": 0,
        "created_at": now,
        "updated_at": now,
    }


def _new_row(
    session_id: str, body: requests.CreateBody, request: str, now: str, caller: Caller, retry_of: str | None
) -> dict[str, object]:
    run = isinstance(body, requests.RunBody)
    return {
        "session_id": session_id,
        "kind": "run" if run else "project",
        "run_kind": body.run_kind if isinstance(body, requests.RunBody) else None,
        "state": State.PENDING,
        "label": body.label,
        "operator": body.operator,
        "equipment_id": body.equipment_id,
        "project_short_id": body.project_short_id if isinstance(body, requests.RunBody) else None,
        "template_path": body.template_path,
        "created_at": now,
        "updated_at": now,
        "head_seq": 0,
        "recoveries": 0,
        "step_deaths": 0,
        "driven": 1,
        "alone": 0,
        "retry_of": retry_of,
        "principal": caller.principal,
        "trace_id": caller.trace_id,
        "request": request,
    }


def _by_key(tx: Transaction, principal: str, key: str, digest: str) -> Session | None:
    own = and_(idempotency_keys.c.principal == principal, idempotency_keys.c.key == key)
    row = tx.db.execute(
        select(idempotency_keys.c.body_digest, idempotency_keys.c.session_id).where(own)
    ).first()
    if row is None:
        return None
    if row.body_digest != digest:
        raise IdempotencyKeyReused(details={"session_id": row.session_id})
    return load(tx.db, row.session_id)


def _is_repeat(tx: Transaction, session_id: str, body: requests.ResumeBody) -> bool:
    row = tx.db.execute(
        select(prompts.c.answer_digest, prompts.c.fields).where(
            prompts.c.session_id == session_id,
            prompts.c.prompt_id == body.prompt_id,
            prompts.c.status == "answered",
        )
    ).first()
    if row is None:
        return False
    fields = msgspec.json.decode(row.fields, type=tuple[PromptField, ...])
    return bool(row.answer_digest == _answer_digest(fields, body))


def _answer_digest(fields: tuple[PromptField, ...], body: requests.ResumeBody) -> str:
    """By which the repeat of an answer is known. A short secret could be guessed from it, so it has none."""
    told = {field.id: body.extra_inputs.get(field.id) for field in fields if not field.secret}
    return requests.digest(msgspec.json.encode(told, order="sorted").decode())


def _audit(
    tx: Transaction,
    caller: Caller,
    command: str,
    session_id: str,
    operator: str | None,
    details: Mapping[str, object],
) -> None:
    row = {
        "at": tx.now,
        "principal": caller.principal,
        "operator": operator,
        "command": command,
        "session_id": session_id,
        "trace_id": caller.trace_id,
        "details": _json(details),
    }
    tx.db.execute(insert(audit), row)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
