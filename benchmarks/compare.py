"""Two comparisons, each side by side in one run, because only ratios survive a noisy machine.

1. From POST to `done`, over HTTP and WebSocket, beside a bare Copier render of the same template in a
   process that is warm.
2. The replay of a long history over a WebSocket, beside a bare uvicorn loop that sends the same frames.

Run with `make bench`. Prints minimum, median and maximum of each, and the ratio of the medians.
"""

import argparse
import asyncio
import base64
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from copier import Settings, run_copy

from app.client import Client
from app.demo import laboratory
from app.errors import Failure
from app.sessions import lifecycle, requests
from app.sessions.session import Caller
from app.sessions.store import Store

HERE = Path(__file__).parent


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=30, help="creations, and renders (default 30)")
    options.add_argument(
        "--frames", type=int, default=60_000, help="length of the replayed history (default 60000)"
    )
    options.add_argument("--replays", type=int, default=5, help="replays of each kind (default 5)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="exlab-bench-") as folder:
        config = laboratory.build(Path(folder) / "lab")
        session_id, frames = asyncio.run(_long_history(config, given.frames))
        with _service(config) as url:
            _compare_creation(url, config, given.rounds)
            _compare_replay(url, session_id, frames, Path(folder), given.replays)


def _compare_creation(url: str, config: Path, rounds: int) -> None:
    client = Client(url)
    template = config.parent / "templates" / "confocal_run"
    body = json.loads((config.parent / "examples" / "confocal_run.json").read_text())
    answers = body["variables"] | {key: body[key] for key in ("label", "operator", "objective")}
    created, rendered = [], []
    for number in range(rounds + 1):
        began = time.perf_counter()
        session = client.create(body | {"run_date": f"2026-01-01T{number // 60:02}:{number % 60:02}:00"})
        for frame in client.follow(session["session_id"]):
            last = frame
        created.append(time.perf_counter() - began)
        assert last["kind"] == "done", last
        began = time.perf_counter()
        _bare_render(template, config.parent / "bare", answers)
        rendered.append(time.perf_counter() - began)
    _report("POST to done", created[1:], "bare Copier render", rendered[1:], "ms", 1000)


def _bare_render(template: Path, target: Path, answers: dict[str, object]) -> None:
    run_copy(
        str(template), target, data=answers, defaults=True, quiet=True, skip_tasks=True, settings=Settings()
    )
    shutil.rmtree(target)


def _compare_replay(url: str, session_id: str, frames: list[bytes], folder: Path, replays: int) -> None:
    path = folder / "frames.jsonl"
    path.write_bytes(b"\n".join(frames))
    served, bare = [], []
    with _bare_sender(path) as bare_url:
        for _ in range(replays):
            served.append(_replay(f"{url}/api/v1/sessions/{session_id}/events?after=0", frames))
            bare.append(_replay(bare_url, frames))
    print(f"replay of {len(frames)} frames, {sum(map(len, frames)) / len(frames):.0f} bytes each on average")
    _report("replay by the service", served, "bare send loop", bare, "s", 1)


def _replay(url: str, frames: list[bytes]) -> float:
    """Seconds from the handshake until the socket was closed by the server; every frame is compared."""
    return asyncio.run(_receive(url, frames))


async def _receive(url: str, frames: list[bytes]) -> float:
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    reader, writer = await asyncio.open_connection(name, int(port), limit=2**24)
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    writer.write(
        f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    began = time.perf_counter()
    received = bytearray()
    expected = sum(len(frame) + (2 if len(frame) < 126 else 4) for frame in frames)
    while len(received) < expected:
        received += await reader.read(2**20)
    took = time.perf_counter() - began
    writer.close()
    _compare_frames(bytes(received), frames)
    return took


def _compare_frames(received: bytes, frames: list[bytes]) -> None:
    at = 0
    for frame in frames:
        length = received[at + 1]
        at += 2
        if length == 126:
            length, at = int.from_bytes(received[at : at + 2], "big"), at + 2
        assert received[at : at + length] == frame, "a frame came back other than it was stored"
        at += length


async def _long_history(config: Path, count: int) -> tuple[str, list[bytes]]:
    from app.settings import load

    def broken(error: Exception) -> None:
        raise error

    store = Store(load(config).service.database_url, on_broken=broken)
    await store.open()
    body = requests.decode((config.parent / "examples" / "confocal_run.json").read_text())
    session, _ = await store.create(body, Caller(principal="local", trace_id="bench"))
    told = count - 2
    for first in range(0, told, 1000):
        remarks = (
            lifecycle.Warned(code="bench", message=f"line {number} of a long history")
            for number in range(first, min(first + 1000, told))
        )
        session = await store.record(session, *remarks)
    error = Failure(code="render_failed", message="the end of a long history")
    await store.record(session, lifecycle.Failed(error=error))
    frames = [frame.data for frame in await store.frames_after(session.session_id, 0, count)]
    await store.close()
    return session.session_id, frames


@contextmanager
def _service(config: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "app.cli", "serve", "--config", str(config), "--port", "0"]
    with _process(command) as url:
        while json.load(urlopen(Request(f"{url}/api/v1/health")))["status"] != "ok":
            time.sleep(0.1)
        yield url


@contextmanager
def _bare_sender(frames: Path) -> Iterator[str]:
    with _process([sys.executable, str(HERE / "bare_sender.py"), str(frames)]) as url:
        yield url


@contextmanager
def _process(command: list[str]) -> Iterator[str]:
    """Start a server that prints its address at the end of its first line; stop it at the end."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    with closing(process.stdout):
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait(30)


def _report(name: str, mine: list[float], other: str, theirs: list[float], unit: str, scale: float) -> None:
    for label, seconds in ((name, mine), (other, theirs)):
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(
            f"{label:24} min {low * scale:9.2f}   median {middle * scale:9.2f}   max {high * scale:9.2f} {unit}"
            f"   ({len(seconds)} runs)"
        )
    ratio = statistics.median(mine) / statistics.median(theirs)
    print(f"{'ratio of the medians':24} {ratio:.2f}\n")


if __name__ == "__main__":
    main()
