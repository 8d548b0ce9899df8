"""The service as its users meet it: curl, many viewers, many creations at once, cancels and restarts.

A real process on a real laboratory; what is looked at is what anybody could see: answers, frames, files.
"""

import asyncio
import getpass
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from app.demo import laboratory
from tests.offspring import offspring
from tests.service import PATIENCE, Service, bare_run, body, ended, eventually, running, template

FILES = {
    "README.md",
    ".exlab-answers.yml",
    ".exlab-wizard/creation.json",
    ".exlab-wizard/readme_fields.json",
}
ROAD = [
    "validating_inputs",
    "rendering_template",
    "running_plugins",
    "writing_cache",
    "validating_post_creation",
    "queueing_nas_sync",
]
LOOP = "{%% for i in range(%d) %%}{%% for j in range(1000) %%}{%% endfor %%}{%% endfor %%}"
# Rendered within seconds, or never; the folder is there before the file in it is begun.
SLOW = {"work/long.txt.jinja": LOOP % 12_000}
ENDLESS = {"work/long.txt.jinja": LOOP % 99_999 * 100}
OTHER_GROUP, OTHER_USER = 4242, 4243

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: a group that this process is not in")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laboratory.build(tmp_path_factory.mktemp("lab")).parent


@pytest.fixture(scope="module")
def service(lab: Path) -> Iterator[Service]:
    template(lab, "endless", ENDLESS)
    with running(lab / "config.yaml") as one:
        yield one


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def curl(service: Service, path: str, asked: object = None) -> tuple[int, Any]:
    """The status and the body, by the program that everybody has."""
    sent = ["-H", "Content-Type: application/json", "-d", json.dumps(asked)] if asked is not None else []
    command = ["curl", "-sS", "-m", "60", "-w", "\n%{http_code}", *sent, f"{service.url}/api/v1{path}"]
    text, _, status = subprocess.run(command, check=True, capture_output=True, text=True).stdout.rpartition(
        "\n"
    )
    return int(status), json.loads(text)


def made_by_curl(service: Service, asked: dict[str, Any]) -> dict[str, Any]:
    status, handle = curl(service, "/sessions", asked)
    assert (status, handle["state"]) == (201, "rendering")

    def done() -> dict[str, Any] | None:
        now: dict[str, Any] = curl(service, f"/sessions/{handle['session_id']}")[1]
        return now if now["state"] == "done" else None

    return eventually(done)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def front_matter(folder: Path) -> tuple[Any, str]:
    """The front matter of README.md, and what stands below it."""
    opening, front, below = (folder / "README.md").read_text().split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front), below


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {str(path) for path in found if not path.parts[0].startswith(("Run_", "TestRuns"))}


def second(handle: dict[str, Any]) -> str:
    """When a session was opened, as provenance writes it."""
    return f"{handle['created_at'][:19]}Z"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is the client here")
def test_a_project_and_its_runs_are_made_with_curl_alone(service: Service, lab: Path) -> None:
    root, templates = lab / "data", lab / "templates"
    project = made_by_curl(service, body(lab, "project", lims_project={"short_id": "PROJ-50", "uid": "u-7"}))
    folder = root / "CONFOCAL_01" / "PROJ-50"
    assert project["result"] == {
        "path": str(folder),
        "sync_status": "pending",
        "blocked": False,
        "findings": [],
        "findings_total": 0,
        "warnings": [],
    }
    lims = {"uid": "u-7", "short_id": "PROJ-50", "name_at_creation": "Cortex pilot"}
    assert files_below(folder) == FILES | {"plan.csv", "protocols/about.txt"}
    assert read(folder / ".exlab-wizard" / "creation.json") == {
        "schema_version": "1.9",
        "created_at": second(project),
        "created_by": getpass.getuser(),
        "level": "project",
        "run_kind": "experimental",
        "lims_project": lims,
        "template": {"name": "project", "version": "1.0", "source_path": str(templates / "project")},
        "variables": {"organism": "mouse", "biosafety_level": 1},
        "paths": {"local": str(folder), "nas": "//nas01/lab/CONFOCAL_01/PROJ-50"},
        "session_id": project["session_id"],
    }

    at = "2026-04-17T14:32:05+02:00"
    extra = {"fixation": "PFA 4 %", "irb_protocol": "IRB-9", "Room": "2.17", "Weather": "rain"}
    asked = body(lab, "confocal_run", project_short_id="PROJ-50", run_date=at, readme_extra=extra)
    run = made_by_curl(service, asked)
    folder = root / "CONFOCAL_01" / "PROJ-50" / "Run_2026-04-17T14-32-05"
    assert files_below(folder) == FILES | {
        "acquisition/settings.yaml",
        "acquisition/z_stack.yaml",
        "raw/about.txt",
    }
    core = {key: asked[key] for key in ("label", "operator", "objective")}
    layers = {
        "template_fields": {"fixation": "PFA 4 %"},
        "config_fields": {"irb_protocol": "IRB-9"},
        "custom_fields": [{"label": "Room", "value": "2.17"}, {"label": "Weather", "value": "rain"}],
    }
    system = {
        "created": second(run),
        "created_by": getpass.getuser(),
        "equipment": {"id": "CONFOCAL_01", "label": "Confocal microscope 1"},
        "template": {"name": "confocal_run", "version": "1.2"},
        "project": "PROJ-50",
        "run": folder.name,
        "run_kind": "experimental",
    }
    assert read(folder / ".exlab-wizard" / "creation.json") == {
        "schema_version": "1.9",
        "created_at": second(run),
        "created_by": getpass.getuser(),
        "level": "run",
        "run_kind": "experimental",
        "lims_project": lims,
        "template": {
            "name": "confocal_run",
            "version": "1.2",
            "source_path": str(templates / "confocal_run"),
            "run_scope": "both",
        },
        "variables": asked["variables"],
        "paths": {"local": str(folder), "nas": f"//nas01/lab/CONFOCAL_01/PROJ-50/{folder.name}"},
        "session_id": run["session_id"],
    }
    assert read(folder / ".exlab-wizard" / "readme_fields.json") == {
        "schema_version": "1.1",
        "generated_at": second(run),
        "core_fields": core,
        **layers,
        "system_fields": system,
    }
    front, below = front_matter(folder)
    assert front == {"readme_schema_version": "1.1", **core, **layers, "system": system}
    assert below.startswith("\n# cortex slice 12\n\nBaseline before the second staining\n")

    test = made_by_curl(service, body(lab, "plate_reader_test_run", run_date="2026-04-17T14:32:05"))
    folder = root / "READER_01" / "PROJ-1" / "TestRuns" / "TestRun_2026-04-17T14-32-05"
    assert test["destination"] == test["result"]["path"] == str(folder)
    assert files_below(folder) == FILES | {"layout.csv", "raw/about.txt"}
    made = read(folder / ".exlab-wizard" / "creation.json")
    assert (made["level"], made["run_kind"]) == ("run", "test")
    assert front_matter(folder)[0]["system"]["run_kind"] == "test"

    registered = read(root / "CONFOCAL_01" / ".exlab-wizard" / "equipment.json")
    stamps = {registered.pop("first_seen_at"), registered.pop("last_modified_at")}
    assert len(stamps) == 1 and stamps.pop() >= second(project)
    assert registered == {
        "schema_version": "1.0",
        "id": "CONFOCAL_01",
        "label": "Confocal microscope 1",
        "configured_local_root": "data",
        "configured_nas_root": "//nas01/lab",
    }
    assert curl(service, "/sessions", {"kind": "run"})[0] == 422
    assert curl(service, f"/sessions/{run['session_id']}/cancel", {})[0] == 409


@needs_root
@pytest.mark.parametrize("acl", [False, True], ids=["setgid", "setgid and an ACL default"])
def test_what_is_published_has_the_rights_of_what_is_made_in_place(
    http: httpx.Client, lab: Path, acl: bool
) -> None:
    equipment = lab / "data" / "READER_01"
    shutil.rmtree(equipment, ignore_errors=True)
    equipment.mkdir()
    os.chown(equipment, OTHER_USER, OTHER_GROUP)
    equipment.chmod(0o2770)
    if acl:
        granted = f"u:{OTHER_USER}:rwx,g::rwx,o::---,m::rwx"
        subprocess.run(["setfacl", "-d", "-m", granted, str(equipment)], check=True)
    subprocess.run(["mkdir", "-p", "reference/folder"], cwd=equipment, check=True)
    subprocess.run(["cp", "/proc/version", "reference/folder/file"], cwd=equipment, check=True)
    subprocess.run("echo > reference/folder/written", cwd=equipment, check=True, shell=True)
    folder, file = (
        rights(equipment / "reference" / "folder"),
        rights(equipment / "reference" / "folder" / "written"),
    )
    shutil.rmtree(equipment / "reference")

    session = http.post("/sessions", json=body(lab, "plate_reader_test_run")).json()
    assert ended(http, session["session_id"])["state"] == "done"
    published = list(equipment.rglob("*"))
    assert Path(session["destination"]) in published and file[1] == OTHER_GROUP
    for path in published:
        assert rights(path) == (folder if path.is_dir() else file), path


def rights(path: Path) -> tuple[int, int, str, str]:
    status = path.lstat()
    listed = subprocess.run(["getfacl", "-cpn", str(path)], check=True, capture_output=True, text=True)
    return status.st_uid, status.st_gid, stat.filemode(status.st_mode), listed.stdout


# Histories


async def watched(service: Service, session_id: str, query: str = "") -> list[bytes]:
    """What a viewer is sent until the connection is closed with 1000."""
    async with socket(service, f"/sessions/{session_id}/events{query}") as viewer:
        return await received(viewer)


def socket(service: Service, path: str) -> connect:
    return connect(f"{service.url.replace('http', 'ws', 1)}/api/v1{path}", open_timeout=PATIENCE, proxy=None)


async def received(viewer: ClientConnection) -> list[bytes]:
    frames = []
    try:
        while True:
            frame = await viewer.recv()
            frames.append(frame.encode() if isinstance(frame, str) else frame)
    except ConnectionClosed:
        assert viewer.close_code == 1000
    return frames


def paged(http: httpx.Client, session_id: str) -> bytes:
    return http.get(f"/sessions/{session_id}/events").content


def streamed(http: httpx.Client, session_id: str) -> list[bytes]:
    headers = {"Accept": "text/event-stream"}
    with http.stream("GET", f"/sessions/{session_id}/events", headers=headers) as answer:
        return [line[6:].encode() for line in answer.iter_lines() if line.startswith("data: ")]


def as_page(frames: list[bytes]) -> bytes:
    return b'{"events":[' + b",".join(frames) + b"],"


def unmounted(lab: Path) -> Path:
    """Take the mark of the data root away, as if its disk were not mounted."""
    return (lab / "data" / ".exlab-sessions").rename(lab / "data" / "away")


def mounted(lab: Path) -> None:
    (lab / "data" / "away").rename(lab / "data" / ".exlab-sessions")


async def test_a_history_is_the_same_to_the_byte_for_everyone_whenever_they_come(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    with running(config) as service, service.http() as http:
        ended(http, http.post("/sessions", json=body(tmp_path, "project")).json()["session_id"])
        unmounted(tmp_path)
        handle = (await asyncio.to_thread(http.post, "/sessions", json=body(tmp_path, "confocal_run"))).json()
        assert (handle["state"], handle["blocked_on"]["code"]) == ("validating", "not_mounted")
        session_id, seen = handle["session_id"], handle["head_seq"]
        fifty = [
            asyncio.create_task(watched(service, session_id, "?after=0" if number % 2 else ""))
            for number in range(50)
        ]
        text = asyncio.create_task(watched(service, session_id, "?after=0&frames=text"))
        sse = asyncio.create_task(asyncio.to_thread(streamed, service.http(), session_id))
        middle = asyncio.create_task(watched(service, session_id, f"?after={seen}"))
        await asyncio.to_thread(eventually, lambda: followers(http) == 53)
        mounted(tmp_path)
        whole, *others = await asyncio.gather(*fifty)
        assert whole and all(other == whole for other in others)
        assert await text == await sse == whole and await middle == whole[seen:]
        assert [json.loads(frame)["seq"] for frame in whole] == list(range(1, len(whole) + 1))
        assert await watched(service, session_id, "?after=0") == whole
        assert paged(http, session_id).startswith(as_page(whole))
        assert service.stop() == 0

    with running(config) as service, service.http() as http:
        assert await watched(service, session_id, "?after=0") == whole
        assert await watched(service, session_id) == whole
        assert await watched(service, session_id, "?after=0&frames=text") == whole
        assert await watched(service, session_id, "?after=3") == whole[3:]
        assert await asyncio.to_thread(streamed, http, session_id) == whole
        assert paged(http, session_id).startswith(as_page(whole))


def followers(http: httpx.Client) -> int:
    return int(http.get("/health").json()["components"]["streams"]["followers"])


async def test_the_client_of_the_replaced_service_goes_on_working(
    service: Service, http: httpx.Client, lab: Path
) -> None:
    asked = body(lab, "confocal_run", project_short_id="PROJ-60")
    answer = http.post("/sessions", json=asked)
    handle = answer.json()
    assert answer.status_code == 201
    session_id = handle["session_id"]
    old = ("session_id", "state", "current_phase", "next_action", "pending_input", "error", "result")
    assert [handle[key] for key in old[1:]] == ["rendering", "rendering_template", "none", None, None, None]
    async with socket(service, f"/sessions/{session_id}/events") as viewer:
        assert isinstance(await viewer.recv(), bytes)
    frames = [json.loads(frame) for frame in await watched(service, session_id)]
    known = [frame for frame in frames if frame["kind"] in ("phase", "progress", "warning", "done", "failed")]
    assert [frame["phase"] for frame in known if frame["kind"] == "phase"] == ROAD
    assert all(
        {"phase", "current", "total"} <= frame.keys() for frame in known if frame["kind"] == "progress"
    )
    assert [frame["kind"] for frame in known[-1:]] == ["done"]
    now = http.get(f"/sessions/{session_id}").json()
    assert (now["state"], now["current_phase"], now["result"]) == ("done", "done", known[-1]["result"])
    for command, empty in (("resume", {"extra_inputs": {"x": 1}}), ("cancel", {"discard_files": True})):
        refused = http.post(f"/sessions/{session_id}/{command}", json=empty)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_already_completed")
    refused = http.get("/sessions/unknown")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "session_not_found")


# Many at once


def test_thirty_two_creations_at_once_do_not_meet(http: httpx.Client, lab: Path) -> None:
    runs = [
        body(
            lab, "confocal_run", project_short_id="PROJ-70", label=f"run {number}", objective=f"aim {number}"
        )
        | {"variables": {"sample": f"sample {number}"}}
        for number in range(30)
    ]
    projects = [
        body(lab, "project", lims_project={"short_id": f"PROJ-{number}"}, label=f"project {number}")
        for number in (71, 72)
    ]

    every = [*runs[:15], *projects, *runs[15:]]
    with ThreadPoolExecutor(len(every)) as hands:
        answers = list(hands.map(lambda asked: http.post("/sessions", json=asked), every))
    handles = [ended(http, answer.json()["session_id"]) for answer in answers]
    assert {handle["state"] for handle in handles} == {"done"}
    assert len({handle["destination"] for handle in handles}) == len(handles)
    for asked, handle in zip(every, handles, strict=True):
        folder = Path(handle["destination"])
        made = read(folder / ".exlab-wizard" / "creation.json")
        front, below = front_matter(folder)
        heading = asked["variables"].get("sample", asked["label"])
        assert made["session_id"] == handle["session_id"] and made["variables"] == asked["variables"]
        assert made["paths"]["local"] == str(folder)
        assert [front[key] for key in ("label", "objective")] == [asked["label"], asked["objective"]]
        assert below.startswith(f"\n# {heading}\n\n{asked['objective']}\n")
        assert (
            yaml.safe_load((folder / ".exlab-answers.yml").read_text()).items() >= asked["variables"].items()
        )
        if asked["kind"] == "run":
            assert folder.parent.name == "PROJ-70" and front["system"]["run"] == folder.name
            settings = yaml.safe_load((folder / "acquisition" / "settings.yaml").read_text())
            assert settings["sample"] == heading
    assert list((lab / "data" / ".exlab-sessions").iterdir()) == []


def test_one_key_at_once_and_afterwards_makes_one_session(http: httpx.Client, lab: Path) -> None:
    asked = body(lab, "confocal_run", project_short_id="PROJ-75")

    def make(_: int) -> httpx.Response:
        return http.post("/sessions", json=asked, headers={"Idempotency-Key": "k-75"})

    with ThreadPoolExecutor(8) as hands:
        answers = list(hands.map(make, range(8)))
    made = {answer.json()["session_id"] for answer in answers}
    assert {answer.status_code for answer in answers} == {201} and len(made) == 1
    assert ended(http, made.copy().pop())["state"] == "done"
    assert make(9).json()["state"] == "done"
    refused = http.post("/sessions", json=asked | {"label": "x"}, headers={"Idempotency-Key": "k-75"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(list((lab / "data" / "CONFOCAL_01" / "PROJ-75").iterdir())) == 1


# Cancelled, tried again, stopped


def rendering(lab: Path, http: httpx.Client, asked: dict[str, Any]) -> dict[str, Any]:
    """The handle of a session whose slow file is being rendered."""
    handle: dict[str, Any] = http.post("/sessions", json=asked).json()
    staging = lab / "data" / ".exlab-sessions" / handle["session_id"]
    eventually(lambda: list(staging.glob("*/tree/work")))
    return handle


def forks(service: Service) -> set[int]:
    """The children of the workers: each is one render."""
    workers = {pid for pid in offspring(service.process.pid) if offspring(pid)}
    return {pid for worker in workers for pid in offspring(worker)}


@pytest.mark.parametrize("discard", [True, False], ids=["discarding", "keeping"])
def test_a_cancel_stops_the_render_and_says_what_became_of_the_files(
    service: Service, http: httpx.Client, lab: Path, discard: bool
) -> None:
    handle = rendering(lab, http, bare_run("endless", project_short_id="PROJ-80"))
    assert forks(service)
    answer = http.post(f"/sessions/{handle['session_id']}/cancel", json={"discard_files": discard})
    assert answer.status_code == 200
    aborted = answer.json()
    receipt = aborted["error"]["details"]
    assert (aborted["state"], aborted["current_phase"], aborted["next_action"]) == ("aborted", None, "none")
    assert aborted["error"]["code"] == "cancelled"
    assert (receipt["discard_files"], receipt["discarded"], receipt["stopped"]) == (
        discard,
        discard,
        ["rendering"],
    )
    assert not forks(service)
    assert not Path(handle["destination"]).exists()
    kept = lab / "data" / ".exlab-sessions" / handle["session_id"]
    if discard:
        assert receipt["partial_path"] is None and not kept.exists()
    else:
        partial = Path(receipt["partial_path"])
        assert partial.is_relative_to(kept) and (partial / "work").is_dir()
        assert http.get("/health").json()["components"]["partial_trees"]["count"] >= 1
    last = http.get(f"/sessions/{handle['session_id']}/events").json()["events"][-1]
    assert (last["kind"], last["phase"], last["error"]) == ("failed", "rendering_template", aborted["error"])
    again = http.post(f"/sessions/{handle['session_id']}/cancel", json={})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "session_already_completed")


def test_an_aborted_session_is_tried_again_with_what_was_wrong_changed(http: httpx.Client, lab: Path) -> None:
    at = "2026-05-01T08:00:00"
    asked = body(lab, "confocal_run", project_short_id="PROJ-81", template_path="endless", run_date=at)
    first = rendering(lab, http, asked)
    http.post(f"/sessions/{first['session_id']}/cancel", json={"discard_files": True})
    changes = {"template_path": "confocal_run", "label": "second try", "run_date": "2026-05-01T09:00:00"}
    answer = http.post(f"/sessions/{first['session_id']}/retry", json={"changes": changes})
    assert answer.status_code == 201 and answer.json()["retry_of"] == first["session_id"]
    done = ended(http, answer.json()["session_id"])
    assert done["state"] == "done" and done["request"].items() >= (asked | changes).items()
    assert done["destination"].endswith("PROJ-81/Run_2026-05-01T09-00-00")
    assert front_matter(Path(done["destination"]))[0]["label"] == "second try"


def test_two_cancels_at_once_are_one(http: httpx.Client, lab: Path) -> None:
    handle = rendering(lab, http, bare_run("endless", project_short_id="PROJ-82"))

    def cancel(_: int) -> httpx.Response:
        return http.post(f"/sessions/{handle['session_id']}/cancel", json={"discard_files": True})

    with ThreadPoolExecutor(4) as hands:
        answers = list(hands.map(cancel, range(4)))
    codes = [answer.status_code for answer in answers]
    assert 200 in codes and set(codes) <= {200, 409}
    events = http.get(f"/sessions/{handle['session_id']}/events").json()["events"]
    assert [event["kind"] for event in events].count("failed") == 1


async def test_a_stopping_service_ends_its_streams_and_its_next_start_goes_on(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    with config.open("a") as file:
        file.write("  drain_seconds: 0\n")
    template(tmp_path, "slow", SLOW)
    with running(config) as service, service.http() as http:
        unmoved = http.post("/sessions", json=body(tmp_path, "project")).json()
        ended(http, unmoved["session_id"])
        working = await asyncio.to_thread(rendering, tmp_path, http, bare_run("slow"))
        unmounted(tmp_path)
        waiting = http.post("/sessions", json=body(tmp_path, "plate_reader_test_run")).json()
        assert waiting["blocked_on"]["code"] == "not_mounted"
        async with (
            socket(service, f"/sessions/{working['session_id']}/events?after=0") as one,
            socket(service, f"/sessions/{waiting['session_id']}/events") as two,
            socket(service, "/events") as all_,
        ):
            await asyncio.to_thread(eventually, lambda: followers(http) == 3)
            processes = offspring(service.process.pid)
            assert await asyncio.to_thread(service.stop) == 0
            for viewer in (one, two, all_):
                async with asyncio.timeout(PATIENCE):
                    await viewer.wait_closed()
                assert viewer.close_code in (1001, 1012)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    mounted(tmp_path)
    with running(config) as service, service.http() as http:
        for session in (working, waiting):
            done = ended(http, session["session_id"])
            assert (done["state"], done["recoveries"]) == ("done", 1)
            events = http.get(f"/sessions/{session['session_id']}/events").json()["events"]
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            assert [event["kind"] for event in events].count("recovered") == 1
        assert (Path(working["destination"]) / "work" / "long.txt").read_text() == ""


def test_a_service_that_drains_lets_a_running_step_end(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    template(tmp_path, "slow", SLOW)
    with running(config) as service, service.http() as http:
        handle = rendering(tmp_path, http, bare_run("slow"))
        assert service.stop() == 0
    with running(config, "--hold") as service, service.http() as http:
        stood = http.get(f"/sessions/{handle['session_id']}").json()["state"]
        assert stood not in ("validating", "rendering")


def test_whoever_asks_again_and_again_for_the_stop_gets_it_in_good_order(tmp_path: Path) -> None:
    with running(laboratory.build(tmp_path)) as service:
        while service.alive:
            service.process.terminate()
            try:
                service.process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        assert service.process.returncode == 0
