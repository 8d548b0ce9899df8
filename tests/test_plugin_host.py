"""Plugins in processes of their own: what they see, in what order they are called, what comes back, how they end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import venv
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.errors import BlockedOn
from app.steps import confinement
from app.steps.plugins.host import Asked, Broken, Host, Line, Ran, Unavailable
from tests import plugin_yard as yard
from tests.offspring import offspring, running, until
from tests.plugin_yard import doing

GROUND = confinement.surveyed()

WIZARDS = {
    "__init__.py": "from .plugin import HelloPlugin as Plugin\n",
    "plugin.py": """
        from pathlib import Path
        from exlab_wizard.errors import PluginError
        from exlab_wizard.plugins import Plugin, PluginContext, PluginInputRequired, FileChange
        from exlab_wizard.plugins.base import PluginError as SameError

        from .colors import KNOWN

        assert SameError is PluginError


        class HelloPlugin(Plugin):
            name = "hello"
            version = "1.0"
            supported_extensions = [".txt"]
            api_version = "1"
            required_variables = ["operator"]

            def can_handle(self, file_path: Path, variables: dict) -> bool:
                return not file_path.name.startswith("_")

            def pre_transform_all(self, ctx: PluginContext) -> None:
                self.count = 0

            def transform(self, file_path: Path, ctx: PluginContext) -> None:
                color = (ctx.variables.get("__extra_inputs__") or {}).get("color")
                if color is None:
                    raise PluginInputRequired(
                        fields=[{"id": "color", "label": "Color", "type": "choice", "options": KNOWN}],
                        reason=f"Which color has {file_path.name}?",
                    )
                if color not in KNOWN:
                    raise PluginError(f"{color} is no color")
                self.count += 1
                file_path.write_text(f"{color} {self.count} {ctx.variables['operator']}")

            def post_transform_all(self, ctx: PluginContext) -> None:
                ctx.log.info("painted", files=self.count)
    """,
    "colors.py": "KNOWN = ['red', 'blue']\n",
}

TRACE = """
    import json

    class Plugin:
        name = "specimen"

        def __init__(self):
            self.calls = ["made"]

        def can_handle(self, file_path, variables):
            self.calls.append(f"can_handle {file_path.name} {'__extra_inputs__' in variables}")
            return file_path.name != "b.txt"

        def pre_transform_all(self, ctx):
            self.note("pre", ctx)

        def transform(self, file_path, ctx):
            self.note(f"transform {file_path.name}", ctx)
            if ctx.variables.get("fail_at") == file_path.name:
                raise ValueError("spilled")

        def describe_changes(self, file_path, ctx):
            self.note(f"describe {file_path.name}", ctx)
            return []

        def post_transform_all(self, ctx):
            self.note("post", ctx)
            ctx.log.info(json.dumps(self.calls))

        def on_plugin_failure(self, exc, ctx):
            self.note(f"failure {exc}", ctx)
            ctx.log.info(json.dumps(self.calls))
            raise RuntimeError("and again")

        def note(self, what, ctx):
            assert ctx.variables.get("__extra_inputs__", {}) == ctx.extra_inputs
            self.calls.append(f"{what} {sorted(ctx.extra_inputs.items())}")
"""


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host(lambda: None, 1)
    yield host
    await host.close()


def unheard(_done: int, _all: int, _file: str) -> None:
    return


async def ran(host: Host, folder: Path, source: str, **options: object) -> Ran:
    outcome = await done(host, folder, source, **options)
    assert isinstance(outcome, Ran), outcome
    return outcome


async def done(host: Host, folder: Path, source: str, **options: object) -> Ran | Asked | Broken:
    limits = {
        name: options.pop(name) for name in ("timeout_seconds", "memory_mb", "network") if name in options
    }
    manifest = yard.plugin(folder / "plugins", source, **limits)  # type: ignore[arg-type]
    return await host.run(yard.task(folder / "attempt", manifest, **options), unheard)  # type: ignore[arg-type]


def texts(outcome: Ran | Asked | Broken) -> list[str]:
    return [line.text for line in outcome.log]


async def test_a_plugin_of_the_replaced_service_runs_unmodified(host: Host, tmp_path: Path) -> None:
    yard.package(tmp_path / "hello", WIZARDS)
    manifest = yard.manifest(tmp_path / "hello")
    variables: dict[str, object] = {"operator": "Ada"}
    files = {"a.txt": "", "b.txt": "", "_c.txt": "untouched"}

    asked = await host.run(yard.task(tmp_path / "1", manifest, files, variables=variables), unheard)
    assert isinstance(asked, Asked)
    assert asked.file == "a.txt"
    assert asked.reason == "Which color has a.txt?"
    assert asked.fields == ({"id": "color", "label": "Color", "type": "choice", "options": ["red", "blue"]},)

    answers: dict[str, dict[str, object]] = {"a.txt": {"color": "red"}}
    task = yard.task(tmp_path / "2", manifest, files, variables=variables, answers=answers)
    asked = await host.run(task, unheard)
    assert isinstance(asked, Asked)
    assert asked.file == "b.txt"

    answers["b.txt"] = {"color": "blue"}
    task = yard.task(tmp_path / "3", manifest, files, variables=variables, answers=answers)
    outcome = await host.run(task, unheard)
    assert isinstance(outcome, Ran)
    assert outcome.log == (Line("info", "painted files=2"),)
    assert (task.tree / "a.txt").read_text() == "red 1 Ada"
    assert (task.tree / "b.txt").read_text() == "blue 2 Ada"
    assert (task.tree / "_c.txt").read_text() == "untouched"


async def test_every_name_of_the_api_is_the_same_thing(host: Host, tmp_path: Path) -> None:
    source = """
        import exlab_sessions.plugins, exlab_wizard.plugins.base, exlab_wizard.errors
        from exlab_sessions import plugins
        from exlab_wizard import plugins as theirs
        assert plugins is theirs is exlab_wizard.plugins.base is exlab_sessions.plugins
        assert exlab_wizard.errors.ExLabError is plugins.ExLabError
        from exlab_sessions.plugins import *
    """
    await ran(host, tmp_path, doing("pass", before=source))


async def test_the_hooks_are_called_in_order_on_one_instance(host: Host, tmp_path: Path) -> None:
    files = {"a.txt": "", "b.txt": "", "sub/c.txt": ""}
    answers: dict[str, dict[str, object]] = {"": {"x": 1}, "sub/c.txt": {"y": 2, "x": 3}}
    outcome = await ran(host, tmp_path, TRACE, files=files, answers=answers)
    assert json.loads(outcome.log[0].text) == [
        "made",
        "pre [('x', 1)]",
        "can_handle a.txt True",
        "transform a.txt [('x', 1)]",
        "can_handle b.txt True",
        "can_handle c.txt True",
        "transform c.txt [('x', 3), ('y', 2)]",
        "post [('x', 1)]",
    ]


async def test_without_answers_the_key_of_the_answers_is_not_there(host: Host, tmp_path: Path) -> None:
    outcome = await ran(host, tmp_path, TRACE)
    assert "can_handle a.txt False" in json.loads(outcome.log[0].text)


async def test_a_dry_run_describes_and_does_not_transform(host: Host, tmp_path: Path) -> None:
    outcome = await ran(host, tmp_path, TRACE, dry_run=True)
    calls = json.loads(outcome.log[0].text)
    assert "describe a.txt []" in calls
    assert "transform a.txt []" not in calls


async def test_what_a_plugin_would_change_comes_back_with_paths_below_the_tree(
    host: Host, tmp_path: Path
) -> None:
    more = """
        def describe_changes(self, file_path, ctx):
            yield from super().describe_changes(file_path, ctx)
            yield FileChange(ctx.dst_root / "sub" / "n.txt", "create", "a note", {"cells": [1]})
    """
    outcome = await ran(host, tmp_path, doing("1 / 0", more=more), dry_run=True)
    assert outcome.described == (
        {"path": "a.txt", "kind": "modify", "summary": "specimen would modify a.txt", "detail": {}},
        {"path": "sub/n.txt", "kind": "create", "summary": "a note", "detail": {"cells": [1]}},
    )


async def test_a_plugin_hears_of_its_failure_and_what_it_raises_then_is_only_logged(
    host: Host, tmp_path: Path
) -> None:
    outcome = await done(host, tmp_path, TRACE, variables={"fail_at": "a.txt"})
    assert isinstance(outcome, Broken)
    assert outcome.status == "failed"
    assert outcome.message == "ValueError: spilled"
    assert json.loads(outcome.log[0].text)[-1] == "failure spilled []"
    assert outcome.log[1] == Line("warning", "on_plugin_failure failed: RuntimeError: and again")
    assert "spilled" in outcome.log[-1].text


@pytest.mark.parametrize("hook", ["pre_transform_all", "post_transform_all"])
async def test_a_hook_may_ask_too_and_its_answer_is_there_for_all(
    host: Host, tmp_path: Path, hook: str
) -> None:
    more = f"""
        def {hook}(self, ctx):
            if "lot" not in ctx.extra_inputs:
                raise PluginInputRequired([{{"id": "lot"}}], "Which lot?")
    """
    source = doing("file_path.write_text(ctx.extra_inputs.get('lot', 'none'))", more=more)
    manifest = yard.plugin(tmp_path / "plugins", source)
    asked = await host.run(yard.task(tmp_path / "1", manifest), unheard)
    assert isinstance(asked, Asked)
    assert asked.file is None
    assert asked.fields == ({"id": "lot"},)
    task = yard.task(tmp_path / "2", manifest, answers={"": {"lot": "L7"}})
    assert isinstance(await host.run(task, unheard), Ran)
    assert (task.tree / "a.txt").read_text() == "L7"


async def test_a_plugin_is_told_all_that_it_may_know(host: Host, tmp_path: Path) -> None:
    source = doing(
        """
        import dataclasses
        try:
            ctx.project = "another"
        except dataclasses.FrozenInstanceError:
            told = {name: str(getattr(ctx, name)) for name in ctx.__dataclass_fields__ if name != "log"}
            file_path.write_text(json.dumps(told))
        """,
        before="import json",
    )
    await ran(host, tmp_path, source, variables={"lens": "63x"})
    tree = tmp_path / "attempt" / "tree"
    assert json.loads((tree / "a.txt").read_text()) == {
        "variables": "{'lens': '63x'}",
        "dst_root": str(tree),
        "answers_file": str(tree / ".copier-answers.yml"),
        "template_name": "confocal",
        "template_version": "2.1",
        "run_kind": "experimental",
        "equipment_id": "CONF_01",
        "project": "PROJ-7",
        "dry_run": "False",
        "extra_inputs": "{}",
        "destination": "/data/CONF_01/PROJ-7/Run_2026-05-04T14-32-05",
    }


async def test_a_plugin_sees_a_clean_environment_and_homes_of_its_own(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_SECRET", "hunter2")
    source = doing(
        """
        import os, sys, tempfile
        from pathlib import Path
        (Path.home() / "x").write_text("x")
        (Path.home() / "x").rename("moved.txt")
        with tempfile.NamedTemporaryFile() as file:
            seen = {"cwd": os.getcwd(), "tmp": file.name, "env": dict(os.environ), "argv": sys.stdin.read()}
        seen["fds"] = [fd for fd in range(3, 256) if is_open(fd)]
        Path("a.txt").write_text(json.dumps(seen))
        """,
        before="""
            import json, os
            def is_open(fd):
                try:
                    os.fstat(fd)
                except OSError:
                    return False
                return True
        """,
    )
    await ran(host, tmp_path, source)
    attempt = tmp_path / "attempt"
    seen = json.loads((attempt / "tree" / "a.txt").read_text())
    assert seen["cwd"] == str(attempt / "tree")
    assert Path(seen["tmp"]).parent == attempt / "scratch" / "tmp"
    assert set(seen["env"]) <= {"PATH", "HOME", "TMPDIR", "LC_ALL", "TZ"}
    assert seen["env"]["HOME"] == str(attempt / "scratch" / "home")
    assert seen["argv"] == ""
    assert len(seen["fds"]) == 1, "only the way back is open"


async def test_programs_shared_modules_and_threads_work(host: Host, tmp_path: Path) -> None:
    (tmp_path / "plugins" / "lab_shared").mkdir(parents=True)
    (tmp_path / "plugins" / "lab_shared" / "__init__.py").write_text("UNIT = 'mm'\n")
    source = doing(
        """
        import lab_shared, multiprocessing, sqlite3, ssl, subprocess, sys, threading
        thread = threading.Thread(target=file_path.write_text, args=(lab_shared.UNIT,))
        thread.start()
        thread.join()
        out = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
        child = multiprocessing.get_context("fork").Process(target=print, args=("child", out.stdout))
        child.start()
        child.join()
        subprocess.run(["sh", "-c", "sort a.txt > b.txt"], check=True)
        """
    )
    outcome = await ran(host, tmp_path, source)
    assert texts(outcome) == ["child 42"]
    assert (tmp_path / "attempt" / "tree" / "b.txt").read_text() == "mm\n"


@pytest.mark.skipif(not GROUND.mounts, reason="shared memory of its own needs namespaces")
async def test_multiprocessing_has_shared_memory_of_its_own(host: Host, tmp_path: Path) -> None:
    source = doing(
        "import multiprocessing\nwith multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, -2]))"
    )
    assert texts(await ran(host, tmp_path, source)) == ["[1, 2]"]


async def test_nothing_of_this_service_is_loaded_but_the_api(host: Host, tmp_path: Path) -> None:
    source = doing("import sys; print([name for name in sys.modules if name.split('.')[0] == 'app'])")
    assert texts(await ran(host, tmp_path, source)) == ["[]"]


async def test_the_smallest_manifest_has_memory_enough_for_work(host: Host, tmp_path: Path) -> None:
    source = doing("import csv, sqlite3, xml.dom.minidom, zipfile\nkept = bytearray(5 << 20)\nprint('done')")
    assert texts(await ran(host, tmp_path, source, memory_mb=32)) == ["done"]


async def test_progress_is_told_at_the_first_file_and_then_four_times_a_second_at_most(
    host: Host, tmp_path: Path
) -> None:
    heard: list[tuple[int, int, str]] = []
    manifest = yard.plugin(tmp_path / "plugins", doing("import time; time.sleep(0.02)"))
    files = {f"{n:02}.txt": "" for n in range(40)}
    outcome = await host.run(
        yard.task(tmp_path, manifest, files), lambda done, total, file: heard.append((done, total, file))
    )
    assert heard[0] == (0, 40, "00.txt")
    assert all(file == f"{done:02}.txt" and total == 40 for done, total, file in heard)
    assert 2 <= len(heard) <= outcome.usage.duration_ms / 250 + 2


async def test_log_lines_keep_their_level_and_what_is_printed_is_logged(host: Host, tmp_path: Path) -> None:
    source = doing(
        """
        import sys
        ctx.log.debug("looked")
        ctx.log.warning("odd", well="A1", volume=2.5)
        ctx.log.error("two\\nlines")
        print("printed", end="")
        sys.stderr.write("\\nand complained\\n")
        """
    )
    outcome = await ran(host, tmp_path, source)
    assert outcome.log[:4] == (
        Line("debug", "looked"),
        Line("warning", "odd well=A1 volume=2.5"),
        Line("error", "two"),
        Line("error", "lines"),
    )
    assert {line.text for line in outcome.log[4:]} == {"printed", "and complained"}


async def test_usage_tells_time_memory_and_the_exit_code(host: Host, tmp_path: Path) -> None:
    outcome = await ran(host, tmp_path, doing("kept = b'x' * (60 << 20)\nimport time; time.sleep(0.2)"))
    assert outcome.usage.exit_code == 0
    assert 200 <= outcome.usage.duration_ms < 5000
    assert 60 <= outcome.usage.peak_memory_mb < 128


SECRET = 'p"ss\\wörd\n2'


@pytest.mark.parametrize(
    "leak",
    [
        "ctx.log.info(key)",
        "ctx.log.info('as JSON: ' + json.dumps({'key': key}))",
        "ctx.log.info(f'{[key]}')",
        "print(key)",
        "raise PluginError(key)",
        "raise ValueError(json.dumps(key))",
        "raise OSError(13, 'x', '/etc/' + key)",
        "raise PluginInputRequired([{'id': 'key', 'hint': key, 'options': [key], key: 1}], 'why ' + key)",
        "raise PluginInputRequired([{'id': 'key', 'hint': json.dumps(key)}], 'why')",
    ],
)
async def test_a_secret_is_in_nothing_that_comes_back(host: Host, tmp_path: Path, leak: str) -> None:
    source = doing(f"key = ctx.extra_inputs['key']\n{leak}", before="import json")
    outcome = await done(
        host, tmp_path, source, answers={"a.txt": {"key": SECRET}}, secrets=("", SECRET, "unused")
    )
    told = str(outcome)
    assert "***" in told
    for piece in ("ss\\", "wörd", "w\\xf6rd", "w\\u00f6rd"):
        assert piece not in told


async def test_of_two_secrets_the_longer_one_is_replaced_first(host: Host, tmp_path: Path) -> None:
    outcome = await ran(host, tmp_path, doing("print('abc abcdef')"), secrets=("abc", "abcdef"))
    assert texts(outcome) == ["*** ***"]


async def test_a_manifest_with_network_may_reach_a_server(host: Host, tmp_path: Path) -> None:
    served = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = served.sockets[0].getsockname()[1]
    source = doing(
        f"import socket; socket.create_connection(('127.0.0.1', {port}), 5).close(); print('through')"
    )
    async with served:
        outcome = await ran(host, tmp_path, source, network=True)
    assert texts(outcome) == ["through"]


async def test_a_full_disk_is_what_stands_in_the_way_not_the_plugins_fault(
    host: Host, tmp_path: Path
) -> None:
    with pytest.raises(OSError) as raised:
        await done(host, tmp_path, doing("raise OSError(28, 'full', 'a.txt')"))
    assert raised.value.errno == 28


async def test_a_tree_that_is_not_there_is_an_error(host: Host, tmp_path: Path) -> None:
    manifest = yard.plugin(tmp_path / "plugins", doing("pass"))
    task = yard.task(tmp_path, manifest, {})
    with pytest.raises(FileNotFoundError):
        await host.run(task, unheard)


async def test_validating_collects_the_complaints(host: Host, tmp_path: Path) -> None:
    yard.package(tmp_path / "hello", WIZARDS)
    manifest = yard.manifest(tmp_path / "hello")
    assert await host.validate(manifest, {"operator": "Ada"}, tmp_path / "one") == ()
    assert await host.validate(manifest, {"operator": ""}, tmp_path / "two") == (
        "required variable 'operator' is missing or empty",
    )


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ("def validate_variables(self, variables):\n    raise PluginError('no lens')", "no lens"),
        ("def validate_variables(self, variables):\n    return 7", "list of texts"),
        ("def validate_variables(self, variables):\n    while True: pass", "1 seconds"),
        ("def validate_variables(self, variables):\n    import os; os._exit(4)", "exit code 4"),
        ("def __init__(self):\n    raise RuntimeError('not today')", "not today"),
        ("version = '2.0'", "2.0"),
    ],
)
async def test_what_goes_wrong_in_validating_is_no_complaint(
    host: Host, tmp_path: Path, more: str, word: str
) -> None:
    manifest = yard.plugin(tmp_path / "plugins", doing("pass", more=more), timeout_seconds=1)
    broken = await host.validate(manifest, {}, tmp_path / "aside")
    assert isinstance(broken, Broken)
    assert word in broken.message


async def test_validating_works_in_the_folder_that_it_is_given(host: Host, tmp_path: Path) -> None:
    more = "def validate_variables(self, variables):\n    open('x', 'w')\n    return []"
    manifest = yard.plugin(tmp_path / "plugins", doing("pass", more=more))
    assert await host.validate(manifest, {}, tmp_path / "aside") == ()
    assert (tmp_path / "aside" / "tree" / "x").is_file()


async def test_another_interpreter_brings_its_own_packages(tmp_path: Path) -> None:
    venv.create(tmp_path / "lab", with_pip=False, symlinks=True)
    python = tmp_path / "lab" / "bin" / "python"
    packages = next((tmp_path / "lab" / "lib").glob("python*/site-packages"))
    (packages / "labtools.py").write_text("SCALE = 3")
    (packages / "app").mkdir()
    (packages / "app" / "__init__.py").write_text("OWN = True")
    source = doing("import app, labtools, sys\nprint(labtools.SCALE, app.OWN, sys.prefix)\nimport msgspec")
    host = Host(lambda: python, 1)
    outcome = await done(host, tmp_path, source)
    await host.close()
    assert isinstance(outcome, Broken)
    assert outcome.message == "ModuleNotFoundError: No module named 'msgspec'"
    assert f"3 True {tmp_path / 'lab'}" in texts(outcome)


async def test_a_changed_interpreter_counts_at_once(tmp_path: Path) -> None:
    chosen = [Path(sys.executable)]
    host = Host(lambda: chosen[0], 1)
    await host.start()
    await ran(host, tmp_path / "1", doing("pass"))
    chosen[0] = tmp_path / "python"
    chosen[0].symlink_to(sys.executable)
    outcome = await ran(host, tmp_path / "2", doing("import sys; print(sys.executable)"))
    await host.close()
    assert texts(outcome) == [str(tmp_path / "python")]


async def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    host = Host(lambda: tmp_path / "no-python", 1)
    with pytest.raises(Unavailable, match="no-python cannot be started: No such file"):
        await done(host, tmp_path, doing("pass"))
    await host.close()


async def test_a_file_that_is_no_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "python").write_bytes(b"\x7fELF, but no more")
    (tmp_path / "python").chmod(0o755)
    host = Host(lambda: tmp_path / "python", 1)
    with pytest.raises(Unavailable, match="python cannot be started: Exec format error"):
        await done(host, tmp_path, doing("pass"))
    await host.close()


async def test_a_program_that_is_no_python_says_what_it_had_to_say(tmp_path: Path) -> None:
    wrong = tmp_path / "python"
    wrong.write_text("#!/bin/sh\necho 'Python 3.11 or newer is needed, this is 3.8' >&2\nexit 1\n")
    wrong.chmod(0o755)
    host = Host(lambda: wrong, 1)
    with pytest.raises(Unavailable, match=r"cannot run plugins: Python 3\.11 or newer is needed"):
        await done(host, tmp_path, doing("pass"))
    await host.close()


async def test_a_worker_that_died_while_it_waited_is_replaced(host: Host, tmp_path: Path) -> None:
    before = offspring()
    await host.start()
    await until(lambda: offspring() - before)
    for pid in offspring() - before:
        os.kill(pid, signal.SIGKILL)
    await ran(host, tmp_path, doing("pass"))


async def test_each_run_has_a_process_of_its_own(host: Host, tmp_path: Path) -> None:
    source = doing("import sys; print(hasattr(sys, 'been_here')); sys.been_here = True")
    assert texts(await ran(host, tmp_path / "1", source)) == ["False"]
    assert texts(await ran(host, tmp_path / "2", source)) == ["False"]


STUBBORN = """
    import os, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(256):
                try:
                    os.close(fd)
                except OSError:
                    pass
            while True:
                if os.fork() == 0:
                    time.sleep(0.5)
                    os._exit(0)
                try:
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                except ChildProcessError:
                    pass
                time.sleep(0.05)
        os._exit(0)
    open("here", "w").close()
    while True:
        time.sleep(1000)
"""


async def test_cancelling_ends_all_of_a_stubborn_plugin_within_two_seconds(
    host: Host, tmp_path: Path
) -> None:
    before = offspring()
    manifest = yard.plugin(tmp_path / "plugins", doing(STUBBORN))
    task = yard.task(tmp_path / "attempt", manifest)
    run = asyncio.create_task(host.run(task, unheard))
    await until((task.tree / "here").exists)
    await until(lambda: len(offspring() - before) >= 4)
    family = offspring() - before
    loop = asyncio.get_running_loop()
    started = loop.time()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert loop.time() - started < 2
    assert not [pid for pid in family if running(pid)]


async def test_cancelling_while_a_plugin_waits_for_its_turn_leaves_the_other_alone(
    host: Host, tmp_path: Path
) -> None:
    manifest = yard.plugin(tmp_path / "plugins", doing("import time; open('here', 'w'); time.sleep(0.5)"))
    first = yard.task(tmp_path / "1", manifest)
    running_one = asyncio.create_task(host.run(first, unheard))
    await until((first.tree / "here").exists)
    waiting = asyncio.create_task(host.run(yard.task(tmp_path / "2", manifest), unheard))
    await until((tmp_path / "2" / "scratch" / "tmp").exists)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert isinstance(await running_one, Ran)


async def test_closing_while_workers_get_warm_leaves_no_process() -> None:
    before = offspring()
    host = Host(lambda: None, 2)
    await host.start()
    await until(lambda: offspring() - before)
    await host.close()
    await until(lambda: not offspring() - before)


SERVICE = """
    import asyncio, sys
    from pathlib import Path
    from app.steps.plugins.host import Host
    from tests import plugin_yard as yard

    async def main():
        folder = Path(sys.argv[1])
        host = Host(lambda: None, 1)
        task = yard.task(folder / "attempt", yard.manifest(folder / "plugins" / "specimen", timeout_seconds=100))
        await host.run(task, print)

    asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parent")
async def test_killing_the_service_ends_all_of_a_stubborn_plugin(tmp_path: Path) -> None:
    yard.plugin(tmp_path / "plugins", doing(STUBBORN))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVICE), str(tmp_path)], cwd=Path(__file__).parents[1]
    ) as service:
        try:
            await until((tmp_path / "attempt" / "tree" / "here").exists)
            await until(lambda: len(offspring(service.pid)) >= 4)
            family = offspring(service.pid)
        finally:
            service.kill()
    await until(lambda: not [pid for pid in family if running(pid)])
    await until(lambda: not working_in(tmp_path))


def working_in(folder: Path) -> list[int]:
    """The processes whose working directory is in `folder`: also those that came after one has looked."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


async def test_the_isolation_is_told_once_a_worker_has_tried_it(host: Host) -> None:
    assert set(host.isolation) == {"plugins"}
    await host.start()
    await until(lambda: "files" in host.isolation)
    told = host.isolation
    assert (told["ends_with_the_plugin"] == "process-id namespace") == GROUND.processes
    assert (f"Landlock {confinement.landlock_abi()}" in told["files"]) == bool(confinement.landlock_abi())
    assert ("read-only" in told["files"]) == GROUND.mounts
    assert told["sockets_of_others"].startswith("hidden") == GROUND.mounts


async def test_a_value_that_is_no_unicode_fails_the_plugin_not_the_service(
    host: Host, tmp_path: Path
) -> None:
    outcome = await done(host, tmp_path, doing("pass"), variables={"x": "\ud800"})
    assert isinstance(outcome, Broken)
    assert "Unicode" in outcome.message


async def test_a_worker_that_is_killed_before_it_is_ready_may_start_the_next_time(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    manifest = yard.plugin(tmp_path / "plugins", doing("pass"))
    host = Host(lambda: dying, count=1)
    try:
        with pytest.raises(BlockedOn) as blocked:
            await host.validate(manifest, {}, tmp_path / "aside")
    finally:
        await host.close()
    assert blocked.value.code == "plugin_host_not_started"
