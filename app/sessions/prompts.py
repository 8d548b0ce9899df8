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
        if self.pattern is not None:
            _matches(self.pattern, "")


def accepted(fields: tuple[PromptField, ...], values: dict[str, object]) -> dict[str, object]:
    """The values that were asked for, without those of secret fields, the defaults filled in.

    InputInvalid names the first field whose value does not fit. Keys that were not asked for are left out.
    """
    kept: dict[str, object] = {}
    for field in fields:
        value = values.get(field.id, field.default)
        if value is None or value == "":
            if field.required:
                raise InputInvalid(f"{field.label}: a value is required", field=field.id)
            continue
        complaint = _complaint(field, value)
        if complaint is not None:
            raise InputInvalid(f"{field.label}: {complaint}", field=field.id)
        if not field.secret:
            kept[field.id] = value
    return kept


def fitting_defaults(fields: tuple[PromptField, ...], values: dict[str, object]) -> tuple[PromptField, ...]:
    """The fields with those of `values` for their defaults that fit; nothing is offered for a secret."""
    return tuple(
        msgspec.structs.replace(field, default=values[field.id])
        if field.id in values and not field.secret and _complaint(field, values[field.id]) is None
        else field
        for field in fields
    )


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
