"""The process side of plugins: each worker is started warm, runs one plugin once, and is let go.

The process that the service started watches over the plugin, which runs in another that is forked when
the task comes; on Windows, which cannot fork, it runs the plugin itself. Promises that the service is
told truthfully what confines a plugin on this machine. A script for any Python from 3.11 on, with
nothing but the standard library, which begins such that older ones can still say that they are too old.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("Python 3.11 or newer is needed, this is {}.{}".format(*sys.version_info))

import gc
import json
from pathlib import Path

# In front, as an interpreter may have a package of the same name; and away again before a plugin comes.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from app.steps import child, confinement
from app.steps.plugins import hooks

if sys.platform != "win32":
    from app.steps.plugins import supervision

del sys.path[0]


_ESCAPES = ", unless it ends its supervisor; SysV shared memory stays"


def main() -> None:
    """Get ready, say so, do the one task, and wait to be let go.

    The service's end shows as that of its pipe too. Where no namespace ends with this process it lives
    on for that, long enough to end all that has come of the plugin.
    """
    channel = child.Channel()
    hooks.leave_only_the_api()
    ground = confinement.surveyed()
    if ground.processes or sys.platform == "win32":
        child.die_with(int(sys.argv[1]))
    confinement.adopt()
    gc.freeze()
    channel.send(child.READY + json.dumps(isolation(ground)).encode())
    payload = channel.receive()
    if payload is None:
        return
    task = json.loads(payload)
    if sys.platform == "win32":
        hooks.put_in_place(task)
        hooks.perform(task, hooks.Telling(channel.lend(), child.TOLD + b"p"))
    else:
        supervision.Supervision(channel, task, ground).run()
        channel.hang_up()
        channel.receive()


def isolation(ground: confinement.Ground) -> dict[str, str]:
    """What holds for plugins on this machine, for people."""
    nothing, unlimited = "not confined on this machine", "not limited on this platform"
    told = {
        "ends_with_the_plugin": "its process tree is killed",
        "ends_with_the_service": "end of its pipe",
        **dict.fromkeys(("memory", "processes", "cpu", "file_size", "open_files"), unlimited),
        **dict.fromkeys(("files", "network", "signals"), nothing),
        "sockets_of_others": "within its reach where their rights allow",
        "privileges": "those of the service",
    }
    if sys.platform != "win32":
        told |= {
            "ends_with_the_plugin": f"its process group is killed{_ESCAPES}",
            "cpu": "as its manifest allows time, on every processor",
            "file_size": f"{supervision.FILE_MB} MB",
            "open_files": str(supervision.HANDLES),
        }
    if sys.platform == "linux":
        told["processes"] = str(supervision.MOST_PROCESSES)
        told |= _on_linux(ground, confinement.landlock_abi())
    return told


def _on_linux(ground: confinement.Ground, abi: int) -> dict[str, str]:
    told = {
        "ends_with_the_plugin": f"all that descend from it are killed{_ESCAPES}",
        "memory": "as its manifest says, all its processes added up",
        "privileges": "none, and no way to any",
    }
    if abi:
        told["files"] = f"Landlock {abi}, but not modes, owners and times of the user's other files"
    if abi >= 4:
        told["network"] = "no TCP"
    if abi >= 6:
        told["signals"] = "none to processes of others, but limits (prlimit) that end those of the user"
    if ground.processes:
        told |= dict.fromkeys(("ends_with_the_plugin", "signals"), "process-id namespace")
        told |= {"network": "network namespace", "ends_with_the_service": "parent-death signal"}
    if ground.mounts:
        told["files"] = f"read-only mounts, {f'Landlock {abi}' if abi else 'no Landlock'}"
        told["sockets_of_others"] = "hidden, those in /run and /tmp"
    return told


if __name__ == "__main__":
    main()
