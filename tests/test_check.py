"""The check of a built tree: what it finds, what it leaves alone, and that no file can hold it up."""

import json
import os
import time
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from app.settings import Validator
from app.steps import check
from app.steps.check import Finding

RULES = Validator()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / ".exlab-sessions" / "0199-session" / "attempt" / "tree"
    made.mkdir(parents=True)
    return made


def write(tree: Path, path: str, content: str | bytes) -> None:
    target = tree / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)


def findings(
    tree: Path,
    *rendered: str,
    run_kind: Literal["experimental", "test"] | None = None,
    destination: Path = Path("/data/CONFOCAL_01/PROJ-0042"),
    rules: Validator = RULES,
) -> tuple[Finding, ...]:
    return check.check(
        tree,
        rendered=frozenset(rendered),
        staging=tree,
        kind="run" if run_kind else "project",
        run_kind=run_kind,
        destination=destination,
        rules=rules,
    )


def told(found: tuple[Finding, ...]) -> list[tuple[str, str, int | None]]:
    return [(finding.rule, finding.path, finding.line) for finding in found]


def test_an_orderly_tree_has_no_findings(tree: Path) -> None:
    write(tree, "README.md", "---\nlabel: A\n---\nsee <your_protocol> and {{ this }}\n")
    write(tree, "raw/plan.csv", "well,volume\nA1,<2 mM\n")
    write(tree, ".exlab-wizard/creation.json", "{}")
    assert findings(tree, "README.md", "raw/plan.csv") == ()


def test_marks_in_a_rendered_file_are_told_with_their_line(tree: Path) -> None:
    write(tree, "notes.txt", "ok\nsample <sample_id>\n{{ operator }}\n{% if x %}\n")
    assert told(findings(tree, "notes.txt")) == [
        ("unresolved_placeholder_token", "notes.txt", 2),
        ("leftover_jinja_marker", "notes.txt", 3),
        ("leftover_jinja_marker", "notes.txt", 4),
    ]


def test_a_mark_over_several_lines_is_found_where_it_begins(tree: Path) -> None:
    write(tree, "notes.txt", 'a\n{{ {"x": 1}["x"]\n}}\n')
    assert told(findings(tree, "notes.txt")) == [("leftover_jinja_marker", "notes.txt", 2)]


def test_a_file_that_no_template_rendered_may_hold_marks(tree: Path) -> None:
    write(tree, "verbatim.txt", "<sample_id> {{ operator }}")
    assert findings(tree) == ()


@pytest.mark.parametrize("text", ["<2 mM", "a < b > c", "< name >", "<a-b>", "<1a>", "}} {{", "{ % x % }"])
def test_text_that_only_resembles_a_mark_is_left_alone(tree: Path, text: str) -> None:
    write(tree, "notes.txt", text)
    assert findings(tree, "notes.txt") == ()


@pytest.mark.parametrize("opening", ["---\n", "\ufeff---\r\n"])
def test_in_markdown_the_front_matter_alone_is_read(tree: Path, opening: str) -> None:
    write(tree, "Protocol.MD", opening + "title: <title>\n---\n<prose> {{ prose }}\n")
    assert told(findings(tree, "Protocol.MD")) == [("unresolved_placeholder_token", "Protocol.MD", 2)]


@pytest.mark.parametrize("text", ["a\n---\n<b>\n---\n", "---\n<b>\n", "", "---"])
def test_markdown_without_front_matter_is_prose(tree: Path, text: str) -> None:
    write(tree, "notes.md", text)
    assert findings(tree, "notes.md") == ()


def test_a_mark_that_stands_often_is_told_once(tree: Path) -> None:
    write(tree, "notes.txt", "\n" + "<again>\n" * 1000)
    assert told(findings(tree, "notes.txt")) == [("unresolved_placeholder_token", "notes.txt", 2)]


def test_a_file_tells_a_bounded_number_of_marks(tree: Path) -> None:
    write(tree, "notes.txt", "".join(f"<name_{number}>\n" for number in range(5000)))
    assert len(findings(tree, "notes.txt")) == 100


def test_the_config_says_which_suffixes_are_read(tree: Path) -> None:
    write(tree, "notes.log", "<name>")
    assert findings(tree, "notes.log") == ()
    assert findings(tree, "notes.log", rules=Validator(content_scan_extensions=(".log",)))


def test_the_config_says_up_to_which_size_a_file_is_read(tree: Path) -> None:
    write(tree, "notes.txt", "<name>" + "x" * 94)
    assert findings(tree, "notes.txt", rules=Validator(content_scan_max_bytes=100))
    assert findings(tree, "notes.txt", rules=Validator(content_scan_max_bytes=99)) == ()


def test_a_binary_file_is_not_searched_for_marks(tree: Path) -> None:
    write(tree, "image.txt", b"\x00\x01<name>")
    assert findings(tree, "image.txt") == ()


def test_text_that_is_no_utf8_is_searched_all_the_same(tree: Path) -> None:
    write(tree, "notes.txt", b"Pr\xe4parat\n<name>\n")
    assert told(findings(tree, "notes.txt")) == [("unresolved_placeholder_token", "notes.txt", 2)]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("<sample>", ["unresolved_placeholder_token", "illegal_filesystem_character"]),
        ("{{ sample }}.txt", ["leftover_jinja_marker"]),
        ("{% x %}", ["leftover_jinja_marker"]),
        ("10:30", ["illegal_filesystem_character"]),
        ("what?.txt", ["illegal_filesystem_character"]),
        ("back\\slash", ["illegal_filesystem_character"]),
        ("bell\x07", ["illegal_filesystem_character"]),
        ("ends.", ["illegal_filesystem_character"]),
        ("ends ", ["illegal_filesystem_character"]),
        ("con", ["reserved_filesystem_name"]),
        ("Aux.tar.gz", ["reserved_filesystem_name"]),
        ("COM1 .txt", ["reserved_filesystem_name"]),
        ("LPT³", ["reserved_filesystem_name"]),
    ],
)
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_name_that_must_not_be_is_found_on_files_and_folders(
    tree: Path, name: str, rules: list[str], make: type
) -> None:
    make(tree / name)
    assert told(findings(tree)) == [(rule, name, None) for rule in rules]


@pytest.mark.parametrize("name", ["console", "COM10", "aux_2", "a.con", "Präparat 1.txt", ".hidden", "a..b"])
def test_a_name_that_only_resembles_a_bad_one_is_left_alone(tree: Path, name: str) -> None:
    (tree / name).touch()
    assert findings(tree) == ()


def test_a_name_that_is_no_unicode_is_found_and_can_be_told_as_json(tree: Path) -> None:
    os.close(os.open(os.fsencode(tree) + b"/caf\xe9", os.O_CREAT | os.O_WRONLY))
    (finding,) = findings(tree)
    assert finding.rule == "illegal_filesystem_character"
    assert msgspec.json.decode(msgspec.json.encode(finding), type=Finding) == finding


def test_a_bad_folder_does_not_make_what_is_in_it_bad(tree: Path) -> None:
    write(tree, "10:30/plan.txt", "")
    assert told(findings(tree)) == [("illegal_filesystem_character", "10:30", None)]


@pytest.mark.parametrize(
    ("run_kind", "below", "count"),
    [
        ("experimental", "Run_2026-04-17T14-32-05", 0),
        ("test", "TestRuns/TestRun_2026-04-17T14-32-05", 0),
        ("experimental", "TestRun_2026-04-17T14-32-05", 1),
        ("experimental", "TestRuns/Run_2026-04-17T14-32-05", 1),
        ("experimental", "TestRuns/TestRun_2026-04-17T14-32-05", 2),
        ("test", "TestRuns/Run_2026-04-17T14-32-05", 1),
        ("test", "TestRun_2026-04-17T14-32-05", 1),
    ],
)
def test_a_run_folder_agrees_with_its_run_kind(
    tree: Path, run_kind: Literal["experimental", "test"], below: str, count: int
) -> None:
    found = findings(tree, run_kind=run_kind, destination=Path("/data/CONFOCAL_01/PROJ-1", below))
    assert told(found) == [("mode_prefix_mismatch", ".", None)] * count


def test_a_project_may_be_called_anything(tree: Path) -> None:
    assert findings(tree, destination=Path("/data/TestRuns/PROJ-1")) == ()


@pytest.mark.parametrize("path", ["log.txt", "log.bin", "deep/er/notes.md", ".exlab-wizard/creation.json"])
def test_a_file_that_tells_the_staging_tree_is_found_wherever_it_is(tree: Path, path: str) -> None:
    write(tree, path, f"first\nbuilt in {tree}/raw\n")
    assert told(findings(tree)) == [("staging_path_leaked", path, 2)]


def test_the_staging_tree_is_found_in_a_binary_file(tree: Path) -> None:
    write(tree, "project.bin", b"\0\0" + str(tree).encode("utf-16-le") + b"\0\0")
    assert told(findings(tree)) == [("staging_path_leaked", "project.bin", None)]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_staging_tree_is_found_as_json_writes_it(tmp_path: Path, ascii_only: bool) -> None:
    tree = tmp_path / 'Läbor "2"' / "tree"
    tree.mkdir(parents=True)
    write(tree, "plan.json", json.dumps({"folder": str(tree)}, ensure_ascii=ascii_only))
    assert told(findings(tree)) == [("staging_path_leaked", "plan.json", 1)]


def test_the_staging_tree_is_found_by_its_path_without_links(tree: Path, tmp_path: Path) -> None:
    write(tree, "log.txt", str(tree))
    (tmp_path / "mount").symlink_to(tree.parent)
    found = findings(tmp_path / "mount" / "tree")
    assert told(found) == [("staging_path_leaked", "log.txt", 1)]


def test_a_link_into_the_staging_tree_is_found(tree: Path) -> None:
    write(tree, "raw/data.txt", "")
    (tree / "latest").symlink_to(tree / "raw")
    (tree / "near").symlink_to("raw")
    assert told(findings(tree)) == [("staging_path_leaked", "latest", None)]


def test_links_are_not_followed_and_pipes_not_opened(tree: Path, tmp_path: Path) -> None:
    write(tmp_path, "outside/notes.txt", "<name>")
    (tree / "folder").symlink_to(tmp_path / "outside")
    (tree / "notes.txt").symlink_to(tmp_path / "outside" / "notes.txt")
    os.mkfifo(tree / "pipe.txt")
    assert findings(tree, "notes.txt", "folder/notes.txt", "pipe.txt") == ()


def test_the_same_tree_gives_the_same_findings_in_the_same_order(tree: Path) -> None:
    for name in ("b?", "a?", "c?"):
        write(tree, f"{name}/x?", "")
    found = findings(tree)
    assert [finding.path for finding in found] == ["a?", "b?", "c?", "a?/x?", "b?/x?", "c?/x?"]
    assert found == findings(tree)


@pytest.mark.parametrize(
    "unit", ["{{", "{%", "{{}", "<a", "<", "{{a}}", "<a>", "---\n", "{% %", "}}{{", "<é>", "\n{{\n"]
)
@pytest.mark.parametrize("name", ["big.txt", "big.md"])
def test_no_content_takes_long_to_read(tree: Path, unit: str, name: str) -> None:
    write(tree, name, "---\n" + unit * (4 * 1024 * 1024 // len(unit.encode())))
    started = time.process_time()
    findings(tree, name)
    assert time.process_time() - started < 10


def test_a_very_long_mark_makes_a_short_message(tree: Path) -> None:
    write(tree, "notes.txt", "{{" + "x" * 1_000_000 + "}}")
    (finding,) = findings(tree, "notes.txt")
    assert len(finding.message) < 200


def test_a_file_that_cannot_be_read_raises(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tree, "notes.txt", "")

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "refused", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError):
        findings(tree)


def test_a_tree_that_is_not_there_is_not_taken_for_a_clean_one(tree: Path) -> None:
    with pytest.raises(FileNotFoundError):
        findings(tree / "gone")
