"""Plugins that mean harm, or are broken in every way: each ends as it must, and the service stays as it was."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from app.steps import confinement
from app.steps.plugins.host import Asked, Broken, Host, Ran
from tests import plugin_yard as yard
from tests.offspring import running, until
from tests.plugin_yard import doing

pytestmark = pytest.mark.asyncio(loop_scope="module")

LANDLOCK = bool(confinement.landlock_abi())
GROUND = confinement.surveyed()

LONGEST_PAUSE = 0.25
MOST_GROWTH = 30 * 1024 * 1024

FORK_AND = """
    import os, time
    if os.fork() == 0:
        {child}
    {parent}
"""

STAY = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)\n"


class Hostile(NamedTuple):
    """What a plugin does, how that has to end, and a word that its message (or log) then has."""

    source: str
    status: str
    word: str = ""
    seconds: int = 10
    memory_mb: int = 128
    needs: bool = True


HOSTILE = {
    # It gives up, or breaks.
    "a plugin error": Hostile(doing("raise PluginError('no such plate')"), "failed", "no such plate"),
    "a plugin error without words": Hostile(doing("raise PluginError()"), "failed", "without a reason"),
    "a crash": Hostile(doing("{}['well']"), "failed", "KeyError: 'well'"),
    "sys.exit(0)": Hostile(doing("raise SystemExit(0)"), "failed", "SystemExit"),
    "KeyboardInterrupt": Hostile(doing("raise KeyboardInterrupt"), "failed", "KeyboardInterrupt"),
    "a BaseException": Hostile(
        doing("raise Odd('so')", before="class Odd(BaseException): pass"), "failed", "Odd: so"
    ),
    "an exception without a text": Hostile(
        doing(
            "raise Mute",
            before="class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n    __repr__ = __str__",
        ),
        "failed",
        "Mute",
    ),
    "an exception that ends the process when shown": Hostile(
        doing(
            "raise Trap",
            before="import os\nclass Trap(Exception):\n    def __str__(self):\n        os._exit(0)",
        ),
        "failed",
        "exit code 0",
    ),
    "a text of surrogates": Hostile(doing("raise PluginError('\\ud800')"), "failed", "?"),
    "os._exit(0)": Hostile(doing("import os; os._exit(0)"), "failed", "exit code 0"),
    "os._exit(3)": Hostile(doing("import os; os._exit(3)"), "failed", "exit code 3"),
    "SIGKILL to itself": Hostile(doing("import os; os.kill(os.getpid(), 9)"), "failed", "SIGKILL"),
    "SIGSEGV": Hostile(doing("import ctypes; ctypes.string_at(0)"), "failed", "SIGSEGV"),
    "abort": Hostile(doing("import os; os.abort()"), "failed", "SIGABRT"),
    "endless recursion": Hostile(doing("f = lambda: f()\nf()"), "failed", "RecursionError"),
    "recursion without a limit": Hostile(
        doing("import sys; sys.setrecursionlimit(10**9)\nf = lambda *a: sorted([1], key=f)\nf()"), "failed"
    ),
    "a failure hook that fails": Hostile(
        doing(
            "raise PluginError('first')", more="def on_plugin_failure(self, exc, ctx):\n    raise OSError(5)"
        ),
        "failed",
        "first",
    ),
    # It does not end.
    "a hang": Hostile(doing("import time; time.sleep(1000)"), "timeout", "1 seconds", 1),
    "a hang without SIGTERM": Hostile(doing(STAY), "timeout", "", 1),
    "a hang with all signals blocked": Hostile(
        doing(
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: signal.pause()"
        ),
        "timeout",
        "",
        1,
    ),
    "a busy loop": Hostile(doing("while True: pass"), "timeout", "", 1),
    "a hang in the failure hook": Hostile(
        doing("raise PluginError('x')", more="def on_plugin_failure(self, exc, ctx):\n    while True: pass"),
        "timeout",
        "",
        1,
    ),
    "an import that hangs": Hostile("import time\ntime.sleep(1000)", "timeout", "", 1),
    "stopping itself": Hostile(
        doing("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"), "timeout", "", 1
    ),
    "an exit handler that hangs": Hostile(
        doing("import atexit, time; atexit.register(time.sleep, 1000)"), "ran"
    ),
    "threads that are not joined": Hostile(
        doing(
            "import threading, time; [threading.Thread(target=time.sleep, args=(1000,)).start() for _ in range(5)]"
        ),
        "timeout",
        "1 seconds",
        1,
    ),
    "daemon threads": Hostile(
        doing(
            "import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
        ),
        "ran",
    ),
    # It multiplies.
    "a fork that stays": Hostile(doing(FORK_AND.format(child=f"exec({STAY!r})", parent="pass")), "ran"),
    "a fork that comes back": Hostile(doing(FORK_AND.format(child="return", parent="os.wait()")), "ran"),
    "a fork that comes back alone": Hostile(
        doing(FORK_AND.format(child="return", parent="os.wait(); os._exit(0)")), "failed", "exit code 0"
    ),
    "a fork that fails": Hostile(
        doing(FORK_AND.format(child="raise PluginError", parent="os.wait()")), "ran"
    ),
    "a daemon": Hostile(
        doing(
            FORK_AND.format(
                child=f"os.setsid()\n        if os.fork() == 0: exec({STAY!r})\n        os._exit(0)",
                parent="os.wait()",
            )
        ),
        "ran",
    ),
    "a program that stays": Hostile(
        doing(
            f"import subprocess, sys\n"
            f"subprocess.Popen([sys.executable, '-c', {STAY!r}], start_new_session=True,"
            " stdin=-3, stdout=-3, stderr=-3)"
        ),
        "ran",
    ),
    "a program that holds the pipes": Hostile(
        doing(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {STAY!r}], close_fds=False)"),
        "ran",
    ),
    "multiprocessing that is not joined": Hostile(
        doing(
            "import multiprocessing, time\n"
            "multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,)).start()"
        ),
        "ran",
    ),
    "a fork bomb": Hostile(
        doing("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"), "failed"
    ),
    "many sleeping children": Hostile(
        doing(
            "import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(1000)\ntime.sleep(1000)"
        ),
        "failed",
        "too many processes",
        memory_mb=2000,
    ),
    "threads without end": Hostile(
        doing(
            "import threading, time\nthreading.stack_size(64 * 1024)\n"
            "while True: threading.Thread(target=time.sleep, args=(1000,)).start()"
        ),
        "failed",
    ),
    # It takes what it can get.
    "memory": Hostile(doing("kept = []\nwhile True: kept.append(bytearray(1 << 20))"), "failed", "memory"),
    "memory in small pieces": Hostile(
        doing("kept = []\nwhile True: kept.append([None])"), "failed", "memory"
    ),
    "memory in its children": Hostile(
        doing(
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
            "        kept = bytearray(os.urandom(1 << 20)) * 60\n        time.sleep(1000)\ntime.sleep(1000)"
        ),
        "failed",
        "128 MB",
    ),
    "memory in files that have no name": Hostile(
        doing(
            "import os, time\nfor n in range(5):\n    file = os.memfd_create('kept')\n"
            "    for _ in range(40): os.write(file, bytes(1 << 20))\ntime.sleep(1000)"
        ),
        "failed",
        "128 MB",
        needs=sys.platform == "linux",
    ),
    "a file of a gigabyte": Hostile(
        doing(
            "with open('big', 'wb') as file:\n    file.truncate(500 << 20)\n    file.seek(500 << 20)\n"
            "    for _ in range(500): file.write(bytes(1 << 20))"
        ),
        "failed",
        "too large",
    ),
    "many files": Hostile(doing("for n in range(1000): open(f'f{n}', 'w').close()"), "ran"),
    "open files without end": Hostile(
        doing("kept = []\nwhile True: kept.append(open('a.txt'))"), "failed", "Too many"
    ),
    "more of a limit": Hostile(
        doing("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"), "failed", "not allowed"
    ),
    # It makes noise.
    "a gigabyte to stdout": Hostile(
        doing("import os\nchunk = b'x' * (1 << 20)\nfor _ in range(1024): os.write(1, chunk)"),
        "ran",
        "left out",
    ),
    "noise on stderr until the end of time": Hostile(
        doing("import os\nwhile True: os.write(2, b'y' * 65536)"), "timeout", "left out", 1
    ),
    "garbage printed": Hostile(doing("import os; os.write(1, bytes(range(256)) * 100)"), "ran"),
    "a log without end": Hostile(
        doing("for n in range(100_000): ctx.log.info('n' * 500)"), "ran", "left out"
    ),
    "a huge line in the log": Hostile(doing("ctx.log.info('n' * 10_000_000)"), "ran"),
    # It meddles with the way back.
    "garbage into every handle": Hostile(
        doing(
            "import os\nfor fd in range(256):\n    try: os.write(fd, b'garbage' * 10)\n    except OSError: pass"
        ),
        "failed",
        "protocol",
    ),
    "every handle closed": Hostile(
        doing("import os; os.closerange(0, 256)"), "failed", "before it had a result"
    ),
    "a false result, then a crash": Hostile(
        doing('say(b\'{"kind":"ran","described":[]}\')\nos._exit(1)', before="{say}"), "failed", "although"
    ),
    "two results": Hostile(
        doing('say(b\'{"kind":"ran","described":[]}\')', before="{say}"), "failed", "more than once"
    ),
    "a false word of the supervisor": Hostile(
        doing('say(b\'{"kind":"ended","verdict":"","reason":"","exit_code":0}\')', before="{say}"),
        "failed",
        "protocol",
    ),
    "a false file": Hostile(
        doing('say(b\'{"kind":"progress","at":-1}\')', before="{say}"), "failed", "protocol"
    ),
    "half a frame": Hostile(
        doing("send(b'\\x00\\x00\\x01\\x00half')\nos._exit(0)", before="{say}"), "failed", "not whole"
    ),
    "a giant frame": Hostile(
        doing("send(b'\\x7f\\xff\\xff\\xff')\nwhile True: send(b'x' * 65536)", before="{say}"),
        "failed",
        "protocol",
    ),
    "frames without end": Hostile(
        doing('while True: say(b\'{"kind":"progress","at":0}\')', before="{say}"), "failed", "more than"
    ),
    "a deep frame": Hostile(doing("say(b'[' * 100_000)", before="{say}"), "failed", "protocol"),
    "json and os replaced": Hostile(
        doing("import json, os\njson.dumps = lambda *a, **k: 'nonsense'\nos.getpid = lambda: 1"), "failed"
    ),
    "the API replaced": Hostile(
        doing("import exlab_sessions.plugins as p\np.PluginError = None\nraise ValueError('x')"),
        "failed",
        "x",
    ),
    # It asks in odd ways.
    "fields from a generator": Hostile(
        doing("raise PluginInputRequired(({} for _ in 'ab'), 'why')"), "failed", "list of objects"
    ),
    "fields that are no objects": Hostile(
        doing("raise PluginInputRequired(['a'], 'why')"), "failed", "objects"
    ),
    "fields that are no JSON": Hostile(
        doing("raise PluginInputRequired([{'id': object()}], 'why')"), "failed", "no JSON"
    ),
    "no fields": Hostile(doing("raise PluginInputRequired([], 'why')"), "failed", "0 fields"),
    "too many fields": Hostile(
        doing("raise PluginInputRequired([{'id': 'a'}] * 51, 'why')"), "failed", "51 fields"
    ),
    "large fields": Hostile(
        doing("raise PluginInputRequired([{'id': 'a' * 70_000}], 'why')"), "failed", "64 KiB"
    ),
    "giant fields": Hostile(
        doing("raise PluginInputRequired([{'id': 'a' * 9_000_000}], 'why')"), "failed", "more"
    ),
    "deep fields": Hostile(
        doing(
            "deep = []\nfor _ in range(50): deep = [deep]\nraise PluginInputRequired([{'id': deep}], 'why')"
        ),
        "failed",
        "too deep",
    ),
    "fields that contain themselves": Hostile(
        doing("field = {}\nfield['id'] = field\nraise PluginInputRequired([field], 'why')"),
        "failed",
        "no JSON",
    ),
    "a reason that is no text": Hostile(doing("raise PluginInputRequired([{}], 7)"), "failed", "no text"),
    "a long reason": Hostile(doing("raise PluginInputRequired([{}], 'w' * 2001)"), "failed", "2000"),
    # It reaches outside.
    "its tree deleted": Hostile(
        doing("import shutil; shutil.rmtree(ctx.dst_root, ignore_errors=True)"), "ran"
    ),
    "another working directory": Hostile(doing("import os; os.chdir('/')"), "ran"),
    "a file beside the tree": Hostile(
        doing("(ctx.dst_root.parent / 'x').write_text('x')"), "policy_violation", "outside", needs=LANDLOCK
    ),
    "a file of the session": Hostile(
        doing("open(ctx.variables['victim'], 'w')"), "policy_violation", "victim", needs=LANDLOCK
    ),
    "a file in /tmp": Hostile(doing("open('/tmp/exlab-x', 'w')"), "policy_violation", "/tmp", needs=LANDLOCK),
    "a file in the service's home": Hostile(
        doing("open(ctx.variables['home'] + '/exlab-x', 'w')"), "policy_violation", "outside", needs=LANDLOCK
    ),
    "another's file read": Hostile(
        doing("open(ctx.variables['victim']).read()"), "policy_violation", "victim", needs=LANDLOCK
    ),
    "another's file deleted": Hostile(
        doing("import os; os.unlink(ctx.variables['victim'])"), "policy_violation", "victim", needs=LANDLOCK
    ),
    "another's file locked": Hostile(
        doing("import os; os.chmod(ctx.variables['victim'], 0)"),
        "policy_violation",
        "victim",
        needs=GROUND.mounts,
    ),
    "another's file made old": Hostile(
        doing("import os; os.utime(ctx.variables['victim'], (0, 0))"),
        "policy_violation",
        "read-only",
        needs=GROUND.mounts,
    ),
    "a file moved in": Hostile(
        doing("import os; os.rename(ctx.variables['victim'], 'mine')"),
        "policy_violation",
        "victim",
        needs=LANDLOCK,
    ),
    "a way out by a link": Hostile(
        doing("import os; os.symlink(ctx.variables['victim'], 'l'); open('l', 'a')"),
        "policy_violation",
        "victim",
        needs=LANDLOCK,
    ),
    "a way out by /proc": Hostile(
        doing("open('/proc/self/root' + ctx.variables['victim'], 'a')"),
        "policy_violation",
        "",
        needs=LANDLOCK,
    ),
    "a device": Hostile(
        doing("import os, stat; os.mknod('dev', 0o666 | stat.S_IFCHR, os.makedev(1, 8))"), "failed", ""
    ),
    # It looks for company.
    "a TCP connection": Hostile(
        doing("import socket; socket.create_connection(('127.0.0.1', ctx.variables['port']), 1)"),
        "failed",
        "Error",
        needs=GROUND.processes or LANDLOCK,
    ),
    "a UDP datagram": Hostile(
        doing(
            "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', ctx.variables['port']))"
        ),
        "failed",
        "unreachable",
        needs=GROUND.processes,
    ),
    "an abstract socket": Hostile(
        doing("import socket; socket.socket(socket.AF_UNIX).connect('\\0' + ctx.variables['abstract'])"),
        "failed",
        "",
        needs=GROUND.processes or LANDLOCK,
    ),
    "the service killed": Hostile(
        doing("import os; os.kill(ctx.variables['service'], 9)"), "failed", "Error", needs=GROUND.processes
    ),
    "its parent killed": Hostile(
        doing("import os; os.kill(os.getppid(), 9)\nimport time; time.sleep(1)"), "any"
    ),
    "all killed": Hostile(doing("import os; os.kill(-1, 9)"), "any", needs=GROUND.processes),
    "its group killed": Hostile(doing("import os; os.killpg(0, 9)"), "failed", "SIGKILL"),
    "the service traced": Hostile(
        doing(
            "import ctypes\n"
            "if ctypes.CDLL(None).ptrace(16, ctx.variables['service'], 0, 0) != 0: raise PluginError('refused')"
        ),
        "failed",
        "refused",
        needs=GROUND.processes or LANDLOCK,
    ),
    "the service's environment read": Hostile(
        doing("open(f\"/proc/{ctx.variables['service']}/environ\").read()"),
        "any",
        "",
        needs=GROUND.mounts or LANDLOCK,
    ),
    "another user": Hostile(doing("import os; os.setgroups([]); os.setuid(12345)"), "failed", "permitted"),
    "a mount": Hostile(
        doing(
            "import ctypes\nif ctypes.CDLL(None).mount(b't', b'/', b'tmpfs', 0, None): raise PluginError('refused')"
        ),
        "failed",
        "refused",
    ),
    "sudo": Hostile(
        doing(
            "import subprocess; subprocess.run(['su', '-c', 'id', 'nobody'], check=True, capture_output=True)"
        ),
        "failed",
        "",
    ),
    # It cannot be loaded.
    "no class": Hostile("x = 1", "failed", "no class"),
    "a function": Hostile("def Plugin(): ...", "failed", "no class"),
    "a class without hooks": Hostile("class Plugin: ...", "failed", "can_handle"),
    "an unfinished class": Hostile(
        "from exlab_wizard.plugins import Plugin as B\nclass Plugin(B):\n    can_handle = None",
        "failed",
        "can_handle",
    ),
    "a syntax error": Hostile("def broken(:", "failed", "SyntaxError"),
    "null bytes": Hostile("x = '\0'", "failed", "null bytes"),
    "an import error": Hostile("import no_such_package", "failed", "no_such_package"),
    "an import that exits": Hostile("import os; os._exit(0)", "failed", "exit code 0"),
    "a constructor that raises": Hostile(
        doing("pass", more="def __init__(self):\n    raise RuntimeError('not today')"), "failed", "not today"
    ),
    "another version": Hostile(doing("pass", more="version = '9.9'"), "failed", "9.9"),
    "another name": Hostile(doing("pass", name="impostor"), "failed", "impostor"),
}

SAY = (
    "import os, sys\n"
    "def send(data):\n"
    "    for fd in range(3, 64):\n"
    "        try: os.write(fd, data); return\n"
    "        except OSError: pass\n"
    "def say(text):\n"
    "    send(len(text).to_bytes(4, 'big') + text)\n"
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def host() -> AsyncIterator[Host]:
    host = Host(lambda: None, 2)
    await host.start()
    yield host
    await host.close()


@pytest.fixture(scope="module")
def lean(host: Host) -> int:
    """The memory of this process before the first of them."""
    return resident()


@pytest.fixture
def listening() -> Iterator[dict[str, object]]:
    """Sockets of the service that a plugin may find."""
    tcp, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    name = f"exlab-{os.getpid()}"
    abstract.bind("\0" + name)
    abstract.listen()
    with tcp, abstract:
        yield {"port": tcp.getsockname()[1], "abstract": name}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left_of(attempt: Path) -> list[int]:
    """The processes that work in an attempt's folder, or were started with it in their environment."""
    return [each for each, folders in processes() if any(bytes(attempt) in text for text in folders)]


def forks_of_workers() -> list[int]:
    """Those that still are what their worker was, wherever they are; also what a new one tries out."""
    mark = b"plugins/worker.py\0%d\0" % os.getpid()
    return [
        each for each, (*_, words) in processes() if words.endswith(mark) and parent_of(each) != os.getpid()
    ]


def processes() -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """Those that run, but this one: working directory, environment and command line of each."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            try:
                folder = os.fsencode(os.readlink(process / "cwd"))
                texts = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if running(int(process.name)):
                yield int(process.name), (folder, *texts)


class Pauses:
    """How long the event loop was kept from its work at the longest, by anything but other processes."""

    async def __aenter__(self) -> "Pauses":
        self.longest = 0.0
        self._task = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _measure(self) -> None:
        while True:
            before = time.perf_counter() - seconds_in_the_queue()
            await asyncio.sleep(0.005)
            after = time.perf_counter() - seconds_in_the_queue()
            self.longest = max(self.longest, after - before - 0.005)


def seconds_in_the_queue() -> float:
    """How long this thread has waited for a processor, all in all."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def status_of(outcome: Ran | Asked | Broken) -> str:
    return outcome.status if isinstance(outcome, Broken) else type(outcome).__name__.lower()


@pytest.mark.parametrize("case", HOSTILE)
async def test_it_ends_as_it_must_and_leaves_the_service_as_it_was(
    host: Host, lean: int, listening: dict[str, object], tmp_path: Path, case: str
) -> None:
    hostile = HOSTILE[case]
    if not hostile.needs:
        pytest.skip("this machine cannot confine that")
    (tmp_path / "session").mkdir()
    victim = tmp_path / "session" / "victim"
    victim.write_text("intact")
    manifest = yard.plugin(
        tmp_path / "plugins",
        hostile.source.replace("{say}", SAY),
        timeout_seconds=hostile.seconds,
        memory_mb=hostile.memory_mb,
    )
    variables = {"victim": str(victim), "home": str(Path.home()), "service": os.getpid(), **listening}
    task = yard.task(tmp_path / "session" / "attempt", manifest, variables=variables)
    good = yard.plugin(tmp_path / "good", doing("file_path.write_text('good')"))

    async with Pauses() as pauses:
        outcome = await host.run(task, lambda *_: None)
        remains = left_of(tmp_path)
        after = yard.task(tmp_path / "after", good)
        assert isinstance(await host.run(after, lambda *_: None), Ran)

    told = "\n".join((getattr(outcome, "message", ""), *(line.text for line in outcome.log)))
    assert hostile.status in (status_of(outcome), "any"), outcome
    assert hostile.word in told
    assert len(told) < 300 * 1024
    assert len(outcome.log) <= 500
    assert remains == []
    await until(lambda: not forks_of_workers())
    assert victim.read_text() == "intact"
    assert victim.stat().st_mtime > 0
    assert {path.name for path in task.tree.parent.iterdir()} <= {"tree", "scratch"}
    assert not Path("/tmp/exlab-x").exists()
    assert not (Path.home() / "exlab-x").exists()
    assert (after.tree / "a.txt").read_text() == "good"
    assert pauses.longest < LONGEST_PAUSE
    assert resident() - lean < MOST_GROWTH


async def test_the_table_is_as_long_as_the_list_of_what_has_been_thought_of() -> None:
    assert len(HOSTILE) >= 40


async def test_a_plugin_that_is_stopped_by_a_limit_still_tells_what_it_had_to_say(
    host: Host, tmp_path: Path
) -> None:
    source = doing("print('so far', flush=True)\nctx.log.info('and this')\nwhile True: pass")
    manifest = yard.plugin(tmp_path / "plugins", source, timeout_seconds=1)
    outcome = await host.run(yard.task(tmp_path, manifest), lambda *_: None)
    assert isinstance(outcome, Broken)
    assert {line.text for line in outcome.log} == {"so far", "and this"}
    assert outcome.usage.exit_code == 124
    assert 900 < outcome.usage.duration_ms < 3000


async def test_a_supervisor_that_is_killed_takes_the_plugin_with_it(host: Host, tmp_path: Path) -> None:
    manifest = yard.plugin(tmp_path / "plugins", doing("import time; open('here', 'w'); time.sleep(1000)"))
    task = yard.task(tmp_path, manifest)
    running = asyncio.create_task(host.run(task, lambda *_: None))
    await until((task.tree / "here").exists)
    os.kill(supervisor_of(tmp_path), signal.SIGKILL)
    outcome = await running
    assert isinstance(outcome, Broken)
    assert outcome.status == "failed"
    assert "SIGKILL" in outcome.message
    await until(lambda: not left_of(tmp_path))


def supervisor_of(attempt: Path) -> int:
    """The one in the line from the plugin's process up that is a child of this process."""
    process = left_of(attempt)[0]
    while (parent := parent_of(process)) not in (os.getpid(), None):
        process = parent
    return process


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
