"""What the gate lets through, and that everything else is a failure which names its field."""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as configured
from hypothesis import strategies as st

from app import disk, settings
from app.errors import Failure
from app.settings import Equipment, Field, Operators, Paths, Readme, Settings
from app.steps import gate
from app.steps.gate import Inputs, Passed

NOW = datetime(2026, 4, 17, 14, 32, 5, 987654, UTC)

RUN_TEMPLATE = """
_exlab_type: run
_exlab_version: "1.0"
_exlab_run_scope: both
_exlab_readme:
  fields:
    - {id: sample_type, label: Sample, type: choice, options: [Fixed, Live, 488], required: true}
    - {id: seen_on, label: Seen, type: date}
    - {id: wet, label: Wet, type: boolean}
    - {id: depth, label: Depth, type: number}
    - {id: protocol, label: Protocol, type: string}
    - {id: notes, label: Notes, type: text}
operator: {type: str}
destination: {type: str}
count: {type: int, default: 1}
speed: {type: float, default: 1.5}
wanted: {type: bool, default: false}
name: {type: str, default: x}
lens: {type: str, choices: [10x, 20x], default: 10x}
lasers: {type: int, choices: [405, 488], multiselect: true, default: [405]}
doc: {type: json, default: null}
free: {type: yaml, default: null}
place: {type: path, default: a}
either: {choices: [1, a], default: a}
must: {type: str}
perhaps: {type: str, when: "{{ wanted }}"}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    for folder in (
        "data",
        "data/.exlab-sessions",
        "templates/run",
        "templates/project",
        "plugins",
        "outside",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "templates/run/copier.yml").write_text(RUN_TEMPLATE)
    (tmp_path / "templates/run/{{ name }}.csv.jinja").write_text("a\n")
    (tmp_path / "templates/project/copier.yml").write_text('_exlab_type: project\n_exlab_version: "1"\n')
    (tmp_path / "outside/copier.yml").write_text('_exlab_type: project\n_exlab_version: "1"\n')
    return tmp_path


def config(lab: Path, **changes: object) -> Settings:
    ids = ("CONFOCAL_01", "CON", "lower", "COM7")
    one = Equipment(id="CONFOCAL_01", label="Confocal", local_root="/data", nas_root="/nas")
    base = msgspec.structs.replace(
        settings.defaults(),
        paths=Paths(templates_dir=lab / "templates", plugin_dir=lab / "plugins", local_root=lab / "data"),
        equipment=tuple(msgspec.structs.replace(one, id=name) for name in ids),
        operators=Operators(allowlist=("asmith", "Zoë Müller")),
        readme=Readme(
            defaults=(
                Field(id="irb", label="IRB", required=True),
                Field(id="sample_type", label="Sample", type="text"),
                Field(id="operator", label="Operator", required=True),
            )
        ),
    )
    return msgspec.structs.replace(base, **changes)


RUN: dict[str, object] = {
    "kind": "run",
    "equipment_id": "CONFOCAL_01",
    "template_path": "run",
    "label": " Cortex Q3 ",
    "operator": "asmith",
    "objective": "Look\nat it",
    "project_short_id": "PROJ-0042",
    "run_kind": "experimental",
    "variables": {"must": "be"},
    "readme_extra": {"sample_type": "Fixed", "irb": "IRB-1"},
}
PROJECT: dict[str, object] = {
    "kind": "project",
    "equipment_id": "CONFOCAL_01",
    "template_path": "project",
    "label": "Cortex",
    "operator": "asmith",
    "objective": "Look",
    "lims_project": {"short_id": "PROJ-7", "uid": "u"},
    "readme_extra": {"irb": "IRB-1"},
}


def examined(lab: Path, given: dict[str, object], **changes: object) -> Passed | Failure:
    inputs = Inputs(**(given | changes))  # type: ignore[arg-type]
    session = lab / "data/.exlab-sessions/0197a000-0000-7000-8000-000000000000"
    return gate.examine(inputs, config(lab), now=NOW, session_folder=session)


def passed(lab: Path, given: dict[str, object], **changes: object) -> Passed:
    found = examined(lab, given, **changes)
    assert isinstance(found, Passed), found
    return found


def refused(lab: Path, given: dict[str, object], **changes: object) -> Failure:
    found = examined(lab, given, **changes)
    assert isinstance(found, Failure), found.destination
    assert msgspec.json.encode(found).decode().isprintable()
    assert len(found.message) < 600
    return found


def variables(**given: object) -> dict[str, object]:
    return {"variables": {"must": "be"} | given}


def readme(**given: object) -> dict[str, object]:
    return {"readme_extra": {"sample_type": "Fixed", "irb": "IRB-1"} | given}


def lims(**given: object) -> dict[str, object]:
    return {"lims_project": {"short_id": "PROJ-7"} | given}


def test_a_project_goes_below_its_equipment(lab: Path) -> None:
    found = passed(lab, PROJECT)
    assert found.destination == lab / "data/CONFOCAL_01/PROJ-7"
    assert found.destination_key == found.project_key == str(found.destination).casefold()
    assert (found.project_short_id, found.run_at) == ("PROJ-7", None)
    assert found.readme.config_fields == {"irb": "IRB-1"}


@pytest.mark.parametrize(
    ("run_kind", "place"),
    [("experimental", "Run_2026-04-17T14-32-05"), ("test", "TestRuns/TestRun_2026-04-17T14-32-05")],
)
def test_a_run_goes_below_its_project(lab: Path, run_kind: str, place: str) -> None:
    found = passed(lab, RUN, run_kind=run_kind)
    assert found.destination == lab / "data/CONFOCAL_01/PROJ-0042" / place
    assert found.project_key == disk.folded(str(lab / "data/CONFOCAL_01/PROJ-0042"))
    assert found.run_at == NOW.replace(microsecond=0)
    assert found.label == "Cortex Q3"


def test_what_the_template_is_rendered_with_has_the_core_values_where_variables_lack_them(lab: Path) -> None:
    found = passed(lab, RUN, **variables(label="other"))
    assert found.answers == {
        "must": "be", "label": "other", "operator": "asmith", "objective": "Look\nat it",
        "equipment_id": "CONFOCAL_01", "project_short_id": "PROJ-0042", "run_kind": "experimental",
        "destination": str(found.destination),
    }  # fmt: skip
    assert "run_kind" not in passed(lab, PROJECT).answers


def test_readme_values_go_to_who_asked_for_them(lab: Path) -> None:
    values = passed(
        lab, RUN, **readme(depth=1.5, wet=False, seen_on=" 2026-04-17 ", protocol=" ", b="2", a=3, empty=None)
    ).readme
    assert values.template_fields == {
        "sample_type": "Fixed", "seen_on": "2026-04-17", "wet": False, "depth": 1.5,
    }  # fmt: skip
    assert values.config_fields == {"irb": "IRB-1"}
    assert values.custom_fields == ({"label": "b", "value": "2"}, {"label": "a", "value": 3})


def test_a_number_among_the_options_is_taken_as_the_text_it_is_shown_as(lab: Path) -> None:
    assert passed(lab, RUN, **readme(sample_type=488)).readme.template_fields == {"sample_type": "488"}


@pytest.mark.parametrize(
    ("run_date", "name"),
    [
        ("2026-01-02T14:32:05+02:00", "2026-01-02T14-32-05"),
        ("2026-01-02T14:32:05", "2026-01-02T14-32-05"),
        ("2026-01-02T14:32:05Z", "2026-01-02T14-32-05"),
        ("2026-01-02t14:32:05.999z", "2026-01-02T14-32-05"),
        ("2026-01-02 14:32:05,9", "2026-01-02T14-32-05"),
        ("2026-01-02T14:32:05-0530", "2026-01-02T14-32-05"),
        ("20260102T143205Z", "2026-01-02T14-32-05"),
        ("2026-01-02T14:32", "2026-01-02T14-32-00"),
        ("2026-01-02", "2026-01-02T00-00-00"),
        ("2026-W01-5", "2026-01-02T00-00-00"),
        ("0001-01-01", "0001-01-01T00-00-00"),
        ("9999-12-31T23:59:59-23:59", "9999-12-31T23-59-59"),
    ],
)
def test_a_run_is_named_by_the_wall_clock_of_its_date(lab: Path, run_date: str, name: str) -> None:
    assert passed(lab, RUN, run_date=run_date).destination.name == f"Run_{name}"


def test_without_a_date_the_first_free_second_is_taken(lab: Path) -> None:
    parent = lab / "data/CONFOCAL_01/PROJ-0042"
    (parent / "Run_2026-04-17T14-32-05").mkdir(parents=True)
    (parent / "RUN_2026-04-17t14-32-06").touch()
    assert passed(lab, RUN).destination.name == "Run_2026-04-17T14-32-07"


def test_now_is_told_in_utc(lab: Path) -> None:
    inputs = Inputs(**RUN)  # type: ignore[arg-type]
    from_tokyo = datetime.fromisoformat("2026-04-18T01:00:00.5+09:00")
    found = gate.examine(inputs, config(lab), now=from_tokyo, session_folder=lab / "data/.exlab-sessions/x")
    assert isinstance(found, Passed)
    assert found.destination.name == "Run_2026-04-17T16-00-00"


def test_a_date_that_is_taken_is_not_moved(lab: Path) -> None:
    (lab / "data/CONFOCAL_01/PROJ-0042/run_2026-01-02t00-00-00").mkdir(parents=True)
    found = refused(lab, RUN, run_date="2026-01-02")
    assert (found.code, found.field) == ("destination_taken", "run_date")


@pytest.mark.parametrize(
    ("there", "field"),
    [
        ("CONFOCAL_01/PROJ-7/", "lims_project.short_id"),
        ("CONFOCAL_01/PROJ-7", "lims_project.short_id"),
        ("CONFOCAL_01/proj-7/", "lims_project.short_id"),
        ("Confocal_01/", "equipment_id"),
        ("CONFOCAL_01", "equipment_id"),
    ],
)
def test_a_project_that_is_there_in_any_letters_is_taken(lab: Path, there: str, field: str) -> None:
    path = lab / "data" / there
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if there.endswith("/") else path.touch()
    found = refused(lab, PROJECT)
    assert (found.code, found.field) == ("destination_taken", field)


def test_a_link_that_leads_nowhere_takes_its_name(lab: Path) -> None:
    (lab / "data/CONFOCAL_01").mkdir()
    (lab / "data/CONFOCAL_01/PROJ-7").symlink_to("nowhere")
    assert refused(lab, PROJECT).code == "destination_taken"


@pytest.mark.parametrize(
    ("name", "field"), [("CONFOCAL_01", "equipment_id"), ("CONFOCAL_01/PROJ-0042", "project_short_id")]
)
def test_a_folder_that_leads_out_of_the_data_root_is_refused(lab: Path, name: str, field: str) -> None:
    link = lab / "data" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(lab / "outside")
    assert refused(lab, RUN).field == field


def test_looking_writes_nothing(lab: Path) -> None:
    before = sorted(lab.rglob("*"))
    passed(lab, RUN)
    passed(lab, PROJECT)
    assert sorted(lab.rglob("*")) == before


def test_a_data_root_that_is_away_is_the_file_systems_error(lab: Path) -> None:
    (lab / "data/.exlab-sessions").rmdir()
    (lab / "data").rmdir()
    with pytest.raises(OSError, match="No such device"):
        examined(lab, RUN)


def test_tasks_of_a_template_are_told_of(lab: Path) -> None:
    with (lab / "templates/run/copier.yml").open("a") as file:
        file.write("_tasks: [rm -rf /]\n")
    assert [caution.code for caution in passed(lab, RUN).warnings] == ["template_has_tasks"]


def test_a_template_of_the_equipment_itself_is_used(lab: Path) -> None:
    own = lab / "data/CONFOCAL_01/.exlab-wizard/templates/own"
    own.mkdir(parents=True)
    (own / "copier.yml").write_text('_exlab_type: project\n_exlab_version: "1"\n')
    assert passed(lab, PROJECT, template_path=str(own)).template.path == own


def test_a_run_kind_that_the_template_does_not_serve_is_refused(lab: Path) -> None:
    (lab / "templates/run/copier.yml").write_text(RUN_TEMPLATE.replace("both", "test"))
    found = refused(lab, RUN)
    assert (found.code, found.field) == ("template_load_error", "template_path")
    assert passed(lab, RUN, run_kind="test")


def test_a_template_that_redeclares_a_core_field_is_refused(lab: Path) -> None:
    (lab / "templates/run/copier.yml").write_text(RUN_TEMPLATE.replace("seen_on", "label"))
    assert refused(lab, RUN).code == "template_core_field_redeclared"


def test_a_question_that_only_copier_can_judge_is_left_to_it(lab: Path) -> None:
    with (lab / "templates/run/copier.yml").open("a") as file:
        file.write("open: {type: str, choices: '{{ many }}', default: a}\n")
    assert passed(lab, RUN, **variables(open=["anything"]))


def test_a_name_that_a_variable_makes_too_long_names_the_variable(lab: Path) -> None:
    found = refused(lab, RUN, **variables(name="n" * 255))
    assert (found.code, found.field) == ("field_too_long", "variables.name")
    assert passed(lab, RUN, **variables(name="n" * 251))


def test_a_path_that_is_too_long_in_the_staging_tree_is_refused(lab: Path) -> None:
    template = str(lab / "templates/run")
    room = os.pathconf(lab, "PC_PATH_MAX") - 1 - len(template) - len("/x")
    os.makedirs(template + ("/" + "d" * 99) * (room // 100) + "/" + "d" * (room % 100))
    found = refused(lab, RUN)
    assert (found.code, found.field) == ("validation_failed", "template_path")


def test_the_length_that_a_path_may_have_is_that_of_the_staging_tree_too(lab: Path) -> None:
    folder = "/".join(["d" * 99] * 30)
    os.makedirs(lab / "templates/run" / folder)
    (lab / "templates/run" / folder / "{{ name }}.{{ name }}").touch()
    tree = lab / "data/.exlab-sessions/0197a000-0000-7000-8000-000000000000/00000000/tree"
    room = os.pathconf(lab, "PC_PATH_MAX") - 1 - len(f"{tree}/{folder}/") - len("/")
    names = "/".join(["n" * 99] * ((room // 2 - 1) // 100))
    fits = names + "/" + "n" * (room // 2 - len(names) - 2)
    assert passed(lab, RUN, **variables(name=fits))
    found = refused(lab, RUN, **variables(name=fits + "nn"))
    assert (found.code, found.field) == ("field_too_long", "variables.name")


def test_what_the_config_requires_is_required_of_a_field_that_the_template_declares_too(lab: Path) -> None:
    strict = config(lab, readme=Readme(defaults=(Field(id="depth", label="Depth", required=True),)))
    inputs = Inputs(**RUN)  # type: ignore[arg-type]
    found = gate.examine(inputs, strict, now=NOW, session_folder=lab / "data/.exlab-sessions/x")
    assert isinstance(found, Failure)
    assert found.field == "readme_extra.depth"


def test_a_disk_without_room_is_told(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 1024**2))
    found = refused(lab, PROJECT)
    assert found.code == "disk_space_insufficient"
    assert found.details is not None
    assert found.details["free_bytes"] == 64 * 1024**2


def test_the_first_thing_that_is_wrong_is_the_answer(lab: Path) -> None:
    wrong = RUN | {
        "equipment_id": "X", "project_short_id": "x", "label": "", "objective": "", "operator": "",
        "template_path": "..", "readme_extra": {}, "variables": {}, "run_date": "soon",
    }  # fmt: skip
    told = []
    while isinstance(found := examined(lab, wrong), Failure):
        name = (found.field or "").partition(".")[0]
        told.append(name)
        wrong[name] = RUN.get(name)
    assert told == [
        "equipment_id", "project_short_id", "label", "objective", "operator", "template_path", "readme_extra",
        "variables", "run_date",
    ]  # fmt: skip


LONG = "x" * 100_000
HALF = "a\ud800b"
RTL = "a\u202eb"
NEST: object = "x"
for _ in range(5000):
    NEST = [NEST]

TEXTS = {"empty": "", "blank": " \t ", "nul": "a\0b", "half": HALF, "long": LONG, "rtl": RTL}
WRONG = "validation_failed"
TOO_LONG = "field_too_long"
LOAD = "template_load_error"


Case = tuple[str, dict[str, object], dict[str, object], str, str]
"""Name, body, change, code and field of a value that must not pass."""


def texts() -> Iterator[Case]:
    for name, text in TEXTS.items():
        for field in ("label", "operator", "objective"):
            yield f"{field} {name}", RUN, {field: text}, TOO_LONG if name == "long" else WRONG, field
        for field in ("equipment_id", "project_short_id", "run_date"):
            yield f"{field} {name}", RUN, {field: text}, WRONG, field
        yield f"template {name}", RUN, {"template_path": text}, LOAD, "template_path"
        yield f"lims {name}", PROJECT, lims(short_id=text), WRONG, "lims_project.short_id"
        if name != "blank":
            yield f"variable key {name}", RUN, variables(**{text: 1}), WRONG, "variables"
            yield f"readme key {name}", RUN, readme(**{text: 1}), WRONG, "readme_extra"
    for name in ("nul", "half", "long"):
        text, code = TEXTS[name], TOO_LONG if name == "long" else WRONG
        yield f"variable {name}", RUN, variables(x=text), code, "variables.x"
        yield f"variable in a list {name}", RUN, variables(x=[{"y": text}]), code, "variables.x"
        yield f"key in a variable {name}", RUN, variables(x={text: 1}), code, "variables.x"
        yield f"readme {name}", RUN, readme(x=text), code, "readme_extra.x"
        yield f"uid {name}", PROJECT, lims(uid=text), code, "lims_project.uid"


def names() -> Iterator[Case]:
    for text in (
        "..",
        "../..",
        "/etc",
        "C:",
        "CONFOCAL_01/..",
        "CONFOCAL_01\n",
        "confocal_01",
        "NUL",
        "\u216b",
    ):
        yield f"equipment {text!a}", RUN, {"equipment_id": text}, WRONG, "equipment_id"
    for text in ("CON", "COM7", "lower"):
        yield f"equipment {text}", RUN, {"equipment_id": text}, "equipment_id_invalid", "equipment_id"
    for text in ("..", "/etc", "PROJ-", "PROJ-1/..", "PROJ-1\n", "proj-1", "PROJ-\u0664", "PROJ--1"):
        yield f"project {text!a}", RUN, {"project_short_id": text}, WRONG, "project_short_id"
        yield f"lims {text!a}", PROJECT, lims(short_id=text), WRONG, "lims_project.short_id"
    yield "no project", RUN, {"project_short_id": None}, WRONG, "project_short_id"
    yield "digits", RUN, {"project_short_id": "PROJ-" + "1" * 300}, TOO_LONG, "project_short_id"
    for number, value in enumerate((None, 7, ["PROJ-1"], {"a": "PROJ-1"}, True, NEST, 10**5000)):
        yield f"lims {number}", PROJECT, lims(short_id=value), WRONG, "lims_project.short_id"
    for text in (
        "..",
        ".",
        "/",
        "/etc/passwd",
        "../outside",
        "run/../../outside",
        "~",
        "missing",
        "run/copier.yml",
    ):
        yield f"template {text!a}", RUN, {"template_path": text}, LOAD, "template_path"
    yield "template of projects", RUN, {"template_path": "project"}, LOAD, "template_path"
    yield "template of runs", PROJECT, {"template_path": "run"}, LOAD, "template_path"


def words() -> Iterator[Case]:
    for text in ("\u200b\u200b", "a\nb", "a\u2028b", "a\x1b[31m", "a\x85b", "\u2066a", "\u3000"):
        yield f"label {text!a}", RUN, {"label": text}, WRONG, "label"
    yield "label of 101", RUN, {"label": "x" * 101}, TOO_LONG, "label"
    yield "objective of 2001", RUN, {"objective": "x" * 2001}, TOO_LONG, "objective"
    yield "operator unknown", RUN, {"operator": "mallory"}, WRONG, "operator"
    yield "operator in other letters", RUN, {"operator": "ASMITH"}, WRONG, "operator"
    for run_kind in (None, "both", "Test", "experimental "):
        yield f"run_kind {run_kind}", RUN, {"run_kind": run_kind}, WRONG, "run_kind"
    yield "kind", RUN | lims(short_id="PROJ-1"), {"kind": "equipment"}, WRONG, "kind"


def dates() -> Iterator[Case]:
    for text in (
        "soon", "2026-13-01", "2026-02-30", "2026-04-17T25:00", "2026-04-17T14:32:61", "2026-04-17x14:32",
        "2026-04-17-14:32", "2026-04-17T14:32:05+99:99", "14:32:05", "1776436325", "\u0662\u0660\u0662\u0666-04-17",
        "2026-04-17T../../x", "2026-04-17\0", "0000-01-01", "+12026-01-01", "2026-04-17T14:32:05Z; rm",
    ):  # fmt: skip
        yield f"date {text!a}", RUN, {"run_date": text}, WRONG, "run_date"


def values() -> Iterator[Case]:
    odd = (float("nan"), float("inf"), 2**63, 10**5000, NEST, {"a": NEST}, b"x", {1}, object(), {"a": {1: 2}})
    for number, value in enumerate(odd):
        yield f"variable {number}", RUN, variables(x=value), WRONG, "variables.x"
        yield f"readme {number}", RUN, readme(x=value), WRONG, "readme_extra.x"
        yield f"lims_project {number}", PROJECT, lims(x=value), WRONG, "lims_project.x"
    yield "no answer", RUN, {"variables": {}}, WRONG, "variables.must"
    for name, wrong in ANSWERS.items():
        for number, value in enumerate(wrong):
            yield f"answer {name} {number}", RUN, variables(**{name: value}), WRONG, f"variables.{name}"
    for name, wrong in FIELDS.items():
        for number, value in enumerate(wrong):
            yield f"field {name} {number}", RUN, readme(**{name: value}), WRONG, f"readme_extra.{name}"


ANSWERS: dict[str, tuple[object, ...]] = {
    "count": ("one", 1.5, True, None, [], {}, "1" * 5000, ""),
    "speed": ("fast", "nan", "inf", False, None, [], "1e999"),
    "wanted": ("perhaps", 2, None, [], 0.5),
    "name": (None, True, [], {}),
    "lens": ("30x", "", None, ["10x"], 10),
    "lasers": (405, "405", [406], [[405]], [True], {"405": 1}, None),
    "doc": ("{", "[" * 20_000, "nan"),
    "free": ("a: [", "&a [*a]", "!!python/object/apply:os.system [id]", "[" * 5000),
    "place": (1, None, ["a"]),
    "must": (None, ["be"]),
    "either": (True, 1.5, "b"),
}
FIELDS: dict[str, tuple[object, ...]] = {
    "sample_type": ("Dead", "", None, True, ["Fixed"], "fixed"),
    "seen_on": ("soon", "17.04.2026", "2026-02-30", "20260417", "2026-04-17T00:00", 20260417),
    "wet": ("yes", 1, []),
    "depth": ("1.5", True, []),
    "protocol": (5, "a\nb", RTL, []),
    "notes": (5, {}),
    "irb": ("", None, " ", 5, {}),
    "own": (["a"], {"a": "b"}),
}

HOSTILE = [*texts(), *names(), *words(), *dates(), *values()]


@pytest.mark.parametrize(
    ("given_", "change", "code", "field"), [one[1:] for one in HOSTILE], ids=[one[0] for one in HOSTILE]
)
def test_a_hostile_value_is_a_failure_that_names_its_field(
    lab: Path, given_: dict[str, object], change: dict[str, object], code: str, field: str
) -> None:
    found = refused(lab, given_, **change)
    assert (found.code, found.field) == (code, field)


@pytest.mark.parametrize("name", ["count", "speed", "wanted", "lens", "lasers", "doc", "free", "place"])
def test_answers_of_the_right_type_pass(lab: Path, name: str) -> None:
    right: dict[str, tuple[object, ...]] = {
        "count": (5, "5", 5.0, -1),
        "speed": (1, 1.5, "1e3"),
        "wanted": (True, "yes", 0, "off"),
        "lens": ("20x",),
        "lasers": ([405, "488"], []),
        "doc": (None, {"a": [1]}, '{"a": 1}'),
        "free": (None, 5, "a: 1", ["b"]),
        "place": ("/any/where",),
    }
    for value in right[name]:
        assert passed(lab, RUN, **variables(**{name: value}))


@pytest.mark.parametrize(
    "label", ["שלום", "ا‌ب", "👩‍🔬 cells", "Zoë", "a" * 100, "<b>", "{{ x }}", "../x", "-rf"]
)
def test_a_label_may_be_any_text_that_people_read(lab: Path, label: str) -> None:
    assert passed(lab, RUN, label=label).label == label


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("{type: int}", "5"), ("{type: int}", 5.0), ("{type: float}", "1e3"), ("{type: bool}", "off"),
        ("{type: bool}", 0), ("{type: str}", 5), ("{type: path}", "a b"), ("{type: json}", '{"a": 1}'),
        ("{type: json}", {"a": 1}), ("{type: yaml}", "a: 1"), ("{type: yaml}", None), ("{choices: [1, b]}", "1"),
        ("{type: str, choices: [488, 405]}", 488), ("{type: int, choices: {a: 1}}", "1"),
        ("{type: int, choices: [1, 2], multiselect: true}", ["1"]), ("{choices: [yes, no]}", True),
    ],
)  # fmt: skip
def test_what_passes_can_be_rendered(lab: Path, question: str, answer: object) -> None:
    import copier

    folder = lab / "templates/project"
    (folder / "copier.yml").write_text(f'_exlab_type: project\n_exlab_version: "1"\nasked: {question}\n')
    found = passed(lab, PROJECT, variables={"asked": answer})
    copier.run_copy(str(folder), str(lab / "out"), data=found.answers, defaults=True, quiet=True)


@pytest.mark.parametrize(
    "question",
    ["{type: str}", "{type: str, default: null}", "{type: int, choices: [1]}", "{}", "{choices: [a]}"],
)
def test_a_question_is_required_where_copier_has_nothing_to_go_on(lab: Path, question: str) -> None:
    import copier

    folder = lab / "templates/project"
    (folder / "copier.yml").write_text(f'_exlab_type: project\n_exlab_version: "1"\nasked: {question}\n')
    assert refused(lab, PROJECT).field == "variables.asked"
    with pytest.raises((ValueError, TypeError)):
        copier.run_copy(str(folder), str(lab / "out"), defaults=True, quiet=True)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    [
        "..",
        "/",
        "PROJ-1",
        "CONFOCAL_01",
        "run",
        "project",
        "asmith",
        "2026-04-17",
        "a\0",
        HALF,
        "../outside",
        "CON",
    ]
)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["must", "count", "lens", "lasers", "doc", "free", "name", "wanted", "speed", "destination", "short_id",
     "sample_type", "irb", "seen_on", "wet", "depth", "protocol", "notes"]
)  # fmt: skip
OBJECTS = st.dictionaries(NAMES | ANY_TEXT, ANY_VALUE, max_size=5)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["equipment_id", "template_path", "label", "operator", "objective"], ANY_TEXT),
        **dict.fromkeys(["project_short_id", "run_date"], st.none() | ANY_TEXT),
        "run_kind": st.sampled_from([None, "experimental", "test"]),
        **dict.fromkeys(["lims_project", "variables", "readme_extra"], OBJECTS),
    },
)


@configured(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(body=st.sampled_from([RUN, PROJECT]), changes=CHANGES)
@example(body=RUN, changes={"variables": {"must": "be", "name": "../../../outside/x"}})
def test_every_value_passes_into_the_data_root_or_is_a_failure(
    lab: Path, body: dict[str, object], changes: dict[str, object]
) -> None:
    found = examined(lab, body, **changes)
    assert msgspec.json.encode(found.answers if isinstance(found, Passed) else found)
    if isinstance(found, Passed):
        assert Path(os.path.realpath(found.destination)).is_relative_to(lab / "data/CONFOCAL_01")
        assert found.destination.parent != lab / "data"
        assert not found.destination.exists()
    assert sorted(path.name for path in (lab / "data").iterdir()) == [".exlab-sessions"]


OFFSETS = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@configured(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(at=st.datetimes(timezones=st.none() | OFFSETS))
def test_every_time_that_python_can_write_names_a_run_by_its_wall_clock(lab: Path, at: datetime) -> None:
    found = passed(lab, RUN, run_date=at.isoformat())
    assert found.destination.name == "Run_" + at.isoformat()[:19].replace(":", "-")


def installed(lab: Path, name: str, **told: object) -> None:
    manifest = {"name": name, "version": "2.1", "supported_extensions": [".csv"], "api_version": "1"} | told
    (lab / "plugins" / name).mkdir()
    (lab / "plugins" / name / "manifest.yml").write_bytes(msgspec.json.encode(manifest))
    (lab / "plugins" / name / "__init__.py").touch()


def listing(lab: Path, *plugins: str) -> None:
    manifest = lab / "templates/run/copier.yml"
    manifest.write_text(RUN_TEMPLATE + f"_exlab_plugins: [{', '.join(plugins)}]\n")


def test_the_plugins_of_a_template_are_planned_once_in_its_order_also_one_that_is_not_there(
    lab: Path,
) -> None:
    installed(lab, "a")
    installed(lab, "z")
    listing(lab, "z", "gone", "a", "z")
    plan = passed(lab, RUN).plugins
    assert [(plugin.name, plugin.version) for plugin in plan] == [("z", "2.1"), ("gone", None), ("a", "2.1")]


def test_the_other_plugins_follow_by_name_where_the_config_has_them_run(lab: Path) -> None:
    for name in ("c", "b", "a"):
        installed(lab, name)
    listing(lab, "b")
    assert [plugin.name for plugin in passed(lab, RUN).plugins] == ["b"]
    all_of_them = config(lab, plugins=settings.Plugins(run_unlisted=True))
    inputs = Inputs(**RUN)  # type: ignore[arg-type]
    found = gate.examine(inputs, all_of_them, now=NOW, session_folder=lab / "data/.exlab-sessions/x")
    assert isinstance(found, Passed)
    assert [plugin.name for plugin in found.plugins] == ["b", "a", "c"]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_that_a_listed_plugin_needs_and_nobody_gave_is_refused(lab: Path, value: object) -> None:
    installed(lab, "wants", required_variables=["stain"])
    assert passed(lab, RUN)
    listing(lab, "wants")
    failure = refused(lab, RUN, **variables(stain=value))
    assert (failure.code, failure.field) == ("plugin_variable_validation_failed", "variables.stain")
    assert passed(lab, RUN, **variables(stain="HE"))


def test_a_variable_that_the_template_asks_for_is_there_when_the_plugin_runs(lab: Path) -> None:
    installed(lab, "wants", required_variables=["lens", "label", "destination"])
    listing(lab, "wants")
    assert passed(lab, RUN).plugins[0].version == "2.1"
