"""The command line: what it prints for people and for programs, and how its exit code says how it went."""

import asyncio
import json
import os
import pty
import shlex
import signal
import sqlite3
import subprocess
import sys
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from click.testing import CliRunner, Result

from app import cli
from app.demo import laboratory
from app.sessions.lifecycle import Asked
from app.sessions.session import Session
from tests.held import Held, holding
from tests.service import PATIENCE, ROOT, Service, body, eventually, running

NOBODY = "01a20a12-0000-7000-8000-000000000000"
SILENT = "http://127.0.0.1:9"
QUESTION = (
    msgspec.Raw(b'{"id":"stain","label":"Stain","type":"choice","options":["HE","DAPI"]}'),
    msgspec.Raw(b'{"id":"dose","label":"Dose","type":"number","min":1,"required":false,"default":5}'),
    msgspec.Raw(b'{"id":"fixed","label":"Fixed","type":"boolean","required":false}'),
    msgspec.Raw(b'{"id":"batch","label":"Batch","type":"string","required":false}'),
    msgspec.Raw(b'{"id":"pin","label":"PIN","secret":true,"required":false}'),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laboratory.build(tmp_path_factory.mktemp("cli") / "lab").parent


@pytest.fixture(scope="module")
def service(lab: Path) -> Iterator[Service]:
    with running(lab / "config.yaml") as service:
        yield service


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    async with holding(tmp_path / "held") as held:
        yield held


def run(*words: str, given: str | None = None) -> Result:
    result = CliRunner().invoke(cli.main, words, input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


class Ended(NamedTuple):
    exit_code: int | None
    stdout: str
    stderr: str


async def aside(*words: str) -> Ended:
    """`run` in a process of its own, beside a service in this one."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", *words),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complained = await asyncio.wait_for(process.communicate(), PATIENCE)
    return Ended(process.returncode, printed.decode(), complained.decode())


def told(result: Result) -> list[dict[str, Any]]:
    """The objects that a command printed, one a line."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def written(folder: Path, lab: Path, number: int, **changes: Any) -> str:
    """A file that asks for a project of its own."""
    asked = body(lab, "project", lims_project={"short_id": f"PROJ-{number}"}, **changes)
    path = folder / "body.json"
    path.write_text(json.dumps(asked))
    return str(path)


def test_a_session_is_created_and_followed_to_its_end(service: Service, lab: Path, tmp_path: Path) -> None:
    result = run("create", "--url", service.url, "--follow", written(tmp_path, lab, 1))
    assert result.exit_code == 0
    assert "rendering_template" in result.stdout
    assert str(lab / "data" / "CONFOCAL_01" / "PROJ-1") in result.stdout


def test_programs_get_one_object_a_line(service: Service, lab: Path, tmp_path: Path) -> None:
    handle, *frames = told(
        run("create", "--url", service.url, "--json", "--follow", written(tmp_path, lab, 2))
    )
    assert handle["state"] == "rendering"
    assert [frame["seq"] for frame in frames] == [*range(1, len(frames) + 1)]
    session_id = handle["session_id"]
    assert told(run("follow", session_id, "--url", service.url, "--json")) == frames
    assert told(run("follow", session_id, "--url", service.url, "--json", "--after", "3")) == frames[3:]
    [shown] = told(run("show", session_id, "--url", service.url, "--json"))
    assert shown["request"]["lims_project"] == {"short_id": "PROJ-2"}


def test_a_session_that_the_gate_refuses_exits_with_1(service: Service, lab: Path, tmp_path: Path) -> None:
    result = run("create", "--url", service.url, written(tmp_path, lab, 3, operator=""))
    assert result.exit_code == 1
    assert "validation_failed" in result.stdout


def test_following_a_failed_session_exits_with_1_also_after_its_end(
    service: Service, lab: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, lab, 4, operator="")
    assert run("create", "--url", service.url, "--follow", file).exit_code == 1
    [failed] = told(run("list", "--url", service.url, "--json", "--state", "failed", "--limit", "1"))
    for after in ("0", "1", str(failed["head_seq"])):
        assert run("follow", failed["session_id"], "--url", service.url, "--after", after).exit_code == 1


@pytest.mark.parametrize(
    "text",
    [
        "kind: project\nequipment_id: CONFOCAL_01\nlabel: no\n",
        '{\t"kind": "project", "equipment_id": "CONFOCAL_01",\n\t"label": "no"}',
    ],
)
def test_a_body_may_be_json_or_yaml_and_come_by_standard_input(service: Service, text: str) -> None:
    result = run("create", "--url", service.url, "-", given=text)
    assert result.exit_code == 1
    assert "template_path" in result.stderr  # what is lacking, and not that label would be false


@pytest.mark.parametrize("text", ["[1]", "", "a: [", "null", "\x00", "[" * 100_000])
def test_a_file_that_is_no_body_is_wrong_usage(text: str) -> None:
    assert run("create", "--url", SILENT, "-", given=text).exit_code == 2


def test_the_same_key_gives_the_same_session(service: Service, lab: Path, tmp_path: Path) -> None:
    words = ("create", "--url", service.url, "--json", "--key", "again", written(tmp_path, lab, 5))
    assert told(run(*words))[0]["session_id"] == told(run(*words))[0]["session_id"]


def test_a_list_tells_of_older_sessions_that_it_leaves_out(
    service: Service, lab: Path, tmp_path: Path
) -> None:
    for number in (10, 11, 12):
        run("create", "--url", service.url, written(tmp_path, lab, number, label=f"listed {number}"))
    result = run("list", "--url", service.url, "--label", "listed ", "--limit", "2")
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["LABEL", "12", "11"]
    assert "--limit" in result.stderr
    assert "--limit" not in run("list", "--url", service.url, "--label", "listed ", "--limit", "3").stderr


def test_a_list_is_bounded_by_times(service: Service, lab: Path, tmp_path: Path) -> None:
    run("create", "--url", service.url, written(tmp_path, lab, 13, label="timed"))
    for option, count in ((("--since", "2001-01-01"), 1), (("--until", "2001-01-01T08:00"), 0)):
        result = run("list", "--url", service.url, "--json", "--label", "timed", *option)
        assert (result.exit_code, len(told(result))) == (0, count)


def test_the_service_is_found_by_the_config(service: Service, lab: Path) -> None:
    assert run("list", "--config", str(lab / "config.yaml")).exit_code == 0


def test_the_beginning_of_an_id_is_enough(service: Service, lab: Path, tmp_path: Path) -> None:
    [made] = told(run("create", "--url", service.url, "--json", written(tmp_path, lab, 14)))
    for short in (made["session_id"][:13], made["session_id"].replace("-", "")[:20].upper()):
        [shown] = told(run("show", short, "--url", service.url, "--json"))
        assert shown["session_id"] == made["session_id"]


def test_a_beginning_of_several_ids_is_wrong_usage(service: Service, lab: Path, tmp_path: Path) -> None:
    ids = []
    for number in (15, 16, 17):  # one minute may end in between, but not two
        ids += told(run("create", "--url", service.url, "--json", written(tmp_path, lab, number)))
    shared = max((each["session_id"][:8] for each in ids), key=[each["session_id"][:8] for each in ids].count)
    result = run("show", shared, "--url", service.url)
    assert result.exit_code == 2
    assert "more of it is needed" in result.stderr


@pytest.mark.parametrize("given", ["01a20a1", "nonsense", "01a20a12-zzzz", NOBODY + "0"])
def test_what_is_no_id_is_wrong_usage(given: str) -> None:
    assert run("show", given, "--url", SILENT).exit_code == 2


@pytest.mark.parametrize("command", ["show", "follow", "cancel", "retry", "resume"])
@pytest.mark.parametrize("given", [NOBODY, NOBODY[:13]])
def test_an_unknown_session_exits_with_3(service: Service, command: str, given: str) -> None:
    result = run(command, given, "--url", service.url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "session_not_found" in result.stderr


@pytest.mark.parametrize(
    "words",
    [("list",), ("show", NOBODY), ("follow", NOBODY), ("cancel", NOBODY), ("retry", NOBODY), ("create", "-")],
)
def test_a_service_that_does_not_answer_exits_with_4(words: tuple[str, ...]) -> None:
    result = run(*words, "--url", SILENT, given="{}")
    assert (result.exit_code, result.stdout) == (4, "")
    assert SILENT in result.stderr


def test_a_service_that_left_no_word_exits_with_4(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path / "lab")
    result = run("list", "--config", str(config))
    assert result.exit_code == 4
    assert "no service is running" in result.stderr


def test_programs_get_refusals_as_objects_on_standard_error(service: Service) -> None:
    for words, code in ((("--url", service.url), "session_not_found"), (("--url", SILENT), "unreachable")):
        result = run("show", NOBODY, "--json", *words)
        assert json.loads(result.stderr)["error"]["code"] == code
        assert result.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ("list", "--state", "nonsense"),
        ("list", "--limit", "0"),
        ("list", "--since", "yesterday"),
        ("list", "--url", "127.0.0.1:8321"),
        ("list", "--config", "/nowhere/config.yaml"),
        ("create", "/nowhere/body.json"),
        ("retry", NOBODY, "--change", "label"),
        ("serve", "--port", "70000"),
        ("serve", "--demo", "lab", "--config", "config.yaml"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...]) -> None:
    assert run(*words).exit_code == 2


def test_a_failed_session_is_tried_again_with_changes(service: Service, lab: Path, tmp_path: Path) -> None:
    [failed] = told(run("create", "--url", service.url, "--json", written(tmp_path, lab, 20, operator="")))
    changes = ("operator=asmith", "variables.biosafety_level=2", "variables.organism=human", "label=null")
    words = [word for change in changes[:3] for word in ("--change", change)]
    handle, *frames = told(
        run("retry", failed["session_id"], "--url", service.url, "--json", "--follow", *words)
    )
    assert (handle["retry_of"], frames[-1]["kind"]) == (failed["session_id"], "done")
    [shown] = told(run("show", handle["session_id"], "--url", service.url, "--json"))
    assert shown["request"]["operator"] == "asmith"
    assert shown["request"]["variables"] == {"organism": "human", "biosafety_level": 2}
    without_label = run("retry", failed["session_id"], "--url", service.url, "--change", changes[3])
    assert without_label.exit_code == 1
    assert "label" in without_label.stderr


async def asking(held: Held) -> Session:
    asked = Asked(prompt_id="p", plugin="stainer", file=None, reason="No stain is named.", fields=QUESTION)
    return await held.store.record(await held.at_plugins(), asked)


def answered(held: Held) -> tuple[dict[str, Any], str | None]:
    """The values and the operator of the only answer in the store."""
    with closing(sqlite3.connect(f"file:{held.store.path}?mode=ro", uri=True)) as db:
        [(answer, operator)] = db.execute("SELECT answer, operator FROM prompts WHERE status = 'answered'")
    return json.loads(answer), operator


async def test_a_session_is_cancelled(held: Held) -> None:
    session = await asking(held)
    result = await aside(
        "cancel", session.session_id, "--url", held.url, "--discard-files", "--operator", "jlee"
    )
    assert result.exit_code == 0
    assert "aborted" in result.stdout
    again = await aside("cancel", session.session_id, "--url", held.url)
    assert (again.exit_code, "session_already_completed" in again.stderr) == (1, True)
    assert (await aside("follow", session.session_id, "--url", held.url)).exit_code == 1


async def test_a_question_is_shown_with_the_way_to_answer(held: Held) -> None:
    session = await asking(held)
    result = await aside("show", session.session_id, "--url", held.url)
    for words in ("No stain is named.", "one of HE | DAPI", "from 1", "default 5", "--input stain="):
        assert words in result.stdout
    assert "--input pin=" not in result.stdout  # what is secret stays off the command line


async def test_an_answer_has_the_types_that_were_asked_for(held: Held) -> None:
    session = await asking(held)
    words = [word for each in ("stain=HE", "dose=7", "fixed=yes", "batch=007") for word in ("--input", each)]
    result = await aside("resume", session.session_id, "--url", held.url, "--operator", "jlee", *words)
    assert result.exit_code == 0
    assert answered(held) == ({"stain": "HE", "dose": 7, "fixed": True, "batch": "007"}, "jlee")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--input", "stain=nonsense"), 1, "expected one of HE, DAPI"),
        (("--input", "stain=HE", "--input", "dose=much"), 1, "expected a number"),
        (("--input", "colour=red"), 2, "colour is not asked for"),
        ((), 1, "a value is required"),
    ],
)
async def test_an_answer_that_does_not_fit_leaves_the_question_open(
    held: Held, words: tuple[str, ...], status: int, message: str
) -> None:
    session = await asking(held)
    result = await aside("resume", session.session_id, "--url", held.url, *words)
    assert (result.exit_code, message in result.stderr) == (status, True)
    assert (await held.store.get(session.session_id)).prompt is not None


async def test_a_session_that_asks_nothing_cannot_be_answered(held: Held) -> None:
    session = await held.rendering()
    result = await aside("resume", session.session_id, "--url", held.url, "--input", "dose=1")
    assert (result.exit_code, "session_not_awaiting_input" in result.stderr) == (1, True)


async def test_on_a_terminal_what_is_not_given_is_asked_for(held: Held) -> None:
    session = await asking(held)
    words = ["resume", session.session_id, "--url", held.url, "--json", "--input", "fixed=no"]
    screen, handle = await asyncio.to_thread(at_a_terminal, words, ["DAPI", "", "B-7", "s3cret"])
    assert "Stain (HE, DAPI)" in screen and "s3cret" not in screen
    assert handle["state"] == "plugin_pass"
    assert answered(held) == ({"stain": "DAPI", "dose": 5, "fixed": False, "batch": "B-7"}, None)


def at_a_terminal(words: list[str], lines: list[str]) -> tuple[str, dict[str, Any]]:
    """What a terminal shows when these lines are typed into a command, and what the command answers."""
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "app.cli", *words]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        screen = ""
        for line in lines:
            while not screen.endswith(": "):
                screen += os.read(keyboard, 1024).decode()
            os.write(keyboard, f"{line}\n".encode())
            screen += os.read(keyboard, 1).decode()
        answer, _ = process.communicate(timeout=PATIENCE)
    os.close(keyboard)
    return screen, json.loads(answer)


async def test_text_that_was_typed_cannot_act_on_the_terminal(held: Held) -> None:
    session = await held.failed(await held.at_plugins(label="evil\x1b[2J\u202egnp\nID  done"))
    for words in (("list",), ("show", session.session_id)):
        result = await aside(*words, "--url", held.url)
        assert "evil\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}gnp" in result.stdout
        assert not {"\x1b", "\u202e"} & {*result.stdout}


async def test_columns_line_up_whatever_the_script(held: Held) -> None:
    await held.rendering(label="first")
    await held.rendering(label="second", equipment_id="細胞遊走_01")
    lines = (await aside("list", "--url", held.url)).stdout.splitlines()
    assert len({columns(line[: line.index(line.split()[-1])]) for line in lines}) == 1


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


async def test_an_answer_names_the_question_that_it_was_shown(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path / "held")
    config.write_text(config.read_text() + "  require_prompt_id: true\n")
    async with holding(tmp_path / "held") as held:
        session = await asking(held)
        result = await aside("resume", session.session_id, "--url", held.url, "--input", "stain=HE")
    assert (result.exit_code, result.stderr) == (0, "")


async def test_a_follower_that_is_interrupted_leaves_the_session_alone(held: Held) -> None:
    session = await held.rendering()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "follow", session.session_id, "--url", held.url),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert b"validating_inputs" in await asyncio.wait_for(process.stdout.readline(), PATIENCE)
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert (process.returncode, b"goes on without you" in errors) == (130, True)
    assert b"Traceback" not in errors
    assert not (await held.store.get(session.session_id)).terminal


@pytest.mark.parametrize("folder", [None, "my lab"])
def test_the_demo_needs_nothing_and_says_where_to_look(tmp_path: Path, folder: str | None) -> None:
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--demo",
        *([folder] if folder else []),
        "--port",
        "0",
    ]
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line.startswith("exlab-sessions ready on http://127.0.0.1:")
        hints = eventually(lambda: hints_in(tmp_path / "errors"))
        assert f"{line.split()[-1]}/schema" in hints
        hint = next(each for each in hints.splitlines() if "Open a" in each)
        assert run(*shlex.split(hint.split(" -m app.cli ")[1])).exit_code == 0
    finally:
        process.terminate()
        rest = process.communicate(timeout=PATIENCE)[0]
    assert (process.returncode, rest) == (0, b"")
    assert (tmp_path / (folder or "exlab-demo") / "data" / "CONFOCAL_01" / "PROJ-1").is_dir()


def hints_in(path: Path) -> str:
    text = path.read_text()
    return text if "curl" in text else ""


def check(config: Path, *words: str) -> Result:
    return run("check", "--config", str(config), *words)


def test_a_check_of_a_good_laboratory_finds_nothing_beside_a_service_and_without(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path / "lab")
    with running(config) as service:
        assert run("create", "--url", service.url, "--follow", str(config.parent / "examples/project.json"))
        beside = check(config)
        service.stop()
    for result in (beside, check(config)):
        assert (result.exit_code, result.stdout.count("ok\n")) == (0, 4)


def test_a_check_names_mistakes_and_notes_with_their_lines(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("service:\n  state_dir: state\n  port: many\nlims:\n  endpoint: x\n")
    result = check(config, "--json")
    assert result.exit_code == 1
    mistake = next(each for each in told(result) if each["level"] == "error")
    assert mistake["subject"] == "config"
    assert mistake["where"] == f"{config}:3"
    assert "service.port" in mistake["what"]


def test_a_check_says_what_the_setup_still_lacks(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("service:\n  state_dir: state\n")
    result = check(config)
    assert result.exit_code == 1
    assert "paths.local_root" in result.stdout


def test_a_check_names_templates_that_cannot_be_used(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path / "lab")
    own = config.parent / "data" / "READER_01" / ".exlab-wizard" / "templates" / "empty"
    broken = config.parent / "templates" / "project"
    own.mkdir(parents=True)
    (broken / "copier.yml").write_text("_exlab_type: [")
    result = check(config, "--json")
    assert result.exit_code == 1
    assert {each["where"] for each in told(result) if each["subject"] == "templates"} == {
        str(own),
        str(broken),
    }


def test_a_check_examines_the_store_and_the_disk(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path / "lab")
    stranger = config.parent / "data" / ".exlab-sessions" / NOBODY
    with running(config) as service:
        service.stop()
    stranger.mkdir(parents=True)
    result = check(config)
    assert result.exit_code == 0  # a warning is nothing that must be mended
    assert "warning" in result.stdout and str(stranger) in result.stdout
    (config.parent / "state" / "sessions.sqlite3").write_bytes(b"nonsense" * 1000)
    assert check(config).exit_code == 1


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in cli.main.commands:
        assert command in text
        assert run(command, "--help").exit_code == 0


def test_every_command_and_option_is_described() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name, command in cli.main.commands.items():
        assert f"`{name}" in text, name
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("--") or f"`{option}" in text, f"{name} {option}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main(prog_name='exlab-sessions')"],
        cwd=ROOT,
        env=os.environ | {"_EXLAB_SESSIONS_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "exlab-sessions" in result.stdout
