"""What this workstation can create with, and why anything that lies there cannot be used."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
from litestar import get
from litestar.di import NamedDependency

from app.settings import ConfigFile, Field, Settings
from app.steps import provenance, templates
from app.steps.plugins import registry
from app.steps.plugins.registry import Manifest
from app.steps.templates import Question, Template
from app.web import errors


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One template. `template_path` is what a session is asked for with; `equipment_id` null: for every equipment."""

    template_path: str
    equipment_id: str | None
    name: str
    type: str
    version: str
    run_scope: str | None
    description: str | None
    plugins: tuple[str, ...]
    plugins_fatal: bool
    has_tasks: bool
    readme_fields: tuple[Field, ...]
    questions: tuple[Question, ...]


class Trouble(msgspec.Struct, frozen=True):
    """Why what lies at `path` cannot be used."""

    path: str
    message: str


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin, as its manifest says; `folder` is where it lies."""

    name: str
    version: str
    author: str
    description: str
    supported_extensions: tuple[str, ...]
    api_version: str
    required_variables: tuple[str, ...]
    optional_variables: tuple[str, ...]
    timeout_seconds: int
    memory_mb: int
    network: bool
    folder: str


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    plugins: list[Installed]
    problems: list[Trouble]


class Templates(msgspec.Struct, frozen=True, kw_only=True):
    """`readme_fields` are those that the config asks for with every template."""

    templates: list[Offer]
    problems: list[Trouble]
    readme_fields: tuple[Field, ...]


@get("/templates", operation_id="list_templates", tags=["catalogue"], responses=errors.responses())
async def list_templates(config: NamedDependency[ConfigFile]) -> Templates:
    """The templates of the templates folder and of each equipment, read anew."""
    return await asyncio.to_thread(_read, config.current)


@get("/plugins", operation_id="list_plugins", tags=["catalogue"], responses=errors.responses())
async def list_plugins(config: NamedDependency[ConfigFile]) -> Plugins:
    """The plugins of the plugin folder, read anew; none of their code runs."""
    return await asyncio.to_thread(_installed, config.current)


def _installed(settings: Settings) -> Plugins:
    found = registry.catalogue(settings.paths.plugin_dir, allow_network=settings.plugins.allow_network)
    return Plugins(
        plugins=[_told(plugin) for plugin in found.plugins],
        problems=[Trouble(str(problem.path), problem.message) for problem in found.problems],
    )


def _told(plugin: Manifest) -> Installed:
    return msgspec.convert(msgspec.to_builtins(plugin, enc_hook=str), Installed)


def _read(settings: Settings) -> Templates:
    offers: list[Offer] = []
    troubles: list[Trouble] = []
    for equipment_id, folder in _folders(settings):
        found = templates.catalogue([folder])
        offers += (_offer(template, equipment_id, folder) for template in found.templates)
        troubles += (Trouble(str(problem.path), problem.message) for problem in found.problems)
    return Templates(templates=offers, problems=troubles, readme_fields=settings.readme.defaults)


def _folders(settings: Settings) -> Iterator[tuple[str | None, Path]]:
    if settings.paths.templates_dir is not None:
        yield None, settings.paths.templates_dir
    if settings.paths.local_root is not None:
        for equipment in settings.equipment:
            yield equipment.id, settings.paths.local_root / equipment.id / provenance.FOLDER / "templates"


def _offer(template: Template, equipment_id: str | None, folder: Path) -> Offer:
    return Offer(
        template_path=template.name if equipment_id is None else str(folder / template.name),
        equipment_id=equipment_id,
        name=template.name,
        type=template.type,
        version=template.version,
        run_scope=template.run_scope,
        description=template.description,
        plugins=template.plugins,
        plugins_fatal=template.plugins_fatal,
        has_tasks=template.has_tasks,
        readme_fields=template.readme_fields,
        questions=template.questions,
    )
