"""What a published folder tells of its own making."""

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from app.settings import Equipment
from app.steps import provenance
from app.steps.provenance import Facts

CONFOCAL = Equipment(id="CONFOCAL_01", label="Confocal", local_root="/data/lab", nas_root="//nas01/lab")
RUN = Facts(
    session_id="0198c0de-0000-7000-8000-000000000001",
    kind="run",
    run_kind="experimental",
    created_at=datetime(2026, 4, 17, 16, 32, 5, 999, tzinfo=timezone(timedelta(hours=2))),
    created_by="labpc",
    label="Cortex Q3 sweep",
    operator="asmith",
    objective="Characterize density.",
    equipment=CONFOCAL,
    project_short_id="PROJ-0042",
    lims_project={"uid": "8c7e9d2f", "short_id": "PROJ-0042", "name_at_creation": "Cortex Q3 Pilot"},
    template_name="confocal_run",
    template_version="2.1",
    template_path="/templates/confocal_run",
    template_run_scope="both",
    variables={"laser": 488, "depths": [1, 2.5], "note": "ünï"},
    template_fields={"sample_type": "Fixed tissue"},
    config_fields={"irb_protocol": "IRB-2026-0042"},
    custom_fields=({"label": "Collaborator", "value": "Dr. Lee"}, {"label": "Duration", "value": "3.5"}),
    destination=Path("/data/lab/CONFOCAL_01/PROJ-0042/Run_2026-04-17T14-32-05"),
    nas_path="//nas01/lab/CONFOCAL_01/PROJ-0042/Run_2026-04-17T14-32-05",
)
PROJECT = msgspec.structs.replace(
    RUN, kind="project", run_kind=None, destination=Path("/data/lab/CONFOCAL_01/PROJ-0042")
)
NOW = datetime(2026, 4, 17, 14, 0, tzinfo=UTC)


def creation(tree: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tree / ".exlab-wizard" / "creation.json").read_text("utf-8"))
    return found


def front_matter(tree: Path) -> dict[str, Any]:
    """As tools in the labs read it: up to the second line that is `---`, by whatever YAML parser."""
    with open(tree / "README.md", encoding="utf-8") as file:
        assert file.readline().strip() == "---"
        lines: list[str] = []
        for line in file:
            if line.strip() == "---":
                found: dict[str, Any] = yaml.safe_load("".join(lines))
                return found
            lines.append(line)
    raise AssertionError("the front matter does not end")


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_it_writes_creation_json_of_a_run_and_leaves_out_defaults(tmp_path: Path) -> None:
    provenance.write(tmp_path, RUN)
    assert creation(tmp_path) == {
        "schema_version": "1.9",
        "created_at": "2026-04-17T14:32:05Z",
        "created_by": "labpc",
        "level": "run",
        "run_kind": "experimental",
        "lims_project": {
            "uid": "8c7e9d2f",
            "short_id": "PROJ-0042",
            "name_at_creation": "Cortex Q3 Pilot",
        },
        "template": {
            "name": "confocal_run",
            "version": "2.1",
            "source_path": "/templates/confocal_run",
            "run_scope": "both",
        },
        "variables": {"laser": 488, "depths": [1, 2.5], "note": "ünï"},
        "paths": {"local": str(RUN.destination), "nas": RUN.nas_path},
        "session_id": RUN.session_id,
    }


def test_it_writes_what_plugins_did_and_were_told(tmp_path: Path) -> None:
    applied = {"plugin": "filler", "version": "1", "files_affected": ["a.xlsx"], "status": "success"}
    told = {"plugin": "filler", "file": "a.xlsx", "field": "dye", "value": "DAPI", "operator": "asmith"}
    facts = msgspec.structs.replace(
        RUN, plugins_applied=[applied], plugin_inputs=[told], sync_status="blocked_by_validation"
    )
    provenance.write(tmp_path, facts)
    found = creation(tmp_path)
    assert found["plugins_applied"] == [applied]
    assert found["plugin_inputs"] == [told]
    assert found["sync_status"] == "blocked_by_validation"


def test_a_lims_project_is_completed_and_keeps_what_else_was_said(tmp_path: Path) -> None:
    said = {"short_id": "PROJ-0042", "name": "Cortex", "source": "cache", "owner": {"id": 7}}
    provenance.write(tmp_path, msgspec.structs.replace(PROJECT, lims_project=said))
    assert creation(tmp_path)["lims_project"] == {
        "uid": "",
        "short_id": "PROJ-0042",
        "name_at_creation": "Cortex",
        "source": "cache",
        "name": "Cortex",
        "owner": {"id": 7},
    }


def test_a_run_without_a_lims_project_names_its_project(tmp_path: Path) -> None:
    provenance.write(tmp_path, msgspec.structs.replace(RUN, lims_project={}))
    assert creation(tmp_path)["lims_project"] == {
        "uid": "",
        "short_id": "PROJ-0042",
        "name_at_creation": "PROJ-0042",
    }


def test_readme_fields_hold_the_values_by_layer(tmp_path: Path) -> None:
    provenance.write(tmp_path, RUN)
    found = json.loads((tmp_path / ".exlab-wizard" / "readme_fields.json").read_bytes())
    assert found == {
        "schema_version": "1.1",
        "generated_at": "2026-04-17T14:32:05Z",
        "core_fields": {
            "label": "Cortex Q3 sweep",
            "operator": "asmith",
            "objective": "Characterize density.",
        },
        "template_fields": {"sample_type": "Fixed tissue"},
        "config_fields": {"irb_protocol": "IRB-2026-0042"},
        "custom_fields": [
            {"label": "Collaborator", "value": "Dr. Lee"},
            {"label": "Duration", "value": "3.5"},
        ],
        "system_fields": {
            "created": "2026-04-17T14:32:05Z",
            "created_by": "labpc",
            "equipment": {"id": "CONFOCAL_01", "label": "Confocal"},
            "template": {"name": "confocal_run", "version": "2.1"},
            "project": "PROJ-0042",
            "run": "Run_2026-04-17T14-32-05",
            "run_kind": "experimental",
        },
    }


def test_the_front_matter_names_all_fields_in_order(tmp_path: Path) -> None:
    provenance.write(tmp_path, RUN)
    found = front_matter(tmp_path)
    assert list(found) == [
        "readme_schema_version",
        "label",
        "operator",
        "objective",
        "template_fields",
        "config_fields",
        "custom_fields",
        "system",
    ]
    assert found["readme_schema_version"] == "1.1"
    assert found["custom_fields"] == list(RUN.custom_fields)
    assert found["system"]["run"] == "Run_2026-04-17T14-32-05"
    assert found["system"]["created"] == "2026-04-17T14:32:05Z"


def test_a_project_tells_of_no_run(tmp_path: Path) -> None:
    provenance.write(tmp_path, PROJECT)
    assert not {"run", "run_kind"} & set(front_matter(tmp_path)["system"])
    assert creation(tmp_path)["level"] == "project"


HARD_TEXTS = [
    "no",
    "y",
    "~",
    "null",
    "1e3",
    "012",
    "0o17",
    "1_000",
    "12:30:00",
    "2026-04-17",
    "=",
    "- a\n- b",
    "---",
    "first\n---\nlabel: forged",
    "first\n  ---  \nlast",
    "...\nend",
    "  spaces  ",
    "trailing \nspace",
    "tab\there",
    "carriage\r\nreturn",
    "next\x85line\u2028and\u2029more",
    "nul\x00 bell\x07 delete\x7f",
    "#comment: {not} [a] 'map' \"or\" & *list | > % @ `",
    "\ufeffbom",
    "µm – Ω 日本語 👩\u200d🔬 \u202eright to left",
    "plain\n\n\nwith gaps\n  and indents",
    "long " * 400,
    "",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_the_front_matter_gives_back_every_text(tmp_path: Path, text: str) -> None:
    facts = msgspec.structs.replace(
        RUN,
        label=text,
        objective=text,
        template_fields={"plain": text, text: "as a key"},
        custom_fields=({"label": text, "value": text},),
    )
    provenance.write(tmp_path, facts)
    found = front_matter(tmp_path)
    assert (found["label"], found["objective"], found["operator"]) == (text, text, "asmith")
    assert found["template_fields"] == {"plain": text, text: "as a key"}
    assert found["custom_fields"] == [{"label": text, "value": text}]


def test_the_front_matter_keeps_types_apart(tmp_path: Path) -> None:
    values = {"number": 1000.5, "large": 2**70, "yes": True, "none": None, "text": "1e3", "list": ["no", 1]}
    provenance.write(tmp_path, msgspec.structs.replace(RUN, config_fields=values, template_fields=values))
    assert front_matter(tmp_path)["config_fields"] == values
    text = (tmp_path / "README.md").read_text("utf-8")
    assert 'text: "1e3"' in text, "a YAML 1.2 parser takes a bare 1e3 for a number"
    assert "&id" not in text, "anchors are not for people"


def test_a_text_of_several_lines_can_be_read_by_people(tmp_path: Path) -> None:
    provenance.write(tmp_path, msgspec.structs.replace(RUN, objective="First line.\nSecond line."))
    assert "objective: |-\n  First line.\n  Second line.\n" in (tmp_path / "README.md").read_text("utf-8")


def test_the_text_that_the_template_rendered_stands_below_the_front_matter(tmp_path: Path) -> None:
    rendered = "\ufeff# Protocol\n\n---\n\nBody é\n"
    provenance.write(tmp_path, msgspec.structs.replace(RUN, rendered_readme=rendered))
    assert (tmp_path / "README.md").read_text("utf-8").endswith("\n---\n\n# Protocol\n\n---\n\nBody é\n")


def test_without_a_rendered_text_there_is_a_heading_and_room_for_notes(tmp_path: Path) -> None:
    provenance.write(tmp_path, msgspec.structs.replace(RUN, label="two\nlines"))
    body = (tmp_path / "README.md").read_text("utf-8").rpartition("\n---\n")[2]
    assert body.startswith("\n# two lines\n\n## Notes\n")


def test_writing_twice_gives_the_same_bytes_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    provenance.write(tmp_path, RUN)
    first = contents(tmp_path)
    (tmp_path / ".README.md.tmp").write_bytes(b"half")
    (tmp_path / ".exlab-wizard" / ".creation.json.tmp").write_bytes(b"half")
    provenance.write(tmp_path, RUN)
    assert contents(tmp_path) == first
    assert set(first) == {"README.md", ".exlab-wizard/creation.json", ".exlab-wizard/readme_fields.json"}


def test_links_that_a_template_left_lead_nothing_outside(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    outside.mkdir()
    tree.mkdir()
    (outside / "file").write_text("mine")
    (tree / ".exlab-wizard").symlink_to(outside)
    (tree / "README.md").symlink_to(outside / "file")
    provenance.write(tree, RUN)
    assert contents(outside) == {"file": b"mine"}
    assert not (tree / "README.md").is_symlink()
    assert creation(tree)["session_id"] == RUN.session_id


def test_the_files_have_the_mode_of_files_made_in_place(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        provenance.write(tmp_path, RUN)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "README.md").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / ".exlab-wizard").stat().st_mode) == 0o750


def test_a_folder_names_the_session_that_made_it(tmp_path: Path) -> None:
    provenance.write(tmp_path, RUN)
    assert provenance.session_of(tmp_path) == RUN.session_id


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"session_id": 5}', b'{"level": "run"}', b"\xff\xfe", b'{"a":"\xff"}', b"[" * 10**5],
)
def test_a_folder_of_another_origin_names_no_session(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".exlab-wizard").mkdir()
    (tmp_path / ".exlab-wizard" / "creation.json").write_bytes(content)
    assert provenance.session_of(tmp_path) is None
    assert provenance.project_lims(tmp_path) is None


def test_a_folder_without_provenance_names_no_session(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert [provenance.session_of(tmp_path / name) for name in (".", "absent", "file")] == [None] * 3


def test_a_run_finds_the_lims_project_of_its_project(tmp_path: Path) -> None:
    provenance.write(tmp_path, msgspec.structs.replace(PROJECT, lims_project={"uid": "u", "owner": "Lee"}))
    lims = provenance.project_lims(tmp_path)
    assert lims == {
        "uid": "u",
        "short_id": "PROJ-0042",
        "name_at_creation": "Cortex Q3 sweep",
        "owner": "Lee",
    }
    run = tmp_path / "run"
    run.mkdir()
    provenance.write(run, msgspec.structs.replace(RUN, lims_project=lims))
    assert creation(run)["lims_project"] == lims


def test_a_sync_status_changes_nothing_else(tmp_path: Path) -> None:
    provenance.write(tmp_path, RUN)
    path = tmp_path / ".exlab-wizard" / "creation.json"
    before = creation(tmp_path) | {"lab_key": {"deep": [1, 2**70, 0.1]}}
    path.write_text(json.dumps(before))
    path.chmod(0o640)
    provenance.set_sync_status(tmp_path, "synced")
    assert creation(tmp_path) == before | {"sync_status": "synced"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    provenance.set_sync_status(tmp_path, "pending")
    assert creation(tmp_path) == before


@pytest.mark.parametrize(("found", "then"), [("1.7", "1.9"), ("1.12", "1.12"), ("2.0", "2.0")])
def test_an_update_raises_an_older_schema_and_keeps_a_newer_one(
    tmp_path: Path, found: str, then: str
) -> None:
    (tmp_path / ".exlab-wizard").mkdir()
    (tmp_path / ".exlab-wizard" / "creation.json").write_text(json.dumps({"schema_version": found}))
    provenance.set_sync_status(tmp_path, "failed")
    assert creation(tmp_path) == {"schema_version": then, "sync_status": "failed"}


def test_an_unreadable_creation_json_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".exlab-wizard").mkdir()
    path = tmp_path / ".exlab-wizard" / "creation.json"
    path.write_bytes(b'{"half": ')
    with pytest.raises(provenance.Unreadable, match=r"creation\.json"):
        provenance.set_sync_status(tmp_path, "synced")
    assert path.read_bytes() == b'{"half": '


def test_a_reader_never_sees_half_a_file_while_it_changes(tmp_path: Path) -> None:
    provenance.write(tmp_path, msgspec.structs.replace(RUN, variables={"bulk": "x" * 100_000}))
    done = threading.Event()

    def change() -> None:
        for number in range(30):
            provenance.set_sync_status(tmp_path, f"state-{number}")
        done.set()

    writer = threading.Thread(target=change)
    writer.start()
    while not done.is_set():
        assert len(creation(tmp_path)["variables"]["bulk"]) == 100_000
    writer.join()


def registry(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ".exlab-wizard" / "equipment.json").read_bytes())
    return found


def test_an_equipment_is_registered(tmp_path: Path) -> None:
    provenance.write_equipment(tmp_path, CONFOCAL, NOW)
    assert registry(tmp_path) == {
        "schema_version": "1.0",
        "id": "CONFOCAL_01",
        "label": "Confocal",
        "configured_local_root": "/data/lab",
        "configured_nas_root": "//nas01/lab",
        "first_seen_at": "2026-04-17T14:00:00Z",
        "last_modified_at": "2026-04-17T14:00:00Z",
    }


def test_an_unchanged_equipment_is_not_written_again(tmp_path: Path) -> None:
    provenance.write_equipment(tmp_path, CONFOCAL, NOW)
    before = (tmp_path / ".exlab-wizard" / "equipment.json").stat()
    provenance.write_equipment(tmp_path, CONFOCAL, NOW + timedelta(days=1))
    after = (tmp_path / ".exlab-wizard" / "equipment.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_changed_equipment_keeps_when_it_was_first_seen_and_unknown_keys(tmp_path: Path) -> None:
    provenance.write_equipment(tmp_path, CONFOCAL, NOW)
    path = tmp_path / ".exlab-wizard" / "equipment.json"
    path.write_text(json.dumps(registry(tmp_path) | {"serial": "X1"}))
    provenance.write_equipment(
        tmp_path, msgspec.structs.replace(CONFOCAL, label="New"), NOW + timedelta(days=1)
    )
    found = registry(tmp_path)
    assert (found["label"], found["serial"]) == ("New", "X1")
    assert (found["first_seen_at"], found["last_modified_at"]) == (
        "2026-04-17T14:00:00Z",
        "2026-04-18T14:00:00Z",
    )


def test_a_damaged_registry_entry_is_made_anew_and_the_old_one_kept(tmp_path: Path) -> None:
    provenance.write_equipment(tmp_path, CONFOCAL, NOW)
    path = tmp_path / ".exlab-wizard" / "equipment.json"
    path.write_bytes(b"half")
    provenance.write_equipment(tmp_path, CONFOCAL, NOW)
    assert registry(tmp_path)["id"] == "CONFOCAL_01"
    assert path.with_name("equipment.json.unreadable").read_bytes() == b"half"


def test_sessions_that_register_the_same_equipment_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    threads = [
        threading.Thread(
            target=provenance.write_equipment,
            args=(tmp_path, msgspec.structs.replace(CONFOCAL, label=f"L{number}"), NOW),
        )
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry(tmp_path)["label"] in {f"L{number}" for number in range(8)}
    assert os.listdir(tmp_path / ".exlab-wizard") == ["equipment.json"]


@pytest.mark.parametrize(
    ("nas_root", "expected"),
    [
        ("//nas01/lab", "//nas01/lab/CONFOCAL_01/PROJ-0042/TestRuns/TestRun_1"),
        ("/mnt/nas/", "/mnt/nas/CONFOCAL_01/PROJ-0042/TestRuns/TestRun_1"),
        ("", ""),
    ],
)
def test_the_nas_path_lies_below_the_equipments_root(nas_root: str, expected: str) -> None:
    equipment = msgspec.structs.replace(CONFOCAL, nas_root=nas_root)
    destination = Path("/data/lab/CONFOCAL_01/PROJ-0042/TestRuns/TestRun_1")
    assert provenance.nas_path(equipment, Path("/data/lab"), destination) == expected
