"""What a session works with from the gate on, whatever becomes of config, template and plugins meanwhile."""

from pathlib import Path
from typing import Any

import msgspec

from app.sessions.session import Session
from app.sessions.work import known
from app.settings import Equipment, Validator
from app.steps import gate


class Pinned(msgspec.Struct, frozen=True, kw_only=True):
    """`plugins` are those that will run, in order; `answers` what the template is rendered with."""

    label: str
    operator: str
    objective: str
    equipment: Equipment
    template: str
    template_version: str
    template_path: Path
    run_scope: str | None
    answers_file: str = ".copier-answers.yml"
    plugins: tuple[gate.Planned, ...]
    plugins_fatal: bool = False
    readme: gate.ReadmeValues
    answers: dict[str, object]
    lims_project: dict[str, object]
    nas_path: str
    rules: Validator


def encoded(pinned: Pinned) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(pinned, enc_hook=str))


class _Stored(Pinned, frozen=True, kw_only=True):
    """As the store may hold it: its first schema knew plugins by their names alone."""

    plugins: tuple[gate.Planned | str, ...]  # type: ignore[assignment]


def pinned_by(session: Session) -> Pinned:
    stored: _Stored = msgspec.json.decode(known(session.pinned), type=_Stored, dec_hook=_as_path)
    told = {field: getattr(stored, field) for field in Pinned.__struct_fields__}
    told["plugins"] = tuple(
        gate.Planned(each, None) if isinstance(each, str) else each for each in stored.plugins
    )
    return Pinned(**told)


def _as_path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else value
