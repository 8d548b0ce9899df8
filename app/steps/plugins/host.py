"""The service's side of plugins: a task goes to a worker process, what comes of it is judged here.

This module promises that a run ends with what the plugin did, what it asks, or why it broke, within its
time and within bounds, whatever the plugin sends or prints; that no secret is in anything that comes
back; and that when a run, or its cancellation, is over, nothing of the plugin runs as far as `isolation`
claims. The tree in which a plugin works is its caller's affair, before and after: nothing is removed
from it. Whether the fields of a question are good ones is left to the caller too.
"""

import asyncio
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import quote, quote_plus

import msgspec
import structlog

from app.errors import BlockedOn
from app.steps.plugins.registry import Manifest
from app.steps.workers import NotStarted, Worker, Workers

_WORKER = Path(__file__).with_name("worker.py")

# The worker ends a plugin in time, and tells more of it; this is for one that no longer does. On Windows it is
# the plugin's own process.
_LATE_SECONDS = 3.0 if sys.platform != "win32" else 0.0
_ENDING_SECONDS = 0.5
_PROGRESS_SECONDS = 0.25

_LOG_LINES = 500
_LOG_CHARACTERS = 256 * 1024
_LONGEST_TEXT = 2000
_MOST_FIELDS = 50
_LARGEST_FIELDS = 64 * 1024
_DEEPEST_FIELDS = 10
_MOST_COMPLAINTS = 50
_TIMEOUT_CODE = 124


_WARM = 2
_KEYS = frozenset(
    (
        *("id", "label", "type", "options", "required", "default", "hint", "min", "max", "pattern", "secret"),
        *("path", "kind", "summary", "detail"),
    )
)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETXTBSY)
"""What the file of an interpreter may be in the way with that is there, and fit to run."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_LOGGED = 7999  # one character less than a plugin's process passes on
_log = structlog.get_logger(__name__)


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a plugin may know. `answers_file` is relative to the tree, `destination` where that will stand."""

    variables: dict[str, object]
    answers_file: str
    template_name: str
    template_version: str
    run_kind: str
    equipment_id: str
    project: str
    destination: Path
    dry_run: bool = False


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one plugin over `files`, which are relative to the tree, with slashes.

    `scratch` lies beside the tree and gets the plugin's home and temporary folder. `answers` are by file,
    those under "" for every hook. None of the `secrets` is in anything that comes back.
    """

    manifest: Manifest
    tree: Path
    scratch: Path
    files: tuple[str, ...]
    context: Context
    answers: dict[str, dict[str, object]] = {}
    secrets: tuple[str, ...] = ()


class Line(msgspec.Struct, frozen=True):
    level: Literal["debug", "info", "warning", "error"]
    text: str


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """`exit_code` as of `subprocess`: minus the number of a signal; 124 for a plugin that ran out of time."""

    duration_ms: int
    exit_code: int
    peak_memory_mb: int


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """`described` is what a dry run would have changed: path, kind, summary, detail."""

    usage: Usage
    log: tuple[Line, ...]
    described: tuple[dict[str, object], ...] = ()


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The plugin wants to be told something. `file` is what it was at; None in the hooks around the files."""

    fields: tuple[dict[str, object], ...]
    reason: str
    file: str | None
    usage: Usage
    log: tuple[Line, ...]


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["failed", "timeout", "policy_violation"]
    message: str
    usage: Usage
    log: tuple[Line, ...]


# Takes the number of files done, of all, and the one that the plugin is at. Four times a second at most.
Progress = Callable[[int, int, str], None]


class Unavailable(Exception):
    """The interpreter cannot be started, or the machine refuses what is to confine a plugin."""


class _Progressed(msgspec.Struct, frozen=True, tag_field="kind", tag="progress"):
    at: int


class _Logged(msgspec.Struct, frozen=True, tag_field="kind", tag="log"):
    level: Literal["debug", "info", "warning", "error"]
    text: str


class _Done(msgspec.Struct, frozen=True, tag_field="kind", tag="ran"):
    described: tuple[dict[str, object], ...]


class _Complained(msgspec.Struct, frozen=True, tag_field="kind", tag="complained"):
    complaints: tuple[str, ...]


class _Asking(msgspec.Struct, frozen=True, tag_field="kind", tag="asked"):
    fields: tuple[dict[str, object], ...]
    reason: str
    at: int | None


class _Failed(msgspec.Struct, frozen=True, tag_field="kind", tag="failed"):
    message: str


class _Violated(msgspec.Struct, frozen=True, tag_field="kind", tag="violated"):
    path: str


class _Obstructed(msgspec.Struct, frozen=True, tag_field="kind", tag="obstructed"):
    number: int
    reason: str
    path: str


class _Printed(msgspec.Struct, frozen=True, tag_field="kind", tag="printed"):
    head: str
    tail: str
    omitted: int


class _Ended(msgspec.Struct, frozen=True, tag_field="kind", tag="ended"):
    verdict: Literal["", "timeout", "memory", "processes", "threads", "protocol", "let go"]
    reason: str
    exit_code: int
    peak_memory_mb: int


class _Refused(msgspec.Struct, frozen=True, tag_field="kind", tag="refused"):
    reason: str


_Outcome = _Done | _Complained | _Asking | _Failed | _Violated | _Obstructed
_FROM_PLUGIN = msgspec.json.Decoder(_Progressed | _Logged | _Outcome)
_FROM_SUPERVISOR = msgspec.json.Decoder(_Printed | _Ended | _Refused)


class Host:
    """As many plugins at once as there are workers; further ones wait for their turn."""

    def __init__(self, python: Callable[[], Path | None], count: int = 16) -> None:
        self._python = python
        self._workers = Workers(self._command, count, warm=min(count, _WARM), grace=_ENDING_SECONDS)

    @property
    def isolation(self) -> dict[str, str]:
        """What the last worker to get ready has found to hold on this machine."""
        if not self._workers.greeting:
            return {"plugins": "not known before a worker has started"}
        return msgspec.json.decode(self._workers.greeting, type=dict[str, str])

    async def start(self) -> None:
        """Have the workers get ready in the background."""
        self._workers.warm()

    async def close(self) -> None:
        """End the workers. Plugins that still run are waited for: cancel them before."""
        await self._workers.close()

    async def validate(
        self, manifest: Manifest, variables: dict[str, object], aside: Path
    ) -> tuple[str, ...] | Broken:
        """What the plugin has against the variables; Broken where it is not able to say.

        `aside` is a folder that is not there yet, and is the caller's to remove. Raises OSError,
        BlockedOn and Unavailable.
        """
        tree = aside / "tree"
        for folder in (aside, tree):  # and none above them: below the mount point of a disk that is away
            await asyncio.to_thread(folder.mkdir)
        context = Context(
            variables=variables,
            answers_file="",
            template_name="",
            template_version="",
            run_kind="",
            equipment_id="",
            project="",
            destination=tree,
        )
        task = Task(manifest=manifest, tree=tree, scratch=aside / "scratch", files=(), context=context)
        run = await self._performed(task, _no_progress, validate=True)
        return run.complaints()

    async def run(self, task: Task, progress: Progress) -> Ran | Asked | Broken:
        """Let the plugin do its work. Raises Unavailable; OSError and BlockedOn for what is in its way from outside.

        A cancellation goes on when the plugin's processes are gone.
        """
        run = await self._performed(task, progress, validate=False)
        return run.result()

    async def _performed(self, task: Task, progress: Progress, *, validate: bool) -> "_Run":
        run = _Run(task, progress)
        payload = _encoded(task, validate=validate)
        if payload is None:
            run.outcome = _Failed("A value or a path is not valid Unicode.")
            return run
        await asyncio.to_thread(_prepare, task)
        try:
            async with self._workers.one() as worker:
                await run.follow(worker, payload)
        except NotStarted as error:
            if error.killed:
                _log.error("the plugin worker could not be started", reason=str(error))
                message = "the process for a plugin could not be started; the log tells more"
                raise BlockedOn("plugin_host_not_started", message) from error
            raise Unavailable(f"{self._command()[0]} cannot run plugins: {_end(str(error))}") from error
        except OSError as error:
            if error.filename != self._command()[0] or error.errno in _PASSING:
                raise
            raise Unavailable(f"{error.filename} cannot be started: {error.strerror}") from error
        if run.refused is not None:
            raise Unavailable(f"This machine refused what confines a plugin: {run.refused}")
        return run

    def _command(self) -> tuple[str, ...]:
        return (str(self._python() or sys.executable), "-I", "-X", "utf8", str(_WORKER))


class _Run:
    """What has come of one task so far."""

    def __init__(self, task: Task, progress: Progress) -> None:
        self.outcome: _Outcome | None = None
        self.refused: str | None = None
        self._task = task
        self._progress = progress
        self._told_at = -_PROGRESS_SECONDS
        self._redacted = _Redaction(task.secrets)
        self._log = _Log(self._redacted)
        self._broken = ""
        self._ended: _Ended | None = None
        self._started = time.monotonic()
        self._seconds = 0.0

    async def follow(self, worker: Worker, payload: bytes) -> None:
        """Give the task to the worker and hear what it tells, to its end or to that of its time."""
        self._started = time.monotonic()
        try:
            await worker.work(payload, self._hear, self._task.manifest.timeout_seconds + _LATE_SECONDS)
        except TimeoutError:
            self._ended = _Ended("timeout", "", _TIMEOUT_CODE, 0)
        self._seconds = time.monotonic() - self._started
        if self._ended is None:
            await self._without_supervisor(worker)

    async def _without_supervisor(self, worker: Worker) -> None:
        """Where the plugin runs in the worker itself, or has killed it, that tells how it has ended."""
        await worker.process.kill()
        exit_code = worker.process.exit_code
        self._ended = _Ended("", "", -signal.SIGTERM if exit_code is None else exit_code, 0)
        self._log.add_text("info", worker.process.output)

    def _hear(self, told: bytes) -> None:
        if told[:1] == b"s":
            self._hear_supervisor(_FROM_SUPERVISOR.decode(told[1:]))
            return
        try:
            self._hear_plugin(_FROM_PLUGIN.decode(told[1:]))
        except (msgspec.DecodeError, RecursionError, _Nonsense) as error:
            self._broken = self._broken or f"it sent what is not understood ({type(error).__name__})"

    def _hear_supervisor(self, told: _Printed | _Ended | _Refused) -> None:
        match told:
            case _Printed():
                self._log.add_printed(told)
            case _Ended():
                self._ended = told
            case _Refused(reason):
                self.refused = reason

    def _hear_plugin(self, told: _Progressed | _Logged | _Outcome) -> None:
        match told:
            case _Progressed(at):
                self._progress_to(self._file(at), at)
            case _Logged(level, text):
                # The plugin's process has cut it, perhaps in the middle of a secret.
                self._log.add_text(level, self._redacted.cut(text, _LONGEST_LOGGED))
            case _ if self.outcome is not None:
                self._broken = self._broken or "it ended more than once"
            case _:
                self.outcome = told

    def _progress_to(self, file: str, at: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_SECONDS:
            self._told_at = now
            self._progress(at, len(self._task.files), file)

    def _file(self, at: int) -> str:
        if not 0 <= at < len(self._task.files):
            raise _Nonsense
        return self._task.files[at]

    def complaints(self) -> tuple[str, ...] | Broken:
        breakdown = self._breakdown()
        if breakdown is not None:
            return breakdown
        match self.outcome:
            case _Complained(complaints):
                told = complaints[:_MOST_COMPLAINTS]
                return tuple(self._redacted.text(each)[:_LONGEST_TEXT] for each in told)
            case _:
                return self._not_understood("it did not do what it was asked")

    def result(self) -> Ran | Asked | Broken:
        breakdown = self._breakdown()
        if breakdown is not None:
            return breakdown
        match self.outcome:
            case _Done(described):
                return self._described(described)
            case _Asking():
                return self._asked(self.outcome)
            case _:
                return self._not_understood("it did not do what it was asked")

    def _breakdown(self) -> Broken | None:
        """Why the plugin has not come to an end of its own with a result that counts."""
        ended = self._ended
        if ended is None:
            return self._failed("The plugin was not run.") if self.outcome is None else self._said_so()
        manifest = self._task.manifest
        match ended.verdict:
            case "timeout" | "let go":
                message = (
                    f"The plugin did not end within the {manifest.timeout_seconds} seconds of its manifest."
                )
                return self._broke("timeout", message)
            case "memory":
                message = f"The plugin used more memory than the {manifest.memory_mb} MB of its manifest."
                return self._failed(message)
            case "processes" | "threads":
                return self._failed(f"The plugin started too many {ended.verdict}.")
            case "protocol":
                return self._not_understood(ended.reason)
        if self._broken:
            return self._not_understood(self._broken)
        if self.outcome is None:
            return self._failed(f"The plugin's process {_ending(ended.exit_code)} before it had a result.")
        if ended.exit_code != 0:
            return self._failed(f"The plugin's process {_ending(ended.exit_code)} although it had a result.")
        return self._said_so()

    def _said_so(self) -> Broken | None:
        match self.outcome:
            case _Failed(message):
                return self._failed(message)
            case _Violated(path):
                return self._broke("policy_violation", f"The plugin reached outside its folder, for {path}.")
            case _Obstructed(number, _, path) if number in _FULL:
                raise OSError(number, os.strerror(number), self._redacted.cut(path, _LONGEST_TEXT) or None)
            case _Obstructed():
                return self._not_understood("it tells of an error that is not its to tell")
        return None

    def _described(self, described: tuple[dict[str, object], ...]) -> Ran | Broken:
        try:
            shown = tuple(self._redacted.record(each) for each in described)
        except _Nonsense:
            return self._not_understood("what it describes is nested too deep")
        return Ran(usage=self._usage(), log=self._log.lines(), described=shown)

    def _asked(self, asking: _Asking) -> Asked | Broken:
        if len(asking.fields) > _MOST_FIELDS or not asking.fields:
            return self._not_understood(
                f"it asks for {len(asking.fields)} fields; 1 to {_MOST_FIELDS} can be shown"
            )
        if len(msgspec.json.encode(asking.fields)) > _LARGEST_FIELDS:
            return self._not_understood(f"the fields are larger than {_LARGEST_FIELDS // 1024} KiB")
        if len(asking.reason) > _LONGEST_TEXT:
            return self._not_understood(f"the reason has more than {_LONGEST_TEXT} characters")
        try:
            fields = tuple(self._redacted.record(field) for field in asking.fields)
            file = None if asking.at is None else self._file(asking.at)
        except _Nonsense:
            return self._not_understood(
                "the fields are nested too deep, or for a file that is none of its own"
            )
        return Asked(
            fields=fields,
            reason=self._redacted.text(asking.reason),
            file=file,
            usage=self._usage(),
            log=self._log.lines(),
        )

    def _not_understood(self, why: str) -> Broken:
        return self._failed(f"The plugin did not keep to the protocol: {why}.")

    def _failed(self, message: str) -> Broken:
        return self._broke("failed", message)

    def _broke(self, status: Literal["failed", "timeout", "policy_violation"], message: str) -> Broken:
        text = self._redacted.text(message)[:_LONGEST_TEXT]
        return Broken(status=status, message=text, usage=self._usage(status), log=self._log.lines())

    def _usage(self, status: str = "") -> Usage:
        ended = self._ended
        exit_code = _TIMEOUT_CODE if status == "timeout" else ended.exit_code if ended else 0
        return Usage(
            duration_ms=round(self._seconds * 1000),
            exit_code=exit_code,
            peak_memory_mb=ended.peak_memory_mb if ended else 0,
        )


class _Nonsense(Exception):
    """The plugin's process says what the one that was started cannot say."""


def redacted(text: str, secrets: Iterable[str]) -> str:
    """`text` without what must appear nowhere."""
    return _Redaction(secrets).text(text)


class _Redaction:
    """Takes secrets out of texts, also as JSON and Python write them, the longest first."""

    def __init__(self, secrets: Iterable[str]) -> None:
        written = {form for secret in secrets if secret for form in _forms(secret)}
        longest_first = sorted(written, key=len, reverse=True)
        self._longest = max(map(len, written), default=0)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if written else None

    def text(self, text: str) -> str:
        return text if self._secrets is None else self._secrets.sub("***", text)

    def cut(self, text: str, at: int) -> str:
        """At most `at` characters, of which the last are no beginning of a secret."""
        return self.text(text if len(text) <= at else text[: max(0, at - self._longest)])

    def record(self, record: dict[str, object]) -> dict[str, object]:
        """A description, whose keys and id mean something to those who read it.

        They stay as they are, or, where a secret is in them, are not passed on: a key is left out, an id
        makes nonsense of the whole.
        """
        if isinstance(name := record.get("id"), str) and self.text(name) != name:
            raise _Nonsense
        known = {key: value for key, value in record.items() if key in _KEYS or self.text(key) == key}
        return {key: self._value(value, _DEEPEST_FIELDS) for key, value in known.items()}

    def _value(self, value: object, depth: int) -> object:
        if depth == 0:
            raise _Nonsense
        match value:
            case str():
                return self.text(value)
            case list():
                return [self._value(item, depth - 1) for item in value]
            case dict():
                return {self.text(key): self._value(item, depth - 1) for key, item in value.items()}
            case int() | float() if self.text(str(value)) != str(value):
                return None
        return value


def _forms(secret: str) -> tuple[str, ...]:
    escaped = (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret), ascii(secret))
    encoded = (quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret.encode())[2:-1])
    return (secret, *(form[1:-1] for form in escaped), *encoded)


class _Log:
    """The lines that are worth keeping."""

    def __init__(self, redaction: _Redaction) -> None:
        self._redaction = redaction
        self._lines: list[Line] = []
        self._room = _LOG_CHARACTERS
        self._left_out = 0

    def add_text(self, level: Literal["debug", "info", "warning", "error"], text: str) -> None:
        for line in self._redaction.text(text).splitlines():
            if line.strip():
                self._add(Line(level, line[:_LONGEST_TEXT]))

    def add_printed(self, printed: _Printed) -> None:
        if not printed.omitted:
            self.add_text("info", printed.head)
            return
        # Not the lines that were cut in two: half of a secret is not known for one.
        self.add_text("info", printed.head.rpartition("\n")[0])
        self._add(Line("warning", f"({printed.omitted} bytes of what the plugin printed are left out here)"))
        self.add_text("info", printed.tail.partition("\n")[2])

    def lines(self) -> tuple[Line, ...]:
        if not self._left_out:
            return tuple(self._lines)
        return (*self._lines, Line("warning", f"({self._left_out} further lines are left out)"))

    def _add(self, line: Line) -> None:
        if len(self._lines) >= _LOG_LINES - 1 or len(line.text) > self._room:
            self._left_out += 1
            return
        self._room -= len(line.text)
        self._lines.append(line)


def _encoded(task: Task, *, validate: bool) -> bytes | None:
    manifest = task.manifest
    whole = {
        "validate": validate,
        "name": manifest.name,
        "version": manifest.version,
        "folder": manifest.folder,
        "seconds": manifest.timeout_seconds,
        "memory_mb": manifest.memory_mb,
        "network": manifest.network,
        "tree": task.tree,
        "scratch": task.scratch,
        "files": task.files,
        "context": task.context,
        "answers": task.answers,
    }
    try:
        return msgspec.json.encode(whole, enc_hook=str)
    except UnicodeEncodeError:
        return None


def _prepare(task: Task) -> None:
    """The plugin's own folders; and an error that names the tree, if it is not there."""
    task.tree.stat()
    for folder in (task.scratch, task.scratch / "home", task.scratch / "tmp"):
        folder.mkdir(mode=0o700, exist_ok=True)


def _no_progress(_done: int, _all: int, _file: str) -> None:
    return


def _end(text: str) -> str:
    return text.splitlines()[-1][:_LONGEST_TEXT] if text else "it ended at once"


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
