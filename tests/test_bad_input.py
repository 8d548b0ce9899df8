"""What is wrong with bodies, templates, disks and the config, met over HTTP by a real service.

Whatever comes, the answer is what was promised, never a 500; what may pass by itself is waited for and
heals without a restart; and nothing is ever written outside the place where it belongs.
"""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.demo import laboratory
from tests.service import Service, bare_run, body, ended, eventually, plugin, running, template

LIMITS = """
  render_timeout_seconds: 6
  render_memory_mb: 400
  render_file_mb: 1
"""
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SLOW = {"work/long.txt.jinja": "{% for i in range(20000) %}{% for j in range(500) %}{% endfor %}{% endfor %}"}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: file systems are mounted")
_projects = itertools.count(100)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laboratory.build(tmp_path_factory.mktemp("bad") / "lab").parent


@pytest.fixture(scope="module")
def service(lab: Path) -> Iterator[Service]:
    with (lab / "config.yaml").open("a") as config:
        config.write(LIMITS.lstrip("\n"))
    template(lab, "slow", SLOW)
    with running(lab / "config.yaml") as one:
        yield one
        assert "Traceback" not in one.errors.read_text()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def posted(http: httpx.Client, asked: object) -> httpx.Response:
    """JSON as Python writes it: halves of characters are escaped, and NaN is NaN."""
    return http.post("/sessions", content=json.dumps(asked), headers={"Content-Type": "application/json"})


def outcome(http: httpx.Client, asked: object) -> dict[str, Any]:
    answer = posted(http, asked)
    assert answer.status_code == 201, answer.text
    return ended(http, answer.json()["session_id"])


def code_of(http: httpx.Client, asked: object) -> str | None:
    handle = outcome(http, asked)
    return handle["error"]["code"] if handle["error"] else None


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def project_id() -> str:
    return f"PROJ-{next(_projects)}"


def outside(lab: Path) -> dict[Path, int]:
    """All that is beside the data root and the service's own state, with its time of change."""
    found = (path for path in lab.parent.rglob("*") if not {"data", "state", "service.log"} & set(path.parts))
    return {path: path.lstat().st_mtime_ns for path in found}


# Shapes

TEXTS: tuple[object, ...] = (None, 1, 1.5, True, [], {}, ["x"])
OBJECTS: tuple[object, ...] = (None, "x", 1, False, [], [["a", 1]])
WRONG = {
    "project": {
        **dict.fromkeys(("equipment_id", "template_path", "label", "operator", "objective"), TEXTS),
        **dict.fromkeys(("lims_project", "variables", "readme_extra"), OBJECTS),
        **dict.fromkeys(("project_short_id", "run_kind", "run_date", "surprise"), ("PROJ-1", None)),
        "kind": (None, "", "Project", "folder", 1, ["project"]),
    },
    "run": {
        **dict.fromkeys(("equipment_id", "template_path", "label", "operator", "objective"), TEXTS),
        **dict.fromkeys(("lims_project", "variables", "readme_extra"), OBJECTS),
        "project_short_id": TEXTS,
        "run_kind": (*TEXTS, "both", "", "Test"),
        "run_date": (0, 1.5, True, [], {}),
        "session_id": ("x",),
    },
}


@pytest.mark.parametrize("kind", ["project", "run"])
def test_a_body_of_the_wrong_shape_is_422_and_leaves_nothing(
    http: httpx.Client, lab: Path, kind: str
) -> None:
    good = body(lab, "project" if kind == "project" else "confocal_run")
    before = http.get("/sessions").json()
    tried = [good | {field: value} for field, values in WRONG[kind].items() for value in values]
    required = good.keys() - {"variables", "readme_extra", "lims_project", "run_date"}
    tried += [{key: good[key] for key in good if key != missing} for missing in required]
    for asked in tried:
        answer = posted(http, asked)
        assert refused(answer) == (422, "validation_failed"), asked
        assert answer.json()["error"]["details"]["errors"], asked
    assert http.get("/sessions").json() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b'"run"',
        b"[]",
        b'{"kind": "run"}{}',
        b'{"kind": "run", "label": NaN}',
        b'{"kind": "run", "label": "\xff"}',
        b'{"kind": "run", "label": "\\ud800"}',
        b'{"kind": "run", "variables": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"kind": "run", "variables": {"x": ' + b"9" * 200_000 + b"}}",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_what_is_no_body_is_422(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/sessions", content=content, headers={"Content-Type": "application/json"})
    assert refused(answer) == (422, "validation_failed")


# Values

HOSTILE = (
    "",
    " \t ",
    "..",
    "../../escape",
    "/etc/passwd",
    "C:\\Windows",
    "-rf",
    "CON",
    "a\0b",
    "\x1b[2J",
    "x\r\nSet-Cookie: a=b",
    "one\n---\ntwo: {",
    "\u202egnp.exe",
    "\ud800",
    "{{ 7 * 7 }}{% raw %}",
    "<label>",
    "\U0001f9ea" * 30,
    "x" * 100_000,
)
NUMBERS: tuple[object, ...] = (10**400, -(2**63) - 1, 2**64, 1e308, 5e-324, float("nan"), float("inf"), -0.0)


def deep(levels: int) -> object:
    value: object = "x"
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[object, ...] = (*HOSTILE, *NUMBERS, None, True, [], {}, deep(28), deep(40), ["x"] * 20_000)


def hostile_bodies(lab: Path) -> Iterator[dict[str, Any]]:
    texts = (
        "equipment_id",
        "template_path",
        "label",
        "operator",
        "objective",
        "project_short_id",
        "run_date",
    )
    for field, text in itertools.product(texts, HOSTILE):
        yield body(lab, "confocal_run", **{field: text})
    for value in VALUES:
        yield body(lab, "confocal_run", variables={"sample": value}, lims_project={"uid": value})
        yield body(lab, "confocal_run", readme_extra={"fixation": value})
        yield body(lab, "confocal_run", readme_extra={"fixation": "none", "remarks": value, "custom": value})
        yield body(lab, "project", lims_project={"short_id": value})
    for key in HOSTILE:
        extra = {"fixation": "none", key: "y"}
        yield body(lab, "confocal_run", variables={"sample": "x", key: "y"}, readme_extra=extra)
        yield body(lab, "confocal_run", readme_extra=extra)


def test_a_hostile_value_in_any_field_ends_well_or_is_refused_by_name(service: Service, lab: Path) -> None:
    before = outside(lab)

    every = list(hostile_bodies(lab))
    with service.http() as http:
        with ThreadPoolExecutor(8) as hands:
            answers = list(hands.map(lambda asked: posted(http, asked), every))
        assert {answer.status_code for answer in answers} == {201, 422}
        attempts = [
            (asked, ended(http, answer.json()["session_id"]))
            for asked, answer in zip(every, answers, strict=True)
            if answer.status_code == 201
        ]
    ends = {handle["state"] for _, handle in attempts}
    assert ends == {"done", "failed"}
    for asked, handle in attempts:
        if handle["state"] == "failed":
            assert handle["error"]["code"] in (
                "validation_failed",
                "field_too_long",
                "template_load_error",
            ), handle
            assert handle["error"]["field"], handle
        else:
            folder = Path(handle["destination"])
            place = folder.relative_to(lab / "data").parts
            assert place[:1] == ("CONFOCAL_01",) and place[1].startswith("PROJ-") and len(place) <= 3
            front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
            assert front["label"] == asked["label"].strip()
            assert (folder / ".exlab-wizard" / "creation.json").is_file()
    assert outside(lab) == before


@pytest.mark.parametrize("extra", ["one\n---\ntwo: {", "{{ 7 * 7 }}", "# no: heading", "null", "012", "1e3"])
def test_what_an_operator_wrote_is_read_back_as_it_was(http: httpx.Client, lab: Path, extra: str) -> None:
    asked = body(lab, "confocal_run", project_short_id="PROJ-90", objective=extra)
    asked["readme_extra"] = {"fixation": "none", "remarks": extra, "Note": extra}
    handle = outcome(http, asked)
    assert handle["state"] == "done"
    text = (Path(handle["destination"]) / "README.md").read_text()
    front = yaml.safe_load(text[4 : text.index("\n---\n", 4)])
    assert front["objective"] == front["template_fields"]["remarks"] == extra
    assert front["custom_fields"] == [{"label": "Note", "value": extra}]


# Templates

BAD_TEMPLATES = {
    "malformed": {"copier.yml": "a: [1, 2"},
    "binary": {"copier.yml": "\0\1\2"},
    "without a version": {"copier.yml": "_exlab_type: run\n_exlab_run_scope: both\n"},
    "without a scope": {"copier.yml": "_exlab_type: run\n_exlab_version: '1'\n"},
    "of a list": {"copier.yml": "- a\n- b\n"},
    "of python": {"copier.yml": "a: !!python/object/apply:os.system ['touch /tmp/pwned']\n"},
    "of laughs": {
        "copier.yml": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij"))
    },
    "of depth": {"copier.yml": "a: " + "[" * 20_000},
    "for projects": {"copier.yml": "_exlab_type: project\n_exlab_version: '1'\n"},
    "for tests": {"copier.yml": "_exlab_type: run\n_exlab_version: '1'\n_exlab_run_scope: test\n"},
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_cannot_be_used_is_refused(http: httpx.Client, lab: Path, name: str) -> None:
    template(lab, name, BAD_TEMPLATES[name])
    handle = outcome(http, bare_run(name))
    assert (handle["error"]["code"], handle["error"]["field"]) == ("template_load_error", "template_path")
    assert not handle["destination"]


def test_a_template_that_declares_a_core_field_is_refused(http: httpx.Client, lab: Path) -> None:
    template(lab, "greedy", {}, _exlab_readme={"fields": [{"id": "label", "label": "Label"}]})
    assert code_of(http, bare_run("greedy")) == "template_core_field_redeclared"


@pytest.mark.parametrize(
    "path", ["nowhere", ".", "..", "../data", "confocal_run/raw", "confocal_run/copier.yml"]
)
def test_what_is_no_template_is_refused(http: httpx.Client, path: str) -> None:
    assert code_of(http, bare_run(path)) == "template_load_error"


def test_a_template_behind_a_link_to_elsewhere_is_refused(http: httpx.Client, lab: Path) -> None:
    shutil.copytree(lab / "templates" / "plate_reader_run", lab.parent / "elsewhere")
    (lab / "templates" / "linked").symlink_to(lab.parent / "elsewhere")
    assert code_of(http, bare_run("linked")) == "template_load_error"
    template(lab, "leaky", {})
    (lab / "templates" / "leaky" / "passwd").symlink_to("/etc/passwd")
    assert code_of(http, bare_run("leaky")) == "template_load_error"


def test_a_template_of_too_many_files_is_refused(http: httpx.Client, lab: Path) -> None:
    template(lab, "many", {})
    for number in range(10_001):
        (lab / "templates" / "many" / str(number)).touch()
    handle = outcome(http, bare_run("many"))
    assert handle["error"]["code"] == "template_load_error" and "10000" in handle["error"]["message"]
    shutil.rmtree(lab / "templates" / "many")


def test_a_template_of_one_huge_file_is_refused_unread(http: httpx.Client, lab: Path) -> None:
    template(lab, "huge", {"huge": ""})
    os.truncate(lab / "templates" / "huge" / "huge", 10**13)
    assert code_of(http, bare_run("huge")) == "template_load_error"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("endless", {"work/endless.txt.jinja": NESTED * 50}),
        ("vast", {"work/vast.txt.jinja": "{{ 'x' * 10 ** 9 }}"}),
        ("large", {"work/large.txt.jinja": "{{ 'x' * 2 ** 22 }}"}),
        ("undefined", {"work/a.txt.jinja": "{{ nothing.at.all }}"}),
        ("unknown filter", {"work/a.txt.jinja": "{{ 'x' | shell }}"}),
        ("bad syntax", {"work/a.txt.jinja": "{% if %}"}),
        ("breaking out", {"work/a.txt.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}),
        ("including", {"work/a.txt.jinja": "{% include '/etc/passwd' %}"}),
        ("a folder as README", {"README.md/a.txt": "a"}),
        ("a folder as creation", {".exlab-wizard/creation.json/a.txt": "a"}),
        ("a folder as draft", {".README.md.tmp/a.txt": "a"}),
        ("recursive", {"work/a.txt.jinja": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_template_that_cannot_be_rendered_fails_its_session_alone(
    http: httpx.Client, lab: Path, name: str, files: dict[str, str]
) -> None:
    template(lab, name, files)
    handle = outcome(http, bare_run(name))
    error = handle["error"]
    assert (handle["state"], error["code"]) == ("failed", "render_failed"), handle
    assert str(lab / "data" / ".exlab-sessions") not in error["message"]
    assert not Path(handle["destination"]).exists()
    assert eventually(lambda: not (lab / "data" / ".exlab-sessions" / handle["session_id"]).exists())
    last = http.get(f"/sessions/{handle['session_id']}/events").json()["events"][-1]
    assert (last["kind"], last["phase"], last["error"]) == ("failed", "rendering_template", error)


@pytest.mark.parametrize("name", ["../../../escape", "/tmp/escape", "..", "a/../../b", "a\\..\\b"])
def test_a_value_in_a_file_name_leads_nowhere_else(http: httpx.Client, lab: Path, name: str) -> None:
    if not (lab / "templates" / "named").exists():
        template(lab, "named", {"{{ name }}.txt.jinja": "named", "copier.yml": NAMED})
    before = outside(lab)
    handle = outcome(http, bare_run("named", variables={"name": name}))
    assert handle["state"] in ("failed", "done")
    if handle["state"] == "done":
        assert any(path.is_file() for path in Path(handle["destination"]).rglob("*.txt"))
    else:
        assert handle["error"]["code"] in ("render_failed", "validation_failed")
    assert outside(lab) == before and not Path("/tmp/escape.txt").exists()


NAMED = "_exlab_type: run\n_exlab_version: '1'\n_exlab_run_scope: both\nname: {type: str}\n"


def test_a_plugin_that_is_listed_and_not_there_is_skipped_with_a_warning(
    http: httpx.Client, lab: Path
) -> None:
    template(lab, "plugged", {"a.txt": "a"}, _exlab_plugins=["staining"])
    handle = outcome(http, bare_run("plugged"))
    assert handle["state"] == "done"
    [warning] = handle["result"]["warnings"]
    assert (warning["code"], warning["plugin"]) == ("plugin_missing", "staining")


def test_the_tasks_of_a_template_are_not_run_and_that_is_told(http: httpx.Client, lab: Path) -> None:
    template(
        lab, "busy", {"a.txt": "a"}, _tasks=["touch done-by-task", f"touch {lab}/templates/done-by-task"]
    )
    handle = outcome(http, bare_run("busy"))
    assert handle["state"] == "done"
    assert [warning["code"] for warning in handle["result"]["warnings"]] == ["template_has_tasks"]
    assert not [*lab.rglob("done-by-task")]
    events = http.get(f"/sessions/{handle['session_id']}/events").json()["events"]
    assert [event["code"] for event in events if event["kind"] == "warning"] == ["template_has_tasks"]


def test_hard_findings_are_published_told_and_block_the_copy(http: httpx.Client, lab: Path) -> None:
    template(lab, "unfinished", {"a.txt.jinja": "by <operator>, {{ '{{' }} date }}", "CON.txt": "device"})
    handle = outcome(http, bare_run("unfinished"))
    result, folder = handle["result"], Path(handle["destination"])
    assert (handle["state"], result["sync_status"], result["blocked"]) == (
        "done",
        "blocked_by_validation",
        True,
    )
    rules = {"reserved_filesystem_name", "unresolved_placeholder_token", "leftover_jinja_marker"}
    assert {finding["rule"] for finding in result["findings"]} == rules and result["findings_total"] == 3
    assert [warning["code"] for warning in result["warnings"]] == ["blocked_by_validation"]
    made = json.loads((folder / ".exlab-wizard" / "creation.json").read_text())
    assert made["sync_status"] == "blocked_by_validation"


# Destinations

AT = "2026-06-01T12:00:00"


@pytest.mark.parametrize("name", ["Run_2026-06-01T12-00-00", "run_2026-06-01t12-00-00"])
@pytest.mark.parametrize("taker", ["folder", "file", "link"])
def test_a_destination_that_is_taken_is_left_alone(
    http: httpx.Client, lab: Path, taker: str, name: str
) -> None:
    project = project_id()
    place = lab / "data" / "CONFOCAL_01" / project / name
    place.parent.mkdir(parents=True)
    match taker:
        case "folder":
            place.mkdir()
        case "file":
            place.touch()
        case "link":
            place.symlink_to("nowhere")
    handle = outcome(http, body(lab, "confocal_run", project_short_id=project, run_date=AT))
    assert (handle["error"]["code"], handle["error"]["field"]) == ("destination_taken", "run_date")
    assert list(place.parent.iterdir()) == [place]
    assert not place.is_dir() or not list(place.iterdir())


def test_of_many_that_want_one_second_one_gets_it(http: httpx.Client, lab: Path) -> None:
    asked = body(lab, "confocal_run", project_short_id=project_id(), run_date=AT)

    def make(number: int) -> dict[str, Any]:
        return outcome(http, asked | {"label": f"run {number}"})

    with ThreadPoolExecutor(8) as hands:
        handles = list(hands.map(make, range(8)))
    codes = [handle["error"]["code"] for handle in handles if handle["error"]]
    assert codes == ["destination_taken"] * 7
    [winner] = [handle for handle in handles if handle["state"] == "done"]
    made = json.loads(Path(winner["destination"], ".exlab-wizard", "creation.json").read_text())
    assert made["session_id"] == winner["session_id"]


def test_a_live_session_holds_its_destination_and_its_project(http: httpx.Client, lab: Path) -> None:
    project = project_id()
    holder = posted(http, bare_run("slow", project_short_id=project, run_date=AT)).json()
    for taken in (
        body(lab, "confocal_run", project_short_id=project, run_date=AT),
        body(lab, "project", lims_project={"short_id": project}),
    ):
        error = outcome(http, taken)["error"]
        assert error["code"] == "destination_taken"
        assert error["details"]["session_id"] == holder["session_id"]
    cancelled = http.post(f"/sessions/{holder['session_id']}/cancel", json={"discard_files": True}).json()
    assert cancelled["state"] == "aborted"
    assert code_of(http, body(lab, "confocal_run", project_short_id=project, run_date=AT)) is None


def test_a_folder_that_comes_in_the_way_is_not_written_into(http: httpx.Client, lab: Path) -> None:
    handle = posted(http, bare_run("slow", project_short_id=project_id())).json()
    destination = Path(handle["destination"])
    destination.mkdir(parents=True)
    failed = ended(http, handle["session_id"])
    assert (failed["state"], failed["error"]["code"]) == ("failed", "destination_taken")
    assert not list(destination.iterdir())
    assert (Path(failed["error"]["details"]["partial_path"]) / "work" / "long.txt").is_file()


# Disks


class Disk:
    """A small file system that a test may fill, freeze and take away."""

    def __init__(self, place: Path, options: str) -> None:
        self._behind = place.with_name(f"{place.name}.disk")
        self._behind.mkdir()
        _mount("-t", "tmpfs", "-o", options, "none", str(self._behind))
        self.place = place
        self.put_in()

    def put_in(self) -> None:
        _mount("--bind", str(self._behind), str(self.place))

    def take_out(self) -> None:
        eventually(
            lambda: subprocess.run(["umount", str(self.place)], check=False).returncode == 0, within=10
        )

    def change(self, options: str) -> None:
        _mount("-o", f"remount,{options}", str(self._behind))

    def freeze(self, how: str) -> None:
        """Read-only (`ro`) or not (`rw`)."""
        _mount("-o", f"remount,bind,{how}", str(self.place))

    def fill(self) -> None:
        with (self._behind / "ballast").open("wb", buffering=0) as ballast:
            try:
                while ballast.write(b"\0" * 65536):
                    pass
            except OSError:
                return

    def make_room(self) -> None:
        (self._behind / "ballast").unlink()

    def close(self) -> None:
        for place in (self.place, self._behind):
            subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@contextmanager
def inserted(place: Path, options: str) -> Iterator[Disk]:
    disk = Disk(place, options)
    try:
        yield disk
    finally:
        disk.close()


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Service, Disk]]:
    """A laboratory whose data root is a disk of its own."""
    lab = laboratory.build(tmp_path_factory.mktemp("mounted")).parent
    with inserted(lab / "data", "size=100m") as disk, running(lab / "config.yaml") as service:
        with service.http() as http:
            outcome(http, body(lab, "project"))
        yield lab, service, disk


def blocked(http: httpx.Client, session_id: str, code: str) -> dict[str, Any]:
    """The handle when the session waits for `code` to pass."""

    def found() -> dict[str, Any] | None:
        handle: dict[str, Any] = http.get(f"/sessions/{session_id}").json()
        assert handle["state"] not in ("done", "failed"), handle
        return handle if (handle["blocked_on"] or {}).get("code") == code else None

    return eventually(found)


def warnings(http: httpx.Client, session_id: str) -> list[str]:
    events = http.get(f"/sessions/{session_id}/events").json()["events"]
    return [event["code"] for event in events if event["kind"] == "warning"]


@needs_root
def test_a_disk_without_room_is_told_and_a_retry_with_room_is_good(
    mounted: tuple[Path, Service, Disk],
) -> None:
    lab, service, disk = mounted
    with service.http() as http:
        disk.change("size=2m")
        handle = outcome(http, body(lab, "confocal_run"))
        assert handle["error"]["code"] == "disk_space_insufficient"
        assert handle["error"]["details"]["free_bytes"] < 2 * 1024**2
        disk.change("size=100m")
        again = http.post(f"/sessions/{handle['session_id']}/retry", json={})
        assert ended(http, again.json()["session_id"])["state"] == "done"


@needs_root
def test_a_plugin_that_fills_the_disk_fails_and_leaves_the_room_to_the_others(
    mounted: tuple[Path, Service, Disk],
) -> None:
    lab, service, _ = mounted
    fill = """
    def transform(self, file_path, ctx):
        with (ctx.dst_root / "big").open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
    """
    plugin(lab, "fills", fill)
    template(lab, "filled", {"a.txt": "a"}, _exlab_plugins=["fills"])
    with service.http() as http:
        filled = outcome(http, bare_run("filled"))
        assert filled["state"] == "done"
        # It gets a second chance: at first it may have been somebody else who filled the disk.
        assert [warning["code"] for warning in filled["result"]["warnings"]] == ["disk_full", "plugin_failed"]
        assert sorted(path.name for path in Path(filled["destination"]).iterdir()) == [
            ".exlab-wizard",
            "README.md",
            "a.txt",
        ]


def test_a_disk_that_fills_up_is_waited_for_until_there_is_room(mounted: tuple[Path, Service, Disk]) -> None:
    lab, service, disk = mounted
    with service.http() as http:
        free = os.statvfs(lab / "data")
        disk.change(f"nr_inodes={free.f_files - free.f_ffree + 8}")
        waits = posted(http, body(lab, "confocal_run")).json()
        goes = posted(http, body(lab, "confocal_run")).json()
        for handle in (waits, goes):
            blocked(http, handle["session_id"], "disk_full")
            assert warnings(http, handle["session_id"]) == ["disk_full"]
        assert http.get("/health").json()["status"] == "warn"
        answer = http.post(f"/sessions/{goes['session_id']}/cancel", json={"discard_files": True})
        assert (answer.status_code, answer.json()["state"]) == (200, "aborted")
        disk.change("nr_inodes=10000")
        done = ended(http, waits["session_id"])
        assert (done["state"], done["blocked_on"]) == ("done", None)
        assert list((lab / "data" / ".exlab-sessions").iterdir()) == []


@needs_root
def test_a_data_root_that_is_not_mounted_is_waited_for(mounted: tuple[Path, Service, Disk]) -> None:
    lab, service, disk = mounted
    with service.http() as http:
        disk.take_out()
        handle = posted(http, body(lab, "confocal_run")).json()
        assert (handle["state"], handle["blocked_on"]["code"]) == ("validating", "not_mounted")
        assert list((lab / "data").iterdir()) == []
        disk.put_in()
        done = ended(http, handle["session_id"])
        assert done["state"] == "done" and Path(done["destination"]).is_dir()


@needs_root
def test_a_cancel_does_not_claim_to_have_discarded_what_is_not_mounted(
    mounted: tuple[Path, Service, Disk],
) -> None:
    lab, service, disk = mounted
    with service.http() as http:
        disk.take_out()
        session_id = posted(http, body(lab, "confocal_run")).json()["session_id"]
        answer = http.post(f"/sessions/{session_id}/cancel", json={"discard_files": True})
        disk.put_in()
        receipt = answer.json()["error"]["details"]
        assert (answer.status_code, receipt["discarded"]) == (200, False)
        assert receipt["left"] == str(lab / "data" / ".exlab-sessions" / session_id) and receipt["reason"]


@needs_root
def test_a_data_root_that_turns_read_only_is_waited_for(mounted: tuple[Path, Service, Disk]) -> None:
    lab, service, disk = mounted
    if not (lab / "templates" / "slow").exists():
        template(lab, "slow", SLOW)
    with service.http() as http:
        working = posted(http, bare_run("slow")).json()
        assert working["state"] == "rendering"
        eventually(lambda: list((lab / "data" / ".exlab-sessions").glob("*/*/tree/work")))
        disk.freeze("ro")
        try:
            blocked(http, working["session_id"], "read_only")
            answer = posted(http, body(lab, "confocal_run"))
            assert refused(answer) == (503, "setup_incomplete")
            assert answer.json()["error"]["details"]["state"] == "incomplete_missing_paths"
        finally:
            disk.freeze("rw")
        assert ended(http, working["session_id"])["state"] == "done"
        assert code_of(http, body(lab, "confocal_run")) is None


@needs_root
def test_a_store_without_room_refuses_writes_and_reads_on_and_recovers(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    with (
        inserted(tmp_path / "state", "size=4m") as disk,
        running(config) as service,
        service.http() as http,
    ):
        first = outcome(http, body(tmp_path, "project"))
        disk.fill()
        for _ in range(3):
            answer = posted(http, body(tmp_path, "confocal_run"))
            assert refused(answer) == (503, "store_unavailable") and int(answer.headers["Retry-After"]) > 0
        assert http.get(f"/sessions/{first['session_id']}").json() == first
        assert len(http.get("/sessions").json()["sessions"]) == 1
        assert http.get(f"/sessions/{first['session_id']}/events").status_code == 200
        assert http.get("/health").json()["status"] in ("warn", "error")
        disk.make_room()
        assert code_of(http, body(tmp_path, "confocal_run")) is None
        assert len(http.get("/sessions").json()["sessions"]) == 2
        assert service.stop() == 0


@needs_root
def test_a_session_under_way_outlasts_a_full_store(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    template(tmp_path, "slow", SLOW)
    with (
        inserted(tmp_path / "state", "size=4m") as disk,
        running(config) as service,
        service.http() as http,
    ):
        handle = posted(http, bare_run("slow")).json()
        disk.fill()
        eventually(lambda: "takes no write" in service.errors.read_text())
        assert http.get(f"/sessions/{handle['session_id']}").json()["state"] == "rendering"
        refusal = http.post(f"/sessions/{handle['session_id']}/cancel", json={})
        assert refused(refusal) == (503, "store_unavailable")
        disk.make_room()
        done = ended(http, handle["session_id"])
        events = http.get(f"/sessions/{handle['session_id']}/events").json()["events"]
        assert done["state"] == "done" and [event["seq"] for event in events] == [*range(1, len(events) + 1)]


# The setup


def state_of(http: httpx.Client) -> str:
    return str(http.get("/setup/status").json()["state"])


def test_a_setup_heals_step_by_step_without_a_restart(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    good = config.read_text()
    (tmp_path / "data").rmdir()
    config.write_text("service: {state_dir: state}\npaths: 7\n")
    with running(config) as service, service.http() as http:

        def refusal(state: str) -> dict[str, Any]:
            eventually(lambda: state_of(http) == state)
            answer = posted(http, body(tmp_path, "project"))
            assert refused(answer) == (503, "setup_incomplete")
            details: dict[str, Any] = answer.json()["error"]["details"]
            assert details["state"] == state and details["missing"]
            return details

        refusal("incomplete_no_config")
        assert http.get("/health").status_code == 200
        config.write_text(good)
        missing = refusal("incomplete_missing_paths")["missing"]
        assert [each["field"] for each in missing] == ["paths.local_root"]
        (tmp_path / "data").mkdir()
        config.write_text(good[: good.index("equipment:")] + "service: {state_dir: state}\n")
        refusal("incomplete_no_equipment")
        config.write_text(good)
        assert code_of(http, body(tmp_path, "project")) is None
        assert http.get("/setup/status").json() == {
            "state": "ready",
            "missing": [],
            "next_action": None,
            "ready": True,
        }


def test_a_config_that_breaks_leaves_the_last_good_one_in_force(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    good = config.read_text()
    with running(config) as service, service.http() as http:
        for broken in ("paths: [", "", "equipment: 3\n", "\0"):
            config.write_text(broken)
            eventually(lambda: http.get("/health").json()["components"]["config"]["status"] == "warn")
            assert state_of(http) == "ready"
            handle = outcome(http, body(tmp_path, "project", lims_project={"short_id": project_id()}))
            assert handle["state"] == "done"
            config.write_text(good)
            eventually(lambda: http.get("/health").json()["components"]["config"]["status"] == "ok")


def test_a_data_root_that_goes_away_and_comes_back_needs_no_restart(tmp_path: Path) -> None:
    config = laboratory.build(tmp_path)
    with running(config) as service, service.http() as http:
        assert code_of(http, body(tmp_path, "project")) is None
        (tmp_path / "data").rename(tmp_path / "away")
        answer = posted(http, body(tmp_path, "confocal_run"))
        assert refused(answer) == (503, "setup_incomplete")
        assert [each["field"] for each in answer.json()["error"]["details"]["missing"]] == [
            "paths.local_root"
        ]
        assert not (tmp_path / "data").exists()
        (tmp_path / "away").rename(tmp_path / "data")
        assert code_of(http, body(tmp_path, "confocal_run")) is None
