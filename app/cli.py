"""The command line: serves, and talks to a service that runs.

Standard output carries what was asked for, standard error everything else; `--json` makes it one JSON object a
line. The exit code says how it went: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 not reachable. What a
session is, and what may be done with it, is the service's to say; nothing is checked here first.
"""

import asyncio
import functools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import click
import msgspec

from app import display, settings, yamltext
from app.client import TERMINAL_KINDS, Client, ClientError, Json, Unreachable, address
from app.demo import laboratory
from app.sessions.lifecycle import State

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

FAILED = 1
NOT_FOUND = 3
UNREACHABLE = 4
INTERRUPTED = 130

_MOMENTS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
# None lets colours through to a terminal only.
_PLAIN = False if "NO_COLOR" in os.environ else None


class Output:
    """Where a command's answer goes: objects for programs, lines for people."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.width = shutil.get_terminal_size().columns
        self.bound = self.width if sys.stdout.isatty() else None

    def session(self, handle: Json) -> None:
        self.tell(handle, display.session(handle, width=self.width))

    def frame(self, event: Json, session_id: str) -> None:
        self.tell(event, display.frame(event, session_id, width=self.width))

    def tell(self, value: Mapping[str, object], lines: Iterable[str]) -> None:
        self.say([json.dumps(value)] if self.as_json else lines)

    def say(self, lines: Iterable[str]) -> None:
        for line in lines:
            click.echo(line, color=_PLAIN)


def _note(text: str) -> None:
    click.echo(text, err=True, color=_PLAIN)


def _assigned(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """The names and values in `name=value` options."""
    found = {}
    for each in given:
        name, equals, found[name] = each.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"expected name=value, not {each!r}", ctx, param)
    return found


def _config(*, exists: bool) -> Callable[[F], F]:
    return click.option(
        "--config",
        type=click.Path(exists=exists, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The config file, where it is not the usual one.",
    )


_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
_ID = click.argument("session_id", metavar="ID")
_OPERATOR = click.option("--operator", metavar="NAME", help="Who does this, for the audit.")
_KEY = click.option("--key", metavar="KEY", help="Asked for again with the same key, it is the same session.")
_FOLLOW = click.option("--follow", is_flag=True, help="Go on with its events until it ends.")


def talking(command: Callable[Concatenate[Client, Output, P], None]) -> Callable[..., None]:
    """A command that talks to a service: with the options that say to which, and its refusals as exit codes."""

    @_config(exists=True)
    @click.option(
        "--url", metavar="URL", help="The service; else the one that the config and server.json name."
    )
    @_JSON
    @functools.wraps(command)
    def talk(config: Path | None, url: str | None, as_json: bool, *args: P.args, **given: P.kwargs) -> None:
        with _refusals_told(as_json), _client(url, config) as client:
            command(client, Output(as_json), *args, **given)

    return talk


def _client(url: str | None, config: Path | None) -> Client:
    if url is None:
        service = settings.ConfigFile(config).current.service
        url = address(service.state_dir, service.host)
    try:
        return Client(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--url") from error


@contextmanager
def _refusals_told(as_json: bool) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        told = {"code": error.code, "message": error.message, "field": error.field, "details": error.details}
        _refuse(as_json, told | {"trace_id": error.trace_id})
        raise SystemExit(NOT_FOUND if error.code == "session_not_found" else FAILED) from error
    except Unreachable as error:
        _refuse(as_json, {"code": "unreachable", "message": str(error)})
        raise SystemExit(UNREACHABLE) from error


def _refuse(as_json: bool, told: Json) -> None:
    known = {name: value for name, value in told.items() if value is not None}
    if as_json:
        _note(json.dumps({"error": known}))
        return
    place = f" ({display.clean(known['field'])})" if "field" in known else ""
    _note(f"{display.coloured('error', 'error')}: {display.clean(known['message'])}{place} [{known['code']}]")
    for name, value in (known.get("details") or {}).items():
        _note(f"  {name}: {display.clean(value)}")


def _version() -> str:
    try:
        return metadata.version("exlab-sessions")
    except metadata.PackageNotFoundError:
        return "unknown, from a checkout that nobody installed"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), prog_name="exlab-sessions")
def main() -> None:
    """Creation sessions for a lab's workstation: serve them, open them, watch them.

    An ID may be shortened to its beginning, of 8 characters or more. Exit codes: 0 done, 1 failed,
    2 wrong usage, 3 not found, 4 service not reachable.
    """


@main.command()
@_config(exists=False)
@click.option("--host", metavar="HOST", help="The address to listen on, in place of the config's.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 takes a free one.")
@click.option(
    "--demo",
    is_flag=False,
    flag_value="exlab-demo",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="[FOLDER]",
    help="Serve a small laboratory that is made in FOLDER (exlab-demo); needs no config.",
)
@click.option(
    "--hold", is_flag=True, help="Drive no session: to look and cancel when something is badly wrong."
)
def serve(config: Path | None, host: str | None, port: int | None, demo: Path | None, hold: bool) -> None:
    """Start the service; SIGTERM or Ctrl-C stops it."""
    if demo is not None and config is not None:
        raise click.UsageError("--demo brings its own config; leave --config out.")
    # Here, so that the other commands do not wait for what only a service needs.
    from app.main import serve as run

    show_around = _nothing_more
    if demo is not None:
        config = laboratory.build(demo.absolute())
        command = click.get_current_context().find_root().command_path
        show_around = functools.partial(_show_around, command, config.parent)
    raise SystemExit(run(config, host=host, port=port, hold=hold, ready=show_around))


def _nothing_more(_url: str) -> None:
    """The ready line says all."""


def _show_around(command: str, lab: Path, url: str) -> None:
    """Tell what can be done with the demo that is served at `url`."""
    project, run, asking = (
        shlex.quote(str(lab / "examples" / name))
        for name in ("project.json", "confocal_run.json", "stained_run.json")
    )
    _note(
        f"""
The demo laboratory is in {lab}; delete that folder when you have seen enough.

  The API, to try out    {url}/schema
  Open a project         {command} create --url {url} --follow {project}
  and a run in it        {command} create --url {url} --follow {run}
  A plugin that asks     {command} create --url {url} --follow {asking}
  See what there is      {command} list --url {url}
  The same by HTTP       curl -s {url}/api/v1/sessions
"""
    )


@main.command()
@click.argument("file", type=click.File("rb"))
@_KEY
@_FOLLOW
@talking
def create(client: Client, output: Output, file: Any, key: str | None, follow: bool) -> None:
    """Open a session as FILE says, JSON or YAML; - reads standard input."""
    body = _body(file.read())
    _opened(client, output, client.create(body, key=key), follow)


def _body(raw: bytes) -> dict[str, object]:
    try:
        body = _json_in(raw) or yamltext.parse(raw).value
    except yamltext.Unreadable as error:
        place = f"line {error.line}: " if error.line else ""
        raise click.BadParameter(f"{place}{error.message}", param_hint="FILE") from error
    if not isinstance(body, dict):
        raise click.BadParameter(
            "expected keys with values, as in the body of POST /sessions", param_hint="FILE"
        )
    return body


def _json_in(text: str | bytes) -> object:
    """What `text` is as JSON; None where it is none. YAML refuses tabs, with which JSON is often written."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _opened(client: Client, output: Output, handle: Json, follow: bool) -> None:
    """Show a new session; it has failed already if the gate refused it."""
    if follow:
        output.tell(handle, [f"session {handle['session_id']}"])
        _watch(client, output, handle["session_id"], 0)
        return
    output.session(handle)
    if handle["state"] == "failed":
        raise SystemExit(FAILED)


@main.command("list")
@click.option(
    "--state",
    metavar="STATE",
    multiple=True,
    type=click.Choice([state.value for state in State]),
    help="In this state, as input_required; may be given again.",
)
@click.option("--kind", type=click.Choice(["project", "run"]))
@click.option("--equipment", metavar="ID")
@click.option("--project", metavar="ID", help="As PROJ-1.")
@click.option("--operator", metavar="NAME")
@click.option("--label", metavar="TEXT", help="What the label begins with.")
@click.option(
    "--since",
    type=click.DateTime(_MOMENTS),
    metavar="TIME",
    help="Created then or later, as 2026-04-17T08:00.",
)
@click.option("--until", type=click.DateTime(_MOMENTS), metavar="TIME", help="Created before that.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@talking
def list_sessions(
    client: Client,
    output: Output,
    /,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    **filters: Any,
) -> None:
    """List sessions, newest first."""
    asked = client.list(**filters, since=_moment(since), until=_moment(until), page=min(limit + 1, 200))
    found = [*islice(asked, limit + 1)]
    if output.as_json:
        for handle in found[:limit]:
            output.session(handle)
    elif found:
        output.say(display.sessions(found[:limit], width=output.bound, now=datetime.now(UTC)))
    else:
        _note("There is no such session.")
    if len(found) > limit:
        _note("There are older ones: --limit shows more.")


def _moment(given: datetime | None) -> str | None:
    """RFC 3339; what has no offset is of this machine's time zone."""
    return given.astimezone().isoformat() if given is not None else None


@main.command()
@_ID
@talking
def show(client: Client, output: Output, session_id: str) -> None:
    """Show all that is known of one session."""
    output.session(client.get(_whole(client, session_id)))


@main.command()
@_ID
@click.option("--after", type=click.IntRange(0), default=0, help="Leave out the events up to this number.")
@talking
def follow(client: Client, output: Output, session_id: str, after: int) -> None:
    """Show a session's history, and what comes.

    Until it ends, through restarts of the service. Exits with 1 when the session failed or was aborted.
    """
    _watch(client, output, _whole(client, session_id), after)


def _watch(client: Client, output: Output, session_id: str, after: int) -> None:
    kind = None
    try:
        for event in client.follow(session_id, after, lost=lambda why: _note(f"{why}; trying again")):
            output.frame(event, session_id)
            kind = event["kind"]
    except KeyboardInterrupt:
        _note("\nThe session goes on without you.")
        raise SystemExit(INTERRUPTED) from None
    if kind not in TERMINAL_KINDS:  # all that there was had been seen before
        kind = client.get(session_id)["state"]
    if kind != "done":
        raise SystemExit(FAILED)


@main.command()
@_ID
@click.option("--discard-files", is_flag=True, help="Keep nothing of what it had built.")
@_OPERATOR
@talking
def cancel(
    client: Client, output: Output, session_id: str, discard_files: bool, operator: str | None
) -> None:
    """Stop a session and wait until its work has ended."""
    whole = _whole(client, session_id)
    output.session(client.cancel(whole, discard_files=discard_files, operator=operator))


@main.command()
@_ID
@click.option(
    "--change",
    "changes",
    callback=_assigned,
    multiple=True,
    metavar="NAME=VALUE",
    help="As label=again, variables.wells=96; null removes. May be given again.",
)
@_KEY
@_FOLLOW
@talking
def retry(
    client: Client, output: Output, session_id: str, changes: dict[str, str], key: str | None, follow: bool
) -> None:
    """Open a failed or aborted session anew.

    With the same body but for the changes. A value is read as JSON where it is JSON, else it is text.
    """
    retried = client.retry(_whole(client, session_id), _patch(changes), key=key)
    _opened(client, output, retried, follow)


def _patch(changes: Mapping[str, str]) -> dict[str, object]:
    patch: dict[str, Any] = {}
    for name, text in changes.items():
        *above, last = name.split(".")
        place = patch
        for part in above:
            place = place.setdefault(part, {})
        place[last] = _value(text)
    return patch


def _value(text: str) -> object:
    found = _json_in(text)
    return text if found is None and text != "null" else found


@main.command()
@_ID
@click.option(
    "--input", "inputs", callback=_assigned, multiple=True, metavar="NAME=VALUE", help="May be given again."
)
@_OPERATOR
@talking
def resume(
    client: Client,
    output: Output,
    session_id: str,
    inputs: dict[str, str],
    operator: str | None,
) -> None:
    """Answer what a session asks. On a terminal, what --input leaves open is asked for."""
    handle = client.get(_whole(client, session_id))
    prompt = handle["pending_input"]
    if prompt is None:
        _refuse(
            output.as_json, {"code": "session_not_awaiting_input", "message": "The session asks nothing."}
        )
        raise SystemExit(FAILED)
    answers = _answers(prompt, inputs)
    answered = client.resume(handle["session_id"], answers, prompt_id=prompt["prompt_id"], operator=operator)
    output.session(answered)


def _answers(prompt: Json, given: Mapping[str, str]) -> dict[str, object]:
    fields = {field["id"]: field for field in prompt["fields"]}
    for name in given:
        if name not in fields:
            raise click.BadParameter(
                f"{name} is not asked for, but {', '.join(fields)}", param_hint="--input"
            )
    texts = dict(given)
    if sys.stdin.isatty():
        texts = {name: given.get(name) or _asked(field) for name, field in fields.items()}
    return {name: _typed(fields[name], text) for name, text in texts.items() if text != ""}


def _asked(field: Json) -> str:
    default = field.get("default")
    if default is None and not field.get("required", True):
        default = ""
    return str(
        click.prompt(
            display.clean(field["label"]),
            default=default,
            hide_input=bool(field.get("secret")),
            type=click.Choice(field["options"]) if field.get("options") else str,
            err=True,
        )
    )


def _typed(field: Json, text: str) -> object:
    """`text` as a value of the field's type where it is one; else the service is to say what is wrong with it."""
    match field.get("type"):
        case "boolean":
            return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)
        case "number":
            return _value(text)
        case _:
            return text


def _whole(client: Client, given: str) -> str:
    try:
        return client.find(given)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ID") from error


@main.command()
@_config(exists=False)
@_JSON
def check(config: Path | None, as_json: bool) -> None:
    """Look for what is wrong on this workstation.

    With the config, the templates, the store, and the folders of its sessions. Only reads, whether a service
    runs or not. Exits with 1 when something is to be mended.
    """
    # Here, so that the other commands do not wait for what only this one needs.
    from app import checkup

    _complain(Output(as_json), checkup.examine(settings.ConfigFile(config)))


def _complain(output: Output, subjects: Iterable[Any]) -> None:
    """Show what was looked at, and exit with 1 if any of it is to be mended."""
    levels: set[str] = set()
    for subject in subjects:
        complaints = msgspec.to_builtins(subject.complaints)
        levels |= {complaint["level"] for complaint in complaints}
        if output.as_json:
            output.say(json.dumps({"subject": subject.name} | complaint) for complaint in complaints)
        else:
            output.say(display.complaints(subject.name, subject.place, complaints, width=output.width))
    if "error" in levels:
        raise SystemExit(FAILED)


@main.group()
def plugins() -> None:
    """For authors of plugins: look one over, try it out."""


@main.group()
def templates() -> None:
    """For authors of templates: look one over."""


_PATHS = click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))


@plugins.command("lint")
@_PATHS
@_config(exists=True)
@_JSON
def lint_plugins(paths: tuple[Path, ...], config: Path | None, as_json: bool) -> None:
    """Look for what is wrong with the plugins in the folders PATH.

    With the manifest, the code, and how it loads; its files are not touched. Exits with 1 when something is
    to be mended.
    """
    from app.authors import code

    _linted(paths, config, as_json, code.look_over)


@templates.command("lint")
@_PATHS
@_config(exists=True)
@_JSON
def lint_templates(paths: tuple[Path, ...], config: Path | None, as_json: bool) -> None:
    """Look for what is wrong with the templates in the folders PATH.

    With copier.yml, the Jinja in files and names, the plugins that are listed, and, where every question has a
    default, with what is rendered. Exits with 1 when something is to be mended.
    """
    from app.authors import rendering

    _linted(paths, config, as_json, rendering.look_over)


def _linted(
    paths: tuple[Path, ...],
    config: Path | None,
    as_json: bool,
    lint: Callable[[Path, settings.Settings], Coroutine[Any, Any, Any]],
) -> None:
    for path in paths:
        if not path.is_dir():
            _not_found(as_json, f"{path} is no folder.")
    now = settings.ConfigFile(config).current
    _complain(Output(as_json), [asyncio.run(lint(path, now)) for path in paths])


def _not_found(as_json: bool, message: str) -> NoReturn:
    _refuse(as_json, {"code": "not_found", "message": message})
    raise SystemExit(NOT_FOUND)


@plugins.command("exec")
@click.argument("plugin")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    required=True,
    help="What it works on: a copy of this folder.",
)
@click.option(
    "--input",
    "inputs",
    callback=_assigned,
    multiple=True,
    metavar="NAME=VALUE",
    help="The answer to a field that it asks for; may be given again.",
)
@click.option(
    "--variable",
    "variables",
    callback=_assigned,
    multiple=True,
    metavar="NAME=VALUE",
    help="As label=test; a value is read as JSON where it is JSON. May be given again.",
)
@click.option("--dry-run", is_flag=True, help="Have it describe what it would do.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep the copy that it worked on as DIR, which must be new or empty.",
)
@_config(exists=True)
@_JSON
def execute_plugin(
    plugin: str,
    against: Path,
    inputs: dict[str, str],
    variables: dict[str, str],
    dry_run: bool,
    keep: Path | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Run PLUGIN on a copy of a folder, as a session would, and show what it did.

    PLUGIN is a folder, or a name in the plugin folder of the config. What the plugin asks for, --input answers,
    or whoever sits at the terminal.
    """
    from app.authors import trial
    from app.steps.plugins.host import Unavailable
    from app.steps.plugins.registry import Problem

    now = settings.ConfigFile(config).current
    manifest = trial.find(plugin, now)
    if isinstance(manifest, Problem):
        if not manifest.path.exists():
            _not_found(as_json, f"{manifest.path} {manifest.message}")
        _refuse(as_json, {"code": "plugin_unusable", "message": f"{manifest.path} {manifest.message}"})
        raise SystemExit(FAILED)
    if not against.is_dir():
        _not_found(as_json, f"{against} is no folder.")
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.BadParameter(f"{keep} is not empty", param_hint="--keep")
    attempt = trial.Attempt(
        manifest=manifest,
        folder=against,
        variables={name: _value(text) for name, text in variables.items()},
        dry_run=dry_run,
        keep=keep,
    )
    output = Output(as_json)
    try:
        told = asyncio.run(trial.execute(attempt, now, _Answering(manifest.name, inputs, output)))
    except (Unavailable, OSError) as error:
        _refuse(as_json, {"code": "plugin_host_unavailable", "message": str(error)})
        raise SystemExit(FAILED) from error
    shown = msgspec.to_builtins(told)
    output.tell(shown, display.execution(shown, width=output.width))
    if told.status not in ("success", "skipped"):
        raise SystemExit(FAILED)


class _Answering:
    """Answers what a plugin asks: by --input, once for each file; then at the terminal, until it fits."""

    def __init__(self, plugin: str, inputs: Mapping[str, str], output: Output) -> None:
        self._plugin = plugin
        self._inputs = inputs
        self._output = output
        self._used: set[tuple[str | None, str]] = set()

    def __call__(self, question: Any) -> dict[str, object]:
        fields = [(field, msgspec.to_builtins(field)) for field in question.fields]
        asking = f"{self._plugin}, for {question.file}" if question.file else self._plugin
        prompt = {"plugin": asking, "reason": question.reason, "fields": [told for _, told in fields]}
        for line in display.asked(prompt, width=self._output.width):
            _note(line)
        values = {told["id"]: self._answer(field, told, question.file) for field, told in fields}
        return {name: value for name, value in values.items() if value is not None}

    def _answer(self, field: Any, told: Json, file: str | None) -> object:
        from app.authors import trial
        from app.errors import InputInvalid

        while True:
            text = self._text(told, file)
            try:
                return trial.fitting(field, _typed(told, text) if text else None)
            except InputInvalid as error:
                _refuse(
                    self._output.as_json, {"code": error.code, "message": error.message, "field": field.id}
                )
                if not sys.stdin.isatty():
                    raise SystemExit(FAILED) from error

    def _text(self, told: Json, file: str | None) -> str | None:
        name = told["id"]
        if name in self._inputs and (file, name) not in self._used:
            self._used.add((file, name))
            return self._inputs[name]
        return _asked(told) if sys.stdin.isatty() else None


if __name__ == "__main__":
    main()
