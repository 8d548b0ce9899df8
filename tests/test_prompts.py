"""Answers to a plugin's question: what fits its fields, in which order refusals come, and that one of many wins."""

import asyncio
from typing import Any

import msgspec
import pytest

from app.errors import (
    InputInvalid,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    SessionNotFound,
)
from app.sessions.lifecycle import State
from app.sessions.prompts import (
    TEXT_LIMIT,
    PromptField,
    accepted,
    entered_secretly,
    fitting_defaults,
)
from app.sessions.requests import CancelBody, ResumeBody
from app.sessions.session import Session
from app.sessions.store import Store
from tests.conftest import CALLER, asked, lead_to, rows, soon, walk

DOSE: dict[str, object] = {"id": "dose", "label": "Dose", "type": "number", "min": 0, "max": 5}
CODE: dict[str, object] = {"id": "code", "label": "Code", "type": "string", "secret": True}


def field(**given: Any) -> PromptField:
    return msgspec.convert({"id": "x", "label": "X"} | given, PromptField)


def prompt(session: Session) -> str:
    assert session.prompt is not None
    return session.prompt.prompt_id


async def asking(store: Store, *fields: dict[str, object]) -> Session:
    session = await walk(store, State.PLUGIN_PASS)
    return await store.record(session, asked(None, *(fields or (DOSE,))))


async def answered(store: Store, session: Session, **values: object) -> Session:
    body = ResumeBody(extra_inputs=values, prompt_id=prompt(session), operator="asmith")
    return await soon(store.answer(session.session_id, body, CALLER))


# What fits


@pytest.mark.parametrize(
    ("asked_for", "value"),
    [
        ({"type": "string"}, "HE"),
        ({"type": "text"}, "two\nlines"),
        ({"type": "string", "pattern": "[A-Z]{2}"}, "HE"),
        ({"type": "string", "min": 2, "max": 2}, "äö"),
        ({"type": "choice", "options": ["HE", "DAPI"]}, "DAPI"),
        ({"type": "date"}, "2026-02-28"),
        ({"type": "boolean"}, False),
        ({"type": "number"}, 0),
        ({"type": "number", "min": -1.5, "max": 1.5}, 1.5),
        ({"type": "string"}, "x" * TEXT_LIMIT),
    ],
)
def test_a_value_that_fits_is_kept_as_it_came(asked_for: dict[str, object], value: object) -> None:
    assert accepted((field(**asked_for),), {"x": value}) == {"x": value}


@pytest.mark.parametrize(
    ("asked_for", "value"),
    [
        ({"type": "string"}, 5),
        ({"type": "string"}, ["HE"]),
        ({"type": "string"}, {"a": "b"}),
        ({"type": "string"}, "x" * (TEXT_LIMIT + 1)),
        ({"type": "string", "pattern": "[A-Z]{2}"}, "HEx"),
        ({"type": "string", "pattern": "[A-Z]{2}"}, "HE\n"),
        ({"type": "string", "min": 2}, "a"),
        ({"type": "text", "max": 2}, "abc"),
        ({"type": "choice", "options": ["HE", "DAPI"]}, "he"),
        ({"type": "choice", "options": ["1"]}, 1),
        ({"type": "choice", "options": ["HE"]}, ["HE"]),
        ({"type": "date"}, "2026-02-29"),
        ({"type": "date"}, "28.2.2026"),
        ({"type": "date"}, "20260228"),
        ({"type": "date"}, "2026-W09-6"),
        ({"type": "date"}, "2026-02-28T10:00:00"),
        ({"type": "date"}, 20260228),
        ({"type": "boolean"}, 1),
        ({"type": "boolean"}, "true"),
        ({"type": "number"}, True),
        ({"type": "number"}, "5"),
        ({"type": "number", "min": 0}, -0.1),
        ({"type": "number", "max": 5}, 10**400),
    ],
)
def test_a_value_that_does_not_fit_is_named(asked_for: dict[str, object], value: object) -> None:
    with pytest.raises(InputInvalid) as refused:
        accepted((field(**asked_for),), {"x": value})
    assert refused.value.field == "x" and refused.value.message.startswith("X: ")


@pytest.mark.parametrize("values", [{}, {"x": None}, {"x": ""}, {"y": "given"}])
def test_a_required_value_must_be_there(values: dict[str, object]) -> None:
    with pytest.raises(InputInvalid, match="a value is required"):
        accepted((field(),), values)


@pytest.mark.parametrize("values", [{}, {"x": None}, {"x": ""}])
def test_an_optional_value_may_be_left_out(values: dict[str, object]) -> None:
    assert accepted((field(required=False, type="number"),), values) == {}


def test_a_default_stands_in_for_what_was_not_given() -> None:
    assert accepted((field(default="HE"), field(id="y", default="no")), {"y": "yes"}) == {
        "x": "HE",
        "y": "yes",
    }


def test_a_key_that_was_not_asked_for_is_ignored() -> None:
    assert accepted((field(),), {"x": "HE", "y": {"deep": []}}) == {"x": "HE"}


def test_the_first_field_that_does_not_fit_is_told() -> None:
    fields = (field(id="a"), field(id="b", type="number"), field(id="c", type="number"))
    with pytest.raises(InputInvalid) as refused:
        accepted(fields, {"a": "fine", "b": "no", "c": "no"})
    assert refused.value.field == "b"


def test_a_secret_value_is_checked_and_not_kept() -> None:
    secret = field(secret=True, pattern="[0-9]{4}")
    assert accepted((secret,), {"x": "4711"}) == {}
    with pytest.raises(InputInvalid) as refused:
        accepted((secret,), {"x": "password"})
    assert "password" not in refused.value.message


# What the store makes of an answer


async def test_an_answer_moves_the_session_and_is_told_without_its_values(store: Store) -> None:
    waiting = await asking(store)
    session = await answered(store, waiting, dose=3)
    assert session.state is State.PLUGIN_PASS and session.prompt is None
    frames = await store.frames_after(session.session_id, waiting.head_seq, 10)
    assert [frame.kind for frame in frames] == ["input_received", "phase"]
    told = msgspec.json.decode(frames[0].data)
    assert {key: told[key] for key in ("prompt_id", "plugin", "operator")} == {
        "prompt_id": prompt(waiting),
        "plugin": "staining",
        "operator": "asmith",
    }
    assert set(told) == {"kind", "seq", "at", "prompt_id", "plugin", "operator"}
    kept = rows(store.path, "SELECT status, operator, answer FROM prompts")
    assert kept == [("answered", "asmith", '{"dose":3}')]


async def test_an_accepted_answer_is_audited_and_a_refused_one_is_not(store: Store) -> None:
    session = await asking(store)
    with pytest.raises(InputInvalid):
        await answered(store, session, dose=99)
    await answered(store, session, dose=3)
    audited = rows(store.path, "SELECT operator, session_id, trace_id FROM audit WHERE command = 'resume'")
    assert audited == [("asmith", session.session_id, "trace-1")]


async def test_a_value_that_does_not_fit_leaves_the_session_waiting(store: Store) -> None:
    session = await asking(store)
    for values in ({"dose": 99}, {"dose": "much"}, {}):
        with pytest.raises(InputInvalid) as refused:
            await answered(store, session, **values)
        assert refused.value.field == "dose"
    assert await store.get(session.session_id) == session


async def test_an_answer_without_a_prompt_id_goes_to_the_open_prompt(store: Store) -> None:
    session = await asking(store)
    body = ResumeBody(extra_inputs={"dose": 1})
    assert (await store.answer(session.session_id, body, CALLER)).state is State.PLUGIN_PASS


async def test_an_answer_to_nobody_is_refused(store: Store) -> None:
    with pytest.raises(SessionNotFound):
        await store.answer("0" * 36, ResumeBody(), CALLER)


# The order of the refusals: each row breaks all the rules that come after the one that is told


@pytest.mark.parametrize("goal", [State.DONE, State.FAILED, State.ABORTED])
async def test_a_terminal_session_is_told_before_all_else(store: Store, goal: State) -> None:
    session = await walk(store, goal)
    body = ResumeBody(extra_inputs={"dose": "much"}, prompt_id="another")
    with pytest.raises(SessionAlreadyCompleted):
        await store.answer(session.session_id, body, CALLER)


@pytest.mark.parametrize("goal", [State.VALIDATING, State.RENDERING, State.PLUGIN_PASS, State.SYNC_QUEUED])
async def test_a_session_that_does_not_wait_is_told_before_its_prompt(store: Store, goal: State) -> None:
    session = await walk(store, goal)
    body = ResumeBody(extra_inputs={"dose": "much"}, prompt_id="another")
    with pytest.raises(SessionNotAwaitingInput):
        await store.answer(session.session_id, body, CALLER)


async def test_a_session_whose_cancel_is_recorded_does_not_wait(store: Store) -> None:
    session = await asking(store)
    await store.request_cancel(session.session_id, CancelBody(), CALLER)
    with pytest.raises(SessionNotAwaitingInput):
        await answered(store, session, dose=3)


async def test_another_prompt_is_told_before_the_values(store: Store) -> None:
    session = await asking(store)
    body = ResumeBody(extra_inputs={"dose": "much"}, prompt_id="another")
    with pytest.raises(PromptNotOpen) as refused:
        await store.answer(session.session_id, body, CALLER)
    assert refused.value.details == {"prompt_id": prompt(session)}


async def test_the_repeat_of_an_accepted_answer_shows_the_session_as_it_stands(store: Store) -> None:
    """Also when it went on, asks something else by now, or has ended; and it is written once."""
    first = await asking(store)
    session = await answered(store, first, dose=3)
    assert await answered(store, first, dose=3) == session
    session = await store.record(session, asked("second"))
    assert await answered(store, first, dose=3) == session
    session = await store.record(session, lead_to(State.FAILED))
    assert await answered(store, first, dose=3) == session
    assert rows(store.path, "SELECT count(*) FROM audit WHERE command = 'resume'") == [(1,)]


async def test_another_answer_to_a_settled_prompt_is_no_repeat(store: Store) -> None:
    first = await asking(store)
    session = await answered(store, first, dose=3)
    with pytest.raises(SessionNotAwaitingInput):
        await answered(store, first, dose=4)
    session = await store.record(session, asked("second"))
    with pytest.raises(PromptNotOpen):
        await answered(store, first, dose=4)


async def test_the_answer_of_another_session_is_no_repeat(store: Store) -> None:
    first, second = await asking(store), await asking(store)
    await answered(store, first, dose=3)
    body = ResumeBody(extra_inputs={"dose": 3}, prompt_id=prompt(first))
    with pytest.raises(PromptNotOpen):
        await store.answer(second.session_id, body, CALLER)


async def test_of_twenty_answers_at_once_one_wins(store: Store) -> None:
    session = await asking(store)
    answers = [answered(store, session, dose=number / 10) for number in range(20)]
    outcomes = await soon(asyncio.gather(*answers, return_exceptions=True))
    winners = [outcome for outcome in outcomes if isinstance(outcome, Session)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, SessionNotAwaitingInput)]
    assert (len(winners), len(losers)) == (1, 19)
    kinds = rows(store.path, "SELECT kind FROM events WHERE session_id = ?", session.session_id)
    assert kinds.count(("input_received",)) == 1
    won = rows(store.path, "SELECT answer FROM prompts")
    assert won == [(f'{{"dose":{outcomes.index(winners[0]) / 10}}}',)]


async def test_the_same_answer_twenty_times_at_once_is_one_answer(store: Store) -> None:
    session = await asking(store)
    answers = [answered(store, session, dose=3) for _ in range(20)]
    outcomes = await soon(asyncio.gather(*answers))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0].head_seq == session.head_seq + 2


async def test_an_answer_and_a_cancel_at_once_do_not_both_move(store: Store) -> None:
    session = await asking(store)
    cancelling = await store.request_cancel(session.session_id, CancelBody(), CALLER)
    outcomes = await soon(
        asyncio.gather(
            answered(store, session, dose=3),
            store.record(cancelling, lead_to(State.ABORTED)),
            return_exceptions=True,
        )
    )
    assert isinstance(outcomes[0], SessionNotAwaitingInput | SessionAlreadyCompleted)
    assert (await store.get(session.session_id)).state is State.ABORTED
    assert rows(store.path, "SELECT status FROM prompts") == [("withdrawn",)]


async def test_a_secret_value_is_nowhere_in_the_store(store: Store) -> None:
    session = await asking(store, DOSE, CODE)
    await answered(store, session, dose=3, code="correct horse")
    assert rows(store.path, "SELECT answer FROM prompts") == [('{"dose":3}',)]
    files = [path for path in store.path.parent.iterdir() if path.name.startswith(store.path.name)]
    assert len(files) > 2
    assert not [path for path in files if b"correct horse" in path.read_bytes()]


async def test_an_open_prompt_survives_a_restart(store: Store) -> None:
    session = await asking(store, DOSE, CODE)
    await store.close()
    await store.open()
    again = await store.get(session.session_id)
    assert again == session and prompt(again) == prompt(session)
    assert (await answered(store, again, dose=3, code="x")).state is State.PLUGIN_PASS
    await store.close()
    await store.open()
    assert (await answered(store, session, dose=3, code="x")).state is State.PLUGIN_PASS


@pytest.mark.parametrize(
    "told",
    [{"type": "choice"}, {"type": "choice", "options": []}, {"type": "number", "min": 2, "max": 1}],
)
def test_a_question_that_nobody_can_answer_is_no_question(told: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        field(**told)


def test_what_another_try_offers_is_bounded() -> None:
    fields = tuple(field(id=name, type="text") for name in "abc")
    values: dict[str, object] = dict.fromkeys("abc", "x" * 100)
    offered = fitting_defaults(fields, values, room=250)
    assert [one.default is not None for one in offered] == [True, True, False]


def test_what_was_entered_secretly_is_checked_and_takes_its_default() -> None:
    fields = (field(secret=True, default="guest", type="string"),)
    assert entered_secretly(fields, {}) == {"x": "guest"}
    assert accepted(fields, {}) == {}
    with pytest.raises(InputInvalid):
        entered_secretly(fields, {"x": {"not": "a text"}})
