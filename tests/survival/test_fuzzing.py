"""A served laboratory against requests that nobody would think of, made from its own OpenAPI document.

Every operation is sent what its document allows and what it does not, at addresses of sessions in every state as
well as of none, among them good bodies. Whatever comes, the answer is one that the document lists, of the type and
the shape that it says, and never an internal error; streams are opened with any cursor, read for a moment, and
left. In the end the service is still ready, and its store is without a fault.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, CheckContext, GenerationMode, Response
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from app.demo import laboratory
from app.sessions import consistency
from tests.service import PATIENCE, Service, body, ended, eventually, running, waiting
from tests.survival.shares import SEED, SHARE

AGAIN = f"SURVIVAL_SHARE={SHARE} SURVIVAL_SEED={SEED} pytest -s tests/survival/test_fuzzing.py"

COMMANDS = ("create_session", "resume_session", "cancel_session", "retry_session")
QUERIES = ("list_sessions", "read_log", "read_events")
BARE = (
    "get_session",
    "list_operations",
    "list_templates",
    "list_plugins",
    "setup_status",
    "health",
    "ready",
)
"""There is nothing that these could be asked wrongly: they take no more than an address."""
AMOUNTS = {"commands": 320, "queries": 320, "bare": 60, "streams": 150, "sockets": 150}
"""Requests of the whole, to each operation in each mode."""
MOMENT = 0.3
"""Seconds for which a stream that does not end is read."""

ANSWER = {"slide_box": "SB-0042", "laser_power": 2.5}
GOOD: dict[str, dict[str, Any]] = {
    "create_session": {},
    "resume_session": {"extra_inputs": ANSWER},
    "cancel_session": {"operator": "asmith"},
    "retry_session": {"changes": {"objective": "Another try"}},
}
"""A good body of each command; those of new sessions are the examples of the laboratory."""
ODD = (
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
    "9" * 5000,
    "-1",
    "1e400",
    "\u0661",
    "\x00",
    "%ff",
    "null",
)
"""What a parameter may be that no document speaks of: beyond what a time, a number or a text can hold."""
EXAMPLES = ("project", "confocal_run", "plate_reader_test_run", "stained_run")
CLOSE_CODES = {1000, 4400, 4404, 4409}
"""Those of a service that neither stops nor fails, for a client that may come in."""

pytestmark = pytest.mark.slow


class Stand:
    """The service, sessions of it in every state that stays, and what it has answered so far."""

    def __init__(self, service: Service, lab: Path) -> None:
        self.url = service.url
        self.lab = lab
        self.http = service.http()
        self.session = requests.Session()
        self.session.trust_env = False
        document = schemathesis.openapi.from_url(f"{service.url}/schema/openapi.json")
        found: list[Any] = [result.ok() for result in document.get_all_operations() if isinstance(result, Ok)]
        self.operations: dict[str, APIOperation[Any, Any, Any, Any]]
        self.operations = {str(each.definition.raw["operationId"]): each for each in found}
        self.answers: Counter[tuple[str, str]] = Counter()
        project = self.create("project")
        self.ids = {
            "done": ended(self.http, project)["session_id"],
            "failed": self.create("confocal_run", equipment_id="NOBODY"),
            "aborted": self.create("stained_run"),
            "waiting": self.create("stained_run"),
        }
        self.http.post(f"/sessions/{self.ids['aborted']}/cancel", json={}).raise_for_status()
        waiting(self.http, self.ids["waiting"])

    def create(self, example: str, **changes: object) -> str:
        created = self.http.post("/sessions", json=body(self.lab, example, **changes))
        return str(created.raise_for_status().json()["session_id"])

    def renew(self) -> None:
        """See to it that somebody is asked something."""
        if self.http.get(f"/sessions/{self.ids['waiting']}").json()["state"] != "input_required":
            self.ids["waiting"] = self.create("stained_run")
            waiting(self.http, self.ids["waiting"])

    def ask(self, name: str, case: Case[Any]) -> None:
        """Send `case`; its answer is one that the document lists, of the type and shape that it says."""
        response = case.call(base_url=self.url, session=self.session, timeout=PATIENCE)
        self.answers[name, str(response.status_code)] += 1
        case.validate_response(response, checks=CHECKS)


def no_bug_is_met(_ctx: CheckContext, response: Response, _case: Case[Any]) -> None:
    assert response.status_code != 500, response.text


CHECKS = [
    no_bug_is_met,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    config = laboratory.build(tmp_path_factory.mktemp("fuzzed"))
    print(f"\nthe same again: {AGAIN}")
    with ExitStack() as open_:
        stand = Stand(open_.enter_context(running(config)), config.parent)
        open_.callback(stand.http.close)
        open_.callback(stand.session.close)
        yield stand
        print(f"\n{stand.answers.total()} requests, seed {SEED}; the same again: {AGAIN}")
        for (name, status), count in sorted(stand.answers.items()):
            print(f"{count:6} {name} {status}")


def amount(kind: str) -> settings:
    """As many requests as this run's share of the whole has. Nothing is shrunk: a service has a memory."""
    return settings(
        max_examples=max(1, round(AMOUNTS[kind] * SHARE)),
        phases=(Phase.generate,),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def fuzz(stand: Stand, name: str, mode: GenerationMode, kind: str) -> None:
    operation = stand.operations[name]

    @seed(SEED)
    @amount(kind)
    @given(case=operation.as_strategy(generation_mode=mode), choice=st.integers(0, 59))
    def asked(case: Case[Any], choice: int) -> None:
        _make_real(stand, name, case, choice)
        stand.ask(f"{name}, {mode}", case)

    asked()


def _make_real(stand: Stand, name: str, case: Case[Any], choice: int) -> None:
    """Address most requests to sessions that there are, and give some of them a body that is good."""
    if "session_id" in (case.path_parameters or {}) and choice < 48:
        state = ("failed", "done", "waiting", "waiting")[choice % 4] if choice else "aborted"
        case.path_parameters["session_id"] = stand.ids[state]
    if case.query and choice % 6 == 4:
        names = sorted(case.query)
        case.query[names[choice % len(names)]] = ODD[choice % len(ODD)]
    good = GOOD.get(name)
    if good is not None and choice // 4 % 6 == 5:
        case.body = good or body(stand.lab, EXAMPLES[choice % 4])
    if name in COMMANDS and choice % 20 == 11:
        stand.renew()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_answered_as_documented(stand: Stand, name: str, mode: GenerationMode) -> None:
    stand.renew()
    fuzz(stand, name, mode, "commands")


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", QUERIES)
def test_a_query_is_answered_as_documented(stand: Stand, name: str, mode: GenerationMode) -> None:
    fuzz(stand, name, mode, "queries")


@pytest.mark.parametrize("name", BARE)
def test_what_takes_nothing_is_answered_as_documented(stand: Stand, name: str) -> None:
    fuzz(stand, name, GenerationMode.POSITIVE, "bare")


def test_no_operation_is_left_out(stand: Stand) -> None:
    assert {*COMMANDS, *QUERIES, *BARE} == stand.operations.keys()


whose = st.sampled_from(("done", "failed", "aborted", "waiting", "nobody"))
words = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20).map(str.strip)
cursors = st.none() | st.integers(-3, 30).map(str) | st.integers().map(str) | words


def test_a_stream_may_be_opened_at_any_cursor_and_left(stand: Stand) -> None:
    listed = stand.operations["read_events"].definition.raw["responses"].keys()
    stand.renew()

    @seed(SEED)
    @amount("streams")
    @given(state=whose, after=cursors, last=cursors)
    def asked(state: str, after: str | None, last: str | None) -> None:
        params = {"after": after} if after is not None else {}
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last is not None else {})
        path = f"/sessions/{stand.ids.get(state, state)}/events"
        with stand.http.stream("GET", path, params=params, headers=headers, timeout=MOMENT) as answer:
            stand.answers["read_events, streamed", str(answer.status_code)] += 1
            assert str(answer.status_code) in listed and answer.status_code != 500
            _read_for_a_moment(answer)

    asked()


def _read_for_a_moment(answer: httpx.Response) -> None:
    """A stream tells events in order, without a gap; a refusal is what refusals are."""
    if answer.status_code == 204:
        return
    if answer.status_code != 200:
        assert json.loads(answer.read())["error"]["code"]
        return
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    told: list[int] = []
    with suppress(httpx.ReadTimeout):  # it waits for what comes next
        told.extend(json.loads(line[6:])["seq"] for line in answer.iter_lines() if line.startswith("data: "))
    assert told == [*range(told[0], told[0] + len(told))] if told else True


def test_a_socket_may_be_opened_at_any_cursor_and_left(stand: Stand) -> None:
    asked_for = st.fixed_dictionaries(
        {},
        optional={
            "after": cursors.map(str),
            "epoch": words,
            "frames": st.sampled_from(("text", "binary")) | words,
            "markers": st.sampled_from(("true", "false")) | words,
        },
    )
    stand.renew()

    @seed(SEED)
    @amount("sockets")
    @given(state=whose | st.none(), query=asked_for)
    def asked(state: str | None, query: dict[str, str]) -> None:
        place = f"/sessions/{stand.ids.get(state, state)}/events" if state else "/events"
        url = str(httpx.URL(f"{stand.url}/api/v1{place}", params=query)).replace("http", "ws", 1)
        code = _left_or_closed(url)
        stand.answers["a socket", str(code)] += 1
        assert code in (None, *CLOSE_CODES)

    asked()


def _left_or_closed(url: str) -> int | None:
    """The close code of the socket; None when it had nothing more to say for a moment, and was left."""
    with connect(url, proxy=None, max_size=None, open_timeout=PATIENCE) as socket:
        until = time.monotonic() + PATIENCE / 4
        try:
            while time.monotonic() < until:
                json.loads(socket.recv(timeout=MOMENT))
        except TimeoutError:
            return None
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 1006
    raise AssertionError("a socket that never came to rest")


def test_the_service_stands_and_its_store_is_without_a_fault(stand: Stand) -> None:
    """After all of it, and once every session that was opened on the way has come to rest."""

    def rested() -> bool:
        found: list[dict[str, Any]] = stand.http.get("/operations").json()["operations"]
        return all(operation["state"] in ("failed", "input_required") for operation in found)

    eventually(rested)
    assert stand.http.get("/ready").status_code == 200
    assert stand.http.get("/health").json()["status"] == "ok"
    complaints = consistency.examine(stand.lab / "state" / "sessions.sqlite3", stand.lab / "data")
    assert [complaint for complaint in complaints if complaint.level == "error"] == []
