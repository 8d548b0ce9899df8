"""Plugins that ask: the question survives everything, and so does what was done before it.

A real service, killed where it hurts; what is looked at is what operators see, and what ops find.
"""

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.demo import laboratory
from tests.service import Service, bare_run, ended, eventually, plugin, running, template, waiting

FILES = {f"{name}.txt": f"{name}\n" for name in ("one", "two", "three")}

APPENDS = """
def transform(self, file_path, ctx):
    with file_path.open("a") as file:
        file.write("appended\\n")
"""

ASKS_TWICE = """
def post_transform_all(self, ctx):
    (ctx.dst_root / "trace.txt").write_text("an attempt\\n")
    dose = ctx.extra_inputs.get("dose")
    if dose is None:
        raise PluginInputRequired(
            [{"id": "dose", "label": "Dose", "type": "number", "min": 1, "max": 9},
             {"id": "lot", "label": "Lot", "type": "string", "pattern": "[A-Z]{2}[0-9]+"}], "No dose is known.")
    if "sure" not in ctx.extra_inputs:
        raise PluginInputRequired([{"id": "sure", "label": "Sure?", "type": "boolean"}], f"{dose} is a lot.")
    (ctx.dst_root / "dose.txt").write_text(f"{dose} {ctx.extra_inputs['lot']} {ctx.extra_inputs['sure']}\\n")
    (ctx.dst_root / "trace.txt").unlink()

def transform(self, file_path, ctx):
    pass
"""

ASKS_FOR_EACH = """
def transform(self, file_path, ctx):
    if "name" not in ctx.extra_inputs:
        raise PluginInputRequired([{"id": "name", "label": "Name", "type": "string"}], "Who is this?")
    with file_path.open("a") as file:
        file.write(ctx.extra_inputs["name"] + "\\n")
"""

SECRET = "tr0ub4dor&3-correct-horse"
ASKS_SECRETLY = """
def transform(self, file_path, ctx):
    token = ctx.extra_inputs.get("token")
    if token is None:
        raise PluginInputRequired(
            [{"id": "token", "label": "Token", "type": "string", "secret": True},
             {"id": "user", "label": "User", "type": "string"}], "The LIMS wants to know you.")
    print("printed", token)
    Path.home().joinpath("kept-at-home").write_text("of the plugin alone")
    ctx.log.warning("logged " + token, token=token)
    if not (ctx.dst_root.parents[3] / "go").exists():
        time.sleep(20)
    (ctx.dst_root / "length.txt").write_text(f"{len(token)} {ctx.extra_inputs['user']}")
    if "again" not in ctx.extra_inputs:
        raise PluginInputRequired([{"id": "again", "label": f"x{token}x", "type": "string"}], "not " + token)
    raise PluginError("refused " + token)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    laboratory.build(tmp_path)
    return tmp_path


@pytest.fixture
def service(lab: Path) -> Iterator[Service]:
    with running(lab / "config.yaml") as one:
        yield one


def created(http: httpx.Client, name: str, **changes: Any) -> str:
    answer = http.post("/sessions", json=bare_run(name, **changes))
    assert answer.status_code == 201 and answer.json()["state"] == "rendering", answer.text
    return str(answer.json()["session_id"])


def answered(http: httpx.Client, handle: dict[str, Any], **values: object) -> dict[str, Any]:
    prompt = handle["pending_input"]["prompt_id"]
    body = {"extra_inputs": values, "prompt_id": prompt, "operator": "jlee"}
    answer = http.post(f"/sessions/{handle['session_id']}/resume", json=body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    assert (told["state"], told["pending_input"]) == ("plugin_pass", None)
    return told


def history(http: httpx.Client, session_id: str) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = http.get(f"/sessions/{session_id}/events").json()["events"]
    assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))
    return frames


def test_a_plugin_asks_twice_across_a_death_and_those_before_it_do_not_run_again(lab: Path) -> None:
    plugin(lab, "first", APPENDS)
    plugin(lab, "asks", ASKS_TWICE)
    plugin(lab, "last", APPENDS)
    name = template(lab, "asking", FILES, _exlab_plugins=["first", "asks", "last"])
    with running(lab / "config.yaml") as service, service.http() as http:
        session_id = created(http, name)
        before = waiting(http, session_id)
        service.kill()
    assert before["pending_input"]["plugin"] == "asks"
    assert [field["id"] for field in before["pending_input"]["fields"]] == ["dose", "lot"]
    with running(lab / "config.yaml") as service, service.http() as http:
        handle = http.get(f"/sessions/{session_id}").json()
        assert handle["pending_input"] == before["pending_input"]
        assert (handle["state"], handle["next_action"], handle["recoveries"]) == (
            "input_required",
            "awaiting_input",
            0,
        )
        for wrong, field in (
            ({"dose": 3}, "lot"),
            ({"dose": 11, "lot": "AB1"}, "dose"),
            ({"dose": 3, "lot": "x"}, "lot"),
        ):
            refused = http.post(f"/sessions/{session_id}/resume", json={"extra_inputs": wrong})
            assert (refused.status_code, refused.json()["error"]["field"]) == (422, field)
            assert http.get(f"/sessions/{session_id}").json()["state"] == "input_required"
        answered(http, handle, dose=3, lot="AB12", uncalled="for")
        second = waiting(http, session_id)
        assert second["pending_input"]["prompt_id"] != handle["pending_input"]["prompt_id"]
        assert second["pending_input"]["reason"] == "3 is a lot."
        late = {"extra_inputs": {"dose": 4, "lot": "AB1"}, "prompt_id": handle["pending_input"]["prompt_id"]}
        assert (
            http.post(f"/sessions/{session_id}/resume", json=late).json()["error"]["code"]
            == "prompt_not_open"
        )
        answered(http, second, sure=True)
        done = ended(http, session_id)
        kinds = [frame["kind"] for frame in history(http, session_id)]
    assert done["state"] == "done", done
    folder = Path(done["result"]["path"])
    assert {path.name: path.read_text() for path in folder.glob("*.txt")} == {
        **{name: text + "appended\nappended\n" for name, text in FILES.items()},
        "dose.txt": "3 AB12 True\nappended\n",
    }
    assert kinds.count("input_required") == kinds.count("input_received") == 2
    creation = json.loads((folder / ".exlab-wizard/creation.json").read_text())
    assert [(run["plugin"], run["status"]) for run in creation["plugins_applied"]] == [
        ("first", "success"),
        ("asks", "success"),
        ("last", "success"),
    ]
    assert creation["plugins_applied"][1]["files_affected"] == ["dose.txt"]
    assert creation["plugins_applied"][1]["isolation"]["exit_code"] == 0
    assert [(told["field"], told["value"], told["operator"]) for told in creation["plugin_inputs"]] == [
        ("dose", 3, "jlee"),
        ("lot", "AB12", "jlee"),
        ("sure", True, "jlee"),
    ]


def test_the_same_is_asked_for_each_of_three_files(lab: Path, service: Service) -> None:
    plugin(lab, "each", ASKS_FOR_EACH)
    name = template(lab, "eaching", FILES, _exlab_plugins=["each"])
    names = {"one.txt": "Ada", "three.txt": "Ben", "two.txt": "Cyd"}
    with service.http() as http:
        session_id = created(http, name)
        for file, answer in names.items():
            handle = waiting(http, session_id)
            assert handle["pending_input"]["file"] == file
            answered(http, handle, name=answer)
            eventually(partial(_asks_no_more, http, handle))
        done = ended(http, session_id)
    folder = Path(done["result"]["path"])
    assert {path.name: path.read_text() for path in folder.glob("*.txt")} == {
        file: FILES[file] + answer + "\n" for file, answer in names.items()
    }
    told = json.loads((folder / ".exlab-wizard/creation.json").read_text())["plugin_inputs"]
    assert [(entry["file"], entry["value"]) for entry in told] == list(names.items())


def test_another_try_offers_the_answers_of_the_last_one(lab: Path, service: Service) -> None:
    plugin(lab, "each", ASKS_FOR_EACH)
    name = template(lab, "eaching", {"one.txt": ""}, _exlab_plugins=["each"])
    with service.http() as http:
        session_id = created(http, name, run_date="2026-04-17T14:32:05")
        answered(http, waiting(http, session_id), name="Ada")
        assert ended(http, session_id)["state"] == "done"
        taken = http.post("/sessions", json=bare_run(name, run_date="2026-04-17T14:32:05")).json()
        assert taken["error"]["code"] == "destination_taken"
        first = created(http, name)
        answered(http, waiting(http, first), name="Bea")
        ended(http, first)
        broken = plugin(lab, "breaks", 'def transform(self, file_path, ctx):\n    raise PluginError("no")\n')
        name = template(
            lab, "breaking", {"one.txt": ""}, _exlab_plugins=["each", broken], _exlab_plugins_fatal=True
        )
        second = created(http, name)
        answered(http, waiting(http, second), name="Cyd")
        failed = ended(http, second)
        assert failed["error"]["code"] == "plugin_failed"
        assert Path(failed["error"]["details"]["partial_path"], "one.txt").read_text() == "Cyd\n"
        again = http.post(f"/sessions/{second}/retry", json={}).json()
        [field] = waiting(http, again["session_id"])["pending_input"]["fields"]
    assert field["default"] == "Cyd"


def test_twenty_answers_race_and_one_wins(lab: Path, service: Service) -> None:
    plugin(lab, "each", ASKS_FOR_EACH)
    name = template(lab, "eaching", {"one.txt": ""}, _exlab_plugins=["each"])
    with service.http() as http, ThreadPoolExecutor(20) as operators:
        handle = waiting(http, created(http, name))
        prompt = handle["pending_input"]["prompt_id"]

        def answer(number: int) -> tuple[int, str]:
            body = {"extra_inputs": {"name": f"n{number}"}, "prompt_id": prompt}
            answer = http.post(f"/sessions/{handle['session_id']}/resume", json=body)
            return answer.status_code, answer.json().get("error", {}) and answer.json()["error"]["code"]

        codes = [status for status, _ in operators.map(answer, range(20))]
        done = ended(http, handle["session_id"])
    assert sorted(codes) == [200] + [409] * 19
    assert Path(done["result"]["path"], "one.txt").read_text() == f"n{codes.index(200)}\n"


def test_the_repeat_of_an_accepted_answer_is_no_second_answer(lab: Path, service: Service) -> None:
    plugin(lab, "each", ASKS_FOR_EACH)
    name = template(lab, "eaching", {"one.txt": ""}, _exlab_plugins=["each"])
    with service.http() as http:
        handle = waiting(http, created(http, name))
        answered(http, handle, name="Ada")
        ended(http, handle["session_id"])
        body = {"extra_inputs": {"name": "Ada"}, "prompt_id": handle["pending_input"]["prompt_id"]}
        repeat = http.post(f"/sessions/{handle['session_id']}/resume", json=body)
        assert (repeat.status_code, repeat.json()["state"]) == (200, "done")
        body["extra_inputs"] = {"name": "Eve"}
        other = http.post(f"/sessions/{handle['session_id']}/resume", json=body)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "session_already_completed")


def _asks_no_more(http: httpx.Client, handle: dict[str, Any]) -> bool:
    now: dict[str, Any] = http.get(f"/sessions/{handle['session_id']}").json()
    return now["state"] == "done" or now["pending_input"] not in (None, handle["pending_input"])


def everything(lab: Path) -> Iterator[tuple[str, bytes]]:
    for folder, _, names in os.walk(lab):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield str(path.relative_to(lab)), path.read_bytes()


def test_a_secret_is_found_nowhere_and_asked_again_after_a_death(lab: Path) -> None:
    plugin(lab, "secretly", ASKS_SECRETLY, isolation={"timeout_seconds": 60})
    name = template(lab, "secret", {"one.txt": ""}, _exlab_plugins=["secretly"])
    with running(lab / "config.yaml") as service, service.http() as http:
        session_id = created(http, name)
        answered(http, waiting(http, session_id), token=SECRET, user="Ada")
        eventually(lambda: list((lab / "data/.exlab-sessions").glob("*/*/scratch")))
        commands = subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout
        assert SECRET not in commands
        found = [place for place, data in everything(lab) if SECRET.encode() in data]
        assert found == []
        service.kill()
    (lab / "data" / "go").touch()
    with running(lab / "config.yaml") as service, service.http() as http:
        handle = waiting(http, session_id)
        assert handle["recoveries"] == 1
        assert [field["id"] for field in handle["pending_input"]["fields"]] == ["token"]
        assert "restarted" in handle["pending_input"]["reason"]
        answered(http, handle, token=SECRET)
        again = waiting(http, session_id)
        assert again["pending_input"]["fields"][0]["label"] == "x***x"
        answered(http, again, again="yes")
        done = ended(http, session_id)
        log = http.get(f"/sessions/{session_id}/log").text
    assert done["state"] == "done"
    assert "logged ***" in log and "printed ***" in log
    assert done["result"]["warnings"][0]["message"].endswith("refused ***")
    assert [place for place, data in everything(lab) if SECRET.encode() in data] == []
    creation = json.loads((Path(done["result"]["path"]) / ".exlab-wizard/creation.json").read_text())
    assert [entry.get("value") for entry in creation["plugin_inputs"]] == [None, "Ada", None, "yes"]
    with sqlite3.connect(f"file:{lab}/state/sessions.sqlite3?mode=ro", uri=True) as shell:
        dump = "\n".join(shell.iterdump())
    shell.close()
    assert SECRET not in dump


LEAKS = """
def transform(self, file_path, ctx):
    if "pin" not in ctx.extra_inputs:
        raise PluginInputRequired(
            [{"id": "pin", "label": "PIN", "type": "number", "secret": True}], "Who are you?")
    pin = ctx.extra_inputs["pin"]
    (ctx.dst_root / f"{pin}.dat").touch()
    if "more" not in ctx.extra_inputs:
        raise PluginInputRequired([{"id": "more", "label": "More", "type": "number", "default": pin}], "more")
    print("x" * 32760, pin, "y" * 40000)
    ctx.log.info("z" * 7995 + str(pin))
"""
PIN = 4821377


def test_a_secret_that_is_a_number_or_in_a_name_or_cut_in_two_is_not_kept_by_the_service(
    lab: Path, service: Service
) -> None:
    plugin(lab, "leaks", LEAKS)
    name = template(lab, "leaking", {"one.txt": ""}, _exlab_plugins=["leaks"])
    with service.http() as http:
        session_id = created(http, name)
        answered(http, waiting(http, session_id), pin=PIN)
        second = eventually(partial(_asking_for, http, session_id, "more"))
        assert second["pending_input"]["fields"][0].get("default") is None
        answered(http, second, more=1)
        done = ended(http, session_id)
        told = http.get(f"/sessions/{session_id}/log").text + http.get(f"/sessions/{session_id}/events").text
    assert done["state"] == "done"
    folder = Path(done["result"]["path"])
    written = (folder / ".exlab-wizard/creation.json").read_text()
    assert (folder / f"{PIN}.dat").exists()  # what a plugin writes is its own affair
    assert "***.dat" in written
    with sqlite3.connect(f"file:{lab}/state/sessions.sqlite3?mode=ro", uri=True) as shell:
        dump = "\n".join(shell.iterdump())
    shell.close()
    for text in (told, written, dump, service.errors.read_text()):
        assert str(PIN)[:-1] not in text


def _asking_for(http: httpx.Client, session_id: str, field: str) -> dict[str, Any] | None:
    handle: dict[str, Any] = http.get(f"/sessions/{session_id}").json()
    fields = (handle["pending_input"] or {"fields": []})["fields"]
    return handle if [one["id"] for one in fields] == [field] else None


def test_an_operator_whose_name_no_frame_could_hold_is_refused_and_no_secret_is_logged(
    lab: Path, service: Service
) -> None:
    plugin(lab, "secretly", ASKS_SECRETLY)
    name = template(lab, "secret", {"one.txt": ""}, _exlab_plugins=["secretly"])
    with service.http() as http:
        handle = waiting(http, created(http, name))
        body = {"extra_inputs": {"token": SECRET, "user": "Ada"}, "operator": "o" * 200_000}
        refused = http.post(f"/sessions/{handle['session_id']}/resume", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "validation_failed")
    assert SECRET not in service.errors.read_text()


def test_the_repeat_of_an_answer_brings_no_other_secret(lab: Path, service: Service) -> None:
    code = """
    def transform(self, file_path, ctx):
        if "token" not in ctx.extra_inputs:
            raise PluginInputRequired(
                [{"id": "token", "label": "Token", "type": "string", "secret": True, "default": "guest"}], "Who?")
        while not (ctx.dst_root.parents[3] / "go").exists():
            time.sleep(0.05)
        file_path.write_text(str(len(ctx.extra_inputs["token"])))
    """
    plugin(lab, "slowly", code)
    name = template(lab, "slow", {"one.txt": ""}, _exlab_plugins=["slowly"])
    with service.http() as http:
        handle = waiting(http, created(http, name))
        answered(http, handle)
        for other in ({"token": "another one"}, {"token": ["no text"]}, {}):
            repeat = {"extra_inputs": other, "prompt_id": handle["pending_input"]["prompt_id"]}
            assert http.post(f"/sessions/{handle['session_id']}/resume", json=repeat).status_code == 200
        (lab / "data" / "go").touch()
        done = ended(http, handle["session_id"])
    assert Path(done["result"]["path"], "one.txt").read_text() == str(len("guest"))
