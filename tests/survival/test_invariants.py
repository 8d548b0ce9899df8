"""The checker is silent on a good laboratory, and finds each thing that was done to it past its guards.

The laboratory is made once, by the real store and with real folders; each test gets it as it was.
"""

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from app import database
from app.errors import Failure
from app.sessions import lifecycle, requests
from app.sessions.lifecycle import PluginRan, Progressed
from app.sessions.session import Caller, Session
from app.sessions.store import Store
from app.settings import Equipment
from app.steps import provenance, publish
from app.web.sessions import shown
from tests.survival.invariants import (
    Expected,
    Log,
    Request,
    Watched,
    fingerprint,
    violations,
    violations_of_clients,
)
from tests.survival.invariants_disk import contents

CALLER = Caller(principal="local", trace_id="trace")
EQUIPMENT = Equipment(id="EQ", label="Confocal", local_root="/data", nas_root="/nas")
RUN_AT = "2026-04-17T14-32-05"
NOBODY = "01a20a12-0000-7000-8000-000000000000"


class Lab(NamedTuple):
    """A stopped service's store and data root; `ids` of its sessions, by what became of them."""

    store: Path
    root: Path
    log: Log
    expected: Expected
    ids: dict[str, str]

    def wrong(self, *, live: bool = False) -> list[str]:
        return violations(self.store, self.log, self.expected, live=live)

    def row(self, who: str, column: str) -> Any:
        with closing(sqlite3.connect(self.store)) as db:
            found = db.execute(f"SELECT {column} FROM sessions WHERE session_id = ?", (self.ids[who],))
            return found.fetchone()[0]

    def destination(self, who: str) -> Path:
        return Path(self.row(who, "destination"))

    def staging(self, who: str) -> Path:
        return publish.session_folder(self.root, self.ids[who])

    def frames(self, who: str) -> list[bytes]:
        with closing(sqlite3.connect(self.store)) as db:
            rows = db.execute("SELECT frame FROM events WHERE session_id = ? ORDER BY seq", (self.ids[who],))
            return [frame.encode() for (frame,) in rows]


class Making:
    """Makes a laboratory: every session as a service would have left it, every request as it was answered."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "data"
        self.root.mkdir(parents=True, exist_ok=True)
        publish.found_root(self.root)
        self.store = Store(f"sqlite:///{folder / 'store'}", on_broken=lambda broken: None)
        self.log = Log()
        self.ids: dict[str, str] = {}

    def note(self, path: str, body: dict[str, Any], session: Session, status: int = 200, **more: Any) -> None:
        answer = msgspec.to_builtins(shown(session, self.store.epoch))
        self.log.note(Request(method="POST", path=path, body=body, status=status, answer=answer, **more))

    def refused(self, path: str, status: int, code: str, key: str | None = None, **details: str) -> None:
        answer = {"error": {"code": code, "message": "No.", "trace_id": "t", "details": details}}
        self.log.note(Request(method="POST", path=path, body={}, key=key, status=status, answer=answer))

    async def begun(
        self,
        who: str,
        body: dict[str, Any],
        *plugins: str,
        key: str | None = None,
        retry_of: str | None = None,
    ) -> Session:
        """One that the gate has let pass."""
        session = await self.created(who, body, key, retry_of)
        project = body.get("project_short_id", "PROJ-1")
        below = {None: "", "experimental": f"Run_{RUN_AT}", "test": f"TestRuns/TestRun_{RUN_AT}"}
        destination = self.root / "EQ" / project / below[body.get("run_kind")]
        accepted = lifecycle.Accepted(
            destination=destination,
            destination_key=str(destination),
            project_key=f"{destination}, its project",
            project_short_id=project,
            local_root=self.root,
            pinned=msgspec.Raw(msgspec.json.encode({"plugins": [{"name": name} for name in plugins]})),
        )
        session = await self.store.record(session, accepted)
        path = f"/sessions/{retry_of}/retry" if retry_of else "/sessions"
        self.note(path, {"changes": {"label": body["label"]}} if retry_of else body, session, 201, key=key)
        return session

    async def created(
        self, who: str, body: dict[str, Any], key: str | None = None, retry_of: str | None = None
    ) -> Session:
        shaped = requests.decode(json.dumps(body))
        session, _ = await self.store.create(shaped, CALLER, idempotency_key=key, retry_of=retry_of)
        self.ids[who] = session.session_id
        return session

    async def rendered(self, session: Session) -> Session:
        folder = publish.session_folder(self.root, session.session_id)
        tree = folder / "0badcafe" / "tree"
        tree.mkdir(parents=True)
        (folder / "template").mkdir()
        (tree / "notes.txt").write_text("Taken.\n")
        return await self.store.record(
            session, lifecycle.Rendered(tree=tree, manifest="0" * 64, rendered=(), answers={}, log=())
        )

    async def through(self, session: Session, ordinal: int, plugin: str, *, begin: bool = True) -> Session:
        ran = PluginRan(ordinal=ordinal, total=2, plugin=plugin, version="1.0", status="success")
        begun = (Progressed(current=ordinal - 1, total=2, plugin=plugin),) if begin else ()
        return await self.store.record(session, *begun, ran)

    async def asking(self, session: Session, name: str) -> Session:
        field = msgspec.Raw(
            json.dumps({"id": name, "label": name, "type": "string", "required": True}).encode()
        )
        asked = lifecycle.Asked(
            prompt_id=f"{session.project_short_id} {name}",
            plugin="asks",
            file="notes.txt",
            reason="?",
            fields=(field,),
        )
        begun = Progressed(current=1, total=2, plugin="asks")
        return await self.store.record(session, begun, asked)

    async def answered(self, session: Session, name: str) -> Session:
        body: dict[str, Any] = {"operator": "jlee", "extra_inputs": {name: "2 mg"}}
        body["prompt_id"] = f"{session.project_short_id} {name}"
        shaped = msgspec.convert(body, type=requests.ResumeBody)
        session = await self.store.answer(session.session_id, shaped, CALLER)
        self.note(f"/sessions/{session.session_id}/resume", body, session)
        return session

    async def queued(self, session: Session, *findings: dict[str, object]) -> Session:
        session = await self.store.record(session, lifecycle.Transformed())
        assert session.tree is not None
        provenance.write(
            session.tree, await self._facts(session, "blocked_by_validation" if findings else "pending")
        )
        checked = lifecycle.Checked(findings=findings)
        return await self.store.record(session, lifecycle.Documented(), checked)

    async def done(self, session: Session) -> Session:
        assert session.tree is not None and session.destination is not None
        session.destination.parent.mkdir(parents=True, exist_ok=True)
        session.tree.rename(session.destination)
        provenance.write_equipment(self.root / "EQ", EQUIPMENT, datetime.now(UTC))
        publish.discard(publish.session_folder(self.root, session.session_id))
        result: dict[str, object] = {
            "path": str(session.destination),
            "sync_status": "blocked_by_validation" if session.findings else "pending",
            "blocked": bool(session.findings),
            "findings": session.findings,
        }
        return await self.store.record(session, lifecycle.Published(result=result, nas_path=""))

    async def _facts(self, session: Session, status: str) -> provenance.Facts:
        runs = await self.store.plugin_runs(session.session_id)
        shown = ("plugin", "version", "status", "files_affected")
        inputs = [
            {
                "plugin": prompt.plugin,
                "file": prompt.file,
                "field": name,
                "value": value,
                "operator": prompt.operator,
            }
            for prompt in await self.store.answered(session.session_id)
            for name, value in prompt.answer.items()
        ]
        assert session.destination is not None and session.project_short_id is not None
        return provenance.Facts(
            session_id=session.session_id,
            kind=session.kind,
            run_kind=session.run_kind,
            created_at=datetime.fromisoformat(session.created_at),
            created_by="lab",
            label=session.label,
            operator=session.operator,
            objective="See",
            equipment=EQUIPMENT,
            project_short_id=session.project_short_id,
            lims_project={},
            template_name="t",
            template_version="1",
            template_path="/t",
            template_run_scope=None,
            variables={},
            template_fields={},
            config_fields={},
            custom_fields=(),
            destination=session.destination,
            nas_path="",
            sync_status=status,
            plugins_applied=[{name: getattr(run, name) for name in shown} for run in runs],
            plugin_inputs=inputs,
        )

    async def failed(self, session: Session, code: str) -> Session:
        kept = None
        if session.tree is not None:
            kept = publish.keep(session.tree.parents[1], session.tree)
        details: dict[str, object] | None = {"partial_path": str(kept)} if kept else None
        failure = Failure(code=code, message="It broke.", details=details)
        return await self.store.record(session, lifecycle.Failed(error=failure))

    async def aborted(self, session: Session, *, discard: bool) -> Session:
        body = {"discard_files": discard, "operator": "jlee"}
        shaped = msgspec.convert(body, type=requests.CancelBody)
        session = await self.store.request_cancel(session.session_id, shaped, CALLER)
        assert session.tree is not None
        folder = session.tree.parents[1]
        if discard:
            publish.discard(folder)
        kept = None if discard else str(publish.keep(folder, session.tree))
        error = Failure(code="cancelled", message="Cancelled.", details={"partial_path": kept})
        session = await self.store.record(session, lifecycle.Cancelled(error=error))
        self.note(f"/sessions/{session.session_id}/cancel", body, session)
        return session


def body(label: str, project: str | None = None, run_kind: str = "experimental") -> dict[str, Any]:
    told: dict[str, Any] = {
        "equipment_id": "EQ",
        "template_path": "t",
        "label": label,
        "operator": "asmith",
        "objective": "See",
    }
    if project is None:
        told["lims_project"] = {"short_id": "PROJ-1"}
        return {"kind": "project", **told}
    return {"kind": "run", **told, "project_short_id": project, "run_kind": run_kind}


async def made(folder: Path) -> Lab:
    making = Making(folder)
    await making.store.open()
    try:
        foreign = await _sessions(making)
        _refusals(making)
    finally:
        await making.store.close()
    outside = folder / "templates"
    outside.mkdir()
    (outside / "copier.yml").write_text("_exlab_type: run\n")
    eq = making.root / "EQ"
    places = (
        eq / "PROJ-1",
        eq / "PROJ-1" / f"Run_{RUN_AT}",
        eq / "PROJ-2" / "TestRuns" / f"TestRun_{RUN_AT}",
    )
    expected = Expected(
        local_root=making.root,
        complete={str(place): contents(place) for place in places},
        untouched={each: fingerprint(each) for each in (outside, foreign)},
        foreign=frozenset({str(foreign)}),
    )
    lab = Lab(folder / "store", making.root, making.log, expected, making.ids)
    _viewers(lab, making.store.epoch)
    return lab


async def _sessions(making: Making) -> Path:
    """One of each sort; returns the folder that somebody else has made."""
    making.log.note(Request(method="POST", path="/sessions", body=body("Pilot"), key="k1"))
    project = await making.begun("project", body("Pilot"), key="k1")
    project = await making.done(await making.queued(await making.rendered(project)))
    making.note("/sessions", body("Pilot"), project, 201, key="k1")

    asked = await making.rendered(await making.begun("asked", body("Asked", "PROJ-1"), "stamps", "asks"))
    asked = await making.through(asked, 1, "stamps")
    for name in ("dose", "batch"):
        asked = await making.answered(await making.asking(asked, name), name)
    await making.done(await making.queued(await making.through(asked, 2, "asks")))

    test = await making.rendered(await making.begun("test", body("Test", "PROJ-2", "test")))
    await making.done(await making.queued(test, {"message": "A mark."}))

    waiting = await making.rendered(await making.begun("waiting", body("Waits", "PROJ-2"), "stamps", "asks"))
    waiting = await making.through(waiting, 1, "stamps")
    waiting = await making.asking(waiting, "dose")
    answer = msgspec.to_builtins(shown(waiting, making.store.epoch))
    listed = {"sessions": [answer], "next": None}
    making.log.note(Request(method="GET", path="/sessions?limit=1", status=200, answer=listed))

    failed = await making.rendered(await making.begun("failed", body("Fails", "PROJ-3")))
    await making.failed(failed, "plugin_failed")
    retried = await making.begun("again", body("Again", "PROJ-3"), retry_of=failed.session_id)
    await making.done(await making.queued(await making.rendered(retried)))

    refused = await making.failed(await making.created("refused", body("", "PROJ-3")), "field_too_long")
    making.note("/sessions", body("", "PROJ-3"), refused, 201)

    for who, discard in (("discarded", True), ("kept", False)):
        session = await making.rendered(await making.begun(who, body(who, f"PROJ-{4 + discard}")))
        await making.aborted(session, discard=discard)

    collided = await making.queued(
        await making.rendered(await making.begun("collided", body("Collides", "PROJ-6")))
    )
    assert collided.destination is not None
    collided.destination.mkdir(parents=True)
    (collided.destination / "mine.txt").write_text("Mine.\n")
    await making.failed(collided, "destination_taken")
    return collided.destination


def _refusals(making: Making) -> None:
    ids = making.ids
    making.refused(f"/sessions/{NOBODY}/cancel", 404, "session_not_found")
    making.refused(f"/sessions/{ids['project']}/cancel", 409, "session_already_completed")
    making.refused(f"/sessions/{ids['asked']}/cancel", 409, "too_late_to_cancel")
    making.refused(f"/sessions/{ids['asked']}/resume", 409, "prompt_not_open", prompt_id="PROJ-1 dose")
    making.refused(f"/sessions/{ids['asked']}/retry", 409, "session_not_retryable", state="done")
    making.refused("/sessions", 422, "idempotency_key_reused", key="k1")
    making.refused("/sessions", 503, "store_unavailable")


def _viewers(lab: Lab, epoch: str) -> None:
    asked, waiting = lab.frames("asked"), lab.frames("waiting")
    told = {"events": [json.loads(frame) for frame in asked[3:5]], "head_seq": len(asked), "epoch": epoch}
    path = f"/sessions/{lab.ids['asked']}/events"
    lab.log.note(Request(method="GET", path=f"{path}?after=3&limit=2", status=200, answer=told))
    hello = json.dumps({"kind": "hello", "epoch": epoch, "head_seq": len(waiting), "after": 0}).encode()
    caught_up = json.dumps({"kind": "caught_up", "seq": len(waiting)}).encode()
    unasked = [frame for frame in asked if b'"input_required"' not in frame]
    saw(lab, "asked", asked[:4], None, 0)
    saw(lab, "asked", asked[4:], 1000, 4)
    saw(lab, "asked", unasked, 1000, None)
    saw(lab, "asked", [], 1000, len(asked))
    saw(lab, "asked", [], 4409, len(asked) + 1)
    saw(lab, "waiting", [hello, *waiting, caught_up], 1012, 0)
    saw(lab, "waiting", waiting, None, None)


def saw(lab: Lab, who: str, frames: Sequence[bytes], code: int | None, after: int | None = 0) -> None:
    watched = Watched(session_id=lab.ids[who], after=after, frames=tuple(frames), close_code=code)
    lab.log.saw(watched)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = asyncio.run(made(tmp_path_factory.mktemp("lab") / "lab"))
    shutil.copytree(lab.store.parent, lab.store.parent.with_name("good"))
    with pytest.MonkeyPatch.context() as patched:
        # Each examination compares with a new store, and making one takes a tenth of a second.
        empty = tmp_path_factory.mktemp("empty") / "store"
        really_prepare = database.prepare
        opened = really_prepare(empty)

        def prepare(path: Path) -> database.Opened:
            if path.exists():
                return really_prepare(path)
            shutil.copyfile(empty, path)
            return opened

        patched.setattr(database, "prepare", prepare)
        yield lab


@pytest.fixture
def lab(good: Lab) -> Lab:
    shutil.rmtree(good.store.parent)
    shutil.copytree(good.store.parent.with_name("good"), good.store.parent)
    log = Log()
    log.requests, log.watched = [*good.log.requests], [*good.log.watched]
    return good._replace(log=log)


Plant = Callable[[Lab], object]


def sql(*statements: str) -> Plant:
    """Change the store as a hand does that takes its guards away, and puts them back; sessions by their names."""

    def plant(lab: Lab) -> None:
        with closing(sqlite3.connect(lab.store)) as db:
            db.execute("PRAGMA ignore_check_constraints=ON")
            db.execute("PRAGMA synchronous=OFF")
            guards = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
            for name, _ in guards:
                db.execute(f"DROP TRIGGER {name}")
            for statement in statements:
                assert db.execute(statement, lab.ids).rowcount, statement
            for _, text in guards:
                db.execute(text)
            db.commit()

    return plant


def event(who: str, which: str, change: str) -> Plant:
    """Change the event of a session that `which` tells apart."""
    return sql(f"UPDATE events SET {change} WHERE session_id = :{who} AND {which}")


def row(who: str, change: str) -> Plant:
    return sql(f"UPDATE sessions SET {change} WHERE session_id = :{who}")


def frame(who: str, which: str, **changes: object) -> Plant:
    """Change what the frame says, and the columns with it."""
    told = ", ".join(f"'$.{name}', json('{json.dumps(value)}')" for name, value in changes.items())
    columns = "".join(f", {name} = '{changes[name]}'" for name in ("kind", "at") if name in changes)
    return event(who, which, f"frame = json_set(frame, {told}){columns}")


def asks(verb: str, who: str, status: int, answer: object, **sent: Any) -> Plant:
    """One more request, and what it was answered."""

    def plant(lab: Lab) -> None:
        path = "/sessions" + (f"/{lab.ids[who]}" if who else "") + (f"/{verb}" if verb else "")
        lab.log.note(Request(method="POST", path=path, body=sent or None, status=status, answer=answer))

    return plant


def refuses(verb: str, who: str, status: int, code: str, **details: str) -> Plant:
    error = {"code": code, "message": "No.", "trace_id": "t", "details": details}
    return asks(verb, who, status, {"error": error})


def answers(label: str, /, **changes: object) -> Plant:
    """Another answer to the request that opened the session with this label."""

    def plant(lab: Lab) -> None:
        index = opening(lab, label)
        request = lab.log.requests[index]
        lab.log.requests[index] = msgspec.structs.replace(request, answer=request.answer | changes)

    return plant


def opening(lab: Lab, label: str) -> int:
    return next(
        index
        for index, each in enumerate(lab.log.requests)
        if isinstance(each.answer, dict) and each.answer.get("label") == label and each.status == 201
    )


def forgets(verb: str) -> Plant:
    def plant(lab: Lab) -> None:
        lab.log.requests[:] = [each for each in lab.log.requests if not each.path.endswith(verb)]

    return plant


def again(label: str, /, **changes: Any) -> Plant:
    """The request that opened a session once more, in another way."""

    def plant(lab: Lab) -> None:
        lab.log.note(msgspec.structs.replace(lab.log.requests[opening(lab, label)], **changes))

    return plant


def sends(
    who: str, pick: Callable[[list[bytes]], list[bytes]], code: int | None, after: int | None = 0
) -> Plant:
    return lambda lab: saw(lab, who, pick(lab.frames(who)), code, after)


def marker(**told: object) -> Plant:
    return lambda lab: saw(lab, "waiting", [json.dumps(told).encode()], None, 0)


def file(who: str, name: str, text: str | None = "") -> Plant:
    """A file in the folder of a session, or none of that name."""

    def plant(lab: Lab) -> None:
        path = lab.destination(who) / name
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return plant


def creation(who: str, **changes: object) -> Plant:
    def plant(lab: Lab) -> None:
        path = lab.destination(who) / ".exlab-wizard" / "creation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        told = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(told | {name: lab.ids.get(str(to), to) for name, to in changes.items()}))

    return plant


def folder(*parts: str) -> Plant:
    """One more folder below the data root; sessions by their names."""
    return lambda lab: lab.root.joinpath(*(lab.ids.get(each, each) for each in parts)).mkdir(parents=True)


def both(*plants: Plant) -> Plant:
    def plant(lab: Lab) -> None:
        for each in plants:
            each(lab)

    return plant


def _double(lab: Lab) -> None:
    request = lab.log.requests[opening(lab, "Waits")]
    answer = request.answer | {"session_id": lab.ids["asked"]}
    lab.log.note(msgspec.structs.replace(request, key="k1", answer=answer))


def _page(lab: Lab) -> None:
    index = next(i for i, each in enumerate(lab.log.requests) if "after=3" in each.path)
    request = lab.log.requests[index]
    lab.log.requests[index] = msgspec.structs.replace(
        request, path=request.path.replace("after=3", "after=2")
    )


def _ruin(lab: Lab) -> None:
    lab.store.write_bytes(b"\xff" * 8192)


_FIRST_ANSWER = "kind = 'input_received' AND json_extract(frame, '$.prompt_id') LIKE '% dose'"
_FIRST_QUESTION = _FIRST_ANSWER.replace("received", "required")
_AFTER_ANSWER = (
    "seq = (SELECT min(seq) + 1 FROM events WHERE session_id = :asked AND kind = 'input_received')"
)
_LATER = "'2030-01-01T00:00:00.000Z'"
_END = "INSERT INTO events (session_id, seq, kind, at, frame) SELECT session_id, seq + 1, {0}, at, json_set(frame, '$.seq', seq + 1, '$.kind', {0}) FROM events WHERE session_id = :project AND kind = 'done'"  # noqa: E501
_PLACE = ("EQ", "PROJ-2", "Run_2026-04-18T14-32-05")

PLANTED: dict[str, tuple[Plant, str]] = {
    # The histories
    "positions out of order": (
        sql(
            "UPDATE events SET position = -position WHERE session_id = :project AND seq = 3",
        ),
        "was committed before event 2",
    ),
    "a missing event": (
        sql("DELETE FROM events WHERE session_id = :asked AND seq = 3"),
        "its events are not 1 to",
    ),
    "another first event": (
        frame("asked", "seq = 1", phase="rendering_template"),
        "its first event is not the phase",
    ),
    "a phase that is left out": (
        frame(
            "project", "json_extract(frame, '$.phase') = 'writing_cache'", phase="validating_post_creation"
        ),
        "from plugin_pass to post_validate, where there is no edge",
    ),
    "a phase that there is not": (
        frame("asked", "seq = 2", phase="pondering"),
        "to no state, where there is no edge",
    ),
    "a phase twice": (frame("asked", "seq = 3", phase="rendering_template"), "from rendering to rendering"),
    "an event after the end": (sql(_END.format("'recovered'")), "comes after the end"),
    "two ends": (sql(_END.format("'done'")), "these are terminal: ["),
    "no end": (
        sql("DELETE FROM events WHERE session_id = :failed AND kind = 'failed'"),
        "these are terminal: []",
    ),
    "an assigned state": (row("waiting", "state = 'cache_write'"), "its row says state cache_write"),
    "an assigned head": (row("asked", "head_seq = head_seq + 1"), "its row says head_seq"),
    "another error": (row("failed", "error = json_set(error, '$.code', 'x')"), "its row says error"),
    "another result": (row("project", "result = json_set(result, '$.x', 1)"), "its row says result"),
    "another time of ending": (row("project", f"ended_at = {_LATER}"), "its row says ended_at"),
    "an end that is blocked": (row("project", """blocked_on = '{"code":"x"}'"""), "and still blocked on"),
    "a frame too large": (frame("asked", "seq = 4", file="x" * 300_000), "more than 256 KiB"),
    "a frame with another seq": (frame("asked", "seq = 4", seq=9), "event 4 has seq 4, its frame 9"),
    "a frame of another kind": (
        event("asked", "seq = 4", "kind = 'warning'"),
        "has kind warning, its frame progress",
    ),
    "a frame of another time": (event("asked", "seq = 4", f"at = {_LATER}"), "its frame 20"),
    "a time without a zone": (frame("asked", "seq = 4", at="2026-04-17T14:32:05.000"), "has no time in UTC"),
    "a frame that lacks a word": (
        event("asked", "seq = 4", "frame = json_remove(frame, '$.total')"),
        "lacks ['total']",
    ),
    "a frame that is no JSON": (event("asked", "seq = 4", "frame = '{'"), "has seq 4, its frame None"),
    "a frame with an answer in it": (
        frame("asked", _FIRST_ANSWER, values={"dose": 1}),
        "tells more of an answer",
    ),
    "progress of another phase": (
        frame("asked", "seq = 4", phase="writing_cache"),
        "speaks of writing_cache",
    ),
    "an answer that leads to no phase": (
        frame("asked", _AFTER_ANSWER, kind="recovered", state="plugin_pass"),
        "comes where the answer leads to a phase",
    ),
    "a phase instead of an answer": (
        frame("asked", _FIRST_ANSWER, kind="recovered", state="input_required"),
        "(phase) leads from input_required to plugin_pass",
    ),
    "an answer that is the last event": (
        sql("DELETE FROM events WHERE session_id = :asked AND seq > 8"),
        "its history ends with an answer",
    ),
    "events of nobody": (
        sql(f"UPDATE events SET session_id = '{NOBODY}' WHERE session_id = :asked AND kind = 'done'"),
        "1 rows of events name it",
    ),
    # What comes with them
    "a copy that is not queued": (sql("DELETE FROM copy_jobs WHERE session_id = :project"), "are not one of"),
    "a copy of another status": (row("test", "sync_status = 'pending'"), "its copy is pending"),
    "a copy of what failed": (
        row("failed", "sync_status = 'pending'"),
        "a copy to the NAS is queued all the same",
    ),
    "a result that says too little": (
        both(
            row("project", "result = json_remove(result, '$.findings')"),
            event("project", "kind = 'done'", "frame = json_remove(frame, '$.result.findings')"),
        ),
        "its result lacks ['findings']",
    ),
    "an abort without a cancel": (
        row("kept", "cancel_requested_at = NULL, cancel = NULL"),
        "no cancel was recorded",
    ),
    "a cancel that came to nothing": (
        row("project", f"cancel_requested_at = {_LATER}, cancel = '{{}}'"),
        "its cancel was recorded, but it is done",
    ),
    "a cancel that is not in the audit": (
        sql("DELETE FROM audit WHERE session_id = :kept AND command = 'cancel'"),
        "but the audit has 0",
    ),
    "a cancel of another sort in the audit": (
        sql("UPDATE audit SET operator = 'x' WHERE session_id = :kept AND command = 'cancel'"),
        "the audit says",
    ),
    "a first cancel that joined": (
        sql(
            "UPDATE audit SET details = json_set(details, '$.joined', json('true')) WHERE command = 'cancel'"
        ),
        "not all cancels but the first",
    ),
    "an opening that is not in the audit": (
        sql("DELETE FROM audit WHERE session_id = :asked AND command = 'create'"),
        "the audit of its opening",
    ),
    "a retry that is audited as new": (
        sql("UPDATE audit SET command = 'create' WHERE session_id = :again"),
        "the audit of its opening",
    ),
    "an answer that is not in the audit": (
        sql("DELETE FROM audit WHERE session_id = :asked AND command = 'resume'"),
        "the answer to PROJ-1 dose by jlee",
    ),
    "an answer that is only in the audit": (
        sql("UPDATE audit SET details = '{\"prompt_id\":\"q\"}' WHERE command = 'resume'"),
        "the audit has an answer to q by jlee",
    ),
    # Questions and plugins
    "a prompt of two sessions": (
        frame("waiting", _FIRST_QUESTION, prompt_id="PROJ-1 dose"),
        "was asked 2 times",
    ),
    "a prompt that is answered twice": (
        frame("asked", "kind = 'input_received'", prompt_id="PROJ-1 dose"),
        "answers PROJ-1 dose, which is not open",
    ),
    "two open prompts": (
        frame("asked", _FIRST_ANSWER, kind="recovered", state="input_required"),
        "asks PROJ-1 batch while PROJ-1 dose is open",
    ),
    "a question that is asked again": (
        event(
            "asked",
            "kind = 'input_required'",
            "frame = json_set(frame, '$.fields', json('[{\"id\":\"dose\"}]'))",
        ),
        "asks asks's question again, which was answered",
    ),
    "an answer that is lost": (
        sql("UPDATE prompts SET status = 'withdrawn' WHERE prompt_id = 'PROJ-1 dose'"),
        "the prompt PROJ-1 dose is withdrawn; by its events it is answered",
    ),
    "a prompt that is lost": (
        sql("DELETE FROM prompts WHERE session_id = :waiting"),
        "dose is missing; by its events",
    ),
    "a prompt that asks something else": (
        sql("UPDATE prompts SET fields = '[]' WHERE session_id = :waiting"),
        "is not the question that its event asks",
    ),
    "an answer of somebody else": (
        sql("UPDATE prompts SET operator = 'x' WHERE prompt_id = 'PROJ-1 dose'"),
        "was not answered when, or by whom",
    ),
    "an answer that is not kept": (
        sql("UPDATE prompts SET answer = NULL WHERE prompt_id = 'PROJ-1 dose'"),
        "its answer is not kept",
    ),
    "a prompt that is open for ever": (
        sql("UPDATE prompts SET status = 'open' WHERE prompt_id = 'PROJ-1 dose'"),
        "it is done with these prompts open: ['PROJ-1 dose']",
    ),
    "a gap between plugins": (
        sql("UPDATE plugin_runs SET ordinal = 3 WHERE session_id = :asked AND ordinal = 2"),
        "its plugins are not counted from 1: [1, 3]",
    ),
    "a plugin that ran twice": (
        sql("UPDATE plugin_runs SET plugin = 'stamps' WHERE session_id = :asked"),
        "the plugin stamps ran again after its success",
    ),
    "a plugin whose end is not told": (
        frame("asked", "seq = 5", plugin="other"),
        "the end of the plugin stamps, the 1., is told by these events: []",
    ),
    "a plugin that works after its end": (
        frame("asked", "seq = 6", plugin="stamps", current=0),
        "is of the plugin stamps, which was through with event 5",
    ),
    "a plugin that never ran": (
        sql("DELETE FROM plugin_runs WHERE session_id = :asked AND ordinal = 2"),
        "and through are ['stamps']",
    ),
    "a destination that two hold": (
        both(
            sql("UPDATE sessions SET destination_key = NULL WHERE session_id = :waiting"),
            lambda lab: (
                sqlite3.connect(lab.store, isolation_level=None)
                .execute("DROP INDEX sessions_destination")
                .close()
            ),
            row("waiting", "destination_key = 'k'"),
            row("kept", "destination_key = 'k', state = 'plugin_pass'"),
        ),
        "the destination k is held by 2 live sessions",
    ),
    "a cancel that is not finished": (
        row("waiting", f"cancel_requested_at = {_LATER}, cancel = '{{}}'"),
        "it has not come to rest: input_required",
    ),
    "a session that nobody drives": (
        both(
            sql("DELETE FROM events WHERE session_id = :project AND kind = 'done'"),
            row("project", "state = 'sync_queued'"),
        ),
        "it has not come to rest: sync_queued",
    ),
    # What was answered
    "a key that is lost": (
        sql("DELETE FROM idempotency_keys"),
        "the key k1 was answered with it, and is not its own",
    ),
    "a key without a request": (
        lambda lab: lab.log.requests.__setitem__(
            slice(None), [each for each in lab.log.requests if each.key is None]
        ),
        "no request that was taken asked for it with the key k1",
    ),
    "a key of two sessions": (
        sql(
            "INSERT INTO idempotency_keys (principal, key, body_digest, session_id, created_at)"
            " SELECT 'x', key, body_digest, :asked, created_at FROM idempotency_keys"
        ),
        "the idempotency key k1 belongs to 2 sessions",
    ),
    "a key that was answered with two sessions": (
        _double,
        "the idempotency key k1 was answered with several sessions",
    ),
    "a session for two requests": (again("Waits"), "it was the answer to 2 requests without a key"),
    "a session that nobody asked for": (
        lambda lab: lab.log.requests.pop(opening(lab, "Waits")),
        "no request asked for it; 0 did without a key",
    ),
    "a retry that nobody asked for": (forgets("/retry"), "no request asked for it; 0 did without a key"),
    "a session for a request that was refused": (
        lambda lab: lab.log.requests.__setitem__(
            opening(lab, "Waits"),
            Request(
                method="POST",
                path="/sessions",
                body=body("Waits", "PROJ-2"),
                status=503,
                answer={"error": {"code": "store_unavailable", "message": "No.", "trace_id": "t"}},
            ),
        ),
        "no request asked for it; 0 did without a key",
    ),
    "a session for another request": (
        again("Asked", body=body("Other", "PROJ-1")),
        "a request for something else",
    ),
    "a session that is lost": (
        answers("Waits", session_id=NOBODY),
        f"the session {NOBODY}, which the store does not",
    ),
    "events that are lost": (answers("Waits", head_seq=99), "was answered with head_seq 99"),
    "a state that never was": (
        answers("Waits", state="plugin_pass"),
        "was plugin_pass at event 2, where it was",
    ),
    "another epoch": (answers("Waits", epoch="e"), "was answered with the epoch e"),
    "another phase": (answers("Waits", current_phase="done"), "was answered with the phase done"),
    "a prompt that was not open": (
        answers("Waits", pending_input={"prompt_id": "q"}),
        "with the prompt q of",
    ),
    "another label": (answers("Waits", label="Other"), "was answered that label of"),
    "another destination": (answers("Waits", destination="/x"), "was answered that destination of"),
    "an end that is another one now": (answers("", error={"code": "x"}), "was answered that error of"),
    "an answer that was taken and lost": (
        asks("resume", "waiting", 200, None, prompt_id="PROJ-2 dose"),
        "no event says that the prompt PROJ-2 dose was answered",
    ),
    "two answers to one prompt": (
        asks("resume", "asked", 200, None, prompt_id="PROJ-1 dose", extra_inputs={"dose": "9 kg"}),
        "the answer in the store is another one",
    ),
    "an answer of nobody": (forgets("/resume"), "was answered by jlee, and nobody's request said so"),
    "a cancel of nobody": (forgets("/cancel"), "its cancel was recorded, and no request that was taken"),
    "a cancel that was taken and lost": (
        asks("cancel", "waiting", 200, {"state": "aborted"}, operator="jlee"),
        "the session is input_required, not aborted",
    ),
    "a cancel by somebody else": (asks("cancel", "kept", 200, {"state": "aborted"}), "has no cancel by None"),
    "a bug": (refuses("", "", 500, "internal_error"), "was answered 500, which is a bug"),
    "an error without a code": (
        asks("", "", 422, {"detail": "x"}),
        "without a code, a message and a trace_id",
    ),
    "a code with another status": (refuses("", "", 500, "input_invalid"), "was answered 500 with the code"),
    "a session that is said not to be": (
        refuses("", "asked", 404, "session_not_found"),
        "there is no such session",
    ),
    "a session that is said to be over": (
        refuses("resume", "waiting", 409, "session_already_completed"),
        "was told that the session is terminal, and it is input_required",
    ),
    "a cancel that is said to be late": (
        refuses("cancel", "waiting", 409, "too_late_to_cancel"),
        "the session never came to sync_queued",
    ),
    "a state that is said to be": (
        refuses("retry", "failed", 409, "session_not_retryable", state="done"),
        "was told that the session is done, and it never was",
    ),
    "a prompt that is said to be open": (
        refuses("resume", "asked", 409, "prompt_not_open", prompt_id="q"),
        "was told that q is open, which the session never asked",
    ),
    "a key that is said to be used": (
        refuses("", "", 422, "idempotency_key_reused"),
        "was told that the key None was used, and the store does not have it",
    ),
    "a key whose body is said to be another": (
        again(
            "Pilot",
            status=422,
            answer={"error": {"code": "idempotency_key_reused", "message": "", "trace_id": ""}},
        ),
        "came with another body, and it came with the same",
    ),
    "a page of other events": (_page, "as event 3, which in the store is"),
    "a page of nobody's events": (
        asks(f"{NOBODY}/events", "", 200, {"events": []}),
        "of a session that the store",
    ),
    # What was sent
    "an event that was left out": (
        sends("asked", lambda sent: [sent[0], *sent[2:]], 1000),
        "was sent event 3 after event 1",
    ),
    "an event that was sent twice": (
        sends("asked", lambda sent: [sent[0], *sent], 1000),
        "was sent event 1 after event 1",
    ),
    "events in disorder": (
        sends("asked", lambda sent: [sent[1], sent[0]], None),
        "was sent event 2 after event 0",
    ),
    "a cursor that was not heeded": (
        sends("asked", lambda sent: sent, 1000, 4),
        "was sent event 1 after event 4",
    ),
    "other bytes": (sends("asked", lambda sent: [sent[0] + b" "], None), "was sent as event 1"),
    "an event that is not stored": (
        sends("asked", lambda sent: [*sent, b'{"kind":"recovered","seq":99}'], None),
        "was sent event 99, which the store does not have",
    ),
    "an open question that was left out": (
        sends("waiting", lambda sent: [*sent[:-1], b'{"kind":"recovered","seq":9}'], None, None),
        "was sent event 9 after event",
    ),
    "a stream that ended early": (sends("asked", lambda sent: sent[:3], 1000), "which is not the end"),
    "a stream that ended at once": (
        sends("asked", lambda sent: [], 1000),
        "was closed with 1000 without the end",
    ),
    "a stream of a session that is said not to be": (
        sends("asked", lambda sent: [], 4404),
        "no such session",
    ),
    "a cursor that is said to be malformed": (
        sends("asked", lambda sent: [], 4400),
        "its cursor is malformed",
    ),
    "a cursor that is said to be ahead": (
        sends("asked", lambda sent: [], 4409, 4),
        "ahead of the history, and it",
    ),
    "a hello of another epoch": (
        marker(kind="hello", epoch="e", head_seq=1, after=0),
        "was told the epoch e",
    ),
    "a hello after another cursor": (
        marker(kind="hello", epoch="e", head_seq=1, after=3),
        "it is served after 3",
    ),
    "a history that is said to be sent": (
        marker(kind="caught_up", seq=5),
        "was told that it is caught up at 5",
    ),
    "a marker at the wrong time": (marker(kind="caught_up", seq=0), "was sent these markers: ['caught_up']"),
    # The disk
    "a folder that is gone": (
        lambda lab: shutil.rmtree(lab.destination("asked")),
        "is done, and its destination",
    ),
    "a folder of another session": (creation("asked", session_id="test"), "does not name it"),
    "another schema": (creation("asked", schema_version="1.8"), "says schema_version 1.8"),
    "another sync status": (creation("test", sync_status="pending"), "says sync_status pending"),
    "another path": (creation("asked", paths={"local": "/x"}), "says paths /x"),
    "no readme": (file("again", "README.md", None), "has no README.md"),
    "no readme fields": (
        file("again", ".exlab-wizard/readme_fields.json", None),
        "has no .exlab-wizard/readme",
    ),
    "a file that is missing": (file("asked", "notes.txt", None), "it lacks ['notes.txt ("),
    "a file that is cut short": (file("asked", "notes.txt", "Ta"), "it lacks ['notes.txt ("),
    "provenance that is empty": (file("asked", "README.md", ""), "README.md (rubble)"),
    "a file too many": (file("asked", "data/more.txt"), "has besides ['data/more.txt ("),
    "a project with a file too many": (file("project", "more.txt"), "has besides ['more.txt ("),
    "a result elsewhere": (row("asked", "result = json_set(result, '$.path', '/x')"), "its result says /x"),
    "a destination at no place": (
        row("refused", "destination = local_root || '/x', local_root = '/data', destination = '/data/EQ/x'"),
        "is no place for experimental",
    ),
    "an equipment of which nothing is told": (
        lambda lab: (lab.root / "EQ" / ".exlab-wizard" / "equipment.json").unlink(),
        "does not tell of its equipment EQ",
    ),
    "plugins that are not told": (creation("asked", plugins_applied=[]), "tells of the plugins []"),
    "answers that are not told": (creation("asked", plugin_inputs=[]), "tells of the answers []"),
    "a folder of an aborted session": (
        creation("kept", session_id="kept"),
        "and its folder stands at its destination",
    ),
    "a destination of nobody": (file("kept", "notes.txt"), "stands what nobody made"),
    "a run of nobody": (folder(*_PLACE), "has no creation.json, and nobody else made it"),
    "a test run of nobody": (
        folder("EQ", "PROJ-1", "TestRuns", "x"),
        "has no creation.json, and nobody else",
    ),
    "a project of nobody": (folder("EQ", "PROJ-9"), "PROJ-9 has no creation.json, and nobody else made it"),
    "a run of an unknown session": (
        lambda lab: shutil.copytree(lab.destination("asked"), lab.root.joinpath(*_PLACE)),
        "names it as its maker, and it is done, or is to make another",
    ),
    "a file between folders": (
        lambda lab: (lab.root / "EQ" / "PROJ-2" / "claim").touch(),
        "claim lies where only folders are",
    ),
    "somebody's folder that was taken": (
        creation("collided", session_id="collided"),
        "which somebody else made, names it",
    ),
    "somebody's folder that was written into": (file("collided", "more.txt"), "is not what it was"),
    "a template that was changed": (
        lambda lab: (lab.store.parent / "templates" / "copier.yml").chmod(0o600),
        "templates was to be left alone",
    ),
    "a destination of two": (
        row("again", "destination = (SELECT destination FROM sessions WHERE session_id = :asked)"),
        "is owned by 2 sessions that are done",
    ),
    "a partial tree that is gone": (lambda lab: shutil.rmtree(lab.staging("failed")), "its partial tree"),
    "a partial tree elsewhere": (row("failed", "partial_path = '/x'"), "its row keeps a partial tree at /x"),
    "more than the partial tree": (
        folder(".exlab-sessions", "failed", "template"),
        "are besides it ['template']",
    ),
    "a partial tree that was to be discarded": (
        row("discarded", "partial_path = '/x'"),
        "it was cancelled to be discarded, and keeps /x",
    ),
    "a partial tree that was not kept": (
        row("failed", "partial_path = NULL, error = json_remove(error, '$.details')"),
        "nothing says where its partial tree is",
    ),
    "staging of a session that is done": (folder(".exlab-sessions", "project"), "it is done, and /"),
    "staging of nobody": (folder(".exlab-sessions", NOBODY), "belongs to no session"),
    "a snapshot of a session that is done": (
        folder(".exlab-sessions", "asked", "0badcafe", "tree"),
        "0badcafe/tree is still there",
    ),
    "a copy beside a tree that waits": (
        folder(".exlab-sessions", "waiting", "0badbeef"),
        "besides its tree ['0badbeef']",
    ),
    "a tree that waits and is gone": (
        lambda lab: shutil.rmtree(lab.staging("waiting") / "0badcafe" / "tree"),
        "and its tree",
    ),
    "something half removed": (
        folder(".exlab-sessions", "waiting", "0badbeef.gone"),
        "0badbeef.gone was left over",
    ),
    "something half written": (
        file("again", ".exlab-wizard/.creation.json.tmp"),
        ".creation.json.tmp was left over",
    ),
    "something made in passing": (folder("EQ", f".exlab-{NOBODY}"), f".exlab-{NOBODY} was left over"),
    "a file in the place of a folder": (
        both(
            lambda lab: shutil.rmtree(lab.staging("waiting")),
            lambda lab: lab.staging("waiting").touch(),
        ),
        "cannot be looked at: Not a directory",
    ),
    # The file
    "a file that is no store": (_ruin, "cannot be read"),
    "no file": (lambda lab: lab.store.unlink(), "cannot be read"),
}


def test_a_good_laboratory_is_in_order(lab: Lab) -> None:
    assert lab.wrong() == []
    assert lab.wrong(live=True) == []
    assert violations_of_clients(lab.store, lab.log) == []


@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_is_found(lab: Lab, name: str) -> None:
    plant, words = PLANTED[name]
    plant(lab)
    found = lab.wrong()
    assert any(words in each for each in found if not each.startswith("check: ")), found


def test_the_product_is_asked_besides(lab: Lab) -> None:
    with closing(sqlite3.connect(lab.store)) as db:
        db.execute("DROP TRIGGER events_constant")
    [found] = lab.wrong()
    assert found.startswith("check: ") and "events_constant" in found


def test_every_violation_names_what_it_is_about(lab: Lab) -> None:
    row("waiting", "state = 'cache_write'")(lab)
    assert any(each.startswith(f"session {lab.ids['waiting']}: its row says state") for each in lab.wrong())


async def test_what_a_running_service_works_on_is_no_violation(lab: Lab) -> None:
    await _taken_on(lab, published=True)
    (lab.staging("waiting") / "0badbeef.gone").mkdir()
    (lab.root / "EQ" / ".exlab-wizard" / ".equipment.json.tmp").touch()
    (lab.root / "EQ" / f".exlab-{NOBODY}").mkdir()
    folder(".exlab-sessions", "failed", "template")(lab)
    assert lab.wrong(live=True) == []
    still = " ".join(lab.wrong())
    for words in ("come to rest", "0badbeef.gone", ".json.tmp", f".exlab-{NOBODY}", "['template']"):
        assert words in still


async def test_what_a_running_service_must_not_do_is_found_while_it_runs(lab: Lab) -> None:
    await _taken_on(lab, published=False)
    lab.destination("waiting").mkdir()
    [found] = lab.wrong(live=True)
    assert f"{lab.destination('waiting')} has no creation.json" in found


async def _taken_on(lab: Lab, *, published: bool) -> None:
    """The waiting session is answered, and comes as far as to be published."""
    making = Making(lab.store.parent)
    making.log, making.ids = lab.log, lab.ids
    # It was copied to its place, which the store takes for a restored one; its epoch must stay.
    with closing(sqlite3.connect(lab.store)) as db:
        [epoch] = db.execute("SELECT value FROM store_facts WHERE name = 'epoch'").fetchone()
    database.write_note(lab.store, lab.store.stat().st_ino, epoch, 0)
    await making.store.open()
    session = await making.answered(await making.store.get(lab.ids["waiting"]), "dose")
    session = await making.queued(await making.through(session, 2, "asks"))
    await making.store.close()
    if published:
        assert session.tree is not None and session.destination is not None
        session.tree.rename(session.destination)


def test_what_passes_while_a_service_runs_is_no_violation(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(path: Path) -> str:
        monkeypatch.undo()
        return "something else"

    monkeypatch.setattr("tests.survival.invariants.fingerprint", passes)
    assert lab.wrong(live=True) == []
    monkeypatch.setattr("tests.survival.invariants.fingerprint", passes)
    assert len(lab.wrong()) == 1


def test_the_part_of_the_clients_needs_no_data_root_and_no_whole_log(lab: Lab) -> None:
    shutil.rmtree(lab.root)
    lab.log.requests.clear()
    assert violations_of_clients(lab.store, lab.log) == []
    lab.log.saw(Watched(session_id=lab.ids["asked"], after=0, frames=(), close_code=4404))
    [found] = violations_of_clients(lab.store, lab.log)
    assert lab.ids["asked"] in found
    lab.store.unlink()
    [found] = violations_of_clients(lab.store, lab.log)
    assert "cannot be read" in found


def test_a_fingerprint_tells_names_kinds_modes_contents_and_targets(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    told = [fingerprint(tree)]
    tree.mkdir()
    file, link = tree / "a", tree / "l"

    def exchange() -> None:
        link.unlink()
        link.mkdir()

    steps: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: file.write_text("1"),
        lambda: file.write_text("2"),
        lambda: file.chmod(0o600),
        lambda: file.rename(tree / "b"),
        lambda: link.symlink_to("b"),
        lambda: (tree / "m").symlink_to("c"),
        lambda: (tree / "m").replace(link),
        exchange,
    )
    for step in steps:
        step()
        told.append(fingerprint(tree))
        assert fingerprint(tree) == told[-1]
    assert len(set(told)) == len(told)
