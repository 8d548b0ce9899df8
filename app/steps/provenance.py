"""What a folder tells of its own making: creation.json, readme_fields.json, README.md, equipment.json.

Promises that each file is only ever seen whole, that writing again from the same facts gives the same
bytes, that keys which this service does not know survive its updates, and that the front matter of
README.md reads the same in every YAML parser, old or new, and by tools that only look for the two
`---` lines. Whether the facts are good is left to the gate; publishing them to `publish`.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from app import disk
from app.settings import Equipment

FOLDER = ".exlab-wizard"
README = Path("README.md")

OWNED = frozenset({FOLDER, README.name, disk.temporary(README).name})
"""What `write` makes at the top of a tree, also what it may leave there when it dies."""

ASIDE = "README.rendered.md"
"""Beside a tree: the README that the template rendered, from which ours can be written again and again."""

CREATION_SCHEMA = "1.9"
README_SCHEMA = "1.1"
EQUIPMENT_SCHEMA = "1.0"

# An update reads, changes and replaces; two at once would lose one of the changes.
_updating = threading.Lock()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is told of one creation. `created_by` is the account, `operator` the person.

    `plugins_applied` and `plugin_inputs` are entries as they stand in creation.json; the values of
    secret fields are not among them. `rendered_readme` is the text of the template's README.md.
    """

    session_id: str
    kind: Literal["project", "run"]
    run_kind: str | None
    created_at: datetime
    created_by: str
    label: str
    operator: str
    objective: str
    equipment: Equipment
    project_short_id: str
    lims_project: Mapping[str, object]
    template_name: str
    template_version: str
    template_path: str
    template_run_scope: str | None
    variables: Mapping[str, object]
    template_fields: Mapping[str, object]
    config_fields: Mapping[str, object]
    custom_fields: Sequence[Mapping[str, object]]
    destination: Path
    nas_path: str
    sync_status: str = "pending"
    plugins_applied: Sequence[Mapping[str, object]] = ()
    plugin_inputs: Sequence[Mapping[str, object]] = ()
    rendered_readme: str | None = None


class _LimsProject(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    uid: str
    short_id: str
    name_at_creation: str
    source: str = "live"
    cache_freshness_at_use: str | None = None


class _Template(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    version: str
    source_path: str
    run_scope: str | None = None


class _Creation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """creation.json, in the order of its keys. A project counts as experimental, as it always has."""

    schema_version: str
    created_at: str
    created_by: str
    level: str
    run_kind: str
    lims_project: Mapping[str, object]
    template: _Template
    variables: Mapping[str, object]
    paths: dict[str, str]
    plugins_applied: list[object] = []
    sync_status: str = "pending"
    validation_overrides: list[object] = []
    session_id: str
    plugin_inputs: list[object] = []


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    """What this service reads back from a creation.json."""

    session_id: str | None = None
    lims_project: dict[str, Any] | None = None


class Unreadable(Exception):
    """A provenance file is there but cannot be read, so that an update would destroy what it holds."""


def write(tree: Path, facts: Facts) -> None:
    """Writes the three files into a tree and returns when they are on the disk."""
    folder = _folder(tree)
    disk.write_whole(folder / "creation.json", _json(_creation(facts)))
    disk.write_whole(folder / "readme_fields.json", _json(_readme_fields(facts)))
    disk.write_whole(tree / "README.md", _readme(facts).encode())
    disk.sync_folder(folder)
    disk.sync_folder(tree)


def in_the_way(tree: Path) -> str | None:
    """A folder that stands in a tree where `write` has to put a file, relative to the tree."""
    ours = [README]
    if not (tree / FOLDER).is_symlink():
        ours += [Path(FOLDER, "creation.json"), Path(FOLDER, "readme_fields.json")]
    names = (name for path in ours for name in (path, disk.temporary(path)))
    return next((name.as_posix() for name in names if _is_real_folder(tree / name)), None)


def write_equipment(equipment_folder: Path, equipment: Equipment, now: datetime) -> None:
    """Registers an equipment beside its data, in a folder that exists; writes nothing when nothing changed."""
    known = {
        "schema_version": EQUIPMENT_SCHEMA,
        "id": equipment.id,
        "label": equipment.label,
        "configured_local_root": equipment.local_root,
        "configured_nas_root": equipment.nas_root,
    }
    path = equipment_folder / FOLDER / "equipment.json"
    with _updating:
        path.parent.mkdir(exist_ok=True)
        found = _load_or_set_aside(path)
        if found | known == found and "first_seen_at" in found:
            return
        stamps = {"first_seen_at": found.get("first_seen_at", _time(now)), "last_modified_at": _time(now)}
        _replace(path, found | known | stamps)
        disk.sync_folder(equipment_folder)


def set_sync_status(folder: Path, status: str) -> None:
    """Tells in a published folder how far its copy is; all else in creation.json stays as it is.

    Raises Unreadable when there is no creation.json in it that could be changed.
    """
    with _updating:
        path = folder / FOLDER / "creation.json"
        found = _load(path)
        record = found | {"schema_version": _newer(found), "sync_status": status}
        if status == "pending":
            del record["sync_status"]
        if record != found:
            _replace(path, record)
        else:
            disk.sync_folder(path.parent)  # the replacing may have been cut off before its own


def session_of(folder: Path) -> str | None:
    """The session that made a folder, or None when no session of ours did."""
    return _read(folder).session_id


def project_lims(project_folder: Path) -> dict[str, Any] | None:
    """The LIMS identity that a project hands on to its runs, or None when it has none."""
    return _read(project_folder).lims_project


def nas_path(equipment: Equipment, local_root: Path, destination: Path) -> str:
    """Where the copy of a destination is, on the NAS: below the equipment's root as below the local one.

    Empty for an equipment that is not copied.
    """
    if not equipment.nas_root:
        return ""
    return f"{equipment.nas_root.rstrip('/')}/{destination.relative_to(local_root).as_posix()}"


def _folder(tree: Path) -> Path:
    """The folder of ours in a tree. A template's link or file of that name would lead us elsewhere."""
    folder = tree / FOLDER
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    folder.mkdir(exist_ok=True)
    return folder


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _creation(facts: Facts) -> _Creation:
    return _Creation(
        schema_version=CREATION_SCHEMA,
        created_at=_time(facts.created_at),
        created_by=facts.created_by,
        level=facts.kind,
        run_kind=facts.run_kind or "experimental",
        lims_project=_lims_project(facts),
        template=_Template(
            name=facts.template_name,
            version=facts.template_version,
            source_path=facts.template_path,
            run_scope=facts.template_run_scope,
        ),
        variables=facts.variables,
        paths={"local": str(facts.destination), "nas": facts.nas_path},
        plugins_applied=list(facts.plugins_applied),
        sync_status=facts.sync_status,
        session_id=facts.session_id,
        plugin_inputs=list(facts.plugin_inputs),
    )


def _lims_project(facts: Facts) -> dict[str, object]:
    """What the LIMS said, completed: readers rely on the first three keys."""
    said = dict(facts.lims_project)
    name = facts.label if facts.kind == "project" else facts.project_short_id
    known = _LimsProject(
        uid=str(said.pop("uid", "") or ""),
        short_id=str(said.pop("short_id", "") or facts.project_short_id),
        name_at_creation=str(said.pop("name_at_creation", "") or said.get("name") or name),
        source=str(said.pop("source", "") or "live"),
        cache_freshness_at_use=_text(said.pop("cache_freshness_at_use", None)),
    )
    completed: dict[str, object] = msgspec.to_builtins(known)
    return completed | said


def _readme_fields(facts: Facts) -> dict[str, object]:
    return {
        "schema_version": README_SCHEMA,
        "generated_at": _time(facts.created_at),
        "core_fields": _core_fields(facts),
        "template_fields": facts.template_fields,
        "config_fields": facts.config_fields,
        "custom_fields": facts.custom_fields,
        "system_fields": _system_fields(facts),
    }


def _core_fields(facts: Facts) -> dict[str, object]:
    return {"label": facts.label, "operator": facts.operator, "objective": facts.objective}


def _system_fields(facts: Facts) -> dict[str, object]:
    system: dict[str, object] = {
        "created": _time(facts.created_at),
        "created_by": facts.created_by,
        "equipment": {"id": facts.equipment.id, "label": facts.equipment.label},
        "template": {"name": facts.template_name, "version": facts.template_version},
        "project": facts.project_short_id,
    }
    if facts.kind == "run":
        system |= {"run": facts.destination.name, "run_kind": facts.run_kind}
    return system


def _readme(facts: Facts) -> str:
    front = {
        "readme_schema_version": README_SCHEMA,
        **_core_fields(facts),
        "template_fields": facts.template_fields,
        "config_fields": facts.config_fields,
        "custom_fields": facts.custom_fields,
        "system": _system_fields(facts),
    }
    text = yaml.dump(
        msgspec.to_builtins(front),
        Dumper=_FrontMatter,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=float("inf"),
    )
    return f"---\n{text}---\n\n{_body(facts)}"


def _body(facts: Facts) -> str:
    if facts.rendered_readme is not None:
        return facts.rendered_readme.removeprefix("\ufeff")
    return f"# {' '.join(facts.label.split())}\n\n## Notes\n\n*(none)*\n"


class _FrontMatter(yaml.SafeDumper):
    """Strings are quoted always: `1e3` and `012` are strings to one YAML and numbers to another.

    Text of several lines stands as a block, where no line of it could be taken for the end.
    """

    plain_key = re.compile("[A-Za-z_][A-Za-z0-9_]+")

    def ignore_aliases(self, _data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        lines = text.split("\n")
        readable = all(line.isprintable() and line.strip() != "---" for line in lines)
        block = len(lines) > 1 and readable and text == text.strip()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if block else '"')

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        for key, _ in node.value:
            if self.plain_key.fullmatch(key.value):
                key.style = None
        return node


_FrontMatter.add_representer(str, _FrontMatter.represent_text)


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _json(record: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def _read(folder: Path) -> _Known:
    """What creation.json says, or nothing when it is not one. A disk that does not answer is an error."""
    try:
        return msgspec.json.decode((folder / FOLDER / "creation.json").read_bytes(), type=_Known)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return _Known()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Known()


def _load(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error


def _load_or_set_aside(path: Path) -> dict[str, Any]:
    """A registry entry can be made anew from the config; a damaged one is kept for who wants to look."""
    if not path.exists():
        return {}
    try:
        return _load(path)
    except Unreadable:
        path.replace(path.with_name(f"{path.name}.unreadable"))
        return {}


def _replace(path: Path, record: dict[str, Any]) -> None:
    disk.write_whole(path, _json(record))
    disk.sync_folder(path.parent)


def _newer(found: dict[str, Any]) -> str:
    """The schema of an updated creation.json: ours, unless a newer writer was there before us."""
    version = str(found.get("schema_version", ""))
    major, _, minor = version.partition(".")
    newer = major == "1" and minor.isdecimal() and int(minor) > int(CREATION_SCHEMA.partition(".")[2])
    return version if newer or major not in ("", "1") else CREATION_SCHEMA
