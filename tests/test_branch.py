"""The copy of a tree that a plugin works on: the same in all, apart in all, and gone without a trace."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from app.errors import blocked_by
from app.steps import publish
from tests.staging import (
    FOREIGN_GROUP,
    SESSION,
    acl,
    as_nobody,
    as_root,
    child,
    data_root,
    dig,
    fill,
    linux,
    made_in_place,
    mounted,
    project_folder,
    rights,
    run_folder,
    set_acl,
    small_disk,
    staged,
    strace,
)

BESIDE = "README.rendered.md"


@pytest.fixture
def lab() -> Iterator[Path]:
    with data_root() as root:
        yield root


def described(tree: Path) -> dict[str, tuple[object, ...]]:
    """All that a copy must have, of a folder and of all below it."""
    return {str(path.relative_to(tree)): _described(path) for path in (tree, *tree.rglob("*"))}


def _described(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    kept: object = None
    attributes: dict[str, bytes] = {}
    if path.is_symlink():
        kept = os.readlink(path)
    elif path.is_file():
        kept = path.read_bytes()
    if sys.platform == "linux":
        names = os.listxattr(path, follow_symlinks=False)
        attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    return oct(status.st_mode), status.st_gid, status.st_mtime_ns, sorted(attributes.items()), kept


def attempts(lab: Path) -> set[str]:
    return set(os.listdir(publish.session_folder(lab, SESSION)))


def written(tree: Path) -> None:
    """What is not in every tree: odd names, odd rights, attributes, links to nowhere, times of long ago."""
    fill(tree)
    (tree / os.fsdecode(b"not-utf8-\xff")).write_bytes(os.urandom(3_000_000))
    (tree / "nowhere").symlink_to("/no/such/place")
    (tree / "data" / "shared").mkdir(mode=0o1777)
    (tree / "data" / "raw" / "a.txt").chmod(0o4750)
    (tree / "data" / "raw" / "fixed.txt").write_text("fixed")
    if sys.platform == "linux":
        os.setxattr(tree / "data" / "raw" / "fixed.txt", "user.origin", b"microscope")
        os.setxattr(tree / "data" / "empty", "user.origin", b"\x00\xff")
    (tree / "data" / "raw" / "fixed.txt").chmod(0o444)
    (tree / "data" / "raw").chmod(0o555)
    for number, path in enumerate([tree, *tree.rglob("*")]):
        when = 1_000_000_000_123_456_789 + number
        os.utime(path, ns=(when, when), follow_symlinks=False)


# The same


@linux
@pytest.mark.parametrize("user", ["this user", pytest.param("nobody", marks=as_root)])
def test_a_branch_is_like_its_tree_in_all(lab: Path, user: str) -> None:
    def work() -> None:
        tree = publish.prepare(publish.session_folder(lab, SESSION), run_folder(lab))
        written(tree)
        before = described(tree)
        copy = publish.branch(tree)
        assert described(copy) == before == described(tree)
        assert copy.parent.parent == tree.parent.parent and copy.parent != tree.parent
        assert copy.parent.stat().st_mode == tree.parent.stat().st_mode

    if user == "nobody":
        as_nobody(work)
    else:
        work()


@as_root
def test_what_is_closed_to_its_owner_is_like_its_tree_too(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / "data" / "raw" / "a.txt").chmod(0)
    (tree / "data" / "raw").chmod(0)
    assert described(publish.branch(tree)) == described(tree)


@as_root
def test_what_may_not_be_read_is_an_error_and_leaves_nothing(lab: Path) -> None:
    def work() -> None:
        tree = staged(lab, run_folder(lab))
        (tree / "data" / "raw" / "a.txt").chmod(0)
        with pytest.raises(PermissionError) as caught:
            publish.branch(tree)
        assert caught.value.filename == str(tree / "data" / "raw" / "a.txt")
        assert attempts(lab) == {tree.parent.name}
        (tree / "data" / "raw" / "a.txt").chmod(0o400)
        assert described(publish.branch(tree)) == described(tree)

    as_nobody(work)


@linux
@acl
@pytest.mark.parametrize("user", ["this user", pytest.param("nobody", marks=as_root)])
@pytest.mark.parametrize("filled", ["before the branch", "in the branch"])
@pytest.mark.parametrize(
    "giving",
    ["nothing", pytest.param("a group", marks=as_root), "a list", pytest.param("both", marks=as_root)],
)
def test_what_is_published_from_a_branch_has_the_rights_of_what_is_made_in_place(
    lab: Path, giving: str, filled: str, user: str
) -> None:
    parent = project_folder(lab)
    parent.chmod(0o777)
    if giving in ("a list", "both"):
        set_acl(parent, f"u:{FOREIGN_GROUP}:rwx,g::rwx,o::rx,m::rwx")
    if giving in ("a group", "both"):
        os.chown(parent, -1, FOREIGN_GROUP)
        parent.chmod(0o2777)

    def work() -> None:
        tree = publish.prepare(publish.session_folder(lab, SESSION), parent / "Run_1")
        if filled == "before the branch":
            fill(tree)
        copy = publish.branch(publish.branch(tree))
        if filled == "in the branch":
            fill(copy)
        assert publish.publish(copy, parent / "Run_1", SESSION) is None
        assert rights(parent / "Run_1") == made_in_place(parent)

    if user == "nobody":
        as_nobody(work)
    else:
        work()


@linux
@acl
def test_a_list_that_was_taken_away_is_not_given_back_by_the_folder_above(lab: Path) -> None:
    parent = project_folder(lab)
    set_acl(parent, f"g:{FOREIGN_GROUP}:rwx")
    tree = staged(lab, parent / "Run_1")
    subprocess.run(["setfacl", "-b", str(tree / "data" / "raw"), str(tree / "data" / "run.sh")], check=True)
    assert described(publish.branch(tree)) == described(tree)


@linux
def test_a_tree_deeper_than_python_recurses_is_branched(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    dig(tree, 1500)
    copy = publish.branch(tree)
    assert publish.seal(copy, owned=frozenset()) == publish.seal(tree, owned=frozenset())
    publish.discard(tree.parent.parent)


def test_a_file_beside_the_tree_is_brought_along_if_it_is_there_and_replaces_what_was_put_in_its_place(
    lab: Path,
) -> None:
    tree = staged(lab, run_folder(lab))
    (tree.parent / BESIDE).write_text("as rendered")
    copy = publish.branch(tree)
    (copy.parent / BESIDE).symlink_to("/etc/passwd")
    for name in (BESIDE, "not there"):
        publish.bring_along(tree, copy, name)
    assert sorted(os.listdir(copy.parent)) == [BESIDE, "tree"]
    assert _described(copy.parent / BESIDE) == _described(tree.parent / BESIDE)


# Apart


def test_writing_to_a_branch_in_place_does_not_reach_the_tree(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / "data" / "one").write_text("one")
    os.link(tree / "data" / "one", tree / "data" / "two")
    before = described(tree)
    copy = publish.branch(tree)
    for path in copy.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.lstat().st_nlink == 1
            path.write_text("overwritten " + path.name)
    assert described(tree) == before
    assert (copy / "data" / "one").read_text() == "overwritten one"


MKFS = {
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q"),
}


def sharing_disk(lab: Path, kind: str) -> AbstractContextManager[Path]:
    """A disk whose files can share their blocks."""
    image = lab / "disk"
    with open(image, "wb") as file:
        file.truncate(512 * 1024 * 1024)
    subprocess.run([*MKFS[kind], str(image)], check=True)
    return mounted(lab / "large", "-o", "loop", str(image))


def used(root: Path) -> int:
    os.sync()
    room = os.statvfs(root)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


@as_root
@pytest.mark.parametrize("kind", MKFS)
def test_where_files_can_share_blocks_a_branch_takes_no_room_until_it_is_written_to(
    lab: Path, kind: str
) -> None:
    if shutil.which(MKFS[kind][0]) is None:
        pytest.skip(f"needs {MKFS[kind][0]}")
    with sharing_disk(lab, kind) as root:
        tree = staged(root, run_folder(root))
        image = tree / "data" / "stack.tif"
        image.write_bytes(os.urandom(64 * 1024 * 1024))
        first = used(root)
        copy = publish.branch(tree)
        assert used(root) - first < 8 * 1024 * 1024
        before = described(tree)
        assert described(copy) == before
        with open(copy / "data" / "stack.tif", "r+b") as file:
            file.write(bytes(1024 * 1024))
        assert described(tree) == before


# When it fails


@as_root
def test_a_full_disk_is_waited_for_and_the_part_that_was_copied_is_gone(lab: Path) -> None:
    with small_disk(lab) as root:
        tree = staged(root, run_folder(root))
        (tree / "data" / "stack.tif").write_bytes(b"x" * 1_200_000)
        before = described(tree)
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                publish.branch(tree)
            blocked = blocked_by(caught.value)
            assert blocked and blocked.code == "disk_full" and "stack.tif" in blocked.message
            assert attempts(root) == {tree.parent.name}
        assert described(tree) == before
        (tree / "data" / "stack.tif").write_bytes(b"x" * 500_000)
        assert described(publish.branch(tree)) == described(tree)


def test_a_data_root_that_is_not_mounted_is_waited_for(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (lab / publish.STAGING).rename(lab / "unmounted")
    for call in (publish.branch, publish.forget, lambda tree: publish.only(tree.parents[1], tree)):
        with pytest.raises(OSError) as caught:
            call(tree)
        blocked = blocked_by(caught.value)
        assert blocked and blocked.code == "not_mounted"
    assert not publish.root_present(lab)


def test_a_pipe_in_a_tree_is_an_error_and_is_not_waited_for(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    os.mkfifo(tree / "pipe")
    with pytest.raises(OSError) as caught:
        publish.branch(tree)
    assert caught.value.errno == errno.EINVAL and blocked_by(caught.value) is None
    assert attempts(lab) == {tree.parent.name}


BRANCH = """
import sys
from pathlib import Path
from app.steps import publish
publish.branch(Path(sys.argv[1]))
print("branched")
"""
DEATHS = [
    ("mkdir", 1),
    ("mkdir", 2),
    ("mkdir", 5),
    ("write", 1),
    ("write", 3),
    ("symlink", 1),
    ("utimensat", 1),
    ("utimensat", 6),
    ("utimensat", 9),
]


@strace
@pytest.mark.parametrize(("call", "count"), DEATHS)
def test_a_branch_killed_at_any_call_leaves_the_tree_as_it_was_and_the_next_one_works(
    lab: Path, call: str, count: int
) -> None:
    tree = staged(lab, run_folder(lab))
    (tree.parent / BESIDE).write_text("as rendered")
    digest = publish.seal(tree, owned=frozenset())
    before = described(tree.parent)
    kill = f"inject={call}:signal=SIGKILL:when={count}"
    traced = ("strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", kill)
    done = child(BRANCH, tree, prefix=traced)
    assert "branched" not in done.stdout, "the crash did not happen"
    assert described(tree.parent) == before
    copy = publish.branch(tree)
    publish.only(tree.parent.parent, copy)
    assert attempts(lab) == {copy.parent.name}
    assert publish.verify(copy, publish.seal(copy, owned=frozenset()), owned=frozenset())
    assert publish.seal(copy, owned=frozenset()) == digest


# What is thrown away

WRITER = """
import os, sys
held = os.open("data/raw/a.txt", os.O_WRONLY)
folder = os.open("data", os.O_RDONLY)
here = os.getcwd()
ways = [
    lambda: os.pwrite(held, b"late", 0),
    lambda: os.close(os.open("late", os.O_CREAT | os.O_WRONLY, dir_fd=folder)),
    lambda: open("data/run.sh", "w").write("late"),
    lambda: open(here + "/data/run.sh", "w").write("late"),
    lambda: os.makedirs(here + "/data"),
    lambda: os.mkdir("more"),
]
print("ready", flush=True)
for line in sys.stdin:
    for way in ways:
        try:
            way()
        except OSError:
            pass
    print(flush=True)
"""


def rounds(writer: "subprocess.Popen[str]", count: int) -> None:
    assert writer.stdin and writer.stdout
    for _ in range(count):
        assert writer.stdout.readline() == "\n"


def ask(writer: "subprocess.Popen[str]", count: int) -> None:
    assert writer.stdin
    writer.stdin.write("\n" * count)
    writer.stdin.flush()


def test_who_still_writes_into_a_forgotten_attempt_disturbs_no_other(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    before = described(tree)
    forgotten = publish.branch(tree)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER],
        cwd=forgotten,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
        ask(writer, 500)  # more than it gets through until the attempt is gone
        rounds(writer, 10)
        publish.forget(forgotten)
        living = publish.branch(tree)
        ask(writer, 50)
        rounds(writer, 540)
        assert described(tree) == described(living) == before
        assert writer.stdin
        writer.stdin.close()
        assert writer.wait(30) == 0
    publish.only(tree.parent.parent, living)
    assert attempts(lab) == {living.parent.name}


@as_root
def test_an_attempt_that_its_owner_is_kept_out_of_is_forgotten(lab: Path) -> None:
    def work() -> None:
        tree = staged(lab, run_folder(lab))
        copy = publish.branch(tree)
        for name in ("data/raw", "data", "."):
            (copy / name).chmod(0)
        publish.forget(copy)
        publish.forget(copy)
        assert attempts(lab) == {tree.parent.name}

    as_nobody(work)


def test_only_one_attempt_is_left_of_many_and_all_that_is_none(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    folder = tree.parent.parent
    (folder / "template").mkdir()
    living = publish.branch(tree)
    publish.branch(living)
    half_removed = folder / "0123abcd.gone"
    half_removed.mkdir()
    before = described(living)
    for _ in range(2):
        publish.only(folder, living)
        assert attempts(lab) == {living.parent.name, "template"}
    assert described(living) == before


@linux
def test_three_thousand_files_are_branched_within_seconds(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    for number in range(3000):
        (tree / "data" / f"{number}.txt").write_text("x" * 1000)
    begun = time.monotonic()
    copy = publish.branch(tree)
    assert time.monotonic() - begun < 30
    assert len(os.listdir(copy / "data")) == len(os.listdir(tree / "data"))
