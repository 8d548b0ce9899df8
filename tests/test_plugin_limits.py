"""What a plugin's process does at its end, what it can start, and what is told of its confinement."""

import gzip
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from app.steps import confinement
from app.steps.plugins.host import Broken, Host, Ran
from tests import plugin_yard as yard
from tests.plugin_yard import doing

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def host() -> AsyncIterator[Host]:
    host = Host(lambda: None, 1)
    await host.start()
    yield host
    await host.close()


async def outcome_of(host: Host, folder: Path, source: str) -> tuple[Ran | Broken, Path]:
    task = yard.task(folder / "attempt", yard.plugin(folder / "plugins", source))
    outcome = await host.run(task, lambda *_: None)
    assert isinstance(outcome, Ran | Broken)
    return outcome, task.tree


async def test_files_that_are_left_open_are_written_to_their_end(host: Host, tmp_path: Path) -> None:
    source = doing(
        "import gzip\nself.kept = open('b.txt', 'w'), open('c', 'w+b'), gzip.open('d.gz', 'wt')\n"
        "self.kept[0].write('text')\nself.kept[1].write(b'bytes')\nself.kept[2].write('packed')"
    )
    outcome, tree = await outcome_of(host, tmp_path, source)
    assert isinstance(outcome, Ran), outcome
    assert ((tree / "b.txt").read_text(), (tree / "c").read_bytes()) == ("text", b"bytes")
    assert gzip.decompress((tree / "d.gz").read_bytes()) == b"packed"


async def test_a_file_that_cannot_be_written_to_its_end_fails_the_run(host: Host, tmp_path: Path) -> None:
    source = doing(
        "import os\nself.kept = open('b.txt', 'w')\nself.kept.write('x')\nos.close(self.kept.fileno())"
    )
    outcome, _ = await outcome_of(host, tmp_path, source)
    assert isinstance(outcome, Broken)
    assert "b.txt was left open and cannot be written to its end" in outcome.message


async def test_objects_that_cannot_be_asked_what_they_are_do_no_harm(host: Host, tmp_path: Path) -> None:
    before = "import io\nclass Shy:\n    @property\n    def __class__(self):\n        raise RuntimeError('ask not')\n"
    source = doing(
        "self.shy = Shy()\nself.detached = io.TextIOWrapper(io.BytesIO())\nself.detached.detach()",
        before=before,
    )
    outcome, _ = await outcome_of(host, tmp_path, source)
    assert isinstance(outcome, Ran), outcome


@pytest.mark.parametrize(
    "start",
    [
        "import threading\nthreading.Thread(target=late).start()",
        "import concurrent.futures\nconcurrent.futures.ThreadPoolExecutor().submit(late)",
    ],
)
async def test_threads_and_executors_are_waited_for(host: Host, tmp_path: Path, start: str) -> None:
    late = "def late():\n    import time\n    time.sleep(0.3)\n    open('late', 'w').close()\n"
    outcome, tree = await outcome_of(host, tmp_path, doing(late + start))
    assert isinstance(outcome, Ran), outcome
    assert (tree / "late").exists()


async def test_a_spawned_process_runs_a_function_of_the_plugin(host: Host, tmp_path: Path) -> None:
    """One that needs nothing of the API: an interpreter need not have that."""
    source = """
        import multiprocessing

        def work():
            open("spawned", "w").close()

        class Plugin:
            def can_handle(self, file_path, variables):
                return True

            def transform(self, file_path, ctx):
                process = multiprocessing.get_context("spawn").Process(target=work)
                process.start()
                process.join()
                assert process.exitcode == 0
    """
    outcome, tree = await outcome_of(host, tmp_path, source)
    assert isinstance(outcome, Ran), outcome
    assert (tree / "spawned").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
async def test_what_is_not_protected_without_namespaces_is_told() -> None:
    from app.steps.plugins import worker

    bare, whole = (
        worker.isolation(confinement.Ground(processes=each, users=each, mounts=each))
        for each in (False, True)
    )
    assert "supervisor" in bare["ends_with_the_plugin"] and "SysV" in bare["ends_with_the_plugin"]
    assert whole["ends_with_the_plugin"] == whole["signals"] == "process-id namespace"
    abi = confinement.landlock_abi()
    assert ("prlimit" in bare["signals"]) == (abi >= 6)
    assert ("modes, owners and times" in bare["files"]) == bool(abi)
    assert "modes" not in whole["files"]


async def test_harmless_files_of_the_system_can_be_read(host: Host, tmp_path: Path) -> None:
    source = doing(
        "import os\nfor name in ('hosts', 'timezone', 'gitconfig', 'alternatives'):\n"
        "    place = '/etc/' + name\n    if os.path.isdir(place): os.listdir(place)\n"
        "    elif os.path.exists(place): open(place).read()"
    )
    outcome, _ = await outcome_of(host, tmp_path, source)
    assert isinstance(outcome, Ran), outcome
