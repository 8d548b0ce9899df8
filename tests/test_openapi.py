"""The document of the API tells all of it, and its page needs no internet."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar.routes import HTTPRoute

from app.demo import laboratory
from app.main import House
from app.settings import ConfigFile
from app.web import doors, errors
from tests.service import body, running


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laboratory.build(tmp_path_factory.mktemp("lab")).parent


@pytest.fixture(scope="module")
def http(lab: Path) -> Iterator[httpx.Client]:
    with (
        running(lab / "config.yaml", "--hold") as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/schema/openapi.json").raise_for_status().json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def codes(operation: dict[str, Any]) -> dict[str, int]:
    """The error codes that an operation documents, with their status."""
    return {
        code: int(status)
        for status, answer in operation["responses"].items()
        if int(status) >= 400
        for code in answer["content"]["application/json"]["examples"]
    }


def test_every_route_is_in_the_document(document: dict[str, Any], lab: Path) -> None:
    house = House(ConfigFile(lab / "config.yaml"), held=True)
    app = doors.litestar(
        store=house.store, runner=house.runner, feed=house.feed, config=house.config, isolation=dict
    )
    routes = {
        f"{method} {route.path_format}"
        for route in app.routes
        if isinstance(route, HTTPRoute) and route.path.startswith("/api/")
        for method in route.methods
        if method != "OPTIONS"
    }
    assert routes and set(operations(document)) == routes


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    found = operations(document).values()
    assert all(operation["description"] and operation["tags"] for operation in found)
    assert len({operation["operationId"] for operation in found}) == len(found)


def test_every_documented_error_has_its_status(document: dict[str, Any]) -> None:
    for operation in operations(document).values():
        assert codes(operation).items() <= errors.STATUS.items()
        assert {"forbidden", "internal_error"} <= codes(operation).keys()


def test_every_code_is_documented(document: dict[str, Any]) -> None:
    told = {code for operation in operations(document).values() for code in codes(operation)}
    everywhere = {code for code in errors.STATUS if f"`{code}`" in document["info"]["description"]}
    assert told | everywhere == errors.STATUS.keys()
    assert document["components"]["schemas"]["Wrong"]["properties"]["code"]["enum"] == list(errors.STATUS)


def test_every_command_documents_what_it_is_refused_with(document: dict[str, Any]) -> None:
    every = {
        "validation_failed",
        "payload_too_large",
        "unsupported_media_type",
        "setup_incomplete",
        "store_unavailable",
    }
    own = {
        "sessions": {"idempotency_key_reused", "shutting_down"},
        "resume": {
            "session_not_found",
            "session_already_completed",
            "session_not_awaiting_input",
            "prompt_not_open",
            "input_invalid",
            "shutting_down",
        },
        "cancel": {"session_not_found", "session_already_completed", "too_late_to_cancel"},
        "retry": {"session_not_found", "session_not_retryable", "idempotency_key_reused", "shutting_down"},
    }
    commands = {
        name: operation for name, operation in operations(document).items() if name.startswith("POST")
    }
    found = {name.rpartition("/")[2]: codes(operation).keys() for name, operation in commands.items()}
    assert found == {
        name: refusals | every | {"forbidden", "internal_error"} for name, refusals in own.items()
    }


def test_the_two_bodies_are_told_apart_by_their_kind(document: dict[str, Any]) -> None:
    body = document["paths"]["/api/v1/sessions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema["discriminator"]["propertyName"] == "kind"
    mapping = schema["discriminator"]["mapping"]
    assert set(mapping) == {"project", "run"}
    assert {member["$ref"] for member in schema["oneOf"]} == set(mapping.values())
    for kind, reference in mapping.items():
        record = document["components"]["schemas"][reference.rpartition("/")[2]]
        assert record["properties"]["kind"]["const"] == kind and "kind" in record["required"]


def test_no_body_takes_an_unknown_field(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ProjectBody", "RunBody", "ResumeBody", "CancelBody", "RetryBody"):
        assert schemas[name]["additionalProperties"] is False


def test_every_kind_of_event_is_documented(document: dict[str, Any]) -> None:
    items = document["components"]["schemas"]["Page"]["properties"]["events"]["items"]
    expected = {
        "phase",
        "progress",
        "input_required",
        "input_received",
        "warning",
        "recovered",
        "done",
        "failed",
    }
    assert set(items["discriminator"]["mapping"]) == expected
    answers = document["paths"]["/api/v1/sessions/{session_id}/events"]["get"]["responses"]
    assert "text/event-stream" in answers["200"]["content"] and "204" in answers


def test_every_reference_leads_somewhere(document: dict[str, Any], http: httpx.Client) -> None:
    text = http.get("/schema/openapi.json").text
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names and names <= set(document["components"]["schemas"])


def test_the_sockets_and_their_close_codes_are_told_in_words(document: dict[str, Any]) -> None:
    words = document["info"]["description"]
    assert "WS /api/v1/events" in words and "WS /api/v1/sessions/{session_id}/events" in words
    assert all(str(code) in words for code in (1000, 1001, 1011, 1012, *errors.CLOSE_CODES.values()))


def test_a_handle_has_every_documented_key(document: dict[str, Any], http: httpx.Client, lab: Path) -> None:
    handle = http.post("/api/v1/sessions", json=body(lab, "project")).json()
    schema = document["components"]["schemas"]["Handle"]
    assert set(handle) == set(schema["required"]) == set(schema["properties"]) - {"request"}


@pytest.mark.parametrize("path", ["/schema", "/schema/swagger"])
def test_the_page_needs_nothing_from_the_internet(http: httpx.Client, path: str) -> None:
    page = http.get(path).raise_for_status().text
    assert "//" not in page and "validatorUrl: null" in page
    wanted = re.findall(r'(?:src|href|url)(?:=|: )"(/[^"]+)"', page)
    assert {name.rpartition("/")[2] for name in wanted} == {
        "swagger-ui.css",
        "swagger-ui-bundle.js",
        "swagger-ui-standalone-preset.js",
        "openapi.json",
    }
    for name in wanted:
        answer = http.get(name)
        assert answer.status_code == 200 and answer.content
        assert answer.headers["content-type"].split(";")[0].rpartition("/")[2] in {
            "css",
            "javascript",
            "vnd.oai.openapi+json",
        }


def test_head_works_for_the_documents_too(http: httpx.Client) -> None:
    for path in ("/schema", "/schema/openapi.json", "/schema/vendor/swagger-ui.css"):
        assert (http.head(path).status_code, http.head(path).content) == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/schema/nothing",
        "/schema/nothing.json",
        "/schema/vendor/nothing",
        "/schema/vendor/../../doors.py",
        "/schema/vendor/%2e%2e/%2e%2e/doors.py",
    ],
)
def test_what_is_not_there_is_told_as_everywhere(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
