"""What a plugin asks, and whether an answer fits. Pure.

An answer is judged inside the transaction that takes it, so that judging takes a bounded time, whatever pattern a
plugin asks for: patterns are RE2's, which are matched in linear time.
"""

import msgspec
import re2  # type: ignore[import-untyped]

from app.errors import InputInvalid
from app.settings import Field
from app.steps import fields as known

TEXT_LIMIT = 4096
"""Characters of one answered value; the patterns of plugins are matched against no more than that."""

_RE2 = re2.Options()
_RE2.log_errors = False
# Bytes of a pattern's program: the time that a match takes grows with it, to a fifth of a second with this.
_RE2.max_mem = 1024 * 1024


class PromptField(Field, frozen=True, kw_only=True, omit_defaults=False):
    """One value that a plugin asks for.

    `min` and `max` bound a number, or the length of a text. `pattern` is in RE2's syntax, and must match the whole
    of a text. ValueError where it is no such pattern, or too large a one.
    """

    required: bool = True
    min: float | None = None
    max: float | None = None
    pattern: str | None = None
    secret: bool = False

    def __post_init__(self) -> None:
        if self.type == "choice" and not self.options:
            raise ValueError(f"{self.id} offers nothing to choose from")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"{self.id} has a min above its max")
        if self.pattern is not None:
            _matches(self.pattern, "")


def accepted(fields: tuple[PromptField, ...], values: dict[str, object]) -> dict[str, object]:
    """The values that were asked for, without those of secret fields, the defaults filled in.

    InputInvalid names the first field whose value does not fit. Keys that were not asked for are left out.
    """
    taken = _taken(fields, values)
    return {field.id: taken[field.id] for field in fields if field.id in taken and not field.secret}


def entered_secretly(fields: tuple[PromptField, ...], values: dict[str, object]) -> dict[str, object]:
    """The values of the secret fields, None for one that was left empty. Raises InputInvalid as `accepted` does."""
    taken = _taken(fields, values)
    return {field.id: taken.get(field.id) for field in fields if field.secret}


def _taken(fields: tuple[PromptField, ...], values: dict[str, object]) -> dict[str, object]:
    taken: dict[str, object] = {}
    for field in fields:
        value = values.get(field.id, field.default)
        if value is None or value == "":
            if field.required:
                raise InputInvalid(f"{field.label}: a value is required", field=field.id)
            continue
        complaint = _complaint(field, value)
        if complaint is not None:
            raise InputInvalid(f"{field.label}: {complaint}", field=field.id)
        taken[field.id] = value
    return taken


def fitting_defaults(
    fields: tuple[PromptField, ...], values: dict[str, object], room: int
) -> tuple[PromptField, ...]:
    """The fields with those of `values` for their defaults that fit; nothing is offered for a secret.

    All of them together take up at most `room` bytes.
    """
    offered = []
    for field in fields:
        value = values.get(field.id)
        size = len(msgspec.json.encode(value))
        if value is None or field.secret or size > room or _complaint(field, value) is not None:
            offered.append(field)
        else:
            room -= size
            offered.append(msgspec.structs.replace(field, default=value))
    return tuple(offered)


def _complaint(field: PromptField, value: object) -> str | None:
    return known.misfit(field, value) or _out_of_bounds(field, value)


def _out_of_bounds(field: PromptField, value: object) -> str | None:
    match field.type, value:
        case "number", int() | float():
            return _outside(field, value, "")
        case (("string" | "text"), str()):
            return _text_complaint(field, value)
    return None


def _text_complaint(field: PromptField, text: str) -> str | None:
    if len(text) > TEXT_LIMIT:
        return f"expected at most {TEXT_LIMIT} characters"
    if field.pattern is not None and not _matches(field.pattern, text):
        return f"expected a text that matches {field.pattern}"
    return _outside(field, len(text), " characters")


def _matches(pattern: str, text: str) -> bool:
    try:
        return re2.fullmatch(pattern, text, _RE2) is not None
    except re2.error as error:
        raise ValueError(f"the pattern cannot be used: {error.args[0].decode()}") from error


def _outside(field: PromptField, amount: float, unit: str) -> str | None:
    if field.min is not None and amount < field.min:
        return f"expected at least {field.min:g}{unit}"
    if field.max is not None and amount > field.max:
        return f"expected at most {field.max:g}{unit}"
    return None
