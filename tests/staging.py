"""Staging trees on a real file system: a data root, what the steps leave in a tree, a user without rights."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from app.steps import publish

REPOSITORY = Path(__file__).parents[1]
SESSION = "0198c0de-0000-7000-8000-000000000001"
OTHER = "0198c0de-0000-7000-8000-000000000002"
OWNED = frozenset({"README.md", ".exlab-wizard"})
NOBODY = 65534
FOREIGN_GROUP = 12345

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount or to change groups"
)
strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
acl = pytest.mark.skipif(shutil.which("setfacl") is None, reason="needs setfacl")


@contextmanager
def data_root() -> Iterator[Path]:
    """A data root that every user may write to; those of pytest are closed to others."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        root = Path(folder).resolve()
        root.chmod(0o777)
        publish.found_root(root)
        publish.session_folder(root, SESSION).parent.chmod(0o777)
        yield root


@contextmanager
def mounted(root: Path, *options: str) -> Iterator[Path]:
    """A data root on a disk of its own, of which nothing is used yet."""
    root.mkdir()
    subprocess.run(["mount", *options, str(root)], check=True)
    try:
        publish.found_root(root)
        yield root
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def small_disk(lab: Path) -> AbstractContextManager[Path]:
    """A disk of 2 MB."""
    return mounted(lab / "small", "-t", "tmpfs", "-o", "size=2m", "none")


def run_folder(lab: Path, name: str = "Run_1") -> Path:
    return lab / "CONFOCAL_01" / "PROJ-0042" / name


def fill(tree: Path, session_id: str = SESSION) -> None:
    """What the steps before leave: files, folders, a link, and the mark of the session."""
    (tree / "data" / "raw").mkdir(parents=True)
    (tree / "data" / "empty").mkdir()
    (tree / "data" / "raw" / "a.txt").write_text("alpha")
    (tree / "data" / "run.sh").write_text("#!/bin/sh\n")
    (tree / "data" / "run.sh").chmod(0o755)
    (tree / "latest").symlink_to("data/raw/a.txt")
    (tree / ".exlab-wizard").mkdir()
    (tree / ".exlab-wizard" / "creation.json").write_text(json.dumps({"session_id": session_id}))


def staged(lab: Path, destination: Path, session_id: str = SESSION) -> Path:
    tree = publish.prepare(publish.session_folder(lab, session_id), destination)
    fill(tree, session_id)
    return tree


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


COMPLETE = sorted(
    [
        ".exlab-wizard",
        ".exlab-wizard/creation.json",
        "data",
        "data/empty",
        "data/raw",
        "data/raw/a.txt",
        "data/run.sh",
        "latest",
    ]
)


def as_nobody(work: Callable[[], None]) -> None:
    """Runs `work` in a child without any rights. Root is let into everything, so it cannot test rights."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
        finally:
            if sys.exc_info()[0]:
                os.write(writing, traceback.format_exc().encode()[-60_000:])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as report:
        complaint = report.read().decode()
    os.waitpid(pid, 0)
    assert not complaint, complaint


def child(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)


def rights(folder: Path) -> dict[str, tuple[object, ...]]:
    """Owner, group, mode and both ACLs of a folder and of all below it."""

    def of(path: Path) -> tuple[object, ...]:
        status = path.stat()
        lists = {
            name: os.getxattr(path, name)
            for name in os.listxattr(path)
            if name.startswith("system.posix_acl")
        }
        return status.st_uid, status.st_gid, oct(status.st_mode), sorted(lists.items())

    return {
        path.relative_to(folder).as_posix(): of(path)
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink()
    }


def made_in_place(parent: Path) -> dict[str, tuple[object, ...]]:
    folder = parent / "reference"
    folder.mkdir()
    fill(folder)
    found = rights(folder)
    shutil.rmtree(folder)
    return found


def project_folder(lab: Path) -> Path:
    folder = lab / "CONFOCAL_01" / "PROJ-0042"
    folder.mkdir(parents=True)
    return folder


def set_acl(folder: Path, entry: str) -> None:
    done = subprocess.run(
        ["setfacl", "-d", "-m", entry, str(folder)], check=False, capture_output=True, text=True
    )
    if "not supported" in done.stderr:
        pytest.skip("this file system has no ACLs")
    assert done.returncode == 0, done.stderr


def dig(folder: Path, levels: int) -> None:
    """Makes folders in folders by their descriptors: the path may grow longer than any call takes."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def fill_folder(folder: Path) -> None:
    folder.mkdir()
    fill(folder)
