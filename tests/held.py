"""A service that drives nothing, on a real socket in the test's own event loop.

The test moves its sessions itself, so that it can show them in every state and at every pace.
"""

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn
from websockets.asyncio.client import ClientConnection, connect

from app.demo import laboratory
from app.errors import Failure
from app.sessions.feed import Feed
from app.sessions.lifecycle import (
    Accepted,
    Asked,
    Checked,
    Documented,
    Failed,
    Progressed,
    Published,
    Rendered,
    Transformed,
    Warned,
)
from app.sessions.pinned import Pinned, encoded
from app.sessions.pipeline import Pipeline
from app.sessions.plugin_pass import PluginPass
from app.sessions.requests import CreateBody, ResumeBody, decode
from app.sessions.runner import Runner
from app.sessions.session import Caller, Session
from app.sessions.store import Store
from app.settings import ConfigFile, Equipment, Validator
from app.steps import gate
from app.steps.plugins.host import Host
from app.steps.render import Renderer
from app.web import doors
from app.web.connection import Connection
from tests.service import PATIENCE

CALLER = Caller(principal="local", trace_id="test")
FIELD = msgspec.Raw(b'{"id":"dose","label":"Dose","type":"number","required":true}')
PINNED = Pinned(
    label="Pilot",
    operator="asmith",
    objective="See",
    equipment=Equipment(id="CONFOCAL_01", label="Confocal", local_root="/data", nas_root="/nas"),
    template="project",
    template_version="1",
    template_path=Path("/templates/project"),
    run_scope=None,
    plugins=(gate.Planned("doser", "1.0"),),
    readme=gate.ReadmeValues(template_fields={}, config_fields={}, custom_fields=()),
    answers={},
    lims_project={},
    nas_path="/nas",
    rules=Validator(),
)

_numbers = itertools.count(1)


class Held:
    """The parts, and where they are served."""

    def __init__(self, config: ConfigFile) -> None:
        service = config.current.service
        self.config = config
        self.store = Store(service.database_url, on_broken=lambda broken: None)
        self.feed = Feed(self.store)
        plugins = PluginPass(self.store, Host(lambda: None), config)
        pipeline = Pipeline(self.store, Renderer(service), plugins, config)
        self.runner = Runner(self.store, pipeline, keep_partial_days=14, held=True)
        self.port = 0

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        await self.store.open()
        app = doors.litestar(
            store=self.store,
            runner=self.runner,
            feed=self.feed,
            config=self.config,
            isolation=dict,
        )
        self.server = uvicorn.Server(
            uvicorn.Config(
                doors.guarded(app, self.config),
                host="127.0.0.1",
                port=0,
                log_config=None,
                lifespan="off",
                ws=Connection,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=2,
            )
        )
        serving = asyncio.create_task(self.server.serve())
        while not self.server.started:
            assert not serving.done(), serving
            await asyncio.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self.feed.stop()
            self.server.should_exit = True
            await serving
            await self.store.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"{self.url}/api/v1", timeout=30)

    def socket(self, path: str, **options: Any) -> connect:
        url = f"ws://127.0.0.1:{self.port}/api/v1{path}"
        return connect(url, proxy=None, max_size=None, open_timeout=30, **options)

    async def created(self, **changes: Any) -> Session:
        session, _ = await self.store.create(request(**changes), CALLER)
        return session

    async def rendering(self, **changes: Any) -> Session:
        return await self.store.record(await self.created(**changes), accepted())

    async def at_plugins(self, printed: tuple[str, ...] = (), **changes: Any) -> Session:
        rendered = Rendered(tree=Path("/data/tree"), manifest="0" * 64, rendered=(), answers={}, log=printed)
        return await self.store.record(await self.rendering(**changes), rendered)

    async def asking(self, session: Session | None = None, prompt_id: str = "p1") -> Session:
        asked = Asked(prompt_id=prompt_id, plugin="doser", file=None, reason="No dose.", fields=(FIELD,))
        return await self.store.record(session or await self.at_plugins(), asked)

    async def answered(self, session: Session) -> Session:
        return await self.store.answer(session.session_id, ResumeBody(extra_inputs={"dose": 1}), CALLER)

    async def done(self, session: Session) -> Session:
        """From the plugins to the end, in one commit."""
        result = {"path": "/data/x", "sync_status": "pending", "blocked": False, "findings": []}
        published = Published(result=result, nas_path="//nas/x")
        return await self.store.record(session, Transformed(), Documented(), Checked(findings=()), published)

    async def failed(self, session: Session) -> Session:
        return await self.store.record(
            session, Failed(error=Failure(code="render_failed", message="It broke."))
        )

    async def progressed(self, session: Session, count: int) -> Session:
        steps = (Progressed(current=number, total=count, file=f"f{number}") for number in range(1, count + 1))
        return await self.store.record(session, *steps)

    async def warned(self, session: Session, count: int) -> Session:
        """With frames so large that no socket's buffers hold them all."""
        warning = Warned(message="x" * 4000, code="loud")
        return await self.store.record(session, *[warning] * count)

    @contextmanager
    def unreadable(self) -> Iterator[None]:
        """The database without its sessions, as after a hand on the shell that went wrong."""
        with sqlite3.connect(self.store.path) as database:
            database.execute("PRAGMA legacy_alter_table=ON")
            database.execute("ALTER TABLE sessions RENAME TO elsewhere")
        try:
            yield
        finally:
            with sqlite3.connect(self.store.path) as database:
                database.execute("PRAGMA legacy_alter_table=ON")
                database.execute("ALTER TABLE elsewhere RENAME TO sessions")


@asynccontextmanager
async def holding(folder: Path) -> AsyncIterator[Held]:
    """A held service on a demo laboratory in `folder`."""
    held = Held(ConfigFile(laboratory.build(folder)))
    async with held.served():
        yield held


def request(**changes: Any) -> CreateBody:
    body = {
        "kind": "project",
        "equipment_id": "CONFOCAL_01",
        "template_path": "project",
        "label": "Pilot",
        "operator": "asmith",
        "objective": "See",
    }
    return decode(msgspec.json.encode(body | changes).decode())


def accepted() -> Accepted:
    """Let in, each time for another folder."""
    key = f"/data/con/proj-{next(_numbers)}"
    return Accepted(
        destination=Path(key),
        destination_key=key,
        project_key=key,
        project_short_id="PROJ-1",
        local_root=Path("/data"),
        pinned=encoded(PINNED),
    )


async def frames(socket: ClientConnection) -> list[dict[str, Any]]:
    """Every frame until the connection is closed."""
    async with asyncio.timeout(PATIENCE):
        return [msgspec.json.decode(frame) async for frame in socket]


async def heard(socket: ClientConnection, count: int) -> list[dict[str, Any]]:
    """The next `count` frames."""
    async with asyncio.timeout(PATIENCE):
        return [msgspec.json.decode(await socket.recv()) for _ in range(count)]
