"""The demo laboratory: it can be used at once, its examples lead to good folders, and it keeps what is changed."""

import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from openpyxl import Workbook, load_workbook

from app import settings
from app.demo import laboratory
from app.sessions.prompts import PromptField
from app.steps import check, gate, templates
from app.steps.plugins import registry
from app.steps.plugins.host import Asked, Broken, Context, Host, Ran, Task
from app.steps.plugins.registry import Manifest
from app.steps.render import Job, Rendered, Renderer
from app.steps.templates import Template
from tests.service import body, ended, eventually, running

EXAMPLES = ("project", "confocal_run", "plate_reader_test_run", "stained_run")
SHEET = "sample_sheet.xlsx"
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
        "stained_run": ("run", "both"),
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


def test_every_plugin_that_a_template_of_the_demo_lists_is_there(config: Path) -> None:
    found = registry.catalogue(config.parent / "plugins", allow_network=False)
    assert (found.problems, [plugin.name for plugin in found.plugins]) == ((), ["sample_sheet"])
    listed = {
        template.name: template.plugins
        for template in templates.catalogue([config.parent / "templates"]).templates
        if template.plugins
    }
    assert listed == {"stained_run": ("sample_sheet",)}


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
    assert {"README.md", ".exlab-answers.yml"} <= set(rendered.files)


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


class Trial:
    """The plugin of the demo at work on the rendered tree of its example, as a session would have it."""

    def __init__(self, host: Host, manifest: Manifest, inputs: gate.Inputs, passed: gate.Passed, tree: Path):
        self.host = host
        self.manifest = manifest
        self.tree = tree
        self.context = Context(
            variables=passed.answers,
            answers_file=".exlab-answers.yml",
            template_name="stained_run",
            template_version="1.0",
            run_kind=str(inputs.run_kind),
            equipment_id=inputs.equipment_id,
            project=str(inputs.project_short_id),
            destination=passed.destination,
        )

    async def run(self, answers: dict[str, object] | None = None, **context: bool) -> Ran | Asked | Broken:
        task = Task(
            manifest=self.manifest,
            tree=self.tree,
            scratch=self.tree.parent / "scratch",
            files=self.manifest.offered(registry.files_below(self.tree)),
            context=msgspec.structs.replace(self.context, **context),
            answers={SHEET: answers} if answers else {},
        )
        return await self.host.run(task, lambda *_: None)


def cells(path: Path) -> dict[str, object]:
    """What is in the named cells of a workbook."""
    book = load_workbook(path)
    return {
        name: book[sheet][place.replace("$", "")].value
        for name, defined in book.defined_names.items()
        for sheet, place in defined.destinations
    }


@pytest.fixture
async def trial(config: Path, renderer: Renderer) -> AsyncIterator[Trial]:
    inputs, passed = asked(config, "stained_run")
    tree, _ = await built(renderer, passed)
    manifest = registry.catalogue(config.parent / "plugins", allow_network=False).named("sample_sheet")
    assert manifest is not None
    host = Host(lambda: None, count=1)
    await host.start()
    yield Trial(host, manifest, inputs, passed, tree)
    await host.close()


async def test_the_plugin_asks_for_what_nobody_has_told(trial: Trial) -> None:
    before = contents(trial.tree)
    outcome = await trial.run()
    assert isinstance(outcome, Asked), outcome
    assert (outcome.file, outcome.reason) == (SHEET, f"{SHEET} has cells that only you can fill in.")
    box, power = msgspec.convert(outcome.fields, tuple[PromptField, PromptField])
    assert (box.id, box.type, box.required, box.pattern) == ("slide_box", "string", True, "[A-Z]{2}-[0-9]{4}")
    assert (power.id, power.type, power.min, power.max, power.default) == (
        "laser_power",
        "number",
        0.1,
        100,
        2,
    )
    assert contents(trial.tree) == before


async def test_the_plugin_fills_every_cell_of_the_sheet(trial: Trial) -> None:
    assert set(cells(trial.tree / SHEET).values()) == {None}
    outcome = await trial.run({"slide_box": "SB-0042", "laser_power": 2.5})
    assert isinstance(outcome, Ran), outcome
    assert cells(trial.tree / SHEET) == {
        "run_label": "Slice 12, stained",
        "operator": "asmith",
        "objective": "See whether the staining holds for a day",
        "equipment_id": "CONFOCAL_01",
        "project_short_id": "PROJ-1",
        "run_date": datetime.datetime(2026, 4, 17),  # noqa: DTZ001 - a workbook knows no time zones
        "sample": "cortex slice 12",
        "stain": "GFP",
        "slides": 4,
        "slide_box": "SB-0042",
        "objective_lens": "40x oil",
        "laser_power": 2.5,
    }
    assert [(line.level, line.text) for line in outcome.log] == [("info", f"filled in file={SHEET} cells=12")]


async def test_the_sheet_keeps_its_looks_and_runs_no_formula_of_a_label(trial: Trial) -> None:
    variables = trial.context.variables | {"label": '=HYPERLINK("http://127.0.0.1")'}
    trial.context = msgspec.structs.replace(trial.context, variables=variables)
    assert isinstance(await trial.run({"slide_box": "SB-0042", "laser_power": 1}), Ran)
    (sheet,) = load_workbook(trial.tree / SHEET)
    (label,) = [cell for row in sheet.rows for cell in row if cell.value == variables["label"]]
    assert label.data_type == "s"
    assert sheet["B2"].font.b and sheet.column_dimensions["C"].width == 52


async def test_in_a_dry_run_the_plugin_says_what_it_would_fill_in(trial: Trial) -> None:
    before = contents(trial.tree)
    outcome = await trial.run(dry_run=True)
    assert isinstance(outcome, Ran), outcome
    (change,) = outcome.described
    assert (change["path"], change["kind"]) == (SHEET, "modify")
    assert change["summary"] == "fills in 10 cells and asks for slide_box, laser_power"
    assert contents(trial.tree) == before


async def test_the_plugin_passes_over_other_workbooks_and_gives_up_on_broken_ones(trial: Trial) -> None:
    Workbook().save(trial.tree / SHEET)
    (trial.tree / f"~${SHEET}").write_text("somebody has it open")
    outcome = await trial.run()
    assert isinstance(outcome, Ran), outcome
    assert [(line.level, line.text) for line in outcome.log] == [
        ("warning", f"no cell has a name that is known file={SHEET}")
    ]
    (trial.tree / SHEET).write_text("no workbook")
    outcome = await trial.run()
    assert isinstance(outcome, Broken), outcome
    assert (outcome.status, f"{SHEET} is no workbook that can be read" in outcome.message) == ("failed", True)


def test_the_example_that_asks_leads_to_a_published_sheet(config: Path) -> None:
    with running(config) as service, service.http() as http:
        opened = http.post("/sessions", json=body(config.parent, "stained_run")).json()
        here = f"/sessions/{opened['session_id']}"
        prompt = eventually(lambda: http.get(here).json()["pending_input"])
        assert (prompt["plugin"], prompt["file"]) == ("sample_sheet", SHEET)
        refused = http.post(f"{here}/resume", json={"extra_inputs": {"slide_box": "42"}})
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "slide_box")
        http.post(f"{here}/resume", json={"extra_inputs": {"slide_box": "SB-0042"}}).raise_for_status()
        handle = ended(http, opened["session_id"])
    assert handle["state"] == "done", handle["error"]
    found = cells(Path(handle["result"]["path"]) / SHEET)
    assert (found["slide_box"], found["laser_power"], found["operator"]) == ("SB-0042", 2, "asmith")


async def test_the_plugin_has_no_complaint_about_its_example(trial: Trial, tmp_path: Path) -> None:
    assert await trial.host.validate(trial.manifest, trial.context.variables, tmp_path / "one") == ()
    assert await trial.host.validate(trial.manifest, {}, tmp_path / "two") == (
        "required variable 'sample' is missing or empty",
    )


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
