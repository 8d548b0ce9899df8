"""The vocabulary of failures.

A `Failure` is a value: it is what a session that did not succeed keeps as its `error`. The
exceptions are what a caller meets who asked for something that cannot be done; their docstring is
their message. `web/errors.py` knows which status each code has, nobody else does.
"""

import errno
from pathlib import Path

import msgspec


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a session ended without its folder: the `error` of a handle and of a `failed` event."""

    code: str
    message: str
    field: str | None = None
    details: dict[str, object] | None = None


class Refusal(Exception):
    """The request cannot be served."""

    code = "internal_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        field: str | None = None,
        details: dict[str, object] | None = None,
    ) -> None:
        self.message = message or (self.__doc__ or "").strip()
        self.field = field
        self.details = details
        super().__init__(self.message)


class ValidationFailed(Refusal):
    """The body does not have the shape that this operation takes."""

    code = "validation_failed"


class SessionNotFound(Refusal):
    """No session has this id."""

    code = "session_not_found"


class SessionAlreadyCompleted(Refusal):
    """The session is already in a terminal state."""

    code = "session_already_completed"


class SessionNotAwaitingInput(Refusal):
    """The session does not wait for an answer."""

    code = "session_not_awaiting_input"


class SessionNotRetryable(Refusal):
    """Only a failed or aborted session can be tried again."""

    code = "session_not_retryable"


class PromptNotOpen(Refusal):
    """Another question than the one that this answer names is open."""

    code = "prompt_not_open"


class TooLateToCancel(Refusal):
    """The session is already committed to publishing its folder."""

    code = "too_late_to_cancel"


class CursorAhead(Refusal):
    """The cursor is ahead of the history; start again from 0."""

    code = "cursor_ahead"


class CursorInvalid(Refusal):
    """A cursor is a whole number, 0 or above."""

    code = "cursor_invalid"


class InputInvalid(Refusal):
    """The answer does not fit the fields that were asked for."""

    code = "input_invalid"


class IdempotencyKeyReused(Refusal):
    """This Idempotency-Key was used before, with another body."""

    code = "idempotency_key_reused"


class SetupIncomplete(Refusal):
    """The service is not configured far enough to do this."""

    code = "setup_incomplete"


class ShuttingDown(Refusal):
    """The service is stopping and takes no new work."""

    code = "shutting_down"


class StoreUnavailable(Refusal):
    """The database cannot take a write now; nothing is lost or half done, try again shortly."""

    code = "store_unavailable"


class Forbidden(Refusal):
    """The request does not come from where this service takes requests from."""

    code = "forbidden"


class PayloadTooLarge(Refusal):
    """The body is larger than this service takes."""

    code = "payload_too_large"


class UnsupportedMediaType(Refusal):
    """A request that changes something carries application/json."""

    code = "unsupported_media_type"


class StoreBroken(Exception):
    """The store may be lying: the service stops at once, and its restart recovers."""


class StoreRefused(Exception):
    """The database file is not one that this service may open."""


class ConfigMistake(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong in the config file. `line` counts from 1; None where no line has it."""

    key: str
    line: int | None
    message: str


class ConfigInvalid(Exception):
    """The config file cannot be used."""

    def __init__(self, path: Path, mistakes: tuple[ConfigMistake, ...]) -> None:
        self.path = path
        self.mistakes = mistakes
        lines = (f"{path}:{m.line or '-'}: {m.key}: {m.message}" for m in mistakes)
        super().__init__("\n".join(lines))


class BlockedOn(Exception):
    """Something outside stands in the way that may pass by itself; the step is tried again later."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


_PASSING = {
    errno.ENOSPC: ("disk_full", "the disk is full"),
    errno.EDQUOT: ("disk_full", "the disk quota is used up"),
    errno.EIO: ("disk_error", "the disk reported an error"),
    errno.EROFS: ("read_only", "the file system is mounted read-only"),
    errno.EACCES: ("access_denied", "access was denied"),
    errno.EPERM: ("access_denied", "the operation is not permitted"),
    errno.EBUSY: ("file_held", "another program holds the file"),
    errno.ETXTBSY: ("file_held", "another program holds the file"),
    errno.ENODEV: ("not_mounted", "the file system is not mounted"),
    errno.ENOTCONN: ("not_mounted", "the file system is not connected"),
    errno.ESTALE: ("not_mounted", "the network file system lost the file"),
    errno.EMFILE: ("out_of_handles", "too many open files"),
    errno.ENFILE: ("out_of_handles", "too many open files"),
    errno.ENOMEM: ("out_of_memory", "the machine is out of memory"),
}


def blocked_by(error: OSError) -> BlockedOn | None:
    """What `error` waits for, or None where waiting cannot mend it."""
    if error.errno not in _PASSING:
        return None
    code, reason = _PASSING[error.errno]
    place = f": {error.filename}" if error.filename else ""
    return BlockedOn(code, f"{reason}{place}")
