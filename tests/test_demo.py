"""The demo laboratory: it can be used at once, its examples lead to good folders, and it keeps what is changed."""

import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from app import settings
from app.demo import laboratory
from app.steps import check, gate, templates
from app.steps.render import Job, Rendered, Renderer
from app.steps.templates import Template

EXAMPLES = ("project", "confocal_run", "plate_reader_test_run")
NOW = datetime.datetime(2026, 4, 17, 14, 32, 5, tzinfo=datetime.UTC)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return laboratory.build(tmp_path / "laboratory")


@pytest.fixture
async def renderer(config: Path) -> AsyncIterator[Renderer]:
    renderer = Renderer(settings.load(config).service)
    yield renderer
    await renderer.close()


def asked(config: Path, example: str) -> tuple[gate.Inputs, gate.Passed]:
    body = (config.parent / "examples" / f"{example}.json").read_bytes()
    inputs = msgspec.json.decode(body, type=gate.Inputs)
    session_folder = config.parent / "data" / ".exlab-sessions" / "session"
    found = gate.examine(inputs, settings.load(config), now=NOW, session_folder=session_folder)
    assert isinstance(found, gate.Passed), found
    return inputs, found


async def built(renderer: Renderer, asked_for: gate.Passed) -> tuple[Path, Rendered]:
    template = asked_for.template.path
    tree = template.parent.parent / "tree"
    tree.mkdir()
    job = Job(
        template=template,
        source=template,
        tree=tree,
        destination=asked_for.destination,
        answers=asked_for.answers,
    )
    rendered = await renderer.render(job, lambda *_: None)
    assert isinstance(rendered, Rendered), rendered
    return tree, rendered


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_the_config_of_the_demo_is_ready_and_without_notes(config: Path) -> None:
    found = settings.load(config)
    assert settings.setup_status(found).ready
    assert found.notes == ()
    assert [equipment.id for equipment in found.equipment] == ["CONFOCAL_01", "READER_01"]


def test_everything_of_the_demo_lies_in_its_folder(config: Path) -> None:
    found = settings.load(config)
    for path in (found.paths.templates_dir, found.paths.local_root, found.service.state_dir):
        assert path is not None
        assert path.is_relative_to(config.parent)
    assert str(config.parent) in found.service.database_url


def test_every_template_of_the_demo_loads(config: Path) -> None:
    found = templates.catalogue([config.parent / "templates"])
    assert found.problems == ()
    kinds = {template.name: (template.type, template.run_scope) for template in found.templates}
    assert kinds == {
        "project": ("project", None),
        "confocal_run": ("run", "both"),
        "plate_reader_run": ("run", "both"),
    }


def test_the_templates_ask_questions_with_choices_and_declare_readme_fields(config: Path) -> None:
    for template in templates.catalogue([config.parent / "templates"]).templates:
        assert any(question.choices for question in template.questions)
        assert any(field.required for field in template.readme_fields)


@pytest.mark.parametrize("name", ["project", "confocal_run", "plate_reader_run"])
def test_no_template_of_the_demo_runs_code(config: Path, name: str) -> None:
    template = templates.load(config.parent / "templates" / name)
    assert isinstance(template, Template)
    assert not template.has_tasks
    assert template.plugins == ()


@pytest.mark.parametrize("example", EXAMPLES)
async def test_each_example_becomes_a_folder_without_findings(
    config: Path, renderer: Renderer, example: str
) -> None:
    inputs, found = asked(config, example)
    tree, rendered = await built(renderer, found)
    findings = check.check(
        tree,
        rendered=frozenset(rendered.files),
        staging=tree,
        kind=inputs.kind,
        run_kind=msgspec.convert(inputs.run_kind, check.RunKind | None),
        destination=found.destination,
        rules=settings.Validator(),
    )
    assert findings == ()
    assert {"README.md", ".exlab-answers.yml"} < set(rendered.files)


async def test_the_answers_shape_the_confocal_run(config: Path, renderer: Renderer) -> None:
    _, found = asked(config, "confocal_run")
    tree, _ = await built(renderer, found)
    assert (tree / "acquisition" / "z_stack.yaml").read_text() == "step_um: 0.35\n"
    assert "z-stack, every 0.35 µm" in (tree / "README.md").read_text()


async def test_the_layout_of_the_plate_has_a_line_for_each_well(config: Path, renderer: Renderer) -> None:
    _, found = asked(config, "plate_reader_test_run")
    tree, _ = await built(renderer, found)
    layout = (tree / "layout.csv").read_text().splitlines()
    assert len(layout) == 1 + 96
    assert (layout[0], layout[1], layout[-1]) == ("well,group,content", "A1,1,", "H12,4,")


def test_building_it_again_changes_nothing(config: Path) -> None:
    before = contents(config.parent)
    assert laboratory.build(config.parent) == config
    assert contents(config.parent) == before


def test_what_a_newcomer_changed_stays(config: Path) -> None:
    config.write_text("paths: {}\n")
    (config.parent / "templates" / "project" / "plan.csv.jinja").unlink()
    laboratory.build(config.parent)
    assert config.read_text() == "paths: {}\n"
    assert not (config.parent / "templates" / "project" / "plan.csv.jinja").exists()


def test_what_was_left_half_made_is_made_whole(tmp_path: Path) -> None:
    whole = contents(laboratory.build(tmp_path / "whole").parent)
    half = tmp_path / "half"
    (half / ".templates.partial" / "project").mkdir(parents=True)
    (half / ".templates.partial" / "rubbish").write_text("")
    (half / ".config.yaml.partial").write_text("paths:")
    laboratory.build(half)
    assert contents(half) == whole


def test_a_laboratory_that_was_moved_still_works(config: Path, tmp_path: Path) -> None:
    moved = config.parent.rename(tmp_path / "elsewhere") / "config.yaml"
    assert settings.setup_status(settings.load(moved)).ready
