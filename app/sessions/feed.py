"""Following a history: what is stored, then what comes, as one loop.

The table is the truth and the bell a hint: a follower takes the bell, then reads from its own cursor,
and waits only when there was nothing to read. So it misses nothing, repeats nothing, and a slow one just
reads later; nobody holds an event for it.
"""

from collections.abc import AsyncGenerator

import structlog

from app.sessions.events import TERMINAL_KINDS
from app.sessions.session import Frame
from app.sessions.store import Store

log = structlog.get_logger()

PAGE = 500
PAGE_BYTES = 1024 * 1024
"""What is held for a follower: so many frames, and no more than this but for the last of them."""


class Stopping(Exception):
    """The service is stopping; the follower comes back with its cursor."""


class Feed:
    """What follows the histories of one store, until `stop`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.stopping = False
        self.followers = 0

    def stop(self) -> None:
        """End every follower, each after what it has in hand."""
        self.stopping = True
        self._store.ring_all()

    async def follow(self, session_id: str, cursor: int) -> AsyncGenerator[list[Frame], None]:
        """Pages of frames with `seq` above `cursor`, in order, until the terminal one.

        An empty page, once, says that the history is caught up and live events come next. Stopping when
        the service stops.
        """
        caught_up = False
        self.followers += 1
        try:
            with self._store.bell(session_id) as bell:
                while not self.stopping:
                    bell.clear()
                    page = _bounded(await self._store.frames_after(session_id, cursor, PAGE))
                    if page:
                        cursor = page[-1].seq
                        yield page
                        if page[-1].kind in TERMINAL_KINDS:
                            return
                        continue
                    if not caught_up:
                        caught_up = True
                        yield []
                        continue
                    await bell.wait()
                raise Stopping
        finally:
            self.followers -= 1

    async def follow_all(self, position: int) -> AsyncGenerator[list[Frame], None]:
        """Pages of all sessions' frames after `position`, in commit order, until the service stops."""
        self.followers += 1
        try:
            with self._store.bell(None) as bell:
                while not self.stopping:
                    bell.clear()
                    page = _bounded(await self._store.feed_after(position, PAGE))
                    if page:
                        position = page[-1].position
                        yield page
                        continue
                    await bell.wait()
                raise Stopping
        finally:
            self.followers -= 1


def _bounded(page: list[Frame]) -> list[Frame]:
    """As much of a page as may be held for somebody who takes it slowly; the rest is read again."""
    size = 0
    for number, frame in enumerate(page, 1):
        size += len(frame.data)
        if size >= PAGE_BYTES:
            return page[:number]
    return page
