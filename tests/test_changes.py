"""What a plugin did to its copy of a tree is found, whatever it was, and what it must not do is told."""

import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.steps import changes, publish
from app.steps.changes import Changes
from tests.staging import (
    FOREIGN_GROUP,
    SESSION,
    as_nobody,
    as_root,
    data_root,
    dig,
    linux,
    run_folder,
    staged,
)

ANSWERS = ".exlab-answers.yml"
LONG_AGO = (10**18, 10**18)


@pytest.fixture
def lab() -> Iterator[Path]:
    with data_root() as root:
        yield root


def branched(lab: Path) -> tuple[Path, Path]:
    """A tree such as plugins find, and a branch of it."""
    tree = staged(lab, run_folder(lab))
    (tree / "README.md").write_text("# A run")
    (tree / ANSWERS).write_text("label: a run")
    (tree / "docs").mkdir()
    (tree / "docs" / "README.md").write_text("the template's own")
    return tree, publish.branch(tree)


def compared(tree: Path, copy: Path) -> Changes:
    return changes.compare(tree, copy, protected=changes.protected(ANSWERS))


def violations(lab: Path, change: Callable[[Path], object]) -> str:
    """What is said against one change of a branch, and that it is said of no more than that."""
    tree, copy = branched(lab)
    assert compared(tree, copy) == Changes((), ())
    change(copy)
    return "\n".join(compared(tree, copy).violations)


# What differs


class Node(NamedTuple):
    """A file with its content, a link with its target, or a folder."""

    kind: str
    mode: int = 0
    kept: bytes = b""


Model = dict[str, Node]

NAMES = st.sampled_from(["a", "b", "B", "c.txt", "\u00e9", "e\u0301", os.fsdecode(b"\xff"), " ", "new\nline"])
FILES = st.builds(
    Node,
    st.just("file"),
    st.sampled_from([0o644, 0o600, 0o755, 0o444]),
    st.sampled_from([b"", b"one", b"two"]),
)
LINKS = st.builds(Node, st.just("link"), st.just(0o777), st.sampled_from([b"a", b"b", b"a/b"]))
FOLDERS = st.builds(Node, st.just("folder"), st.sampled_from([0o755, 0o700, 0o555]), st.just(b""))
NODES = st.one_of(FILES, FOLDERS, LINKS)
CHANGES = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), st.none() | NODES), max_size=8)


def changed(model: Model, steps: list[tuple[list[str], Node | None]]) -> Model:
    """A tree after names were given to something else, or taken away; the way to them is made of folders."""
    new = dict(model)
    for parts, node in steps:
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if new.get(above, Node("none")).kind != "folder":
                new[above] = Node("folder", 0o755)
        path = "/".join(parts)
        for name in [name for name in new if name == path or name.startswith(f"{path}/")]:
            del new[name]
        if node is not None:
            new[path] = node
    return new


def build(tree: Path, model: Model) -> None:
    """Makes a tree be as the model says, in place; its times tell nothing."""
    for path in sorted(tree.rglob("*"), key=str, reverse=True):
        name = path.relative_to(tree).as_posix()
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
        if model.get(name, Node("none")).kind != kind_of(path):
            shutil.rmtree(path) if kind_of(path) == "folder" else path.unlink()
    for name, node in sorted(model.items()):
        make(tree / name, node)
    for name, node in sorted(model.items(), reverse=True):
        if node.kind != "link":
            (tree / name).chmod(node.mode)
        os.utime(tree / name, ns=LONG_AGO, follow_symlinks=False)


def make(path: Path, node: Node) -> None:
    if node.kind == "folder":
        path.mkdir(exist_ok=True)
    elif node.kind == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(os.fsdecode(node.kept))
    else:
        if path.exists():
            path.chmod(0o600)
        path.write_bytes(node.kept)


def kind_of(path: Path) -> str:
    if path.is_symlink():
        return "link"
    return "folder" if path.is_dir() else "file"


@linux
@settings(max_examples=150, deadline=None)
@given(first=CHANGES, then=CHANGES)
def test_exactly_what_differs_is_found(
    first: list[tuple[list[str], Node | None]], then: list[tuple[list[str], Node | None]]
) -> None:
    with data_root() as lab:
        tree = publish.prepare(publish.session_folder(lab, SESSION), run_folder(lab))
        before = changed({}, first)
        build(tree, before)
        copy = publish.branch(tree)
        assert compared(tree, copy) == Changes((), ())
        after = changed(before, then)
        build(copy, after)
        affected = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
        shown = tuple(path.encode("utf-8", "backslashreplace").decode() for path in affected)
        assert compared(tree, copy).affected == shown
        publish.discard(tree.parent.parent)


def test_a_change_in_place_is_found_whose_time_and_size_were_put_back(lab: Path) -> None:
    tree, copy = branched(lab)
    file = copy / "data" / "raw" / "a.txt"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    with open(file, "r+b") as opened:
        opened.write(b"A")
    os.utime(file, ns=times)
    assert compared(tree, copy) == Changes(("data/raw/a.txt",), ())


def test_a_difference_is_found_wherever_it_stands_in_a_large_file(lab: Path) -> None:
    tree, copy = branched(lab)
    for place, content in ((tree, b"x" * 3_000_001), (copy, b"x" * 3_000_000 + b"y")):
        (place / "stack.tif").write_bytes(content)
    assert compared(tree, copy).affected == ("stack.tif",)


def test_times_alone_are_no_difference(lab: Path) -> None:
    tree, copy = branched(lab)
    for path in (copy, *copy.rglob("*")):
        os.utime(path, ns=LONG_AGO, follow_symlinks=False)
    assert compared(tree, copy) == Changes((), ())


def test_a_change_of_the_tree_itself_is_found(lab: Path) -> None:
    tree, copy = branched(lab)
    copy.chmod(0o700)
    tree.chmod(0o755)
    assert compared(tree, copy) == Changes((".",), ())


def test_what_a_plugin_may_do_is_no_violation(lab: Path) -> None:
    tree, copy = branched(lab)
    (copy / "docs" / "README.md").write_text("changed")
    (copy / "data" / "raw" / "a.txt").unlink()
    (copy / "data" / "run.sh").chmod(0o500)
    (copy / "data" / "raw").chmod(0o555)
    (copy / "new").mkdir()
    (copy / "new" / "here").symlink_to("../data/./raw/../run.sh")
    (copy / "new" / "top").symlink_to("..")
    (copy / "new" / "nowhere").symlink_to("missing/../../missing")
    (copy / "new" / "round").symlink_to("round")
    (copy / "new" / "one").write_text("one")
    os.link(copy / "new" / "one", copy / "two")
    assert compared(tree, copy).violations == ()
    assert set(compared(tree, copy).affected) >= {"docs/README.md", "data/raw", "two", "new/round"}


# What must not be touched


def overwrite_the_readme(copy: Path) -> None:
    (copy / "README.md").write_text("mine")


def remove_the_readme(copy: Path) -> None:
    (copy / "README.md").unlink()


def change_the_mode_of_the_readme(copy: Path) -> None:
    (copy / "README.md").chmod(0o600)


def put_a_folder_for_the_readme(copy: Path) -> None:
    (copy / "README.md").unlink()
    (copy / "README.md").mkdir()
    (copy / "README.md" / "index.html").touch()


def add_a_readme_in_another_case(copy: Path) -> None:
    (copy / "readme.MD").touch()


def add_provenance(copy: Path) -> None:
    (copy / ".exlab-wizard" / "more.json").touch()


def add_provenance_in_another_case(copy: Path) -> None:
    (copy / ".Exlab-Wizard").mkdir()


def change_provenance(copy: Path) -> None:
    (copy / ".exlab-wizard" / "creation.json").write_text("{}")


def remove_provenance(copy: Path) -> None:
    shutil.rmtree(copy / ".exlab-wizard")


def change_the_answers(copy: Path) -> None:
    (copy / ANSWERS).write_text("label: another")


def put_a_link_for_the_answers(copy: Path) -> None:
    (copy / ANSWERS).rename(copy / "answers")
    (copy / ANSWERS).symlink_to("answers")


PROTECTED = [
    overwrite_the_readme,
    remove_the_readme,
    change_the_mode_of_the_readme,
    put_a_folder_for_the_readme,
    add_a_readme_in_another_case,
    add_provenance,
    add_provenance_in_another_case,
    change_provenance,
    remove_provenance,
    change_the_answers,
    put_a_link_for_the_answers,
]


@pytest.mark.parametrize("change", PROTECTED)
def test_what_belongs_to_the_service_must_not_be_touched(lab: Path, change: Callable[[Path], object]) -> None:
    assert "is not for plugins to change" in violations(lab, change)


@pytest.mark.parametrize("path", ["README.md", "readme.MD", ".exlab-wizard", ".EXLAB-WIZARD/creation.json"])
@pytest.mark.parametrize("answers", [ANSWERS, "conf/\u00c4.yml", "./conf//\u00c4.yml"])
def test_protected_are_our_names_and_the_answers_in_any_spelling(path: str, answers: str) -> None:
    is_protected = changes.protected(answers)
    assert is_protected(path)
    assert is_protected(answers.replace("./", "").replace("//", "/").replace("\u00c4", "a\u0308"))
    assert (
        not is_protected("conf") and not is_protected("docs/README.md") and not is_protected("README.md.bak")
    )


# What must not be left


def make_a_pipe(copy: Path) -> None:
    os.mkfifo(copy / "data" / "pipe")


def put_a_pipe_for_a_file(copy: Path) -> None:
    (copy / "data" / "run.sh").unlink()
    os.mkfifo(copy / "data" / "run.sh")


def make_a_socket(copy: Path) -> None:
    here = os.open(copy, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/socket")  # a longer path does not fit
    os.close(here)


@linux
@pytest.mark.parametrize("change", [make_a_pipe, put_a_pipe_for_a_file, make_a_socket])
def test_what_is_no_file_folder_or_link_must_not_be_left(lab: Path, change: Callable[[Path], object]) -> None:
    assert "is neither a file, a folder nor a link" in violations(lab, change)


@as_root
def test_a_device_must_not_be_left(lab: Path) -> None:
    found = violations(lab, lambda copy: os.mknod(copy / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5)))
    assert "'zero' is neither a file" in found


@linux
def test_a_name_that_is_not_utf8_must_not_be_left(lab: Path) -> None:
    tree, copy = branched(lab)
    (copy / os.fsdecode(b"data-\xff")).mkdir()
    (copy / os.fsdecode(b"data-\xff") / "file").touch()
    found = compared(tree, copy)
    assert found.affected == ("data-\\udcff", "data-\\udcff/file")
    assert found.violations[0] == "'data-\\udcff' has a name that is not UTF-8"


@linux
def test_a_name_that_is_not_utf8_and_was_there_may_stay_and_go(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    for name in (b"stays-\xff", b"goes-\xff"):
        (tree / os.fsdecode(name)).touch()
    copy = publish.branch(tree)
    (copy / os.fsdecode(b"stays-\xff")).write_text("changed")
    (copy / os.fsdecode(b"goes-\xff")).unlink()
    assert compared(tree, copy) == Changes(("goes-\\udcff", "stays-\\udcff"), ())


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(copy: Path) -> None:
        (copy / name).symlink_to(target)

    make.__name__ = f"{name} to {target}"
    return make


def link_to_itself_by_an_absolute_path(copy: Path) -> None:
    (copy / "data" / "way").symlink_to(copy / "data")


def leave_by_a_link_that_stays(copy: Path) -> None:
    (copy / "data" / "raw" / "top").symlink_to("../..")
    (copy / "way").symlink_to("data/raw/top/../outside")


def point_a_link_out(copy: Path) -> None:
    (copy / "latest").unlink()
    (copy / "latest").symlink_to("../manifest.json")


WAYS_OUT = [
    link("way", "/etc/passwd"),
    link("way", "//server/share"),
    link("way", ".."),
    link("way", "../tree/data"),
    link("data/raw/way", "../../../x"),
    link("data/raw/way", "../run.sh/../../../x"),
    link_to_itself_by_an_absolute_path,
    leave_by_a_link_that_stays,
    point_a_link_out,
]


@linux
@pytest.mark.parametrize("change", WAYS_OUT, ids=lambda change: str(change.__name__))
def test_a_link_must_not_point_out_of_the_tree(lab: Path, change: Callable[[Path], object]) -> None:
    assert "points out of the folder" in violations(lab, change)


@linux
def test_a_link_must_not_be_led_out_by_what_stands_on_its_way(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / "way").symlink_to("data/raw/../../data/run.sh")
    copy = publish.branch(tree)
    shutil.rmtree(copy / "data" / "raw")
    (copy / "data" / "raw").symlink_to("..")
    found = compared(tree, copy)
    assert "way" not in found.affected
    assert found.violations == ("the link 'way' points out of the folder",)


@linux
def test_a_link_out_of_the_tree_that_was_there_is_not_the_plugins_doing(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / "way").symlink_to("/etc/passwd")
    copy = publish.branch(tree)
    (copy / "new").touch()
    assert compared(tree, copy) == Changes(("new",), ())
    (copy / "by way").symlink_to("way/..")
    assert compared(tree, copy).violations == ("the link 'by way' points out of the folder",)


@linux
@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_file_must_not_be_shared_with_a_place_outside(lab: Path, direction: str) -> None:
    outside = lab / "outside"
    outside.touch()

    def change(copy: Path) -> None:
        if direction == "in":
            os.link(outside, copy / "data" / "shared")
        else:
            os.link(copy / "data" / "run.sh", lab / "shared")

    assert "is a hard link to a file outside of the folder" in violations(lab, change)


@linux
@pytest.mark.parametrize("mode", [0o4755, 0o4644, 0o2755])
def test_a_file_must_not_lend_the_rights_of_its_owner_or_group(lab: Path, mode: int) -> None:
    found = violations(lab, lambda copy: (copy / "data" / "run.sh").chmod(mode))
    assert found == "'data/run.sh' would run with the rights of its owner or group"


@linux
def test_a_file_that_lent_rights_before_may_be_changed(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / "data" / "run.sh").chmod(0o4755)
    copy = publish.branch(tree)
    (copy / "data" / "run.sh").write_text("changed")
    (copy / "data" / "run.sh").chmod(0o4755)
    assert compared(tree, copy) == Changes(("data/run.sh",), ())


@linux
def test_a_folder_must_not_be_made_to_hand_on_its_group(lab: Path) -> None:
    assert "'data' would run" in violations(lab, lambda copy: (copy / "data").chmod(0o2755))


@as_root
def test_a_folder_that_is_made_where_folders_hand_on_their_group_does_so_too(lab: Path) -> None:
    parent = run_folder(lab).parent
    parent.mkdir(parents=True)
    os.chown(parent, -1, FOREIGN_GROUP)
    parent.chmod(0o2775)
    tree, copy = branched(lab)
    (copy / "new").mkdir()
    assert (copy / "new").stat().st_mode & stat.S_ISGID
    assert compared(tree, copy) == Changes(("new",), ())


CLOSED = [("data/raw", 0o000), ("data/raw", 0o300), ("data", 0o600), ("data/run.sh", 0o044), (".", 0o555)]


@linux
@pytest.mark.parametrize("user", ["this user", pytest.param("nobody", marks=as_root)])
@pytest.mark.parametrize(("name", "mode"), CLOSED)
def test_nothing_must_be_closed_to_its_own_owner(lab: Path, name: str, mode: int, user: str) -> None:
    def work() -> None:
        tree, copy = branched(lab)
        (copy / name).chmod(mode)
        found = compared(tree, copy)
        assert name in found.affected
        assert f"{name!r} is closed to its own owner" in found.violations
        assert stat.S_IMODE((copy / name).stat().st_mode) == mode, "it is only looked at"

    if user == "nobody":
        as_nobody(work)
    else:
        work()


@as_root
def test_what_was_closed_before_is_not_the_plugins_doing(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / "data" / "raw").chmod(0)
    copy = publish.branch(tree)
    (copy / "data" / "raw" / "a.txt").write_text("changed")
    assert compared(tree, copy) == Changes(("data/raw/a.txt",), ())


def remove_it(copy: Path) -> None:
    shutil.rmtree(copy)


def put_a_file_for_it(copy: Path) -> None:
    shutil.rmtree(copy)
    copy.touch()


def put_a_link_for_it(copy: Path) -> None:
    copy.rename(copy.with_name("elsewhere"))
    copy.symlink_to("elsewhere")


@pytest.mark.parametrize("change", [remove_it, put_a_file_for_it, put_a_link_for_it])
def test_the_tree_itself_must_stay_a_folder(lab: Path, change: Callable[[Path], object]) -> None:
    tree, copy = branched(lab)
    change(copy)
    found = compared(tree, copy)
    assert found.affected == (".",)
    assert found.violations == ("the folder that the plugin worked on is gone, or is no folder any more",)


@linux
def test_a_tree_deeper_than_python_recurses_is_compared(lab: Path) -> None:
    tree, copy = branched(lab)
    dig(copy, 1500)
    found = compared(tree, copy)
    assert len(found.affected) == 1501 and found.violations == ()
    publish.discard(tree.parent.parent)


@linux
def test_a_path_longer_than_any_call_takes_must_not_be_left(lab: Path) -> None:
    tree, copy = branched(lab)
    dig(copy, 3000)
    found = compared(tree, copy)
    assert len(found.violations) == 1 and "cannot be looked at: its path is too long" in found.violations[0]
    publish.discard(tree.parent.parent)


@linux
def test_a_hundred_thousand_names_are_compared_within_a_minute(lab: Path) -> None:
    tree, copy = branched(lab)
    many = copy / "many"
    many.mkdir()
    (many / "0").touch()
    for number in range(1, 50_000):
        os.link(many / "0", many / f"{number}")
        os.symlink("0", many / f"link-{number}")
    begun = time.monotonic()
    found = compared(tree, copy)
    assert len(found.affected) == 100_000 and found.violations == ()
    assert time.monotonic() - begun < 60


def test_more_than_can_be_read_in_time_is_not_kept_and_not_read(lab: Path) -> None:
    """A file of holes takes no room, and no time to make; to hash and to sync it takes hours."""
    tree = staged(lab, run_folder(lab))
    copy = publish.branch(tree)
    for number in range(9):
        with (copy / f"sparse-{number}").open("wb") as file:
            file.truncate(512 * 1024**2)
    [violation] = changes.compare(tree, copy, protected=lambda _: False).violations
    assert "4 GB" in violation


def test_more_names_than_can_be_listed_in_time_are_not_kept(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MOST_ADDED", 100)
    tree = staged(lab, run_folder(lab))
    copy = publish.branch(tree)
    for number in range(101):
        (copy / f"{number}").touch()
    [violation] = changes.compare(tree, copy, protected=lambda _: False).violations
    assert "100 files" in violation
