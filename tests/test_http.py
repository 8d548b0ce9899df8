"""The HTTP API as its clients meet it: what is asked, what is answered, and what is refused how."""

import asyncio
import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as configured
from hypothesis import strategies as st

from app.demo import laboratory
from app.sessions.lifecycle import Asked
from tests.held import Held, holding
from tests.service import Service, body, ended, eventually, running

HANDLE = {
    "session_id",
    "state",
    "current_phase",
    "next_action",
    "pending_input",
    "error",
    "result",
    "kind",
    "run_kind",
    "label",
    "equipment_id",
    "project_short_id",
    "operator",
    "template",
    "destination",
    "created_at",
    "updated_at",
    "head_seq",
    "epoch",
    "recoveries",
    "blocked_on",
    "retry_of",
}
UNKNOWN = "0198c6a0-0000-7000-8000-000000000000"

_numbers = itertools.count(100)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laboratory.build(tmp_path_factory.mktemp("lab")).parent


@pytest.fixture(scope="module")
def service(lab: Path) -> Iterator[Service]:
    with running(lab / "config.yaml") as one:
        yield one


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    async with holding(tmp_path) as one:
        yield one


@pytest.fixture
async def calls(held: Held) -> AsyncIterator[httpx.AsyncClient]:
    async with held.http() as client:
        yield client


def project(lab: Path, **changes: Any) -> dict[str, Any]:
    """The body of a project that there is not yet."""
    return body(lab, "project", lims_project={"short_id": f"PROJ-{next(_numbers)}"}) | changes


def told(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_good_body_answers_201_when_the_gate_is_through(http: httpx.Client, lab: Path) -> None:
    asked = project(lab)
    answer = http.post("/sessions", json=asked)
    handle = answer.json()
    assert answer.status_code == 201 and set(handle) == HANDLE
    assert (handle["state"], handle["current_phase"]) == ("rendering", "rendering_template")
    assert handle["next_action"] == "none" and handle["error"] is handle["result"] is None
    assert handle["project_short_id"] == asked["lims_project"]["short_id"]
    assert ended(http, handle["session_id"])["state"] == "done"


def test_one_session_is_shown_with_its_request(http: httpx.Client, lab: Path) -> None:
    asked = project(lab)
    session_id = http.post("/sessions", json=asked).json()["session_id"]
    handle = ended(http, session_id)
    assert set(handle) == HANDLE | {"request"} and handle["request"] == asked
    assert handle["result"]["path"] == handle["destination"] and Path(handle["destination"]).is_dir()


def test_what_the_gate_refuses_is_a_failed_session_and_leaves_the_data_root_alone(
    http: httpx.Client, lab: Path
) -> None:
    before = {path.name for path in (lab / "data").rglob("*")}
    answer = http.post("/sessions", json=project(lab, operator=" "))
    handle = answer.json()
    assert (answer.status_code, handle["state"]) == (201, "failed")
    assert (handle["error"]["code"], handle["error"]["field"]) == ("validation_failed", "operator")
    assert {path.name for path in (lab / "data").rglob("*")} - before <= {".exlab-sessions"}
    assert http.get(f"/sessions/{handle['session_id']}").json()["state"] == "failed"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"labl": "x"}, "labl"),
        ({"kind": "journey"}, "kind"),
        ({"kind": None}, "kind"),
        ({"label": 7}, "label"),
        ({"label": None}, "label"),
        ({"variables": []}, "variables"),
        ({"variables": "{}"}, "variables"),
        ({"run_date": None}, "run_date"),
        ({"project_short_id": "PROJ-1"}, "project_short_id"),
    ],
)
def test_a_body_of_the_wrong_shape_leaves_nothing_behind(
    http: httpx.Client, lab: Path, change: dict[str, Any], field: str
) -> None:
    newest = http.get("/sessions", params={"limit": 1}).json()["sessions"]
    answer = http.post("/sessions", json=project(lab) | change)
    error = answer.json()["error"]
    assert told(answer) == (422, "validation_failed")
    assert error["field"] == field and error["details"]["errors"][0]["field"] == field
    assert http.get("/sessions", params={"limit": 1}).json()["sessions"] == newest


@pytest.mark.parametrize(
    "missing", ["kind", "equipment_id", "template_path", "label", "operator", "objective"]
)
def test_a_missing_field_is_told_by_its_name(http: httpx.Client, lab: Path, missing: str) -> None:
    asked = project(lab)
    del asked[missing]
    answer = http.post("/sessions", json=asked)
    assert told(answer) == (422, "validation_failed") and answer.json()["error"]["field"] == missing


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"kind":"project"}{}',
        b"\xff",
        b'{"kind":"\xff"}',
        b'{"label":"\\ud800"}',
        b"NaN",
    ],
)
def test_what_is_no_object_is_refused(http: httpx.Client, content: bytes) -> None:
    for path in ("/sessions", f"/sessions/{UNKNOWN}/resume", f"/sessions/{UNKNOWN}/cancel"):
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert told(answer) == (422, "validation_failed")
        assert answer.json()["error"]["details"]["errors"][0]["message"]


@pytest.mark.parametrize("flag", ["true", 1, None])
def test_a_type_that_is_nearly_right_is_wrong(http: httpx.Client, flag: object) -> None:
    answer = http.post(f"/sessions/{UNKNOWN}/cancel", json={"discard_files": flag})
    assert told(answer) == (422, "validation_failed")
    assert answer.json()["error"]["field"] == "discard_files"


@pytest.mark.parametrize("path", ["", "/resume", "/cancel", "/retry", "/log", "/events"])
@pytest.mark.parametrize("session_id", [UNKNOWN, "x", "%00", "%F0%9F%94%AC", "..", "x" * 2000])
def test_an_unknown_session_is_not_found(http: httpx.Client, session_id: str, path: str) -> None:
    method = "POST" if path in ("/resume", "/cancel", "/retry") else "GET"
    url = http.base_url.join(f"sessions/{session_id}{path}") if session_id != ".." else None
    target = url or f"/sessions/%2E%2E{path}"
    answer = http.request(method, target, json={} if method == "POST" else None)
    assert answer.status_code == 404 and answer.json()["error"]["code"] in ("session_not_found", "not_found")


@pytest.mark.parametrize("path", ["/nothing", "/sessions/x/y", "/sessions/x/y/z", "/plugin"])
def test_an_unknown_address_is_not_found(http: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert told(http.request(method, path)) == (404, "not_found")


def test_an_address_says_which_methods_it_takes(http: httpx.Client) -> None:
    for method, path in (("DELETE", "/sessions"), ("PUT", f"/sessions/{UNKNOWN}"), ("POST", "/health")):
        answer = http.request(method, path)
        assert told(answer) == (405, "method_not_allowed") and "GET" in answer.headers["allow"]


def test_a_key_gives_the_same_session_for_the_same_body(http: httpx.Client, lab: Path) -> None:
    asked, key = project(lab), {"Idempotency-Key": "one"}
    first = http.post("/sessions", json=asked, headers=key).json()
    done = ended(http, first["session_id"])
    backwards = dict(reversed(asked.items()))
    again = http.post("/sessions", json=backwards, headers=key)
    assert again.status_code == 201
    assert again.json() == {name: value for name, value in done.items() if name != "request"}


def test_a_key_with_another_body_is_refused(http: httpx.Client, lab: Path) -> None:
    key = {"Idempotency-Key": "two"}
    first = http.post("/sessions", json=project(lab), headers=key).json()
    answer = http.post("/sessions", json=project(lab), headers=key)
    assert told(answer) == (422, "idempotency_key_reused")
    assert answer.json()["error"]["details"]["session_id"] == first["session_id"]


def test_a_refused_body_uses_no_key_up(http: httpx.Client, lab: Path) -> None:
    key = {"Idempotency-Key": "three"}
    assert http.post("/sessions", json={}, headers=key).status_code == 422
    assert http.post("/sessions", json=project(lab), headers=key).status_code == 201


@pytest.mark.parametrize("key", [b"", b"x" * 256, "ü".encode()])
def test_a_key_that_is_not_sane_is_refused(http: httpx.Client, lab: Path, key: bytes) -> None:
    answer = http.post("/sessions", json=project(lab), headers={b"Idempotency-Key": key})
    assert told(answer) == (422, "validation_failed")
    assert answer.json()["error"]["field"] == "Idempotency-Key"


def test_twenty_at_once_with_one_key_are_one_session(service: Service, lab: Path) -> None:
    asked = project(lab)

    async def post() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", timeout=60) as client:
            key = {"Idempotency-Key": "many"}
            return await asyncio.gather(
                *(client.post("/sessions", json=asked, headers=key) for _ in range(20))
            )

    answers = asyncio.run(post())
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["session_id"] for answer in answers}) == 1


def test_a_failed_session_is_tried_again_with_changes(http: httpx.Client, lab: Path) -> None:
    asked = project(lab)
    failed = http.post("/sessions", json=asked | {"equipment_id": "NOWHERE"}).json()
    changes = {"equipment_id": "CONFOCAL_01", "variables": {"organism": None}}
    answer = http.post(f"/sessions/{failed['session_id']}/retry", json={"changes": changes})
    assert answer.status_code == 201 and answer.json()["retry_of"] == failed["session_id"]
    handle = ended(http, answer.json()["session_id"])
    assert handle["request"] == asked | {"variables": {"biosafety_level": 1}}


def test_a_retry_whose_changes_have_no_shape_is_refused(http: httpx.Client, lab: Path) -> None:
    failed = http.post("/sessions", json=project(lab, equipment_id="NOWHERE")).json()
    answer = http.post(f"/sessions/{failed['session_id']}/retry", json={"changes": {"label": 7}})
    assert told(answer) == (422, "validation_failed") and answer.json()["error"]["field"] == "label"


def test_an_ended_session_is_neither_answered_nor_cancelled(http: httpx.Client, lab: Path) -> None:
    session_id = http.post("/sessions", json=project(lab)).json()["session_id"]
    ended(http, session_id)
    for command in ("resume", "cancel"):
        answer = http.post(f"/sessions/{session_id}/{command}", json={})
        assert told(answer) == (409, "session_already_completed")
    assert told(http.post(f"/sessions/{session_id}/retry", json={})) == (409, "session_not_retryable")


def test_a_session_that_is_cancelled_stays_cancelled(http: httpx.Client, lab: Path) -> None:
    handle = http.post("/sessions", json=project(lab)).json()
    answer = http.post(f"/sessions/{handle['session_id']}/cancel", json={"discard_files": True})
    assert answer.status_code == 200 and answer.json()["state"] == "aborted"
    assert answer.json()["error"]["code"] == "cancelled"
    assert answer.json()["error"]["details"]["discard_files"] is True
    assert not Path(handle["destination"]).exists()


def test_a_session_can_be_read_in_its_log(http: httpx.Client, lab: Path) -> None:
    session_id = http.post("/sessions", json=project(lab)).json()["session_id"]
    ended(http, session_id)
    lines = http.get(f"/sessions/{session_id}/log").json()["lines"]
    assert all({"line", "at", "source", "level", "text"} == set(line) for line in lines)


async def test_the_log_goes_on_after_a_line(held: Held, calls: httpx.AsyncClient) -> None:
    session = await held.at_plugins(printed=("one", "two", "three"))
    path = f"/sessions/{session.session_id}/log"
    lines = (await calls.get(path, params={"limit": 2})).json()["lines"]
    assert [line["text"] for line in lines] == ["one", "two"]
    rest = (await calls.get(path, params={"after": lines[-1]["line"]})).json()["lines"]
    assert [line["text"] for line in rest] == ["three"]


async def test_an_open_prompt_stands_in_the_handle(held: Held, calls: httpx.AsyncClient) -> None:
    session = await held.asking()
    handle = (await calls.get(f"/sessions/{session.session_id}")).json()
    assert (handle["state"], handle["next_action"]) == ("input_required", "awaiting_input")
    assert handle["current_phase"] == "input_required"
    prompt = handle["pending_input"]
    assert (prompt["prompt_id"], prompt["plugin"], prompt["reason"]) == ("p1", "doser", "No dose.")
    assert prompt["fields"][0]["id"] == "dose"


async def test_a_prompt_always_says_the_type_of_a_field_and_whether_it_is_required(
    held: Held, calls: httpx.AsyncClient
) -> None:
    plain = msgspec.Raw(b'{"id":"note","label":"Note"}')
    asked = Asked(prompt_id="p", plugin="x", file=None, reason="why", fields=(plain,))
    session = await held.store.record(await held.at_plugins(), asked)
    handle = (await calls.get(f"/sessions/{session.session_id}")).json()
    assert handle["pending_input"]["fields"][0].items() >= {"type": "string", "required": True}.items()


async def test_an_answer_is_committed_before_it_is_answered(held: Held, calls: httpx.AsyncClient) -> None:
    session = await held.asking()
    answer = await calls.post(
        f"/sessions/{session.session_id}/resume", json={"extra_inputs": {"dose": 2, "x": 1}}
    )
    handle = answer.json()
    assert answer.status_code == 200 and set(handle) == HANDLE
    assert (handle["state"], handle["pending_input"], handle["next_action"]) == ("plugin_pass", None, "none")


async def test_the_repeat_of_an_accepted_answer_is_answered_as_it_stands_now(
    held: Held, calls: httpx.AsyncClient
) -> None:
    session = await held.asking()
    path, answer = f"/sessions/{session.session_id}/resume", {"prompt_id": "p1", "extra_inputs": {"dose": 2}}
    await calls.post(path, json=answer)
    await held.done(await held.store.get(session.session_id))
    again = await calls.post(path, json=answer)
    assert again.status_code == 200 and again.json()["state"] == "done"
    other = await calls.post(path, json=answer | {"extra_inputs": {"dose": 3}})
    assert told(other) == (409, "session_already_completed")


async def test_resume_is_refused_in_the_order_of_its_rules(held: Held, calls: httpx.AsyncClient) -> None:
    session = await held.at_plugins()
    path = f"/sessions/{session.session_id}/resume"
    assert told(await calls.post(path, json={"prompt_id": "old"})) == (409, "session_not_awaiting_input")
    await held.asking(session)
    wrong = {"prompt_id": "old", "extra_inputs": {"dose": "much"}}
    assert told(await calls.post(path, json=wrong)) == (409, "prompt_not_open")
    answer = await calls.post(path, json=wrong | {"prompt_id": "p1"})
    assert told(answer) == (422, "input_invalid") and answer.json()["error"]["field"] == "dose"
    assert (await calls.get(path.removesuffix("/resume"))).json()["next_action"] == "awaiting_input"


async def test_a_service_may_insist_on_the_prompt_id(held: Held, calls: httpx.AsyncClient) -> None:
    config = held.config.path
    config.write_text(f"{config.read_text()}\n  require_prompt_id: true\n")
    session = await held.asking()
    path = f"/sessions/{session.session_id}/resume"
    refused = await calls.post(path, json={"extra_inputs": {"dose": 1}})
    assert told(refused) == (422, "validation_failed") and refused.json()["error"]["field"] == "prompt_id"
    taken = await calls.post(path, json={"extra_inputs": {"dose": 1}, "prompt_id": "p1"})
    assert taken.status_code == 200


async def test_who_commanded_what_is_in_the_audit_with_its_trace(
    held: Held, calls: httpx.AsyncClient
) -> None:
    session = await held.asking()
    answer = {"extra_inputs": {"dose": 1}, "operator": "jlee"}
    await calls.post(f"/sessions/{session.session_id}/resume", json=answer, headers={"X-Trace-Id": "t-7"})
    with sqlite3.connect(held.store.path) as database:
        rows = database.execute("SELECT command, principal, operator FROM audit WHERE trace_id = 't-7'")
        assert rows.fetchall() == [("resume", "local", "jlee")]


async def test_sessions_are_listed_newest_first_in_pages(held: Held, calls: httpx.AsyncClient) -> None:
    made = [(await held.created(label=f"n{number}")).session_id for number in range(7)]
    found: list[str] = []
    following = None
    while True:
        params = {"limit": 3} | ({"next": following} if following else {})
        page = (await calls.get("/sessions", params=params)).json()
        found += [handle["session_id"] for handle in page["sessions"]]
        if (following := page["next"]) is None:
            break
    assert found == made[::-1]


async def test_a_listing_is_narrowed_by_each_filter(held: Held, calls: httpx.AsyncClient) -> None:
    await held.failed(await held.created(label="Alpha 1", operator="jlee"))
    run = {"kind": "run", "run_kind": "test", "project_short_id": "PROJ-7", "equipment_id": "READER_01"}
    await held.created(label="Beta%", **run)
    await held.rendering(label="alpha 2")

    async def labels(**params: Any) -> set[str]:
        page = (await calls.get("/sessions", params=params)).raise_for_status().json()
        return {handle["label"] for handle in page["sessions"]}

    assert await labels(state="failed") == {"Alpha 1"}
    assert await labels(state=["failed", "rendering"]) == {"Alpha 1", "alpha 2"}
    assert await labels(kind="run") == {"Beta%"}
    assert await labels(equipment="READER_01") == await labels(project="PROJ-7") == {"Beta%"}
    assert await labels(operator="jlee") == {"Alpha 1"}
    assert await labels(label="Beta%") == {"Beta%"} and await labels(label="%") == set()
    assert await labels(since="2999-01-01T00:00:00Z") == await labels(until="2000-01-01T00:00:00Z") == set()
    assert len(await labels(since="2000-01-01T00:00:00", until="2999-01-01T00:00:00+02:00")) == 3


@pytest.mark.parametrize(
    ("query", "code", "field"),
    [
        ("state=asleep", "validation_failed", "state"),
        ("kind=journey", "validation_failed", "kind"),
        ("limit=0", "validation_failed", "limit"),
        ("limit=201", "validation_failed", "limit"),
        ("limit=x", "validation_failed", "limit"),
        ("since=yesterday", "validation_failed", "since"),
        ("since=0001-01-01T00:00:00%2B14:00", "validation_failed", "since"),
        ("until=9999-12-31T23:59:59-14:00", "validation_failed", "until"),
        ("next=x", "cursor_invalid", "next"),
        ("next=", "cursor_invalid", "next"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(http: httpx.Client, query: str, code: str, field: str) -> None:
    answer = http.get(f"/sessions?{query}")
    assert told(answer) == (422, code) and answer.json()["error"]["field"] == field


async def test_operations_are_what_is_live_and_what_failed_lately(
    held: Held, calls: httpx.AsyncClient
) -> None:
    failed = await held.failed(await held.created())
    waiting = await held.asking()
    await held.done(await held.at_plugins())
    found = (await calls.get("/operations")).json()["operations"]
    assert [each["id"] for each in found] == [failed.session_id, waiting.session_id]
    assert found[1] == {
        "id": waiting.session_id,
        "state": "input_required",
        "started_at": waiting.created_at,
        "equipment_id": "CONFOCAL_01",
        "project_short_id": "PROJ-1",
        "run_label": "Pilot",
        "plugin_name": "doser",
        "suspended_reason": "No dose.",
    }


def test_templates_are_shown_with_what_they_ask(http: httpx.Client, lab: Path) -> None:
    found = {each["name"]: each for each in http.get("/templates").json()["templates"]}
    assert set(found) == {"project", "confocal_run", "plate_reader_run", "stained_run"}
    assert found["project"]["type"] == "project" and found["project"]["template_path"] == "project"
    assert "organism" in {question["name"] for question in found["project"]["questions"]}
    assert "fixation" in {field["id"] for field in found["confocal_run"]["readme_fields"]}


def test_plugins_are_shown_with_their_manifests(http: httpx.Client, lab: Path) -> None:
    found = http.get("/plugins").json()
    assert found["problems"] == []
    [plugin] = found["plugins"]
    assert plugin == {
        "name": "sample_sheet",
        "version": "1.0.0",
        "author": "The laboratory",
        "description": "Fills in the sample sheet of a run, and asks for what nobody has told yet.",
        "supported_extensions": [".xlsx"],
        "api_version": "1",
        "required_variables": ["sample"],
        "optional_variables": ["stain", "slides", "objective_lens"],
        "timeout_seconds": 60,
        "memory_mb": 512,
        "network": False,
        "folder": str(lab / "plugins" / "sample_sheet"),
    }
    assert http.head("/plugins").status_code == 200


async def test_a_plugin_that_cannot_be_used_is_told_with_the_reason(
    held: Held, calls: httpx.AsyncClient, tmp_path: Path
) -> None:
    broken = tmp_path / "plugins/broken"
    broken.mkdir(parents=True)
    (broken / "manifest.yml").write_text("name: [")
    found = (await calls.get("/plugins")).json()
    assert [each["path"] for each in found["problems"]] == [str(broken)]
    assert found["problems"][0]["message"].startswith("manifest.yml line 1: ")


async def test_a_template_that_cannot_be_used_is_told_with_the_reason(
    held: Held, calls: httpx.AsyncClient, tmp_path: Path
) -> None:
    (tmp_path / "templates/broken").mkdir()
    (tmp_path / "templates/broken/copier.yml").write_text("_exlab_type: [")
    own = tmp_path / "data/CONFOCAL_01/.exlab-wizard/templates/own"
    own.mkdir(parents=True)
    (own / "copier.yml").write_text('_exlab_type: project\n_exlab_version: "1"\n')
    found = (await calls.get("/templates")).json()
    assert [each["path"] for each in found["problems"]] == [str(tmp_path / "templates/broken")]
    [offer] = [each for each in found["templates"] if each["name"] == "own"]
    assert (offer["equipment_id"], offer["template_path"]) == ("CONFOCAL_01", str(own))
    assert [field["id"] for field in found["readme_fields"]] == ["irb_protocol"]


async def test_nothing_is_created_before_the_setup_is_complete(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("service: {state_dir: state}\n")
    with running(tmp_path / "config.yaml") as service, service.http() as http:
        status = http.get("/setup/status").json()
        assert (status["state"], status["next_action"]) == ("incomplete_missing_paths", "set_paths")
        assert status["ready"] is False and status["missing"][0]["field"] == "paths.templates_dir"
        for path in ("", f"/{UNKNOWN}/resume", f"/{UNKNOWN}/cancel", f"/{UNKNOWN}/retry"):
            asked = body_of_a_project() if path == "" else {}
            answer = http.post(f"/sessions{path}", json=asked)
            assert told(answer) == (503, "setup_incomplete")
            details = answer.json()["error"]["details"]
            assert details == {"state": status["state"], "missing": status["missing"]}
        assert http.get("/health").json()["setup_state"] == "incomplete_missing_paths"
        assert http.get("/ready").status_code == 200


def body_of_a_project() -> dict[str, Any]:
    words = ("equipment_id", "template_path", "label", "operator", "objective")
    return {"kind": "project"} | dict.fromkeys(words, "x")


async def test_a_mended_config_counts_without_a_restart(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    with running(config, "--hold") as service, service.http() as http:
        assert http.get("/setup/status").json()["state"] == "incomplete_no_config"
        laboratory.build(tmp_path)
        assert http.get("/setup/status").json()["ready"] is True
        assert http.post("/sessions", json=body(tmp_path, "project")).status_code == 201


async def test_a_stopping_service_takes_no_new_work(held: Held, calls: httpx.AsyncClient) -> None:
    session = await held.asking()
    failed = await held.failed(await held.created())
    await held.runner.drain(0)
    for path in ("", f"/{session.session_id}/resume", f"/{failed.session_id}/retry"):
        answer = await calls.post(f"/sessions{path}", json={} if path else body_of_a_project())
        assert told(answer) == (503, "shutting_down")
    assert told(await calls.get("/ready")) == (503, "shutting_down")
    assert (await calls.get("/health")).status_code == 200
    assert (await calls.get(f"/sessions/{session.session_id}")).status_code == 200


async def test_a_store_that_cannot_be_asked_answers_503_and_when_to_come_again(
    held: Held, calls: httpx.AsyncClient
) -> None:
    with held.unreadable():
        for path in ("/sessions", "/operations", f"/sessions/{UNKNOWN}", "/ready"):
            answer = await calls.get(path)
            assert told(answer) == (503, "store_unavailable") and int(answer.headers["retry-after"]) > 0
        health = await calls.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "error"
        assert health.json()["components"]["session_store"]["status"] == "error"
    assert (await calls.get("/ready")).status_code == 200


async def test_a_bug_tells_nothing_of_the_inside_and_is_logged(
    held: Held, calls: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken() -> None:
        raise RuntimeError("/etc/secret")

    monkeypatch.setattr(held.store, "operations", broken)
    answer = await calls.get("/operations", headers={"X-Trace-Id": "bug-1"})
    assert told(answer) == (500, "internal_error") and "secret" not in answer.text
    assert answer.json()["error"]["trace_id"] == "bug-1"
    logged = capsys.readouterr().out
    assert "/etc/secret" in logged and "bug-1" in logged


def test_health_tells_of_every_part(http: httpx.Client) -> None:
    report = http.get("/health").json()
    assert set(report) == {"status", "version", "schema_versions", "components", "setup_state"}
    assert report["status"] == "ok" and report["setup_state"] == "ready"
    expected = {"session_store", "config", "data_root", "rendering", "plugins", "partial_trees", "streams"}
    assert set(report["components"]) == expected
    assert {part["status"] for part in report["components"].values()} == {"ok"}
    assert report["components"]["rendering"]["isolation"] and report["components"]["plugins"]["isolation"]


async def test_a_config_that_breaks_leaves_the_last_one_in_force_and_health_warns(
    held: Held, calls: httpx.AsyncClient
) -> None:
    held.config.path.write_text("paths: [")
    report = (await calls.get("/health")).json()
    assert (report["status"], report["setup_state"]) == ("warn", "ready")
    assert report["components"]["config"]["mistakes"][0]["line"] == 1


async def test_a_data_root_that_is_away_is_told_by_health(
    held: Held, calls: httpx.AsyncClient, tmp_path: Path
) -> None:
    (tmp_path / "data").rmdir()
    report = (await calls.get("/health")).json()
    assert report["status"] == "error" and report["components"]["data_root"]["status"] == "error"


async def test_health_does_not_wait_for_a_disk_that_is_silent(
    held: Held, calls: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = asyncio.Event()
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        await released.wait()

    monkeypatch.setattr("app.web.health.PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(held.config, "refresh", look)
    for path in ("/health", "/health", "/setup/status"):
        assert (await calls.get(path)).status_code == 200
    assert (await calls.get("/health")).json()["components"]["data_root"][
        "reason"
    ] == "the disk does not answer"
    assert looks == 1  # each more would hold a thread that others need
    released.set()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
words = st.text() | st.sampled_from(["\0", "..", "/etc", "\u202e", "x" * 70_000, "CON", "PROJ-1", "project"])
FIELDS = {
    "equipment_id": words,
    "template_path": words,
    "label": words,
    "operator": words,
    "objective": words,
    "lims_project": st.dictionaries(words, json_values, max_size=4),
    "variables": st.dictionaries(words, json_values, max_size=4),
    "readme_extra": st.dictionaries(words, json_values, max_size=4),
}
projects = st.fixed_dictionaries({"kind": st.just("project")}, optional=FIELDS)
runs = st.fixed_dictionaries(
    {"kind": st.just("run"), "run_kind": st.sampled_from(["experimental", "test"])},
    optional=FIELDS | {"project_short_id": words, "run_date": words | st.none()},
)


@configured(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=projects | runs | json_values)
def test_no_body_whatever_answers_500(http: httpx.Client, lab: Path, asked: object) -> None:
    whole = body(lab, "project") | asked if isinstance(asked, dict) and "kind" in asked else asked
    for sent in (asked, whole):
        content = json.dumps(sent).encode()
        answer = http.post("/sessions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (201, 413, 422), answer.text
        if answer.status_code == 201 and answer.json()["state"] != "failed":
            http.post(f"/sessions/{answer.json()['session_id']}/cancel", json={})


@configured(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/sessions", "/operations", "/sessions/x/events", "/sessions/x/log", "/health"]),
    query=st.dictionaries(
        st.sampled_from(["state", "kind", "label", "since", "limit", "after", "next", "x"]),
        st.text(st.characters(codec="utf-8")) | st.integers().map(str),
        max_size=4,
    ),
    raw=st.binary(max_size=20),
)
def test_no_query_whatever_answers_500(
    http: httpx.Client, path: str, query: dict[str, str], raw: bytes
) -> None:
    for url in (
        httpx.URL(path, params=query),
        httpx.URL(f"{path}?after=" + "".join(f"%{byte:02X}" for byte in raw)),
    ):
        assert http.get(url).status_code in (200, 404, 409, 422)


def test_what_the_old_client_sends_goes_on_working(http: httpx.Client, lab: Path) -> None:
    # As the replaced service's frontend does it: it knows the seven keys, and polls.
    answer = http.post("/sessions", json=project(lab))
    session_id = answer.json()["session_id"]
    states = eventually(lambda: http.get(f"/sessions/{session_id}").json()["state"] == "done" and "done")
    old = ("session_id", "state", "current_phase", "next_action", "pending_input", "error", "result")
    handle = http.get(f"/sessions/{session_id}").json()
    assert states == "done" and all(key in handle for key in old)
    assert handle["current_phase"] == "done" and handle["next_action"] == "none"
