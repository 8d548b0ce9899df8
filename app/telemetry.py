"""Logging: one JSON object a line to standard error, with the trace id of the request it belongs to."""

import logging
import sys

import structlog
from structlog.tracebacks import ExceptionDictTransformer


def configure(*, human: bool | None = None, level: str = "INFO") -> None:
    """Send structlog and the standard library's loggers through one pipe to standard error.

    `human` colours the lines for a terminal; by default they are JSON unless standard error is one.
    """
    human = sys.stderr.isatty() if human is None else human
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.types.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if human
        else [
            # Without the values of local variables: an operator's secret may be among them.
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for noisy in ("uvicorn.access", "aiosqlite", "alembic", "filelock", "websockets"):
        logging.getLogger(noisy).setLevel("WARNING")
