"""Plugins that fail and cheat, in one session: each has its status, and the files are as if it had never run."""

import json
import os
import sys
from pathlib import Path

import httpx
import pytest

from app.demo import laboratory
from tests.service import bare_run, ended, plugin, running, template, waiting

FILES = {
    "notes.txt": "as it was\n",
    "deep/er/data.csv": "1,2\n",
    "README.md": "from the template\n",
    ".exlab-answers.yml": "a: 1\n",
}

CHEATS = {
    "writes_readme": ("policy_violation", "README.md", '(ctx.dst_root / "README.md").write_text("mine")'),
    "removes_readme": ("policy_violation", "README.md", '(ctx.dst_root / "README.md").unlink()'),
    "makes_another_readme": ("policy_violation", "readme.MD", '(ctx.dst_root / "readme.MD").write_text("x")'),
    "writes_provenance": (
        "policy_violation",
        ".exlab-wizard",
        '(ctx.dst_root / ".exlab-wizard").mkdir(); (ctx.dst_root / ".exlab-wizard/creation.json").write_text("{}")',
    ),
    "writes_answers": ("policy_violation", ".exlab-answers.yml", 'ctx.answers_file.write_text("a: 2")'),
    "links_out": ("policy_violation", "out", '(ctx.dst_root / "out").symlink_to("/etc/passwd")'),
    "links_up": ("policy_violation", "up", '(ctx.dst_root / "up").symlink_to("../../../..")'),
    "writes_through_a_link": (
        "policy_violation",
        "outside",
        '(ctx.dst_root / "l").symlink_to("/OUTSIDE"); (ctx.dst_root / "l/x").write_text("x")',
    ),
    "writes_outside": ("policy_violation", "outside", 'Path("/OUTSIDE/x").write_text("x")'),
    "leaves_a_pipe": ("policy_violation", "pipe", 'os.mkfifo(ctx.dst_root / "pipe")'),
    "removes_everything": (
        "policy_violation",
        "answers",
        "import shutil; [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in ctx.dst_root.iterdir()]",
    ),
    "refuses": ("failed", "no thanks", 'file_path.write_text("half"); raise PluginError("no thanks")'),
    "crashes": ("failed", "ZeroDivisionError", 'file_path.write_text("half"); 1 / 0'),
    "leaves_without_a_word": ("failed", "", 'file_path.write_text("half"); os._exit(0)'),
    "is_killed": ("failed", "", 'file_path.write_text("half"); os.kill(os.getpid(), 9)'),
    "hangs": ("timeout", "", 'file_path.write_text("half"); time.sleep(99)'),
    "asks_nonsense": ("failed", "asked", 'raise PluginInputRequired([{"id": 7}], "why")'),
    "asks_nothing": ("failed", "asks for 0", 'raise PluginInputRequired([], "why")'),
    "asks_what_cannot_be_matched": (
        "failed",
        "asked",
        'raise PluginInputRequired([{"id": "x", "label": "X", "type": "string", "pattern": "(?=a)"}], "why")',
    ),
    "asks_twice_at_once": (
        "failed",
        "asked",
        'raise PluginInputRequired([{"id": "x", "label": "X", "type": "string"}] * 2, "why")',
    ),
}


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    laboratory.build(tmp_path)
    return tmp_path


def finished(http: httpx.Client, name: str) -> dict[str, object]:
    created = http.post("/sessions", json=bare_run(name)).json()
    assert created["state"] == "rendering", created
    return ended(http, created["session_id"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a plugin can reach outside of its files")
def test_cheats_and_failures_leave_no_trace_and_the_others_run(lab: Path) -> None:
    outside = lab / "outside"
    outside.mkdir()
    for name, (_, _, code) in CHEATS.items():
        body = f"def transform(self, file_path, ctx):\n    {code.replace('/OUTSIDE', str(outside))}\n"
        plugin(lab, name, body, isolation={"timeout_seconds": 3})
    appends = 'def transform(self, file_path, ctx):\n    file_path.open("a").write("good\\n")\n'
    good = [plugin(lab, f"good_{number}", appends) for number in (1, 2)]
    order = [good[0], *CHEATS, "not_there", good[1]]
    name = template(lab, "cheated", FILES, _answers_file=".exlab-answers.yml", _exlab_plugins=order)
    with running(lab / "config.yaml") as service, service.http() as http:
        done = finished(http, name)
        frames = http.get(f"/sessions/{done['session_id']}/events?limit=1000").json()["events"]
    assert done["state"] == "done", done
    folder = Path(str(done["result"]["path"]))  # type: ignore[index]
    creation = json.loads((folder / ".exlab-wizard/creation.json").read_text())
    told = {entry["plugin"]: entry for entry in creation["plugins_applied"]}
    assert list(told) == [good[0], *CHEATS, good[1]]
    assert {name: entry["status"] for name, entry in told.items()} == {
        name: CHEATS[name][0] if name in CHEATS else "success" for name in told
    }
    assert all(entry["files_affected"] == [] for name, entry in told.items() if name in CHEATS)
    assert (folder / "notes.txt").read_text() == "as it was\ngood\ngood\n"
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    ours = {".exlab-wizard/creation.json", ".exlab-wizard/readme_fields.json"}
    assert paths == {*FILES, *ours}
    assert (folder / "README.md").read_text().endswith("from the template\n")
    assert (folder / ".exlab-answers.yml").read_text() == "a: 1\n"
    assert list(outside.iterdir()) == []
    warned = {frame["plugin"]: frame for frame in frames if frame["kind"] == "warning"}
    assert list(warned) == [*CHEATS, "not_there"]
    for cheat, (status, word, _) in CHEATS.items():
        assert warned[cheat]["code"] == f"plugin_{status}"
        assert word.lower() in warned[cheat]["message"].lower(), warned[cheat]
    steps = [
        (frame["plugin"], frame["current"])
        for frame in frames
        if frame["kind"] == "progress" and "file" not in frame
    ]
    begun_and_ended = [(name, number) for at, name in enumerate(order) for number in (at, at + 1)]
    assert [step for step in steps if step[0] in told] == [
        step for step in begun_and_ended if step[0] in told
    ]


def test_a_plugin_that_must_succeed_fails_its_session_and_says_where_the_rest_is(lab: Path) -> None:
    plugin(lab, "refuses", 'def transform(self, file_path, ctx):\n    raise PluginError("no thanks")\n')
    name = template(lab, "strict", FILES, _exlab_plugins=["refuses"], _exlab_plugins_fatal=True)
    with running(lab / "config.yaml") as service, service.http() as http:
        failed = finished(http, name)
    error = failed["error"]
    assert isinstance(error, dict)
    assert (error["code"], error["details"]["plugin"]) == ("plugin_failed", "refuses")
    assert "no thanks" in error["message"]
    assert Path(error["details"]["partial_path"], "notes.txt").read_text() == "as it was\n"


def test_a_complaint_about_the_variables_fails_the_session_and_no_plugin_runs(lab: Path) -> None:
    plugin(lab, "first", 'def transform(self, file_path, ctx):\n    (ctx.dst_root / "ran").touch()\n')
    picky = 'def validate_variables(self, variables):\n    return [] if variables["dose"] > 5 else ["too small"]\n'
    plugin(lab, "picky", picky + "\ndef transform(self, file_path, ctx):\n    pass\n")
    asked = {"dose": {"type": "int", "default": 3}}
    name = template(lab, "picky_run", FILES, _exlab_plugins=["first", "picky"], **asked)
    with running(lab / "config.yaml") as service, service.http() as http:
        failed = finished(http, name)
        created = http.post("/sessions", json=bare_run(name, variables={"dose": 6})).json()
        assert ended(http, created["session_id"])["state"] == "done"
    error = failed["error"]
    assert isinstance(error, dict)
    assert (error["code"], error["details"]["complaints"]) == (
        "plugin_variable_validation_failed",
        ["too small"],
    )
    assert not os.path.lexists(Path(error["details"]["partial_path"], "ran"))


def test_an_interpreter_that_is_not_there_fails_the_session(lab: Path) -> None:
    plugin(lab, "first", "def transform(self, file_path, ctx):\n    pass\n")
    name = template(lab, "any", FILES, _exlab_plugins=["first"])
    with (lab / "config.yaml").open("a") as config:
        config.write("\nplugins:\n  python: nowhere/bin/python\n")
    with running(lab / "config.yaml") as service, service.http() as http:
        error = finished(http, name)["error"]
    assert isinstance(error, dict)
    assert error["code"] == "plugin_host_unavailable"


def test_a_plugin_that_no_file_is_for_is_skipped_and_one_changed_meanwhile_goes_on_with_a_warning(
    lab: Path,
) -> None:
    plugin(
        lab, "for_others", "def transform(self, file_path, ctx):\n    1 / 0\n", supported_extensions=[".czi"]
    )
    ask = """
    def transform(self, file_path, ctx):
        if "x" not in ctx.extra_inputs:
            raise PluginInputRequired([{"id": "x", "label": "X", "type": "string"}], "why")
        file_path.write_text(VERSION + ctx.extra_inputs["x"])
    """
    plugin(lab, "asks", ask.replace("VERSION", "'one'"))
    name = template(lab, "asking", {"one.TXT": ""}, _exlab_plugins=["for_others", "asks"])
    with running(lab / "config.yaml") as service, service.http() as http:
        session_id = http.post("/sessions", json=bare_run(name)).json()["session_id"]
        waiting(http, session_id)
        plugin(lab, "asks", ask.replace("VERSION", "'two'"), version="2.0")
        http.post(f"/sessions/{session_id}/resume", json={"extra_inputs": {"x": "!"}})
        done = ended(http, session_id)
    folder = Path(done["result"]["path"])
    assert (folder / "one.TXT").read_text() == "two!"
    [warning] = done["result"]["warnings"]
    assert warning["code"] == "plugin_changed"
    creation = json.loads((folder / ".exlab-wizard/creation.json").read_text())
    assert creation["plugins_applied"][0] == {
        "plugin": "for_others",
        "version": "1.0",
        "files_affected": [],
        "status": "skipped",
    }
    assert creation["plugins_applied"][1]["version"] == "2.0"


def test_what_a_plugin_complains_of_at_length_ends_the_session_all_the_same(lab: Path) -> None:
    at_length = 'def validate_variables(self, variables):\n    return ["\\U0001f600" * 2000] * 50\n'
    plugin(lab, "wordy", at_length + "\ndef transform(self, file_path, ctx):\n    pass\n")
    name = template(lab, "wordy_run", FILES, _exlab_plugins=["wordy"])
    with running(lab / "config.yaml") as service, service.http() as http:
        failed = finished(http, name)
    error = failed["error"]
    assert isinstance(error, dict)
    assert error["code"] == "plugin_variable_validation_failed"


def test_a_plugin_that_cannot_be_loaded_fails_and_the_others_run(lab: Path) -> None:
    plugin(lab, "broken", "def transform(self, file_path, ctx):\n    pass\n")
    (lab / "plugins" / "broken" / "__init__.py").write_text("this is no Python")
    plugin(lab, "good", 'def transform(self, file_path, ctx):\n    file_path.open("a").write("good\\n")\n')
    name = template(lab, "half", FILES, _exlab_plugins=["broken", "good"])
    with running(lab / "config.yaml") as service, service.http() as http:
        done = finished(http, name)
    assert done["state"] == "done"
    assert Path(str(done["result"]["path"]), "notes.txt").read_text() == "as it was\ngood\n"  # type: ignore[index]


def test_a_plugin_that_says_the_disk_is_full_when_it_is_not_fails(lab: Path) -> None:
    plugin(
        lab,
        "full",
        'def transform(self, file_path, ctx):\n    raise OSError(28, "No space left", "made-up")\n',
    )
    name = template(lab, "fullish", FILES, _exlab_plugins=["full"])
    with running(lab / "config.yaml") as service, service.http() as http:
        done = finished(http, name)
    assert done["state"] == "done"
    # It gets a second chance: at first it may have been somebody else who filled the disk.
    [waited, warning] = done["result"]["warnings"]  # type: ignore[index]
    assert waited["code"] == "disk_full"
    assert warning["code"] == "plugin_failed" and "room" in warning["message"]


def test_a_hanging_plugin_of_many_sessions_does_not_keep_another_session_waiting(lab: Path) -> None:
    plugin(
        lab,
        "hangs",
        "def transform(self, file_path, ctx):\n    time.sleep(99)\n",
        isolation={"timeout_seconds": 99},
    )
    plugin(lab, "quick", "def transform(self, file_path, ctx):\n    pass\n")
    hanging = template(lab, "hanging", FILES, _exlab_plugins=["hangs"])
    quick = template(lab, "quickly", FILES, _exlab_plugins=["quick"])
    with running(lab / "config.yaml") as service, service.http() as http:
        stuck = [http.post("/sessions", json=bare_run(hanging)).json()["session_id"] for _ in range(4)]
        assert finished(http, quick)["state"] == "done"
        states = [http.get(f"/sessions/{session_id}").json()["state"] for session_id in stuck]
        assert states == ["plugin_pass"] * 4
        for session_id in stuck:
            assert (
                http.post(f"/sessions/{session_id}/cancel", json={"discard_files": True}).status_code == 200
            )
