"""The service itself: how far it is set up, how it is, and whether it takes requests."""

import msgspec
from litestar import get
from litestar.di import NamedDependency

from app.errors import ShuttingDown
from app.sessions.runner import Runner
from app.sessions.store import Store
from app.settings import ConfigFile, SetupStatus
from app.web import errors
from app.web.health import Health, Report


class Ready(msgspec.Struct, frozen=True):
    ready: bool


@get("/setup/status", operation_id="setup_status", tags=["system"], responses=errors.responses())
async def setup_status(health: NamedDependency[Health], config: NamedDependency[ConfigFile]) -> SetupStatus:
    """What is missing before folders can be created, as it is now. Always available."""
    await health.refresh()
    return config.status


@get("/health", operation_id="health", tags=["system"], responses=errors.responses())
async def report(health: NamedDependency[Health]) -> Report:
    """How the service is. Always 200; `status` is what to look at."""
    return await health.report()


@get(
    "/ready",
    operation_id="ready",
    tags=["system"],
    responses=errors.responses("shutting_down", "store_unavailable"),
)
async def ready(runner: NamedDependency[Runner], store: NamedDependency[Store]) -> Ready:
    """For supervisors: 200 while the service takes requests, else 503. An incomplete setup is no reason."""
    if runner.draining:
        raise ShuttingDown
    await store.counts()
    return Ready(True)
