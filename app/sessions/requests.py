"""What can be asked for: a project, a run, an answer, a cancel, another try.

The shapes of the bodies and nothing else; whether their values are good is the gate's to say.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.errors import ValidationFailed


class ProjectBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="project"
):
    """A new project folder; its id is `lims_project.short_id`."""

    equipment_id: str
    template_path: str
    label: str
    operator: str
    objective: str
    lims_project: dict[str, object] = {}
    variables: dict[str, object] = {}
    readme_extra: dict[str, object] = {}


class RunBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="run"
):
    """A new run folder in a project. `run_date` is ISO 8601; null takes the present second in UTC."""

    equipment_id: str
    project_short_id: str
    template_path: str
    run_kind: Literal["experimental", "test"]
    label: str
    operator: str
    objective: str
    run_date: str | None = None
    lims_project: dict[str, object] = {}
    variables: dict[str, object] = {}
    readme_extra: dict[str, object] = {}


CreateBody = ProjectBody | RunBody


Operator = Annotated[str, Meta(max_length=200)]
"""Who answers or cancels, as an event and the audit tell it."""


class ResumeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator's answer. Keys of `extra_inputs` that were not asked for are ignored."""

    extra_inputs: dict[str, object] = {}
    prompt_id: str | None = None
    operator: Operator | None = None


class CancelBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    discard_files: bool = False
    operator: Operator | None = None


class RetryBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`changes` is a JSON merge patch (RFC 7396) on the body of the session that is tried again."""

    changes: dict[str, object] = {}


def encode(body: CreateBody) -> str:
    """The canonical JSON of `body`: equal for bodies that decode to the same values."""
    return msgspec.json.encode(body, order="sorted").decode()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def decode(text: str) -> CreateBody:
    body: CreateBody = msgspec.json.decode(text, type=CreateBody)
    return body


def changed(body: CreateBody, changes: dict[str, object]) -> CreateBody:
    """`body` under the merge patch `changes`; ValidationFailed if the result has another shape."""
    merged = _merge(msgspec.to_builtins(body), changes)
    try:
        shaped: CreateBody = msgspec.convert(merged, type=CreateBody)
    except msgspec.ValidationError as error:
        raise ValidationFailed(str(error)) from error
    return shaped


def _merge(target: object, patch: object) -> object:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
