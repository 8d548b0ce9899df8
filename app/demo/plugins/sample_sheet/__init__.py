"""Fills in a form that a template brings along: an example to copy.

The form is an Excel workbook in which cells have names (Formulas > Name Manager). A cell whose name is known here
gets its value; one that nobody can know but the operator is asked for. The form may be laid out as people like it:
only the names matter, and a form without a certain cell is not asked about it.

A plugin may run more than once for the same folder. When it has asked, it ends; with the answers it runs again from
the beginning, over the files as they were before. So nothing here is kept from one time to the next, and nothing is
made up that would be another value the next time, such as the time of day.
"""

import datetime
import re
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

from openpyxl import load_workbook
from openpyxl.cell.cell import Cell
from openpyxl.utils.exceptions import IllegalCharacterError, InvalidFileException
from openpyxl.workbook import Workbook

from exlab_sessions import plugins
from exlab_sessions.plugins import FileChange, PluginContext, PluginError, PluginInputRequired

# What is asked for, by the name of the cell. The service shows these fields to the operator, and takes only values
# that fit: the plugin need not check them again.
QUESTIONS: dict[str, dict[str, Any]] = {
    "slide_box": {
        "id": "slide_box",
        "label": "Slide box",
        "type": "string",
        "required": True,
        "pattern": "[A-Z]{2}-[0-9]{4}",
        "hint": "On the lid of the box, as SB-0042",
    },
    "laser_power": {
        "id": "laser_power",
        "label": "Laser power in %",
        "type": "number",
        "required": True,
        "min": 0.1,
        "max": 100,
        "default": 2,
        "hint": "As it is set at the microscope",
    },
}


class Plugin(plugins.Plugin):
    # The same as in manifest.yml: the manifest is what counts, and a difference is refused.
    name = "sample_sheet"
    version = "1.0.0"
    supported_extensions: ClassVar[list[str]] = [".xlsx"]
    api_version = "1"
    required_variables: ClassVar[list[str]] = ["sample"]
    optional_variables: ClassVar[list[str]] = ["stain", "slides", "objective_lens"]

    def can_handle(self, file_path: Path, variables: dict[str, Any]) -> bool:
        # Excel keeps a file of this name beside a workbook that somebody has open.
        return not file_path.name.startswith("~$")

    def transform(self, file_path: Path, ctx: PluginContext) -> None:
        book = _opened(file_path)
        cells = _named_cells(book)
        values = _known(ctx)
        unknown = [QUESTIONS[name] for name in QUESTIONS if name in cells and name not in values]
        if unknown:
            # All that is missing at once: an operator would rather fill in one form than answer three times.
            raise PluginInputRequired(unknown, f"{file_path.name} has cells that only you can fill in.")
        filled = 0
        for name, cell in cells.items():
            if name in values:
                _fill(cell, values[name])
                filled += 1
        if not filled:
            # Not an error: a workbook that is no form may lie in the folder, too.
            ctx.log.warning("no cell has a name that is known", file=file_path.name)
            return
        book.save(file_path)
        ctx.log.info("filled in", file=file_path.name, cells=filled)

    def describe_changes(self, file_path: Path, ctx: PluginContext) -> list[FileChange]:
        # Asked for instead of transform() in a dry run.
        cells = _named_cells(_opened(file_path))
        values = {name: str(value) for name, value in _known(ctx).items() if name in cells}
        asked = [name for name in QUESTIONS if name in cells and name not in values]
        summary = f"fills in {len(values)} cells" + (f" and asks for {', '.join(asked)}" if asked else "")
        return [FileChange(path=file_path, kind="modify", summary=summary, detail={"cells": values})]


def _known(ctx: PluginContext) -> dict[str, object]:
    """What can be written without asking, by the name of the cell.

    `ctx.variables` are the answers of the template with what every session has; `ctx.extra_inputs` are the answers
    of the operator for this very file, empty until something was asked.
    """
    told = {name: ctx.variables.get(name) for name in ("operator", "objective", "sample", "stain", "slides")}
    told |= {
        "run_label": ctx.variables.get("label"),
        "equipment_id": ctx.equipment_id,
        "project_short_id": ctx.project,
        "objective_lens": str(ctx.variables.get("objective_lens") or "").replace("_", " "),
        "run_date": _date_of(ctx.destination),
    }
    told |= {name: ctx.extra_inputs.get(name) for name in QUESTIONS}
    return {name: value for name, value in told.items() if value not in (None, "")}


def _date_of(folder: Path) -> datetime.date | None:
    """The day in the name of the run's folder, as Run_2026-04-17T14-32-05. Not today: see above."""
    found = re.search(r"\d{4}-\d\d-\d\d", folder.name)
    return datetime.date.fromisoformat(found[0]) if found else None


def _opened(file_path: Path) -> Workbook:
    try:
        return load_workbook(file_path)
    except (BadZipFile, InvalidFileException, KeyError, ValueError) as error:
        # What the plugin foresees is told as a PluginError: the operator reads its message. Everything else that is
        # raised fails the plugin as well, with the name of the exception.
        raise PluginError(f"{file_path.name} is no workbook that can be read: {error}") from error


def _named_cells(book: Workbook) -> dict[str, Cell]:
    """Each name of the workbook that stands for one cell."""
    found = {}
    for name, defined in book.defined_names.items():
        for sheet, place in defined.destinations:
            cell = book[sheet][place.replace("$", "")]
            if isinstance(cell, Cell):
                found[name] = cell
    return found


def _fill(cell: Cell, value: object) -> None:
    try:
        cell.value = value  # type: ignore[assignment]
    except IllegalCharacterError as error:
        raise PluginError(f"{value!r} holds characters that a workbook cannot keep") from error
    if isinstance(value, str):
        # A label such as "=1+1" is text, not a formula that Excel runs when somebody opens the sheet.
        cell.data_type = "s"
