"""Who may come in, and with what: the guard and the check of bodies, on a real socket."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from app.demo import laboratory
from tests.service import Service, running

FRIEND = "https://lab.example:8443"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = laboratory.build(tmp_path_factory.mktemp("lab"))
    config.write_text(f"{config.read_text()}\n  origins: [{FRIEND!r}]\n")
    with running(config, "--hold") as one:
        yield one


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def port_of(service: Service) -> int:
    return int(service.url.rpartition(":")[2])


def told(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
def test_a_host_of_ours_is_let_in(http: httpx.Client, service: Service, host: str) -> None:
    assert http.get("/ready", headers={"Host": f"{host}:{port_of(service)}"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost:x", "a@localhost", ""]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_a_foreign_host_is_refused(http: httpx.Client, host: str, method: str) -> None:
    answer = http.request(method, "/health", headers={"Host": host})
    assert answer.status_code == 403
    assert method == "HEAD" or told(answer) == (403, "forbidden")


def test_an_origin_of_ours_is_let_in(http: httpx.Client, service: Service) -> None:
    for host in ("127.0.0.1", "localhost"):
        answer = http.get("/ready", headers={"Origin": f"http://{host}:{port_of(service)}"})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://localhost:3000", "http://localhost", "null", "", f"{FRIEND}0", "x"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_origin_is_refused(http: httpx.Client, origin: str, method: str) -> None:
    headers = JSON | {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = http.request(method, "/sessions", headers=headers)
    assert told(answer) == (403, "forbidden") and "access-control-allow-origin" not in answer.headers


def test_a_page_that_the_config_names_may_read_the_answer_and_the_error(http: httpx.Client) -> None:
    for path in ("/ready", "/nothing"):
        headers = http.get(path, headers={"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}).headers
        assert headers["access-control-allow-origin"] == FRIEND and headers["vary"] == "Origin"
        assert "x-trace-id" in headers["access-control-expose-headers"].lower()


def test_a_page_that_the_config_names_may_ask_before_it_posts(http: httpx.Client) -> None:
    asked = {
        "Origin": FRIEND,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,idempotency-key",
        "Access-Control-Request-Private-Network": "true",
    }
    answer = http.options("/sessions", headers=asked)
    assert answer.status_code == 204 and answer.content == b""
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "idempotency-key" in answer.headers["access-control-allow-headers"].lower()
    assert answer.headers["access-control-allow-private-network"] == "true"


def test_a_page_that_the_config_names_may_post(http: httpx.Client) -> None:
    answer = http.post("/sessions", json={}, headers={"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"})
    assert told(answer) == (422, "validation_failed")


def test_another_site_may_not_change_anything_even_if_it_hides_its_origin(http: httpx.Client) -> None:
    answer = http.post("/sessions", json={}, headers={"Sec-Fetch-Site": "cross-site"})
    assert told(answer) == (403, "forbidden")
    assert http.get("/ready", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_a_socket_from_a_foreign_page_is_accepted_and_closed_with_4403(service: Service, origin: str) -> None:
    url = service.url.replace("http", "ws", 1)
    for path in ("/api/v1/events", "/api/v1/sessions/x/events"):
        with connect(url + path, additional_headers={"Origin": origin}, proxy=None) as client:
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=20)
            assert client.close_code == 4403


def test_a_socket_from_a_page_that_the_config_names_is_let_in(service: Service) -> None:
    url = service.url.replace("http", "ws", 1) + "/api/v1/sessions/x/events"
    with connect(url, additional_headers={"Origin": FRIEND}, proxy=None) as client:
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=20)
        assert client.close_code == 4404


def test_a_socket_with_a_foreign_host_is_closed_with_4403(service: Service) -> None:
    lines = (
        "GET /api/v1/events HTTP/1.1",
        "Host: evil.example",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    answer = raw(service, "\r\n".join(lines).encode() + b"\r\n\r\n", until=b"\x88")
    head, _, frame = answer.partition(b"\r\n\r\n")
    assert b" 101 " in head and b"x-trace-id" in head.lower()
    assert struct.unpack("!H", frame[2:4]) == (4403,)


def raw(service: Service, request: bytes, until: bytes = b"") -> bytes:
    """What comes back for `request`, until the connection ends or `until` has come with what follows it."""
    with socket.create_connection(("127.0.0.1", port_of(service)), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while not until or until not in answer.partition(b"\r\n\r\n")[2]:
            if not (some := connection.recv(65536)):
                break
            answer += some
        return answer


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "text/json",
        "application/json; charset=utf-16",
        "",
    ],
)
def test_a_change_that_is_not_json_is_refused(http: httpx.Client, kind: str) -> None:
    answer = http.post("/sessions", content=b"{}", headers={"Content-Type": kind} if kind else {})
    assert told(answer) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", 'application/json;charset="UTF-8"']
)
def test_json_may_name_its_charset(http: httpx.Client, kind: str) -> None:
    assert told(http.post("/sessions", content=b"{}", headers={"Content-Type": kind})) == (
        422,
        "validation_failed",
    )


def test_a_body_that_is_too_large_is_refused_before_it_is_read(service: Service) -> None:
    head = (
        "POST /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 99999999\r\nConnection: close\r\n\r\n"
    )
    answer = raw(service, head.encode())
    assert b" 413 " in answer and b'"payload_too_large"' in answer


def test_a_body_that_is_too_large_is_refused_in_chunks_too(http: httpx.Client) -> None:
    chunks = (b" " * 65536 for _ in range(5))
    assert told(http.post("/sessions", content=chunks, headers=JSON)) == (413, "payload_too_large")


def test_a_body_of_just_the_largest_size_is_read(http: httpx.Client) -> None:
    for content, expected in ((b"{}".ljust(256 * 1024), 422), (b"{}".ljust(256 * 1024 + 1), 413)):
        assert http.post("/sessions", content=content, headers=JSON).status_code == expected


@pytest.mark.parametrize(("levels", "message"), [(30, "required"), (31, "deeper"), (100_000, "deeper")])
def test_a_body_may_have_32_levels(http: httpx.Client, levels: int, message: str) -> None:
    # Two levels are the body itself and `variables`.
    content = b'{"kind":"project","variables":{"x":' + b"[" * levels + b"]" * levels + b"}}"
    answer = http.post("/sessions", content=content, headers=JSON)
    assert told(answer) == (422, "validation_failed") and message in answer.json()["error"]["message"]


def test_brackets_in_texts_are_no_levels(http: httpx.Client) -> None:
    body = {"kind": "project", "label": '\\"[[' + "[{" * 1000}
    assert "required" in http.post("/sessions", json=body).json()["error"]["message"]


@pytest.mark.parametrize("content", [b'"' + b'\\"' * 120_000, b'\\"' * 120_000, b"[]" * 120_000, b'"\\'])
def test_a_hostile_body_takes_no_time(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/sessions", content=content, headers=JSON, timeout=5)
    assert told(answer) == (422, "validation_failed")


def test_a_sane_trace_id_is_echoed(http: httpx.Client) -> None:
    for given in ("abc", "~" * 128, "a b"):
        answer = http.get("/nothing", headers={"X-Trace-Id": given})
        assert answer.headers["x-trace-id"] == answer.json()["error"]["trace_id"] == given


@pytest.mark.parametrize("given", [b"~" * 129, b"a\tb", "ü".encode(), b""])
def test_a_trace_id_that_is_not_sane_is_replaced(http: httpx.Client, given: bytes) -> None:
    answer = http.get("/nothing", headers={b"X-Trace-Id": given})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-trace-id"])
    assert answer.json()["error"]["trace_id"] == answer.headers["x-trace-id"]


def test_a_refusal_of_the_guard_has_a_trace_id_and_the_log_line_has_it_too(
    http: httpx.Client, service: Service
) -> None:
    answer = http.get("/ready", headers={"Host": "evil.example", "X-Trace-Id": "find-me"})
    assert answer.headers["x-trace-id"] == answer.json()["error"]["trace_id"] == "find-me"
    lines = [json.loads(line) for line in service.errors.read_text().splitlines() if "find-me" in line]
    assert [line["event_id"] for line in lines] == ["http.forbidden"]


@pytest.mark.parametrize(
    "path", ["/ready", "/health", "/sessions", "/operations", "/templates", "/setup/status"]
)
def test_head_answers_as_get_does_without_the_body(http: httpx.Client, path: str) -> None:
    head, full = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == full.headers["content-type"]


def test_head_of_what_is_not_there_has_no_body_either(http: httpx.Client) -> None:
    assert (http.head("/nothing").status_code, http.head("/nothing").content) == (404, b"")
    assert http.head("/sessions/x/resume").status_code == 405


def test_nobody_is_told_what_the_service_runs_on(http: httpx.Client) -> None:
    headers: dict[str, Any] = dict(http.get("/ready").headers)
    assert "server" not in headers and headers["x-content-type-options"] == "nosniff"


def test_a_mended_config_names_another_origin_without_a_restart(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    with running(config, "--hold") as service, service.http() as http:
        assert http.get("/ready", headers={"Origin": FRIEND}).status_code == 403
        config.write_text(f"{config.read_text()}\n  origins: [{FRIEND!r}]\n")
        http.get("/setup/status")
        assert http.get("/ready", headers={"Origin": FRIEND}).status_code == 200


def test_the_address_that_the_service_is_told_to_listen_on_is_a_host_of_ours(tmp_path: Path) -> None:
    with (
        running(laboratory.build(tmp_path), "--hold", "--host", "127.0.0.2") as service,
        service.http() as http,
    ):
        assert http.get("/ready").status_code == 200
        assert http.get("/ready", headers={"Host": "127.0.0.3"}).status_code == 403
