"""Viewers in great number and without manners, on a real server and real sockets.

They come back ten thousand times with whatever cursor, tear their connection in the middle of a frame, never read
a byte, or fall silent without a word; and still each is sent exactly what is stored, none holds up another, and
none leaves anything behind. Which frames a single viewer gets, and every close code, is the affair of
`test_watching.py`.

`SURVIVAL_SHARE` says how many of the ten thousand come (1 for all of them), `SURVIVAL_SEED` which dice are thrown.
"""

import asyncio
import gc
import hashlib
import logging
import random
import resource
import socket
import sqlite3
import struct
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from statistics import median
from typing import NamedTuple
from uuid import uuid4

import msgspec
import pytest
import structlog
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.errors import Failure
from app.sessions import feed as feed_module
from app.sessions import store as store_module
from app.sessions.feed import PAGE
from app.sessions.lifecycle import Failed, Warned
from app.sessions.session import Session
from tests.held import Held, holding
from tests.survival.shares import SEED, SHARE

SOON = 20.0
"""Seconds within which something comes that should come at once, on a machine with other work to do."""

MEGABYTE = 1024 * 1024

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

# The example of RFC 6455, section 1.3.
KEY, ACCEPTED = "dGhlIHNhbXBsZSBub25jZQ==", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    async with holding(tmp_path) as service:
        yield service


@pytest.fixture(autouse=True)
def taciturn() -> Iterator[None]:
    """Ten thousand streams that end are not worth ten thousand lines."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.configure(**before)


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """What of a frame says where it stands."""

    kind: str
    seq: int = 0
    after: int = -1


marker = msgspec.json.Decoder(Marker).decode


class Client:
    """A client of one WebSocket, as light as can be: thousands of them share a core with the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.code = 0
        self.pings = 0

    async def frame(self) -> bytes | None:
        """The next message; None once the connection is closed, `code` says how."""
        while True:
            first, second = await self._reader.readexactly(2)
            assert first & 0xF0 == 0x80 and second < 0x80, "a frame in pieces, or a masked one"
            if second >= 126:
                extended = await self._reader.readexactly(2 if second == 126 else 8)
                second = int.from_bytes(extended)
            payload = await self._reader.readexactly(second)
            opcode = first & 0x0F
            if opcode in (TEXT, BINARY):
                return payload
            if opcode == CLOSE:
                self.code = int.from_bytes(payload[:2])
                self._say(CLOSE, payload[:2])
                self._writer.close()
                return None
            if opcode == PING:
                self.pings += 1
                self._say(PONG, payload)

    async def rest(self) -> list[bytes]:
        """Every message until the connection is closed."""
        found = []
        while (frame := await self.frame()) is not None:
            found.append(frame)
        return found

    async def leave(self) -> list[bytes]:
        """Close by the handshake; the messages that were still on their way."""
        self._say(CLOSE, struct.pack(">H", 1000))
        found = await self.rest()
        assert self.code == 1000 and await self._reader.read() == b""
        return found

    async def tear(self) -> None:
        """Reset the connection in the middle of a frame."""
        await self._reader.readexactly(3)
        self.reset()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()

    def vanish(self) -> None:
        """Close the socket without a word of the protocol."""
        self._writer.close()

    def _say(self, opcode: int, payload: bytes) -> None:
        # Masked with zeros: a mask like any other.
        self._writer.write(bytes([0x80 | opcode, 0x80 | len(payload)]) + bytes(4) + payload)


def greeting(path: str, port: int) -> bytes:
    lines = [
        f"GET /api/v1{path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def client(port: int, path: str, buffered: int = 64 * 1024) -> Client:
    """Let in, with about so many bytes read ahead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=buffered)
    writer.write(greeting(path, port))
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ") and ACCEPTED in answer, answer
    return Client(reader, writer)


async def mute(port: int, path: str) -> socket.socket:
    """Let in, and then never reading again."""
    loop = asyncio.get_running_loop()
    mouth = socket.socket()
    mouth.setblocking(False)
    mouth.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await loop.sock_connect(mouth, ("127.0.0.1", port))
    await loop.sock_sendall(mouth, greeting(path, port))
    assert (await loop.sock_recv(mouth, 12)) == b"HTTP/1.1 101"
    return mouth


def of(session_id: str, query: str = "?after=0") -> str:
    return f"/sessions/{session_id}/events{query}"


async def until(holds: Callable[[], bool], within: float = SOON) -> float:
    """Seconds until it holds."""
    started = time.perf_counter()
    async with asyncio.timeout(within):
        while not holds():
            await asyncio.sleep(0.01)
    return time.perf_counter() - started


async def forgotten(held: Held) -> None:
    """Until the service holds nothing more of any viewer."""
    await until(lambda: held.feed.followers == 0)
    await until(lambda: not held.server.server_state.connections)
    assert not vars(held.store)["_bells"]


def stored(held: Held) -> dict[str, list[bytes]]:
    """Every history, as another program reads it."""
    histories: defaultdict[str, list[bytes]] = defaultdict(list)
    with closing(sqlite3.connect(f"{held.store.path.as_uri()}?mode=ro", uri=True)) as database:
        for session_id, frame in database.execute("SELECT session_id, frame FROM events ORDER BY position"):
            histories[session_id].append(frame.encode())
    return histories


def rss() -> int:
    """Bytes of memory that this process, which is the service too, has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Storm:
    """Sessions that are written all the time, and viewers that come and go; and all that these were told."""

    def __init__(self, held: Held, chosen: random.Random) -> None:
        self.held = held
        self.chosen = chosen
        self.heads: dict[str, int] = {}
        self.told: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
        self.ends: dict[str, int] = {}
        self.followed: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self._coming = 0

    async def rage(self, visits: int, *, lives: int = 8, viewers: int = 32) -> None:
        """So many visits, while so many sessions live."""
        self._coming = visits
        over = asyncio.Event()
        living = [asyncio.create_task(self._live(over)) for _ in range(lives)]
        await until(lambda: len(self.heads) >= lives)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(viewers):
                    group.create_task(self._come_and_go())
        finally:
            over.set()
            await asyncio.gather(*living)
        await forgotten(self.held)

    async def _live(self, over: asyncio.Event) -> None:
        """One session after the other, each in bursts of moves, after which all is seen that was done."""
        while not over.is_set():
            session = self._at(await self.held.at_plugins())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stay(session.session_id))
                for _ in range(self.chosen.randint(10, 60)):
                    for _ in range(self.chosen.randint(1, 4)):
                        session = self._at(await self._moved(session))
                    await self._is_seen(session)
                    await asyncio.sleep(self.chosen.random() * 0.2)
                    if over.is_set():
                        break
                self._at(await self._ended(session))

    async def _is_seen(self, session: Session) -> None:
        await until(lambda: self.followed[session.session_id] >= session.head_seq)

    async def _stay(self, session_id: str) -> None:
        """Watch a session from its beginning to its end, torn away again and again."""
        cursor, ended = 0, False
        while not ended:
            viewer = await client(self.held.port, of(session_id, f"?after={cursor}"))
            for _ in range(self.chosen.randint(1, 30)):
                if ended := (frame := await viewer.frame()) is None:
                    break
                cursor = self.followed[session_id] = self._note(session_id, cursor, frame)
            cursor = self.followed[session_id] = await self._leave(viewer, session_id, cursor)
            self._coming -= 1

    def _at(self, session: Session) -> Session:
        self.heads[session.session_id] = session.head_seq
        return session

    async def _moved(self, session: Session) -> Session:
        if session.prompt is not None:
            return await self.held.answered(session)
        match self.chosen.randrange(10):
            case 0:
                return await self.held.asking(session, prompt_id=uuid4().hex)
            case 1:
                warning = Warned(message="ö" * self.chosen.randrange(2000), code="loud")
                return await self.held.store.record(session, warning)
            case _:
                return await self.held.progressed(session, self.chosen.randint(1, 3))

    async def _ended(self, session: Session) -> Session:
        """Well, or badly and with the longest of all frames."""
        if session.prompt is not None:
            session = await self.held.answered(session)
        if self.chosen.random() < 0.7:
            return await self.held.done(session)
        error = Failure(code="render_failed", message="It broke.", details={"log": "x" * 100_000})
        return await self.held.store.record(session, Failed(error=error))

    async def _come_and_go(self) -> None:
        while self._coming > 0:
            if self.chosen.random() < 0.2:
                await self._ask_for_what_cannot_be()
                continue
            session_id, head = self.chosen.choice(list(self.heads.items())[-12:])
            cursor = self.chosen.randint(0, head)
            for _ in range(self.chosen.randint(1, 8)):
                self._coming -= 1
                async with asyncio.timeout(SOON):
                    cursor = await self._visit(session_id, cursor)

    async def _visit(self, session_id: str, cursor: int) -> int:
        """Watch from `cursor` for a while, leave; the last `seq` that was dealt with."""
        marked, text = self.chosen.random() < 0.2, self.chosen.random() < 0.2
        query = f"?after={cursor}{'&markers=true' * marked}{'&frames=text' * text}"
        viewer = await client(self.held.port, of(session_id, query), self.chosen.choice((1024, 65536)))
        if marked:
            hello = marker(await viewer.frame() or b"")
            assert (hello.kind, hello.after) == ("hello", cursor)
        for _ in range(self.chosen.choice((0, 1, 5, 25))):
            frame = await viewer.frame()
            if frame is None:
                break
            cursor = self._note(session_id, cursor, frame)
        return await self._leave(viewer, session_id, cursor)

    def _note(self, session_id: str, cursor: int, frame: bytes) -> int:
        """The cursor after this frame, which is the next one, and the one that everybody was sent."""
        told = marker(frame)
        if told.kind == "caught_up":
            assert told.seq == cursor
            return cursor
        assert told.seq == cursor + 1
        assert self.told[session_id].setdefault(told.seq, frame) == frame
        self.counted["frames"] += 1
        return told.seq

    async def _leave(self, viewer: Client, session_id: str, cursor: int) -> int:
        if viewer.code:
            assert viewer.code == 1000 and self.ends.setdefault(session_id, cursor) == cursor
            self.counted["to the end"] += 1
            return cursor
        manner = self.chosen.choice(("by the handshake", "by a reset", "within a frame", "without a word"))
        self.counted[manner] += 1
        match manner:
            case "by the handshake":
                for frame in await viewer.leave():
                    cursor = self._note(session_id, cursor, frame)
            case "by a reset":
                viewer.reset()
            case "within a frame":
                await viewer.tear()
            case _:
                viewer.vanish()
        return cursor

    async def _ask_for_what_cannot_be(self) -> None:
        session_id, head = self.chosen.choice(list(self.heads.items()))
        ahead = (f"?after={head + self.chosen.randint(10**5, 10**9)}", 4409)
        malformed = [(f"?after={given}", 4400) for given in ("-1", "", "x", "1.5", "+1", "0x1", "%D9%A1")]
        query, code = self.chosen.choice([*[ahead] * 7, *malformed])
        async with asyncio.timeout(SOON):
            viewer = await client(self.held.port, of(session_id, query))
            assert (await viewer.rest(), viewer.code) == ([], code)
        self._coming -= 1
        self.counted[f"closed with {code}"] += 1


class Weight(NamedTuple):
    """What this process carries once all rubbish is gone."""

    rss: int
    objects: int
    tasks: int


def weight() -> Weight:
    gc.collect()
    return Weight(rss(), len(gc.get_objects()), len(asyncio.all_tasks()))


async def test_ten_thousand_reconnects_with_any_cursor_see_what_is_stored_and_leave_nothing_behind(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that pages end everywhere, and most are read from the file while the sessions go on.
    monkeypatch.setattr(feed_module, "PAGE", 20)
    monkeypatch.setattr(store_module, "CACHED_BYTES", 1024)
    visits = int(10_000 * SHARE)
    again = (
        f"SURVIVAL_SEED={SEED} SURVIVAL_SHARE={SHARE} pytest tests/survival/test_viewers.py -k ten_thousand"
    )
    print(f"\n{visits} visits; the same dice again: {again}")
    storm = Storm(held, random.Random(SEED))
    await storm.rage(visits // 5)
    before, started = weight(), time.perf_counter()
    await storm.rage(visits - visits // 5)
    took, after = time.perf_counter() - started, weight()

    histories = stored(held)
    for session_id, told in storm.told.items():
        assert all(histories[session_id][seq - 1] == frame for seq, frame in told.items())
        viewer = await client(held.port, of(session_id))
        assert await viewer.rest() == histories[session_id] and viewer.code == 1000
    assert all(len(histories[session_id]) == end for session_id, end in storm.ends.items())
    assert all(storm.counted[f"closed with {code}"] for code in (4400, 4409)) and storm.ends
    grown = after.rss - before.rss
    print(
        f"{took:.1f} s; {dict(storm.counted)} of {len(histories)} sessions with {sum(storm.heads.values())} events"
    )
    print(f"grown by {grown / MEGABYTE:.1f} MB and {after.objects - before.objects} objects")
    assert after.tasks == before.tasks
    assert after.objects - before.objects < 3000 + visits // 10
    assert grown < 32 * MEGABYTE


@pytest.fixture
def handles() -> Iterator[int]:
    """As many file handles as there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Account(NamedTuple):
    """What one viewer was told, in short: how many frames, and the digest of them all."""

    frames: int
    digest: bytes


def account(frames: list[bytes]) -> Account:
    return Account(len(frames), hashlib.blake2b(b"\n".join(frames)).digest())


async def test_a_thousand_at_once_see_all_of_one_session(held: Held, handles: int) -> None:
    number = 1000
    if handles < 2 * number + 200:
        pytest.skip(f"a process may have {handles} file handles only")
    session = await held.progressed(await held.at_plugins(), 40)
    before, started = rss(), time.perf_counter()
    caught_up = 0

    async def watch() -> Account:
        nonlocal caught_up
        viewer = await client(held.port, of(session.session_id, "?after=0&markers=true"))
        found = []
        while (frame := await viewer.frame()) is not None:
            kind = marker(frame).kind
            caught_up += kind == "caught_up"
            if kind not in ("hello", "caught_up"):
                found.append(frame)
        assert viewer.code == 1000
        return account(found)

    async def tell(moves: int) -> None:
        nonlocal session
        for _ in range(moves):
            session = await held.progressed(session, 1)

    watching = [asyncio.create_task(watch()) for _ in range(number // 2)]
    await until(lambda: held.feed.followers > 0)
    watching += [asyncio.create_task(watch()) for _ in range(number // 2)]
    await tell(10)
    await until(lambda: caught_up == number, within=3 * SOON)
    came, cost = time.perf_counter() - started, rss() - before
    assert held.feed.followers == number
    await tell(10)
    session = await held.done(session)
    async with asyncio.timeout(3 * SOON):
        accounts = await asyncio.gather(*watching)
    took = time.perf_counter() - started - came
    print(
        f"\n{number} were there in {came:.1f} s and cost {cost / number / 1024:.0f} kB each, both ends;",
        end=" ",
    )
    print(f"the rest took {took:.1f} s")
    assert set(accounts) == {account(stored(held)[session.session_id])}
    assert cost < number * 512 * 1024
    await forgotten(held)


class Pace(NamedTuple):
    """Seconds, each the median of many: to write a move, for it to be seen, for an answer over HTTP."""

    written: float
    seen: float
    answered: float

    def __str__(self) -> str:
        return ", ".join(f"{name} in {value * 1000:.1f} ms" for name, value in self._asdict().items())


async def pace(held: Held, session: Session, viewer: Client, moves: int = 60) -> tuple[Session, Pace]:
    """How quickly a session moves, is watched by `viewer`, who is caught up, and asked about."""
    paces = []
    async with held.http() as http:
        for _ in range(moves):
            start = time.perf_counter()
            session = await held.progressed(session, 1)
            written = time.perf_counter()
            frame = await viewer.frame()
            seen = time.perf_counter()
            answer = await http.get(f"/sessions/{session.session_id}")
            paces.append(Pace(written - start, seen - start, time.perf_counter() - seen))
            assert marker(frame or b"").seq == session.head_seq == answer.json()["head_seq"]
    return session, Pace(*(median(times) for times in zip(*paces, strict=True)))


async def slowest_answer(held: Held, over: Callable[[], bool]) -> float:
    """Seconds that the list of sessions took at most, asked for again and again until it is over."""
    worst = 0.0
    async with held.http() as http:
        while not over():
            start = time.perf_counter()
            assert (await http.get("/sessions")).status_code == 200
            worst = max(worst, time.perf_counter() - start)
    return worst


def stuck(held: Held) -> int:
    """Connections that take nothing more until their client reads."""
    connections = held.server.server_state.connections
    return sum(
        isinstance(each, WebSocketsSansIOProtocol) and not each.writable.is_set() for each in connections
    )


async def long_history(held: Held, megabytes: int) -> Session:
    """More than is kept in memory or goes into any socket, whose own buffers are small here."""
    held.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    session = await held.at_plugins()
    for _ in range(megabytes):
        session = await held.warned(session, 256)
    return session


@asynccontextmanager
async def crowd(held: Held, session: Session, number: int, limit: int) -> AsyncIterator[None]:
    """So many who never read, each sent what can be sent; a failure once they cost more than `limit`."""
    before = rss()
    with ExitStack() as mouths:
        for come in range(1, number + 1):
            mouths.enter_context(await mute(held.port, of(session.session_id)))
            await until(lambda come=come: stuck(held) == come)  # type: ignore[misc]
            assert rss() - before < limit, f"{come} of them cost {(rss() - before) / MEGABYTE:.0f} MB"
        yield


async def test_two_hundred_who_never_read_cost_a_page_each_and_hold_nobody_up(held: Held) -> None:
    number = 200
    # What is read for a viewer but not sent yet, and the connection itself.
    each = PAGE * 4500 + MEGABYTE // 2
    session = await long_history(held, 16)
    viewer = await client(held.port, of(session.session_id, f"?after={session.head_seq}"))
    session, alone = await pace(held, session, viewer)

    slowest = asyncio.create_task(slowest_answer(held, lambda: stuck(held) == number))
    before, started = rss(), time.perf_counter()
    async with crowd(held, session, number, number * each):
        took, cost, worst = time.perf_counter() - started, rss() - before, await slowest
        session, among = await pace(held, session, viewer)
        print(f"\n{number} came in {took:.1f} s and cost {cost / number / 1024:.0f} kB each;", end=" ")
        print(f"the slowest answer meanwhile took {worst * 1000:.0f} ms")
        print(f"alone: {alone}\namong them: {among}")
        assert held.feed.followers == number + 1 and stuck(held) == number
        assert worst < 5.0
        assert all(now < 5 * then + 0.02 for now, then in zip(among, alone, strict=True))
    print(f"forgotten {await until(lambda: held.feed.followers == 1):.2f} s after they had closed")
    await held.done(session)
    assert len(await viewer.rest()) == 4 and viewer.code == 1000
    await forgotten(held)


class Wire:
    """Carries every byte between one viewer and the service, until it is cut: both think that the other is there."""

    def __init__(self) -> None:
        self._carrying: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def laid(self, port: int) -> AsyncIterator[int]:
        """To the service at `port`; the port at which a viewer finds it instead."""
        self._far = port
        async with await asyncio.start_server(self._carry, "127.0.0.1", 0, limit=4096) as server:
            try:
                yield int(server.sockets[0].getsockname()[1])
            finally:
                self.cut()
                for writer in self._ends:
                    writer.transport.abort()

    def cut(self) -> None:
        for carrying in self._carrying:
            carrying.cancel()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far, limit=4096)
        self._ends = [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            self._carrying.append(asyncio.create_task(_pump(source, target)))


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(4096):
        target.write(data)
        await target.drain()


def impatient(held: Held) -> float:
    """Let the service ping those who come from now on every fraction of a second; how soon it misses one."""
    held.server.config.ws_ping_interval = held.server.config.ws_ping_timeout = 0.5
    return 1.0


async def test_a_viewer_that_falls_silent_is_noticed_by_ping_and_nobody_else_disturbed(held: Held) -> None:
    missed = impatient(held)
    wire = Wire()
    session = await held.at_plugins()
    async with wire.laid(held.port) as port:
        far, near = [await client(each, of(session.session_id)) for each in (port, held.port)]
        staying, watching = [asyncio.create_task(each.rest()) for each in (far, near)]
        await until(lambda: min(far.pings, near.pings) >= 3)
        assert held.feed.followers == 2

        wire.cut()
        took = await until(lambda: held.feed.followers == 1)
        print(f"\nnoticed after {took:.1f} s")
        assert took < 10 * missed
        session = await held.done(await held.progressed(session, 10))
        assert await watching == stored(held)[session.session_id] and near.code == 1000
        staying.cancel()
        await forgotten(held)


async def test_a_viewer_that_falls_silent_while_it_is_told_of_much_is_noticed_by_ping(held: Held) -> None:
    impatient(held)
    wire = Wire()
    session = await long_history(held, 12)
    async with wire.laid(held.port) as port:
        far = await client(port, of(session.session_id), 4096)
        assert await far.frame()
        wire.cut()
        await until(lambda: stuck(held) == 1)
        near = await client(held.port, of(session.session_id, f"?after={session.head_seq}"))
        watching = asyncio.create_task(near.rest())
        await until(lambda: near.pings >= 3)
        await held.done(session)
        assert len(await watching) == 4 and near.code == 1000
        print(f"\nnoticed after {await until(lambda: held.feed.followers == 0):.1f} s")
        await forgotten(held)


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half closed"])
async def test_who_never_reads_is_noticed_by_ping(held: Held, half_closed: bool) -> None:
    impatient(held)
    session = await long_history(held, 12)
    with await mute(held.port, of(session.session_id)) as mouth:
        await until(lambda: stuck(held) == 1)
        if half_closed:
            mouth.shutdown(socket.SHUT_WR)
        print(f"\nnoticed after {await until(lambda: held.feed.followers == 0):.1f} s")
        await forgotten(held)
