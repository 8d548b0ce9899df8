"""A template looked over by its author, before a session renders it.

Only looks, and says what it finds: what `copier.yml` tells, what Jinja cannot read, and, where the template can be
rendered without an operator, what comes of it. It is rendered as a session would render it, aside.
"""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import jinja2

from app.checkup import Subject
from app.errors import Failure
from app.sessions.consistency import Complaint
from app.settings import Settings
from app.steps import check, templates
from app.steps.plugins import registry
from app.steps.render import Job, Rendered, Renderer
from app.steps.templates import Template

_NOT_RENDERED = {"copier.yml", "copier.yaml", "__pycache__", ".git", ".DS_Store", ".svn"}


async def look_over(folder: Path, now: Settings) -> Subject:
    """All that can be said of the template in `folder` without an operator's answers."""
    found = [each async for each in _of_template(folder.absolute(), now)]
    return Subject("template", str(folder), tuple(found))


async def _of_template(folder: Path, now: Settings) -> AsyncIterator[Complaint]:
    template = templates.load(folder)
    if isinstance(template, Failure):
        yield _error(template.message, folder)
        return
    if template.has_tasks:
        yield Complaint("warning", "has tasks, which are never run", str(folder), "")
    for complaint in _of_listed(template, now):
        yield complaint
    broken = list(_of_jinja(template))
    for complaint in broken:
        yield complaint
    if not broken:
        for complaint in await _of_rendering(template, now):
            yield complaint


def _of_listed(template: Template, now: Settings) -> Iterator[Complaint]:
    if not template.plugins or not now.paths.plugin_dir:
        return
    found = registry.catalogue(now.paths.plugin_dir, allow_network=now.plugins.allow_network)
    for name in template.plugins:
        if found.named(name) is None:
            what = f"lists the plugin {name}, which is not in {now.paths.plugin_dir}"
            yield Complaint("warning", what, str(template.path), "sessions leave it out, with a warning")


def _of_jinja(template: Template) -> Iterator[Complaint]:
    """What Jinja cannot read: in contents, in names, and in the questions."""
    jinja = jinja2.Environment(autoescape=False, **templates.marks(template.path))  # type: ignore[arg-type]
    for text, where in (*_of_names(template), *_of_questions(template)):
        if complaint := _unread(jinja, text, where):
            yield complaint
    for path in _rendered(template):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            if template.suffix:
                yield _error("is no UTF-8 text, so that Jinja cannot read it", path)
            continue
        if complaint := _unread(jinja, text, str(path)):
            yield complaint


def _unread(jinja: jinja2.Environment, text: str, where: str) -> Complaint | None:
    try:
        jinja.parse(text)
    except jinja2.TemplateSyntaxError as error:
        return _error(f"is no Jinja: {error.message}", f"{where}:{error.lineno}")
    except RecursionError:
        return _error("is nested too deep for Jinja", where)
    return None


def _of_names(template: Template) -> Iterator[tuple[str, str]]:
    for path in _files(template):
        yield path.name, str(path)


def _of_questions(template: Template) -> Iterator[tuple[str, str]]:
    for question in template.questions:
        where = f"{template.path}: the question {question.name}"
        for text in (question.default, question.when, question.help, question.placeholder):
            if isinstance(text, str):
                yield text, where


def _rendered(template: Template) -> Iterator[Path]:
    return (path for path in _files(template) if path.is_file() and path.name.endswith(template.suffix))


def _files(template: Template) -> Iterator[Path]:
    for folder, folders, files in os.walk(template.path / template.subdirectory):
        folders[:] = sorted(set(folders) - _NOT_RENDERED)
        for name in sorted((set(files) - _NOT_RENDERED) | set(folders)):
            yield Path(folder, name)


async def _of_rendering(template: Template, now: Settings) -> list[Complaint]:
    """Render it as a session would that answers nothing, and look at what came of it."""
    if unanswered := [question.name for question in template.questions if question.required]:
        what = f"was not rendered: there is no default for {', '.join(unanswered)}"
        return [Complaint("note", what, str(template.path), "")]
    if template.type == "equipment":
        return []
    with TemporaryDirectory(prefix="exlab-lint-") as aside:
        tree = Path(os.path.realpath(aside), "tree")
        tree.mkdir()
        return [each async for each in _of_rendered(template, tree, now)]


async def _of_rendered(template: Template, tree: Path, now: Settings) -> AsyncIterator[Complaint]:
    kind: Literal["project", "run"] = "run" if template.type == "run" else "project"
    run_kind: check.RunKind | None = None
    destination = Path("/data/CONFOCAL_01/PROJ-1")
    if kind == "run":
        run_kind = "test" if template.run_scope == "test" else "experimental"
        below = "TestRuns/TestRun_" if run_kind == "test" else "Run_"
        destination /= f"{below}2026-04-17T14-32-05"
    answers: dict[str, object] = {
        "label": "Example",
        "operator": "example",
        "objective": "See whether it renders",
        "equipment_id": "CONFOCAL_01",
        "project_short_id": "PROJ-1",
        "destination": str(destination),
    }
    job = Job(
        template=template.path,
        source=template.path,
        tree=tree,
        destination=destination,
        answers=answers | ({"run_kind": run_kind} if run_kind else {}),
    )
    renderer = Renderer(now.service)
    try:
        rendered = await renderer.render(job, lambda *_: None)
    finally:
        await renderer.close()
    if not isinstance(rendered, Rendered):
        yield _error(rendered.message, template.path)
        return
    findings = check.check(
        tree,
        rendered=frozenset(rendered.files),
        staging=tree,
        kind=kind,
        run_kind=run_kind,
        destination=destination,
        rules=now.validator,
    )
    for finding in findings:
        where = f"{finding.path}:{finding.line}" if finding.line else finding.path
        advice = "a folder with this is published, and not copied to the NAS"
        yield Complaint("warning", finding.message, f"{template.path}: as rendered, {where}", advice)


def _error(what: str, where: Path | str, advice: str = "") -> Complaint:
    return Complaint("error", what, str(where), advice)
