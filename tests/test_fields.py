"""What fits a field, and that the pattern of a plugin costs little whatever it is."""

import time

import msgspec
import pytest

from app.errors import InputInvalid
from app.sessions.prompts import TEXT_LIMIT, PromptField, accepted
from app.settings import Field
from app.steps import fields


def declared(kind: str) -> Field:
    return msgspec.convert({"id": "x", "label": "X", "type": kind, "options": ["HE", "DAPI"]}, Field)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("string", "a b"), ("string", "שלום"), ("text", "a\nb\t\u2066c"), ("number", 0), ("number", -1.5),
        ("number", 10**400), ("boolean", False), ("date", "2024-02-29"), ("choice", "HE"),
    ],
)  # fmt: skip
def test_a_value_of_its_type_fits(kind: str, value: object) -> None:
    assert fields.misfit(declared(kind), value) is None


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("string", "a\nb"), ("string", "a\0"), ("string", "a\u202eb"), ("string", "\ud800"), ("string", 5),
        ("text", "\ud800"), ("text", None), ("number", True), ("number", float("nan")), ("number", float("inf")),
        ("number", "5"), ("boolean", 1), ("boolean", "yes"), ("date", "2025-02-29"), ("date", "20240229"),
        ("date", "2024-W09-4"), ("date", " 2024-02-29"), ("date", "2024-02-29\n"), ("date", "٢٠٢٤-02-29"),
        ("date", 20240229), ("choice", "he"), ("choice", True), ("choice", ["HE"]), ("choice", {"HE": 1}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_value_is_told_without_the_value(kind: str, value: object) -> None:
    problem = fields.misfit(declared(kind), value)
    assert problem is not None
    assert str(value) not in problem


def test_of_many_options_some_are_named() -> None:
    field = Field(id="x", label="X", type="choice", options=tuple(f"option {n}" for n in range(10_000)))
    assert "option 1," in (fields.misfit(field, "none") or "")
    assert len(fields.misfit(field, "none") or "") < 500


def asking(pattern: str) -> PromptField:
    return PromptField(id="x", label="X", pattern=pattern)


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        (r"[A-Z]{2}-\d+", "AB-12", "AB-12x"),
        ("^[A-Z]{2}$", "AB", "ABC"),
        ("a|ab", "ab", "abb"),
        (r"\p{L}+", "Zoë", "Z0"),
        ("(?i)he", "HE", "HEM"),
    ],
)
def test_a_pattern_must_match_the_whole_text(pattern: str, fits: str, does_not: str) -> None:
    assert accepted((asking(pattern),), {"x": fits}) == {"x": fits}
    with pytest.raises(InputInvalid):
        accepted((asking(pattern),), {"x": does_not})


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|aa)+", "(a*)*", "(.*a){30}", "(a?){500}a{500}", "((a+)+)+b", "(?:[a-c]?.?){1000}x"],
)
def test_a_pattern_that_backtracking_would_not_finish_with_is_answered(pattern: str) -> None:
    field, began = asking(pattern), time.monotonic()
    with pytest.raises(InputInvalid):
        accepted((field,), {"x": "a" * (TEXT_LIMIT - 1) + "!"})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "pattern", ["(", "a{2,1}", "(?=a)b", r"(a)\1", "a" * 200_000, r"\pL{1000}", "\ud800"]
)
def test_a_pattern_that_could_not_be_matched_in_time_makes_no_field(pattern: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"id": "x", "label": "X", "pattern": pattern}, PromptField)
