"""The files of others that the package carries are the ones that were looked at, and stand on their own."""

import hashlib
import re
from pathlib import Path

import pytest

from app import web

FOLDER = Path(web.__file__).parent / "vendor" / "swagger-ui"
SUMS = {name: digest for digest, name in map(str.split, (FOLDER / "SHA256SUMS").read_text().splitlines())}


@pytest.mark.parametrize("name", sorted(SUMS))
def test_a_vendored_file_is_as_it_was_taken(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == SUMS[name]


def test_every_vendored_file_has_a_sum() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SUMS, "SHA256SUMS", "VENDORED.md"}


def test_the_licenses_come_along() -> None:
    assert "Apache License" in (FOLDER / "LICENSE").read_text()
    assert "SmartBear" in (FOLDER / "NOTICE").read_text()


def test_the_version_is_told() -> None:
    assert re.match(r"# swagger-ui-dist \d+\.\d+\.\d+\n", (FOLDER / "VENDORED.md").read_text())


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui-standalone-preset.js"])
def test_no_script_names_a_cdn(name: str) -> None:
    assert not re.search(r"unpkg|jsdelivr|cdnjs|googleapis", (FOLDER / name).read_text(encoding="utf-8"))


def test_the_style_sheet_loads_nothing() -> None:
    text = (FOLDER / "swagger-ui.css").read_text(encoding="utf-8")
    assert not re.search(r"""@import|url\((?!["']?data:)""", text)
