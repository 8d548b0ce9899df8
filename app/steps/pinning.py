"""A template's files: what they are, and a copy of them that stays as it is.

A pinned copy is whole or absent, also after a power cut, and holds nothing that leads out of it. A template that is
too large to be copied, or that holds more than files, folders and links within it, is refused before. What the
template says of itself is left to `templates`.
"""

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from app import disk
from app.errors import Failure
from app.steps.templates import READ_AT_ONCE, Unusable, encodable, leads_nowhere, shown

_MOST_FILES = 10_000
_MOST_BYTES = 1024**3
_DEEPEST = 64
_CHUNK = 1024 * 1024
# The owner of the copy must be able to read it; Windows syncs only what may be written.
_KEPT = stat.S_IRUSR if os.name == "posix" else stat.S_IRUSR | stat.S_IWUSR
_CHANGED = "{} changed while the template was being copied"
_READ_ITSELF = READ_AT_ONCE | getattr(os, "O_NOFOLLOW", 0)


class Entry(msgspec.Struct, frozen=True):
    """One file, folder or link of a template; `path` is relative to it, `size` in bytes."""

    path: str
    kind: Literal["file", "folder", "link"]
    size: int
    mode: int


def survey(folder: Path, *, follow: bool) -> tuple[Entry, ...] | Failure:
    """All that a template consists of, folders before what is in them; what lies in `.git` is left out.

    With `follow` a link stands for what it leads to, which is how Copier sees it; without, for itself.
    """
    try:
        return tuple(_survey(folder, follow=follow))
    except Unusable as unusable:
        return unusable.failure()


def _survey(folder: Path, *, follow: bool) -> Iterator[Entry]:
    root = Path(os.path.realpath(folder))
    size = 0
    for count, entry in enumerate(_walk(root, root, "", (root,), follow), 1):
        size += entry.size
        if count > _MOST_FILES:
            raise Unusable(f"the template has more than {_MOST_FILES} files")
        if size > _MOST_BYTES:
            raise Unusable("the template is larger than 1 GiB")
        yield entry


def _walk(folder: Path, root: Path, prefix: str, above: tuple[Path, ...], follow: bool) -> Iterator[Entry]:
    if len(above) > _DEEPEST:
        raise Unusable(f"the template has more than {_DEEPEST} folders in each other")
    with os.scandir(folder) as listing:
        # A folder is listed whole before it is sorted; one that is too large is not read to its end.
        found = sorted(itertools.islice(listing, _MOST_FILES + 1), key=lambda one: one.name)
    for item in found:
        if item.name == ".git":
            continue
        path, name = Path(item.path), prefix + item.name
        if not encodable(item.name):
            raise Unusable(f"the template holds a name that is not UTF-8 text: {shown(name)}")
        if item.is_symlink():
            real = _led_to(path, root, name)
            if not follow:
                yield Entry(name, "link", 0, 0)
                continue
            if real in above:
                raise Unusable(f"the link {shown(name)} in the template leads round in a circle")
            path = real
        yield from _entries(path, root, name, above, follow)


def _entries(path: Path, root: Path, name: str, above: tuple[Path, ...], follow: bool) -> Iterator[Entry]:
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise Unusable(f"{shown(name)} in the template leads nowhere") from error
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if stat.S_ISDIR(found.st_mode):
        yield Entry(name, "folder", 0, mode)
        yield from _walk(path, root, name + "/", (*above, path), follow)
    elif stat.S_ISREG(found.st_mode):
        yield Entry(name, "file", found.st_size, mode)
    else:
        raise Unusable(f"{shown(name)} in the template is neither a file nor a folder")


def _led_to(path: Path, root: Path, name: str) -> Path:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root) or ".git" in real.relative_to(root).parts:
        raise Unusable(f"the link {shown(name)} leads out of the template")
    return real


def pin(template: Path, target: Path) -> Failure | None:
    """Copy the template's folder to `target`, whose parent is made; nothing is done where it is already there.

    The copy is built beside `target` and synced before it takes that name, so that it is whole wherever it is.
    """
    if os.path.lexists(target):
        return None
    partial = target.with_name(f"{target.name}.partial")
    _make_room(partial)
    try:
        _copy(Path(os.path.realpath(template)), partial)
    except Unusable as unusable:
        shutil.rmtree(partial, ignore_errors=True)
        return unusable.failure()
    disk.rename_new(partial, target)
    disk.sync_folder(target.parent)
    return None


def _make_room(partial: Path) -> None:
    session, staging = partial.parent, partial.parent.parent
    # Below the mount point of a disk that is away nothing may be made.
    if not staging.is_dir():
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(staging))
    session.mkdir(exist_ok=True)
    disk.sync_folder(staging)
    if os.path.lexists(partial):
        shutil.rmtree(partial)


def _copy(source: Path, target: Path) -> None:
    entries = tuple(_survey(source, follow=False))
    target.mkdir()
    for entry in entries:
        match entry.kind:
            case "folder":
                (target / entry.path).mkdir()
            case "link":
                (target / entry.path).symlink_to(_target_of(source, entry.path))
            case "file":
                _copy_file(source, target, entry)
    # A folder gets its mode, and is synced, when all that belongs into it is there.
    for folder in [entry for entry in reversed(entries) if entry.kind == "folder"]:
        (target / folder.path).chmod(folder.mode | stat.S_IRWXU)
        disk.sync_folder(target / folder.path)
    disk.sync_folder(target)


def _target_of(source: Path, name: str) -> str:
    """Where a link of the copy leads: within the copy, also if the original was written from outside."""
    link = source / name
    written = os.readlink(link)
    landing = os.path.normpath(Path(name).parent / written)
    if not os.path.isabs(written) and landing.split(os.sep)[0] != "..":
        return written
    return os.path.relpath(os.path.realpath(link), link.parent)


def _copy_file(source: Path, target: Path, entry: Entry) -> None:
    copy = target / entry.path
    try:
        descriptor = os.open(source / entry.path, _READ_ITSELF)
    except OSError as error:
        if leads_nowhere(error):
            raise Unusable(_CHANGED.format(shown(entry.path))) from error
        raise
    with open(descriptor, "rb") as reader, open(copy, "xb") as writer:
        if not _copied(reader, writer, entry.size):
            raise Unusable(_CHANGED.format(shown(entry.path)))
    copy.chmod(entry.mode | _KEPT)
    disk.sync_file(copy)


def _copied(reader: BinaryIO, writer: BinaryIO, size: int) -> bool:
    """Whether there were `size` bytes. No more are taken: what grows while it is read must not fill the disk."""
    left = size
    while left > 0 and (chunk := reader.read(min(left, _CHUNK))):
        writer.write(chunk)
        left -= len(chunk)
    return left == 0 and not reader.read(1)
