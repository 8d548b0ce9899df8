"""Staging trees and the one rename that publishes them, on a real file system."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app import disk
from app.errors import Failure, blocked_by
from app.steps import provenance, publish
from tests.staging import (
    COMPLETE,
    FOREIGN_GROUP,
    OTHER,
    OWNED,
    REPOSITORY,
    SESSION,
    acl,
    as_nobody,
    as_root,
    child,
    data_root,
    dig,
    fill,
    fill_folder,
    linux,
    made_in_place,
    names,
    project_folder,
    rights,
    run_folder,
    set_acl,
    small_disk,
    staged,
    strace,
)


@pytest.fixture
def lab() -> Iterator[Path]:
    with data_root() as root:
        yield root


def code_of(outcome: Failure | None) -> str | None:
    return outcome.code if outcome else None


# What a session's folder is made like


def made_and_published(lab: Path, parent: Path) -> dict[str, tuple[object, ...]]:
    tree = staged(lab, parent / "Run_1")
    assert publish.publish(tree, parent / "Run_1", SESSION) is None
    return rights(parent / "Run_1")


@linux
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_published_tree_has_the_modes_that_the_umask_gives_in_place(lab: Path, umask: int) -> None:
    parent = project_folder(lab)
    old = os.umask(umask)
    try:
        assert made_and_published(lab, parent) == made_in_place(parent)
    finally:
        os.umask(old)
    assert stat.S_IMODE((parent / "Run_1").stat().st_mode) == 0o777 & ~umask


@as_root
def test_a_published_tree_belongs_to_the_group_of_a_setgid_folder(lab: Path) -> None:
    parent = project_folder(lab)
    os.chown(parent, -1, FOREIGN_GROUP)
    parent.chmod(0o2775)
    found = made_and_published(lab, parent)
    assert found == made_in_place(parent)
    assert (parent / "Run_1" / "data").stat().st_gid == FOREIGN_GROUP
    assert (parent / "Run_1" / "data").stat().st_mode & stat.S_ISGID


@as_root
def test_a_setgid_data_root_gives_nothing_to_a_folder_that_does_not_hand_it_on(lab: Path) -> None:
    parent = project_folder(lab)
    for folder in (lab, lab / publish.STAGING):
        os.chown(folder, -1, FOREIGN_GROUP)
        folder.chmod(0o2777)
    assert made_and_published(lab, parent) == made_in_place(parent)
    assert (parent / "Run_1").stat().st_gid == os.getgid()


@linux
@acl
def test_a_published_tree_has_the_acl_default_of_its_project(lab: Path) -> None:
    parent = project_folder(lab)
    set_acl(parent, f"g:{FOREIGN_GROUP}:rwx")
    assert made_and_published(lab, parent) == made_in_place(parent)
    raw = parent / "Run_1" / "data" / "raw"
    listed = subprocess.run(["getfacl", "-p", str(raw)], check=True, capture_output=True, text=True)
    assert f"default:group:{FOREIGN_GROUP}:rwx" in listed.stdout


@linux
@acl
def test_an_acl_default_of_the_data_root_does_not_leak_into_a_folder_without_one(lab: Path) -> None:
    parent = project_folder(lab)
    set_acl(lab / publish.STAGING, f"u:{FOREIGN_GROUP}:rwx")
    assert made_and_published(lab, parent) == made_in_place(parent)


@linux
@acl
def test_parents_that_are_made_hand_on_the_rights_of_the_nearest_folder(lab: Path) -> None:
    (lab / "CONFOCAL_01").mkdir()
    set_acl(lab / "CONFOCAL_01", f"g:{FOREIGN_GROUP}:rwx")
    destination = run_folder(lab)
    tree = staged(lab, destination)
    assert publish.publish(tree, destination, SESSION) is None
    assert rights(destination) == made_in_place(destination.parent)


@as_root
@acl
@pytest.mark.parametrize("giver", ["project", "data root"])
def test_rights_are_copied_without_making_anything_where_the_instrument_looks(lab: Path, giver: str) -> None:
    parent = project_folder(lab)
    handing_on = parent if giver == "project" else lab / publish.STAGING
    os.chown(handing_on, -1, FOREIGN_GROUP)
    handing_on.chmod(0o2775)
    set_acl(handing_on, f"g:{FOREIGN_GROUP}:rwx")
    before = parent.stat().st_mtime_ns
    tree = staged(lab, parent / "Run_1")
    assert parent.stat().st_mtime_ns == before
    found = rights(tree)
    assert found == made_in_place(parent)


@as_root
def test_a_user_outside_the_group_publishes_into_a_setgid_folder_all_the_same(lab: Path) -> None:
    parent = project_folder(lab)
    os.chown(parent, -1, FOREIGN_GROUP)
    parent.chmod(0o2777)

    def work() -> None:
        assert not disk.bestow(parent_of_nobody(lab), (FOREIGN_GROUP, None)), "chown should be refused here"
        assert made_and_published(lab, parent) == made_in_place(parent)
        assert (parent / "Run_1" / "data" / "raw" / "a.txt").stat().st_gid == FOREIGN_GROUP

    as_nobody(work)
    assert os.listdir(parent) == ["Run_1"]


def parent_of_nobody(lab: Path) -> Path:
    folder = lab / "of-nobody"
    folder.mkdir()
    return folder


@as_root
def test_a_folder_left_by_a_crash_while_it_was_lent_is_taken_by_the_next_attempt(lab: Path) -> None:
    parent = project_folder(lab)
    os.chown(parent, -1, FOREIGN_GROUP)
    parent.chmod(0o2777)

    def work() -> None:
        (parent / f".exlab-{SESSION}").mkdir()
        staged(lab, parent / "Run_1")

    as_nobody(work)
    assert os.listdir(parent) == []


def test_preparing_again_removes_dead_attempts_and_keeps_the_template(lab: Path) -> None:
    folder = publish.session_folder(lab, SESSION)
    dead = staged(lab, run_folder(lab))
    (folder / "template").mkdir()
    living = publish.prepare(folder, run_folder(lab))
    assert not dead.exists()
    assert os.listdir(living) == []
    assert sorted(os.listdir(folder)) == sorted(["template", living.parent.name])


# The one rename


def test_a_tree_is_published_whole_and_missing_parents_are_made(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    assert publish.publish(tree, run_folder(lab), SESSION) is None
    assert names(run_folder(lab)) == COMPLETE
    assert not tree.exists()


def test_a_data_root_behind_a_link_works_as_any_other(lab: Path) -> None:
    (lab / "disk").mkdir()
    (lab / "link").symlink_to("disk")
    root = lab / "link"
    publish.found_root(root)
    tree = staged(root, run_folder(root))
    publish.sync_tree(tree)
    assert publish.publish(tree, run_folder(root), SESSION) is None
    publish.discard(publish.session_folder(root, SESSION))
    assert names(run_folder(lab / "disk")) == COMPLETE


def empty_folder(path: Path) -> None:
    path.mkdir(parents=True)


def full_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "theirs").touch()


def plain_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()


def broken_link(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")


def file_as_parent(path: Path) -> None:
    path.parent.parent.mkdir(parents=True)
    path.parent.touch()


def broken_link_as_parent(path: Path) -> None:
    path.parent.parent.mkdir(parents=True)
    path.parent.symlink_to("nowhere")


def twin_in_other_case(path: Path) -> None:
    path.with_name(path.name.swapcase()).mkdir(parents=True)


OBSTACLES = [
    empty_folder,
    full_folder,
    plain_file,
    broken_link,
    file_as_parent,
    broken_link_as_parent,
    twin_in_other_case,
]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_at_the_destination_is_never_touched(lab: Path, obstacle: Callable[[Path], None]) -> None:
    tree = staged(lab, run_folder(lab))
    obstacle(run_folder(lab))
    before = names(lab)
    assert code_of(publish.publish(tree, run_folder(lab), SESSION)) == "destination_taken"
    assert names(lab) == before


def test_a_name_that_only_unicode_tells_apart_is_taken(lab: Path) -> None:
    destination = run_folder(lab, "Run_\u00e9")
    run_folder(lab, "Run_e\u0301").mkdir(parents=True)
    tree = staged(lab, destination)
    assert code_of(publish.publish(tree, destination, SESSION)) == "destination_taken"


def test_publishing_again_finds_it_done(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    assert [publish.publish(tree, run_folder(lab), SESSION) for _ in range(3)] == [None] * 3
    assert names(run_folder(lab)) == COMPLETE


def test_a_lost_tree_is_said_to_be_lost(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    shutil.rmtree(tree)
    assert code_of(publish.publish(tree, run_folder(lab), SESSION)) == "staging_lost"
    assert not run_folder(lab).exists()


@pytest.mark.parametrize("session_id", [OTHER, None])
def test_somebody_elses_folder_is_not_taken_for_ours(lab: Path, session_id: str | None) -> None:
    tree = staged(lab, run_folder(lab))
    shutil.rmtree(tree)
    run_folder(lab).mkdir(parents=True)
    if session_id:
        fill(run_folder(lab), session_id)
    assert code_of(publish.publish(tree, run_folder(lab), SESSION)) == "staging_lost"


def test_a_copy_of_our_own_folder_at_the_destination_is_not_replaced(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    shutil.copytree(tree, run_folder(lab), symlinks=True)
    assert code_of(publish.publish(tree, run_folder(lab), SESSION)) == "destination_taken"
    assert tree.exists()


def test_a_data_root_that_is_not_mounted_is_waited_for(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    digest = publish.seal(tree, owned=OWNED)
    (lab / publish.STAGING).rename(lab / "unmounted")
    attempts: list[Callable[[], object]] = [
        lambda: publish.publish(tree, run_folder(lab), SESSION),
        lambda: publish.prepare(publish.session_folder(lab, SESSION), run_folder(lab)),
        lambda: publish.verify(tree, digest, owned=OWNED),
        lambda: publish.sync_tree(tree),
        lambda: publish.discard(tree.parent.parent),
        lambda: publish.keep(tree.parent.parent, tree),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        blocked = blocked_by(caught.value)
        assert blocked and blocked.code == "not_mounted"
    assert not publish.root_present(lab)
    (lab / "unmounted").rename(lab / publish.STAGING)
    assert publish.publish(tree, run_folder(lab), SESSION) is None


@as_root
def test_a_parent_that_may_not_be_written_is_waited_for(lab: Path) -> None:
    parent = project_folder(lab)

    def work() -> None:
        tree = staged(lab, parent / "Run_1")
        with pytest.raises(PermissionError) as caught:
            publish.publish(tree, parent / "Run_1", SESSION)
        blocked = blocked_by(caught.value)
        assert blocked and blocked.code == "access_denied"
        assert names(tree) == COMPLETE

    as_nobody(work)


def race(trees: dict[str, Path], destination: Path) -> dict[str, str | None]:
    """What each session's publication came to when all began at once."""
    start = threading.Barrier(len(trees))

    def run(session_id: str) -> str | None:
        start.wait()
        return code_of(publish.publish(trees[session_id], destination, session_id))

    with ThreadPoolExecutor(len(trees)) as threads:
        return dict(zip(trees, threads.map(run, trees), strict=True))


@pytest.mark.parametrize("turn", range(5))
def test_of_many_trees_published_at_once_onto_one_name_exactly_one_wins(lab: Path, turn: int) -> None:
    trees = {str(number): staged(lab, run_folder(lab), str(number)) for number in range(8)}
    outcomes = race(trees, run_folder(lab))
    winners = [session_id for session_id, code in outcomes.items() if code is None]
    assert [provenance.session_of(run_folder(lab))] == winners
    assert set(outcomes.values()) == {None, "destination_taken"}
    assert names(run_folder(lab)) == COMPLETE
    assert all(trees[loser].exists() for loser in trees if loser not in winners)


PUBLISH = """
import sys
from pathlib import Path
from app.steps import publish
tree, destination, session_id = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
if sys.stdin.readline():
    outcome = publish.publish(tree, destination, session_id)
    print(outcome.code if outcome else "published")
"""


def test_of_two_processes_exactly_one_publishes(lab: Path) -> None:
    trees = {session_id: staged(lab, run_folder(lab), session_id) for session_id in ("1", "2")}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(tree), str(run_folder(lab)), session_id],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for session_id, tree in trees.items()
    ]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    assert said == ["destination_taken", "published"]
    assert names(run_folder(lab)) == COMPLETE


PUBLISH_AT_ONCE = PUBLISH.replace("if sys.stdin.readline():", "if True:")


RENAME = """
import sys
from pathlib import Path
from app import disk
try:
    disk.rename_new(Path(sys.argv[1]), Path(sys.argv[2]))
    print("renamed")
except FileExistsError as error:
    print("refused", error.errno)
"""
# What a file system says that has no exclusive rename, and a look that came before the folder did.
LACKING = ("strace", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:error=EINVAL")
BLIND = (*LACKING, "-e", "inject=?lstat,?newfstatat,?statx:error=ENOENT", "-P")


@strace
def test_a_file_system_without_an_exclusive_rename_publishes_all_the_same(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    done = child(PUBLISH_AT_ONCE, tree, run_folder(lab), SESSION, prefix=LACKING)
    assert done.stdout.endswith("published\n"), done.stderr
    assert names(run_folder(lab)) == COMPLETE


@strace
def test_without_an_exclusive_rename_an_empty_folder_is_refused_by_a_look(lab: Path) -> None:
    fill_folder(lab / "ours")
    (lab / "theirs").mkdir()
    done = child(RENAME, lab / "ours", lab / "theirs", prefix=LACKING)
    assert done.stdout == f"refused {errno.EEXIST}\n", done.stderr
    assert os.listdir(lab / "theirs") == []


@strace
def test_without_an_exclusive_rename_a_folder_with_files_is_refused_that_came_after_the_look(
    lab: Path,
) -> None:
    fill_folder(lab / "ours")
    full_folder(lab / "theirs")
    done = child(RENAME, lab / "ours", lab / "theirs", prefix=(*BLIND, str(lab / "theirs")))
    assert done.stdout == f"refused {errno.EEXIST}\n", done.stderr
    assert os.listdir(lab / "theirs") == ["theirs"]


def crash_points() -> list[tuple[str, int]]:
    """Each call of a publication that makes two parents, by name and count."""
    return [("mkdir", 1), ("mkdir", 2), ("renameat2", 1), *(("fsync", count) for count in range(1, 5))]


@strace
@pytest.mark.parametrize(("call", "count"), crash_points())
def test_a_publication_killed_at_any_call_is_finished_by_the_next(lab: Path, call: str, count: int) -> None:
    tree, destination = staged(lab, run_folder(lab)), run_folder(lab)
    kill = f"inject={call}:signal=SIGKILL:when={count}"
    traced = ("strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", kill)
    done = child(PUBLISH_AT_ONCE, tree, destination, SESSION, prefix=traced)
    assert "published" not in done.stdout, "the crash did not happen"
    assert tree.exists() != destination.exists()
    assert names(tree if tree.exists() else destination) == COMPLETE
    assert publish.publish(tree, destination, SESSION) is None
    assert names(destination) == COMPLETE


SYNC_AND_PUBLISH = """
import sys
from pathlib import Path
from app.steps import publish
tree, destination = Path(sys.argv[1]), Path(sys.argv[2])
publish.sync_tree(tree)
assert publish.publish(tree, destination, "x") is None
"""


def synced_paths(calls: list[str]) -> list[str]:
    return [found[1] for call in calls if (found := re.search(r"fsync\(\d+<([^>]+)>", call))]


@strace
@pytest.mark.parametrize("parents", ["missing", "made before a crash and not synced"])
def test_all_is_on_the_disk_before_the_rename_and_both_parents_after_it(lab: Path, parents: str) -> None:
    tree, destination = staged(lab, run_folder(lab)), run_folder(lab)
    if parents != "missing":
        destination.parent.mkdir(parents=True)
    real = [path for path in (tree, *tree.rglob("*")) if not path.is_symlink()]
    report = lab / "calls"
    traced = (
        "strace",
        "-f",
        "-y",
        "-qq",
        "-s",
        "4096",
        "-o",
        str(report),
        "-e",
        "trace=fsync,mkdir,renameat2",
    )
    done = child(SYNC_AND_PUBLISH, tree, destination, prefix=traced)
    assert done.returncode == 0, done.stderr
    calls = report.read_text().splitlines()
    renamed = next(number for number, call in enumerate(calls) if "renameat2(" in call)
    before, after = synced_paths(calls[:renamed]), synced_paths(calls[renamed:])

    assert set(map(str, real)) <= set(before)
    for path in real:
        if path != tree:
            assert before.index(str(path)) < before.index(str(path.parent)), "bottom up"
    ways = [str(tree.parent), str(tree.parent.parent), str(lab / publish.STAGING), str(lab)]
    assert before[before.index(str(tree)) + 1 :][: len(ways)] == ways
    assert before[-2:] == [str(lab), str(lab / "CONFOCAL_01")], "the folders that got the missing parents"
    assert after == [str(destination.parent), str(tree.parent)]


def test_a_found_publication_has_both_its_ends_synced_again(lab: Path) -> None:
    tree, destination = staged(lab, run_folder(lab)), run_folder(lab)
    publish.publish(tree, destination, SESSION)
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    report = lab / "calls"
    traced = ("strace", "-f", "-y", "-qq", "-o", str(report), "-e", "trace=fsync")
    done = child(PUBLISH_AT_ONCE, tree, destination, SESSION, prefix=traced)
    assert done.stdout.endswith("published\n"), done.stderr
    expected = [destination.parent, tree.parent]
    assert synced_paths(report.read_text().splitlines()) == list(map(str, expected))


@strace
@pytest.mark.parametrize("kind", ["files", "folders"])
def test_a_disk_that_does_not_sync_is_an_error_that_names_the_path(lab: Path, kind: str) -> None:
    tree = staged(lab, run_folder(lab))
    call = "publish.sync_tree(tree)" if kind == "files" else "disk.sync_folder(tree)"
    code = f"""
import sys
from pathlib import Path
from app import disk
from app.steps import publish
tree = Path(sys.argv[1])
try:
    {call}
except OSError as error:
    print(error.errno, error.filename)
"""
    failing = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO")
    done = child(code, tree, prefix=failing)
    number, _, path = done.stdout.strip().partition(" ")
    assert int(number) == errno.EIO, done.stderr
    assert Path(path).is_relative_to(tree)


@as_root
def test_a_full_disk_is_an_error_that_is_waited_for_and_leaves_nothing_half(lab: Path) -> None:
    with small_disk(lab) as root:
        tree = staged(root, run_folder(root))
        ballast = root / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(b"x" * 3 * 1024 * 1024)
        before = names(root)
        with pytest.raises(OSError) as caught:
            publish.seal(tree, owned=OWNED)
        blocked = blocked_by(caught.value)
        assert blocked and blocked.code == "disk_full" and "manifest.json" in blocked.message
        assert names(root) == before
        ballast.unlink()
        assert publish.verify(tree, publish.seal(tree, owned=OWNED), owned=OWNED)


# The manifest


def change_a_byte(tree: Path) -> None:
    (tree / "data" / "raw" / "a.txt").write_text("alphA")


def change_a_mode(tree: Path) -> None:
    (tree / "data" / "run.sh").chmod(0o644)


def change_the_mode_of_a_folder(tree: Path) -> None:
    (tree / "data" / "empty").chmod(0o700)


def remove_a_file(tree: Path) -> None:
    (tree / "data" / "run.sh").unlink()


def add_a_file(tree: Path) -> None:
    (tree / "data" / "empty" / "new").touch()


def add_a_folder(tree: Path) -> None:
    (tree / "new").mkdir()


def remove_a_folder(tree: Path) -> None:
    (tree / "data" / "empty").rmdir()


def point_a_link_elsewhere(tree: Path) -> None:
    (tree / "latest").unlink()
    (tree / "latest").symlink_to("data/run.sh")


def put_a_file_for_a_link(tree: Path) -> None:
    (tree / "latest").unlink()
    (tree / "latest").write_text("alpha")


def rename_a_file(tree: Path) -> None:
    (tree / "data" / "raw" / "a.txt").rename(tree / "data" / "raw" / "b.txt")


def put_a_pipe_for_a_file(tree: Path) -> None:
    (tree / "data" / "run.sh").unlink()
    os.mkfifo(tree / "data" / "run.sh")


def add_an_owned_name_further_down(tree: Path) -> None:
    (tree / "data" / "README.md").touch()


def remove_everything(tree: Path) -> None:
    shutil.rmtree(tree)


CHANGES = [
    change_a_byte,
    change_a_mode,
    change_the_mode_of_a_folder,
    remove_a_file,
    add_a_file,
    add_a_folder,
    remove_a_folder,
    point_a_link_elsewhere,
    put_a_file_for_a_link,
    rename_a_file,
    put_a_pipe_for_a_file,
    add_an_owned_name_further_down,
    remove_everything,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_to_a_sealed_tree_is_noticed(lab: Path, change: Callable[[Path], None]) -> None:
    tree = staged(lab, run_folder(lab))
    digest = publish.seal(tree, owned=OWNED)
    assert publish.verify(tree, digest, owned=OWNED)
    change(tree)
    assert not publish.verify(tree, digest, owned=OWNED)


def test_what_others_own_at_the_top_may_change(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    digest = publish.seal(tree, owned=OWNED)
    (tree / "README.md").write_text("new")
    (tree / ".exlab-wizard" / "readme_fields.json").touch()
    assert publish.verify(tree, digest, owned=OWNED)


def test_the_manifest_beside_the_tree_is_what_the_digest_tells(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    (tree / os.fsdecode(b"not-utf8-\xff")).touch()
    digest = publish.seal(tree, owned=OWNED)
    content = (tree.parent / "manifest.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    entries = {entry["path"]: entry for entry in json.loads(content)}
    assert entries["data/raw/a.txt"] == {
        "path": "data/raw/a.txt",
        "mode": f"{stat.S_IMODE((tree / 'data/raw/a.txt').stat().st_mode):04o}",
        "kind": "file",
        "size": 5,
        "sha256": hashlib.sha256(b"alpha").hexdigest(),
    }
    assert entries["latest"]["target"] == "data/raw/a.txt"
    assert ".exlab-wizard" not in entries


@linux
def test_a_tree_deeper_than_python_recurses_is_sealed_and_synced(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    dig(tree, 1500)
    publish.sync_tree(tree)
    assert publish.verify(tree, publish.seal(tree, owned=OWNED), owned=OWNED)
    publish.discard(tree.parent.parent)


def test_a_pipe_in_a_tree_does_not_hold_the_sync(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    os.mkfifo(tree / "pipe")
    publish.sync_tree(tree)


# What is left over


def test_discarding_leaves_nothing_of_a_session_and_all_of_others(lab: Path) -> None:
    staged(lab, run_folder(lab))
    other = staged(lab, run_folder(lab), OTHER)
    publish.discard(publish.session_folder(lab, SESSION))
    assert publish.residents(lab) == (OTHER,)
    assert names(other) == COMPLETE


def test_discarding_twice_is_discarding_once(lab: Path) -> None:
    folder = publish.session_folder(lab, SESSION)
    staged(lab, run_folder(lab))
    publish.discard(folder)
    publish.discard(folder)
    assert publish.residents(lab) == ()


@linux
def test_a_tree_deeper_than_the_longest_path_is_discarded(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    dig(tree, 3000)
    publish.discard(publish.session_folder(lab, SESSION))
    assert publish.residents(lab) == ()


def test_discarding_does_not_follow_links_out_of_the_tree(lab: Path) -> None:
    outside = lab / "outside"
    fill_folder(outside)
    outside.chmod(0o555)
    tree = staged(lab, run_folder(lab))
    (tree / "way-out").symlink_to(outside)
    publish.discard(publish.session_folder(lab, SESSION))
    assert names(outside) == COMPLETE
    assert stat.S_IMODE(outside.stat().st_mode) == 0o555


@as_root
def test_folders_that_are_closed_to_their_owner_are_discarded(lab: Path) -> None:
    outside = lab / "outside"

    def work() -> None:
        tree = staged(lab, run_folder(lab))
        outside.mkdir()
        outside.chmod(0o500)
        (tree / "data" / "way-out").symlink_to(outside)
        for folder, mode in (("data/raw", 0o000), ("data/empty", 0o500), ("data", 0o500), (".", 0o100)):
            (tree / folder).chmod(mode)
        with pytest.raises(PermissionError):
            shutil.rmtree(tree)
        publish.discard(publish.session_folder(lab, SESSION))
        assert publish.residents(lab) == ()

    as_nobody(work)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o500


@pytest.mark.parametrize("place", [".", "new", "tree/data"])
def test_a_folder_that_is_still_being_filled_is_discarded(lab: Path, place: str) -> None:
    folder = publish.session_folder(lab, SESSION)
    tree = staged(lab, run_folder(lab))
    target = folder if place == "." else tree.parent / place
    target.mkdir(exist_ok=True)
    filling = threading.Event()

    def keep_writing() -> None:
        number = 0
        while target.exists() and number < 1_000_000:
            number += 1
            try:
                (target / f"late-{number}").touch()
            except OSError:
                return  # it is going, or has gone
            if number == 50:
                filling.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    assert filling.wait(10)
    publish.discard(folder)
    writer.join(10)
    assert not writer.is_alive()
    assert publish.residents(lab) == ()


DISCARD = """
import sys
from pathlib import Path
from app.steps import publish
publish.discard(Path(sys.argv[1]))
"""


@strace
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_comes_into_a_folder_just_before_it_goes_is_discarded_too(lab: Path, count: int) -> None:
    staged(lab, run_folder(lab))
    late = ("strace", "-qq", "-o", "/dev/null", "-e", f"inject=rmdir,?unlinkat:error=ENOTEMPTY:when={count}")
    done = child(DISCARD, publish.session_folder(lab, SESSION), prefix=late)
    assert done.returncode == 0, done.stderr
    assert publish.residents(lab) == ()


def test_a_partial_tree_is_kept_and_all_else_removed(lab: Path) -> None:
    folder = publish.session_folder(lab, SESSION)
    tree = staged(lab, run_folder(lab))
    publish.seal(tree, owned=OWNED)
    (tree.parent / "README.rendered.md").touch()
    (folder / "template").mkdir()
    (folder / "template" / "copier.yml").touch()
    for _ in range(2):
        assert publish.keep(folder, tree) == tree
    assert os.listdir(folder) == [tree.parent.name]
    assert os.listdir(tree.parent) == ["tree"]
    assert names(tree) == COMPLETE
    assert publish.residents(lab) == (SESSION,)


def test_where_there_is_no_partial_tree_nothing_is_kept(lab: Path) -> None:
    folder = publish.session_folder(lab, SESSION)
    tree = staged(lab, run_folder(lab))
    shutil.rmtree(tree)
    assert publish.keep(folder, tree) is None
    assert publish.residents(lab) == ()


def test_a_root_is_told_from_the_empty_folder_of_an_unmounted_disk(tmp_path: Path) -> None:
    assert not publish.root_present(tmp_path)
    assert publish.residents(tmp_path) == ()
    for _ in range(2):
        publish.found_root(tmp_path)
    assert publish.root_present(tmp_path)


def test_two_thousand_files_are_synced_within_seconds(lab: Path) -> None:
    tree = staged(lab, run_folder(lab))
    for number in range(2000):
        (tree / "data" / f"{number}.txt").write_text("x" * 1000)
    begun = time.monotonic()
    publish.sync_tree(tree)
    assert time.monotonic() - begun < 30
