"""What `check` finds of plugins: those that cannot be used, those that are missing, the interpreter."""

from pathlib import Path

import pytest

from app import checkup
from app.demo import laboratory
from app.sessions.consistency import Complaint
from app.settings import ConfigFile
from tests.service import template


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return laboratory.build(tmp_path / "lab").parent


def complaints(lab: Path) -> tuple[Complaint, ...]:
    found = {each.name: each for each in checkup.examine(ConfigFile(lab / "config.yaml"))}
    assert found["plugins"].place == str(lab / "plugins")
    return found["plugins"].complaints


def configured(lab: Path, text: str) -> Path:
    config = lab / "config.yaml"
    config.write_text(config.read_text() + text)
    return config


def test_a_good_laboratory_has_no_complaints(lab: Path) -> None:
    assert complaints(lab) == ()


def test_a_plugin_that_cannot_be_used_is_an_error(lab: Path) -> None:
    (lab / "plugins/empty").mkdir()
    (one,) = complaints(lab)
    assert (one.level, one.what, one.where) == ("error", "has no manifest.yml", str(lab / "plugins/empty"))


def test_a_template_that_lists_a_plugin_which_is_not_there_is_a_warning(lab: Path) -> None:
    template(lab, "stamped", {}, _exlab_plugins=["sample_sheet", "stamp"])
    (one,) = complaints(lab)
    assert (one.level, one.where) == ("warning", str(lab / "templates/stamped"))
    assert "stamped" in one.what and "stamp," in one.what


def test_a_network_plugin_is_an_error_until_the_config_allows_it(lab: Path) -> None:
    manifest = lab / "plugins/sample_sheet/manifest.yml"
    manifest.write_text(manifest.read_text().replace("network: false", "network: true"))
    assert {one.level for one in complaints(lab)} == {"error", "warning"}
    configured(lab, "plugins: {allow_network: true}\n")
    assert complaints(lab) == ()


@pytest.mark.parametrize("made", ["", "file", "folder"])
def test_an_interpreter_that_cannot_be_run_is_an_error(lab: Path, made: str) -> None:
    python = lab / "python"
    if made == "file":
        python.touch(0o644)
    elif made == "folder":
        python.mkdir()
    config = configured(lab, "plugins: {python: python}\n")
    (one,) = complaints(lab)
    assert (one.level, one.where) == ("error", str(config))
    assert f"plugins.python is {python}" in one.what


def test_an_interpreter_that_can_be_run_is_no_complaint(lab: Path) -> None:
    python = lab / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    configured(lab, "plugins: {python: python}\n")
    assert complaints(lab) == ()


def test_a_plugin_folder_that_has_gone_is_an_error(lab: Path) -> None:
    (lab / "plugins").rename(lab / "elsewhere")
    levels = [one.level for one in complaints(lab)]
    assert sorted(levels) == ["error", "warning"]
