"""A small laboratory for looking around: a config, templates, a plugin, examples of what can be asked for.

All of it lies in one folder that can be deleted as a whole. What is already there is never touched, so that a
newcomer's changes survive; what a dead service left half made is made whole.
"""

import shutil
from pathlib import Path

_ORIGINAL = Path(__file__).parent
_EMPTY = ("data", "state")
_COPIED = ("templates", "plugins", "examples", "config.yaml")
_NOT_OURS = shutil.ignore_patterns("__pycache__")


def build(folder: Path) -> Path:
    """Make what is missing of the laboratory in `folder`; returns the path of its config file.

    The folder may be moved afterwards: the config names everything relative to itself.
    """
    for name in _EMPTY:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        _copy_missing(_ORIGINAL / name, folder / name)
    return folder / "config.yaml"


def _copy_missing(original: Path, target: Path) -> None:
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    if original.is_file():
        shutil.copyfile(original, partial)
    else:
        if partial.exists():
            shutil.rmtree(partial)
        shutil.copytree(original, partial, copy_function=shutil.copyfile, ignore=_NOT_OURS)
    partial.rename(target)
