"""What a plugin asks, and whether an answer fits. Pure."""

import re
from datetime import date
from typing import Literal

import msgspec

from app.errors import InputInvalid

TEXT_LIMIT = 4096
"""Characters of one answered value; the patterns of plugins are matched against no more than that."""


class PromptField(msgspec.Struct, frozen=True, kw_only=True):
    """One value that a plugin asks for. `min` and `max` bound a number, or the length of a text."""

    id: str
    label: str
    type: Literal["string", "text", "choice", "date", "boolean", "number"] = "string"
    options: tuple[str, ...] | None = None
    required: bool = True
    default: object = None
    hint: str | None = None
    min: float | None = None
    max: float | None = None
    pattern: str | None = None
    secret: bool = False


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


def _complaint(field: PromptField, value: object) -> str | None:
    match field.type:
        case "boolean":
            return None if isinstance(value, bool) else "expected true or false"
        case "number":
            return _number_complaint(field, value)
        case "choice":
            return (
                None
                if value in (field.options or ())
                else f"expected one of {', '.join(field.options or ())}"
            )
        case _:
            return _text_complaint(field, value)


def _number_complaint(field: PromptField, value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "expected a number"
    return _bound_complaint(field, value, "")


def _text_complaint(field: PromptField, value: object) -> str | None:
    if not isinstance(value, str):
        return "expected a text"
    if len(value) > TEXT_LIMIT:
        return f"expected at most {TEXT_LIMIT} characters"
    if field.type == "date":
        return _date_complaint(value)
    if field.pattern is not None and re.fullmatch(field.pattern, value) is None:
        return f"expected a text that matches {field.pattern}"
    return _bound_complaint(field, len(value), " characters")


def _date_complaint(value: str) -> str | None:
    try:
        date.fromisoformat(value)
    except ValueError:
        return "expected a date as YYYY-MM-DD"
    return None


def _bound_complaint(field: PromptField, amount: float, unit: str) -> str | None:
    if field.min is not None and amount < field.min:
        return f"expected at least {field.min:g}{unit}"
    if field.max is not None and amount > field.max:
        return f"expected at most {field.max:g}{unit}"
    return None
