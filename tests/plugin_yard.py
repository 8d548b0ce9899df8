"""Plugins for the tests: written into a folder, with the manifest that the registry would make of theirs."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from app.steps.plugins.host import Context, Task
from app.steps.plugins.registry import Manifest

HEAD = "from exlab_sessions.plugins import FileChange, Plugin as Base, PluginError, PluginInputRequired\n"

BODY = """
class Plugin(Base):
    name = "{name}"
    version = "1.0"

    def can_handle(self, file_path, variables):
        return True

{methods}
"""


def package(folder: Path, files: Mapping[str, str]) -> None:
    """Write modules, by name, into the plugin's folder."""
    folder.mkdir(parents=True)
    for name, source in files.items():
        (folder / name).write_text(textwrap.dedent(source))


def plugin(
    yard: Path,
    source: str,
    *,
    name: str = "specimen",
    timeout_seconds: int = 10,
    memory_mb: int = 128,
    network: bool = False,
) -> Manifest:
    """A plugin whose package is `source`."""
    package(yard / name, {"__init__.py": source})
    return manifest(yard / name, timeout_seconds=timeout_seconds, memory_mb=memory_mb, network=network)


def doing(transform: str, *, name: str = "specimen", before: str = "", more: str = "") -> str:
    """The source of a plugin that has this body of `transform(self, file_path, ctx)`."""
    method = "def transform(self, file_path, ctx):\n" + _indented(transform)
    methods = "\n".join(_indented(part) for part in (method, textwrap.dedent(more)))
    return textwrap.dedent(before) + "\n" + HEAD + BODY.format(name=name, methods=methods)


def _indented(source: str) -> str:
    return textwrap.indent(textwrap.dedent(source).strip("\n"), "    ")


def manifest(
    folder: Path,
    *,
    version: str = "1.0",
    timeout_seconds: int = 10,
    memory_mb: int = 128,
    network: bool = False,
) -> Manifest:
    return Manifest(
        name=folder.name,
        version=version,
        supported_extensions=(".txt",),
        api_version="1",
        timeout_seconds=timeout_seconds,
        memory_mb=memory_mb,
        network=network,
        folder=folder,
    )


def task(
    attempt: Path,
    manifest: Manifest,
    files: Mapping[str, str] | None = None,
    *,
    variables: dict[str, object] | None = None,
    answers: dict[str, dict[str, object]] | None = None,
    secrets: tuple[str, ...] = (),
    dry_run: bool = False,
) -> Task:
    """A task in a fresh tree of an attempt folder, which holds `files` with their contents."""
    files = {"a.txt": "a"} if files is None else files
    tree = attempt / "tree"
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    context = Context(
        variables=variables or {},
        answers_file=".copier-answers.yml",
        template_name="confocal",
        template_version="2.1",
        run_kind="experimental",
        equipment_id="CONF_01",
        project="PROJ-7",
        destination=Path("/data/CONF_01/PROJ-7/Run_2026-05-04T14-32-05"),
        dry_run=dry_run,
    )
    return Task(
        manifest=manifest,
        tree=tree,
        scratch=attempt / "scratch",
        files=tuple(sorted(files)),
        context=context,
        answers=answers or {},
        secrets=secrets,
    )
