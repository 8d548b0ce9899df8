"""Imports point one way, and each big dependency stays behind its own doors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FOUNDATION = ("errors", "disk", "settings", "reading", "yamltext", "database", "connections", "telemetry")
LAYERS = (FOUNDATION, ("steps",), ("sessions",), ("web",), ("main", "checkup", "authors"), ("cli",))
"""From the ground up; what stands in one layer may import from it and from those below."""

ASIDE: dict[str, tuple[str, ...]] = {"client": ("errors",), "demo": (), "display": ()}
"""Parts beside the layers, and all that they may import; only the command line imports them."""

DOORS = {
    "litestar": ("app.main", "app.web"),
    "uvicorn": ("app.main", "app.web.connection"),
    "sqlalchemy": (
        "app.connections",
        "app.database",
        "app.sessions.moves",
        "app.sessions.store",
        "migrations",
    ),
    "alembic": ("app.database", "migrations"),
    "re2": ("app.sessions.prompts",),
    "copier": ("app.steps.render",),
}
"""Which modules alone may import a dependency."""


def violations(root: Path) -> list[str]:
    """What the code below `root` imports against the rules, one line each."""
    return [
        f"{module}:{line}: {name}: {why}"
        for path in sorted((*root.glob("app/**/*.py"), *root.glob("migrations/**/*.py")))
        for module in [_module(path.relative_to(root))]
        for name, line in _imports(ast.parse(path.read_bytes(), filename=str(path)))
        if (why := _against(module, name))
    ]


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every import, wherever it stands, also those for the type checker; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)


def _against(module: str, name: str) -> str | None:
    top, *rest = name.split(".")
    if not top:
        return "is relative; name the module in full"
    if top in DOORS and not any(_is_in(module, door) for door in DOORS[top]):
        return f"belongs in {', '.join(DOORS[top])}"
    if top == "app" and module.startswith("app"):
        return _against_the_layers(module.split(".")[1], rest[0])
    return None


def _is_in(module: str, door: str) -> bool:
    return module == door or module.startswith(f"{door}.")


def _against_the_layers(importer: str, imported: str) -> str | None:
    if importer == imported:
        return None
    if importer in ASIDE:
        return None if imported in ASIDE[importer] else f"{importer} does not import {imported}"
    if imported in ASIDE:
        return None if importer == "cli" else f"only cli imports {imported}"
    height = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    for part in (importer, imported):
        if part not in height:
            return f"{part} has no place in the layers"
    return None if height[imported] <= height[importer] else f"{importer} stands below {imported}"


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_the_rules_name_modules_that_exist() -> None:
    named = {f"app.{part}" for part in (*(part for layer in LAYERS for part in layer), *ASIDE)}
    named |= {door for doors in DOORS.values() for door in doors}
    places = {name: ROOT.joinpath(*name.split(".")) for name in named}
    assert {
        name for name, path in places.items() if not path.is_dir() and not path.with_suffix(".py").is_file()
    } == set()


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("app/steps/gate.py", "from app.sessions import store"),
        ("app/steps/gate.py", "from app.sessions.store import Store"),
        ("app/steps/gate.py", "import app.sessions.store"),
        ("app/steps/gate.py", "from app import sessions"),
        ("app/steps/gate.py", "def late():\n    from app.web import guard"),
        ("app/steps/gate.py", "if TYPE_CHECKING:\n    from app.sessions.store import Store"),
        ("app/steps/gate.py", "from ..sessions import store"),
        ("app/steps/gate.py", "from . import check"),
        ("app/steps/gate.py", "import sqlalchemy as sa"),
        ("app/steps/gate.py", "from sqlalchemy.engine import Engine"),
        ("app/steps/plugins/host.py", "import copier"),
        ("app/sessions/feed.py", "from litestar import get"),
        ("app/sessions/feed.py", "from sqlalchemy import text"),
        ("app/sessions/feed.py", "from app.web.guard import Guard"),
        ("app/sessions/storehouse.py", "import sqlalchemy"),
        ("app/settings.py", "from app.steps import check"),
        ("app/web/sessions.py", "from app.main import create_app"),
        ("app/web/sessions.py", "from app.client import Client"),
        ("app/web/sessions.py", "import uvicorn"),
        ("app/main.py", "from app import cli"),
        ("app/client.py", "from app.settings import load"),
        ("app/demo/laboratory.py", "from app import settings"),
        ("app/services.py", "from app import errors"),
        ("app/web/sessions.py", "from app.utils import helper"),
        ("migrations/versions/0001.py", "import litestar"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    _plant(tmp_path, file, line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("app/cli.py", "from app import client, main\nfrom app.demo import laboratory"),
        (
            "app/main.py",
            "import litestar, uvicorn\nfrom app.web import guard\nfrom app.sessions.store import Store",
        ),
        (
            "app/web/sessions.py",
            "from litestar import get\nfrom app.sessions import store\nfrom app.steps import gate",
        ),
        ("app/sessions/store.py", "import sqlalchemy\nfrom app.database import metadata"),
        ("app/steps/render.py", "def main():\n    from copier import run_copy"),
        (
            "app/steps/gate.py",
            "from app.settings import Settings\nfrom app.steps import templates\nimport os.path",
        ),
        ("app/settings.py", "from app import yamltext\nfrom app.errors import Failure"),
        ("app/client.py", "from app.errors import Failure"),
        ("migrations/env.py", "import sqlalchemy\nfrom alembic import op\nfrom app.database import metadata"),
        ("app/web/litestar_like.py", "import copierlike"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path: Path, file: str, line: str) -> None:
    _plant(tmp_path, file, line)
    assert violations(tmp_path) == []


def _plant(root: Path, file: str, line: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
