"""Viewers of one laboratory, for a long time: many, coming and going, reading fast, slowly or not at all.

It promises that what each connection was sent is held against the store when it has ended, byte for byte from the
cursor on, and is forgotten then, so that their number and the time are bounded by nothing else; and that a viewer
whose service has died comes back to where it was. They run in a thread of their own, which only looks.
"""

import asyncio
import random
import sqlite3
import threading
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.service import PATIENCE

_NEWEST = 12
"""As many sessions are of interest."""
_NOT_LET_IN = (OSError, EOFError, InvalidHandshake)


class _Placed(msgspec.Struct):
    """What an overview is sent for each event."""

    position: int
    session_id: str
    frame: msgspec.Raw


class _Told(msgspec.Struct):
    """What of a frame says where it stands."""

    kind: str
    seq: int = 0
    epoch: str = ""


_placed = msgspec.json.Decoder(_Placed).decode
_told = msgspec.json.Decoder(_Told).decode


class Seen(msgspec.Struct, frozen=True):
    """What one connection was sent, and the code with which the service closed it, if it did."""

    frames: list[bytes]
    code: int | None


class Crowd:
    """So many viewers of the store and of the service at `url`, until they leave; `blame` hears what is wrong.

    A stream may end with 1011 only while the service is in `trouble`.
    """

    def __init__(
        self,
        number: int,
        chance: random.Random,
        store: Path,
        *,
        url: Callable[[], str | None],
        trouble: Callable[[], bool],
        blame: Callable[[str], None],
    ) -> None:
        self._chance = chance
        self._store = store
        self._url = url
        self._trouble = trouble
        self._blame = blame
        self.connections = 0
        self.frames = 0
        self.codes: Counter[str] = Counter()
        self._heads: dict[str, int] = {}
        self._position = 0
        self._epochs: set[str] = set()
        self._sockets: set[ClientConnection] = set()
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._leaving = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(number,), daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """Reset all connections; how many there were."""
        sockets = list(self._sockets)
        for each in sockets:
            self._loop.call_soon_threadsafe(each.transport.abort)
        return len(sockets)

    def leave(self) -> None:
        self._loop.call_soon_threadsafe(self._leaving.set)
        self._thread.join(PATIENCE)

    def _run(self, number: int) -> None:
        try:
            with self._runner as runner:
                runner.run(self._gathered(number))
        except Exception:  # noqa: BLE001 - the edge of the thread
            self._blame(f"the viewers broke down: {traceback.format_exc()}")

    async def _gathered(self, number: int) -> None:
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(self._oversee_for_ever())]
            watching += [group.create_task(self._watch()) for _ in range(number - 1)]
            await self._leaving.wait()
            for each in watching:
                each.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._chance.uniform(0.2, 3.0))
            look = self._chance.random()
            if look < 0.15:
                await self._oversee()
            elif look < 0.25:
                await self._stare()
            elif self._heads:
                await self._follow()

    # One connection

    @asynccontextmanager
    async def _connected(self, path: str, queue: int) -> AsyncIterator[ClientConnection]:
        """Closed by the handshake, or reset."""
        url = self._url()
        if url is None:
            raise ConnectionRefusedError
        address = f"{url.replace('http', 'ws')}/api/v1{path}"
        async with connect(address, proxy=None, compression=None, max_queue=queue, close_timeout=1) as socket:
            self.connections += 1
            self._sockets.add(socket)
            try:
                yield socket
            finally:
                self._sockets.discard(socket)
            if self._chance.random() < 0.5:
                socket.transport.abort()

    async def _seen(self, path: str, enough: int, seconds: float, pause: float) -> Seen:
        """What is sent within some seconds, until it is enough; nothing, where the service is not there."""
        frames: list[bytes] = []
        code = None
        try:
            async with self._connected(path, 1 if pause else 16) as socket, asyncio.timeout(seconds):
                while len(frames) < enough:
                    frames.append(await socket.recv(decode=False))
                    await asyncio.sleep(pause)
        except TimeoutError:
            self.codes["left"] += 1
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else None
            self.codes[str(code or "cut off")] += 1
        except _NOT_LET_IN:
            self.codes["not let in"] += 1
            await asyncio.sleep(0.3)
        self.frames += len(frames)
        if code not in (None, 1000, 1001, 1012) and not (code == 1011 and self._trouble()):
            self._blame(f"a viewer of {path} was closed with {code}")
        return Seen(frames, code)

    async def _stare(self) -> None:
        """Ask for everything, and read nothing of it."""
        after = self._chance.choice((0, self._position))
        try:
            async with self._connected(f"/events?after={after}", 1):
                await asyncio.sleep(self._chance.uniform(1, 60))
        except _NOT_LET_IN:
            self.codes["not let in"] += 1

    # One session

    async def _follow(self) -> None:
        """Watch one session for a while, from any cursor on, coming back to where it was."""
        session_id, head = self._chance.choice(list(self._heads.items())[-_NEWEST:])
        cursor = None if self._chance.random() < 0.1 else self._chance.randint(0, head)
        for _ in range(self._chance.randint(1, 8)):
            query = ["markers=true"] * (self._chance.random() < 0.2)
            query += [f"after={cursor}"] if cursor is not None else []
            path = f"/sessions/{session_id}/events?{'&'.join(query)}"
            enough, pause = self._chance.choice((1, 5, 25, 10**6)), self._chance.choice((0, 0, 0, 0.2, 1.0))
            seen = await self._seen(path, enough, self._chance.uniform(1, 30), pause)
            cursor = self._judged(session_id, cursor, seen)
            if seen.code == 1000:
                return

    def _judged(self, session_id: str, after: int | None, seen: Seen) -> int | None:
        """The cursor to come back with. A viewer without one is spared questions that are settled."""
        viewer = f"a viewer of {session_id} after {after}"
        statement = "SELECT seq, kind, frame FROM events WHERE session_id = ? AND seq > ? ORDER BY seq"
        stored = self._stored(statement, session_id, after or 0)
        cursor, following = after or 0, iter(stored)
        for frame in seen.frames:
            told = _told(frame)
            if told.kind in ("hello", "caught_up"):
                self._is_marked(viewer, told, cursor if after is not None else None)
                continue
            spared = ("input_required",) if after is None else ()
            due = next((row for row in following if row[0] == told.seq or row[1] not in spared), (0, "", ""))
            if frame != due[2].encode():
                self._blame(f"{viewer} was sent {frame!r} after event {cursor}, and then stored is {due}")
                return after
            cursor = due[0]
        last = stored[-1] if stored else (cursor, "done", "")
        if seen.code == 1000 and (last[0] != cursor or last[1] not in ("done", "failed")):
            self._blame(f"{viewer} was closed with 1000 after event {cursor}, and stored at last is {last}")
        self._heads[session_id] = max(cursor, self._heads[session_id])
        return cursor if seen.frames else after

    def _is_marked(self, viewer: str, told: _Told, cursor: int | None) -> None:
        if told.kind == "hello":
            self._epochs.add(told.epoch)
        if len(self._epochs) > 1:
            self._blame(f"{viewer} was told another epoch: {self._epochs}")
        if told.kind == "caught_up" and cursor not in (None, told.seq):
            self._blame(
                f"{viewer} was told that it is caught up at {told.seq}, and was sent all up to {cursor}"
            )

    # All sessions

    async def _oversee_for_ever(self) -> None:
        """From this one all others know the sessions."""
        cursor: int | None = 0
        while True:
            cursor = await self._overseen(cursor, self._chance.uniform(0.2, 2.0), 0.0)

    async def _oversee(self) -> None:
        """For a while, from now on or from any position on, coming back to where it was."""
        cursor = None if self._chance.random() < 0.3 else self._chance.randint(0, self._position)
        for _ in range(self._chance.randint(1, 8)):
            seconds, pause = self._chance.uniform(1, 30), self._chance.choice((0, 0, 0.02, 0.3))
            cursor = await self._overseen(cursor, seconds, pause)

    async def _overseen(self, after: int | None, seconds: float, pause: float) -> int | None:
        """The position to come back with."""
        path = "/events" if after is None else f"/events?after={after}"
        seen = await self._seen(path, 1000, seconds, pause)
        frames = [_placed(frame) for frame in seen.frames]
        if not frames:
            return after
        begin = frames[0].position - 1 if after is None else after
        statement = (
            "SELECT position, session_id, frame FROM events WHERE position > ? ORDER BY position LIMIT ?"
        )
        stored = self._stored(statement, begin, len(frames))
        sent = [(each.position, each.session_id, bytes(each.frame).decode()) for each in frames]
        if sent != stored:
            self._blame(_difference(f"an overview after {after}", sent, stored))
            return after
        self._know(frames)
        return frames[-1].position

    def _know(self, frames: Sequence[_Placed]) -> None:
        for each in frames:
            self._heads[each.session_id] = max(_told(each.frame).seq, self._heads.get(each.session_id, 0))
        self._position = max(self._position, frames[-1].position)

    def _stored(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with reading(self._store) as db:
            return db.execute(statement, values).fetchall()


def _difference(viewer: str, sent: Sequence[object], stored: Sequence[object]) -> str:
    number = next(
        (n for n, pair in enumerate(zip(sent, stored, strict=False)) if pair[0] != pair[1]), len(stored)
    )
    return f"{viewer} was sent as frame {number + 1} {sent[number]}, and then stored is {stored[number : number + 1]}"


@contextmanager
def reading(store: Path) -> Iterator[sqlite3.Connection]:
    """The store as any other program reads it."""
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as db:
        yield db
