"""What the platforms do differently with files and folders: syncing, a rename that refuses, rights, copies.

Promises that a call which writes or syncs returns only when its work is on the disk, or raises an OSError
that names the path; copies alone are left to be synced with the tree that they belong to. On Windows
folders cannot be synced and on macOS drives are told to empty their caches; every such branch stands
here. What is synced when, and what a refusal means, is left to the callers.
"""

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
import stat
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

if sys.platform == "win32":
    _READ_FILE = os.O_RDWR  # FlushFileBuffers asks for a handle that may write
    _READ_FOLDER = os.O_RDONLY
    _UNFOLLOWED = 0
else:
    _READ_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    _READ_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY
    _UNFOLLOWED = os.O_NOFOLLOW | os.O_NONBLOCK

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCL = 4
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_FICLONE = 0x40049409
_CLONE_NOFOLLOW = 1
_ACCESS_LISTS = ("system.posix_acl_access", "system.posix_acl_default")
_CHUNK = 1024 * 1024

Heritage = tuple[int | None, bytes | None]


def folded(name: str) -> str:
    """Equal for names that macOS or Windows would take for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def sync_file(path: Path) -> None:
    """Returns when the content of a regular file is on the disk. Links are not followed."""
    _sync(path, _READ_FILE)


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder are on the disk, where the file system can tell."""
    if sys.platform == "win32":
        return
    try:
        _sync(path, os.O_RDONLY)
    except OSError as error:
        # Some network file systems refuse to sync a folder, and keep their names safe by other means.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Puts `content` at `path`, where at every instant the old file or the new one stands, whole.

    The new file gets the rights of a file made in place, or those of the one that it replaces. The
    name of the temporary file is always the same, so that a repeat clears what a crash left. The
    folder is not synced: that is the caller's, who may have written more than one file.
    """
    draft = temporary(path)
    draft.unlink(missing_ok=True)
    try:
        _write(draft, content, mode=_mode(path))
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def temporary(path: Path) -> Path:
    """Where `write_whole` puts what is to stand at `path`."""
    return path.with_name(f".{path.name}.tmp")


def rename_new(source: Path, target: Path) -> None:
    """Renames a folder, and raises FileExistsError when anything has the name `target`.

    Where the platform or file system has no such call the name is looked up first. A folder that
    comes between the look and the rename is still refused unless it is empty, so that of two trees
    of ours only one can get the name: neither of them is empty.
    """
    if sys.platform == "win32" or not _rename_exclusively(source, target):
        _rename_after_a_look(source, target)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder of any depth with all in it, also where its owner has no rights.

    Raises OSError when it is not gone, as when something was added meanwhile. Links are not followed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    elif sys.platform == "win32":
        _make_writable(path)
        shutil.rmtree(path)
    else:
        _let_in(path)
        _remove_folder(path)


def copy_file(source: Path, target: Path) -> None:
    """Makes a new file with the content of another, not synced. Links are not followed.

    Where the file system can, both use the same blocks on the disk, until one of them is written to.
    """
    if sys.platform == "darwin" and not _libc().clonefile(
        os.fsencode(source), os.fsencode(target), _CLONE_NOFOLLOW
    ):
        return
    with _naming(source), open(source, "rb", opener=_unfollowed) as old:
        # Its owner can write to it, and nobody else can read more of it than of the other.
        mode = stat.S_IMODE(os.fstat(old.fileno()).st_mode) | stat.S_IRUSR | stat.S_IWUSR
        with _naming(target), open(target, "xb", opener=functools.partial(os.open, mode=mode)) as new:
            if not _shares_blocks(old.fileno(), new.fileno()):
                # Measured: the kernel's own copy_file_range is no faster where blocks cannot be shared.
                shutil.copyfileobj(old, new, _CHUNK)


def liken(target: Path, source: Path) -> None:
    """Gives a copy the group, access lists, attributes, mode and times of what it was made from.

    Of attributes there are those of users and the POSIX access lists, on Linux; the system's own are given by
    the system. Only what differs is set: setting the mode or a list takes the setgid bit from a folder whose
    group this process is not in.
    """
    wanted = source.lstat()
    is_link = stat.S_ISLNK(wanted.st_mode)
    with _naming(target):
        if sys.platform != "win32" and target.lstat().st_gid != wanted.st_gid:
            os.chown(target, -1, wanted.st_gid, follow_symlinks=False)
        if not is_link:
            _liken_attributes(target, source)
            if target.lstat().st_mode != wanted.st_mode:
                target.chmod(stat.S_IMODE(wanted.st_mode))
        if not is_link or os.utime in os.supports_follow_symlinks:
            os.utime(target, ns=(wanted.st_atime_ns, wanted.st_mtime_ns), follow_symlinks=not is_link)


def same_content(one: Path | str, other: Path | str) -> bool:
    """Whether two files hold the same bytes, which are read: times can be set. Links are not followed."""
    with open(one, "rb", opener=_unfollowed) as left, open(other, "rb", opener=_unfollowed) as right:
        if os.fstat(left.fileno()).st_size != os.fstat(right.fileno()).st_size:
            return False
        while chunk := left.read(_CHUNK):
            if chunk != right.read(_CHUNK):
                return False
        return not right.read(1)


def heritage(folder: Path) -> Heritage | None:
    """What a folder hands on to all that is made in it: its group, its ACL default; None if unknown here.

    The group is None where a new file takes that of its process.
    """
    if sys.platform != "linux":
        return None
    status = folder.stat()
    return (status.st_gid if status.st_mode & stat.S_ISGID else None), _acl_default(folder)


def bestow(folder: Path, wanted: Heritage) -> bool:
    """Makes a folder hand on `wanted`; False where this process is not allowed to.

    It may be refused aloud (chown) or silently: chmod drops the setgid bit for those outside the group.
    """
    if heritage(folder) != wanted:
        try:
            _pass_on(folder, *wanted)
        except PermissionError:
            return False
    return heritage(folder) == wanted


def _sync(path: Path, flags: int) -> None:
    with _naming(path):
        descriptor = os.open(path, flags)
        try:
            _flush(descriptor)
        finally:
            os.close(descriptor)


def _flush(descriptor: int) -> None:
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOTTY, errno.EINVAL):
                raise
    os.fsync(descriptor)


def _write(path: Path, content: bytes, *, mode: int | None) -> None:
    with _naming(path), open(path, "xb") as file:
        if mode is not None:
            path.chmod(mode)
        file.write(content)
        file.flush()
        _flush(file.fileno())


def _mode(path: Path) -> int | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to errors of calls that know only a descriptor: an operator needs to know which disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _rename_exclusively(source: Path, target: Path) -> bool:
    """Whether the system has a call for it and that call renamed. EEXIST is raised as FileExistsError."""
    old, new = os.fsencode(source), os.fsencode(target)
    try:
        if sys.platform == "darwin":
            refused = _libc().renamex_np(old, new, _RENAME_EXCL)
        else:
            refused = _libc().renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE)
    except AttributeError:
        return False
    if not refused:
        return True
    number = ctypes.get_errno()
    if number in _NO_SUCH_CALL:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _rename_after_a_look(source: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error


def _unfollowed(path: str, flags: int) -> int:
    """Opens no link, and does not wait for the other end of a pipe."""
    return os.open(path, flags | _UNFOLLOWED)


def _shares_blocks(source: int, target: int) -> bool:
    """Whether the file system could make one file share the blocks of another.

    Those that cannot say so with many errors; a real one is met again by the copy that follows.
    """
    if sys.platform == "linux":
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError:
            return False
        return True
    return False


def _liken_attributes(target: Path, source: Path) -> None:
    if sys.platform != "linux":
        return
    wanted, found = _attributes(source), _attributes(target)
    for name in found.keys() - wanted.keys():
        os.removexattr(target, name)
    for name, value in wanted.items():
        if found.get(name) != value:
            os.setxattr(target, name, value)


def _attributes(path: Path) -> dict[str, bytes]:
    """The attributes of users and the access lists of a file or folder; none where it cannot have any."""
    if sys.platform != "linux":
        return {}
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    ours = [name for name in names if name.startswith("user.") or name in _ACCESS_LISTS]
    # Those of users first: an access list may take away the right to set them.
    return {name: os.getxattr(path, name) for name in sorted(ours, reverse=True)}


def _pass_on(folder: Path, group: int | None, acl: bytes | None) -> None:
    if sys.platform != "linux":
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if group is None:
        folder.chmod(mode & ~stat.S_ISGID)
    else:
        os.chown(folder, -1, group)
        folder.chmod(mode | stat.S_ISGID)
    if acl is not None:
        os.setxattr(folder, "system.posix_acl_default", acl)
    elif _acl_default(folder) is not None:
        os.removexattr(folder, "system.posix_acl_default")


def _remove_folder(path: Path) -> None:
    """Empties a folder level by level and removes it.

    Folders are moved up beside their parents before these go, so that no depth is beyond recursion, the
    longest path or the number of open files. All names are looked up in open folders: nobody can put a
    link in the way.
    """
    top = os.open(path, _READ_FOLDER)
    try:
        while folders := _empty(top, into=None):
            for name in folders:
                _let_in(name, dir_fd=top)
                folder = os.open(name, _READ_FOLDER, dir_fd=top)
                try:
                    _empty(folder, into=top)
                finally:
                    os.close(folder)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _empty(folder: int, *, into: int | None) -> list[str]:
    """Unlinks what is in an open folder but its folders: moves these `into` another, or returns their names."""
    with os.scandir(folder) as listing:
        entries = list(listing)
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in {entry.name for entry in entries}.difference(folders):
        os.unlink(name, dir_fd=folder)
    if into is None:
        return folders
    for name in folders:
        # A folder that moves has its own entry for its parent changed, which takes the right to write it.
        _let_in(name, dir_fd=folder)
        os.rename(name, secrets.token_hex(8), src_dir_fd=folder, dst_dir_fd=into)
    return []


def _let_in(path: Path | str, *, dir_fd: int | None = None) -> None:
    """Lets the owner into a folder."""
    mode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode
    if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(path, stat.S_IRWXU, dir_fd=dir_fd)


def _make_writable(path: Path) -> None:
    """Windows does not remove what is read-only."""
    for folder, _, files in os.walk(path):
        for name in files:
            os.chmod(os.path.join(folder, name), stat.S_IWRITE)


def _acl_default(folder: Path) -> bytes | None:
    if sys.platform != "linux":
        return None
    try:
        return os.getxattr(folder, "system.posix_acl_default")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise
