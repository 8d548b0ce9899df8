"""One plugin after the other over the files of a session, and the questions that they ask.

A plugin works on a copy of the last good tree. The copy takes that tree's place when the plugin is through,
and is thrown away when it asks, fails or cheats; so undoing needs no work, and a plugin that is run again
finds what it found the first time. What an operator entered as a secret is in memory only, from the answer
until the plugin is through: a service that was restarted in between asks for it again. How a plugin is run is
the host's affair.
"""

import errno
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import uuid_utils

from app.errors import Failure, InputInvalid, blocked_by
from app.sessions import telling
from app.sessions.lifecycle import (
    Asked,
    Outcome,
    PluginRan,
    PluginStatus,
    Progressed,
    Said,
    Transformed,
    Warned,
)
from app.sessions.pinned import Pinned, pinned_by
from app.sessions.prompts import PromptField, entered_secretly, fitting_defaults
from app.sessions.requests import ResumeBody
from app.sessions.session import AnsweredPrompt, PluginRun, Session
from app.sessions.store import Store
from app.sessions.work import known, thread
from app.settings import ConfigFile
from app.steps import changes, provenance, publish
from app.steps.plugins import registry
from app.steps.plugins.host import Asked as AskedByPlugin
from app.steps.plugins.host import Broken, Context, Host, Line, Ran, Task, Unavailable, redacted
from app.steps.plugins.registry import Manifest

_BAD: tuple[PluginStatus, ...] = ("failed", "timeout", "policy_violation")
_FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = 64 * 1024**2
"""Bytes that are free on a disk that is not full."""
DEFAULTS_LIMIT = 64 * 1024
"""Bytes of the answers that another try is offered for one question."""
_CHANGED = "plugin_changed"
_WARNINGS = 1000
_SECRETS_LOST = "The service was restarted before the plugin was through, and keeps no secrets. "


class _Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The plugin whose turn it is, the `ordinal`-th of `total`."""

    ordinal: int
    total: int
    plugin: str
    manifest: Manifest

    def ran(self, status: PluginStatus, message: str | None = None) -> PluginRan:
        return PluginRan(
            ordinal=self.ordinal,
            total=self.total,
            plugin=self.plugin,
            version=self.manifest.version,
            status=status,
            message=message,
        )


class PluginPass:
    """Runs the plugins of sessions of one store."""

    def __init__(self, store: Store, host: Host, config: ConfigFile) -> None:
        self._store = store
        self._host = host
        self._config = config
        # By session and prompt: what was entered into its secret fields.
        self._secrets: dict[str, dict[str, dict[str, object]]] = {}

    async def learn(self, session_id: str, body: ResumeBody) -> None:
        """Keep the secrets of an answer that the store has taken, before the plugin runs with it.

        The repeat of an answer may come at any time, and is known by what it holds besides secrets.
        """
        prompts = await self._store.answered(session_id)
        meant = [prompt for prompt in prompts if body.prompt_id in (None, prompt.prompt_id)]
        if not meant or not any(field.secret for field in meant[-1].fields):
            return
        session = await self._store.get(session_id)
        runs = await self._store.plugin_runs(session_id)
        planned = pinned_by(session).plugins[len(runs) :]
        if session.terminal or not planned or meant[-1].plugin != planned[0].name:
            return
        try:
            values = entered_secretly(meant[-1].fields, body.extra_inputs)
        except InputInvalid:
            return
        self._secrets.setdefault(session_id, {}).setdefault(meant[-1].prompt_id, values)

    def forget(self, session_id: str) -> None:
        """The session is over, or the plugin through that was told a secret."""
        self._secrets.pop(session_id, None)

    async def step(self, session: Session) -> tuple[Outcome, ...] | Failure:
        """Have the next plugin run, and tell what became of it; or that none is left."""
        result = await self._step(session)
        if isinstance(result, tuple) and not any(isinstance(outcome, Asked) for outcome in result):
            self.forget(session.session_id)
        return result

    async def _step(self, session: Session) -> tuple[Outcome, ...] | Failure:
        pinned = pinned_by(session)
        runs = await self._store.plugin_runs(session.session_id)
        if pinned.plugins_fatal and runs and runs[-1].status in _BAD:
            return _fatal(runs[-1])
        if len(runs) == len(pinned.plugins):
            return (Transformed(),)
        catalogue = await self._catalogue()
        answered = await self._store.answered(session.session_id)
        try:
            if not runs and not answered and (refused := await self._validated(session, catalogue)):
                return refused
            return await self._next(session, pinned, catalogue, len(runs), answered)
        except Unavailable as unavailable:
            return Failure(code="plugin_host_unavailable", message=str(unavailable))

    async def _catalogue(self) -> registry.Catalogue:
        now = self._config.current
        return await thread(registry.catalogue, now.paths.plugin_dir, allow_network=now.plugins.allow_network)

    async def _validated(self, session: Session, catalogue: registry.Catalogue) -> Failure | None:
        """What the plugins say of the variables, before any of them runs; the first to complain fails it.

        One that breaks down over the question has said nothing: what it is worth will show when it runs.
        """
        for planned in pinned_by(session).plugins:
            manifest = catalogue.named(planned.name)
            if manifest is None:
                continue
            aside = publish.attempt(known(session.tree).parents[1])
            try:
                complaints = await self._host.validate(manifest, _variables(session), aside)
            finally:
                await thread(publish.forget, aside / "tree")
            if complaints and not isinstance(complaints, Broken):
                return Failure(
                    code="plugin_variable_validation_failed",
                    message=f"{planned.name}: {complaints[0]}",
                    field="variables",
                    details={"plugin": planned.name, "complaints": list(complaints)},
                )
        return None

    async def _next(
        self,
        session: Session,
        pinned: Pinned,
        catalogue: registry.Catalogue,
        through: int,
        answered: list[AnsweredPrompt],
    ) -> tuple[Outcome, ...] | Failure:
        planned, total = pinned.plugins[through], len(pinned.plugins)
        manifest = catalogue.named(planned.name)
        if manifest is None:
            message = _why_missing(planned.name, catalogue)
            name = planned.name
            missing = PluginRan(ordinal=through + 1, total=total, plugin=name, version=None, status="skipped")
            return (msgspec.structs.replace(missing, message=message),)
        turn = _Turn(ordinal=through + 1, total=total, plugin=planned.name, manifest=manifest)
        own = [prompt for prompt in answered if prompt.plugin == planned.name]
        secrets = self._secrets.get(session.session_id, {})
        if (question := _asked_again(own, secrets)) is not None:
            return (question,)
        tree = known(session.tree)
        await thread(publish.only, tree.parents[1], tree)
        files = await thread(_offered, tree, manifest, pinned.answers_file)
        if not files:
            return (turn.ran("skipped"),)
        changed = await self._changed(session, planned.version, turn)
        outcome = await self._run(session, turn, files, own, secrets)
        if isinstance(outcome, Asked):
            return (*changed, outcome)
        if outcome.status in _BAD and not await self._untouched(session, tree):
            message = f"The plugin {turn.plugin} reached the files that others had built."
            return Failure(code="staging_lost", message=message)
        return (*changed, outcome)

    async def _run(
        self,
        session: Session,
        turn: _Turn,
        files: tuple[str, ...],
        answered: list[AnsweredPrompt],
        secrets: Mapping[str, dict[str, object]],
    ) -> PluginRan | Asked:
        if session.blocked_on is None:
            begun = Progressed(current=turn.ordinal - 1, total=turn.total, plugin=turn.plugin)
            await telling.tell(self._store, session, begun)
        tree = await thread(publish.branch, known(session.tree))
        task = _task(session, turn, tree, files, answered, secrets)
        full: OSError | None = None
        kept = False
        try:
            outcome = await self._on_copy(session, turn, task)
            kept = isinstance(outcome, PluginRan) and outcome.tree is not None
        except OSError as error:
            if error.errno not in _FULL:
                raise
            full = error
        finally:
            # Before what is in the way is recorded, which may need the very room that the copy takes.
            if not kept:
                await thread(publish.forget, tree)
        if full is None:
            return outcome
        # At first it may have been another program that filled the disk; the second time it was the plugin.
        before = (session.blocked_on or {}).get("code")
        if before != "disk_full" or not await thread(_has_room, known(session.tree)):
            raise full
        return turn.ran("failed", "it ran out of room on a disk that has some without it")

    async def _on_copy(self, session: Session, turn: _Turn, task: Task) -> PluginRan | Asked:
        async with telling.progress(self._store, session, plugin=turn.plugin) as progress:
            ended = await self._host.run(task, progress)
        return await self._judged(session, turn, task, ended)

    async def _changed(self, session: Session, before: str | None, turn: _Turn) -> tuple[Warned, ...]:
        """A warning, once, where the plugin is another one than was there when the session began."""
        now = turn.manifest.version
        if before in (None, now):
            return ()
        warned = await self._store.warnings(session.session_id, _WARNINGS)
        if any(told.get("code") == _CHANGED and told.get("plugin") == turn.plugin for told in warned):
            return ()
        message = f"{turn.plugin} was {before} when the session began, and runs as {now}"
        return (Warned(code=_CHANGED, message=message, plugin=turn.plugin),)

    async def _untouched(self, session: Session, tree: Path) -> bool:
        """Whether the last good tree is what it was: not every machine can keep a plugin away from it."""
        digest = await self._store.manifest(session.session_id)
        return await thread(publish.verify, tree, digest, owned=provenance.OWNED)

    async def _judged(
        self, session: Session, turn: _Turn, task: Task, ended: Ran | AskedByPlugin | Broken
    ) -> PluginRan | Asked:
        said = _said(ended.log)
        match ended:
            case AskedByPlugin():
                question = await self._question(session, turn, ended)
                if isinstance(question, Asked):
                    return question
                ran = turn.ran("failed", question)
            case Broken():
                ran = turn.ran(ended.status, ended.message)
            case Ran():
                ran = await thread(_kept, known(session.tree), turn, task)
        used = msgspec.structs.asdict(ended.usage)
        return msgspec.structs.replace(ran, log=said, **used)

    async def _question(self, session: Session, turn: _Turn, asked: AskedByPlugin) -> Asked | str:
        """What is asked; or why it cannot be."""
        try:
            fields = msgspec.convert(asked.fields, type=tuple[PromptField, ...])
        except (msgspec.ValidationError, ValueError) as error:
            return f"it asked with fields that cannot be shown: {error}"
        names = [field.id for field in fields]
        if not fields or len(set(names)) < len(names):
            return "it asked with no fields, or with two of one id"
        if session.retry_of is not None:
            earlier = await self._store.answered(session.retry_of)
            fields = fitting_defaults(fields, _values(earlier, turn.plugin, asked.file), DEFAULTS_LIMIT)
        return _asked(turn.plugin, asked.file, asked.reason, fields, _said(asked.log))


def _fatal(run: PluginRun) -> Failure:
    return Failure(
        code="plugin_failed",
        message=f"The plugin {run.plugin} did not succeed ({run.status}): {run.message}",
        details={"plugin": run.plugin, "status": run.status},
    )


def _why_missing(name: str, catalogue: registry.Catalogue) -> str:
    """For the operator; the error of a disk that may come back is raised, and waited for."""
    for problem in catalogue.problems:
        if problem.error is not None and blocked_by(problem.error):
            raise problem.error
    said = [problem.message for problem in catalogue.problems if problem.path.name == name]
    return (
        f"it was skipped, since it cannot be used: {said[0]}"
        if said
        else "it was skipped, since it is not there"
    )


def _variables(session: Session) -> dict[str, object]:
    return session.answers or pinned_by(session).answers


def _asked_again(
    answered: Iterable[AnsweredPrompt], secrets: Mapping[str, Mapping[str, object]]
) -> Asked | None:
    """The question for what was entered as a secret and is not known any more, of one file at a time."""
    lost: dict[tuple[str | None, str], tuple[AnsweredPrompt, PromptField]] = {}
    for prompt in answered:
        for field in prompt.fields:
            if prompt.prompt_id in secrets:
                lost.pop((prompt.file, field.id), None)
            elif field.secret:
                lost[prompt.file, field.id] = prompt, field
    if not lost:
        return None
    first = next(prompt for prompt, _ in lost.values())
    fields = tuple(field for prompt, field in lost.values() if prompt.file == first.file)
    reason = _SECRETS_LOST + first.reason.removeprefix(_SECRETS_LOST)
    return _asked(first.plugin, first.file, reason, fields, ())


def _asked(
    plugin: str, file: str | None, reason: str, fields: tuple[PromptField, ...], said: tuple[Said, ...]
) -> Asked:
    return Asked(
        prompt_id=str(uuid_utils.uuid7()),
        plugin=plugin,
        file=file,
        reason=reason.replace("\0", ""),  # SQLite's JSON ends a text there
        fields=tuple(msgspec.Raw(msgspec.json.encode(field)) for field in fields),
        log=said,
    )


def _values(answered: Iterable[AnsweredPrompt], plugin: str, file: str | None) -> dict[str, object]:
    """What a session was told by its operator for one file, without secrets."""
    own = [prompt.answer for prompt in answered if prompt.plugin == plugin and prompt.file == file]
    return {name: value for answer in own for name, value in answer.items()}


def _offered(tree: Path, manifest: Manifest, answers_file: str) -> tuple[str, ...]:
    """The files below a tree that the plugin gets to see, links not followed."""
    protected = changes.protected(answers_file)
    return manifest.offered(name for name in registry.files_below(tree) if not protected(name))


def _task(
    session: Session,
    turn: _Turn,
    tree: Path,
    files: tuple[str, ...],
    answered: list[AnsweredPrompt],
    secrets: Mapping[str, dict[str, object]],
) -> Task:
    pinned = pinned_by(session)
    answers: dict[str, dict[str, object]] = {}
    for prompt in answered:
        left_empty: dict[str, object] = dict.fromkeys(field.id for field in prompt.fields)
        told = left_empty | prompt.answer | secrets.get(prompt.prompt_id, {})
        answers.setdefault(prompt.file or "", {}).update(told)
    texts = {str(value) for values in secrets.values() for value in values.values() if _tells(value)}
    return Task(
        manifest=turn.manifest,
        tree=tree,
        scratch=publish.scratch(tree),
        files=files,
        context=Context(
            variables=_variables(session),
            answers_file=pinned.answers_file,
            template_name=pinned.template,
            template_version=pinned.template_version,
            run_kind=session.run_kind or "",
            equipment_id=session.equipment_id,
            project=known(session.project_short_id),
            destination=known(session.destination),
        ),
        answers=answers,
        secrets=tuple(texts),
    )


def _tells(value: object) -> bool:
    """Whether a secret can be told from what stands in texts by chance."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and len(str(value)) > 2


def _has_room(tree: Path) -> bool:
    return shutil.disk_usage(tree).free > ROOM


def _kept(before: Path, turn: _Turn, task: Task) -> PluginRan:
    """What the plugin made, on the disk; or why it must not be kept."""
    tree = task.tree
    made = changes.compare(before, tree, protected=changes.protected(task.context.answers_file))
    if made.violations:
        more = len(made.violations) - 1
        message = redacted(made.violations[0], task.secrets) + (f" (and {more} more)" if more else "")
        return turn.ran("policy_violation", message)
    if not made.affected:
        return turn.ran("success")
    publish.clear_scratch(tree)
    # Only now: not every machine can keep a plugin away from what is beside its tree.
    publish.bring_along(before, tree, provenance.ASIDE)
    manifest = publish.seal(tree, owned=provenance.OWNED)
    publish.sync_tree(tree)
    return msgspec.structs.replace(
        turn.ran("success"),
        tree=tree,
        manifest=manifest,
        files_affected=tuple(redacted(path, task.secrets) for path in made.affected),
    )


def _said(lines: Iterable[Line]) -> tuple[Said, ...]:
    return tuple(Said(line.level, line.text) for line in lines)
