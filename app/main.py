"""Where the parts are put together: `create_app` for any ASGI server, `serve` for the command line."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import msgspec
import structlog
import uvicorn
from litestar.types import ASGIApp

from app import disk, telemetry
from app.errors import StoreBroken, StoreRefused, StoreUnavailable
from app.sessions.events import timestamp
from app.sessions.feed import Feed
from app.sessions.pipeline import Pipeline
from app.sessions.plugin_pass import PluginPass
from app.sessions.runner import Runner
from app.sessions.store import Store
from app.settings import ConfigFile
from app.steps.plugins.host import Host
from app.steps.render import Renderer
from app.web import doors
from app.web.connection import Connection

log = structlog.get_logger()

LOOK_SECONDS = 1.0
"""How often the config file is looked at, so that a mended one counts without a restart; and the note
beside the store brought up to date."""

_asked_to_stop = threading.Event()

RESTART = 75
"""Exit status when a config that was mended names another store; a supervisor starts the service again."""

BROKEN_STORE = 70
"""Exit status when the store may be lying; a supervisor starts the service again, and that recovers."""


class House:
    """The parts of one running service, and the order in which they start and stop."""

    def __init__(self, config: ConfigFile, *, held: bool) -> None:
        service = config.current.service
        self.config = config
        self.store = Store(service.database_url, on_broken=_die)
        self.renderer = Renderer(service)
        self.plugins = Host(lambda: self.config.current.plugins.python)
        self.feed = Feed(self.store)
        plugin_pass = PluginPass(self.store, self.plugins, config)
        pipeline = Pipeline(self.store, self.renderer, plugin_pass, config)
        self.runner = Runner(self.store, pipeline, keep_partial_days=service.keep_partial_days, held=held)
        self._service = service
        self._guessed = config.status.state == "incomplete_no_config"
        self.misplaced = asyncio.Event()

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        await self.store.open()
        watching = asyncio.create_task(self._look_after())
        try:
            await self.renderer.start()
            await self.plugins.start()
            await self.runner.start(lambda: self.config.current.paths.local_root)
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await self.drain()
            await self.renderer.close()
            await self.plugins.close()
            await self.store.close()

    async def drain(self) -> None:
        """No new sessions, no new steps; the streams end. May be asked for twice."""
        self.feed.stop()
        await self.runner.drain(self._service.drain_seconds)

    async def _look_after(self) -> None:
        while True:
            await self.config.refresh()
            await self.store.note_progress()
            # Started without a readable config, on the default store: a config that names another one must
            # not fill this one with sessions.
            if self._guessed and self.config.current.service != self._service:
                self.misplaced.set()
            await asyncio.sleep(LOOK_SECONDS)


def create_app(house: House) -> ASGIApp:
    """The application on a house that lives as long as it is served."""
    app = doors.litestar(
        store=house.store,
        runner=house.runner,
        feed=house.feed,
        config=house.config,
        isolation=lambda: {"rendering": house.renderer.isolation, "plugins": house.plugins.isolation},
    )
    return doors.guarded(app, house.config)


class Server(uvicorn.Server):
    """Says when it is ready, and drains the house before it closes the connections."""

    def __init__(
        self, config: uvicorn.Config, house: House, announce: Path, ready: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._house = house
        self._announce = announce
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit or not self.servers:
            return
        port = int(self.servers[0].sockets[0].getsockname()[1])
        known = {"port": port, "pid": os.getpid(), "started_at": timestamp(datetime.now(UTC))}
        try:
            disk.write_whole(self._announce, msgspec.json.encode(known))
        except OSError as error:  # a full disk is no reason not to serve: it may be what we are asked about
            log.warning("server.json could not be written.", why=str(error))
        url = f"http://{self.config.host}:{port}"
        print(f"exlab-sessions ready on {url}", flush=True)
        self._ready(url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._house.drain()
        try:
            self._announce.unlink(missing_ok=True)
        except OSError as error:  # whoever reads it finds that nobody listens there
            log.warning("server.json could not be removed.", why=str(error))
        await super().shutdown(sockets)


def serve(
    config_path: Path | None,
    *,
    host: str | None,
    port: int | None,
    hold: bool,
    ready: Callable[[str], None],
) -> int:
    """Run the service until SIGTERM or SIGINT; returns the exit status. `ready` is called with its address."""
    telemetry.configure()
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a signal again after it has obeyed it; a drained service exits with 0.
        signal.signal(number, _obeyed)
    try:
        return asyncio.run(_serve(ConfigFile(config_path), host, port, hold, ready))
    except (StoreRefused, StoreUnavailable, OSError) as refused:
        print(f"exlab-sessions: {refused}", file=sys.stderr)
        return 1
    finally:
        # Python gives the signals their default back before it ends: another one would then be the end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


async def _serve(
    config: ConfigFile, host: str | None, port: int | None, hold: bool, ready: Callable[[str], None]
) -> int:
    service = config.current.service
    address = host or service.host
    if not _is_loopback(address):
        print(
            f"exlab-sessions: {address} is not a loopback address, and there are no tokens", file=sys.stderr
        )
        return 1
    house = House(config, held=hold)
    settings = uvicorn.Config(
        create_app(house),
        host=address,
        port=service.port if port is None else port,
        # Without file handles asyncio tries to accept all that wait at once, and logs each failure.
        backlog=128,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws=Connection,
        ws_per_message_deflate=False,
        ws_max_size=64 * 1024,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = Server(settings, house, service.state_dir / "server.json", ready)
    async with house.living():
        if _asked_to_stop.is_set():
            return 0
        moving = asyncio.create_task(_move_out(house, server))
        await server.serve()
        moving.cancel()
    if house.misplaced.is_set():
        return RESTART
    return 0 if server.started else 1


async def _move_out(house: House, server: Server) -> None:
    await house.misplaced.wait()
    log.error(
        "The config names other settings of the service than it was started with; it must be restarted."
    )
    server.should_exit = True


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        return False


def _obeyed(_number: int, _frame: object) -> None:
    """A signal that came before the server listened for it, or that it has obeyed already."""
    _asked_to_stop.set()


def _die(broken: StoreBroken) -> None:
    """Stop at once, from whichever thread: nothing more may be promised on this store."""
    log.critical("The store may be lying; the service stops. Its restart recovers.", why=str(broken))
    try:
        _say_at_last(f"exlab-sessions: the store may be lying, stopping at once: {broken}\n")
    finally:
        os._exit(BROKEN_STORE)


def _say_at_last(word: str) -> None:
    """Say it to standard error, so that nothing which another thread still logs comes after it."""
    said = sys.stderr.fileno()
    try:
        kept = os.dup(said)
        os.dup2(os.open(os.devnull, os.O_WRONLY), said)
        said = kept
    except OSError:  # without file handles it may be the last word but one
        log.warning("Standard error could not be kept.")
    os.write(said, word.encode(errors="backslashreplace"))
