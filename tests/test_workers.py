"""Worker processes: what they see, what they may do, and that they go when they must."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.errors import ShuttingDown
from app.steps import confinement
from app.steps.workers import NotStarted, Workers
from tests.offspring import offspring, running, until

MODULE = "tests.unruly_worker"
LONG = 60.0

LANDLOCK = confinement.described(confinement.Limits(memory_mb=1, file_mb=1, cpu_seconds=1))["files"]


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    workers = Workers(MODULE, 1)
    yield workers
    await workers.close()


async def told(workers: Workers, task: str) -> bytes:
    heard: list[bytes] = []
    async with workers.one() as worker:
        await worker.work(task.encode(), heard.append, LONG)
    return heard[0]


async def multiplied(workers: Workers) -> tuple[asyncio.Task[bytes], list[int]]:
    """A task that runs for ever, and the processes that belong to it."""
    heard: list[bytes] = []

    async def work() -> bytes:
        async with workers.one() as worker:
            await worker.work(b"multiply", heard.append, LONG)
        return b""

    task = asyncio.create_task(work())
    await until(lambda: heard)
    return task, json.loads(heard[0])


async def test_a_worker_sees_nothing_of_the_services_environment(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_SECRET", "hunter2")
    seen = json.loads(await told(workers, "environment"))
    assert "LAB_SECRET" not in seen["environment"]
    assert seen["environment"]["HOME"] == seen["environment"]["PATH"] == os.devnull
    assert seen["cwd"] == "/"


async def test_printing_a_lot_and_reading_input_disturbs_nothing_and_only_the_end_is_kept(
    workers: Workers,
) -> None:
    async with workers.one() as worker:
        heard: list[bytes] = []
        assert await worker.work(b"print 5000000", heard.append, LONG) == 0
        assert heard == [b"printed"]
        await until(lambda: worker.process.output.endswith("the end"))
        assert len(worker.process.output) < 20_000


async def test_a_task_that_takes_too_long_is_given_up_and_its_processes_end(workers: Workers) -> None:
    heard: list[bytes] = []
    with pytest.raises(TimeoutError):
        async with workers.one() as worker:
            await worker.work(b"multiply", heard.append, 0.5)
    assert not any(running(pid) for pid in json.loads(heard[0]))


async def test_what_was_done_in_time_is_heard_by_one_who_stood_still_until_the_time_was_over(
    workers: Workers,
) -> None:
    heard: list[bytes] = []
    async with workers.one() as worker:
        working = asyncio.create_task(worker.work(b"environment", heard.append, 1.0))
        await asyncio.sleep(0)
        time.sleep(3.0)
        assert await working == 0
    assert heard


async def test_cancelling_ends_everything_that_a_worker_started_before_it_goes_on(workers: Workers) -> None:
    task, pids = await multiplied(workers)
    assert all(running(pid) for pid in pids)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(running(pid) for pid in pids)


async def test_a_second_cancellation_does_not_hurry_the_first(workers: Workers) -> None:
    task, pids = await multiplied(workers)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(running(pid) for pid in pids)


async def test_the_exit_code_of_a_task_that_broke_down_is_told_and_the_worker_stays(workers: Workers) -> None:
    async with workers.one() as worker:
        assert await worker.work(b"exit 3", print, LONG) == 3
        assert await worker.work(b"environment", print, LONG) == 0


async def test_a_worker_that_was_killed_while_idle_is_replaced(workers: Workers) -> None:
    async with workers.one() as worker:
        first = worker.process
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: not first.alive)
    async with workers.one() as worker:
        assert worker.process.pid != first.pid
        assert await worker.work(b"environment", print, LONG) == 0


async def test_a_module_that_cannot_start_says_why() -> None:
    workers = Workers("tests.no_such_worker", 1)
    with pytest.raises(NotStarted, match="no_such_worker"):
        await told(workers, "environment")
    await workers.close()


async def test_warming_workers_that_cannot_start_leaves_the_reason_to_the_task_that_needs_one() -> None:
    workers = Workers("tests.no_such_worker", 2)
    workers.warm()
    for _ in range(3):
        with pytest.raises(NotStarted, match="no_such_worker"):
            await told(workers, "environment")
    await workers.close()


async def test_closing_while_workers_get_warm_leaves_no_process() -> None:
    before = offspring()
    workers = Workers(MODULE, 2)
    workers.warm()
    await until(lambda: offspring() - before)
    await workers.close()
    assert not offspring() - before


async def test_closed_workers_take_no_task() -> None:
    workers = Workers(MODULE, 1)
    await workers.close()
    with pytest.raises(ShuttingDown):
        await told(workers, "environment")


@pytest.mark.skipif(not LANDLOCK.startswith("Landlock"), reason="this machine has no Landlock")
async def test_a_confined_task_reaches_its_folder_and_nothing_else(workers: Workers, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    outcomes = json.loads(await told(workers, f"trespass {allowed}"))
    assert outcomes.pop("write inside") == "possible"
    assert set(outcomes.values()) == {"PermissionError"}, outcomes


async def test_more_tasks_than_workers_are_kept_warm_start_their_own_and_do_not_wait() -> None:
    before, workers = offspring(), Workers(MODULE, 3, warm=1)
    workers.warm()
    try:
        async with workers.one() as one, workers.one() as two, workers.one() as three:
            pids = {one.process.pid, two.process.pid, three.process.pid}
        assert len(pids) == 3
        await until(lambda: len(offspring() - before) == 1)
        async with workers.one() as again:
            assert again.process.pid in pids
    finally:
        await workers.close()
    await until(lambda: not offspring() - before)
