"""The client: what it makes of a service's answers, and how it follows a session through whatever happens."""

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_sockets

from app.client import Client, ClientError, Unreachable, address
from app.demo import laboratory
from tests.held import Held, holding
from tests.service import PATIENCE, Service, body, eventually, running

NOBODY = "01a20a12-0000-7000-8000-000000000000"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laboratory.build(tmp_path_factory.mktemp("client") / "lab").parent


@pytest.fixture(scope="module")
def service(lab: Path) -> Iterator[Service]:
    with running(lab / "config.yaml") as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The config of a laboratory whose service one test starts and stops."""
    return laboratory.build(tmp_path / "lab")


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    async with holding(tmp_path) as held:
        yield held


def project(lab: Path, number: int, **changes: object) -> dict[str, Any]:
    return body(lab, "project", lims_project={"short_id": f"PROJ-{number}"}, **changes)


def port_of(service: Service) -> str:
    return service.url.rpartition(":")[2]


class Following(threading.Thread):
    """Follows a session in a thread of its own, and keeps what it was given."""

    def __init__(self, url: str, session_id: str) -> None:
        super().__init__(daemon=True)
        self.frames: list[dict[str, Any]] = []
        self.losses: list[str] = []
        self.error: Exception | None = None
        self._url = url
        self._session_id = session_id
        self.start()

    def run(self) -> None:
        with Client(self._url) as client:
            try:
                for frame in client.follow(self._session_id, lost=self.losses.append):
                    self.frames.append(frame)
            except (ClientError, Unreachable) as error:
                self.error = error

    def seqs(self) -> list[int]:
        self.join(PATIENCE)
        assert not self.is_alive(), "it follows for ever"
        return [frame["seq"] for frame in self.frames]


def test_a_session_is_created_followed_to_its_end_and_shown(lab: Path, client: Client) -> None:
    made = client.create(project(lab, 100))
    frames = [*client.follow(made["session_id"])]
    assert [frame["seq"] for frame in frames] == [*range(1, len(frames) + 1)]
    assert frames[-1]["kind"] == "done"
    assert client.get(made["session_id"])["result"] == frames[-1]["result"]
    assert client.events(made["session_id"], after=frames[-2]["seq"])["events"] == frames[-1:]


def test_following_goes_on_after_the_given_event(lab: Path, client: Client) -> None:
    made = client.create(project(lab, 101))
    whole = [*client.follow(made["session_id"])]
    assert [*client.follow(made["session_id"], after=2)] == whole[2:]


def test_following_what_was_followed_to_its_end_ends_at_once(lab: Path, client: Client) -> None:
    made = client.create(project(lab, 102))
    last = [*client.follow(made["session_id"])][-1]["seq"]
    assert [*client.follow(made["session_id"], after=last)] == []


@pytest.mark.parametrize(
    ("ask", "status", "code"),
    [
        (lambda client: client.get(NOBODY), 404, "session_not_found"),
        (lambda client: client.cancel(NOBODY), 404, "session_not_found"),
        (lambda client: client.resume(NOBODY, {}), 404, "session_not_found"),
        (lambda client: client.retry(NOBODY), 404, "session_not_found"),
        (lambda client: client.log(NOBODY), 404, "session_not_found"),
        (lambda client: client.events(NOBODY), 404, "session_not_found"),
        (lambda client: client.create({"kind": "project"}), 422, "validation_failed"),
        (lambda client: [*client.follow(NOBODY)], 404, "session_not_found"),
    ],
)
def test_a_refusal_is_an_error_with_the_services_words(
    client: Client, ask: Callable[[Client], object], status: int, code: str
) -> None:
    with pytest.raises(ClientError) as refused:
        ask(client)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert refused.value.message


def test_a_refusal_names_the_field_and_the_trace(lab: Path, client: Client) -> None:
    with pytest.raises(ClientError) as refused:
        client.create(project(lab, 103, label=5))
    assert refused.value.field == "label"
    assert refused.value.details is not None
    assert refused.value.trace_id


def test_a_cursor_ahead_of_the_history_is_an_error(lab: Path, client: Client) -> None:
    made = client.create(project(lab, 104))
    with pytest.raises(ClientError) as refused:
        next(client.follow(made["session_id"], after=1000))
    assert (refused.value.status, refused.value.code) == (409, "cursor_ahead")


def test_one_key_makes_one_session(lab: Path, client: Client) -> None:
    body = project(lab, 105)
    first, again = client.create(body, key="one"), client.create(body, key="one")
    assert first["session_id"] == again["session_id"]


def test_a_failed_session_is_tried_again_with_changes(lab: Path, client: Client) -> None:
    failed = client.create(project(lab, 106, label=" "))
    assert failed["error"]["field"] == "label"
    retried = client.retry(failed["session_id"], {"label": "better"})
    assert (retried["retry_of"], retried["label"]) == (failed["session_id"], "better")
    assert [*client.follow(retried["session_id"])][-1]["kind"] == "done"


def test_an_id_is_found_by_its_beginning(lab: Path, client: Client) -> None:
    made = client.create(project(lab, 160))["session_id"]
    for beginning in (made, made.upper(), made[:13], made[:14], made.replace("-", "")[:20]):
        assert client.find(beginning) == made
    for beginning in ("", made[:7], "nonsense", made + "0"):
        with pytest.raises(ValueError, match="first 8 characters"):
            client.find(beginning)
    with pytest.raises(ClientError, match="session_not_found"):
        client.find("ffffffff")


def test_a_list_goes_on_over_its_pages(lab: Path, client: Client) -> None:
    made = [client.create(project(lab, 110 + n, label=f"paged {n}")) for n in range(5)]
    listed = client.list(label="paged ", page=2)
    assert [each["session_id"] for each in listed] == [each["session_id"] for each in reversed(made)]


def test_a_list_is_filtered(lab: Path, client: Client) -> None:
    failed = client.create(project(lab, 120, operator="", label="filtered"))
    client.create(project(lab, 121, label="filtered"))
    found = client.list(state=["failed", "aborted"], kind="project", label="filtered")
    assert [each["session_id"] for each in found] == [failed["session_id"]]
    assert [*client.list(label="filtered", before=failed["session_id"])] == []
    assert [*client.list(label="filtered", until=failed["created_at"])] == []


def test_health_templates_setup_and_log_are_told(lab: Path, client: Client) -> None:
    assert client.health()["setup_state"] == "ready"
    assert client.setup_status()["ready"] is True
    assert {each["name"] for each in client.templates()["templates"]} >= {"project", "confocal_run"}
    made = client.create(project(lab, 130))
    assert isinstance(client.log(made["session_id"])["lines"], list)


def test_a_cancel_ends_a_session_and_those_who_follow_it(own: Path) -> None:
    with running(own, "--hold") as service, Client(service.url) as client:
        session_id = client.create(project(own.parent, 1))["session_id"]
        following = Following(service.url, session_id)
        eventually(lambda: following.frames)
        assert client.cancel(session_id, discard_files=True, operator="jlee")["state"] == "aborted"
        assert following.seqs() == [1, 2]
    assert following.frames[-1]["error"]["code"] == "cancelled"


@pytest.mark.parametrize("end", [Service.stop, Service.kill])
def test_a_follower_outlives_the_service_and_gets_each_frame_once(
    own: Path, end: Callable[[Service], object]
) -> None:
    following, port = follow_held(own, end)
    with running(own, "--port", port):
        seqs = following.seqs()
    assert seqs == [*range(1, len(seqs) + 1)]
    assert following.frames[-1]["kind"] == "done"


def test_a_follower_learns_that_the_store_was_put_back(own: Path) -> None:
    following, port = follow_held(own, Service.stop)
    store = own.parent / "state" / "sessions.sqlite3"
    shutil.copy(store, store.with_suffix(".copy"))
    store.with_suffix(".copy").replace(store)
    with running(own, "--port", port):
        assert following.seqs() == [1]
    assert isinstance(following.error, ClientError)
    assert following.error.code == "cursor_ahead"


def follow_held(config: Path, end: Callable[[Service], object]) -> tuple[Following, str]:
    """Who follows a session that has only begun, on a service that has been ended; and the port it had."""
    with running(config, "--hold") as service:
        with Client(service.url) as client:
            session_id = client.create(project(config.parent, 1))["session_id"]
        following = Following(service.url, session_id)
        eventually(lambda: following.frames)
        end(service)
        eventually(lambda: following.losses)
    return following, port_of(service)


async def test_an_answer_goes_to_the_prompt_that_it_names(held: Held) -> None:
    session = await held.asking()
    with Client(held.url) as client:
        with pytest.raises(ClientError) as refused:
            await asyncio.to_thread(client.resume, session.session_id, {"dose": 1}, prompt_id="another")
        answered = await asyncio.to_thread(
            client.resume, session.session_id, {"dose": 1}, prompt_id="p1", operator="jlee"
        )
    assert (refused.value.code, refused.value.details) == ("prompt_not_open", {"prompt_id": "p1"})
    assert (answered["state"], answered["pending_input"]) == ("plugin_pass", None)


async def test_who_reads_slowly_misses_nothing(held: Held) -> None:
    session = await held.warned(await held.at_plugins(), 1000)

    def read_slowly() -> list[int]:
        with Client(held.url) as client:
            frames = client.follow(session.session_id)
            seqs = [next(frames)["seq"]]
            ready.set()
            go_on.wait(PATIENCE)
            return seqs + [frame["seq"] for frame in frames]

    ready, go_on = threading.Event(), threading.Event()
    reading = asyncio.create_task(asyncio.to_thread(read_slowly))
    assert await asyncio.to_thread(ready.wait, PATIENCE)
    ended = await held.done(session)
    go_on.set()
    assert await reading == [*range(1, ended.head_seq + 1)]


def test_the_service_is_found_by_the_note_in_its_state_folder(service: Service, lab: Path) -> None:
    assert address(lab / "state") == service.url


@pytest.mark.parametrize("note", [None, "", "[]", "{}", "nonsense"])
def test_a_state_folder_without_a_good_note_is_unreachable(tmp_path: Path, note: str | None) -> None:
    if note is not None:
        (tmp_path / "server.json").write_text(note)
    with pytest.raises(Unreachable):
        address(tmp_path)


def test_an_ipv6_host_is_written_in_brackets(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text('{"port": 80}')
    assert address(tmp_path, "::1") == "http://[::1]:80"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8321", "ftp://127.0.0.1", "http://"])
def test_what_is_no_address_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected a URL"):
        Client(url)


def test_a_port_where_nobody_listens_is_unreachable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        for ask in (client.health, lambda: client.create({}), lambda: next(client.follow(NOBODY))):
            with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
                ask()


def test_the_proxy_for_the_web_is_not_asked(
    service: Service, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Client(service.url) as direct:
        session_id = direct.create(project(lab, 140))["session_id"]
        assert [*direct.follow(session_id)][-1]["kind"] == "done"


@contextmanager
def another_program(status: int, content: bytes) -> Iterator[str]:
    """An HTTP server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "content"),
    [(200, b"<html>"), (200, b"[]"), (404, b"<html>"), (500, b'{"detail": "x"}'), (502, b"")],
)
def test_an_answer_of_another_program_is_no_answer(status: int, content: bytes) -> None:
    with another_program(status, content) as url, Client(url) as client:
        for ask in (client.health, lambda: next(client.follow(NOBODY))):
            with pytest.raises(Unreachable, match=r"not this service|does not answer"):
                ask()


@contextmanager
def losing_the_first_answer(service: Service) -> Iterator[str]:
    """A way to the service on which the first request arrives, and its answer does not come back."""
    answers: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name: self.headers[name] for name in ("Content-Type", "Idempotency-Key")}
            answers.append(httpx.post(service.url + self.path, content=content, headers=headers).content)
            if len(answers) > 1:
                self.send_response(201)
                self.send_header("Content-Length", str(len(answers[-1])))
                self.end_headers()
                self.wfile.write(answers[-1])

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url
    assert len(answers) == 2


def test_a_creation_whose_answer_was_lost_is_made_once(service: Service, lab: Path, client: Client) -> None:
    with losing_the_first_answer(service) as url, Client(url) as unlucky:
        made = unlucky.create(project(lab, 150, label="made once"))
    assert [each["session_id"] for each in client.list(label="made once")] == [made["session_id"]]


@contextmanager
def scripted(*connections: Callable[[ServerConnection], None]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server of streams that does one thing for each connection; and what each connection asked for."""
    asked: list[dict[str, str]] = []

    def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        query = parse_qs(urlsplit(connection.request.path).query)
        asked.append({name: values[0] for name, values in query.items()})
        connection.send(json.dumps({"kind": "hello", "epoch": "e", "head_seq": 9, "after": 0}))
        connections[len(asked) - 1](connection)

    with serve_sockets(handle, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", asked
        server.shutdown()


def telling(*seqs: int, close: int | None = None) -> Callable[[ServerConnection], None]:
    def tell(connection: ServerConnection) -> None:
        for seq in seqs:
            kind = "done" if seq == 9 else "news of tomorrow"
            connection.send(json.dumps({"kind": kind, "seq": seq, "at": ""}).encode())
        if close is not None:
            connection.close(close)

    return tell


def followed(url: str, **how: Any) -> list[int]:
    with Client(url) as client:
        return [frame["seq"] for frame in client.follow(NOBODY, **how)]


@pytest.mark.parametrize("code", [1001, 1011, 1012])
def test_a_follower_comes_back_with_its_cursor_and_its_epoch(code: int) -> None:
    with scripted(telling(4, 5, close=code), telling(6, 9)) as (url, asked):
        assert followed(url, after=3) == [4, 5, 6, 9]
    assert [each.get("after") for each in asked] == ["3", "5"]
    assert [each.get("epoch") for each in asked] == [None, "e"]


def test_a_frame_that_is_sent_again_is_not_given_again() -> None:
    with scripted(telling(1, 2, close=1012), telling(1, 2, 3, 9)) as (url, _):
        assert followed(url) == [1, 2, 3, 9]


def test_markers_and_what_else_has_no_number_are_not_given() -> None:
    def mark(connection: ServerConnection) -> None:
        connection.send(json.dumps({"kind": "caught_up", "seq": 7}))
        connection.send(json.dumps({"kind": "marker of tomorrow"}))
        telling(8, 9)(connection)

    with scripted(mark) as (url, _):
        assert followed(url) == [8, 9]


def test_a_connection_that_breaks_off_is_made_again() -> None:
    def break_off(connection: ServerConnection) -> None:
        telling(1)(connection)
        connection.socket.shutdown(socket.SHUT_RDWR)

    with scripted(break_off, telling(9)) as (url, _):
        assert followed(url) == [1, 9]


@pytest.mark.parametrize(
    ("close", "status", "code"),
    [(4400, 422, "cursor_invalid"), (4401, 401, "unauthorized"), (4403, 403, "forbidden")],
)
def test_a_stream_that_is_refused_is_not_asked_for_again(close: int, status: int, code: str) -> None:
    with scripted(telling(close=close)) as (url, asked):
        with pytest.raises(ClientError) as refused:
            followed(url)
        assert len(asked) == 1
    assert (refused.value.status, refused.value.code) == (status, code)


def test_a_loss_is_told_each_time() -> None:
    losses: list[str] = []
    with scripted(telling(1, close=1012), telling(2, close=1011), telling(9)) as (url, _):
        assert followed(url, lost=losses.append) == [1, 2, 9]
    assert ["1012" in losses[0], "1011" in losses[1], len(losses)] == [True, True, 2]
