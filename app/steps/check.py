"""What is wrong with a built tree: names and marks that must not reach the NAS.

The tree is only read, links are never followed, and each file is read at most once and to the size that the
config allows; what is larger is judged by its name alone. Time and memory stay proportional to what is read,
whatever the files hold. The same tree gives the same findings in the same order. What follows from a finding
is left to the caller.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from app.settings import Validator
from app.steps.templates import shown

RunKind = Literal["experimental", "test"]

_MOST_PER_FILE = 100

_TOKEN = re.compile(r"<[A-Za-z_][A-Za-z0-9_]*>")
_JINJA = (("{{", "}}"), ("{%", "%}"))
_MARKDOWN = (".md", ".markdown")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n.*?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)

# Windows, https://learn.microsoft.com/windows/win32/fileio/naming-a-file. Surrogates stand for bytes that are no
# UTF-8, which macOS and SMB shares refuse.
_ILLEGAL = re.compile(r'[\x00-\x1f<>:"/\\|?*\ud800-\udfff]')
_RESERVED = re.compile(r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[1-9¹²³]) *(?:\.|$)", re.IGNORECASE)

_TEST_RUNS = "TestRuns"
_PREFIX = {"experimental": "Run_", "test": "TestRun_"}


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong. `path` is relative to the tree, with `/`; `line` counts from 1."""

    rule: str
    path: str
    line: int | None
    message: str
    tier: Literal["hard"] = "hard"


def check(
    tree: Path,
    *,
    rendered: frozenset[str],
    staging: Path,
    kind: Literal["project", "run"],
    run_kind: RunKind | None,
    destination: Path,
    rules: Validator,
) -> tuple[Finding, ...]:
    """Look at everything in `tree`, which will be published as `destination`.

    `rendered` are the files that a template rendered, relative to the tree, with `/`; only in these a leftover
    mark is a mistake. `staging` is the path that no file may tell, because it ceases to exist.
    """
    findings = list(_mode(destination, run_kind)) if kind == "run" and run_kind else []
    needles = _spellings(staging)
    for path in _below(tree):
        relative = path.relative_to(tree).as_posix()
        shown_path = relative.encode("utf-8", "backslashreplace").decode()
        findings += _name(path.name, shown_path)
        findings += _content(path, shown_path, needles, rules, marks=relative in rendered)
    return tuple(findings)


def _mode(destination: Path, run_kind: RunKind) -> Iterator[Finding]:
    """A run says what it is in its own name, in the folder that it is in, and in its kind."""
    leaf, parent = destination.name, destination.parent.name
    if not leaf.startswith(prefix := _PREFIX[run_kind]):
        message = (
            f"the folder of this {run_kind} run is called {shown(leaf)}, which does not start with {prefix}"
        )
        yield Finding("mode_prefix_mismatch", ".", None, message)
    if (parent == _TEST_RUNS) != (run_kind == "test"):
        message = (
            f"this {run_kind} run lies in the folder {shown(parent)}; {_TEST_RUNS} is for test runs alone"
        )
        yield Finding("mode_prefix_mismatch", ".", None, message)


def _below(tree: Path) -> Iterator[Path]:
    """Every file, folder and link in the tree, by name; what cannot be listed raises."""
    for folder, folders, files in os.walk(tree, onerror=_raise):
        folders.sort()
        yield from (Path(folder, name) for name in sorted((*folders, *files)))


def _raise(error: OSError) -> None:
    raise error


def _name(name: str, relative: str) -> Iterator[Finding]:
    for rule, _, text in _marks(name):
        yield Finding(rule, relative, None, f"the name holds {shown(text)}, which was never filled in")
    if illegal := "".join(sorted(set(_ILLEGAL.findall(name)))):
        message = f"the name holds {shown(illegal)}, which Windows or the NAS refuses"
        yield Finding("illegal_filesystem_character", relative, None, message)
    if name.endswith((".", " ")):
        message = f"the name ends with {shown(name[-1])}, which Windows refuses"
        yield Finding("illegal_filesystem_character", relative, None, message)
    if _RESERVED.match(name):
        yield Finding(
            "reserved_filesystem_name", relative, None, f"Windows keeps the name {shown(name)} to itself"
        )


def _content(
    path: Path, relative: str, needles: tuple[bytes, ...], rules: Validator, *, marks: bool
) -> Iterator[Finding]:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        yield from _leaked(relative, os.fsencode(os.readlink(path)), needles, is_text=False)
    elif stat.S_ISREG(found.st_mode) and found.st_size <= rules.content_scan_max_bytes:
        content = path.read_bytes()
        is_text = b"\0" not in content
        yield from _leaked(relative, content, needles, is_text=is_text)
        if marks and is_text and path.suffix.lower() in rules.content_scan_extensions:
            text = content.decode("utf-8-sig", errors="replace")
            yield from _leftovers(relative, _front_matter(text) if path.suffix.lower() in _MARKDOWN else text)


def _leaked(relative: str, content: bytes, needles: tuple[bytes, ...], *, is_text: bool) -> Iterator[Finding]:
    places = [place for needle in needles if (place := content.find(needle)) >= 0]
    if places:
        line = content.count(b"\n", 0, min(places)) + 1 if is_text else None
        message = "tells the folder that the session was built in, which is gone after publication"
        yield Finding("staging_path_leaked", relative, line, message)


def _spellings(staging: Path) -> tuple[bytes, ...]:
    """The path as a program may have written it down: itself, without links, with `/`, in JSON, in UTF-16."""
    plain = {str(staging), str(staging.resolve()), staging.as_posix()}
    in_json = {json.dumps(text)[1:-1] for text in plain}
    in_json |= {json.dumps(text, ensure_ascii=False)[1:-1] for text in plain}
    in_utf16 = {text.encode("utf-16-le", "surrogatepass") for text in plain}
    return tuple(in_utf16 | {os.fsencode(text) for text in plain | in_json})


def _leftovers(relative: str, text: str) -> Iterator[Finding]:
    """Each mark that was left is told once, where it stands first; of very many, some."""
    firsts: dict[tuple[str, str], int] = {}
    for rule, start, mark in _marks(text):
        if len(firsts) == _MOST_PER_FILE:
            break
        firsts.setdefault((rule, mark), start)
    for (rule, mark), start in firsts.items():
        line = text.count("\n", 0, start) + 1
        yield Finding(rule, relative, line, f"the text holds {shown(mark)}, which was never filled in")


def _front_matter(text: str) -> str:
    """The block between two `---` lines at the head of a Markdown text; its prose may hold what it likes."""
    found = _FRONT_MATTER.match(text)
    return found.group() if found else ""


def _marks(text: str) -> Iterator[tuple[str, int, str]]:
    """The rule, the position and the text of each mark. Neither way of looking ever reads a character twice."""
    for token in _TOKEN.finditer(text):
        yield "unresolved_placeholder_token", token.start(), token.group()
    for opening, closing in _JINJA:
        end = 0
        while (start := text.find(opening, end)) >= 0 and (close := text.find(closing, start + 2)) >= 0:
            end = close + len(closing)
            yield "leftover_jinja_marker", start, text[start:end]
