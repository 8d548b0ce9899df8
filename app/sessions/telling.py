"""The progress of a step, told while it runs. What cannot be told is left out: the step is not held up."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from app.errors import StoreUnavailable
from app.sessions.lifecycle import Progressed
from app.sessions.moves import Moved
from app.sessions.session import Session
from app.sessions.store import Store

log = structlog.get_logger()

Progress = Callable[[int, int, str], None]


@asynccontextmanager
async def progress(store: Store, session: Session, *, plugin: str | None = None) -> AsyncIterator[Progress]:
    """Gives what a step tells its progress to: files done, all, and the one at hand. All is told on leaving."""
    telling: list[asyncio.Task[None]] = []

    def told(current: int, total: int, file: str) -> None:
        progressed = Progressed(current=current, total=total, file=file, plugin=plugin)
        telling.append(asyncio.create_task(tell(store, session, progressed)))

    try:
        yield told
    finally:
        await asyncio.gather(*telling)


async def tell(store: Store, session: Session, progressed: Progressed) -> None:
    try:
        await store.record(session, progressed)
    except (Moved, StoreUnavailable) as missed:
        log.debug("A progress was not told.", session_id=session.session_id, why=str(missed))
