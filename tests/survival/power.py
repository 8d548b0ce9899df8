"""Power cuts: what a disk with a volatile cache may be left with at any moment, and what a service makes of it.

A laboratory lives on an ext4 whose disk writes down every write and every flush that reaches it. From this journal
comes the disk as it may be after a cut at any point: with all that was written before the last finished flush, and
of what came later with any part of it, in blocks of 4 KiB. It is mounted where the laboratory was, a service is
started on it, every session that had been asked for is brought to its end, and all is checked against what the
clients had been told by then, and against the bytes of the folders that came out where nothing was cut.

It promises to find what was answered or shown and is no more, and folders that are there in part. A disk that
forgets what it has flushed is nobody's affair. It takes root, loop devices and FUSE; `unavailable` says what lacks.
"""

import bisect
import copy
import ctypes
import errno
import itertools
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import websockets.exceptions
import websockets.sync.client

from app.connections import CHECKPOINT_BYTES
from tests.survival.invariants import Log, Request, Watched, fingerprint, violations_of_clients
from tests.survival.invariants_disk import contents
from tests.survival.scenarios import SCENARIOS, Course, Gone, Lab, Operator, Scenario, empty_store
from tests.survival.stage import ROOT, Life, Stage, staged

RECOVERED = 60
"""As many images of the whole are given to a service."""
RECOVERED_OF_ONE_PLAY = 12
LOOKS_FOR_ONE = 5
"""For each of them so many are looked at: the store and the folders, as the cut has left them."""
BESIDE_EACH_OTHER = 3
BLOCK = 4096
"""What a disk writes whole or not at all."""

_DISK_BYTES = 160 * 1024 * 1024
_FLUSH_SECONDS = 0.002
"""A flush takes as long as on a real disk: what does not wait for its end comes before it."""
_SETTLE_SECONDS = 5.0
_UMOUNT_SECONDS = 10.0
_UNHURRIED = "barrier=0"
"""The disk that a service recovers on is not cut again: nothing waits for it."""
_CAP_SYS_ADMIN = 21


def unavailable() -> str | None:
    """What lacks for cutting the power here; None when nothing does."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "it takes root on Linux to mount a disk"
    status = Path("/proc/self/status").read_text()
    if not int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_ADMIN & 1:
        return "this root may not mount"
    lacking = [each for each in ("/dev/fuse", "/dev/loop-control") if not Path(each).exists()]
    lacking += [each for each in ("mkfs.ext4", "fsck.ext4", "mount", "umount") if shutil.which(each) is None]
    return f"there is no {lacking[0]}" if lacking else None


# The disk that writes down what reaches it

_RECORD = struct.Struct("=QI")
"""Where a write goes and how long it is; its bytes follow. A flush has no length."""

_IN, _OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
_INIT = struct.Struct("=IIIIHHIIHHI7I")
_ATTRIBUTES = struct.Struct("=QII6Q10I")
_PLACE = struct.Struct("=QQIIQII")
_OPENED, _WROTE = struct.Struct("=QII"), struct.Struct("=II")
_LARGEST_WRITE = 128 * 1024
_NO_SUID_NO_DEVICES = 2 | 4


class _Operation(IntEnum):
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25  # a close
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    FORGET_MANY = 42


_UNANSWERED = (_Operation.FORGET, _Operation.FORGET_MANY, _Operation.INTERRUPT)


class _Recorder:
    """A file system of one file, the image of a disk, in the protocol of /dev/fuse: 7.31 of <linux/fuse.h>.

    One request is dealt with at a time, so a flush is one of all that stands before it in the journal.
    """

    def __init__(self, image: Path, journal: Path) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._kernel = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._kernel},rootmode=100600,user_id=0,group_id=0"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"power", os.fsencode(image), b"fuse", _NO_SUID_NO_DEVICES, options.encode()):
            raise OSError(ctypes.get_errno(), "the recording disk was refused", str(image))

    def serve(self) -> None:
        """Until it is unmounted."""
        while True:
            try:
                asked = os.read(self._kernel, _LARGEST_WRITE + 2 * BLOCK)
            except OSError:
                return
            _, operation, unique, *_ = _IN.unpack_from(asked)
            if operation in _UNANSWERED:
                continue
            said = self._answer(operation, memoryview(asked)[_IN.size :])
            error, told = (-errno.ENOSYS, b"") if said is None else (0, said)
            os.write(self._kernel, _OUT.pack(_OUT.size + len(told), error, unique) + told)

    def _answer(self, operation: int, asked: memoryview) -> bytes | None:
        match operation:
            case _Operation.INIT:
                return _INIT.pack(7, 31, 0, 0, 16, 12, _LARGEST_WRITE, 1, 0, 0, *[0] * 8)
            case _Operation.GETATTR | _Operation.SETATTR:
                numbers = (1, _DISK_BYTES, _DISK_BYTES // 512, 0, 0, 0)
                return _ATTRIBUTES.pack(3600, 0, 0, *numbers, 0, 0, 0, 0o100600, 1, 0, 0, 0, BLOCK, 0)
            case _Operation.OPEN:
                return _OPENED.pack(0, 0, 0)
            case _Operation.READ:
                _, offset, size, *_ = _PLACE.unpack_from(asked)
                return os.pread(self._image, size, offset)
            case _Operation.WRITE:
                return self._write(asked)
            case _Operation.FSYNC:
                time.sleep(_FLUSH_SECONDS)
                os.write(self._journal, _RECORD.pack(0, 0))
                return b""
            case _Operation.RELEASE | _Operation.FLUSH | _Operation.DESTROY:
                return b""
        return None

    def _write(self, asked: memoryview) -> bytes:
        _, offset, size, *_ = _PLACE.unpack_from(asked)
        data = asked[_PLACE.size : _PLACE.size + size]
        os.pwrite(self._image, data, offset)
        os.writev(self._journal, [_RECORD.pack(offset, size), data])
        return _WROTE.pack(size, 0)


def main(image: str, journal: str) -> None:
    """A process of its own: one that waits for its own disk in a page fault could not answer."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    recorder = _Recorder(Path(image), Path(journal))
    print("ready", flush=True)
    recorder.serve()


# Mounting


class _Disk(NamedTuple):
    """Where a disk is mounted, what it was when it was blank, and its journal."""

    place: Path
    blank: Path
    journal: Path


@contextmanager
def _recorded(folder: Path) -> Iterator[_Disk]:
    """A mounted disk that is written down."""
    image, disk = folder / "image", _Disk(folder / "disk", folder / "blank", folder / "journal")
    disk.place.mkdir()
    with disk.blank.open("wb") as blank:
        blank.truncate(_DISK_BYTES)
    _run("mkfs.ext4", "-q", "-b", str(BLOCK), "-E", "lazy_itable_init=0", disk.blank)
    _run("cp", "--sparse=always", disk.blank, image)
    with _recording(image, disk.journal), _mounted(image, disk.place):
        yield disk


@contextmanager
def _recording(image: Path, journal: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.survival.power", str(image), str(journal)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    recorder = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    try:
        if recorder.stdout is None or recorder.stdout.readline() != b"ready\n":
            raise RuntimeError("the recording disk did not come up")
        yield
    finally:
        subprocess.run(["umount", "-l", image], check=False, capture_output=True)
        recorder.kill()
        recorder.communicate()


@contextmanager
def _mounted(image: Path, place: Path, *options: str) -> Iterator[None]:
    _run("mount", "-t", "ext4", "-o", ",".join(("loop", *options)), image, place)
    try:
        yield
    finally:
        _unmount(image, place)


def _unmount(image: Path, place: Path) -> None:
    """When all that was killed has let go of it; in the end without waiting any longer.

    A plugin's worker has a namespace of its own, in which the disk is mounted until that worker has gone, too.
    """
    deadline = time.monotonic() + _UMOUNT_SECONDS
    while subprocess.run(["umount", place], check=False, capture_output=True).returncode:
        if time.monotonic() > deadline:
            _run("umount", "-l", place)
            break
        time.sleep(0.02)
    while _is_in_use(image):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{image} is in use {_UMOUNT_SECONDS} s after the end of its service")
        time.sleep(0.01)


def _is_in_use(image: Path) -> bool:
    """Whether a loop device stands on it; one may go away while it is looked at."""
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if loop.read_text().strip() == str(image):
                return True
    return False


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# What was told, and when: the time is the length of the journal


class _Asked(NamedTuple):
    sent: int
    answered: int
    request: Request


class _Sent(NamedTuple):
    at: int
    frame: bytes


class _Connection:
    """What a viewer was sent, and when; the end is None while it watches."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.sent: list[_Sent] = []
        self.end: tuple[int, int | None] | None = None

    def seen(self, at: int) -> Watched:
        frames = tuple(frame for when, frame in self.sent if when <= at)
        code = self.end[1] if self.end is not None and self.end[0] <= at else None
        return Watched(session_id=self.session_id, after=0, frames=frames, close_code=code)


class _Told:
    """What the clients of one play have asked, were answered and were shown. Threads may add to it."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self.requests: list[_Asked] = []
        self.connections: list[_Connection] = []
        self.foreign: dict[Path, int] = {}

    def now(self) -> int:
        return self._journal.stat().st_size

    def log(self, at: int) -> Log:
        """As clients knew it at that time."""
        log = Log()
        for each in sorted(self.requests, key=lambda asked: asked.answered):
            if each.answered <= at:
                log.note(each.request)
            elif each.sent <= at:
                log.note(msgspec.structs.replace(each.request, status=None, answer=None))
        for connection in self.connections:
            if (seen := connection.seen(at)).frames:
                log.saw(seen)
        return log


class _Witness(Operator):
    """Writes down when it was told what. Its own folders it puts onto the disk before it goes on."""

    def __init__(self, lab: Lab, life: Life, told: _Told) -> None:
        super().__init__(lab, life)
        self._told = told
        self._place: Path | None = None

    def look(self, session_id: str) -> dict[str, Any]:
        sent, before = self._told.now(), self._looks.get(session_id)
        handle = super().look(session_id)
        self._place = Path(handle["destination"]) if handle["destination"] else None
        if self._looks[session_id] != before:
            request = Request(method="GET", path=f"/sessions/{session_id}", status=200, answer=handle)
            self._told.requests.append(_Asked(sent, self._told.now(), request))
        return handle

    def post(self, path: str, body: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, Any]]:
        if path.endswith("/resume"):
            self._keep_own()
        sent = self._told.now()
        status, answer = super().post(path, body, key)
        request = Request(method="POST", path=path, body=body, key=key, status=status, answer=answer)
        self._told.requests.append(_Asked(sent, self._told.now(), request))
        return status, answer

    def _keep_own(self) -> None:
        """What its operator has put at the destination, before each answer; each time it is put there anew."""
        if self._place is not None and str(self._place) in self.lab.foreign:
            for path in (*self._place.iterdir(), self._place, *self._place.parents[:3]):
                _sync(path)
            self._told.foreign[self._place] = self._told.now()

    def _watch(self, session_id: str) -> None:
        connection = _Connection(session_id)
        self._told.connections.append(connection)
        url = f"{self._life.url.replace('http', 'ws')}/api/v1/sessions/{session_id}/events?after=0"
        try:
            with websockets.sync.client.connect(url) as socket:
                while True:
                    frame = socket.recv(decode=False)
                    connection.sent.append(_Sent(self._told.now(), frame))
        except websockets.exceptions.ConnectionClosed as closed:
            connection.end = self._told.now(), closed.rcvd.code if closed.rcvd else None


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# A play of all scenarios, nothing being cut

_AWAY = ("blocked", "unmounted")
"""Scenarios that take the disk away from all the others, which a cut does anyway."""
_BESIDE = (
    {"project_short_id": "PROJ-1000", "run_date": f"2026-04-1{day}T08:00:00", "run_kind": kind}
    for day, kind in enumerate(("experimental", "test", "experimental"))
)
PLAYED: tuple[Scenario, ...] = (
    *(each for name, each in SCENARIOS.items() if name not in _AWAY),
    *(Scenario(name="beside", changes=changes) for changes in _BESIDE),
)
_PROVENANCE = ("README.md", ".exlab-wizard/")

Files = dict[str, bytes]


class _Begun(NamedTuple):
    at: int
    course: Course


class _Play:
    """All scenarios, a few beside each other, in an order of their own, on one disk."""

    def __init__(self, disk: _Disk, store: Path, chance: random.Random) -> None:
        self.disk = disk
        self.lab = Lab(disk.place / "lab", store)
        self.told = _Told(disk.journal)
        self.begun: list[_Begun] = []
        self.files: dict[Path, Files] = {}
        self.end = 0
        self._scenarios = chance.sample(PLAYED, len(PLAYED))
        self._untouched = dict(self.lab.untouched)
        self._ended: dict[str, int] = {}
        self._marks: dict[Path, str] = {}

    def perform(self, stage: Stage) -> None:
        _run("sync", "-f", self.disk.place)
        life = stage.start(self.lab.config)
        try:
            assert life.await_ready(), "the service did not start"
            _lengthen(self.lab.store)
            with ThreadPoolExecutor(BESIDE_EACH_OTHER) as hands:
                for _ in hands.map(lambda scenario: self._accompany(life, scenario), self._scenarios):
                    pass
            self.end = self.told.now()
        finally:
            life.kill()
        self._marks = {place: fingerprint(place) for place in self.told.foreign}

    def _accompany(self, life: Life, scenario: Scenario) -> None:
        at = self.told.now()
        course = scenario.begin(self.lab)
        self.begun.append(_Begun(at, copy.copy(course)))
        operator = _Witness(self.lab, life, self.told)
        try:
            course.go(operator)
        finally:
            operator.close()
        self._ended[course.key] = self.told.now()
        if course.ended == "done" and course.destination is not None:
            self.files[course.destination] = _files(course.destination)
            self.lab.complete[str(course.destination)] = contents(course.destination)

    def go_back(self, at: int) -> list[Course]:
        """Have the laboratory be as clients knew it at that time; the sessions that may have been asked for."""
        kept = {place: self._marks[place] for place, when in self.told.foreign.items() if when <= at}
        self.lab.log = self.told.log(at)
        self.lab.foreign = {str(place) for place in kept}
        self.lab.untouched = self._untouched | kept
        return [copy.copy(each.course) for each in self.begun if each.at <= at]

    def live(self, at: int) -> int:
        """How many sessions were under way."""
        return sum(each.at <= at < self._ended[each.course.key] for each in self.begun)


def _lengthen(store: Path) -> None:
    """Give the write-ahead log the length that it has from its first checkpoint on.

    While it grows, each commit has the file system commit its names, too, which hides that somebody forgot to.
    """
    with closing(sqlite3.connect(store, isolation_level=None)) as holding:
        holding.execute("BEGIN IMMEDIATE")
        with open(f"{store}-wal", "ab") as log:
            log.write(bytes(CHECKPOINT_BYTES - log.tell()))
            log.flush()
            os.fsync(log.fileno())
        holding.execute("ROLLBACK")


def _files(folder: Path) -> Files:
    """The content of all in a published folder; the runs of a project are not part of it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder): path for path in paths}
    return {
        str(name): path.read_bytes()
        for name, path in found.items()
        if not name.parts[0].startswith(("Run_", "TestRuns"))
    }


# The cuts


class Cut(NamedTuple):
    """Power is lost when the journal is `at` long; of each block in the cache, `kept` is the chance to be written."""

    at: int
    why: str
    kept: float
    seed: int


class Lost(NamedTuple):
    """What was in the cache of the disk, in blocks, and what of it was lost."""

    cached: int
    lost: int


class _Record(NamedTuple):
    """Where on the disk a write went, and where in the journal its bytes are; a flush has none."""

    offset: int
    start: int
    end: int


class _Journal:
    """All that reached a disk."""

    def __init__(self, disk: _Disk) -> None:
        self._blank = disk.blank
        self._bytes = disk.journal.read_bytes()
        self._records = list(self._read())
        self.ends = [each.end for each in self._records]
        self.flushes = [number for number, each in enumerate(self._records) if each.start == each.end]

    def _read(self) -> Iterator[_Record]:
        end = 0
        while end < len(self._bytes):
            offset, size = _RECORD.unpack_from(self._bytes, end)
            start = end + _RECORD.size
            end = start + size
            yield _Record(offset, start, end)

    def image(self, cut: Cut, target: Path) -> Lost:
        """Make the disk as the cut leaves it."""
        reached = bisect.bisect_right(self.ends, cut.at)
        safe = max((number for number in self.flushes if number < reached), default=0)
        chance, cached, lost = random.Random(cut.seed), 0, 0
        _run("cp", "--sparse=always", self._blank, target)
        with target.open("r+b", buffering=0) as disk:
            for offset, start, end in self._records[:safe]:
                os.pwrite(disk.fileno(), self._bytes[start:end], offset)
            for offset, start, end in _blocks(self._records[safe:reached]):
                cached += 1
                if chance.random() < cut.kept:
                    os.pwrite(disk.fileno(), self._bytes[start:end], offset)
                else:
                    lost += 1
        return Lost(cached, lost)


def _blocks(records: Iterable[_Record]) -> Iterator[_Record]:
    for offset, start, end in records:
        for part in range(start, end, BLOCK):
            yield _Record(offset + part - start, part, min(part + BLOCK, end))


def _chosen(play: _Play, journal: _Journal, count: int, chance: random.Random) -> Iterator[Cut]:
    """As many cuts of each kind, where something has just happened that must not un-happen, and anywhere."""
    told = play.told
    begin = play.begun[0].at
    moments = {
        "answered": [each.answered for each in told.requests if each.request.method == "POST"],
        "shown": [each.at for connection in told.connections for each in connection.sent],
        "ended": [connection.sent[-1].at for connection in told.connections if connection.sent],
        "flushed": [journal.ends[number] for number in journal.flushes],
        "written": journal.ends,
    }
    for why in itertools.islice(itertools.cycle(moments), count):
        at = chance.choice([each for each in moments[why] if begin <= each <= play.end])
        kept = chance.choice((0.0, chance.random(), 1.0))
        yield Cut(at, why, kept, chance.getrandbits(32))


# What is left, and what a service makes of it


def _looked(play: _Play, image: Path, cut: Cut) -> Iterator[str]:
    """What clients have been told is there, and so is each folder whose session is done."""
    play.go_back(cut.at)
    with _mounted(image, play.disk.place, _UNHURRIED):
        yield from violations_of_clients(play.lab.store, play.lab.log)
        for place in _done(play.lab.store):
            yield from _in_files(place, play.files[place])


def _recovered(play: _Play, stage: Stage, image: Path, cut: Cut) -> Iterator[str]:
    """Start a service on what is left, bring all sessions to their ends, and tell what is wrong."""
    courses = play.go_back(cut.at)
    with _mounted(image, play.disk.place, _UNHURRIED):
        life = stage.start(play.lab.config)
        try:
            yield from _accompanied(play.lab, life, courses)
            yield from _settled(play.lab)
        finally:
            life.kill()
        for place in _done(play.lab.store):
            yield from _in_files(place, play.files.get(place, {}), but=_PROVENANCE)
    checked = subprocess.run(["fsck.ext4", "-fn", image], check=False, capture_output=True, text=True)
    if checked.returncode:
        yield f"the file system is damaged: {checked.stdout}"


def _accompanied(lab: Lab, life: Life, courses: list[Course]) -> Iterator[str]:
    if not life.await_ready():
        yield f"the service does not start: {Path(f'{lab.folder}.log').read_text()[-2000:]}"
        return
    with ThreadPoolExecutor(len(courses)) as hands:
        yield from filter(None, hands.map(lambda course: _ends(course, life), courses))


def _ends(course: Course, life: Life) -> str | None:
    operator = Operator(course.lab, life)
    try:
        course.go(operator)
    except (AssertionError, Gone, KeyError, OSError) as failed:
        return f"{course.key}: {type(failed).__name__} {failed}"
    finally:
        operator.close()
    return None


def _settled(lab: Lab) -> list[str]:
    """What is wrong and stays so, as some files are cleared after the commit."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (wrong := lab.wrong()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return wrong


def _done(store: Path) -> list[Path]:
    """The folders that are there for good; none where the store cannot be read, which is told elsewhere."""
    try:
        with closing(sqlite3.connect(store)) as db:
            rows = db.execute("SELECT destination FROM sessions WHERE state = 'done'").fetchall()
    except sqlite3.Error:
        return []
    return [Path(destination) for (destination,) in rows]


def _in_files(place: Path, wanted: Files, *, but: tuple[str, ...] = ()) -> Iterator[str]:
    """Each file is as it came out where nothing was cut; those `but` these, which tell of times, are no rubble."""
    found = _files(place)
    for name, content in wanted.items():
        told = found.get(name, b"")
        rubble = not told or b"\0" in told
        if rubble if name.startswith(but) else told != content:
            what = f"{len(told)} bytes, {told.count(0)} of them zero" if name in found else "no content"
            yield f"{place / name} has {what}, and had {len(content)} bytes"


# All of it


class Image(NamedTuple):
    """What became of one cut: the sessions that it fell into, and what was wrong with what it left."""

    cut: Cut
    lost: Lost
    live: int
    recovered: bool
    wrong: tuple[str, ...]
    kept: Path | None


class Tally:
    """What the cuts amount to."""

    def __init__(self) -> None:
        self.images: list[Image] = []

    @property
    def failed(self) -> list[Image]:
        return [each for each in self.images if each.wrong]

    @property
    def recovered(self) -> int:
        return sum(each.recovered for each in self.images)

    def lines(self) -> Iterator[str]:
        kinds = Counter(each.cut.why for each in self.images)
        cached, lost = (sum(column) for column in zip(*(each.lost for each in self.images), strict=True))
        harmed, live = (
            sum(bool(each.lost.lost) for each in self.images),
            sum(each.live for each in self.images),
        )
        yield f"{len(self.images)} images ({', '.join(f'{kind} {count}' for kind, count in kinds.items())})"
        yield f"{self.recovered} of them were given to a service; in all, {live} sessions were under way"
        yield f"{harmed} lost some of the cache of the disk: {lost} of {cached} blocks"
        failed = Counter((each.cut.why, each.recovered) for each in self.failed)
        told = (f"{why}{' and recovered' if given else ''} {count}" for (why, given), count in failed.items())
        yield f"{len(self.failed)} with violations{': ' if failed else ''}{', '.join(told)}"


def cuts(share: float, seed: int, *, tell: Callable[[str], None], root: Path = ROOT) -> Tally:
    """Cut the power at a share of all moments. What falls where depends on the clock, not on the seed alone."""
    tally, chance = Tally(), random.Random(seed)
    left = max(1, round(RECOVERED * share))
    tell(f"seed {seed}; the same choices again: python -m tests.survival power --share {share} --seed {seed}")
    with staged(root) as stage:
        while left > 0:
            count = min(left, RECOVERED_OF_ONE_PLAY)
            with tempfile.TemporaryDirectory() as folder:
                for image in _one_play(Path(folder), stage, count, chance):
                    tally.images.append(image)
                    for line in _story(image):
                        tell(line)
            left -= count
    for line in tally.lines():
        tell(line)
    return tally


def _one_play(folder: Path, stage: Stage, count: int, chance: random.Random) -> Iterator[Image]:
    with _recorded(folder) as disk:
        play = _Play(disk, empty_store(folder), chance)
        play.perform(stage)
    journal = _Journal(disk)
    for number, cut in enumerate(_chosen(play, journal, count * (1 + LOOKS_FOR_ONE), chance)):
        left, again = folder / f"left{number}", folder / f"left{number}-again"
        lost = journal.image(cut, left)
        wrong = list(_looked(play, left, cut))
        recovered = number % (1 + LOOKS_FOR_ONE) == 0
        if recovered:
            journal.image(cut, again)
            wrong += _recovered(play, stage, again, cut)
            again.unlink()
        kept = _kept(left) if wrong else None
        left.unlink()
        yield Image(cut, lost, play.live(cut.at), recovered, tuple(wrong), kept)


def _kept(image: Path) -> Path:
    """A copy of what a cut has left, to be looked at: another play falls otherwise."""
    kept = Path(tempfile.mkdtemp(prefix="power-")) / "image"
    _run("cp", "--sparse=always", image, kept)
    return kept


def _story(image: Image) -> Iterator[str]:
    if image.wrong:
        cut, lost = image.cut, image.lost
        yield f"cut at {cut.at} ({cut.why}), {lost.lost} of {lost.cached} blocks in the cache lost:"
        yield f"mount -o loop,ro,noload {image.kept} shows it"
        yield from (f"    {each}" for each in image.wrong)


if __name__ == "__main__":
    main(*sys.argv[1:])
