"""How sessions look on a terminal: as a list, one by one, and event by event.

Lines of text from what the service sent, for people; nothing here prints or asks. Text that somebody typed is
shown without what a terminal would act on, and columns line up in every script.
"""

import json
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click

Json = dict[str, Any]

SHORT_ID = 13
"""Characters of an id that name its session: down to the millisecond in which it was created."""

_COLOURS = {
    "done": "green",
    "failed": "red",
    "aborted": "yellow",
    "input_required": "magenta",
    "error": "red",
    "warning": "yellow",
    "note": "cyan",
}
_GAP = "  "
_LEAST = 10
_LABEL_WIDTH = 13
_NOTES_SHOWN = 10


def clean(value: object) -> str:
    """`value` on one line, without control characters and marks that turn the direction of writing."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def coloured(text: str, word: str) -> str:
    """`text` in the colour of the state or level that `word` names, if it has one."""
    return click.style(text, fg=_COLOURS[word]) if word in _COLOURS else text


def sessions(handles: Sequence[Json], *, width: int | None, now: datetime) -> Iterator[str]:
    """A table of one line each, within `width` columns as far as that goes; None sets no bound."""
    rows = [
        (
            handle["session_id"][:SHORT_ID],
            handle["state"],
            handle["run_kind"] or handle["kind"],
            clean("/".join(filter(None, (handle["equipment_id"], handle["project_short_id"])))),
            _age(handle["created_at"], now),
            clean(handle["label"]),
        )
        for handle in handles
    ]
    head = ("ID", "STATE", "KIND", "WHERE", "AGE", "LABEL")
    widths = _fitted([max(map(_columns, column)) for column in zip(head, *rows, strict=True)], width)
    yield click.style(_row(head, widths), bold=True)
    for row in rows:
        line = _row(row, widths)
        yield line.replace(row[1], coloured(row[1], row[1]), 1)


def session(handle: Json, *, width: int) -> Iterator[str]:
    """All that a handle tells, a name and a value a line."""
    yield click.style(clean(handle["label"]), bold=True)
    state = coloured(handle["state"], handle["state"])
    yield from _named("session", handle["session_id"])
    yield from _named("state", state)
    for name, value in _particulars(handle):
        if value:
            yield from _named(name, clean(value))
    if handle["blocked_on"]:
        blocked = handle["blocked_on"]
        since, retry_at = _clock(blocked["since"]), _clock(blocked["retry_at"])
        yield from _wrapped(
            "waits for", f"{blocked['message']} (since {since}, tries again at {retry_at})", width
        )
    if handle["error"]:
        yield from _failure(handle["error"], width)
    if handle["result"]:
        yield from _result(handle["result"], width)
    if handle["pending_input"]:
        yield from question(handle["pending_input"], handle["session_id"], width=width)


def _particulars(handle: Json) -> Iterator[tuple[str, object]]:
    yield "kind", ", ".join(filter(None, (handle["kind"], handle["run_kind"])))
    yield "equipment", handle["equipment_id"]
    yield "project", handle["project_short_id"]
    yield "operator", handle["operator"]
    yield "template", handle["template"]
    yield "destination", handle["destination"]
    yield "created", _clock(handle["created_at"])
    yield "updated", _clock(handle["updated_at"])
    yield "events", handle["head_seq"]
    yield "taken up", f"{handle['recoveries']} times again" if handle["recoveries"] else ""
    yield "retry of", handle["retry_of"]


def frame(event: Json, session_id: str, *, width: int) -> Iterator[str]:
    """One event, as a line that begins with the time of day; more for a question and an end."""
    at = _clock(event["at"])[11:]
    kind = event["kind"]
    lines = list(_told(event))
    yield f"{click.style(at, dim=True)}  {coloured(lines[0], 'aborted' if lines[0] == 'aborted' else kind)}"
    yield from (" " * 10 + line for line in lines[1:])
    if kind == "input_required":
        yield from question(event, session_id, width=width)
    elif kind == "done":
        yield from _result(event["result"], width)
    elif kind == "failed":
        yield from _failure(event["error"], width)


def _told(event: Json) -> Iterator[str]:
    match event:
        case {"kind": "phase", "phase": phase}:
            yield clean(phase)
        case {"kind": "progress", "current": current, "total": total}:
            doing = event.get("file") or event.get("plugin") or event["phase"]
            yield f"  {current} of {total}  {clean(doing)}"
        case {"kind": "input_required", "plugin": plugin}:
            yield f"{clean(plugin)} asks"
        case {"kind": "input_received", "plugin": plugin}:
            by = f" by {clean(event['operator'])}" if event.get("operator") else ""
            yield f"{clean(plugin)} was answered{by}"
        case {"kind": "warning", "message": message}:
            yield f"warning: {clean(message)}"
        case {"kind": "recovered", "state": state}:
            yield f"taken up again in {clean(state)}"
        case {"kind": "failed", "error": {"code": "cancelled"}}:
            yield "aborted"
        case {"kind": kind}:
            yield clean(kind)


def question(prompt: Json, session_id: str, *, width: int) -> Iterator[str]:
    """What is asked, field by field, and how to answer."""
    yield from asked(prompt, width=width)
    some = "".join(f" --input {field['id']}=..." for field in prompt["fields"] if not field.get("secret"))
    yield from _named("answer with", f"exlab-sessions resume {session_id[:SHORT_ID]}{clean(some)}")


def asked(prompt: Json, *, width: int) -> Iterator[str]:
    """What is asked, field by field."""
    yield from _wrapped("asked by", f"{prompt['plugin']}: {prompt['reason']}", width)
    for field in prompt["fields"]:
        yield from _wrapped("", f"{field['id']}: {field['label']} ({', '.join(_terms(field))})", width)


def _terms(field: Json) -> Iterator[str]:
    kind = field.get("type", "string")
    yield f"one of {' | '.join(map(clean, field['options']))}" if field.get("options") else kind
    for name, word in (("min", "from"), ("max", "to"), ("pattern", "like"), ("hint", "hint:")):
        if field.get(name) is not None:
            yield f"{word} {clean(_brief(field[name]))}"
    if field.get("default") is not None:
        yield f"default {clean(field['default'])}"
    yield "required" if field.get("required", True) else "optional"


def complaints(subject: str, place: str, found: Sequence[Json], *, width: int) -> Iterator[str]:
    """What was looked at, and what is wrong with it; of mere notes the first."""
    yield f"{click.style(f'{subject:<{_LABEL_WIDTH}}', bold=True)}{_GAP}{clean(place)}"
    grave = [each for each in found if each["level"] != "note"]
    notes = [each for each in found if each["level"] == "note"]
    for complaint in [*grave, *notes[:_NOTES_SHOWN]]:
        level = complaint["level"]
        yield from _wrapped(level, complaint["what"], width, colour=_COLOURS[level])
        if complaint["where"] != place:
            yield from _named("", clean(complaint["where"]))
        if complaint["advice"]:
            yield from _wrapped("", complaint["advice"], width)
    if len(notes) > _NOTES_SHOWN:
        yield from _named("", f"and {len(notes) - _NOTES_SHOWN} more notes; --json tells all")
    if not found:
        yield _GAP + click.style("ok", fg="green")


def execution(told: Json, *, width: int) -> Iterator[str]:
    """How a plugin worked on a copy of a folder: what it did to each file, then how it ended."""
    for change in told["changes"]:
        yield click.style(f"{change['kind']} {clean(change['path'])}", bold=True)
        for line in change["text"]:
            yield _tinted(clean(line))
    for change in told["described"]:
        yield click.style(
            f"would {clean(change.get('kind', 'change'))} {clean(change.get('path', ''))}", bold=True
        )
        yield f"{_GAP}{clean(change.get('summary', ''))}"
        yield from (f"{_GAP}{name}: {clean(value)}" for name, value in (change.get("detail") or {}).items())
    yield click.style(f"{told['plugin']} {told['version']}", bold=True)
    for line in told["log"]:
        yield from _wrapped(line["level"], line["text"], width, colour=_COLOURS.get(line["level"]))
    colour = "green" if told["status"] == "success" else "yellow" if told["status"] == "skipped" else "red"
    yield from _named("status", click.style(told["status"], fg=colour))
    if told["message"]:
        yield from _wrapped("", told["message"], width)
    for file in told["files"]:
        yield from _named("was offered", clean(file))
    if usage := told["usage"]:
        seconds = usage["duration_ms"] / 1000
        yield from _named("took", f"{seconds:.2f} s, {usage['peak_memory_mb']} MB at the most")


def _tinted(line: str) -> str:
    """A line of a unified diff in the usual colours."""
    colours = {"+": "green", "-": "red", "@": "cyan"}
    return click.style(line, fg=colours[line[0]]) if line[:1] in colours else line


def _brief(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _failure(error: Json, width: int) -> Iterator[str]:
    yield from _wrapped(error["code"], error["message"], width, colour="red")
    if error.get("field"):
        yield from _named("field", clean(error["field"]))
    for name, value in (error.get("details") or {}).items():
        if value not in (None, [], {}):
            yield from _named(name.replace("_", " "), clean(value))


def _result(result: Json, width: int) -> Iterator[str]:
    yield from _named("folder", clean(result["path"]))
    yield from _named("copy", clean(result["sync_status"]).replace("_", " "))
    for finding in result.get("findings") or ():
        place = ":".join(str(finding[key]) for key in ("path", "line") if finding.get(key))
        yield from _wrapped("finding", f"{place}: {finding.get('message', '')}", width, colour="yellow")
    unseen = result.get("findings_total", 0) - len(result.get("findings") or ())
    if unseen > 0:
        yield from _named("", f"and {unseen} more")


def _named(name: str, value: str) -> Iterator[str]:
    """One line, however long: what is copied from it must not be broken."""
    yield f"{_GAP}{name:<{_LABEL_WIDTH}}{_GAP}{value}"


def _wrapped(name: str, value: str, width: int, *, colour: str | None = None) -> Iterator[str]:
    indent = " " * (len(_GAP) * 2 + _LABEL_WIDTH)
    lines = textwrap.wrap(clean(value), max(width, 60) - len(indent), break_long_words=False) or [""]
    tinted = click.style(name, fg=colour) if colour else name
    if len(name) > _LABEL_WIDTH:
        yield _GAP + tinted
        yield indent + lines[0]
    else:
        yield _GAP + tinted + indent[len(_GAP + name) :] + lines[0]
    yield from (indent + line for line in lines[1:])


def _clock(stamp: str) -> str:
    """The wall clock of this machine at an RFC 3339 time."""
    return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _age(stamp: str, now: datetime) -> str:
    seconds = max(0, int((now.astimezone(UTC) - datetime.fromisoformat(stamp)).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _columns(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - marks


def _fitted(widths: list[int], bound: int | None) -> list[int]:
    """`widths`, with the last column and the third from the end narrowed until they fit."""
    fitted = list(widths)
    while bound is not None and sum(fitted) + len(_GAP) * (len(fitted) - 1) > bound:
        widest = max((len(fitted) - 1, len(fitted) - 3), key=lambda index: fitted[index])
        if fitted[widest] <= _LEAST:
            break
        fitted[widest] -= 1
    return fitted


def _row(cells: Iterable[str], widths: Sequence[int]) -> str:
    return _GAP.join(_cell(cell, width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cell(text: str, width: int) -> str:
    if _columns(text) > width:
        while _columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _columns(text))
