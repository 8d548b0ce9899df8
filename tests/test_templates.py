"""Reading, finding and keeping templates: hostile ones included."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import Failure
from app.steps import pinning, templates
from app.steps.templates import Choice, Template

RUN = '_exlab_type: run\n_exlab_version: "1.0"\n_exlab_run_scope: both\n'
PROJECT = '_exlab_type: project\n_exlab_version: "1.0"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "templates" / "confocal"
    made.mkdir(parents=True)
    (made / "copier.yml").write_text(PROJECT)
    return made


def loaded(folder: Path, text: str | bytes) -> Template | Failure:
    (folder / "copier.yml").write_bytes(text.encode() if isinstance(text, str) else text)
    return templates.load(folder)


def good(folder: Path, text: str) -> Template:
    found = loaded(folder, text)
    assert isinstance(found, Template), found
    return found


def test_a_full_manifest_becomes_a_record(folder: Path) -> None:
    template = good(
        folder,
        RUN
        + """
_exlab_description: "  Standard acquisition "
_exlab_plugins: [stamp, rename, stamp]
_exlab_plugins_fatal: true
_exlab_readme:
  fields:
    - {id: laser, label: Laser, type: choice, options: [405, 488.5, none], required: true}
    - {id: seen_on, type: date, default: 2026-04-17, hint: null}
_answers_file: .exlab-answers.yml
_tasks: [rm -rf /]
sample: {type: str, choices: [Fixed, Live], help: "What is it?"}
count: 3
""",
    )
    assert (template.name, template.path, template.type) == ("confocal", folder, "run")
    assert (template.run_scope, template.version, template.description) == (
        "both", "1.0", "Standard acquisition",
    )  # fmt: skip
    assert template.plugins == ("stamp", "rename")
    assert template.plugins_fatal
    assert template.has_tasks
    assert template.answers_file == ".exlab-answers.yml"
    laser, seen_on = template.readme_fields
    assert (laser.options, laser.required) == (("405", "488.5", "none"), True)
    assert (seen_on.label, seen_on.default) == ("seen_on", "2026-04-17")
    sample, count = template.questions
    assert sample.choices == (Choice("Fixed", "Fixed"), Choice("Live", "Live"))
    assert sample.required
    assert (count.type, count.default, count.required) == ("int", 3, False)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("{type: str}", {"type": "str", "required": True}),
        ("{type: str, default: null}", {"required": True}),
        ("null", {"type": "yaml", "required": False}),
        ("{}", {"type": "yaml", "required": True}),
        ("{type: str, when: false}", {"when": False, "required": False}),
        ("{type: str, when: 'no'}", {"when": False, "required": False}),
        ("{type: str, when: '{{ other }}'}", {"when": "{{ other }}", "required": False}),
        ("{default: no}", {"type": "bool", "default": False}),
        ("{type: '{{ kind }}'}", {"computed": True}),
        ("{type: str, choices: '{{ many }}'}", {"computed": True, "choices": ()}),
        ("{type: str, choices: ['{{ a }}']}", {"computed": True}),
        (
            "{type: int, choices: {one: 1, two: {value: 2}}}",
            {"choices": (Choice("one", 1), Choice("two", 2))},
        ),
        ("{type: int, choices: [[one, 1]]}", {"choices": (Choice("one", 1),)}),
        ("{choices: [yes, no]}", {"choices": (Choice("True", True), Choice("False", False))}),
        ("{type: str, default: '', secret: true}", {"secret": True, "required": False}),
    ],
)
def test_questions_mean_what_copier_takes_them_to_mean(
    folder: Path, question: str, expected: dict[str, object]
) -> None:
    (found,) = good(folder, PROJECT + f"asked: {question}\n").questions
    assert {name: getattr(found, name) for name in expected} == expected


def test_questions_are_found_secret_by_the_list_of_the_template(folder: Path) -> None:
    (found,) = good(folder, PROJECT + "_secret_questions: [key]\nkey: {type: str, default: x}\n").questions
    assert found.secret


def test_own_marks_of_the_template_make_an_expression(folder: Path) -> None:
    envops = "_envops: {variable_start_string: '[[', variable_end_string: ']]'}\n"
    one, other = good(
        folder,
        PROJECT + envops + "one: {type: str, when: '[[ x ]]'}\nother: {type: str, when: '{{ x }}'}\n",
    ).questions
    assert (one.when, other.when) == ("[[ x ]]", True)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join(['*' + before] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{now}: &{now} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE = {
    "nothing": "",
    "not utf-8": b"\xff\xfe\xfa",
    "nul": "_exlab_type: \0",
    "no mapping": "- a\n- b\n",
    "a scalar": "text",
    "no yaml": "a: [b\n",
    "tabs": "a:\n\t- b",
    "two documents": PROJECT + "---\nb: 1\n",
    "aliases without end": PROJECT + BOMB,
    "merges without end": PROJECT + MERGES,
    "holds itself": PROJECT + "a: &a [*a]\n",
    "merges itself": PROJECT + "a: &a {<<: *a}\n",
    "deep flow": PROJECT + "a: " + "[" * 5000,
    "deep blocks": PROJECT + "a:\n" + "".join("  " * n + "- a:\n" for n in range(1, 200)),
    "deep keys": PROJECT + "? " * 3000 + "a",
    "large": PROJECT + "a: " + "x" * 300_000,
    "many": PROJECT + "a: [" + "1," * 30_000 + "]",
    "long number": PROJECT + "a: " + "9" * 100_000,
    "long hexadecimal number": PROJECT + "a: 0x" + "f" * 100_000,
    "long binary number": PROJECT + "a: 0b" + "1" * 100_000,
    "number by sixties": PROJECT + "a: 1" + ":59" * 60_000,
    "a month too many": PROJECT + "a: 2026-13-45\n",
    "offset too far": PROJECT + "a: 2001-12-14t21:59:43.10 -99:99\n",
    "half a character": PROJECT + 'a: "\\ud800"\n',
    "runs python": PROJECT + "a: !!python/object/apply:os.system [id]\n",
    "runs python by a mapping": PROJECT + "a: !!python/object:os.system {}\n",
    "includes": PROJECT + "--- !include ../../*.yml\n",
    "includes by a list": PROJECT + "a: !include [x]\n",
    "a set": PROJECT + "a: !!set {b, c}\n",
    "an ordered mapping": PROJECT + "a: !!omap [{b: c}]\n",
    "binary": PROJECT + "a: !!binary aGVsbG8=\n",
    "a number that is none": PROJECT + "a: !!int banana\n",
    "a truth that is none": PROJECT + "a: !!bool banana\n",
    "a list for a key": PROJECT + "? [a]\n: b\n",
    "no type": '_exlab_version: "1"\n',
    "wrong type": '_exlab_type: experiment\n_exlab_version: "1"\n',
    "a list for a type": '_exlab_type: [run]\n_exlab_version: "1"\n',
    "no version": "_exlab_type: project\n",
    "blank version": '_exlab_type: project\n_exlab_version: " "\n',
    "a number for a version": "_exlab_type: project\n_exlab_version: 2.10\n",
    "a version with lines": '_exlab_type: project\n_exlab_version: "1\\n2"\n',
    "no scope": '_exlab_type: run\n_exlab_version: "1"\n',
    "wrong scope": '_exlab_type: run\n_exlab_version: "1"\n_exlab_run_scope: all\n',
    "a number for the description": PROJECT + "_exlab_description: 5\n",
    "plugins by one name": PROJECT + "_exlab_plugins: stamp\n",
    "plugins by number": PROJECT + "_exlab_plugins: [1]\n",
    "fatal by name": PROJECT + "_exlab_plugins_fatal: stamp\n",
    "readme by list": PROJECT + "_exlab_readme: [a]\n",
    "readme fields by name": PROJECT + "_exlab_readme: {fields: a}\n",
    "readme field without id": PROJECT + "_exlab_readme: {fields: [{label: a}]}\n",
    "readme field by name": PROJECT + "_exlab_readme: {fields: [a]}\n",
    "readme field twice": PROJECT + "_exlab_readme: {fields: [{id: a}, {id: a}]}\n",
    "readme field with odd id": PROJECT + '_exlab_readme: {fields: [{id: "a\\nb"}]}\n',
    "readme field of odd type": PROJECT + "_exlab_readme: {fields: [{id: a, type: colour}]}\n",
    "choice without options": PROJECT + "_exlab_readme: {fields: [{id: a, type: choice}]}\n",
    "truth for an option": PROJECT + "_exlab_readme: {fields: [{id: a, type: choice, options: [yes, no]}]}\n",
    "required perhaps": PROJECT + "_exlab_readme: {fields: [{id: a, required: maybe}]}\n",
    "answers outside": PROJECT + "_answers_file: ../../answers.yml\n",
    "answers at the root": PROJECT + "_answers_file: /etc/answers.yml\n",
    "answers on a drive": PROJECT + "_answers_file: 'C:answers.yml'\n",
    "subdirectory outside": PROJECT + "_subdirectory: a/../../..\n",
    "subdirectory by number": PROJECT + "_subdirectory: 5\n",
    "extensions": PROJECT + "_jinja_extensions: [os.system]\n",
    "question of odd type": PROJECT + "a: {type: colour}\n",
    "question of a list for a type": PROJECT + "a: {type: [str]}\n",
    "question with a reserved name": PROJECT + "make_secret: x\n",
    "question with an odd name": PROJECT + '"a\\nb": x\n',
    "secret without default": PROJECT + "a: {type: str, secret: true}\n",
    "choices by number": PROJECT + "a: {choices: 5}\n",
    "choices of three parts": PROJECT + "a: {choices: [[a, b, c]]}\n",
    "choice without value": PROJECT + "a: {choices: {b: {validator: x}}}\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_manifest_is_a_failure_that_can_be_told(folder: Path, text: str | bytes) -> None:
    began = time.monotonic()
    found = loaded(folder, text)
    assert isinstance(found, Failure)
    assert (found.code, found.field) == ("template_load_error", "template_path")
    assert 0 < len(found.message) < 500
    assert msgspec.json.encode(found)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["label", "operator", "objective", " label "])
def test_core_fields_cannot_be_declared_again(folder: Path, name: str) -> None:
    found = loaded(folder, PROJECT + f"_exlab_readme: {{fields: [{{id: '{name}'}}]}}\n")
    assert isinstance(found, Failure)
    assert found.code == "template_core_field_redeclared"


KEYS = st.sampled_from(
    ["_exlab_type", "_exlab_version", "_exlab_run_scope", "_exlab_readme", "_exlab_plugins", "_answers_file",
     "_subdirectory", "_secret_questions", "_envops", "_tasks", "type", "choices", "default", "when", "fields",
     "id", "options", "required", "multiselect", "secret", "value", "sample", "<<"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | KEYS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(KEYS, VALUES, max_size=8))
def test_no_content_of_a_manifest_raises(folder: Path, content: dict[str, object]) -> None:
    import yaml

    whole = {"_exlab_type": "project", "_exlab_version": "1"} | content
    found = loaded(folder, yaml.safe_dump(whole, allow_unicode=True).encode("utf-8", "surrogatepass"))
    assert isinstance(found, Template | Failure)
    if isinstance(found, Template):
        assert msgspec.json.encode((found.questions, found.readme_fields, found.plugins))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab: -[]{}&*!<>|\"'\n0x1.,?#%~\t=@", max_size=60) | st.binary(max_size=60))
def test_no_text_of_a_manifest_raises(folder: Path, text: str | bytes) -> None:
    assert isinstance(loaded(folder, text), Failure)


def test_a_template_without_manifest_is_a_failure(folder: Path) -> None:
    (folder / "copier.yml").unlink()
    assert isinstance(templates.load(folder), Failure)


def test_two_manifests_are_one_too_many(folder: Path) -> None:
    (folder / "copier.yaml").write_text(PROJECT)
    assert isinstance(templates.load(folder), Failure)


def test_a_manifest_may_be_called_copier_yaml(folder: Path) -> None:
    (folder / "copier.yml").rename(folder / "copier.yaml")
    assert isinstance(templates.load(folder), Template)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def _to_passwd(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _to_a_manifest_elsewhere(path: Path) -> None:
    (path.parent.parent / "copier.yml").write_text(PROJECT)
    path.symlink_to("../copier.yml")


def _to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _to_nothing(path: Path) -> None:
    path.symlink_to("nothing.yml")


@pytest.mark.parametrize(
    "make",
    [_pipe, _socket, _to_passwd, _to_a_manifest_elsewhere, _to_zero, _to_itself, _to_nothing, Path.mkdir],
)
def test_a_manifest_that_is_no_file_of_the_template_is_a_failure(
    folder: Path, make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "copier.yml").unlink()
    make(folder / "copier.yml")  # type: ignore[operator]
    found = templates.load(folder)
    assert isinstance(found, Failure)
    assert "root:" not in found.message


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    for name in ("templates/inside", "equipment/own", "elsewhere/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "copier.yml").write_text(PROJECT)
    (tmp_path / "templates/linked").symlink_to("inside")
    (tmp_path / "templates/out").symlink_to(tmp_path / "elsewhere/other")
    (tmp_path / "templates/round").symlink_to("round")
    (tmp_path / "templates/file").write_text("")
    return tmp_path


def located(lab: Path, path: str) -> Path | Failure:
    return templates.locate(path, templates_dir=lab / "templates", equipment_dir=lab / "equipment")


@pytest.mark.parametrize("path", ["inside", "./inside/", "linked", "../templates/inside"])
def test_a_template_is_found_relative_to_the_templates_folder(lab: Path, path: str) -> None:
    assert located(lab, path) == lab / "templates/inside"


@pytest.mark.parametrize("name", ["templates/inside", "equipment/own"])
def test_a_template_is_found_by_its_absolute_path(lab: Path, name: str) -> None:
    assert located(lab, str(lab / name)) == lab / name


OUTSIDE = [
    "", " ", ".", "..", "/", "/etc", "../elsewhere/other", "inside/../..", "out", "round", "file", "missing",
    "file/copier.yml", "inside\0", "a" * 300, "a/" * 3000, "x" * 100_000, "\ud800", "\udcff", "~", "~root",
    "C:\\Windows", "\\\\server\\share", "\u202einside", "/dev/null", "/proc/self/root", "inside\n",
    "inside/copier.yml", "https://example.org/template.git", "gh:some/template",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE, ids=ascii)
def test_what_is_no_template_of_this_workstation_is_a_failure(lab: Path, path: str) -> None:
    found = located(lab, path[:100_000])
    assert isinstance(found, Failure)
    assert (found.code, found.field) == ("template_load_error", "template_path")
    assert msgspec.json.encode(found)


def test_whether_something_is_there_outside_is_not_told(lab: Path) -> None:
    there, missing = located(lab, "../elsewhere/other"), located(lab, "../elsewhere/absent")
    assert isinstance(there, Failure)
    assert isinstance(missing, Failure)
    assert there.message.replace("other", "absent") == missing.message


def test_the_catalogue_tells_what_is_good_and_why_the_rest_is_not(lab: Path) -> None:
    (lab / "templates/broken").mkdir()
    (lab / "templates/broken/copier.yml").write_text("_exlab_type: project\n")
    (lab / "templates/.hidden").mkdir()
    found = templates.catalogue([lab / "templates", lab / "equipment", lab / "absent"])
    assert [template.path for template in found.templates] == [
        lab / "templates/inside", lab / "templates/inside", lab / "equipment/own",
    ]  # fmt: skip
    assert {problem.path.name: "_exlab_version" in problem.message for problem in found.problems} == {
        "broken": True, "out": False,
    }  # fmt: skip


def contents(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        else:
            found[name] = None
    return found


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / ".exlab-sessions").mkdir()
    return tmp_path / ".exlab-sessions" / "session" / "template"


def test_a_pinned_template_has_everything_but_git(folder: Path, target: Path) -> None:
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("secret")
    (folder / "sub/{{ sample }}.csv.jinja").write_text("a,b\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o4755)
    (folder / "protocol.pdf").touch(mode=0o444)
    (folder / "sub/link").symlink_to("../run.sh")
    (folder / "absolute").symlink_to(folder / "run.sh")
    (folder / "round").symlink_to("../confocal/run.sh")
    (folder / "empty").mkdir(mode=0o500)
    assert pinning.pin(folder, target) is None
    assert contents(target) == {
        "absolute": "run.sh",
        "copier.yml": (PROJECT.encode(), 0o644),
        "empty": None,
        "protocol.pdf": (b"", 0o444),
        "round": "run.sh",
        "run.sh": (b"#!/bin/sh\n", 0o755),
        "sub": None,
        "sub/link": "../run.sh",
        "sub/{{ sample }}.csv.jinja": (b"a,b\n", 0o644),
    }
    assert os.listdir(target.parent) == ["template"]


def test_a_pinned_template_stays_as_it_was(folder: Path, target: Path) -> None:
    pinning.pin(folder, target)
    (folder / "copier.yml").write_text(RUN)
    assert pinning.pin(folder, target) is None
    assert (target / "copier.yml").read_text() == PROJECT


def test_what_a_crash_left_of_a_copy_is_cleared(folder: Path, target: Path) -> None:
    partial = target.with_name("template.partial")
    partial.mkdir(parents=True)
    (partial / "half").write_text("half")
    assert pinning.pin(folder, target) is None
    assert list(contents(target)) == ["copier.yml"]


def test_a_killed_pin_leaves_no_template_and_the_next_one_is_whole(folder: Path, target: Path) -> None:
    for number in range(400):
        (folder / f"{number}.txt").write_text("x" * 1000)
    code = "import sys, pathlib; from app.steps import pinning; pinning.pin(*map(pathlib.Path, sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", code, str(folder), str(target)]) as process:
        deadline = time.monotonic() + 30
        begun = target.with_name("template.partial") / "200.txt"
        while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    assert pinning.pin(folder, target) is None
    assert contents(target) == contents(folder)


def _link_out(folder: Path) -> None:
    (folder / "out").symlink_to("/etc/passwd")


def _link_above(folder: Path) -> None:
    (folder / "above").symlink_to("..")


def _link_into_git(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / "inner").symlink_to(".git")


def _link_to_a_sibling_with_the_same_beginning(folder: Path) -> None:
    (folder.parent / "confocal-2").mkdir()
    (folder / "sibling").symlink_to("../confocal-2")


def _special(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def _no_text(folder: Path) -> None:
    os.mkdir(os.fsencode(folder) + b"/\xff")


def _sparse_giant(folder: Path) -> None:
    with (folder / "giant").open("wb") as file:
        file.truncate(2 * 1024**3)


def _deep(folder: Path) -> None:
    (folder / "/".join("d" * 70)).mkdir(parents=True)


BAD_FOLDERS = [
    _link_out, _link_above, _link_into_git, _link_to_a_sibling_with_the_same_beginning, _special, _no_text,
    _sparse_giant, _deep,
]  # fmt: skip


@pytest.mark.parametrize("spoil", BAD_FOLDERS)
def test_a_template_that_cannot_be_copied_safely_is_refused(
    folder: Path, target: Path, spoil: object
) -> None:
    spoil(folder)  # type: ignore[operator]
    found = pinning.pin(folder, target)
    assert isinstance(found, Failure)
    assert found.code == "template_load_error"
    assert os.listdir(target.parent) == []
    assert isinstance(pinning.survey(folder, follow=True), Failure)


def test_a_template_with_too_many_files_is_refused(
    folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "_MOST_FILES", 3)
    for number in range(4):
        (folder / str(number)).touch()
    assert isinstance(pinning.pin(folder, target), Failure)


def test_a_link_in_a_circle_is_refused_where_copier_would_follow_it(folder: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (folder / one).mkdir()
        (folder / one / "on").symlink_to(f"../{other}")
    found = pinning.survey(folder, follow=True)
    assert isinstance(found, Failure)
    assert "circle" in found.message
    assert not isinstance(pinning.survey(folder, follow=False), Failure)


@pytest.mark.parametrize("leads_to", ["nothing", "link"])
def test_a_link_to_nothing_is_refused_only_where_copier_would_follow_it(folder: Path, leads_to: str) -> None:
    (folder / "link").symlink_to(leads_to)
    assert isinstance(pinning.survey(folder, follow=True), Failure)
    assert not isinstance(pinning.survey(folder, follow=False), Failure)


def test_links_that_double_at_each_step_are_refused_in_time(folder: Path) -> None:
    (folder / "d0").mkdir()
    for number in range(1, 40):
        (folder / f"d{number}").mkdir()
        for side in ("left", "right"):
            (folder / f"d{number}" / side).symlink_to(f"../d{number - 1}")
    assert isinstance(pinning.survey(folder, follow=True), Failure)


def test_a_followed_link_counts_as_what_it_leads_to(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/data").write_text("x" * 10)
    (folder / "link").symlink_to("sub")
    found = pinning.survey(folder, follow=True)
    assert not isinstance(found, Failure)
    assert {entry.path: entry.size for entry in found} == {
        "copier.yml": len(PROJECT), "link": 0, "link/data": 10, "sub": 0, "sub/data": 10,
    }  # fmt: skip


def test_nothing_is_made_below_a_data_root_that_is_not_mounted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such device"):
        pinning.pin(folder, tmp_path / "absent" / "session" / "template")
    assert not (tmp_path / "absent").exists()
