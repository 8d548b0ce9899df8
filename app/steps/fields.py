"""Whether a value is what a field, or a question of a template, asks for. Pure.

Fields are those of a README and of a plugin's prompt; questions are answered as Copier will take the answer, and
narrower: what it would take for something surprising is refused. What is wrong is told in words that name neither
the field nor the value, since a value may be secret. Values are plain ones that JSON can hold; whether one may be
left out, and what becomes of it, is left to the callers.
"""

import datetime
import math
import re
import unicodedata

from app.settings import Field
from app.steps import casting
from app.steps.casting import QuestionType
from app.steps.templates import Question, encodable, shown

_NAMED = 20
"""As many options are listed to who chose none of them."""

# Overrides and isolates reorder what stands around them: a name that shows as another one.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def misfit(field: Field, value: object) -> str | None:
    """What is wrong with `value`; None where it fits the field."""
    match field.type:
        case "boolean":
            return None if isinstance(value, bool) else "expected true or false"
        case "number":
            return None if _is_number(value) else "expected a number"
        case "choice":
            options = field.options or ()
            return None if value in options else f"expected one of {_listed(options)}"
        case "date":
            return None if _is_date(value) else "expected a date as YYYY-MM-DD"
        case "text":
            return _not_storable(value) if isinstance(value, str) else "expected a text"
        case "string":
            return unreadable(value) if isinstance(value, str) else "expected a text"


def _not_storable(text: str) -> str | None:
    return None if encodable(text) else "holds half of a character"


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_date(value: object) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        return False
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _listed(options: tuple[str, ...]) -> str:
    return ", ".join(options[:_NAMED]) + (", ..." if len(options) > _NAMED else "")


def unreadable(text: str, *, lines: bool = False) -> str | None:
    """What keeps people from reading `text` as it is; more than one line is fine with `lines`."""
    if problem := _not_storable(text):
        return problem
    for character in text:
        category = unicodedata.category(character)
        if character in _REORDERING:
            return "holds an invisible mark that reorders text"
        if character in "\n\r\t" and lines:
            continue
        if category in ("Cc", "Zl", "Zp"):
            return f"holds the control character {shown(character)}"
    return None


def wrong_answer(question: Question, answer: object) -> str | None:
    """What is wrong with `answer`; None where it fits the question, or only Copier can tell."""
    if question.computed:
        return None
    if not question.multiselect:
        return _wrong_choice(question, answer)
    if not isinstance(answer, list):
        return "expected a list"
    return next((wrong for one in answer if (wrong := _wrong_choice(question, one))), None)


def _wrong_choice(question: Question, answer: object) -> str | None:
    kind = question.type
    if not _is_plain(kind, answer):
        return f"expected {kind}"
    try:
        taken = casting.cast(kind, answer)
    except ValueError as error:
        return str(error)
    if isinstance(taken, float) and not math.isfinite(taken):
        return "expected a number"
    if question.choices and not any(_same(taken, casting.cast(kind, one.value)) for one in question.choices):
        return f"expected one of {_listed(tuple(choice.label for choice in question.choices))}"
    return None


def _is_plain(kind: QuestionType, answer: object) -> bool:
    """Whether what Copier makes of the answer surprises nobody: it takes [0] for true, and 1.5 for 1."""
    match kind, answer:
        case (("yaml" | "json"), _) | ("bool", bool()):
            return True
        case "bool", str():
            return answer.strip().lower() in ("1", "0", *casting.YES, *casting.NO)
        case "bool", int() | float():
            return answer in (0, 1)
        case _, bool():
            return False
        case "int", float():
            return answer.is_integer()
        case "path", _:
            return isinstance(answer, str)
    return isinstance(answer, str | int | float)


def _same(one: object, other: object) -> bool:
    # To Python true equals 1.
    return one == other and isinstance(one, bool) == isinstance(other, bool)
