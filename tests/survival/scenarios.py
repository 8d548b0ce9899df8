"""What sessions go through when things go wrong: the ways that a session can take, and the people who accompany it.

A scenario says what is asked for, what its operator does about each state that it shows, and how it must end.
Everything an operator does may be done again after a crash, with the same idempotency key and the same prompt id,
as a frontend does it. What was asked and answered, and what was watched, goes into the log of the laboratory.
"""

import itertools
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import msgspec
import websockets.exceptions
import websockets.sync.client

from app import database
from app.demo import laboratory
from tests.service import PATIENCE, bare_run, body, plugin, template
from tests.survival.invariants import Expected, Log, Request, Watched, fingerprint, violations
from tests.survival.stage import Life

HEALS_WITHIN = 10.0
"""Seconds after a restart within which every session has been driven on."""
_LOOK_SECONDS = 0.02
_OF_STATE = re.compile(
    r"sessions\.sqlite3(-wal|-shm|\.lock|\.lock\.pid|\.note|\.before-.+)?|server\.json|\..*\.tmp"
)
"""The names in the state folder; a draft that a death has left is used again."""
TERMINAL = ("done", "failed", "aborted")

_NOTES = {"notes.txt": "Taken.\n", "data/about.txt": "Put it here.\n"}
_STAMP = """
def transform(self, file_path, ctx):
    if file_path.name == "notes.txt":
        with file_path.open("a") as notes:
            notes.write("Stamped.\\n")
"""
_ASK = """
def transform(self, file_path, ctx):
    if file_path.name != "notes.txt":
        return
    with file_path.open("a") as notes:
        notes.write("Begun.\\n")
    for name in ("dose", "batch"):
        if name not in ctx.extra_inputs:
            raise PluginInputRequired([{"id": name, "label": name, "type": "string", "required": True}], f"No {name}.")
    notes = file_path.read_text().replace("Begun.", f"{ctx.extra_inputs['dose']} of {ctx.extra_inputs['batch']}.")
    file_path.write_text(notes)
"""
_DAWDLE = """
def transform(self, file_path, ctx):
    file_path.write_text("Half")
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)
"""
_BREAK = """
def transform(self, file_path, ctx):
    file_path.write_text("Broken")
    raise PluginError("No.")
"""
ANSWERS = {"dose": "2 mg", "batch": "B-7"}


class Gone(Exception):
    """The service died before it answered."""


class Lab:
    """A laboratory of its own, with the templates and plugins of all scenarios, and the log of what was seen."""

    def __init__(self, folder: Path, empty_store: Path | None = None) -> None:
        self.folder = folder
        self.config = laboratory.build(folder)
        with self.config.open("a") as config:
            config.write("  render_workers: 1\n")  # their start takes most of the time of a short trial
        self.store = folder / "state" / "sessions.sqlite3"
        self.data = folder / "data"
        if empty_store is not None:
            shutil.copyfile(empty_store, self.store)
        for name, code in (("stamp", _STAMP), ("ask", _ASK), ("dawdle", _DAWDLE), ("break", _BREAK)):
            plugin(folder, f"{name}s", code, isolation={"timeout_seconds": 300})
        self._templates()
        self.log = Log()
        self.complete: dict[str, frozenset[str]] = {}
        self.foreign: set[str] = set()
        kept = (folder / "templates", folder / "plugins", folder / "examples", self.config)
        self.untouched = {path: fingerprint(path) for path in kept}
        self._numbers = itertools.count(1)

    def _templates(self) -> None:
        for name, plugins in {
            "bare": [],
            "stamped": ["stamps"],
            "asked": ["stamps", "asks"],
            "dawdled": ["stamps", "dawdles"],
            "broken": ["stamps", "breaks"],
        }.items():
            template(self.folder, name, _NOTES, _exlab_plugins=plugins, _exlab_plugins_fatal=True)
        marks = {"notes.txt": "For <operator>.\n"}
        template(self.folder, "marked", marks)
        template(self.folder, "unrendered", {"a.txt": "Fine.\n", "b.txt.jinja": "{{ 1 // 0 }}\n"})

    def fresh(self) -> str:
        """The project of a session that gets in nobody's way."""
        return f"PROJ-{next(self._numbers)}"

    def away(self) -> Path:
        """Where the staging folder is while the disk is not there."""
        return self.folder / "unmounted"

    def wrong(self) -> list[str]:
        """What contradicts the contract, now that everything has come to rest."""
        expected = Expected(
            local_root=self.data,
            complete=self.complete,
            untouched=self.untouched,
            foreign=frozenset(self.foreign),
        )
        return [*violations(self.store, self.log, expected), *self._strays()]

    def _strays(self) -> Iterator[str]:
        """What lies where nothing of the service's belongs; below the data root that is for the others to say."""
        for path in (*self.folder.iterdir(), *self.store.parent.iterdir()):
            known = path in self.untouched or path in (self.data, self.store.parent, self.away())
            if not known and not _OF_STATE.fullmatch(path.name):
                yield f"{path} was made"


class Operator:
    """A program that asks, writes down what came of it, and is to ask again when nothing did."""

    away_seconds = 0.0
    """How long the disk stays away after that was noticed."""

    def __init__(self, lab: Lab, life: Life) -> None:
        self.lab = lab
        self._http = life.http()
        self._life = life
        self._watching: dict[str, Thread] = {}
        self._codes: dict[str, int | str | None] = {}
        self._looks: dict[str, tuple[object, ...]] = {}

    def close(self) -> None:
        self._http.close()
        for watching in self._watching.values():
            watching.join(PATIENCE)

    def see_end(self, *, spared: bool) -> None:
        """All that is watched has ended, and who watches is told so; something happened to those who are `spared`."""
        for session_id, watching in self._watching.items():
            watching.join(HEALS_WITHIN)
            assert not watching.is_alive(), f"a viewer of {session_id} is not told of its end"
            code = self._codes.get(session_id)
            assert spared or code == 1000, f"a viewer of {session_id} was closed with {code}"

    def look(self, session_id: str) -> dict[str, Any]:
        """How it stands now; it goes into the log when it stands otherwise than before."""
        asked = Request(method="GET", path=f"/sessions/{session_id}")
        status, handle = self._answered(asked)
        told = (handle.get("head_seq"), handle.get("state"))
        if status == 200 and self._looks.get(session_id) != told:
            self._looks[session_id] = told
            self.lab.log.note(msgspec.structs.replace(asked, status=status, answer=handle))
        return handle

    def settled(self, handle: dict[str, Any]) -> dict[str, Any]:
        """The handle, once the gate has said what it has to say, or something is in its way for long."""
        deadline = time.monotonic() + PATIENCE
        while handle["state"] in ("pending", "validating") and time.monotonic() < deadline:
            time.sleep(0.02)
            handle = self.look(handle["session_id"])
        return handle

    def post(self, path: str, body: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, Any]]:
        return self._answered(Request(method="POST", path=path, body=body, key=key))

    def _answered(self, asked: Request) -> tuple[int, dict[str, Any]]:
        """Ask again as long as the answer is to ask later, as every client is told to."""
        deadline = time.monotonic() + PATIENCE
        while True:
            status, answer = self._sent(asked)
            assert status < 500 or status == 503, f"{asked.method} {asked.path} got {status}: {answer}"
            if status != 503 or time.monotonic() > deadline:
                return status, answer
            time.sleep(0.1)

    def _sent(self, asked: Request) -> tuple[int, dict[str, Any]]:
        headers = {"Idempotency-Key": asked.key} if asked.key else {}
        answered = asked
        try:
            response = self._http.request(asked.method, asked.path, json=asked.body, headers=headers)
            answer: dict[str, Any] = response.json()
            answered = msgspec.structs.replace(asked, status=response.status_code, answer=answer)
        except httpx.TransportError as error:
            raise Gone from error
        finally:
            if asked.method != "GET":
                self.lab.log.note(answered)
        return response.status_code, answer

    def watch(self, session_id: str) -> None:
        """Have the session watched, from the last event seen on, until it or the service ends."""
        if session_id not in self._watching:
            watching = Thread(target=self._watch, args=(session_id,), daemon=True)
            self._watching[session_id] = watching
            watching.start()

    def _watch(self, session_id: str) -> None:
        after = max(
            (msgspec.json.decode(each.frames[-1])["seq"] for each in self._seen(session_id) if each.frames),
            default=0,
        )
        frames: list[bytes] = []
        code: int | None = None
        url = f"{self._life.url.replace('http', 'ws')}/api/v1/sessions/{session_id}/events?after={after}"
        try:
            with websockets.sync.client.connect(url) as socket:
                while True:
                    frames.append(socket.recv(decode=False))
        except websockets.exceptions.ConnectionClosed as closed:
            self._codes[session_id] = code = closed.rcvd.code if closed.rcvd else None
        except (OSError, EOFError, websockets.exceptions.WebSocketException) as refused:
            self._codes[session_id] = str(refused)
            return
        self.lab.log.saw(Watched(session_id=session_id, after=after, frames=tuple(frames), close_code=code))

    def _seen(self, session_id: str) -> Iterator[Watched]:
        return (each for each in self.lab.log.watched if each.session_id == session_id)


Reaction = Callable[[Operator, dict[str, Any], str], None]


def _nothing(_operator: Operator, _handle: dict[str, Any], _key: str) -> None:
    """The session needs nobody."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One way that a session takes: `react` is done for each look at it, and `ends` is how it must end."""

    name: str
    template: str = "bare"
    example: str | None = None
    changes: dict[str, Any] = {}
    prepare: Callable[[Lab], None] = lambda _: None
    react: Reaction = _nothing
    ends: str = "done"
    code: str | None = None
    notes: str | None = None

    def begin(self, lab: Lab) -> "Course":
        self.prepare(lab)
        project = lab.fresh()
        if self.example is not None:
            asked = body(lab.folder, self.example, lims_project={"short_id": project})
        else:
            asked = bare_run(self.template, project_short_id=project, run_date="2026-04-17T14:32:05")
        return Course(self, lab, asked | self.changes, f"{self.name} {project}")


class Course:
    """One session on its way: `go` takes it on, as often as its service dies, until it has ended."""

    def __init__(self, scenario: Scenario, lab: Lab, asked: dict[str, Any], key: str) -> None:
        self._scenario = scenario
        self.lab = lab
        self._asked = asked
        self.key = key
        self.name = scenario.name
        self.session_id: str | None = None
        self.destination: Path | None = None
        self.ended: str | None = None
        self._left_at: int | None = None
        self._owed: set[int] = set()
        self._cancelled = False
        self.excused: set[tuple[str, str]] = set()
        """Further ends, as state and code, that what was done to the session explains."""

    def go(self, operator: Operator) -> None:
        """Until the end. Raises Gone when the service dies, and AssertionError when it ends otherwise than it must.

        So it does when a restarted service has not taken the session up in time.
        """
        begun, taken_up = time.monotonic(), False
        status, handle = operator.post("/sessions", self._asked, self.key)
        assert status == 201, f"{self.key}: it was answered {status}: {handle}"
        self.session_id = handle["session_id"]
        operator.watch(self.session_id)
        while True:
            self.destination = Path(handle["destination"]) if handle["destination"] else None
            if not taken_up:
                waited = time.monotonic() - begun
                moved = handle["head_seq"] > (self._left_at or 0)
                taken_up = moved or handle["state"] in (*TERMINAL, "input_required")
                late = self._left_at is not None and waited > HEALS_WITHIN
                assert not late, f"{self.key}: {waited:.1f} s after the restart it is where it was"
            if handle["state"] in TERMINAL:
                break
            assert time.monotonic() < begun + PATIENCE, f"{self.key}: it does not end: {handle}"
            if not self._cancelled:
                self._scenario.react(operator, handle, self.key)
            time.sleep(_LOOK_SECONDS)
            handle = operator.look(self.session_id)
        self._judge(handle)

    def died(self) -> None:
        """Its service has: what the next one owes to the session is in the store.

        It takes up what was under way, and says so; and it ends what was to be cancelled, with nobody asking again.
        """
        state, cancel, head = self._stored("state, cancel, head_seq") or ("done", None, 0)
        self._cancelled = cancel is not None and state not in TERMINAL
        self._left_at = head
        if state not in (*TERMINAL, "input_required") and not self._cancelled:
            self._owed.add(head + 1)

    def _stored(self, columns: str) -> tuple[Any, ...] | None:
        """What the row of the session says, if there is one."""
        if self.session_id is None:
            return None
        return self._read(f"SELECT {columns} FROM sessions WHERE session_id = ?", self.session_id)

    def _read(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        with closing(sqlite3.connect(f"file:{self.lab.store}?mode=ro", uri=True)) as store:
            row: tuple[Any, ...] | None = store.execute(statement, values).fetchone()
            return row

    def _judge(self, handle: dict[str, Any]) -> None:
        self._is_recovered(handle)
        if self._scenario.prepare is _take_disk_away:
            assert not self.lab.away().exists(), f"{self.key}: it has ended without its disk"
        wanted = (self._scenario.ends, self._scenario.code)
        found = (handle["state"], (handle["error"] or {}).get("code"))
        self.ended = handle["state"]
        if found in self.excused:
            return
        assert found == wanted, f"{self.key}: it ended as {found}, not as {wanted}: {handle}"
        if self._scenario.notes is not None and self.destination is not None:
            notes = (self.destination / "notes.txt").read_text()
            assert notes == self._scenario.notes, f"{self.key}: its notes are {notes!r}"

    def _is_recovered(self, handle: dict[str, Any]) -> None:
        """A cancel may be quicker than the word of it."""
        if handle["state"] == "aborted":
            return
        kept = "SELECT kind FROM events WHERE session_id = ? AND seq = ?"
        for seq in self._owed:
            kind = self._read(kept, self.session_id, seq)
            assert kind == ("recovered",), f"{self.key}: after a death came {kind}, event {seq}"


def _answer(operator: Operator, handle: dict[str, Any], key: str) -> None:
    """Answer what is asked; it may have been answered by an answer whose own answer was lost."""
    prompt = handle["pending_input"]
    if prompt is None:
        return
    told = {field["id"]: ANSWERS[field["id"]] for field in prompt["fields"]}
    answer = {"extra_inputs": told, "prompt_id": prompt["prompt_id"], "operator": "jlee"}
    status, said = operator.post(f"/sessions/{handle['session_id']}/resume", answer)
    assert status in (200, 409), f"{key}: the answer got {status}: {said}"


def _cancel(operator: Operator, handle: dict[str, Any], *, discard: bool) -> None:
    asked = {"discard_files": discard, "operator": "jlee"}
    status, said = operator.post(f"/sessions/{handle['session_id']}/cancel", asked)
    assert status in (200, 409), f"the cancel got {status}: {said}"


def _cancel_when_asked(operator: Operator, handle: dict[str, Any], key: str) -> None:
    if handle["state"] == "input_required":
        _cancel(operator, handle, discard=False)


def _discard_when_running(operator: Operator, handle: dict[str, Any], key: str) -> None:
    if handle["state"] == "plugin_pass":
        _cancel(operator, handle, discard=True)


def _take_disk_away(lab: Lab) -> None:
    """A disk that was there before, or it would be taken for a new one."""
    if (lab.data / ".exlab-sessions").exists():
        (lab.data / ".exlab-sessions").rename(lab.away())


def _put_disk_back(operator: Operator, handle: dict[str, Any], key: str) -> None:
    if handle["blocked_on"] is not None and operator.lab.away().exists():
        time.sleep(operator.away_seconds)
        operator.lab.away().rename(operator.lab.data / ".exlab-sessions")


def _lose_disk_when_asked(operator: Operator, handle: dict[str, Any], key: str) -> None:
    """The first answer finds the disk away, the second one finds it back."""
    prompt = handle["pending_input"]
    if prompt is not None and prompt["fields"][0]["id"] == "dose":
        _take_disk_away(operator.lab)
    if prompt is None and handle["state"] == "plugin_pass":
        _put_disk_back(operator, handle, key)
    _answer(operator, handle, key)


def _take_place_when_asked(operator: Operator, handle: dict[str, Any], key: str) -> None:
    """Somebody asks for the same folder, and is refused; then somebody makes it by hand."""
    if handle["pending_input"] is None:
        return
    place = Path(handle["destination"])
    asked = operator.look(handle["session_id"])["request"]
    rival = operator.settled(operator.post("/sessions", asked, f"{key} (rival)")[1])
    assert (rival["error"] or {}).get("code") == "destination_taken", rival
    place.mkdir(parents=True, exist_ok=True)
    (place / "mine.txt").write_text("Mine.\n")
    operator.lab.foreign.add(str(place))
    operator.lab.untouched.setdefault(place, fingerprint(place))
    _answer(operator, handle, key)


SCENARIOS = {
    each.name: each
    for each in (
        Scenario(name="project", example="project"),
        Scenario(name="plain"),
        Scenario(name="test", changes={"run_kind": "test"}),
        Scenario(name="marked", template="marked"),
        Scenario(name="plugin", template="stamped", notes="Taken.\nStamped.\n"),
        Scenario(name="asking", template="asked", react=_answer, notes="Taken.\nStamped.\n2 mg of B-7.\n"),
        Scenario(
            name="cancelled", template="asked", react=_cancel_when_asked, ends="aborted", code="cancelled"
        ),
        Scenario(
            name="stopped", template="dawdled", react=_discard_when_running, ends="aborted", code="cancelled"
        ),
        Scenario(name="blocked", prepare=_take_disk_away, react=_put_disk_back),
        Scenario(
            name="unmounted",
            template="asked",
            react=_lose_disk_when_asked,
            notes="Taken.\nStamped.\n2 mg of B-7.\n",
        ),
        Scenario(
            name="colliding",
            template="asked",
            react=_take_place_when_asked,
            ends="failed",
            code="destination_taken",
        ),
        Scenario(name="failing", template="broken", ends="failed", code="plugin_failed"),
        Scenario(name="unrendered", template="unrendered", ends="failed", code="render_failed"),
    )
}


def empty_store(folder: Path) -> Path:
    """So that what happens falls on what a session does, not on the making of the schema."""
    path = folder / "empty.sqlite3"
    database.prepare(path)
    return path
