"""The store against the model of it in `model.py`, which says what the contract says, and nothing of how.

Random walks through all verbs of a real store on a real file, with good restarts, kills in the middle of a write,
and older copies put in its place. After each step every row, every event, every question and every follower must
be as the model has them; what is refused must be refused with the right word, and leave no trace.
"""

import asyncio
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.exc import IntegrityError

from app import database
from app.errors import (
    CursorAhead,
    IdempotencyKeyReused,
    InputInvalid,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    SessionNotFound,
    SessionNotRetryable,
    StoreBroken,
    TooLateToCancel,
)
from app.sessions import consistency, lifecycle
from app.sessions import store as store_module
from app.sessions.feed import Feed, Stopping
from app.sessions.lifecycle import IllegalMove, Outcome, State
from app.sessions.moves import DestinationHeld, Moved
from app.sessions.requests import CancelBody, CreateBody, ResumeBody
from app.sessions.session import Caller, Query, Session
from app.sessions.store import Store
from tests.conftest import SECONDS, project_body, run_body
from tests.survival.happenings import OUTCOMES, RIGHT, SECRET, along, by_hand, outcome_of
from tests.survival.model import EDGES, LIVE, ROAD, STATES, WRONG, Model, Told, fold
from tests.survival.shares import SEED, SHARE

WALKS = round(200 * min(SHARE * 2, 1))
STEPS = 50
AGAIN = f"SURVIVAL_SHARE={SHARE} SURVIVAL_SEED={SEED} pytest -s tests/survival/test_model.py"

T = TypeVar("T")

BEFORE_QUESTIONS = ("validating", "rendering")
# An underscore is a wildcard of LIKE.
LABELS = ("Embryos", "Embryos, 100% alive", "embryos_2", "E\\x")
KEYS = (None, None, "key-1", "key-2")
CALLERS = (Caller(principal="local", trace_id="t1"), Caller(principal="other", trace_id="t2"))


class Deed(NamedTuple):
    """A verb of the store, and what the model makes of it, given what the store came to."""

    done: Callable[[Store], Awaitable[Any]]
    told: Callable[[Any], Told]


class Copy(NamedTuple):
    """A store that was closed in good order, as somebody put it aside."""

    data: bytes
    model: Model
    epoch: str
    head: int


class Follower(NamedTuple):
    """Who follows one session live, from a cursor, and what it was given so far."""

    session_id: str
    cursor: int
    given: list[dict[str, Any]]
    task: asyncio.Task[None]
    heard: asyncio.Event


class Attempt(NamedTuple):
    """An answer: to which question, with what; `asks`: after another question, if nothing is asked now."""

    asks: bool
    named: str | None
    value: str
    operator: str | None


seen_kinds: Counter[str] = Counter()
"""How often each rule was tried, in all walks."""

REFUSALS = (
    DestinationHeld,
    IdempotencyKeyReused,
    IllegalMove,
    InputInvalid,
    IntegrityError,
    Moved,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    TooLateToCancel,
)

numbers = st.integers(0, 11)
outcomes = st.tuples(st.sampled_from(OUTCOMES), numbers)

attempts = st.builds(
    Attempt,
    asks=st.booleans(),
    named=st.sampled_from(("newest", "newest", "oldest", "nobody's", None)),
    value=st.sampled_from(("right", "right", "other", "another secret", "wrong", "nothing")),
    operator=st.sampled_from((None, "bjones")),
)
queries = st.builds(
    Query,
    state=st.lists(st.sampled_from(State), max_size=4).map(tuple),
    kind=st.sampled_from((None, None, "run", "project")),
    equipment=st.sampled_from((None, None, None, "CONFOCAL_01", "ELSEWHERE")),
    project=st.sampled_from((None, None, "PROJ-0", "PROJ-1")),
    operator=st.sampled_from((None, None, "asmith")),
    label_prefix=st.sampled_from((None, "Embryos", "Embryos, 100%", "embryos_", "%", "E\\", "")),
    limit=st.integers(1, 5),
)
LOOKS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "search": {"query": queries, "since": st.none() | numbers, "until": st.none() | numbers},
    "look": {"number": numbers},
    "look_around": {},
    "resist": {"number": numbers},
    "read_history": {"number": numbers, "cursor": st.integers(-2, 40), "limit": st.integers(1, 7)},
}
"""What can be looked at, and what is to be chosen for it."""


class Walk(RuleBasedStateMachine):
    empty: Path

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(dir=self.empty.parent))
        self.path = self.folder / "store.sqlite3"
        shutil.copyfile(self.empty, self.path)
        self.now = datetime(2026, 1, 2, tzinfo=UTC)
        self.model = Model()
        self.broken: list[StoreBroken] = []
        self.latest: dict[str, Session] = {}
        self.seen: list[Session] = []
        self.copies: list[Copy] = []
        self.epochs: set[str] = set()
        self.followers: list[Follower] = []
        self.noted = 0
        self.steps_since_start = 0
        self.sound = False
        seen_kinds["walks"] += 1
        self.open()
        self.expect_another_epoch()

    # What a step is made of

    @property
    def at(self) -> str:
        return _at(self.now)

    def begin(self, kind: str) -> None:
        seen_kinds[kind] += 1
        self.sound = False
        self.steps_since_start += 1
        self.now += timedelta(seconds=1)

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, SECONDS))

    def do(self, *deeds: Deed) -> None:
        """All of them at once; what comes of them is what the model says comes of one after the other."""

        async def at_once() -> list[Any]:
            return await asyncio.gather(*(deed.done(self.store) for deed in deeds), return_exceptions=True)

        for deed, outcome in zip(deeds, self.run(at_once()), strict=True):
            try:
                told = deed.told(outcome)
            except REFUSALS as refusal:
                _compare(outcome, refusal)
            else:
                if isinstance(outcome, BaseException):
                    raise outcome
                self.meet(outcome, told)

    def meet(self, session: Session, told: Told) -> None:
        """A session that the store gave is as the model has it."""
        assert _shown(session) == _expected(told)
        self.latest[session.session_id] = session
        self.seen.append(session)

    def create_deed(
        self, body: CreateBody, caller: Caller, key: str | None, retry_of: str | None = None
    ) -> Deed:
        async def done(store: Store) -> Session:
            session, is_new = await store.create(body, caller, idempotency_key=key, retry_of=retry_of)
            assert is_new == (session.session_id not in self.model.sessions)
            return session

        def told(made: Any) -> Told:
            session_id = made.session_id if isinstance(made, Session) else ""
            return self.model.create(self.at, session_id, body, caller, key, retry_of)

        return Deed(done, told)

    def record_deed(self, session: Session, *happened: Outcome) -> Deed:
        return Deed(
            lambda store: store.record(session, *happened),
            lambda _: self.model.record(self.at, session, happened),
        )

    def answer_deed(self, session_id: str, body: ResumeBody, caller: Caller) -> Deed:
        return Deed(
            lambda store: store.answer(session_id, body, caller),
            lambda _: self.model.answer(self.at, session_id, body, caller),
        )

    def cancel_deed(self, session_id: str, body: CancelBody, caller: Caller) -> Deed:
        return Deed(
            lambda store: store.request_cancel(session_id, body, caller),
            lambda _: self.model.cancel(self.at, session_id, body, caller),
        )

    def pick(self, number: int, *states: str) -> Told:
        found = self.model.among(*states)
        return found[-1 - number % len(found)]

    def some(self, *states: str) -> bool:
        return bool(self.model.among(*states))

    @initialize(
        cached=st.sampled_from((700, 3000, 8 * 1024 * 1024)),
        ways=st.lists(st.lists(numbers, max_size=6), min_size=2, max_size=4),
    )
    def come_to_a_running_service(self, cached: int, ways: list[list[int]]) -> None:
        # A history that is longer than that is read from memory in part, and in part from the file.
        store_module.CACHED_BYTES = cached
        for number, way in enumerate(ways):
            self.create(number == 0, LABELS[number], "asmith", KEYS[-number], CALLERS[0])
            if way:
                self.live_on(0, way)

    # Creating

    @rule(
        project=st.booleans(),
        label=st.sampled_from(LABELS),
        person=st.sampled_from(("asmith", "bjones")),
        key=st.sampled_from(KEYS),
        caller=st.sampled_from(CALLERS),
    )
    def create(self, project: bool, label: str, person: str, key: str | None, caller: Caller) -> None:
        self.begin("create")
        make = project_body if project else run_body
        self.do(self.create_deed(make(label=label, operator=person), caller, key))

    @precondition(lambda self: self.some(*STATES))
    @rule(
        number=numbers, key=st.sampled_from(KEYS), how=st.sampled_from(("same", "another", "retry", "retry"))
    )
    def create_again(self, number: int, key: str | None, how: str) -> None:
        """With a key that was used, for the same body or another; or by trying again."""
        self.begin("create again")
        if how == "retry" or not self.model.keys:
            self.retry(number, key)
        else:
            self.use_key_again(number, how == "same")

    def use_key_again(self, number: int, same: bool) -> None:
        (principal, key), (_, session_id) = [*self.model.keys.items()][number % len(self.model.keys)]
        told = self.model.sessions[session_id]
        body = told.body if same else msgspec.structs.replace(told.body, objective="Another.")
        [caller] = [caller for caller in CALLERS if caller.principal == principal]
        self.do(self.create_deed(body, caller, key, told.row["retry_of"]))

    def retry(self, number: int, key: str | None) -> None:
        told = self.pick(number, *STATES)
        if told.state in ("failed", "aborted"):
            self.meet(self.run(self.store.retryable(told.session_id)), told)
            own = [one for (_, one), (_, made) in self.model.keys.items() if made == told.session_id]
            key = own[0] if own and number % 2 else key
            self.do(self.create_deed(told.body, CALLERS[0], key, told.session_id))
        else:
            with pytest.raises(SessionNotRetryable):
                self.run(self.store.retryable(told.session_id))

    # Moving

    @precondition(lambda self: self.some(*ROAD))
    @rule(number=numbers, picks=st.lists(numbers, min_size=1, max_size=6), together=st.booleans())
    def go_along(self, number: int, picks: list[int], together: bool) -> None:
        """Along the road, by one transaction or by many."""
        self.begin("go along")
        told = self.pick(number, *ROAD)
        happened = along(told, picks)
        for group in [happened] if together else [[outcome] for outcome in happened]:
            self.do(self.record_deed(self.latest[told.session_id], *group))

    @precondition(lambda self: self.some(*LIVE))
    @rule(number=numbers, picks=st.lists(numbers, min_size=1, max_size=4))
    def live_on(self, number: int, picks: list[int]) -> None:
        """Whatever a session does in its state, plugins and answers and all."""
        self.begin("live on")
        session_id = self.pick(number, *LIVE).session_id
        for pick in picks:
            told = self.model.sessions[session_id]
            kind = {
                "plugin_pass": ("PluginRan", "Asked", "Transformed")[pick % 3],
                "input_required": "Answered",
            }
            if told.live:
                outcome = outcome_of(kind.get(told.state) or ROAD[told.state], told, pick)
                self.do(self.record_deed(self.latest[session_id], outcome))

    @precondition(lambda self: self.some(*STATES))
    @rule(number=numbers, happened=st.lists(outcomes, min_size=1, max_size=3))
    def record_anything(self, number: int, happened: list[tuple[str, int]]) -> None:
        """Legal or not, alone or with others before and after it."""
        self.begin("record anything")
        told = self.pick(number, *STATES)
        made = [outcome_of(kind, told, pick) for kind, pick in happened]
        self.do(self.record_deed(self.latest[told.session_id], *made))

    @precondition(lambda self: bool(self.stale()))
    @rule(number=numbers, pick=numbers)
    def record_what_was_seen_long_ago(self, number: int, pick: int) -> None:
        self.begin("record stale")
        session = self.stale()[-1 - number % len(self.stale())]
        kinds = [kind for state, kind in EDGES if state == session.state] or ["Warned"]
        outcome = outcome_of(kinds[pick % len(kinds)], self.model.sessions[session.session_id], pick)
        self.do(self.record_deed(session, outcome))

    def stale(self) -> list[Session]:
        """What was seen of sessions that have moved, or been cancelled, since."""
        now = ((session, self.model.sessions[session.session_id]) for session in self.seen)
        return [
            session
            for session, told in now
            if told.state != session.state or (told.row["cancel"] and session.cancel is None)
        ]

    @precondition(lambda self: self.some(*LIVE))
    @rule(
        number=numbers,
        happened=st.lists(outcomes, min_size=1, max_size=3),
        others=st.permutations(("record", "record", "cancel", "answer", "create")),
    )
    def race(self, number: int, happened: list[tuple[str, int]], others: Sequence[str]) -> None:
        """All at once, each of them having seen the same."""
        self.begin("race")
        told = self.pick(number, *LIVE)
        session, pick = self.latest[told.session_id], happened[0][1]
        made = [outcome_of(kind, told, pick) for kind, pick in happened]
        deeds = {
            "cancel": self.cancel_deed(told.session_id, CancelBody(), CALLERS[0]),
            "answer": self.answer_deed(told.session_id, ResumeBody(extra_inputs={"dose": 3}), CALLERS[1]),
            "create": self.create_deed(run_body(), CALLERS[0], KEYS[pick % 4]),
        }
        straight = outcome_of(ROAD.get(told.state, "Answered"), told, pick)
        crowd = [self.record_deed(session, straight), self.record_deed(session, *made)]
        crowd += [deeds[name] for name in others[: pick % 3] if name in deeds]
        self.do(*(reversed(crowd) if pick % 2 else crowd))

    # Asking and answering

    @precondition(lambda self: self.some(*BEFORE_QUESTIONS, "plugin_pass", "input_required"))
    @rule(number=numbers, pick=numbers, attempts=st.lists(attempts, min_size=2, max_size=5))
    def converse(self, number: int, pick: int, attempts: list[Attempt]) -> None:
        """A plugin asks, and its operator answers: right or wrong, once or twice, and is asked again."""
        self.begin("converse")
        told = self.pick(number, *BEFORE_QUESTIONS, "plugin_pass", "input_required")
        session_id = told.session_id
        for state in BEFORE_QUESTIONS:
            if self.model.sessions[session_id].state == state:
                self.do(self.record_deed(self.latest[session_id], outcome_of(ROAD[state], told, pick)))
        for attempt in attempts:
            told = self.model.sessions[session_id]
            if told.state == "plugin_pass" and (attempt.asks or not told.questions):
                self.do(self.record_deed(self.latest[session_id], outcome_of("Asked", told, pick)))
            self.try_to_answer(session_id, attempt)

    @precondition(lambda self: bool(self.asked()))
    @rule(number=numbers, attempt=attempts)
    def answer_late(self, number: int, attempt: Attempt) -> None:
        """Whatever became meanwhile of a session that had asked."""
        self.begin("answer late")
        self.try_to_answer(self.asked()[-1 - number % len(self.asked())].session_id, attempt)

    def asked(self) -> list[Told]:
        return [told for told in self.model.sessions.values() if told.questions]

    def try_to_answer(self, session_id: str, attempt: Attempt) -> None:
        questions = self.model.sessions[session_id].questions
        names = [*questions] or ["nobody's"]
        name = {"newest": names[-1], "oldest": names[0]}.get(attempt.named or "", attempt.named)
        question = questions.get(name or names[-1]) or questions.get(names[-1])
        given: dict[str, object] = {"nobody asked": SECRET}
        for field in question["fields"] if question and attempt.value != "nothing" else ():
            right, other = RIGHT[field["id"]]
            values = {"right": right, "other": other, "wrong": WRONG[field["id"]]}
            values["another secret"] = other if field.get("secret") else right
            given[field["id"]] = values[attempt.value]
        body = ResumeBody(extra_inputs=given, prompt_id=name, operator=attempt.operator)
        self.do(self.answer_deed(session_id, body, CALLERS[attempt.value == "other"]))

    # Ending

    @precondition(lambda self: self.some(*STATES))
    @rule(number=numbers, discard=st.booleans(), operator=st.sampled_from((None, "bjones")))
    def cancel(self, number: int, discard: bool, operator: str | None) -> None:
        self.begin("cancel")
        told = self.pick(number, *STATES)
        body = CancelBody(discard_files=discard, operator=operator)
        self.do(self.cancel_deed(told.session_id, body, CALLERS[number % 2]))

    @precondition(lambda self: self.some(*LIVE))
    @rule(number=numbers, pick=numbers, kind=st.sampled_from(("Cancelled", "Failed")))
    def end(self, number: int, pick: int, kind: str) -> None:
        self.begin(kind)
        told = self.pick(number, *LIVE)
        self.do(self.record_deed(self.latest[told.session_id], outcome_of(kind, told, pick)))

    # Marks

    @precondition(lambda self: self.some(*LIVE))
    @rule(number=numbers, driven=st.sampled_from((None, False, True)))
    def mark(self, number: int, driven: bool | None) -> None:
        """What the service notes from time to time, and forgets."""
        self.begin("mark")
        if driven is None:
            self.note(number)
        else:
            told = self.pick(number, *LIVE)
            self.run((self.store.mark_driven if driven else self.store.mark_idle)(told.session_id))
            self.model.set(told.session_id, driven=int(driven))

    def note(self, number: int) -> None:
        self.forget_partial(number)
        root = f"/nowhere/{number % 2}"
        assert self.run(self.store.knows_root(Path(root))) == (root in self.model.roots)
        self.run(self.store.note_root(Path(root)))
        self.model.roots.add(root)
        self.run(self.store.note_progress())
        self.note_head()

    def note_head(self) -> None:
        self.noted = len(self.model.history)

    def forget_partial(self, number: int) -> None:
        kept = [told for told in self.model.sessions.values() if told.row["partial_path"]]
        until = _at(self.now - timedelta(seconds=number))
        old = [told.session_id for told in kept if told.row["ended_at"] < until]
        assert {one.session_id for one in self.run(self.store.partials(ended_before=until))} == {*old}
        for session_id in old[:1]:
            self.run(self.store.forget_partial(session_id))
            self.model.set(session_id, partial_path=None)

    # Looking

    @precondition(lambda self: self.some(*STATES))
    @rule(
        how=st.sampled_from(("search", "search", "look", "look_around", "read_history", "resist")),
        data=st.data(),
    )
    def look_at_it(self, how: str, data: st.DataObject) -> None:
        self.begin(how.replace("_", " "))
        arguments = {name: data.draw(drawn, name) for name, drawn in LOOKS[how].items()}
        getattr(self, how)(**arguments)

    def search(self, query: Query, since: int | None, until: int | None) -> None:
        """All pages of a listing; a session that comes meanwhile is on none of them."""
        times = {name: self.ago(number) for name, number in (("since", since), ("until", until))}
        query = msgspec.structs.replace(query, **times)
        expected, found = self.model.search(query), []
        while True:
            page, following = self.run(self.store.search(query))
            assert len(page) <= query.limit
            found += [session.session_id for session in page]
            if following is None:
                break
            assert following == found[-1] and len(page) == query.limit and len(found) < len(expected)
            query = msgspec.structs.replace(query, before=following)
            self.do(self.create_deed(run_body(label="Embryos"), CALLERS[0], None))
        assert found == expected

    def ago(self, number: int | None) -> str | None:
        """The time at which one of the sessions was created, or some time before now."""
        if number is None:
            return None
        made = [told.row["created_at"] for told in self.model.sessions.values()]
        return str(made[number % len(made)]) if number % 3 else _at(self.now - timedelta(seconds=number))

    def look(self, number: int) -> None:
        told, store = self.pick(number, *STATES), self.store
        self.meet(self.run(store.get(told.session_id)), told)
        own = told.session_id
        runs = [(run.ordinal, run.plugin, run.status) for run in self.run(store.plugin_runs(own))]
        assert runs == [(run["ordinal"], run["plugin"], run["status"]) for run in told.runs]
        lines = self.run(store.log_after(own, 0, 1000))
        assert [(line.source, line.level, line.text) for line in lines] == told.lines
        tail = self.run(store.log_after(own, lines[number % len(lines)].line, 2)) if lines else []
        assert tail == lines[number % len(lines) + 1 :][:2] if lines else True
        assert self.run(store.settled_prompts(own)) == {
            name for name, question in told.questions.items() if question["status"] != "open"
        }
        answered = {one.prompt_id: (one.answer, one.operator) for one in self.run(store.answered(own))}
        assert answered == {
            name: (question["answer"], question["operator"])
            for name, question in told.questions.items()
            if question["status"] == "answered"
        }
        if told.manifest is not None:
            assert self.run(store.manifest(own)) == told.manifest
        with pytest.raises(SessionNotFound):
            self.run(store.get("0" * 36))

    def look_around(self) -> None:
        store, live = self.store, self.model.among(*LIVE)
        everyone = self.model.sessions.values()
        shown = [told.session_id for told in everyone if told.live or told.state == "failed"]
        assert [session.session_id for session in self.run(store.operations())] == shown
        assert [session.session_id for session in self.run(store.unfinished())] == [
            told.session_id for told in live
        ]
        held = {told.row["destination_key"] for told in live} - {None}
        assert self.run(store.held()) == held
        counts = Counter(told.state for told in everyone)
        counts["partial"] = sum(told.row["partial_path"] is not None for told in everyone)
        counts["blocked"] = sum(told.row["blocked_on"] is not None for told in live)
        assert Counter(self.run(store.counts())) == counts

    def read_history(self, number: int, cursor: int, limit: int) -> None:
        """From any cursor, a negative one counted from the end, in pages of any size."""
        told = self.pick(number, *STATES)
        head = len(told.frames)
        cursor = cursor % (head + 2) if cursor >= 0 else max(head + cursor, 0)
        session = self.latest[told.session_id]
        if cursor > head:
            with pytest.raises(CursorAhead):
                self.store.head_seq(session, cursor)
        assert self._pages(told.session_id, cursor, limit) == told.frames[cursor:]
        place = cursor % (len(self.model.history) + 1)
        position = self.positions[place - 1] if place else 0
        frames = self.run(self.store.feed_after(position, limit))
        found = [(frame.session_id, json.loads(frame.data)) for frame in frames]
        assert found == self.model.history[place:][:limit]

    def _pages(self, session_id: str, cursor: int, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while page := self.run(self.store.frames_after(session_id, cursor, limit)):
            assert len(page) <= limit
            found += [json.loads(frame.data) for frame in page]
            cursor = page[-1].seq
        return found

    @precondition(lambda self: self.some(*STATES) and len(self.followers) < 4)
    @rule(number=numbers, cursor=numbers)
    def follow(self, number: int, cursor: int) -> None:
        """Somebody follows one session from now on, over restarts, too."""
        self.begin("follow")
        told = self.pick(number, *STATES)
        cursor = cursor % (len(told.frames) + 1)
        if told.live or cursor < len(told.frames):
            self.followers.append(self._following(told.session_id, cursor, []))

    def _following(self, session_id: str, cursor: int, given: list[dict[str, Any]]) -> Follower:
        heard, feed = asyncio.Event(), self.feed

        async def follow() -> None:
            try:
                async for page in feed.follow(session_id, cursor + len(given)):
                    given.extend(json.loads(frame.data) for frame in page)
                    heard.set()
            except Stopping:
                return

        return Follower(session_id, cursor, given, self.loop.create_task(follow()), heard)

    # Stopping and starting

    def open(self) -> None:
        clock: Callable[[], datetime] = lambda: self.now  # noqa: E731
        self.store = Store(f"sqlite:///{self.path}", on_broken=self.broken.append, clock=clock)
        self.epoch = self.run(self.store.open()).epoch
        self.feed = Feed(self.store)
        self.eye = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        self.eye.row_factory = sqlite3.Row
        self.steps_since_start, self.positions = 0, list[int]()
        self.note_head()
        self.followers = [self._following(*follower[:3]) for follower in self.followers]

    def close(self) -> None:
        self.feed.stop()
        if self.followers:
            self.run(asyncio.wait([follower.task for follower in self.followers]))
        for follower in self.followers:
            follower.task.result()
        self.eye.close()
        self.run(self.store.close())
        assert self.broken == []

    def expect_another_epoch(self) -> None:
        assert self.epoch not in self.epochs
        self.epochs.add(self.epoch)

    def take_stock(self) -> None:
        found = self.run(self.store.take_stock())
        expected = self.model.take_stock()
        assert [session.session_id for session in found] == [told.session_id for told in expected]
        for session, told in zip(found, expected, strict=True):
            self.meet(session, told)

    def take_up(self, alone: int) -> None:
        """As a service takes up what it found: some at once, or one of them alone before the others."""
        for number, told in enumerate(self.model.among(*ROAD)[:4]):
            recovered = lifecycle.Recovered(alone=number == alone)
            self.do(self.record_deed(self.latest[told.session_id], recovered))

    @precondition(lambda self: self.steps_since_start > 6)
    @rule(held=st.booleans(), alone=st.integers(0, 5), exchanged=st.booleans())
    def restart(self, held: bool, alone: int, exchanged: bool) -> None:
        """In good order, while somebody takes a copy, and perhaps puts it in the place of the original.

        `held`: the next service drives nothing.
        """
        self.begin("restart")
        epoch = self.epoch
        self.run(self.store.mark_all_idle())
        self.model.be_idle()
        self.close()
        self.note_head()
        assert not self.beside("-wal").exists()
        data, head = self.path.read_bytes(), len(self.model.history)
        self.copies.append(Copy(data, self.model.copied(), epoch, head))
        if exchanged:
            self.beside(".copy").write_bytes(data)
            self.beside(".copy").replace(self.path)
        self.open()
        if exchanged:
            self.expect_another_epoch()
        assert exchanged or self.epoch == epoch
        if not held:
            self.take_stock()
            self.take_up(alone)

    @precondition(lambda self: self.steps_since_start > 6)
    @rule(alone=st.integers(0, 5))
    def crash(self, alone: int) -> None:
        """Killed while nothing was being written."""
        self.begin("crash")
        epoch, noted = self.epoch, self.noted
        left = self.left()
        self.close()
        self.leave(left)
        assert self.noted == noted
        self.open()
        assert self.epoch == epoch
        self.take_stock()
        self.take_up(alone)

    @precondition(lambda self: self.steps_since_start > 6 and self.some(*LIVE))
    @rule(
        number=numbers,
        picks=st.lists(numbers, min_size=1, max_size=4),
        share=st.integers(0, 10),
    )
    def crash_in_a_write(self, number: int, picks: list[int], share: int) -> None:
        """Killed when only a part of what was written of one transaction was in the log, or just all of it."""
        self.begin("crash in a write")
        told, epoch = self.pick(number, *LIVE), self.epoch
        kinds = [kind for state, kind in EDGES if state == told.state]
        happened = along(told, picks) or [outcome_of(kinds[picks[0] % len(kinds)], told, picks[0])]
        before, length = self.model.copied(), self.wal_bytes()
        known = dict(self.latest), list(self.seen)
        followers = [one._replace(given=list(one.given)) for one in self.followers]
        self.do(self.record_deed(self.latest[told.session_id], *happened))
        self.every_follower_was_given_all()
        left = self.left()
        self.close()
        if share < 10:
            kept = length + (len(left["-wal"]) - length) * share // 10
            left["-wal"] = left["-wal"][:kept]
            # Nobody was told of it, and those who follow have not been given it.
            self.model, (self.latest, self.seen), self.followers = before, known, followers
        self.leave(left)
        self.open()
        assert self.epoch == epoch
        self.take_stock()

    @precondition(lambda self: self.steps_since_start > 0 and bool(self.copies))
    @rule(choices=st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=2))
    def put_older_copies_back(self, choices: list[tuple[int, bool]]) -> None:
        """By hand, between two runs of the service: over the file, or as another one in its place."""
        self.begin("put back")
        for number, in_place in choices:
            self.put_back(self.copies[-1 - number % len(self.copies)], in_place=in_place)
        self.latest = self.run(self.store.known([*self.model.sessions]))
        self.take_stock()

    def put_back(self, aside: Copy, *, in_place: bool) -> None:
        self.close()
        self.note_head()
        another = not in_place or aside.epoch != self.epoch or aside.head < self.noted
        if in_place:
            self.path.write_bytes(aside.data)
        else:
            self.beside(".copy").write_bytes(aside.data)
            self.beside(".copy").replace(self.path)
        self.model, self.followers, self.seen = aside.model.copied(), [], []
        self.open()
        if another:
            self.expect_another_epoch()

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def wal_bytes(self) -> int:
        log = self.beside("-wal")
        return log.stat().st_size if log.exists() else 0

    def left(self) -> dict[str, bytes]:
        """The files of an open store, as a kill leaves them."""
        files = {suffix: self.beside(suffix) for suffix in ("", "-wal", "-shm", ".note")}
        return {suffix: path.read_bytes() for suffix, path in files.items() if path.exists()}

    def leave(self, left: dict[str, bytes]) -> None:
        """Undo what closing did; the file stays the same one, as it does in a crash."""
        for suffix, data in left.items():
            self.beside(suffix).write_bytes(data)

    # What must hold after each step

    @invariant()
    def all_is_as_it_was_told(self) -> None:
        self.every_row_is_as_it_was_told()
        self.every_event_is_there_once()
        self.every_question_is_as_it_was_told()
        self.commands_and_copies_are_noted()
        self.every_follower_was_given_all()
        self.sound = True

    def every_row_is_as_it_was_told(self) -> None:
        found = {
            row["session_id"]: row for row in self.eye.execute("SELECT * FROM sessions ORDER BY session_id")
        }
        assert [*found] == [*self.model.sessions]
        for session_id, told in self.model.sessions.items():
            row = dict(found[session_id])
            assert {name: _plain(name, value) for name, value in row.items()} == told.row
            amount = fold(told.frames)
            assert {name: told.row[name] for name in amount} == amount

    def every_event_is_there_once(self) -> None:
        told = self.eye.execute(
            "SELECT position, session_id, seq, kind, at, frame FROM events WHERE position > ? ORDER BY position",
            (self.positions[-1] if self.positions else 0,),
        ).fetchall()
        new = [(row["session_id"], json.loads(row["frame"])) for row in told]
        assert new == self.model.history[len(self.positions) :]
        self.positions += [row["position"] for row in told]
        for row, (_, frame) in zip(told, new, strict=True):
            assert (row["seq"], row["kind"], row["at"]) == (frame["seq"], frame["kind"], frame["at"])

    def every_question_is_as_it_was_told(self) -> None:
        columns = ("session_id", "plugin", "file", "reason", "status", "asked_at", "answered_at", "operator")
        found = {row["prompt_id"]: row for row in self.eye.execute("SELECT * FROM prompts")}
        told = {
            name: question | {"session_id": session_id}
            for session_id, one in self.model.sessions.items()
            for name, question in one.questions.items()
        }
        assert found.keys() == told.keys()
        for name, row in found.items():
            assert tuple(row[column] for column in columns) == tuple(told[name][column] for column in columns)
            assert json.loads(row["fields"]) == told[name]["fields"]
            assert (row["answer"] and json.loads(row["answer"])) == told[name]["answer"]

    def commands_and_copies_are_noted(self) -> None:
        audited = self.eye.execute(
            "SELECT command, session_id, operator, principal FROM audit ORDER BY entry"
        )
        assert [tuple(row) for row in audited] == self.model.audit
        jobs = self.eye.execute("SELECT session_id, source, target, status FROM copy_jobs")
        done = self.model.among("done")
        assert {row[0]: tuple(row)[1:] for row in jobs} == {told.session_id: told.copied for told in done}

    def every_follower_was_given_all(self) -> None:
        """Every follower has been given all there is, each event once, and has left after the last."""
        for follower in self.followers:
            told = self.model.sessions[follower.session_id]
            self.run(self._caught_up(follower, len(told.frames) - follower.cursor))
            assert follower.given == told.frames[follower.cursor :]
            if not told.live:
                self.run(follower.task)
        self.followers = [one for one in self.followers if self.model.sessions[one.session_id].live]

    async def _caught_up(self, follower: Follower, count: int) -> None:
        while len(follower.given) < count:
            follower.heard.clear()
            await follower.heard.wait()

    def resist(self, number: int) -> None:
        self.refuse(number)
        self.meddle(number)

    def refuse(self, number: int) -> None:
        """What cannot happen in a state is refused, and writes nothing."""
        for told in self.one_of_each(number):
            kinds = [kind for kind in OUTCOMES if (told.state, kind) not in EDGES]
            made = [outcome_of(kind, told, number) for kind in kinds]
            if told.state == "plugin_pass":
                made += [outcome_of("PluginRan", told, pick) for pick in (8, 9)]
            self.do(*(self.record_deed(self.latest[told.session_id], outcome) for outcome in made))
            self.do(*self.answers_again(told))
        for (principal, key), (_, made_by) in self.model.keys.items():
            told = self.model.sessions[made_by]
            if principal == CALLERS[0].principal and told.state in ("failed", "aborted"):
                # Another try is another body, though it looks the same.
                self.do(self.create_deed(told.body, CALLERS[0], key, made_by))

    def answers_again(self, told: Told) -> Iterator[Deed]:
        """What was accepted, with another secret and another operator, changes nothing; nor does it after a cancel."""
        for name, question in told.questions.items():
            if question["told"] is not None:
                asked = [one["id"] for one in question["fields"] if not one.get("secret")]
                given = dict(zip(asked, json.loads(question["told"]), strict=True)) | {"password": "another"}
                body = ResumeBody(extra_inputs=given, prompt_id=name, operator="cdoe")
                yield self.answer_deed(told.session_id, body, CALLERS[1])
        question = told.open_question or {"fields": []}
        if told.row["cancel"] is not None:
            right = {one["id"]: RIGHT[one["id"]][0] for one in question["fields"]}
            yield self.answer_deed(told.session_id, ResumeBody(extra_inputs=right), CALLERS[0])

    def meddle(self, number: int) -> None:
        """A hand on the SQLite shell, which the database refuses."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as shell:
            shell.execute("PRAGMA foreign_keys=ON")
            for told in self.one_of_each(number):
                for statement in by_hand(told):
                    shell.execute("BEGIN IMMEDIATE")
                    with pytest.raises(sqlite3.IntegrityError):
                        shell.execute(statement)
                    shell.execute("ROLLBACK")

    def one_of_each(self, number: int) -> list[Told]:
        """One session in each state that there is."""
        return [self.pick(number, state) for state in STATES if self.some(state)]

    def take_a_last_look(self) -> None:
        for number in range(len(self.model.sessions)):
            self.look(number)
        self.look_around()
        self.resist(0)

    def teardown(self) -> None:
        try:
            seen_kinds["events"] += len(self.model.history)
            seen_kinds["sessions"] += len(self.model.sessions)
            seen_kinds["done"] += len(self.model.among("done"))
            if self.sound:
                self.take_a_last_look()
            left = b"".join(self.left().values())
            self.close()
            assert SECRET.encode() not in left + self.path.read_bytes()
            complaints = consistency.examine(self.path, None)
            assert [complaint for complaint in complaints if complaint.level == "error"] == []
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.folder)


def _at(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _compare(outcome: object, refusal: Exception) -> None:
    """That the store refused as the model did."""
    same = type(outcome) is type(refusal) and _particulars(outcome) == _particulars(refusal)
    if isinstance(outcome, DestinationHeld) and isinstance(refusal, DestinationHeld):
        same = outcome.session_id in refusal.session_id.split()  # one of all that are in the way
    assert same, f"{outcome!r}, where the contract says {refusal!r}"


def _particulars(refusal: object) -> object:
    """What a refusal names besides itself."""
    return [getattr(refusal, name, None) for name in ("details", "field")]


_JSON = (
    "rendered",
    "findings",
    "blocked_on",
    "cancel",
    "error",
    "result",
    "request",
    "pinned",
    "answers",
)


def _plain(column: str, value: object) -> object:
    return json.loads(str(value)) if column in _JSON and value is not None else value


def _shown(session: Session) -> dict[str, object]:
    """A session as the store gives it, in plain values."""
    names = [name for name in session.__struct_fields__ if name not in ("pinned", "prompt")]
    told: dict[str, object] = json.loads(
        msgspec.json.encode({name: getattr(session, name) for name in names}, enc_hook=str)
    )
    return told | {"prompt": session.prompt and session.prompt.prompt_id}


def _expected(told: Told) -> dict[str, object]:
    names = (name for name in Session.__struct_fields__ if name not in ("pinned", "prompt"))
    row = {name: told.row[name] for name in names}
    row |= {
        "driven": bool(row["driven"]),
        "rendered": row["rendered"] or [],
        "findings": row["findings"] or [],
    }
    return row | {"prompt": told.open_question and told.open_question["prompt_id"]}


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """An empty store, and room beside it; in memory where there is such a place, since every commit is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        path = Path(folder) / "empty.sqlite3"
        database.prepare(path)
        yield path


async def test_a_history_that_was_left_and_comes_back_has_another_epoch(tmp_path: Path) -> None:
    """Of what it told after the copy that comes back was taken, clients may still hold cursors."""
    path = tmp_path / "store.sqlite3"
    older = await _gone_on(path)
    newer = await _gone_on(path)
    await _gone_on(path)
    told = [older.epoch]
    for aside in (older, newer):
        path.write_bytes(aside.data)
        told.append((await _gone_on(path, sessions=0)).epoch)
    assert len({*told}) == 3, told


async def _gone_on(path: Path, sessions: int = 1) -> Copy:
    """A copy of the store after another run of the service."""
    store = Store(f"sqlite:///{path}", on_broken=lambda broken: None)
    opened = await store.open()
    for _ in range(sessions):
        await store.create(run_body(), CALLERS[0])
    await store.close()
    return Copy(path.read_bytes(), Model(), opened.epoch, store.head_position)


@pytest.mark.slow
def test_the_store_is_as_the_contract_says_wherever_it_is_led(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CACHED_BYTES", store_module.CACHED_BYTES)  # each walk has its own
    Walk.empty = empty
    seen_kinds.clear()
    configured = settings(
        max_examples=WALKS,
        stateful_step_count=STEPS,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    print(f"\nthe same again: {AGAIN}")
    try:
        run_state_machine_as_test(seed(SEED)(Walk), settings=configured)
    finally:
        print(f"{seen_kinds.pop('walks')} walks: {dict(seen_kinds)}")
