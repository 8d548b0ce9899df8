"""The knife itself, on processes that do one thing each: what it is told of, and what its verdicts do."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.service import ROOT
from tests.survival.knife import AVAILABLE, Call, Knife, Verdict

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the kernel of another system decides on no calls")

_BEGIN = """
import os, socket, subprocess, sys, threading
from tests.survival.knife import install
with socket.socket(fileno=int(sys.argv[1])) as line:
    listener = install()
    socket.send_fds(line, [b"!"], [listener])
    os.close(listener)
    line.recv(1)
"""


class Outcome(NamedTuple):
    """What a process was seen to do, what it printed, and how it ended."""

    calls: list[Call]
    printed: str
    status: int


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The one that is looked at."""
    watched = tmp_path / "watched"
    watched.mkdir()
    return watched


def _go_on(_number: int, _call: Call) -> Verdict:
    return "go on"


def _at(number: int, verdict: Verdict) -> Callable[[int, Call], Verdict]:
    """This verdict on the call of that number."""
    return lambda counted, _: verdict if counted == number else "go on"


def done(folder: Path, code: str, decide: Callable[[int, Call], Verdict] = _go_on) -> Outcome:
    """What comes of a process that runs `code` in the folder above, when `decide` is asked with each call's number."""
    calls: list[Call] = []

    def counted(call: Call) -> Verdict:
        calls.append(call)
        return decide(len(calls), call)

    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            [sys.executable, "-S", "-c", _BEGIN + code, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            cwd=folder.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        theirs.close()
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        knife = Knife(listener, process.pid, folder, counted)
        ours.send(b"!")
        try:
            printed, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        knife.join()
    return Outcome(calls, printed, process.returncode)


def own(text: str) -> list[Call]:
    """Calls of the service itself: a name and a path in each line."""
    told = (line.split() for line in text.strip().splitlines())
    return [Call(name, path, own=True) for name, path in told]


def test_every_change_below_the_folder_is_told_in_its_order(folder: Path) -> None:
    code = """
file = os.open("watched/a", os.O_WRONLY | os.O_CREAT)
os.write(file, b"one")
os.pwrite(file, b"two", 0)
os.writev(file, [b"three", b"four"])
os.ftruncate(file, 4)
os.posix_fallocate(file, 0, 8)
os.fsync(file)
os.fdatasync(file)
os.fchmod(file, 0o600)
os.fchown(file, -1, -1)
os.open("watched/a", os.O_WRONLY | os.O_TRUNC)
os.truncate("watched/a", 2)
os.chmod("watched/a", 0o644)
os.utime("watched/a")
os.mkdir("watched/b")
os.link("watched/a", "watched/b/c")
os.symlink("a", "watched/d")
os.lchown("watched/d", -1, -1)
os.rename("watched/b/c", "watched/b/e")
os.replace("watched/d", "watched/f")
os.mkfifo("watched/g")
os.unlink("watched/b/e")
os.rmdir("watched/b")
"""
    told = """
openat a
write a
pwrite64 a
writev a
ftruncate a
fallocate a
fsync a
fdatasync a
fchmod a
fchown a
openat a
truncate a
chmod a
utimensat a
mkdir b
link b/c
symlink d
lchown d
rename b/e
rename f
mknodat g
unlink b/e
rmdir b
"""
    assert done(folder, code) == (own(told), "", 0)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "f", "g"]


def test_attributes_and_copies_are_changes(folder: Path) -> None:
    code = """
one, two = os.open("watched/a", os.O_RDWR | os.O_CREAT), os.open("elsewhere", os.O_RDWR | os.O_CREAT)
os.write(two, b"some")
os.setxattr("watched/a", "user.one", b"1")
os.setxattr(one, "user.two", b"2")
os.removexattr("watched/a", "user.one")
os.sendfile(one, two, 0, 4)
os.copy_file_range(two, one, 4, 0)
os.copy_file_range(one, two, 4, 0)
"""
    told = "openat a\nsetxattr a\nfsetxattr a\nremovexattr a\nsendfile a\ncopy_file_range a"
    assert done(folder, code).calls == own(told)


def test_reading_is_no_change(folder: Path) -> None:
    (folder / "a").write_text("one")
    code = """
with open("watched/a", "r+b") as file:
    print(file.read().decode(), os.listdir("watched"), os.stat("watched/a").st_size)
"""
    assert done(folder, code) == ([], "one ['a'] 3\n", 0)


def test_what_changes_elsewhere_is_not_told(folder: Path) -> None:
    """Beside it, even by the beginning of its name, and in no file at all."""
    code = """
os.mkdir("watched-too")
with open("watched-too/a", "w") as file:
    file.write("one")
os.rename("watched-too/a", "b")
os.mkdir("watched/../c")
ours, theirs = os.pipe()
os.write(theirs, b"one")
print("two", flush=True)
"""
    assert done(folder, code) == ([], "two\n", 0)
    assert (folder.parent / "b").read_text() == "one" and (folder.parent / "c").is_dir()


def test_a_path_is_told_from_where_it_is_meant(folder: Path) -> None:
    code = """
os.mkdir("watched/b")
inner = os.open("watched/b", os.O_RDONLY)
os.mkdir("c", dir_fd=inner)
os.symlink("nowhere", "d", dir_fd=inner)
os.rename("d", "../e", src_dir_fd=inner, dst_dir_fd=inner)
os.unlink("e", dir_fd=os.open("watched", os.O_RDONLY))
os.chdir("watched/b/c")
os.mkdir("f")
os.mkdir(".././../g/")
os.mkdir(os.path.join(os.getcwd(), "h"))
os.mkdir("../../../outside")
"""
    told = "mkdir b\nmkdirat b/c\nsymlinkat b/d\nrenameat e\nunlinkat e\nmkdir b/c/f\nmkdir g\nmkdir b/c/h"
    assert done(folder, code).calls == own(told)
    assert (folder.parent / "outside").is_dir()


def test_threads_and_children_are_told_of_and_told_apart(folder: Path) -> None:
    code = """
thread = threading.Thread(target=os.mkdir, args=["watched/thread"])
thread.start()
thread.join()
if not (child := os.fork()):
    os.chdir("watched")
    os.mkdir("fork")
    os._exit(0)
os.waitpid(child, 0)
subprocess.run(["mkdir", "program"], cwd="watched", check=True)
os.mkdir("watched/last")
"""
    assert done(folder, code).calls == [
        Call("mkdir", "thread", own=True),
        Call("mkdir", "fork", own=False),
        Call("mkdir", "program", own=False),
        Call("mkdir", "last", own=True),
    ]


def test_calls_at_once_are_each_told_once(folder: Path) -> None:
    code = """
def make(name):
    for number in range(20):
        os.mkdir(f"watched/{name}{number}")
threads = [threading.Thread(target=make, args=[name]) for name in "abcd"]
for thread in threads:
    thread.start()
"""
    told = [call.path for call in done(folder, code).calls]
    assert sorted(told) == sorted(path.name for path in folder.iterdir()) and len(told) == 80


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_death_falls_before_its_call(folder: Path, number: int) -> None:
    code = """
file = os.open("watched/a", os.O_WRONLY | os.O_CREAT)
os.write(file, b"one")
threading.Thread(target=os.rename, args=["watched/a", "watched/b"]).start()
"""
    outcome = done(folder, code, _at(number, "die"))
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert (len(outcome.calls), outcome.status) == (min(number, 3), 0 if number == 4 else -signal.SIGKILL)
    assert found == [{}, {"a": ""}, {"a": "one"}, {"b": "one"}][number - 1]


def test_a_child_learns_of_the_death_of_its_service_later(folder: Path) -> None:
    """It is killed with nothing of its own, as by `kill -9` of the service alone."""
    code = """
if not os.fork():
    os.mkdir("watched/a")
    os.mkdir("watched/b")
    os._exit(0)
os.wait()
os.mkdir("watched/c")
"""
    outcome = done(folder, code, _at(1, "die"))
    assert outcome.status == -signal.SIGKILL
    assert [(call.path, call.own) for call in outcome.calls] == [("a", False), ("b", False)]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_error_is_the_answer_to_one_call_which_changes_nothing(folder: Path, number: int) -> None:
    (folder / "a").write_text("old")
    code = """
def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        print(error.errno)
file = os.open("watched/a", os.O_WRONLY)
attempt(os.pwrite, file, b"new", 0)
attempt(os.fsync, file)
attempt(os.rename, "watched/a", "watched/b")
attempt(os.mkdir, "watched/c")
"""
    outcome = done(folder, code, _at(number, errno.ENOSPC))
    assert (outcome.printed, outcome.status) == (f"{errno.ENOSPC}\n", 0)
    assert [call.name for call in outcome.calls] == ["pwrite64", "fsync", "rename", "mkdir"]
    kept = "a" if number == 3 else "b"
    assert (folder / kept).read_text() == ("old" if number == 1 else "new")
    assert sorted(path.name for path in folder.iterdir()) == [kept, *["c"] * (number != 4)]


def test_what_goes_wrong_in_deciding_ends_the_service_and_is_raised(folder: Path) -> None:
    def undecided(_number: int, _call: Call) -> Verdict:
        raise LookupError("nobody knows")

    with pytest.raises(LookupError, match="nobody knows"):
        done(folder, "os.mkdir('watched/a')", undecided)
    assert not (folder / "a").exists()
