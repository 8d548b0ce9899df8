"""The web side of the service: every route, what the handlers are given, and the guard in front."""

from collections.abc import Callable
from typing import Any

from litestar import Litestar, Request, Router
from litestar.di import Provide
from litestar.types import ASGIApp, ControllerRouterHandler

from app.sessions.feed import Feed
from app.sessions.runner import Runner
from app.sessions.session import Caller
from app.sessions.store import Store
from app.settings import ConfigFile
from app.web import openapi
from app.web.bodies import BodyCheck
from app.web.catalogue import list_plugins, list_templates
from app.web.errors import HANDLERS
from app.web.events import Events
from app.web.guard import Guard
from app.web.health import Health, Isolation
from app.web.overview import overview
from app.web.sessions import Sessions, operations
from app.web.system import ready, report, setup_status

_ROUTES: list[ControllerRouterHandler] = [
    Sessions,
    Events,
    operations,
    overview,
    list_templates,
    list_plugins,
    setup_status,
    report,
    ready,
]

PRINCIPAL = "local"
"""Who gives every command: whoever may use this machine."""


def litestar(
    *,
    store: Store,
    runner: Runner,
    feed: Feed,
    config: ConfigFile,
    isolation: Callable[[], Isolation],
) -> Litestar:
    """The application. A server is given it `guarded`."""
    health = Health(store=store, runner=runner, feed=feed, config=config, isolation=isolation)
    given = {"store": store, "runner": runner, "feed": feed, "config": config, "health": health}
    return Litestar(
        [Router("/api/v1", route_handlers=_ROUTES), openapi.assets()],
        dependencies={name: _always(part) for name, part in given.items()} | {"caller": _each(_caller)},
        exception_handlers=HANDLERS,
        middleware=[BodyCheck()],
        openapi_config=openapi.config(),
        logging_config=None,
        debug=False,
        pdb_on_exception=False,
    )


def guarded(app: Litestar, config: ConfigFile) -> ASGIApp:
    return Guard(app, config)


def _always(part: object) -> Provide:
    def provide() -> Any:
        return part

    return _each(provide)


def _each(provide: Callable[..., Any]) -> Provide:
    return Provide(provide, sync_to_thread=False)


def _caller(request: Request[Any, Any, Any]) -> Caller:
    return Caller(principal=PRINCIPAL, trace_id=request.scope["state"]["trace_id"])
