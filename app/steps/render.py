"""A Copier template is rendered into a staging tree, by worker processes that can be killed.

This module promises that a render ends: with the files, with a `Failure` that tells the operator what
is wrong with the template, with the OSError that stood in its way, or, cancelled, with nothing left
running. Nothing is written outside the tree, and nothing in the tree tells of the places where it was
built. Each worker imports Copier once and renders each job in a fork of itself. Whether the answers are
good is the gate's affair, whether the tree is, that of the check.
"""

import asyncio
import errno
import math
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from app.errors import BlockedOn, Failure, blocked_by
from app.settings import Service
from app.steps import casting, confinement
from app.steps.workers import NotStarted, Tell, Workers, serve

if TYPE_CHECKING:
    from copier._jinja_ext import SandboxedEnvironment

_PROGRESS_SECONDS = 0.25

# A tree may be as large as this many files of the largest size. Their number is bounded by the time.
_LARGEST_FILES = 4

_LOG_LINES = 100
_LONGEST_TEXT = 2000

# What Copier itself puts into the context; an answer of that name would break or falsify it.
_COPIERS_NAMES = frozenset(
    (
        *("_src_path", "_commit", "_folder_name", "_external_data", "_copier_answers", "_copier_conf"),
        *("_copier_operation", "_copier_phase", "_copier_python"),
    )
)

# Filters that look at the machine's file system, which is no affair of a template.
_FOREIGN_FILTERS = ("fileglob", "realpath")

_log = structlog.get_logger(__name__)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One render. `source` and `destination` stand wherever the result would name `template` and `tree`."""

    template: Path
    source: Path
    tree: Path
    destination: Path
    answers: dict[str, object]


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """The files that Jinja wrote (not those that were copied), relative, with slashes; what was printed.

    `answers` are the answers to the template's questions, also those that it gave itself.
    """

    files: tuple[str, ...]
    answers: dict[str, object]
    log: tuple[str, ...]


# Takes the number of files done, of all as far as known, and the last one's path. Four times a second at most.
Progress = Callable[[int, int, str], None]


class _Task(msgspec.Struct, frozen=True):
    job: Job
    limits: confinement.Limits


class _Progressed(msgspec.Struct, frozen=True, tag="progress"):
    current: int
    total: int
    file: str


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    message: str
    log: tuple[str, ...]


class _Obstructed(msgspec.Struct, frozen=True, tag="obstructed"):
    number: int
    reason: str
    path: str | None


class _Lost(msgspec.Struct, frozen=True, tag="lost"):
    """The process ended without an outcome. A negative code is a signal; None: the worker is lost too.

    `output` is the end of what the worker has ever printed.
    """

    exit_code: int | None
    output: str

    @property
    def killed(self) -> bool:
        return self.exit_code is None or self.exit_code < 0


_Outcome = Rendered | _Failed | _Obstructed | _Lost


class Renderer:
    """As many renders at once as there are workers; further ones wait for their turn."""

    def __init__(self, service: Service) -> None:
        self._seconds = service.render_timeout_seconds
        self._limits = confinement.Limits(
            memory_mb=service.render_memory_mb,
            file_mb=service.render_file_mb,
            cpu_seconds=math.ceil(service.render_timeout_seconds) + 1,
        )
        self._workers = Workers(__name__, service.render_workers)

    @property
    def isolation(self) -> dict[str, str]:
        return confinement.described(self._limits)

    async def start(self) -> None:
        """Have the workers get ready in the background."""
        self._workers.warm()

    async def render(self, job: Job, progress: Progress) -> Rendered | Failure:
        """Render `job`, in an empty tree. Raises OSError and BlockedOn for what stands in the way from outside.

        A cancellation goes on when the processes of the render are gone; the tree stays as it is then.
        """
        task = _encoded(job, self._limits)
        if isinstance(task, Failure):
            return task
        try:
            outcome = await self._attempt(task, progress)
            if isinstance(outcome, _Lost) and outcome.killed:
                _log.warning("a render was lost and is done again", **msgspec.structs.asdict(outcome))
                await asyncio.to_thread(_empty, job.tree)
                outcome = await self._attempt(task, progress)
        except NotStarted as error:
            # Killed while it got ready, or short of memory: the next one may well start.
            _log.error("the renderer could not be started", reason=str(error))
            raise BlockedOn(
                "renderer_not_started", "the renderer could not be started; the log tells more"
            ) from error
        return _result(outcome)

    async def close(self) -> None:
        """End the workers. Renders that still run are waited for: cancel them before."""
        await self._workers.close()

    async def _attempt(self, task: bytes, progress: Progress) -> _Outcome:
        outcome: _Outcome | None = None

        def told(payload: bytes) -> None:
            nonlocal outcome
            match msgspec.json.decode(payload, type=_Progressed | _Outcome):
                case _Progressed(current, total, file):
                    progress(current, total, file)
                case other:
                    outcome = other

        async with self._workers.one() as worker:
            try:
                exit_code = await worker.work(task, told, self._seconds)
            except TimeoutError:
                return _Failed(f"The template was not rendered within {self._seconds:g} seconds.", ())
        return outcome or _Lost(exit_code, worker.process.output)


def _encoded(job: Job, limits: confinement.Limits) -> bytes | Failure:
    if clashing := sorted(_COPIERS_NAMES & job.answers.keys()):
        name = clashing[0]
        message = f"Copier keeps the name {name} for itself; no variable may have it."
        return Failure(code="render_failed", message=message, field=f"variables.{name}")
    try:
        return msgspec.json.encode(_Task(job, limits), enc_hook=str)
    except UnicodeEncodeError:
        return _failure("A value or a path is not valid Unicode.")


def _result(outcome: _Outcome) -> Rendered | Failure:
    match outcome:
        case Rendered():
            return outcome
        case _Failed(message, log):
            return _failure(message, log)
        case _Obstructed(number, reason, path):
            raise OSError(number, reason, path)
        case _Lost(exit_code, output):
            ended = "was lost" if exit_code is None else f"ended with {exit_code}"
            message = f"The render broke down without a result: its process {ended}."
            return _failure(message, tuple(output.splitlines()[-_LOG_LINES:]))


def _failure(message: str, log: tuple[str, ...] = ()) -> Failure:
    return Failure(code="render_failed", message=message, details={"log": list(log)} if log else None)


def _empty(tree: Path) -> None:
    """The tree itself stays: it has inherited its rights from where it will stand."""
    for entry in tree.iterdir() if tree.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# From here on, in the worker.


class _Refused(Exception):
    """The template does what no template may; the message tells the operator."""


class _Printed(StringIO):
    """What is printed while rendering, as far as it is worth keeping."""

    def write(self, text: str) -> int:
        super().write(text[: _LOG_LINES * _LONGEST_TEXT - self.tell()])
        return len(text)

    def lines(self, job: Job) -> tuple[str, ...]:
        return tuple(_public(line, job) for line in self.getvalue().splitlines()[:_LOG_LINES] if line)


class _Progressing:
    """Counts the files as they are written, tells of them, and keeps them within bounds."""

    def __init__(self, tree: Path, file_mb: int, tell: Tell) -> None:
        self.by_jinja: dict[str, None] = {}
        self._tree = tree
        self._tell = tell
        self._room = file_mb * _LARGEST_FILES * 1024 * 1024
        self._inherited = _inherited_mode(tree)
        self._files = 0
        self._total = 0
        self._told_at = -math.inf

    def expect(self, source: Path) -> None:
        """Count what there is to do, at the first file: until then, answers may decide which folder it is."""
        if not self._total:
            self._total = sum(len(names) for _, _, names in os.walk(source))

    def add(self, path: Path, *, by_jinja: bool) -> None:
        name = path.as_posix()
        if name.encode(errors="replace").decode() != name:
            raise _Refused(f"The file name {name!a} is not valid Unicode.")
        if by_jinja:
            self.by_jinja[name] = None
        written = self._tree / path
        self._files += 1
        self._room -= written.lstat().st_size
        if self._room < 0:
            raise _Refused("The files of the template are too large together.")
        if self._inherited is not None:
            _restore_rights(written, self._inherited)
        self._tell_of(name)

    def _tell_of(self, name: str) -> None:
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_SECONDS:
            self._told_at = now
            total = max(self._total, self._files)
            self._tell(msgspec.json.encode(_Progressed(self._files, total, name)))


def main() -> None:
    """Import Copier, then render what the service asks for."""
    warnings.showwarning = _print_warning
    warnings.simplefilter("ignore")
    for worth_telling in (UserWarning, FutureWarning):
        warnings.simplefilter("always", worth_telling)
    _practise()
    serve(_perform)


def _practise() -> None:
    """A first render imports and compiles what all the others then find in memory."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        template = place / "template"
        template.mkdir()
        (template / "copier.yml").write_text("name: x\n", "utf-8")
        (template / "{{ _copier_conf.answers_file }}.jinja").write_text(
            "{{ _copier_answers|to_nice_yaml }}", "utf-8"
        )
        (place / "tree").mkdir()
        job = Job(template=template, source=template, tree=place / "tree", destination=place, answers={})
        _render(job, 1, lambda _: None)


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(message, file=sys.stderr)


def _perform(payload: bytes, tell: Tell) -> None:
    task = msgspec.json.decode(payload, type=_Task, dec_hook=_decoded)
    tell(msgspec.json.encode(_outcome(task, tell)))


def _decoded(kind: type, value: object) -> object:
    return Path(str(value)) if kind is Path else value


def _outcome(task: _Task, tell: Tell) -> _Outcome:
    """The edge of the forked process: whatever a template does to Copier ends as a value."""
    job, printed = task.job, _Printed()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            job.tree.mkdir(exist_ok=True)
            confinement.limit(task.limits)
            confinement.enclose(readable=[job.template], writable=[job.tree])
            files, answers = _render(job, task.limits.file_mb, tell)
    except Exception as error:  # noqa: BLE001 - a template may break Copier in any way; it ends as a value
        passing = isinstance(error, OSError) and error.errno != errno.ENOMEM and blocked_by(error)
        if isinstance(error, OSError) and passing:
            return _Obstructed(error.errno or 0, error.strerror or "", error.filename and str(error.filename))
        return _Failed(_public(_reason(error, task), job), printed.lines(job))
    return Rendered(files, answers, printed.lines(job))


def _render(job: Job, file_mb: int, tell: Tell) -> tuple[tuple[str, ...], dict[str, object]]:
    from copier._main import Worker
    from copier._settings import SettingsModel

    progressing = _Progressing(job.tree, file_mb, tell)

    class Rendering(Worker):
        """Copier, telling of each file, and keeping quiet about where it works."""

        def _render_context(self):  # type: ignore[no-untyped-def]
            context = super()._render_context()
            context["_folder_name"] = job.destination.name
            context["_copier_conf"]["src_path"] = PurePath(job.source)
            context["_copier_conf"]["dst_path"] = PurePath(job.destination)
            return context

        @cached_property
        def jinja_env(self) -> "SandboxedEnvironment":
            environment = super().jinja_env
            for name in _FOREIGN_FILTERS:
                environment.filters.pop(name, None)
            return environment

        def _render_file(self, src_relpath: Path, dst_relpath: Path, extra_context=None) -> None:  # type: ignore[no-untyped-def]
            progressing.expect(self.template_copy_root)
            super()._render_file(src_relpath, dst_relpath, extra_context)
            by_jinja = src_relpath.name.endswith(self.template.templates_suffix)
            progressing.add(dst_relpath, by_jinja=by_jinja)

    with Rendering(
        src_path=str(job.source),
        dst_path=job.tree,
        data=job.answers,
        settings=SettingsModel(),
        defaults=True,
        overwrite=True,
        quiet=True,
        unsafe=False,
        skip_tasks=True,
        cleanup_on_error=False,
    ) as copier:
        # The answers name the original, the pinned copy is what is read. That Copier does not take it
        # for a repository, nor asks git about every file, is because a worker has no PATH to find git.
        copier.template.local_abspath = job.template.resolve()
        copier.run_copy()
        answers = _given(copier.answers.combined, copier.template.questions_data)
    _check_links(job.tree)
    return tuple(progressing.by_jinja), answers


def _given(combined: Mapping[str, Any], questions: Iterable[str]) -> dict[str, object]:
    """The answers that JSON can hold; a template may compute others for itself."""
    answers: dict[str, object] = {}
    for name in set(questions).intersection(combined):
        try:
            answers[name] = casting.plain(combined[name])
        except ValueError:
            continue
    return answers


def _inherited_mode(tree: Path) -> int | None:
    """The mode of a new file here, where the folder hands down rights by an ACL; else None."""
    if not _hands_down_rights(tree):
        return None
    probe = tree / ".mode"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(handle).st_mode & 0o777
    os.close(handle)
    probe.unlink()
    return mode


def _hands_down_rights(folder: Path) -> bool:
    if sys.platform != "linux":
        return False
    try:
        return "system.posix_acl_default" in os.listxattr(folder)
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # the file system has no attributes, so no ACL either
            return False
        raise


def _restore_rights(path: Path, inherited: int) -> None:
    """Copier gives a file the mode of its template, which narrows an inherited ACL's mask: undo that,
    and keep what only the template can know, whether the file can be executed.
    """
    executable = path.stat().st_mode & 0o111
    path.chmod(inherited | ((inherited & 0o444) >> 2 if executable else 0))


def _check_links(tree: Path) -> None:
    root = os.path.realpath(tree)
    for folder, folders, names in os.walk(tree):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            if os.path.islink(path) and not _stays_inside(path, root):
                shown = os.path.relpath(path, tree)
                raise _Refused(f"The link {shown} points to {os.readlink(path)}, outside of the folder.")


def _stays_inside(link: str, root: str) -> bool:
    """An absolute target does not survive the move to the destination, wherever it points."""
    reached = os.path.realpath(link)
    return not os.path.isabs(os.readlink(link)) and os.path.commonpath((root, reached)) == root


def _reason(error: Exception, task: _Task) -> str:
    from copier.errors import UnsafeTemplateError, UserMessageError
    from jinja2 import TemplateError

    match error:
        case MemoryError() | OSError(errno=errno.ENOMEM):
            return f"The template needs more than {task.limits.memory_mb} MB of memory."
        case OSError(errno=errno.EFBIG):
            return f"The template writes a file of more than {task.limits.file_mb} MB."
        case UnsafeTemplateError():
            return "The template asks for Jinja extensions. They run code, so they are not loaded here."
        case _Refused() | UserMessageError():
            return str(error)
        case UnicodeEncodeError(object=text):
            return f"{text!a} is not valid Unicode."
        case ValueError() | TemplateError():
            return f"{_place(error, task.job)}{error}"
    return f"{_place(error, task.job)}{type(error).__name__}: {error}"


def _place(error: Exception, job: Job) -> str:
    """Jinja puts the lines of templates into the traceback as if they were Python."""
    root = job.template.resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(root):
            return f"{Path(frame.filename).relative_to(root).as_posix()}, line {frame.lineno}: "
    return ""


def _public(text: str, job: Job) -> str:
    """Valid Unicode of a bounded length that names the places the operator knows."""
    for hidden, shown in ((job.tree, job.destination), (job.template, job.source)):
        for path in (hidden.resolve(), hidden):
            text = text.replace(str(path), str(shown))
    return text.encode(errors="backslashreplace").decode()[:_LONGEST_TEXT]


if __name__ == "__main__":
    main()
