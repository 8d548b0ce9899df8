"""What is wrong on a workstation: with its config, templates, plugins and store, and the folders of its sessions.

Only looks, whether a service runs or not, and goes on after what is broken: of a config that cannot be used, what is
right of its `service` section still says where the store is.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from app import database
from app.errors import StoreRefused
from app.sessions import consistency
from app.sessions.consistency import Complaint
from app.settings import ConfigFile, Settings
from app.steps import provenance, templates
from app.steps.plugins import registry


class Subject(msgspec.Struct, frozen=True):
    """One thing that was looked at, and what came of it."""

    name: str
    place: str
    complaints: tuple[Complaint, ...]


def examine(file: ConfigFile) -> Iterator[Subject]:
    now = file.current
    yield Subject("config", str(file.path), tuple(_of_config(file)))
    yield Subject(
        "templates", str(now.paths.templates_dir or "no folder is named"), tuple(_of_templates(now))
    )
    yield Subject("plugins", str(now.paths.plugin_dir or "no folder is named"), tuple(_of_plugins(now)))
    yield _store(now)


def _of_config(file: ConfigFile) -> Iterator[Complaint]:
    for mistake in file.problem.mistakes if file.problem else ():
        where = f"{file.path}:{mistake.line or 1}"
        advice = "mend it: the service uses no other part of the file either"
        yield Complaint("error", f"{mistake.key}: {mistake.message}", where, advice)
    for missing in file.status.missing if not file.problem else ():
        advice = "mend it: until then no session can be opened"
        yield Complaint("error", f"{missing.field}: {missing.reason}", str(file.path), advice)
    for note in file.current.notes:
        yield Complaint("note", note, str(file.path), "")


def _templates(now: Settings) -> templates.Catalogue:
    folders = [now.paths.templates_dir] if now.paths.templates_dir else []
    if now.paths.local_root:
        folders += [
            now.paths.local_root / each.id / provenance.FOLDER / "templates" for each in now.equipment
        ]
    return templates.catalogue(folders)


def _of_templates(now: Settings) -> Iterator[Complaint]:
    for problem in _templates(now).problems:
        advice = "mend it or move it away: no session can be opened with it"
        yield Complaint("error", problem.message, str(problem.path), advice)


def _of_plugins(now: Settings) -> Iterator[Complaint]:
    found = registry.catalogue(now.paths.plugin_dir, allow_network=now.plugins.allow_network)
    for problem in found.problems:
        advice = "mend it or move it away: no session can run it"
        yield Complaint("error", problem.message, str(problem.path), advice)
    if now.plugins.python and not _runs(now.plugins.python):
        what = f"plugins.python is {now.plugins.python}, which is no program that this account may run"
        yield Complaint("error", what, str(now.source), "name a Python interpreter, or leave it out")
    for template in _templates(now).templates:
        for name in template.plugins:
            if found.named(name) is None:
                what = f"the template {template.name} lists the plugin {name}, which is not here"
                advice = "install it: sessions with this template leave it out, with a warning"
                yield Complaint("warning", what, str(template.path), advice)


def _runs(program: Path) -> bool:
    return program.is_file() and os.access(program, os.X_OK)


def _store(now: Settings) -> Subject:
    try:
        path = database.path_of(now.service.database_url)
    except StoreRefused as error:
        return Subject(
            "store", now.service.database_url, (Complaint("error", str(error), "service.database_url", ""),)
        )
    return Subject("store", str(path), tuple(consistency.examine(path, now.paths.local_root)))
