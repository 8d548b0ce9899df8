"""How the service is: for people and monitors, without ever waiting long.

A data root on a disk that does not answer would hold whoever looks at it, so there is never more than one
look at a time, and an answer goes out without it after two seconds. Nothing here stands in the way of a
session; what does is told by the session itself.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from app.errors import StoreUnavailable
from app.sessions.feed import Feed
from app.sessions.lifecycle import LIVE, State
from app.sessions.runner import Runner
from app.sessions.store import Store
from app.settings import ConfigFile, SetupState
from app.steps import provenance, publish

PATIENCE_SECONDS = 2.0
LITTLE_ROOM = 1024**3

Status = Literal["ok", "warn", "error"]
Component = dict[str, object]
Isolation = dict[str, dict[str, str]]
"""By step: which confinement its processes have on this machine."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`status` is the worst of the components'; each of these has a `status` and, if not ok, a `reason`."""

    status: Status
    version: str
    schema_versions: dict[str, str]
    components: dict[str, dict[str, object]]
    setup_state: SetupState


class Health:
    """The one that looks, for as long as the service runs."""

    def __init__(
        self,
        *,
        store: Store,
        runner: Runner,
        feed: Feed,
        config: ConfigFile,
        isolation: Callable[[], Isolation],
    ) -> None:
        self._store = store
        self._runner = runner
        self._feed = feed
        self._config = config
        self._isolation = isolation
        self._looking: asyncio.Task[tuple[Component, Component]] | None = None

    async def report(self) -> Report:
        (data_root, room), (sessions, partial) = await asyncio.gather(self._look(), self._count())
        components: dict[str, Component] = {
            "session_store": sessions | ({} if room["status"] == "ok" else room),
            "config": _config(self._config),
            "data_root": data_root,
            **{step: {"status": "ok", "isolation": told} for step, told in self._isolation().items()},
            "partial_trees": partial,
            "streams": {"status": "ok", "followers": self._feed.followers},
        }
        return Report(
            status=_worst(components.values()),
            version=version(),
            schema_versions={
                "store": self._store.revision,
                "creation_json": provenance.CREATION_SCHEMA,
                "readme_fields_json": provenance.README_SCHEMA,
                "equipment_json": provenance.EQUIPMENT_SCHEMA,
            },
            components=components,
            setup_state=self._config.status.state,
        )

    async def refresh(self) -> None:
        """Take up changes of the config and of the folders that it names, if these answer in time."""
        await self._look()

    async def _look(self) -> tuple[Component, Component]:
        """What the disks say of the data root, and of the room that the store has."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_now())
        done, _ = await asyncio.wait({self._looking}, timeout=PATIENCE_SECONDS)
        if not done:
            silent: Component = {"status": "error", "reason": "the disk does not answer"}
            return silent, silent
        return self._looking.result()

    async def _look_now(self) -> tuple[Component, Component]:
        await self._config.refresh()
        return await asyncio.to_thread(_disks, self._config.current.paths.local_root, self._store.path.parent)

    async def _count(self) -> tuple[Component, Component]:
        """What the store says of the sessions, and of the partial trees that they left."""
        try:
            counts = await self._store.counts()
        except StoreUnavailable as unavailable:
            silent: Component = {"status": "error", "reason": unavailable.message}
            return silent, {"status": "warn", "reason": "the store cannot be asked"}
        sessions: Component = {
            "status": "ok",
            "epoch": self._store.epoch,
            "active_sessions": sum(counts.get(state, 0) for state in LIVE),
            "input_required": counts.get(State.INPUT_REQUIRED, 0),
            "blocked": counts.get("blocked", 0),
            "held": self._runner.held,
            "stopping": self._runner.draining,
        }
        if counts.get("blocked"):
            sessions |= {
                "status": "warn",
                "reason": "something stands in the way of sessions; see blocked_on",
            }
        return sessions, {"status": "ok", "count": counts.get("partial", 0)}


def version() -> str:
    """Of the installed package; a checkout that nobody installed has none."""
    try:
        return metadata.version("exlab-sessions")
    except metadata.PackageNotFoundError:
        return "unknown"


def _worst(components: Iterable[Component]) -> Status:
    found = {component["status"] for component in components}
    return "error" if "error" in found else "warn" if "warn" in found else "ok"


def _config(config: ConfigFile) -> Component:
    told: Component = {
        "status": "ok",
        "source": str(config.current.source or ""),
        "setup": config.status.state,
    }
    if config.problem is not None:
        mistakes = [msgspec.to_builtins(mistake) for mistake in config.problem.mistakes]
        reason = "the file has mistakes; the last good one stays in force"
        return told | {"status": "warn", "reason": reason, "mistakes": mistakes}
    if not config.status.ready:
        return told | {"status": "warn", "reason": "the setup is not complete; see /setup/status"}
    return told


def _disks(root: Path | None, store: Path) -> tuple[Component, Component]:
    return _data_root(root), _room(store, "the store")


def _data_root(root: Path | None) -> Component:
    if root is None:
        return {"status": "warn", "reason": "paths.local_root is not set"}
    told: Component = {"path": str(root)}
    if not root.is_dir():
        return told | {"status": "error", "reason": "the data root does not exist"}
    if not os.access(root, os.W_OK | os.X_OK):
        return told | {"status": "error", "reason": "the data root cannot be written to"}
    return told | {"in_use": publish.root_present(root)} | _room(root, "the data root")


def _room(folder: Path, name: str) -> Component:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return {"status": "error", "reason": f"{name} cannot be looked at: {error.strerror}"}
    if free < LITTLE_ROOM:
        return {"status": "warn", "reason": f"little room is left for {name}", "free_bytes": free}
    return {"status": "ok", "free_bytes": free}
