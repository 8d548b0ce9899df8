"""The documentation names what there is: tables, views, columns, events, error codes; and its queries run."""

import re
import sqlite3
from pathlib import Path

import pytest

from app import database, errors
from app.sessions import events

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def shell(tmp_path: Path) -> sqlite3.Connection:
    path = tmp_path / "sessions.sqlite3"
    database.prepare(path)
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_table_and_view_is_described_column_by_column(shell: sqlite3.Connection) -> None:
    sections = _sections((DOCS / "store.md").read_text())
    rows = shell.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')").fetchall()
    names = [name for (name,) in rows if not name.startswith("sqlite_") and name != "alembic_version"]
    assert len(names) > 10
    for name in names:
        section = next((text for title, text in sections.items() if f"`{name}`" in title), None)
        assert section is not None, f"{name} has no section"
        for (column,) in shell.execute("SELECT name FROM pragma_table_info(?)", (name,)):
            assert re.search(rf"`(?:{name}\.)?{column}`", section), f"{name}.{column} is not described"


def test_the_ten_queries_run_on_the_store(shell: sqlite3.Connection) -> None:
    section = _sections((DOCS / "store.md").read_text())["The ten questions that are asked most"]
    queries = re.findall(r"```sql\n(.+?)```", section, flags=re.DOTALL)
    assert len(queries) == 10
    for query in queries:
        shell.execute(query, {"id": "x", "folder": "y"}).fetchall()


def test_every_event_kind_and_error_code_is_described() -> None:
    text = (DOCS / "http.md").read_text()
    kinds = [str(kind.__struct_config__.tag) for kind in events.Event.__subclasses__()]
    codes = [refusal.code for refusal in errors.Refusal.__subclasses__()]
    for word in (*kinds, *codes):
        assert f"`{word}`" in text, f"{word} is not described in docs/http.md"


def test_every_test_that_the_docs_name_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", (DOCS / "survival.md").read_text())
    assert len(named) > 30
    known = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name in named if not re.search(rf"def {name}\b", known)] == []
