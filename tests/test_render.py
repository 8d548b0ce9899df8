"""Rendering: real templates, real worker processes."""

import asyncio
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from app.errors import Failure, blocked_by
from app.settings import Service
from app.steps.render import Job, Rendered, Renderer
from tests.offspring import offspring, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWERS_FILE = "{{ _copier_conf.answers_file }}.jinja"
ANSWERS = "{{ _copier_answers|to_nice_yaml }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

# Copier goes through a folder in the order of the disk, but makes these three one after the other.
THREE = "{% yield n from range(3) %}{{ n }}{% endyield %}.txt.jinja"
LONG = "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}the end"


def after_the_first(content: str) -> str:
    return "{% if n %}" + content + "{% endif %}"


def renderer_with(folder: Path, **changes: float) -> Renderer:
    return Renderer(Service(state_dir=folder, database_url="sqlite://", **changes))  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def renderer(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Renderer]:
    renderer = renderer_with(tmp_path_factory.mktemp("state"))
    await renderer.start()
    yield renderer
    await renderer.close()


class Place:
    """A template and where it is rendered to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.template = root / "staging" / "template"
        self.tree = root / "staging" / "attempt" / "tree"
        self.template.mkdir(parents=True)
        self.tree.mkdir(parents=True)
        self.source = root / "templates" / "confocal"
        self.destination = root / "data" / "SCOPE_1" / "PROJ-7"

    def write(self, files: dict[str, str | bytes]) -> "Place":
        for name, content in files.items():
            path = self.template / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self

    def job(self, **answers: object) -> Job:
        return Job(
            template=self.template,
            source=self.source,
            tree=self.tree,
            destination=self.destination,
            answers=answers,
        )

    def result(self) -> dict[str, str]:
        """Every file of the tree and its text."""
        files = (path for path in self.tree.rglob("*") if path.is_file())
        return {path.relative_to(self.tree).as_posix(): path.read_text() for path in files}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def silent(current: int, total: int, file: str) -> None:
    """A listener who does not care."""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


async def rendered(renderer: Renderer, job: Job) -> Rendered:
    outcome = await renderer.render(job, silent)
    assert isinstance(outcome, Rendered), outcome
    return outcome


async def refused(renderer: Renderer, job: Job) -> Failure:
    outcome = await renderer.render(job, silent)
    assert isinstance(outcome, Failure), outcome
    assert outcome.code == "render_failed"
    return outcome


async def test_files_are_rendered_or_copied_and_those_that_jinja_wrote_are_named(
    renderer: Renderer, place: Place
) -> None:
    place.write(
        {
            "copier.yml": "sample: none\n",
            "README.md.jinja": "# {{ label }}: {{ sample }}\n",
            "{{ sample }}/notes.txt.jinja": "by {{ operator }}\n",
            "plain.txt": "{{ not touched }}\n",
        }
    )
    outcome = await rendered(renderer, place.job(sample="HeLa", label="Day 1", operator="ada"))
    assert sorted(outcome.files) == ["HeLa/notes.txt", "README.md"]
    assert place.result() == {
        "README.md": "# Day 1: HeLa\n",
        "HeLa/notes.txt": "by ada\n",
        "plain.txt": "{{ not touched }}\n",
    }


async def test_defaults_answer_what_was_not_asked_and_secrets_stay_out_of_the_answers_file(
    renderer: Renderer, place: Place
) -> None:
    place.write(
        {
            "copier.yml": (
                "lens: {type: str, default: '{{ label }} 63x'}\n"
                "token: {type: str, secret: true, default: ''}\n"
                "_secret_questions: [pin]\npin: ''\n"
            ),
            ANSWERS_FILE: ANSWERS,
        }
    )
    await rendered(renderer, place.job(label="oil", token="hunter2", pin="1234"))
    answers = yaml.safe_load(place.result()[".copier-answers.yml"])
    assert answers == {"_src_path": str(place.source), "lens": "oil 63x"}


async def test_nothing_in_the_tree_tells_where_it_was_built(renderer: Renderer, place: Place) -> None:
    everything = "\n".join(
        (
            *("{{ _copier_conf|to_json }}", "{{ _copier_answers|to_json }}", "{{ _folder_name }}"),
            *("{{ _copier_conf.src_path }}", "{{ _copier_conf.dst_path }}", "{{ _src_path }}", "{{ self }}"),
            *("{{ '.'|relpath }}", "{{ '~'|expanduser }}", "{{ '$PWD'|expandvars }}", "{{ _copier_conf }}"),
        )
    )
    place.write({"copier.yml": "", "all.txt.jinja": everything, ANSWERS_FILE: ANSWERS})
    await rendered(renderer, place.job())
    text = "\n".join(place.result().values())
    assert "staging" not in text
    assert str(place.source) in text
    assert str(place.destination) in text
    assert place.destination.name in place.result()["all.txt"].splitlines()


async def test_config_keys_of_copier_hold(renderer: Renderer, place: Place) -> None:
    place.write(
        {
            "copier.yml": (
                "_subdirectory: '{{ part }}'\n_templates_suffix: .tmpl\n_exclude: ['*.bak']\n"
                "_envops: {variable_start_string: '[[', variable_end_string: ']]'}\npart: x\n"
            ).replace("{{ part }}", "[[ part ]]"),
            "inner/a.txt.tmpl": "[[ part ]] {{ part }}",
            "inner/b.txt.jinja": "[[ part ]]",
            "inner/c.bak": "",
            "outer.txt": "",
        }
    )
    outcome = await rendered(renderer, place.job(part="inner"))
    assert outcome.files == ("a.txt",)
    assert place.result() == {"a.txt": "inner {{ part }}", "b.txt.jinja": "[[ part ]]"}


async def test_tasks_and_migrations_never_run(renderer: Renderer, place: Place) -> None:
    witness = place.root / "witness"
    place.write(
        {
            "copier.yml": f"_tasks: ['touch {witness}']\n_migrations: ['touch {witness}']\n",
            "a.txt": "",
        }
    )
    await rendered(renderer, place.job())
    assert not witness.exists()


async def test_external_data_is_read_from_the_tree_alone(renderer: Renderer, place: Place) -> None:
    (place.root / "secret.yml").write_text("key: hunter2")
    place.write(
        {
            "copier.yml": "_external_data: {other: ../../../secret.yml}\n",
            "a.txt.jinja": "{{ _external_data.other.key }}",
        }
    )
    failure = await refused(renderer, place.job())
    assert "forbidden" in failure.message
    assert not any("hunter2" in text for text in place.result().values())


async def test_weird_file_names_survive(renderer: Renderer, place: Place) -> None:
    names = [
        "-rf",
        "with space",
        "quote'\"s",
        "line\nbreak",
        "ümläut",
        "u\u0308",
        "日本",
        "🔬",
        "a" * 200,
        ";&|$(x)",
    ]
    place.write({"copier.yml": "", **{f"{name}.txt.jinja": "x" for name in names}})
    outcome = await rendered(renderer, place.job())
    assert sorted(outcome.files) == sorted(f"{name}.txt" for name in names)
    assert set(place.result()) == set(outcome.files)


async def test_a_file_name_that_is_no_unicode_is_refused(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": ""})
    Path(os.fsdecode(os.fsencode(place.template) + b"/caf\xe9.txt")).write_text("x")
    failure = await refused(renderer, place.job())
    assert "'caf\\udce9.txt' is not valid Unicode" in failure.message


async def test_modes_of_files_are_those_of_the_template(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "", "run.sh.jinja": "", "private.txt": ""})
    (place.template / "run.sh.jinja").chmod(0o755)
    (place.template / "private.txt").chmod(0o640)
    await rendered(renderer, place.job())
    assert stat.S_IMODE((place.tree / "run.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((place.tree / "private.txt").stat().st_mode) == 0o640


async def test_folders_are_made_with_the_umask_of_the_service(tmp_path: Path, place: Place) -> None:
    place.write({"copier.yml": "", "folder/a.txt": ""})
    before = os.umask(0o027)
    try:
        renderer = renderer_with(tmp_path, render_workers=1)
        await rendered(renderer, place.job())
        await renderer.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((place.tree / "folder").stat().st_mode) == 0o750


async def test_rights_that_the_folder_hands_down_by_an_acl_are_not_cut_off(
    renderer: Renderer, place: Place
) -> None:
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, who)
        for tag, rights, who in (
            *((0x01, 7, 0xFFFFFFFF), (0x04, 7, 0xFFFFFFFF), (0x08, 7, 1234)),
            *((0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)),
        )
    )
    try:
        os.setxattr(place.tree, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"the temporary folder takes no ACL: {error}")
    place.write({"copier.yml": "", "folder/data.csv": "", "run.sh": ""})
    (place.template / "folder/data.csv").chmod(0o600)
    (place.template / "run.sh").chmod(0o755)
    await rendered(renderer, place.job())
    assert stat.S_IMODE((place.tree / "folder/data.csv").stat().st_mode) == 0o660
    assert stat.S_IMODE((place.tree / "run.sh").stat().st_mode) == 0o770
    assert set(os.listdir(place.tree)) == {"folder", "run.sh"}


async def test_progress_is_told_with_what_there_is_to_do(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "", "a.txt": "", "b/c.txt.jinja": LONG, "d.txt": ""})
    told: list[tuple[int, int, str]] = []
    await renderer.render(place.job(), lambda *progress: told.append(progress))
    assert told[0][:2] == (1, 4)
    assert 1 <= len(told) <= 3
    assert {file for _, _, file in told} <= {"a.txt", "b/c.txt", "d.txt"}


async def test_warnings_of_copier_are_in_the_log(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "_min_copier_version: '8.0'\n", "a.txt": ""})
    for _ in range(2):
        outcome = await rendered(renderer, place.job())
        assert any("was designed for Copier 8.0" in line for line in outcome.log)


async def test_a_template_inside_a_repository_is_taken_as_it_lies(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "", "a.txt": "committed", ANSWERS_FILE: ANSWERS})
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "x"), ("tag", "v1")):
        git = ("git", "-C", str(place.template), "-c", "user.name=a", "-c", "user.email=a@b")
        run(*git, *command)
    place.write({"a.txt": "changed since"})
    place.source = place.source.with_name("repository.git")
    await rendered(renderer, place.job())
    assert place.result()["a.txt"] == "changed since"
    assert yaml.safe_load(place.result()[".copier-answers.yml"]) == {"_src_path": str(place.source)}


@pytest.mark.parametrize("value", ["../../escaped", "/tmp/escaped-from-render", "a/../../../escaped"])
async def test_a_value_in_a_file_name_does_not_lead_out_of_the_tree(
    renderer: Renderer, place: Place, value: str
) -> None:
    place.write({"copier.yml": "name: x\n", "{{ name }}.txt.jinja": "x"})
    await refused(renderer, place.job(name=value))
    assert not list(place.root.rglob("escaped*"))
    assert not Path("/tmp/escaped-from-render.txt").exists()


async def test_a_value_with_slashes_in_a_file_name_makes_folders_inside_the_tree(
    renderer: Renderer, place: Place
) -> None:
    place.write({"copier.yml": "name: x\n", "{{ name }}.txt.jinja": "x"})
    outcome = await rendered(renderer, place.job(name="a/b/c"))
    assert outcome.files == ("a/b/c.txt",)


@pytest.mark.parametrize("preserved", ["true", "false"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret.yml", "folder/../../../../secret.yml"])
async def test_a_link_that_leads_out_is_refused(
    renderer: Renderer, place: Place, preserved: str, target: str
) -> None:
    (place.root / "secret.yml").write_text("hunter2")
    place.write({"copier.yml": f"_preserve_symlinks: {preserved}\n", "folder/a.txt": ""})
    (place.template / "link").symlink_to(target)
    failure = await refused(renderer, place.job())
    assert "link" in failure.message


async def test_a_link_inside_the_tree_is_kept(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "_preserve_symlinks: true\n", "folder/a.txt": "x"})
    (place.template / "folder/up").symlink_to("../folder/a.txt")
    await rendered(renderer, place.job())
    assert os.readlink(place.tree / "folder/up") == "../folder/a.txt"


async def test_an_absolute_link_is_refused_even_into_the_tree(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "_preserve_symlinks: true\n", "a.txt": "x"})
    (place.template / "link").symlink_to(place.tree / "a.txt")
    failure = await refused(renderer, place.job())
    assert str(place.destination) in failure.message
    assert "staging" not in failure.message


async def test_jinja_extensions_are_not_loaded(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "_jinja_extensions: [antigravity.Extension]\n", "a.txt": ""})
    failure = await refused(renderer, place.job())
    assert "Jinja extensions" in failure.message


async def test_a_template_for_a_newer_copier_says_so(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "_min_copier_version: '99.1'\n", "a.txt": ""})
    failure = await refused(renderer, place.job())
    assert "99.1" in failure.message


async def test_filters_that_look_at_the_machine_are_gone(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "", "a.txt.jinja": "{{ '/*'|fileglob }}"})
    failure = await refused(renderer, place.job())
    assert "fileglob" in failure.message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo {{ 1 / 0 }}\n", "notes.txt.jinja, line 2: ZeroDivisionError: division by zero"),
        ("one\ntwo\n{% if %}", "notes.txt.jinja, line 3: "),
        ("{{ absent.child }}", "notes.txt.jinja, line 1: 'absent' is undefined"),
        ("{% include 'nowhere.txt' %}", "notes.txt.jinja, line 1: "),
        ("{{ ''.__class__.__mro__ }}", "notes.txt.jinja, line 1: "),
    ],
)
async def test_a_mistake_in_a_template_is_told_with_file_and_line(
    renderer: Renderer, place: Place, content: str, expected: str
) -> None:
    place.write({"copier.yml": "", "notes.txt.jinja": content})
    failure = await refused(renderer, place.job())
    assert failure.message.startswith(expected)


async def test_a_question_without_answer_and_default_is_named(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "lens: {type: str}\n", "a.txt": ""})
    failure = await refused(renderer, place.job())
    assert failure.message == 'Question "lens" is required'


async def test_an_answer_cannot_take_a_name_of_copier(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "", "a.txt": ""})
    failure = await refused(renderer, place.job(_src_path="/somewhere/else"))
    assert failure.field == "variables._src_path"


async def test_a_broken_copier_yml_is_a_failure(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "a: [1, 2\n", "a.txt": ""})
    await refused(renderer, place.job())


async def test_files_that_are_too_large_together_are_refused(tmp_path: Path, place: Place) -> None:
    renderer = renderer_with(tmp_path, render_workers=1, render_file_mb=1)
    place.write({"copier.yml": "", **{f"{number}.bin": b"x" * 1_000_000 for number in range(6)}})
    failure = await refused(renderer, place.job())
    assert "too large together" in failure.message
    assert len(place.result()) == 5
    await renderer.close()


async def test_an_endless_template_is_ended_by_the_time_limit(tmp_path: Path, place: Place) -> None:
    before = offspring()
    renderer = renderer_with(tmp_path, render_workers=1, render_timeout_seconds=0.5)
    place.write({"copier.yml": "", "a.txt.jinja": ENDLESS})
    failure = await refused(renderer, place.job())
    assert "0.5 seconds" in failure.message
    await renderer.close()
    assert not offspring() - before


async def test_a_string_of_200_mb_meets_the_memory_limit(tmp_path: Path, place: Place) -> None:
    renderer = renderer_with(tmp_path, render_workers=1, render_memory_mb=256)
    place.write({"copier.yml": "", "a.txt.jinja": "{% for n in range(2) %}{{ 'x' * 100000000 }}{% endfor %}"})
    failure = await refused(renderer, place.job())
    assert failure.message == "The template needs more than 256 MB of memory."
    await renderer.close()


async def test_a_large_file_meets_the_file_limit(tmp_path: Path, place: Place) -> None:
    renderer = renderer_with(tmp_path, render_workers=1, render_file_mb=1)
    place.write({"copier.yml": "", "a.txt.jinja": "{{ 'x' * 2000000 }}"})
    failure = await refused(renderer, place.job())
    assert failure.message == "The template writes a file of more than 1 MB."
    assert (place.tree / "a.txt").stat().st_size <= 1024 * 1024
    await renderer.close()


async def test_a_render_that_failed_leaves_a_worker_that_renders(renderer: Renderer, place: Place) -> None:
    place.write({"copier.yml": "", "a.txt.jinja": "{{ absent.child }}"})
    await refused(renderer, place.job())
    place.write({"a.txt.jinja": "good"})
    await rendered(renderer, place.job())
    assert place.result() == {"a.txt": "good"}


async def test_cancelling_a_render_goes_on_when_its_processes_are_gone(tmp_path: Path, place: Place) -> None:
    before = offspring()
    renderer = renderer_with(tmp_path, render_workers=1)
    place.write({"copier.yml": "", THREE: after_the_first(ENDLESS)})
    under_way = asyncio.Event()
    task = asyncio.create_task(renderer.render(place.job(), lambda *_: under_way.set()))
    async with asyncio.timeout(30):
        await under_way.wait()
    processes = offspring() - before
    assert len(processes) == 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(running(pid) for pid in processes)
    await renderer.close()
    assert not offspring() - before


async def test_cancelling_a_render_that_waits_for_a_worker_costs_no_slot(
    tmp_path: Path, place: Place
) -> None:
    renderer = renderer_with(tmp_path, render_workers=1)
    place.write({"copier.yml": "", "a.txt": ""})
    waiting = [asyncio.create_task(renderer.render(place.job(), silent)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await rendered(renderer, place.job())
    await renderer.close()


def killer(before: set[int], times: int, which: Callable[[set[int]], set[int]]) -> Callable[..., None]:
    """A listener that kills render processes, as many times as told."""
    left = [times]

    def listen(*_: object) -> None:
        if left[0]:
            left[0] -= 1
            for pid in sorted(which(offspring() - before), reverse=True):  # forks first, while they live
                os.kill(pid, signal.SIGKILL)

    return listen


def everyone(pids: set[int]) -> set[int]:
    return pids


def only_forks(pids: set[int]) -> set[int]:
    return {pid for pid in pids if offspring(pid) == set()}


@pytest.mark.parametrize("which", [everyone, only_forks])
async def test_a_render_that_was_killed_from_outside_is_done_again_from_scratch(
    tmp_path: Path, place: Place, which: Callable[[set[int]], set[int]]
) -> None:
    before = offspring()
    renderer = renderer_with(tmp_path, render_workers=1)
    never_the_same = THREE.replace("{{ n }}", "{{ n }}-{{ range(99999)|random }}")
    place.write({"copier.yml": "", never_the_same: after_the_first(LONG)})
    outcome = await renderer.render(place.job(), killer(before, 1, which))
    assert isinstance(outcome, Rendered)
    assert len(place.result()) == 3
    await renderer.close()


async def test_a_render_that_is_killed_again_and_again_fails(tmp_path: Path, place: Place) -> None:
    before = offspring()
    renderer = renderer_with(tmp_path, render_workers=1)
    place.write({"copier.yml": "", THREE: after_the_first(LONG)})
    outcome = await renderer.render(place.job(), killer(before, 2, everyone))
    assert isinstance(outcome, Failure)
    assert "broke down" in outcome.message
    await renderer.close()


HOST = """
import asyncio, sys
from pathlib import Path
from app.settings import Service
from app.steps.render import Job, Renderer

async def main(template, tree):
    renderer = Renderer(Service(state_dir=tree, database_url="sqlite://", render_workers=2))
    await renderer.start()
    job = Job(template=template, source=template, tree=tree, destination=tree, answers={})
    await renderer.render(job, lambda *_: print("under way", flush=True))

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


async def test_workers_and_renders_die_with_the_service(place: Place) -> None:
    place.write({"copier.yml": "", THREE: after_the_first(ENDLESS)})
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST, str(place.template), str(place.tree)),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert service.stdout
    try:
        async with asyncio.timeout(30):
            assert await service.stdout.readline() == b"under way\n"
        processes = offspring(service.pid)
    finally:
        service.kill()
        await service.wait()
    assert len(processes) == 3
    await until(lambda: not any(running(pid) for pid in processes), seconds=5)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a tmpfs")
async def test_a_full_disk_leaves_as_an_oserror_that_can_be_waited_for(
    renderer: Renderer, place: Place
) -> None:
    place.write({"copier.yml": "", "a.bin": b"x" * 2_000_000})
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place.tree))
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            await renderer.render(place.job(), silent)
        assert caught.value.errno == errno.ENOSPC
        assert blocked_by(caught.value)
    finally:
        run("umount", str(place.tree))


async def test_many_renders_at_once_are_all_right(renderer: Renderer, tmp_path: Path) -> None:
    places = [Place(tmp_path / str(number)) for number in range(32)]
    for number, place in enumerate(places):
        place.write({"copier.yml": "n: 0\n", "{{ n }}.txt.jinja": "{{ n }} {{ label }}", f"only{number}": ""})
    jobs = [place.job(n=number, label=f"L{number}") for number, place in enumerate(places)]
    outcomes = await asyncio.gather(*(renderer.render(job, silent) for job in jobs))
    for number, (place, outcome) in enumerate(zip(places, outcomes, strict=True)):
        assert isinstance(outcome, Rendered)
        assert outcome.files == (f"{number}.txt",)
        assert place.result() == {f"{number}.txt": f"{number} L{number}", f"only{number}": ""}


async def test_isolation_tells_the_limits_that_hold(renderer: Renderer) -> None:
    told = renderer.isolation
    assert {"memory", "file_size", "cpu", "files", "network", "ends_with_the_service"} <= told.keys()
    if sys.platform == "linux":
        assert told["memory"] == "1024 MB"
