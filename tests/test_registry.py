"""The plugins of a workstation: which folders are plugins, what their manifests say, and why others are none."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import blocked_by
from app.steps.plugins import registry
from app.steps.plugins.registry import Manifest, Problem

GOOD = 'name: stamp\nversion: "1.2"\nsupported_extensions: [".txt"]\napi_version: "1"\n'
EXISTING = """\
name: hello_plugin
version: 0.1.0
author: The lab
description: >-
  Says hello
supported_extensions: [".txt", ".TXT", ".XLSX", Makefile]
api_version: "1"
required_variables: [sample]
optional_variables: []
homepage: https://lab.example   # a key that means nothing here

isolation:
  timeout_seconds: 10
  memory_mb: 64
  network: no
"""


def plugin(folder: Path, manifest: str | bytes = GOOD, name: str = "stamp") -> Path:
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    (made / "manifest.yml").write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)
    (made / "__init__.py").write_text("raise SystemExit('nobody may import this')\n")
    return made


def read(folder: Path, manifest: str | bytes, *, allow_network: bool = False) -> Manifest | Problem:
    return registry.load(plugin(folder, manifest), allow_network=allow_network)


def good(folder: Path, manifest: str, *, allow_network: bool = False) -> Manifest:
    found = read(folder, manifest, allow_network=allow_network)
    assert isinstance(found, Manifest), found
    return found


def found_in(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the plugins, and what is said of the other folders."""
    found = registry.catalogue(folder, allow_network=False)
    problems = {problem.path.name: problem.message for problem in found.problems}
    return [each.name for each in found.plugins], problems


def test_an_existing_manifest_becomes_a_record(tmp_path: Path) -> None:
    assert good(tmp_path, EXISTING) == Manifest(
        name="hello_plugin",
        version="0.1.0",
        author="The lab",
        description="Says hello",
        supported_extensions=(".txt", ".xlsx", "makefile"),
        api_version="1",
        required_variables=("sample",),
        optional_variables=(),
        timeout_seconds=10,
        memory_mb=64,
        network=False,
        folder=tmp_path / "stamp",
    )


def test_what_a_manifest_leaves_out_has_a_default(tmp_path: Path) -> None:
    found = good(tmp_path, GOOD)
    assert (found.author, found.description, found.required_variables) == ("", "", ())
    assert (found.timeout_seconds, found.memory_mb, found.network) == (30, 512, False)


@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        ("version: 1.5\n", "version", "1.5"),
        ("version: 2\n", "version", "2"),
        ("api_version: 1\n", "api_version", "1"),
        ("name: A-b_9\n", "name", "A-b_9"),
        (f"name: {'a' * 64}\n", "name", "a" * 64),
        ("isolation:\n", "timeout_seconds", 30),
        ("isolation: {timeout_seconds: 300, memory_mb: 2048}\n", "memory_mb", 2048),
        ("isolation: {timeout_seconds: 1, memory_mb: 32}\n", "timeout_seconds", 1),
        ("required_variables:\n", "required_variables", ()),
        ("supported_extensions: ['.A', .a, .b]\n", "supported_extensions", (".a", ".b")),
    ],
)
def test_a_manifest_may_say_it_like_this(tmp_path: Path, changed: str, name: str, expected: object) -> None:
    key = changed.partition(":")[0]
    rest = "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(f"{key}:"))
    assert getattr(good(tmp_path, rest + changed), name) == expected


ENDING = "a suffix such as .csv, or the whole name of a file without one"


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ("", "manifest.yml does not hold keys with values"),
        ("- name\n", "manifest.yml does not hold keys with values"),
        ("name: [\n", "manifest.yml line 2: "),
        (b"name: \xff\n", "manifest.yml line 1: is not UTF-8 text"),
        ("a: " + "[" * 60 + "]" * 60, "is nested deeper than 32 levels"),
        ("#" * 300_000, "is larger than 256 KiB"),
        ("a: !!python/object/apply:os.abort []\n", "means nothing here"),
        (GOOD + "name: again\n", "manifest.yml line 5: the key 'name' stands twice"),
        (GOOD.replace("name: stamp\n", ""), "line 1: name: is missing; expected 1 to 64 letters"),
        (GOOD.replace("stamp", "''"), "line 1: name: expected 1 to 64 letters"),
        (GOOD.replace("stamp", "a b"), "line 1: name: expected 1 to 64 letters, digits, _ or -, not 'a b'"),
        (GOOD.replace("stamp", '"a\\nb"'), "line 1: name: expected 1 to 64 letters"),
        (GOOD.replace("stamp", "../a"), "line 1: name: expected 1 to 64 letters"),
        (GOOD.replace("stamp", "a" * 65), "line 1: name: expected 1 to 64 letters"),
        (GOOD.replace("stamp", "7"), "line 1: name: expected 1 to 64 letters, digits, _ or -, not 7"),
        (GOOD.replace('"1.2"', ""), "line 2: version: is missing; expected text that is not empty"),
        (GOOD.replace('"1.2"', "'  '"), "line 2: version: expected text that is not empty"),
        (GOOD.replace('"1.2"', "[1]"), "line 2: version: expected text that is not empty, not a list"),
        (GOOD.replace('"1.2"', "true"), "line 2: version: expected text that is not empty, not true"),
        (GOOD.replace('"1.2"', '"1\\e[2J"'), "line 2: version: expected at most 2000 characters"),
        (GOOD.replace('[".txt"]', ""), "line 3: supported_extensions: is missing; expected a list"),
        (GOOD.replace('[".txt"]', "[]"), "line 3: supported_extensions: expected at least one suffix"),
        (GOOD.replace('[".txt"]', ".txt"), "line 3: supported_extensions: expected a list, not '.txt'"),
        (
            GOOD.replace('[".txt"]', "[.txt, 7]"),
            f"line 3: supported_extensions[1]: expected {ENDING}, not 7",
        ),
        (GOOD.replace('[".txt"]', "[a/b.txt]"), "line 3: supported_extensions[0]: expected a suffix"),
        (GOOD.replace('"1"', '"2"'), "line 4: api_version: expected \"1\", not '2'"),
        (GOOD.replace('"1"', "1.0"), "line 4: api_version: expected \"1\", not '1.0'"),
        (GOOD.replace('"1"', ""), 'line 4: api_version: is missing; expected "1"'),
        (GOOD + "isolation: 30\n", "line 5: isolation: expected keys with values, not 30"),
        (
            GOOD + "isolation:\n  timeout_seconds: 301\n",
            "line 6: isolation.timeout_seconds: expected whole seconds, 1 to 300, not 301",
        ),
        (GOOD + "isolation: {timeout_seconds: 0}\n", "isolation.timeout_seconds: expected whole seconds"),
        (GOOD + "isolation: {timeout_seconds: 1.5}\n", "isolation.timeout_seconds: expected whole seconds"),
        (
            GOOD + "isolation: {memory_mb: 4096}\n",
            "line 5: isolation.memory_mb: expected whole megabytes, 32 to 2048, not 4096",
        ),
        (GOOD + "isolation: {memory_mb: 31}\n", "isolation.memory_mb: expected whole megabytes"),
        (GOOD + "isolation: {network: maybe}\n", "isolation.network: expected true or false, not 'maybe'"),
        (GOOD + "isolation: {network: true}\n", "expected plugins.allow_network in the config"),
        (GOOD + "required_variables: sample\n", "required_variables: expected a list, not 'sample'"),
        (GOOD + "optional_variables: [1]\n", "optional_variables[0]: expected text that is not empty"),
    ],
)
def test_a_bad_manifest_is_told_with_key_line_and_what_was_expected(
    tmp_path: Path, manifest: str | bytes, told: str
) -> None:
    found = read(tmp_path, manifest)
    assert isinstance(found, Problem)
    assert (found.path, found.error) == (tmp_path / "stamp", None)
    assert told in found.message
    assert len(found.message) < 2000


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from([*Manifest.__struct_fields__, "isolation"]) | st.text(max_size=8)


@given(st.dictionaries(_KEYS, _VALUES, max_size=6).map(json.dumps).map(str.encode) | st.binary(max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_manifest_holds_reading_it_ends_in_a_record_or_a_problem(
    tmp_path: Path, manifest: bytes
) -> None:
    found = read(tmp_path, manifest)
    assert isinstance(found, Manifest | Problem)
    if isinstance(found, Problem):
        assert found.message.isprintable() and found.error is None


def test_all_that_is_wrong_with_a_manifest_is_told_at_once(tmp_path: Path) -> None:
    found = read(tmp_path, 'api_version: "3"\nname: "a b"\nisolation:\n  memory_mb: 1\n')
    assert isinstance(found, Problem)
    lines = [part for part in found.message.split("; ") if "line" in part]
    assert [part.split("line ")[1].split(":")[0] for part in lines] == ["1", "1", "1", "2", "4"]


def test_the_network_is_had_where_the_config_allows_it(tmp_path: Path) -> None:
    assert good(tmp_path, GOOD + "isolation: {network: true}\n", allow_network=True).network
    assert not good(tmp_path, GOOD, allow_network=True).network


def test_files_are_offered_by_their_last_suffix_or_whole_name_in_path_order(tmp_path: Path) -> None:
    found = good(tmp_path, GOOD.replace('[".txt"]', "[.TXT, .gz, Makefile, .gitignore]"))
    files = [
        *("b/z.txt", "a.TXT", "b.txt", "b/a.tar.gz", "makefile", "sub/Makefile", ".gitignore"),
        *("a.txt.bak", "notes", "x.makefile", "txt", ".txt.jinja"),
    ]
    assert found.offered(files) == (
        *(".gitignore", "a.TXT", "b/a.tar.gz", "b/z.txt", "b.txt", "makefile", "sub/Makefile"),
    )


def test_the_files_of_a_tree_are_told_without_links_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub/empty").mkdir(parents=True)
    (tmp_path / "sub/a.txt").touch()
    (tmp_path / "b.txt").touch()
    (tmp_path / "link.txt").symlink_to("b.txt")
    (tmp_path / "linked").symlink_to("sub")
    assert sorted(registry.files_below(tmp_path)) == ["b.txt", "sub/a.txt"]


def test_plugins_are_listed_by_name_and_found_by_it(tmp_path: Path) -> None:
    plugin(tmp_path, GOOD.replace("stamp", "zebra"), "a")
    plugin(tmp_path, GOOD.replace("stamp", "ant"), "b")
    found = registry.catalogue(tmp_path, allow_network=False)
    assert ([each.name for each in found.plugins], found.problems) == (["ant", "zebra"], ())
    ant = found.named("ant")
    assert ant is not None and ant.folder == tmp_path / "b"
    assert found.named("b") is None


def test_what_is_no_plugin_is_told_or_passed_over(tmp_path: Path) -> None:
    plugin(tmp_path)
    for passed_over in (".hidden", "__pycache__", "_drafts"):
        plugin(tmp_path, "", passed_over)
    (tmp_path / "README.md").touch()
    (tmp_path / "empty").mkdir()
    (plugin(tmp_path, name="codeless") / "__init__.py").unlink()
    os.mkfifo(plugin(tmp_path, name="piped") / "fifo")
    (tmp_path / "piped/manifest.yml").unlink()
    os.mkfifo(tmp_path / "piped/manifest.yml")
    names, problems = found_in(tmp_path)
    assert names == ["stamp"]
    assert problems == {
        "empty": "has no manifest.yml",
        "codeless": "has no __init__.py",
        "piped": "manifest.yml is not a regular file",
    }


def test_of_two_with_one_name_the_first_folder_is_used(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        plugin(tmp_path, name=name)
    found = registry.catalogue(tmp_path, allow_network=False)
    assert [each.folder.name for each in found.plugins] == ["one"]
    assert {each.path.name: each.message for each in found.problems} == {
        "three": "has the name stamp, as the one in one has",
        "two": "has the name stamp, as the one in one has",
    }


@pytest.mark.parametrize("name", ["json", "email", "xml", "app", "exlab_wizard", "exlab_sessions"])
def test_a_folder_must_not_hide_a_module_that_plugins_need(tmp_path: Path, name: str) -> None:
    plugin(tmp_path, name=name)
    assert found_in(tmp_path) == (
        [],
        {name: f"the folder is called {name}, as a module that plugins need; rename it"},
    )


def test_links_must_not_lead_out(tmp_path: Path) -> None:
    elsewhere = plugin(tmp_path / "elsewhere", name="stranger")
    plugins = tmp_path / "plugins"
    plugin(plugins)
    (plugins / "linked").symlink_to(elsewhere)
    (plugins / "nowhere").symlink_to(tmp_path / "nothing")
    (plugins / "circle").symlink_to(".")
    for name, target in (("borrowed", elsewhere / "manifest.yml"), ("lost", "nothing.yml")):
        (plugin(plugins, name=name) / "manifest.yml").unlink()
        (plugins / name / "manifest.yml").symlink_to(target)
    names, problems = found_in(plugins)
    assert names == ["stamp"]
    assert problems == {
        "linked": "is a link that leads out of the plugin folder",
        "nowhere": "is a link that leads out of the plugin folder",
        "circle": "is a link that leads out of the plugin folder",
        "borrowed": "manifest.yml is a link that leads out of the plugin",
        "lost": "manifest.yml leads nowhere",
    }


def test_a_link_within_the_plugin_folder_is_followed(tmp_path: Path) -> None:
    version = plugin(tmp_path / "_versions", name="stamp-1")
    (tmp_path / "stamp").symlink_to("_versions/stamp-1")
    found = registry.catalogue(tmp_path, allow_network=False)
    assert [each.folder for each in found.plugins] == [version]


def test_a_plugin_folder_that_is_a_link_itself_is_followed(tmp_path: Path) -> None:
    made = plugin(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    found = registry.catalogue(tmp_path / "link", allow_network=False)
    assert [each.folder for each in found.plugins] == [made]


def test_without_a_plugin_folder_there_is_nothing(tmp_path: Path) -> None:
    found = registry.catalogue(None, allow_network=False)
    assert (found.plugins, found.problems) == ((), ())


@pytest.mark.parametrize("make", [lambda path: None, Path.touch], ids=["missing", "a file"])
def test_a_plugin_folder_that_cannot_be_read_is_a_problem(tmp_path: Path, make: type) -> None:
    folder = tmp_path / "plugins"
    make(folder)
    (problem,) = registry.catalogue(folder, allow_network=False).problems
    assert problem.path == folder and problem.message.startswith("cannot be read: ")
    assert problem.error is not None and blocked_by(problem.error) is None


def test_an_error_that_may_pass_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path)

    def busy(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as denied:
        denied.setattr(os, "open", busy)
        (problem,) = registry.catalogue(tmp_path, allow_network=False).problems
    assert problem.message == "cannot be read: Permission denied"
    assert problem.error is not None and blocked_by(problem.error) is not None


def test_a_socket_in_place_of_a_manifest_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin(tmp_path)
    (made / "manifest.yml").unlink()
    monkeypatch.chdir(made)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("manifest.yml")
        assert found_in(tmp_path) == ([], {"stamp": "manifest.yml is not a regular file"})


def test_no_code_of_a_plugin_is_imported(tmp_path: Path) -> None:
    plugin(tmp_path)
    before = set(sys.modules)
    assert found_in(tmp_path) == (["stamp"], {})
    assert set(sys.modules) == before
