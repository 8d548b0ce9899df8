"""What authors of plugins import: the class to derive from, what it is given, what it may raise.

The names are those of ExLab-Wizard's plugin API, version 1, so that its plugins run unmodified. It
needs nothing but the standard library, and nothing of this service: the same file serves a plugin's
process, an editor and an author's own tests.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


class ExLabError(Exception):
    """What all exceptions of this API are."""


class PluginError(ExLabError):
    """The plugin cannot do its work; the message is for the operator."""


class PluginInputRequired(ExLabError):
    """The plugin needs to know something first: it is run again, whole, with the operator's answers.

    `fields` is a list of objects with id, label, type (string, text, choice, date, boolean, number) and,
    where they are wanted, options, required, default, hint, min, max, pattern, secret.
    """

    def __init__(self, fields: list[dict[str, Any]], reason: str) -> None:
        super().__init__(reason)
        self.fields = fields
        self.reason = reason


@dataclass(frozen=True)
class FileChange:
    """What a plugin would do to a file. `kind` is modify, create, rename or delete."""

    path: Path
    kind: str
    summary: str
    detail: dict[str, Any] = field(default_factory=dict)


def _to_standard_error(level: str, text: str) -> None:
    sys.stderr.write(f"{level}: {text}\n")


class PluginLogger:
    """Lines for the log of the session. What is given by name is added to the text."""

    def __init__(self, write: Callable[[str, str], None] = _to_standard_error) -> None:
        self._write = write

    def debug(self, message: object, **fields: object) -> None:
        self._write("debug", _line(message, fields))

    def info(self, message: object, **fields: object) -> None:
        self._write("info", _line(message, fields))

    def warning(self, message: object, **fields: object) -> None:
        self._write("warning", _line(message, fields))

    def error(self, message: object, **fields: object) -> None:
        self._write("error", _line(message, fields))


def _line(message: object, fields: dict[str, object]) -> str:
    return " ".join((str(message), *(f"{name}={value}" for name, value in fields.items())))


@dataclass(frozen=True)
class PluginContext:
    """What a hook may know.

    `dst_root` is the folder that the plugin works in, `destination` where it will stand in the end.
    `extra_inputs` are the operator's answers to what was asked in a hook, and for the file at hand;
    where there are any, they are `variables["__extra_inputs__"]` too.
    """

    variables: dict[str, Any]
    dst_root: Path
    answers_file: Path
    template_name: str
    template_version: str
    run_kind: str
    equipment_id: str
    project: str
    dry_run: bool
    log: PluginLogger
    extra_inputs: dict[str, Any] = field(default_factory=dict)
    destination: Path = field(default_factory=Path)


class Plugin(ABC):
    """One instance lives through one run, so what it keeps on itself is there from hook to hook."""

    name: ClassVar[str]
    version: ClassVar[str]
    supported_extensions: ClassVar[list[str]]
    api_version: ClassVar[str] = "1"
    required_variables: ClassVar[list[str]] = []
    optional_variables: ClassVar[list[str]] = []

    @abstractmethod
    def can_handle(self, file_path: Path, variables: dict[str, Any]) -> bool:
        """Whether the plugin wants this file, one of those with its extensions. Changes nothing."""

    @abstractmethod
    def transform(self, file_path: Path, ctx: PluginContext) -> None:
        """Change the file in its place. Raises PluginError and PluginInputRequired."""

    def validate_variables(self, variables: dict[str, Any]) -> list[str]:
        """What is wrong with the variables, for the operator; nothing runs while anything is."""
        return [
            f"required variable '{name}' is missing or empty"
            for name in self.required_variables
            if not variables.get(name)
        ]

    def pre_transform_all(self, ctx: PluginContext) -> None:  # noqa: B027
        """Called once, before the first file."""

    def post_transform_all(self, ctx: PluginContext) -> None:  # noqa: B027
        """Called once, after the last file."""

    def describe_changes(self, file_path: Path, ctx: PluginContext) -> list[FileChange]:  # noqa: ARG002
        """What `transform` would do; called instead of it in a dry run."""
        return [FileChange(file_path, "modify", f"{self.name} would modify {file_path.name}")]

    def on_plugin_failure(self, exc: BaseException, ctx: PluginContext) -> None:  # noqa: B027
        """Called when another hook has raised `exc`, to let go of what it holds."""
