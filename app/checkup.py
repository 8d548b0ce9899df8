"""What is wrong on a workstation: with its config, its templates, its store, and the folders of its sessions.

Only looks, whether a service runs or not, and goes on after what is broken: of a config that cannot be used, what is
right of its `service` section still says where the store is.
"""

from collections.abc import Iterator

import msgspec

from app import database
from app.errors import StoreRefused
from app.sessions import consistency
from app.sessions.consistency import Complaint
from app.settings import ConfigFile, Settings
from app.steps import provenance, templates


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


def _of_templates(now: Settings) -> Iterator[Complaint]:
    folders = [now.paths.templates_dir] if now.paths.templates_dir else []
    if now.paths.local_root:
        folders += [
            now.paths.local_root / each.id / provenance.FOLDER / "templates" for each in now.equipment
        ]
    for problem in templates.catalogue(folders).problems:
        advice = "mend it or move it away: no session can be opened with it"
        yield Complaint("error", problem.message, str(problem.path), advice)


def _store(now: Settings) -> Subject:
    try:
        path = database.path_of(now.service.database_url)
    except StoreRefused as error:
        return Subject(
            "store", now.service.database_url, (Complaint("error", str(error), "service.database_url", ""),)
        )
    return Subject("store", str(path), tuple(consistency.examine(path, now.paths.local_root)))
