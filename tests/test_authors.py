"""What authors of plugins and templates are told: by `lint`, by `exec`, and by the guide."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from app import cli
from app.demo import laboratory
from tests.service import PATIENCE, ROOT, eventually, template

GUIDE = (ROOT / "docs" / "plugins.md").read_text()
MANIFEST = {"name": "stamp", "version": "1.0", "supported_extensions": [".txt"], "api_version": "1"}
HEAD = "from exlab_sessions.plugins import Plugin as Base, PluginError, PluginInputRequired\n"
HANDLE = "    def can_handle(self, file_path, variables):\n        return True\n"
GOOD = f"""{HEAD}
class Plugin(Base):
{HANDLE}
    def transform(self, file_path, ctx):
        file_path.write_text(file_path.read_text() + "stamped\\n")
"""


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(cli.main, [str(word) for word in words], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def plugin(folder: Path, code: str = GOOD, name: str = "stamp", **changes: object) -> Path:
    """A plugin's folder; JSON is YAML, too."""
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    (made / "manifest.yml").write_text(json.dumps(MANIFEST | changes))
    (made / "__init__.py").write_text(code)
    return made


def transforming(*lines: str) -> str:
    body = "".join(f"        {line}\n" for line in lines)
    return f"{HEAD}\nclass Plugin(Base):\n{HANDLE}\n    def transform(self, file_path, ctx):\n{body}"


def told(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder as a session would have it when plugins come."""
    folder = tmp_path / "notes"
    (folder / ".exlab-wizard").mkdir(parents=True)
    (folder / "sub").mkdir()
    for name in ("README.md", ".exlab-answers.yml", ".exlab-wizard/creation.txt", "a.txt", "sub/b.TXT"):
        (folder / name).write_text(f"this is {name}\n")
    (folder / "image.bin").write_bytes(b"\0\1")
    return folder


class TestLintOfPlugins:
    def test_a_good_plugin_is_fine_and_nothing_is_changed(self, tmp_path: Path) -> None:
        made = plugin(tmp_path)
        before = contents(made)
        result = run("plugins", "lint", made)
        assert (result.exit_code, result.stdout) == (0, f"plugin         {made}\n  ok\n")
        assert contents(made) == before

    def test_several_are_looked_at_each(self, tmp_path: Path) -> None:
        result = run("plugins", "lint", plugin(tmp_path), plugin(tmp_path, name="bad", version=""))
        assert (result.exit_code, result.stdout.count("plugin   "), result.stdout.count("ok\n")) == (1, 2, 1)

    def test_a_path_that_is_no_folder_is_not_found(self, tmp_path: Path) -> None:
        for where in (tmp_path / "nothing", plugin(tmp_path) / "__init__.py"):
            result = run("plugins", "lint", where)
            assert (result.exit_code, result.stdout) == (3, "")
            assert str(where) in result.stderr

    @pytest.mark.parametrize(
        "code",
        [
            f"{HEAD}\nclass Stamp(Base):\n{HANDLE}    def transform(self, *_): ...\nPlugin = Stamp\n",
            f"{HEAD}\nif True:\n    class Plugin(Base):\n        can_handle = transform = print\n",
            "from .code import *\n",
            "from .code import Stamp as Plugin\n",
            "from stamp.code import Stamp as Plugin\n",
            "try:\n    import nothing_here\nexcept ImportError:\n    pass\nfrom .code import Plugin\n",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandsa\nfrom .code import Plugin\n",
        ],
    )
    def test_a_plugin_may_be_written_like_this(self, tmp_path: Path, code: str) -> None:
        made = plugin(tmp_path, code)
        (made / "code.py").write_text(GOOD + "\nStamp = Plugin\n")
        result = run("plugins", "lint", made)
        assert (result.exit_code, result.stdout.endswith("ok\n")) == (0, True), result.stdout

    def test_one_of_exlab_wizard_is_fine(self, tmp_path: Path) -> None:
        code = GOOD.replace("exlab_sessions.plugins", "exlab_wizard.plugins.base")
        made = plugin(tmp_path, "from exlab_wizard.errors import PluginError\n" + code)
        assert run("plugins", "lint", made).exit_code == 0

    @pytest.mark.parametrize(
        ("code", "line", "what"),
        [
            ("", "", "exports no Plugin"),
            ("def Plugin_(): ...\n", "", "exports no Plugin"),
            ("def make():\n    Plugin = 1\n", "", "exports no Plugin"),
            ("from exlab_wizard.plugins import Plugin\n", "", "exports the Plugin that it imports"),
            ("class Plugin\n", ":1", "is no Python: expected ':'"),
            (GOOD + "return 5\n", ":9", "is no Python: 'return' outside function"),
            ("class Plugin:\n    pass\n", "", "The class Plugin has no method can_handle."),
            ("Plugin = 5\n", "", "The package exports no class Plugin."),
            (f"{HEAD}\nclass Plugin(Base):\n{HANDLE}", "", "TypeError: Can't instantiate abstract class"),
            ("1 / 0\n" + GOOD, "", "ZeroDivisionError: division by zero"),
            ("import os\nos._exit(3)\n" + GOOD, "", "ended with exit code 3"),
            ("import pandsa\n" + GOOD, ":1", "imports pandsa, which is not there"),
            ("def late():\n    from pandsa.io import read\n" + GOOD, ":2", "imports pandsa.io"),
            ("from exlab_wizard.logging import get_logger\n" + GOOD, ":1", "exlab_wizard.logging, which"),
            ("import app.settings\n" + GOOD, ":1", "imports app.settings, which is not for plugins"),
            (GOOD + "\n    name = 'other'\n", ":10", "Plugin.name is 'other', and 'stamp' in manifest.yml"),
            (
                GOOD + "\n    supported_extensions: list[str] = ['.csv']\n",
                ":10",
                "Plugin.supported_extensions is ['.csv'], and ['.txt'] in",
            ),
        ],
    )
    def test_what_is_wrong_with_the_code_is_told(
        self, tmp_path: Path, code: str, line: str, what: str
    ) -> None:
        made = plugin(tmp_path, code)
        result = run("plugins", "lint", made, "--json")
        assert result.exit_code == 1
        errors = [(each["where"], each["what"]) for each in told(result) if each["level"] == "error"]
        assert any(where == f"{made / '__init__.py'}{line}" and what in each for where, each in errors), (
            errors
        )

    def test_what_is_wrong_with_the_manifest_is_told_with_the_code(self, tmp_path: Path) -> None:
        made = plugin(tmp_path, "", api_version="2")
        found = told(run("plugins", "lint", made, "--json"))
        assert [each["where"] for each in found] == [str(made / "manifest.yml"), str(made / "__init__.py")]
        (made / "__init__.py").unlink()
        assert [each["what"] for each in told(run("plugins", "lint", made, "--json"))] == [
            "manifest.yml line 1: api_version: expected \"1\", not '2'"
        ]
        (made / "manifest.yml").write_text(json.dumps(MANIFEST))
        assert [each["what"] for each in told(run("plugins", "lint", made, "--json"))] == [
            "has no __init__.py"
        ]

    def test_every_module_is_read(self, tmp_path: Path) -> None:
        made = plugin(tmp_path)
        (made / "deep").mkdir()
        (made / "deep" / "er.py").write_text("x = (\n")
        result = run("plugins", "lint", made)
        assert result.exit_code == 1 and f"{made / 'deep' / 'er.py'}:1" in result.stdout

    def test_one_that_hangs_while_it_is_loaded_is_told(self, tmp_path: Path) -> None:
        made = plugin(tmp_path, "while True: pass\n" + GOOD, isolation={"timeout_seconds": 1})
        result = run("plugins", "lint", made)
        assert result.exit_code == 1 and "did not end within the 1 seconds" in result.stdout

    def test_no_code_runs_in_this_process(self, tmp_path: Path) -> None:
        code = f"import pathlib\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n" + GOOD
        assert run("plugins", "lint", plugin(tmp_path / "p", code)).exit_code == 1
        assert not (tmp_path / "trace").exists()

    @pytest.mark.parametrize(
        "more",
        [
            "    required_variables = [['a']]\n",
            "    supported_extensions = {[1]: 2}\n",
            f"    version = 0x{'f' * 5000}\n",
            f"if {' + '.join('1' * 900)}:\n    pass\n",
            f"def late():\n    import {'n' * 300}\n",
        ],
    )
    def test_odd_code_is_looked_over_as_any_other(self, tmp_path: Path, more: str) -> None:
        result = run("plugins", "lint", plugin(tmp_path, GOOD + more), "--json")
        assert result.exit_code in (0, 1)
        assert all(each["what"] for each in told(result))

    def test_only_files_are_read_as_code(self, tmp_path: Path) -> None:
        made = plugin(tmp_path)
        os.mkfifo(made / "pipe.py")
        (made / "vendored.py").mkdir()
        result = subprocess.run(
            [sys.executable, "-m", "app.cli", "plugins", "lint", str(made)],
            cwd=ROOT,
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
        assert result.stdout.decode().endswith("ok\n")

    def test_a_missing_package_is_told_beside_an_import_of_main(self, tmp_path: Path) -> None:
        result = run("plugins", "lint", plugin(tmp_path, "import __main__\nimport pandsa\n" + GOOD), "--json")
        assert "imports pandsa, which is not there" in {each["what"] for each in told(result)}

    def test_a_folder_with_the_name_of_a_package_is_a_warning(self, tmp_path: Path) -> None:
        (one,) = told(run("plugins", "lint", plugin(tmp_path, name="msgspec"), "--json"))
        assert (one["level"], one["where"]) == ("warning", str(tmp_path / "msgspec"))
        assert "has the name of a module of" in one["what"]

    def test_variables_that_it_requires_are_made_up(self, tmp_path: Path) -> None:
        assert run("plugins", "lint", plugin(tmp_path, required_variables=["sample"])).exit_code == 0

    def test_what_it_says_of_made_up_variables_is_no_error(self, tmp_path: Path) -> None:
        picky = GOOD + "\n    def validate_variables(self, variables):\n        return ['wells must be 96']\n"
        (one,) = told(run("plugins", "lint", plugin(tmp_path, picky), "--json"))
        assert (one["level"], one["what"]) == ("warning", "says of made-up variables: wells must be 96")

    def test_the_wish_for_the_network_is_a_warning_where_it_is_not_allowed(self, tmp_path: Path) -> None:
        made = plugin(tmp_path, isolation={"network": True})
        result = run("plugins", "lint", made)
        assert result.exit_code == 0 and "plugins.allow_network" in result.stdout
        config = tmp_path / "config.yaml"
        config.write_text("plugins: {allow_network: true}\n")
        assert run("plugins", "lint", made, "--config", config).stdout.endswith("ok\n")

    def test_packages_are_looked_for_where_plugins_run(self, tmp_path: Path) -> None:
        """The base installation, beside the environment of these tests, has no openpyxl."""
        base = Path(sys.base_prefix) / "bin" / "python3"
        asked = [str(base), "-c", "import openpyxl"]
        if not base.exists() or not subprocess.run(asked, capture_output=True, check=False).returncode:
            pytest.skip("needs an interpreter without openpyxl")
        lab = laboratory.build(tmp_path / "lab").parent
        made = lab / "plugins" / "sample_sheet"
        assert run("plugins", "lint", made).exit_code == 0
        config = lab / "config.yaml"
        config.write_text(config.read_text() + f"plugins: {{python: {base}}}\n")
        result = run("plugins", "lint", made, "--config", config, "--json")
        assert result.exit_code == 1
        assert "imports openpyxl, which is not there" in {each["what"] for each in told(result)}


class TestLintOfTemplates:
    @pytest.fixture
    def lab(self, tmp_path: Path) -> Path:
        return laboratory.build(tmp_path / "lab").parent

    def lint(self, lab: Path, files: dict[str, str], *words: str | Path, **manifest: object) -> Result:
        template(lab, "tried", files, **manifest)
        return run("templates", "lint", lab / "templates" / "tried", "--json", *words)

    def test_those_of_the_demo_are_fine(self, lab: Path) -> None:
        places = sorted((lab / "templates").iterdir())
        result = run("templates", "lint", *places, "--config", lab / "config.yaml", "--json")
        assert result.exit_code == 0
        assert {each["level"] for each in told(result)} <= {"note"}

    def test_one_with_defaults_is_rendered_and_left_as_it_is(self, lab: Path) -> None:
        result = self.lint(lab, {"a.txt.jinja": "{{ label }} {{ wells }}"}, wells=96)
        assert (result.exit_code, result.stdout) == (0, "")
        assert set(contents(lab / "templates" / "tried")) == {"copier.yml", "a.txt.jinja"}

    @pytest.mark.parametrize(
        ("files", "manifest", "place", "what"),
        [
            ({}, {"_exlab_version": ""}, "", "_exlab_version is missing or no text"),
            ({}, {"_jinja_extensions": ["os.system"]}, "", "would run code of the template"),
            ({"a.txt.jinja": "1\n{% if %}\n"}, {}, "/a.txt.jinja:2", "is no Jinja: "),
            ({"sub/a.jinja": "{{ label"}, {}, "/sub/a.jinja:1", "is no Jinja: "),
            ({"{% if x %}a.txt": ""}, {}, "/{% if x %}a.txt:1", "is no Jinja: "),
            ({}, {"ask": {"type": "str", "default": "{{ oh"}}, ": the question ask:1", "is no Jinja: "),
            ({"a.jinja": "[[ oh"}, {"_envops": {"variable_start_string": "[["}}, "/a.jinja:1", "is no Jinja"),
            ({"a.jinja": "{{ nothing.of.this }}"}, {}, "", "'nothing' is undefined"),
            ({"a.jinja": "{{ 1 | no_filter }}"}, {}, "", "no_filter"),
            ({"a.jinja": "{{ ''.__class__.__mro__ }}"}, {}, "", "unsafe"),
        ],
    )
    def test_what_is_wrong_is_told(
        self, lab: Path, files: dict[str, str], manifest: dict[str, object], place: str, what: str
    ) -> None:
        result = self.lint(lab, files, **manifest)
        assert result.exit_code == 1
        errors = [each for each in told(result) if each["level"] == "error"]
        assert [each["where"] for each in errors] == [f"{lab / 'templates' / 'tried'}{place}"]
        assert what in errors[0]["what"]

    def test_a_rendered_file_that_is_no_text_is_told(self, lab: Path) -> None:
        template(lab, "tried", {})
        (lab / "templates/tried/a.jinja").write_bytes(b"\xff\xfe")
        result = run("templates", "lint", lab / "templates/tried")
        assert result.exit_code == 1 and "is no UTF-8 text" in result.stdout

    def test_what_is_rendered_is_checked(self, lab: Path) -> None:
        result = self.lint(lab, {"a.txt.jinja": "x\n<sample>"})
        (one,) = told(result)
        assert (result.exit_code, one["level"]) == (0, "warning")
        assert one["where"].endswith("tried: as rendered, a.txt:2")

    def test_one_that_asks_is_not_rendered_and_says_so(self, lab: Path) -> None:
        result = self.lint(lab, {"a.txt.jinja": "{{ nothing.of.this }}"}, sample={"type": "str"})
        (one,) = told(result)
        assert (result.exit_code, one["level"]) == (0, "note")
        assert "no default for sample" in one["what"]

    def test_plugins_that_are_not_there_and_tasks_are_warnings(self, lab: Path) -> None:
        given = {"_exlab_plugins": ["sample_sheet", "stamp"], "_tasks": ["rm -rf /"]}
        result = self.lint(lab, {}, "--config", lab / "config.yaml", **given)
        assert result.exit_code == 0
        assert [each["what"].split(",")[0] for each in told(result)] == [
            "has tasks",
            "lists the plugin stamp",
        ]
        assert {each["level"] for each in told(result)} == {"warning"}

    def test_a_path_that_is_no_folder_is_not_found(self, tmp_path: Path) -> None:
        assert run("templates", "lint", tmp_path / "nothing").exit_code == 3


class TestExec:
    def test_it_shows_what_became_of_each_file_and_leaves_the_folder_alone(
        self, tmp_path: Path, notes: Path
    ) -> None:
        code = transforming(
            "if file_path.name == 'a.txt':",
            "    file_path.write_text('other\\n')",
            "    (ctx.dst_root / 'new.csv').write_text('1,2\\n')",
            "    (ctx.dst_root / 'image.bin').write_bytes(b'\\0\\2\\3')",
            "else:",
            "    file_path.unlink()",
            "ctx.log.warning('seen', file=file_path.name)",
            "print('hello')",
        )
        before = contents(notes)
        result = run("plugins", "exec", plugin(tmp_path, code), "--against", notes)
        assert result.exit_code == 0, result.output
        assert contents(notes) == before
        lines = result.stdout.splitlines()
        start = lines.index("changed a.txt")
        assert lines[start + 1 : start + 6] == [
            "--- before/a.txt",
            "+++ after/a.txt",
            "@@ -1 +1 @@",
            "-this is a.txt",
            "+other",
        ]
        assert "added new.csv" in lines and "+1,2" in lines
        assert "removed sub/b.TXT" in lines and "-this is sub/b.TXT" in lines
        start = lines.index("changed image.bin")
        assert lines[start + 1].startswith("before: 2 bytes, sha256 ")
        assert lines[start + 2].startswith("after: 3 bytes, sha256 ")
        assert "  warning        seen file=a.txt" in lines and "  info           hello" in lines
        assert "  status         success" in lines
        assert re.fullmatch(r"  took           \d+\.\d\d s, \d+ MB at the most", lines[-1])

    def test_programs_get_one_object(self, tmp_path: Path, notes: Path) -> None:
        made = plugin(tmp_path)
        result = run("plugins", "exec", made, "--against", notes, "--json")
        (told_,) = told(result)
        assert (told_["plugin"], told_["version"], told_["status"]) == ("stamp", "1.0", "success")
        assert told_["files"] == ["a.txt", "sub/b.TXT"]
        assert [(each["kind"], each["path"]) for each in told_["changes"]] == [
            ("changed", "a.txt"),
            ("changed", "sub/b.TXT"),
        ]
        assert told_["usage"].keys() == {"duration_ms", "exit_code", "peak_memory_mb"}

    def test_the_copy_is_kept_where_that_is_asked_for(self, tmp_path: Path, notes: Path) -> None:
        keep = tmp_path / "kept"
        made = plugin(tmp_path)
        assert run("plugins", "exec", made, "--against", notes, "--keep", keep).exit_code == 0
        assert contents(keep).keys() == contents(notes).keys()
        assert (keep / "a.txt").read_text() == "this is a.txt\nstamped\n"
        again = run("plugins", "exec", made, "--against", notes, "--keep", keep)
        assert (again.exit_code, "is not empty" in again.stderr) == (2, True)

    def test_what_a_cheating_plugin_left_is_kept_too(self, tmp_path: Path, notes: Path) -> None:
        code = transforming(
            "import os", "os.path.exists('pipe') or os.mkfifo('pipe')", "file_path.write_text('x')"
        )
        keep = tmp_path / "kept"
        result = run("plugins", "exec", plugin(tmp_path, code), "--against", notes, "--keep", keep)
        assert result.exit_code == 1 and "policy_violation" in result.stdout
        assert (keep / "a.txt").read_text() == "x" and not (keep / "pipe").exists()

    def test_a_plugin_is_found_by_its_name_in_the_config(self, tmp_path: Path, notes: Path) -> None:
        plugin(tmp_path / "plugins", name="any_folder")
        config = tmp_path / "config.yaml"
        config.write_text("paths: {plugin_dir: plugins}\n")
        assert run("plugins", "exec", "stamp", "--against", notes, "--config", config).exit_code == 0
        missing = run("plugins", "exec", "other", "--against", notes, "--config", config)
        assert (missing.exit_code, "no plugin in the plugin folder" in missing.stderr) == (3, True)

    def test_what_cannot_be_run_is_refused(self, tmp_path: Path, notes: Path) -> None:
        broken = run("plugins", "exec", plugin(tmp_path, version=""), "--against", notes)
        assert (broken.exit_code, "version" in broken.stderr) == (1, True)
        lost = run("plugins", "exec", plugin(tmp_path), "--against", tmp_path / "nothing")
        assert (lost.exit_code, "is no folder" in lost.stderr) == (3, True)
        assert run("plugins", "exec", plugin(tmp_path)).exit_code == 2
        assert run("plugins", "exec", plugin(tmp_path), "--against", notes, "--input", "x").exit_code == 2

    def test_an_interpreter_that_cannot_be_started_is_told(self, tmp_path: Path, notes: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("plugins: {python: nothing}\n")
        result = run("plugins", "exec", plugin(tmp_path), "--against", notes, "--config", config)
        assert result.exit_code == 1
        assert f"{tmp_path / 'nothing'} cannot be started" in result.stderr

    def test_variables_are_given_and_validated(self, tmp_path: Path, notes: Path) -> None:
        code = transforming("file_path.write_text(f'{ctx.variables!r} {ctx.project}\\n')")
        made = plugin(tmp_path, code, required_variables=["sample"])
        refused = run("plugins", "exec", made, "--against", notes)
        assert refused.exit_code == 1
        assert "it needs the variable sample" in refused.stdout
        given = ("--variable", "sample=7", "--variable", "project_short_id=PROJ-9")
        result = run("plugins", "exec", made, "--against", notes, *given)
        assert result.exit_code == 0
        assert "+{'sample': 7, 'project_short_id': 'PROJ-9'} PROJ-9" in result.stdout.splitlines()

    def test_what_it_says_of_the_variables_fails_it(self, tmp_path: Path, notes: Path) -> None:
        picky = GOOD + "\n    def validate_variables(self, variables):\n        return ['wells must be 96']\n"
        (one,) = told(run("plugins", "exec", plugin(tmp_path, picky), "--against", notes, "--json"))
        assert (one["status"], one["message"], one["usage"]) == ("failed", "wells must be 96", None)

    def test_without_a_file_for_it_a_plugin_is_skipped(self, tmp_path: Path, notes: Path) -> None:
        made = plugin(tmp_path, supported_extensions=[".md", ".yml"])
        (one,) = told(run("plugins", "exec", made, "--against", notes, "--json"))
        assert (one["status"], one["files"], one["changes"]) == ("skipped", [], [])

    def test_a_dry_run_describes_and_changes_nothing(self, tmp_path: Path, notes: Path) -> None:
        made = plugin(tmp_path, GOOD + "\n    name = 'stamp'\n")
        result = run("plugins", "exec", made, "--against", notes, "--dry-run", "--json")
        (one,) = told(result)
        assert (result.exit_code, one["changes"]) == (0, [])
        assert [(each["path"], each["kind"]) for each in one["described"]] == [
            ("a.txt", "modify"),
            ("sub/b.TXT", "modify"),
        ]
        people = run("plugins", "exec", made, "--against", notes, "--dry-run").stdout
        assert "would modify a.txt" in people

    @pytest.mark.parametrize(
        ("line", "status", "message"),
        [
            ("raise PluginError('no such plate')", "failed", "no such plate"),
            ("raise ValueError('oh')", "failed", "ValueError: oh"),
            ("import os; os._exit(7)", "failed", "ended with exit code 7"),
            ("while True: pass", "timeout", "did not end within the 1 seconds"),
            ("(ctx.dst_root / 'README.md').write_text('mine')", "policy_violation", "README.md"),
            ("ctx.answers_file.unlink()", "policy_violation", ".exlab-answers.yml"),
            ("(ctx.dst_root / 'out').symlink_to('/etc/passwd')", "policy_violation", "points out of"),
            ("import os; os.mkfifo(ctx.dst_root / 'pipe')", "policy_violation", "neither a file"),
            ("raise PluginInputRequired([{'id': 1}], 'x')", "failed", "fields that cannot be shown"),
            (
                "raise PluginInputRequired([{'id': 'a', 'label': 'A', 'pattern': '('}], 'x')",
                "failed",
                "fields that cannot be shown",
            ),
            (
                "raise PluginInputRequired([{'id': 'a', 'label': 'A'}] * 2, 'x')",
                "failed",
                "two fields of one id",
            ),
        ],
    )
    def test_a_plugin_that_fails_hangs_or_cheats_is_told_as_a_session_would(
        self, tmp_path: Path, notes: Path, line: str, status: str, message: str
    ) -> None:
        (notes / "sub/b.TXT").unlink()
        made = plugin(tmp_path, transforming(line), isolation={"timeout_seconds": 1})
        before = contents(notes)
        result = run("plugins", "exec", made, "--against", notes, "--json")
        (one,) = told(result)
        assert (result.exit_code, one["status"]) == (1, status), one
        assert message in one["message"]
        assert contents(notes) == before


ASKING = transforming(
    "known = ctx.extra_inputs",
    "if 'dose' not in known:",
    "    dose = {'id': 'dose', 'label': 'Dose in mg', 'type': 'number', 'min': 1, 'hint': 'as on the box'}",
    "    raise PluginInputRequired([dose], 'No dose is known.')",
    "if known['dose'] > 10 and 'reason' not in known:",
    "    raise PluginInputRequired([{'id': 'reason', 'label': 'Reason'}], 'That is much.')",
    "file_path.write_text(f'{sorted(known.items())}\\n')",
)


class TestExecOfWhatAsks:
    def test_inputs_answer_once_for_each_file(self, tmp_path: Path, notes: Path) -> None:
        inputs = ("--input", "dose=12.5", "--input", "reason=a big one")
        result = run("plugins", "exec", plugin(tmp_path, ASKING), "--against", notes, *inputs)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("+[('dose', 12.5), ('reason', 'a big one')]") == 2
        assert result.stderr.count("No dose is known.") == 2
        assert "hint: as on the box" in result.stderr

    def test_without_an_input_and_a_terminal_the_field_is_named(self, tmp_path: Path, notes: Path) -> None:
        made = plugin(tmp_path, ASKING)
        for inputs, name in (((), "dose"), (("--input", "dose=20"), "reason")):
            result = run("plugins", "exec", made, "--against", notes, *inputs)
            assert (result.exit_code, result.stdout) == (1, "")
            assert f"a value is required ({name}) [input_invalid]" in result.stderr

    @pytest.mark.parametrize(("given", "why"), [("0.5", "at least 1"), ("much", "expected a number")])
    def test_an_input_that_does_not_fit_is_refused(
        self, tmp_path: Path, notes: Path, given: str, why: str
    ) -> None:
        made = plugin(tmp_path, ASKING)
        result = run("plugins", "exec", made, "--against", notes, "--input", f"dose={given}")
        assert result.exit_code == 1 and why in result.stderr

    def test_a_default_is_taken_where_nobody_can_be_asked(self, tmp_path: Path, notes: Path) -> None:
        code = transforming(
            "if not ctx.extra_inputs:",
            "    fields = [{'id': 'a', 'label': 'A', 'default': 'usual'},",
            "              {'id': 'b', 'label': 'B', 'required': False}]",
            "    raise PluginInputRequired(fields, 'x')",
            "file_path.write_text(f'{ctx.extra_inputs}\\n')",
        )
        result = run("plugins", "exec", plugin(tmp_path, code), "--against", notes)
        assert result.exit_code == 0
        assert "+{'a': 'usual'}" in result.stdout

    def test_one_that_asks_the_same_for_ever_is_stopped(self, tmp_path: Path, notes: Path) -> None:
        code = transforming("raise PluginInputRequired([{'id': 'a', 'label': 'A', 'default': 'b'}], 'x')")
        result = run("plugins", "exec", plugin(tmp_path, code), "--against", notes)
        assert result.exit_code == 1 and "asks again for what it was told" in result.stdout

    def test_a_secret_is_shown_nowhere(self, tmp_path: Path, notes: Path) -> None:
        code = transforming(
            "if 'pin' not in ctx.extra_inputs:",
            "    raise PluginInputRequired([{'id': 'pin', 'label': 'PIN', 'secret': True}], 'x')",
            "ctx.log.info('the pin is ' + ctx.extra_inputs['pin'])",
            "raise PluginError('wrong: ' + ctx.extra_inputs['pin'])",
        )
        result = run("plugins", "exec", plugin(tmp_path, code), "--against", notes, "--input", "pin=hush-98")
        assert result.exit_code == 1
        assert "hush-98" not in result.output
        assert "the pin is ***" in result.stdout and "wrong: ***" in result.stdout

    def test_a_terminal_is_asked_until_the_answer_fits(self, tmp_path: Path, notes: Path) -> None:
        (notes / "sub/b.TXT").unlink()
        code = ASKING.replace("'label': 'Reason'", "'label': 'Reason', 'secret': True")
        terminal, end = pty.openpty()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "app.cli", "plugins", "exec", str(plugin(tmp_path, code))),
                *("--against", str(notes)),
            ],
            cwd=ROOT,
            stdin=end,
            stdout=subprocess.PIPE,
            stderr=end,
            start_new_session=True,
        )
        os.close(end)
        seen = ""
        try:
            for question, answer in (
                ("Dose in mg", "0"),
                ("at least 1", ""),
                ("Dose in mg", "11"),
                ("Reason:", "hush-98"),
            ):
                seen = _until(terminal, seen, question)
                if answer:
                    os.write(terminal, f"{answer}\n".encode())
            assert process.stdout is not None
            printed = process.stdout.read().decode()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait(PATIENCE)
            os.close(terminal)
        assert "+[('dose', 11), ('reason', 'hush-98')]" in printed


def _until(terminal: int, seen: str, words: str) -> str:
    """Read on until `words` come; returns what came after them."""

    def look() -> bool:
        nonlocal seen
        seen += os.read(terminal, 4096).decode()
        return words in seen

    if words not in seen:
        eventually(look)
    assert "hush-98" not in seen
    return seen.partition(words)[2]


class TestTheGuide:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """What a reader has made who followed the guide."""
        for name, text in re.findall(
            r"^```(?:yaml|python)\n# (\S+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL
        ):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"# {name}\n{text}")
        for folder, name, text in (
            ("example", "notes.txt", "Thaw the samples first.\n"),
            ("plates", "plate_1.csv", "well,volume\nA1,20\nA2,20\n"),
        ):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_its_commands_print_what_it_says(self, folder: Path) -> None:
        blocks = re.findall(r"^```console\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
        commands = [part for block in blocks for part in block.split("$ exlab-sessions ")[1:]]
        assert len(commands) == 4
        for each in commands:
            words, _, printed = each.partition("\n")
            assert _comparable(run(*words.split()).output) == _comparable(printed), words

    def test_the_demo_that_it_leads_to_is_there(self, tmp_path: Path) -> None:
        lab = laboratory.build(tmp_path / "exlab-demo").parent
        named = set(re.findall(r"exlab-demo/([\w/.]+\w)", GUIDE))
        assert len(named) == 3
        assert {name for name in named if not (lab / name).exists()} == set()

    def test_its_plugins_pass_the_lint(self, folder: Path) -> None:
        found = sorted(path.parent.name for path in folder.glob("*/manifest.yml"))
        assert found == ["broken", "doses", "stamp"]
        assert run("plugins", "lint", "doses", "stamp").exit_code == 0

    def test_each_plate_has_a_drug_of_its_own(self, folder: Path) -> None:
        shutil.copy("plates/plate_1.csv", "plates/plate_2.csv")
        shutil.copy("plates/plate_1.csv", "plates/other.csv")
        result = run("plugins", "exec", "doses", "--against", "plates", "--input", "drug=placebo", "--json")
        changes = {each["path"]: each["text"] for each in told(result)[0]["changes"]}
        assert changes.keys() == {"plate_1.csv", "plate_2.csv"}
        assert all("+A1,20,placebo,5,none" in text for text in changes.values())

    def test_every_key_method_and_status_is_in_it(self) -> None:
        from app.sessions.prompts import PromptField
        from app.steps.plugins.registry import Manifest
        from exlab_sessions import plugins as api

        limits = {"timeout_seconds", "memory_mb", "network"}
        names = {field for field in Manifest.__struct_fields__ if field != "folder"}
        words = {f"isolation.{name}" if name in limits else name for name in names}
        words |= {*PromptField.__struct_fields__}
        words |= {name for name in vars(api.Plugin) if callable(getattr(api.Plugin, name)) and name[0] != "_"}
        words |= {*api.PluginContext.__dataclass_fields__}
        words |= {"success", "skipped", "failed", "timeout", "policy_violation"}
        assert {word for word in words if not re.search(rf"`{word}[`(]", GUIDE)} == set()


def _comparable(text: str) -> str:
    text = re.sub(r"took .*", "took", text)
    return " ".join(re.sub(r"where \S*python\S* finds", "where python finds", text).split())


def test_every_command_for_authors_and_its_options_are_described() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for group in ("plugins", "templates"):
        found = cli.main.commands[group]
        assert isinstance(found, click.Group)
        for name, command in found.commands.items():
            assert f"## `{group} {name}" in text
            section = text.partition(f"## `{group} {name}")[2].partition("\n## ")[0]
            for option in (each for parameter in command.params for each in parameter.opts):
                if option.startswith("--") and option not in ("--config", "--json"):
                    assert f"`{option}" in section, f"{group} {name} {option}"
