"""Which processes have come from one, read from /proc."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path


def offspring(ancestor: int | None = None) -> set[int]:
    """The living descendants of `ancestor`, by default of this process."""
    family, found = _families(), set[int]()
    waiting = [ancestor or os.getpid()]
    while waiting:
        children = family.get(waiting.pop(), set()) - found
        found |= children
        waiting += children
    return found


def running(pid: int) -> bool:
    """A zombie does not run."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Come back as soon as `condition` holds; fail if it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def _families() -> dict[int, set[int]]:
    family: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and running(int(entry.name)):
            try:
                parent = int(_stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            family.setdefault(parent, set()).add(int(entry.name))
    return family


def _stat(pid: int) -> list[str]:
    """State, parent and so on: the name before them may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
