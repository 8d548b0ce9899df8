"""What became of the copy of a tree that a plugin has worked on, and whether that may be kept.

Promises that nothing which the plugin left can hold, lead astray or deceive the comparison: links are not
followed, pipes are not opened, contents are read whatever their times say, and no depth or number of entries
is too much for it. Both trees are only read. What follows from a violation is left to the caller.
"""

import errno
import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import msgspec

from app import disk
from app.steps import provenance
from app.steps.templates import shown

_READABLE = {stat.S_IFDIR: stat.S_IRUSR | stat.S_IXUSR, stat.S_IFREG: stat.S_IRUSR, stat.S_IFLNK: 0}
"""What may be in a tree, and what its owner must be allowed so that it can be sealed and copied."""

MOST_ADDED = 100_000
MOST_BYTES = 4 * 1024**3
"""What a plugin may add: all of it is read, hashed, synced and listed while the session waits."""

# Linux follows 40 links in one path, macOS 32, Windows 63.
_MOST_LINKS = 64
# A name that is longer than any path, and one that goes while it is looked at.
_OUT_OF_SIGHT = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR)


class Changes(msgspec.Struct, frozen=True):
    """The paths that differ between two trees, and why the second must not be kept, if it must not.

    `affected` are relative, with `/`, in order; "." is the tree itself. Bytes that are not UTF-8 are escaped.
    """

    affected: tuple[str, ...]
    violations: tuple[str, ...]


class _Found(msgspec.Struct):
    """A name in a tree. `status` is None where it was out of sight; `target` is where a link points."""

    path: str
    status: os.stat_result | None
    target: str | None = None

    @property
    def mode(self) -> int:
        return self.status.st_mode if self.status else 0

    @property
    def kind(self) -> int:
        if sys.platform == "win32" and self.status is not None:
            if self.status.st_reparse_tag == stat.IO_REPARSE_TAG_MOUNT_POINT:
                return 0  # a junction: it passes for a folder, and leads anywhere
        return stat.S_IFMT(self.mode)


_Tree = dict[str, _Found]


def protected(answers_file: str) -> Callable[[str], bool]:
    """Whether a relative path is one that plugins are not offered and must not touch, in any spelling."""
    ours = [disk.folded(PurePath(name).as_posix()) for name in (*provenance.OWNED, answers_file)]

    def is_ours(path: str) -> bool:
        name = disk.folded(path)
        return any(name == own or name.startswith(f"{own}/") for own in ours)

    return is_ours


def compare(before: Path, after: Path, *, protected: Callable[[str], bool]) -> Changes:
    """Compares the copy that a plugin has worked on with the tree that it was made from.

    A path is affected when it is in one tree only, or its kind, mode, content or target differ.
    """
    old = _tree(before)
    new = _tree(after, most=len(old) + MOST_ADDED)
    if len(new) > len(old) + MOST_ADDED:
        return Changes((), (f"the plugin made more than {MOST_ADDED} files and folders",))
    if _size(new) > _size(old) + MOST_BYTES:
        return Changes((), (f"the plugin made more than {MOST_BYTES // 1024**3} GB of files",))
    if new["."].kind != stat.S_IFDIR:
        return Changes((".",), ("the folder that the plugin worked on is gone, or is no folder any more",))
    affected = sorted(path for path in old.keys() | new.keys() if _differs(old.get(path), new.get(path)))
    violations = [f"{shown(path)} is not for plugins to change" for path in affected if protected(path)]
    violations += _violations(old, new, frozenset(affected))
    return Changes(tuple(map(_printable, affected)), tuple(violations))


def _size(tree: _Tree) -> int:
    """Of all files, holes included: whoever reads them reads these too."""
    return sum(entry.status.st_size for entry in tree.values() if entry.status and entry.kind == stat.S_IFREG)


def _tree(root: Path, most: float = math.inf) -> _Tree:
    """All names in a tree by their relative paths, each folder before what is in it; not many more than `most`."""
    found = {".": _look(str(root))}
    waiting = [(found["."], "")]
    while waiting and len(found) <= most:
        folder, above = waiting.pop()
        for name in _names(folder):
            entry = found[above + name] = _look(os.path.join(folder.path, name))
            waiting.append((entry, f"{above}{name}/"))
    return found


def _names(folder: _Found) -> list[str]:
    """What is in a folder; nothing where that cannot be seen, which is then a violation."""
    if folder.kind != stat.S_IFDIR:
        return []
    if _closed(folder.mode) and not os.access(folder.path, os.R_OK | os.X_OK):
        return []
    try:
        return os.listdir(folder.path)
    except OSError as error:
        if error.errno not in _OUT_OF_SIGHT:
            raise
        folder.status = None
        return []


def _look(path: str) -> _Found:
    try:
        status = os.lstat(path)
        target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
    except OSError as error:
        if error.errno in _OUT_OF_SIGHT:
            return _Found(path, None)
        raise
    return _Found(path, status, target)


def _differs(old: _Found | None, new: _Found | None) -> bool:
    if old is None or new is None or old.kind != new.kind:
        return True
    if old.kind == stat.S_IFLNK:
        return old.target != new.target
    if old.mode != new.mode:
        return True
    return old.kind == stat.S_IFREG and not disk.same_content(old.path, new.path)


def _violations(old: _Tree, new: _Tree, affected: frozenset[str]) -> Iterator[str]:
    """What may not be in a tree, unless the plugin found it there."""
    names = Counter(map(_file, new.values()))
    inherits = bool(old["."].mode & stat.S_ISGID)
    for path, entry in sorted(new.items()):
        if path in affected:
            was = old.get(path)
            yield from (f"{shown(path)} {why}" for why in _wrong(path, entry, was, inherits))
        if entry.kind == stat.S_IFREG and entry.status and entry.status.st_nlink > names[_file(entry)]:
            yield f"{shown(path)} is a hard link to a file outside of the folder"
        if _leaves(new, path) and (path in affected or not _leaves(old, path)):
            yield f"the link {shown(path)} points out of the folder"


def _file(entry: _Found) -> tuple[int, int] | None:
    return (entry.status.st_dev, entry.status.st_ino) if entry.status else None


def _wrong(path: str, entry: _Found, was: _Found | None, inherits: bool) -> Iterator[str]:
    if entry.status is None:
        yield "cannot be looked at: its path is too long, or it was still being changed"
    elif entry.kind not in _READABLE:
        yield "is neither a file, a folder nor a link"
    elif _closed(entry.mode) or (path == "." and not entry.mode & stat.S_IWUSR):
        yield "is closed to its own owner"
    if was is None and _printable(path) != path:
        yield "has a name that is not UTF-8"
    if _powers(entry.mode, inherits) & ~(_powers(was.mode, inherits) if was else 0):
        yield "would run with the rights of its owner or group"


def _closed(mode: int) -> bool:
    needed = _READABLE.get(stat.S_IFMT(mode), 0)
    return mode & needed != needed


def _powers(mode: int, inherits: bool) -> int:
    """The bits that lend rights. Folders take setgid from the one above, where that has it."""
    if stat.S_ISDIR(mode):
        return mode & (stat.S_ISUID | (0 if inherits else stat.S_ISGID))
    return mode & (stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))


def _leaves(tree: _Tree, path: str) -> bool:
    """Whether a link is absolute, or a step of the way that it names is outside of the tree.

    Each step is taken as the system would: where it meets a link it goes on from where that points.
    """
    entry = tree.get(path)
    if entry is None or entry.target is None:
        return False
    place, ahead = path.split("/"), [path.rpartition("/")[2]]
    place.pop()
    links_left = _MOST_LINKS
    while ahead:
        step = ahead.pop()
        if step == "..":
            if not place:
                return True
            place.pop()
            continue
        place.append(step)
        met = tree.get("/".join(place))
        if met is not None and met.target is not None:
            target = PurePath(met.target)
            if target.anchor:
                return True
            links_left -= 1
            if not links_left:
                return False
            place.pop()
            ahead += reversed(target.parts)
    return False


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()
