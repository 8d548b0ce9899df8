"""The steps of a creation in order, and the one road that every session takes.

`drive` takes a session from wherever it stands, so a first start, an answer and a restart are the same
code; hence every step may run twice and ends in the same place. A step does one thing to the world and
returns what happened; the store moves the session by it. What may pass by itself is waited for here;
when sessions are driven, and how they are stopped, is the runner's affair.
"""

import asyncio
import errno
import getpass
import itertools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import structlog

from app import disk
from app.errors import BlockedOn, Failure, StoreUnavailable, blocked_by
from app.sessions import requests, telling
from app.sessions.events import timestamp
from app.sessions.lifecycle import (
    Accepted,
    Begun,
    Blocked,
    Cancelled,
    Checked,
    Documented,
    Failed,
    Outcome,
    Published,
    Rendered,
    State,
    Transformed,
    Warned,
)
from app.sessions.moves import DestinationHeld, Moved
from app.sessions.pinned import Pinned, encoded, pinned_by
from app.sessions.plugin_pass import PluginPass
from app.sessions.session import AnsweredPrompt, PluginRun, Session
from app.sessions.store import Store
from app.sessions.work import known, thread
from app.settings import ConfigFile, Settings, Validator
from app.steps import check, gate, pinning, provenance, publish, render

log = structlog.get_logger()

Step = Callable[[Session], Awaitable[tuple[Outcome, ...] | Failure]]

SHOWN = 100
"""Findings and warnings that a result carries; it tells the number of all."""

_NAMING = {"project": "lims_project.short_id", "run": "run_date"}
"""The field that names the folder."""

SHOWN_BYTES = 64 * 1024

_WITH_TREE = (State.PLUGIN_PASS, State.CACHE_WRITE, State.POST_VALIDATE, State.SYNC_QUEUED)
_ON_ROOT = (State.VALIDATING, State.RENDERING, *_WITH_TREE[:-1])
"""Where a step finds out something on the data root that is still open; after those it is found out by publishing."""

RETRY_SECONDS = (1, 2, 4, 8, 10)
UNREADABLE_AFTER = timedelta(minutes=10)
"""How long a tree that is about to be published may be unreadable before it is given up."""


class Pipeline:
    """Drives sessions of one store, one step after the other."""

    def __init__(
        self, store: Store, renderer: render.Renderer, plugins: PluginPass, config: ConfigFile
    ) -> None:
        self._store = store
        self._renderer = renderer
        self._plugins = plugins
        self._config = config
        self._choosing_second = asyncio.Lock()
        self._chosen: dict[str, str] = {}
        self._founded: set[Path] = set()
        self._steps: dict[State, Step] = {
            State.PENDING: self._begin,
            State.VALIDATING: self._validate,
            State.RENDERING: self._render,
            State.PLUGIN_PASS: plugins.step,
            State.CACHE_WRITE: self._document,
            State.POST_VALIDATE: self._check,
            State.SYNC_QUEUED: self._publish,
        }

    async def drive(self, session: Session) -> AsyncGenerator[Session, None]:
        """Take `session` on, and give it back after each commit, until it ends or needs its operator.

        One that comes back with `blocked_on` is to be asked for again at its `retry_at`. Moved when
        somebody else has moved the session, or recorded its cancel.
        """
        # Taken up with a tree: that must be as it was when it was sealed.
        unverified = session.state in _WITH_TREE
        while session.state in self._steps:
            session = await self._advance(session, verify=unverified)
            unverified = unverified and session.blocked_on is not None
            yield session

    async def learn(self, session_id: str, body: requests.ResumeBody) -> None:
        """Keep for the plugin what the store does not keep of an answer."""
        await self._plugins.learn(session_id, body)

    async def clear_attempts(self, session: Session) -> None:
        """Remove the copies of a session's tree that plugins of a dead service were working on."""
        if session.tree is None:
            return
        try:
            await thread(publish.only, session.tree.parents[1], session.tree)
        except OSError as error:
            log.warning("Copies are removed later.", session_id=session.session_id, why=str(error))

    async def fail(self, session: Session, failure: Failure) -> Session:
        """End `session` without its folder; what it had built is kept aside, and `failure` says where.

        The files are cleared after the commit: a step that is done again after a crash must find what it
        found before. What a crash leaves of the clearing is for the sweep.
        """
        self._plugins.forget(session.session_id)
        folder = self._folder(session)
        kept = session.tree if await thread(_may_be_there, session.tree) else None
        if kept is not None:
            details = (failure.details or {}) | {"partial_path": str(kept)}
            failure = msgspec.structs.replace(failure, details=details)
        failed = await self.record(session, Failed(error=failure))
        try:
            await thread(_clear, folder, kept)
        except OSError as error:
            log.warning(
                "What a failed session left is cleared later.", session_id=session.session_id, why=str(error)
            )
        return failed

    async def abort(self, session: Session, stopped: tuple[str, ...]) -> Session:
        """End a session whose cancel is recorded and whose work has stopped, with a receipt."""
        self._chosen.pop(session.session_id, None)
        self._plugins.forget(session.session_id)
        discard = session.cancel is not None and session.cancel.discard_files
        receipt: dict[str, object] = {"discard_files": discard, "stopped": stopped}
        folder = self._folder(session) if await self._may_have_files(session) else None
        try:
            kept = await thread(_put_aside, session, folder, discard)
            receipt |= {"discarded": kept is None, "partial_path": str(kept) if kept else None}
        except OSError as obstacle:
            # The data root is away, and the operator is told now. What was to be discarded goes with the
            # sweep when the root is back; what was to be kept is named, so that the sweep leaves it.
            receipt |= {"discarded": False, "left": str(folder), "reason": str(obstacle)}
            if not discard and session.state not in (State.PENDING, State.VALIDATING):
                receipt["partial_path"] = str(session.tree or folder)
        error = Failure(code="cancelled", message="The session was cancelled.", details=receipt)
        return await self.record(session, Cancelled(error=error))

    async def _advance(self, session: Session, *, verify: bool) -> Session:
        try:
            result = await self._attempted(session, verify=verify)
            if session.state in _ON_ROOT and (obstacle := await self._away(session)):
                raise obstacle
            if isinstance(result, Failure):
                return await self.fail(session, result)
            return await self._recorded(session, result)
        except BlockedOn as obstacle:
            return await self._block(session, obstacle)
        except DestinationHeld:
            return session  # another session was quicker; the gate looks again
        finally:
            self._chosen.pop(session.session_id, None)

    async def _recorded(self, session: Session, outcomes: tuple[Outcome, ...]) -> Session:
        """Record what a step came to; a session whose outcome the store refuses must not be left as it is."""
        try:
            return await self.record(session, *outcomes)
        except (Moved, DestinationHeld):
            raise
        except Exception:  # noqa: BLE001 - whatever it is: nothing else would ever move the session again
            return await self.fail(session, _internal(session))

    async def _attempted(self, session: Session, *, verify: bool) -> tuple[Outcome, ...] | Failure:
        """What the step came to; BlockedOn for what may pass by itself."""
        try:
            lost = await self._lost(session) if verify else None
            return lost or await self._steps[session.state](session)
        except (Moved, BlockedOn):
            raise
        except StoreUnavailable as unavailable:
            raise BlockedOn(unavailable.code, unavailable.message) from unavailable
        except OSError as error:
            if obstacle := blocked_by(error) or await self._away(session):
                raise obstacle from error
            return _internal(session)
        except Exception:  # noqa: BLE001 - the edge of a step: whatever it is, the session must learn of it
            return _internal(session)

    async def record(self, session: Session, *outcomes: Outcome) -> Session:
        """Record until the store takes it: what a step has done is not done again for a full disk."""
        for pause in itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1])):
            try:
                return await self._store.record(session, *outcomes)
            except StoreUnavailable as unavailable:
                log.warning(
                    "The store takes no write; trying again.",
                    session_id=session.session_id,
                    why=str(unavailable),
                )
                await asyncio.sleep(pause)
        raise AssertionError("the pauses have no end")

    async def _block(self, session: Session, obstacle: BlockedOn) -> Session:
        before = session.blocked_on or {}
        same = before.get("code") == obstacle.code and before.get("message") == obstacle.message
        now = datetime.now(UTC)
        since = str(before["since"]) if same else timestamp(now)
        waited = (now - datetime.fromisoformat(since)).total_seconds()
        pause = next((seconds for seconds in RETRY_SECONDS if seconds > waited), RETRY_SECONDS[-1])
        blocked = Blocked(
            code=obstacle.code,
            message=obstacle.message.encode(errors="backslashreplace").decode(),
            since=since,
            retry_at=timestamp(now + timedelta(seconds=pause)),
            again=same,
        )
        log.warning("A step waits for something to pass.", session_id=session.session_id, code=obstacle.code)
        return await self.record(session, blocked)

    async def _lost(self, session: Session) -> Failure | None:
        """Why a session that is taken up with a tree cannot go on with it; None if it can."""
        tree = known(session.tree)
        if session.state is State.SYNC_QUEUED and not await thread(os.path.lexists, tree):
            return None  # perhaps published already: that is for the step to find out
        digest = await self._store.manifest(session.session_id)
        try:
            if await thread(publish.verify, tree, digest, owned=provenance.OWNED):
                return None
        except OSError as error:
            if not _is_unreadable_for_good(session, error):
                raise
        return Failure(
            code="staging_lost", message="The files that this session had built are not as it left them."
        )

    # The steps, in the order of the road

    async def _begin(self, _session: Session) -> tuple[Outcome, ...]:
        return (Begun(),)

    async def _validate(self, session: Session) -> tuple[Outcome, ...] | Failure:
        """The gate, and the pinning of what it let pass.

        A run without a date takes the next second whose folder no live session holds.
        """
        settings = self._config.current
        root = settings.paths.local_root
        if root is None:
            raise BlockedOn("setup_incomplete", "the config names no data root any more")
        await self._found(root)
        folder = publish.session_folder(root, session.session_id)
        await thread(_clear, folder, None)
        passed = await self._passed(session, settings, folder)
        if isinstance(passed, Failure):
            return passed
        refused = await thread(pinning.pin, passed.template.path, folder / "template")
        if refused is not None:
            return refused
        return await thread(_acceptance, session, passed, settings.validator, root)

    async def _passed(self, session: Session, settings: Settings, folder: Path) -> gate.Passed | Failure:
        inputs = _inputs(session.request)
        if inputs.kind == "project" or inputs.run_date is not None:
            return await self._examined(session, inputs, settings, folder, frozenset())
        self._chosen.pop(session.session_id, None)
        # One run after the other, so that each sees which seconds those before it have taken.
        async with self._choosing_second:
            # In this order: a choice is dropped from memory after it has been committed.
            held = frozenset(self._chosen.values()) | await self._store.held()
            passed = await self._examined(session, inputs, settings, folder, held)
            if isinstance(passed, gate.Passed):
                self._chosen[session.session_id] = passed.destination_key
            return passed

    async def _examined(
        self, session: Session, inputs: gate.Inputs, settings: Settings, folder: Path, held: frozenset[str]
    ) -> gate.Passed | Failure:
        passed = await thread(
            gate.examine, inputs, settings, now=datetime.now(UTC), session_folder=folder, held=held
        )
        if isinstance(passed, Failure):
            return passed
        holder = await self._store.holder(session.session_id, passed.destination_key, passed.project_key)
        if holder is None:
            return passed
        message = "Another session is creating this folder, or the project that it belongs to."
        field = _NAMING[session.kind]
        return Failure(code="destination_taken", message=message, field=field, details={"session_id": holder})

    async def _found(self, root: Path) -> None:
        """Tell a new data root from one that is not mounted: that has lost its mark."""
        known = root in self._founded or await self._store.knows_root(root)
        present = await thread(publish.root_present, root)
        if known and not present:
            raise _not_mounted(root)
        if not known:
            await thread(publish.found_root, root)
            await self._store.note_root(root)
        self._founded.add(root)

    async def _away(self, session: Session) -> BlockedOn | None:
        """The root of the session's files, if it went away: then nothing that a step has found there is true."""
        root = session.local_root or self._config.current.paths.local_root
        if root is None or await thread(publish.root_present, root):
            return None
        return _not_mounted(root)

    async def _render(self, session: Session) -> tuple[Outcome, ...] | Failure:
        pinned, destination = pinned_by(session), known(session.destination)
        folder = publish.session_folder(known(session.local_root), session.session_id)
        tree = await thread(publish.prepare, folder, destination)
        if not await thread(publish.is_there, folder / "template"):
            return Failure(code="staging_lost", message="The copy of the template that was made is gone.")
        job = render.Job(
            template=folder / "template",
            source=pinned.template_path,
            tree=tree,
            destination=destination,
            answers=pinned.answers,
        )
        async with telling.progress(self._store, session) as progress:
            rendered = await self._renderer.render(job, progress)
        if isinstance(rendered, Failure):
            return rendered
        if (obstacle := await thread(provenance.in_the_way, tree)) is not None:
            message = f"The template makes a folder {obstacle}, where a file of ours has to be."
            return Failure(code="render_failed", message=message)
        manifest = await thread(_seal, tree)
        outcome = Rendered(
            tree=tree,
            manifest=manifest,
            rendered=rendered.files,
            answers=pinned.answers | rendered.answers,
            log=rendered.log,
        )
        # Without plugins nothing happens between the two moves, so they share a transaction.
        return (outcome,) if pinned.plugins else (outcome, Transformed())

    async def _document(self, session: Session) -> tuple[Outcome, ...]:
        runs = await self._store.plugin_runs(session.session_id)
        answered = await self._store.answered(session.session_id)
        await thread(_write_provenance, session, pinned_by(session), runs, answered)
        return (Documented(),)

    async def _check(self, session: Session) -> tuple[Outcome, ...]:
        findings = await thread(_examine, session, pinned_by(session))
        checked = Checked(findings=tuple(msgspec.to_builtins(finding) for finding in findings))
        if not findings:
            return (checked,)
        message = f"{len(findings)} findings block the copy to the NAS; the first: {findings[0].message}"
        return (Warned(code="blocked_by_validation", message=message), checked)

    async def _publish(self, session: Session) -> tuple[Outcome, ...] | Failure:
        pinned, destination = pinned_by(session), known(session.destination)
        refused = await thread(publish.publish, known(session.tree), destination, session.session_id)
        if refused is not None:
            return refused
        # From here on nothing may fail the session: its folder is there.
        cautions = await thread(_tidy_up, session, pinned)
        warnings = await self._store.warnings(session.session_id, SHOWN)
        warnings += [{"code": caution.code, "message": caution.message} for caution in cautions]
        result: dict[str, object] = {
            "path": str(destination),
            "sync_status": _sync_status(session.findings),
            "blocked": bool(session.findings),
            "findings": _fitting(session.findings),
            "findings_total": len(session.findings),
            "warnings": _fitting(warnings),
        }
        return (*cautions, Published(result=result, nas_path=pinned.nas_path))

    async def _may_have_files(self, session: Session) -> bool:
        """Not one whose gate was not passed, below a root in which no session has begun yet."""
        root = self._config.current.paths.local_root
        if session.local_root is not None or root is None or root in self._founded:
            return True
        try:
            return await self._store.knows_root(root)
        except StoreUnavailable:
            return True

    def _folder(self, session: Session) -> Path | None:
        root = session.local_root or self._config.current.paths.local_root
        return publish.session_folder(root, session.session_id) if root else None


def _inputs(body: requests.CreateBody) -> gate.Inputs:
    return msgspec.convert(msgspec.to_builtins(body), type=gate.Inputs)


def _acceptance(session: Session, passed: gate.Passed, rules: Validator, root: Path) -> tuple[Outcome, ...]:
    lims = session.request.lims_project
    if session.kind == "run":
        project = root / passed.equipment.id / passed.project_short_id
        lims = provenance.project_lims(project) or lims
    pinned = Pinned(
        label=passed.label,
        operator=passed.operator,
        objective=passed.objective,
        equipment=passed.equipment,
        template=passed.template.name,
        template_version=passed.template.version,
        template_path=passed.template.path,
        run_scope=passed.template.run_scope,
        answers_file=passed.template.answers_file,
        plugins=passed.plugins,
        plugins_fatal=passed.template.plugins_fatal,
        readme=passed.readme,
        answers=passed.answers,
        lims_project=lims,
        nas_path=provenance.nas_path(passed.equipment, root, passed.destination),
        rules=rules,
    )
    accepted = Accepted(
        destination=passed.destination,
        destination_key=passed.destination_key,
        project_key=passed.project_key,
        project_short_id=passed.project_short_id,
        local_root=root,
        pinned=encoded(pinned),
    )
    return (accepted, *(Warned(code=caution.code, message=caution.message) for caution in passed.warnings))


def _seal(tree: Path) -> str:
    """Put the rendered README aside, and bring the tree and its manifest to the disk."""
    readme = tree / "README.md"
    if readme.is_file() and not readme.is_symlink():
        disk.write_whole(tree.parent / provenance.ASIDE, readme.read_bytes())
    digest = publish.seal(tree, owned=provenance.OWNED)
    publish.sync_tree(tree)
    return digest


def _write_provenance(
    session: Session, pinned: Pinned, runs: Sequence[PluginRun], answered: Sequence[AnsweredPrompt]
) -> None:
    tree = known(session.tree)
    aside = tree.parent / provenance.ASIDE
    facts = provenance.Facts(
        session_id=session.session_id,
        kind=session.kind,
        run_kind=session.run_kind,
        created_at=datetime.fromisoformat(session.created_at),
        created_by=_account(),
        label=pinned.label,
        operator=pinned.operator,
        objective=pinned.objective,
        equipment=pinned.equipment,
        project_short_id=known(session.project_short_id),
        lims_project=pinned.lims_project,
        template_name=pinned.template,
        template_version=pinned.template_version,
        template_path=str(pinned.template_path),
        template_run_scope=pinned.run_scope,
        variables=session.request.variables,
        template_fields=pinned.readme.template_fields,
        config_fields=pinned.readme.config_fields,
        custom_fields=pinned.readme.custom_fields,
        destination=known(session.destination),
        nas_path=pinned.nas_path,
        plugins_applied=[_applied(run) for run in runs if run.version is not None],
        plugin_inputs=[entry for prompt in answered for entry in _inputs_of(prompt)],
        rendered_readme=aside.read_text(encoding="utf-8", errors="replace") if aside.exists() else None,
    )
    provenance.write(tree, facts)


def _applied(run: PluginRun) -> dict[str, object]:
    """An entry of creation.json; what did not run has used nothing up."""
    entry: dict[str, object] = {
        "plugin": run.plugin,
        "version": run.version,
        "files_affected": run.files_affected,
        "status": run.status,
    }
    used = {name: getattr(run, name) for name in ("duration_ms", "exit_code", "peak_memory_mb")}
    return entry if run.duration_ms is None else entry | {"isolation": used}


def _inputs_of(prompt: AnsweredPrompt) -> Iterator[dict[str, object]]:
    for field in prompt.fields:
        if field.secret or field.id in prompt.answer:
            entry: dict[str, object] = {"plugin": prompt.plugin, "file": prompt.file, "field": field.id}
            entry |= {"value": prompt.answer.get(field.id), "operator": prompt.operator}
            told = {key: value for key, value in entry.items() if value is not None}
            yield told | {"at": prompt.answered_at}


def _examine(session: Session, pinned: Pinned) -> tuple[check.Finding, ...]:
    tree = known(session.tree)
    findings: tuple[check.Finding, ...] = check.check(
        tree,
        rendered=frozenset(session.rendered),
        # Wider than the tree: the pinned template lies beside it.
        staging=publish.session_folder(known(session.local_root), session.session_id),
        kind=session.kind,
        run_kind=session.run_kind,
        destination=known(session.destination),
        rules=pinned.rules,
    )
    if findings:
        provenance.set_sync_status(tree, _sync_status(findings))
    return findings


def _sync_status(findings: tuple[object, ...]) -> str:
    return "blocked_by_validation" if findings else "pending"


def _account() -> str:
    """The account that the service runs under; its number where it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _tidy_up(session: Session, pinned: Pinned) -> tuple[Warned, ...]:
    """What comes after the publishing; what of it cannot be done is a warning, and for the sweep."""
    cautions: list[Warned] = []
    equipment = known(session.local_root) / pinned.equipment.id
    try:
        provenance.write_equipment(equipment, pinned.equipment, datetime.now(UTC))
    except (OSError, provenance.Unreadable) as error:
        cautions.append(
            Warned(code="equipment_not_noted", message=f"equipment.json was not written: {error}")
        )
    try:
        _clear(publish.session_folder(known(session.local_root), session.session_id), None)
    except OSError as error:
        cautions.append(Warned(code="staging_left", message=f"the staging folder is cleared later: {error}"))
    return tuple(cautions)


def _fitting(entries: Sequence[dict[str, object]]) -> tuple[dict[str, object], ...]:
    """The first of `entries`, as many as a frame has room for."""
    sizes = itertools.accumulate(len(msgspec.json.encode(entry)) for entry in entries)
    return tuple(entry for entry, size in zip(entries, sizes, strict=True) if size <= SHOWN_BYTES)[:SHOWN]


def _put_aside(session: Session, folder: Path | None, discard: bool) -> Path | None:
    return _clear(folder, None if discard else _begun(session, folder))


def _begun(session: Session, folder: Path | None) -> Path | None:
    """The tree of a session, also one that is not rendered to its end; None where nothing stands in it."""
    if session.tree is not None or folder is None:
        return session.tree
    return next((tree for tree in folder.glob("*/tree") if any(tree.iterdir())), None)


def _is_unreadable_for_good(session: Session, error: OSError) -> bool:
    """A bad sector does not pass by itself, and this session cannot be cancelled any more."""
    blocked = session.blocked_on or {}
    if (
        session.state is not State.SYNC_QUEUED
        or error.errno != errno.EIO
        or blocked.get("code") != "disk_error"
    ):
        return False
    return datetime.now(UTC) - datetime.fromisoformat(str(blocked["since"])) > UNREADABLE_AFTER


def _not_mounted(root: Path) -> BlockedOn:
    return BlockedOn("not_mounted", f"the file system is not mounted: {root}")


def _may_be_there(tree: Path | None) -> bool:
    """Whether something of the tree is there, or its root is away so that nothing can be seen."""
    return tree is not None and (os.path.lexists(tree) or not publish.root_present(tree.parents[3]))


def _clear(folder: Path | None, tree: Path | None) -> Path | None:
    """Remove what a session keeps aside, all but `tree`; where that is, if it was there."""
    if folder is None:
        return None
    if not publish.root_present(folder.parent.parent):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(folder.parent.parent))
    if tree is None or not os.path.lexists(folder):
        publish.discard(folder)  # also what a death in the middle of this has left
        return None
    return publish.keep(folder, tree)


def _internal(session: Session) -> Failure:
    """Called while an exception is handled: the log tells all, the session nothing of the inside."""
    log.exception("A step failed unforeseen.", session_id=session.session_id, state=session.state)
    return Failure(
        code="internal_error",
        message="An internal error ended this session; the log of the service tells more.",
        details={"trace_id": session.trace_id},
    )
