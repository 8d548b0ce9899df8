"""The config file: what is taken from it, how mistakes are told, how a running service follows it."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import platformdirs
import pytest

from app import settings
from app.errors import ConfigInvalid, ConfigMistake

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"

OF_EXLAB_WIZARD = """
paths:
  templates_dir: "templates"
  plugin_dir: "plugins"
  local_root: "data"
lims:
  endpoint: "https://lims.lab.example/api/v1"
  email: "alex@lab.example"
  cache_ttl_hours: 24
  offline_catalogue_path: ""
readme:
  defaults:
    - id: irb_protocol
      label: "IRB"
      type: string
      required: false
      default: ""
equipment:
  - id: "CONFOCAL_01"
    label: "Confocal 1"
    local_root: "data"
    nas_root: "//nas01/lab"
    completeness_signal: "sentinel_file"
    sentinel_filename: "done.flag"
    transport: &rclone
      type: "rclone"
      rclone_remote: "lab-nas"
      rclone_remote_path: "lab/CONFOCAL_01"
      bandwidth:
        upload_mbps: 50
        schedule:
          - { days: ["mon", "tue"], from: 08:00, to: 18:00 }
  - id: "FLOW_01"
    label: "Flow 1"
    local_root: "data"
    nas_root: "/mnt/nas/lab"
    completeness_signal: "manifest"
    manifest_filename: "run_manifest.json"
    sync_mode: stage
    orchestrator_staging_transport:
      type: smb_mount
nas_cleanup: { enabled: true, min_verify_passes: 2, min_age_hours: 24, retain_cache: true }
logging: { level: "INFO", central_log_max_mb: 10, central_log_keep: 5 }
operators:
  allowlist: []
validator:
  content_scan_max_mib: 7
  content_scan_extensions: [".txt", ".md"]
plugins:
  allow_network: yes
sync: { enabled: true, retry_attempts: 3 }
orchestrator:
  enabled: false
  staging_cleanup: { mode: manual, retain_hours: 24 }
"""

EQUIPMENT = "equipment: [{id: CONFOCAL_01, label: Confocal, local_root: data, nas_root: //nas/lab}]\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name in ("templates", "plugins", "data"):
        (tmp_path / name).mkdir()
    return tmp_path / "config.yaml"


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be a user to whom file permissions apply."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file that looks ten seconds old: one that was just changed is read again anyway."""
    path.write_text(text)
    path.chmod(mode)
    os.utime(path, (time.time() - 10, time.time() - 10))


def read(path: Path, text: str) -> settings.Settings:
    path.write_text(text)
    return settings.load(path)


def mistakes(path: Path, text: str | bytes) -> tuple[ConfigMistake, ...]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigInvalid) as raised:
        settings.load(path)
    assert raised.value.path == path
    return raised.value.mistakes


class TestAConfigOfExLabWizard:
    def test_works_as_it_is(self, config: Path) -> None:
        got = read(config, OF_EXLAB_WIZARD)
        assert got.source == config
        assert [equipment.id for equipment in got.equipment] == ["CONFOCAL_01", "FLOW_01"]
        assert got.equipment[1].sync_mode == "stage"
        assert got.validator.content_scan_extensions == (".txt", ".md")
        assert got.plugins.allow_network is True
        assert got.readme.defaults == (settings.Field(id="irb_protocol", label="IRB"),)

    def test_is_ready(self, config: Path) -> None:
        assert settings.setup_status(read(config, OF_EXLAB_WIZARD)).state == "ready"

    def test_gets_a_note_for_each_part_that_means_nothing_here(self, config: Path) -> None:
        parts = ("lims", "nas_cleanup", "logging", "sync", "orchestrator")
        foreign = [*parts, "equipment[1].orchestrator_staging_transport"]
        got = [note.split(": ", 1)[1] for note in read(config, OF_EXLAB_WIZARD).notes]
        assert sorted(got) == sorted(
            f"{key} is for another program, and means nothing here" for key in foreign
        )

    def test_keeps_the_transport_as_it_stands(self, config: Path) -> None:
        transport = read(config, OF_EXLAB_WIZARD).equipment[0].transport
        assert transport is not None
        assert transport["bandwidth"] == {
            "upload_mbps": 50,
            "schedule": [{"days": ["mon", "tue"], "from": "08:00", "to": "18:00"}],
        }


class TestValues:
    def test_mebibytes_become_bytes(self, config: Path) -> None:
        assert (
            read(config, "validator: {content_scan_max_mib: 7}").validator.content_scan_max_bytes == 7 * 2**20
        )

    def test_relative_paths_start_at_the_config_file(self, config: Path) -> None:
        got = read(config, "paths: {local_root: ../data, templates_dir: /srv/templates}")
        assert got.paths.local_root == config.parent.parent / "data"
        assert got.paths.templates_dir == Path("/srv/templates")

    def test_a_tilde_is_the_home_folder(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/lab")
        monkeypatch.setenv("USERPROFILE", "/home/lab")
        assert read(config, "paths: {local_root: ~/data}").paths.local_root == Path("/home/lab/data")

    def test_an_empty_path_is_unset(self, config: Path) -> None:
        assert read(config, 'paths: {local_root: "", templates_dir: "  "}').paths == settings.Paths()

    def test_null_sections_and_keys_have_their_defaults(self, config: Path) -> None:
        names = [name for name in settings.Settings.__struct_fields__ if name not in ("source", "notes")]
        got = read(config, "".join(f"{name}:\n" for name in names))
        assert got == msgspec.structs.replace(settings.defaults(), source=config)
        assert read(config, "service: {port: null}\nreadme: {defaults: }").service.port == 8321

    @pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n", "---\n...\n", "\ufeff"])
    def test_a_blank_file_has_the_defaults(self, config: Path, text: str) -> None:
        assert read(config, text) == msgspec.structs.replace(settings.defaults(), source=config)

    def test_words_that_look_like_something_else_are_text(self, config: Path) -> None:
        text = (
            "readme: {defaults: [{id: sent, label: no, type: choice, options: [yes, no, 12:30, 2024-01-01]}]}"
        )
        field = read(config, text).readme.defaults[0]
        assert field.label == "no"
        assert field.options == ("yes", "no", "12:30", "2024-01-01")

    def test_merge_keys_give_way_to_the_keys_beside_them(self, config: Path) -> None:
        text = (
            "equipment:\n"
            "  - &first {id: A, label: One, local_root: data, nas_root: //nas}\n"
            "  - {<<: *first, id: B}\n"
        )
        got = read(config, text).equipment
        assert [(equipment.id, equipment.label) for equipment in got] == [("A", "One"), ("B", "One")]

    def test_spaces_around_text_do_not_count(self, config: Path) -> None:
        assert read(config, 'operators: {allowlist: [" asmith "]}').operators.allowlist == ("asmith",)

    @pytest.mark.parametrize(
        ("kind", "default"),
        [
            ("boolean", "maybe"),
            ("number", "5"),
            ("choice", "c"),
            ("date", "1 May"),
            ("string", 5),
            ("text", []),
        ],
    )
    def test_a_default_that_does_not_fit_is_left_out(self, config: Path, kind: str, default: object) -> None:
        field = {"id": "f", "label": "F", "type": kind, "default": default, "options": ["a", "b"]}
        got = read(config, msgspec.json.encode({"readme": {"defaults": [field]}}).decode())
        assert got.readme.defaults[0].default is None
        assert got.notes == (
            f"line 1: readme.defaults[0].default does not fit the type {kind}, and is left out",
        )

    @pytest.mark.parametrize(
        ("kind", "default"),
        [("boolean", False), ("number", 0), ("choice", "b"), ("date", "2026-05-01"), ("string", "x")],
    )
    def test_a_default_that_fits_is_kept(self, config: Path, kind: str, default: object) -> None:
        field = {"id": "f", "label": "F", "type": kind, "default": default, "options": ["a", "b"]}
        got = read(config, msgspec.json.encode({"readme": {"defaults": [field]}}).decode())
        assert got.readme.defaults[0].default == default

    def test_the_database_lies_in_the_state_folder(self, config: Path) -> None:
        got = read(config, "service: {state_dir: state}").service
        assert got.state_dir == config.parent / "state"
        assert got.database_url == f"sqlite+aiosqlite:///{config.parent}/state/sessions.sqlite3"

    def test_the_state_folder_is_the_users(self) -> None:
        got = settings.defaults().service
        assert got.state_dir == platformdirs.user_state_path("exlab-sessions")
        assert got.database_url.endswith("/exlab-sessions/sessions.sqlite3")

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("sqlite+aiosqlite:///lab.db?timeout=5", "sqlite+aiosqlite:///{folder}/lab.db?timeout=5"),
            ("sqlite+aiosqlite:////srv/lab.db", "sqlite+aiosqlite:////srv/lab.db"),
            ("sqlite+aiosqlite:///:memory:", "sqlite+aiosqlite:///:memory:"),
            ("postgresql+asyncpg://lab@db/lab", "postgresql+asyncpg://lab@db/lab"),
        ],
    )
    def test_a_relative_sqlite_url_starts_at_the_config_file(
        self, config: Path, given: str, expected: str
    ) -> None:
        got = read(config, f"service: {{database_url: '{given}'}}").service.database_url
        assert got == expected.format(folder=config.parent)


class TestNotes:
    @pytest.mark.parametrize(
        ("text", "note"),
        [
            (
                "service:\n  prot: 80",
                "line 2: service.prot is no key that is known here; did you mean service.port?",
            ),
            ("equipments: []", "line 1: equipments is no key that is known here; did you mean equipment?"),
            ("\nzzz: 1", "line 2: zzz is no key that is known here"),
            ("plugins: {5: 1}", "line 1: plugins.5 is no key that is known here"),
        ],
    )
    def test_an_unknown_key_is_told_with_what_may_have_been_meant(
        self, config: Path, text: str, note: str
    ) -> None:
        assert read(config, text).notes == (note,)

    def test_another_root_than_the_one_that_is_used_is_told(self, config: Path) -> None:
        text = "paths: {local_root: data}\n" + EQUIPMENT.replace("data", "elsewhere")
        assert any(
            "equipment[0].local_root is not paths.local_root" in note for note in read(config, text).notes
        )

    def test_a_signal_without_its_file_is_told(self, config: Path) -> None:
        assert any(
            "equipment[0].sentinel_filename is not set" in note for note in read(config, EQUIPMENT).notes
        )

    def test_a_thousand_unknown_keys_do_not_make_a_thousand_notes(self, config: Path) -> None:
        assert len(read(config, "".join(f"k{number}: 1\n" for number in range(1000))).notes) == 100


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "key", "line", "message"),
        [
            ("service:\n  port: eighty", "service.port", 2, "expected a port from 0 .*, not 'eighty'"),
            ("service:\n  port: 65536", "service.port", 2, "expected a port from 0 .* to 65535, not 65536"),
            ("service: {port: true}", "service.port", 1, "not true"),
            (
                "service: {drain_seconds: -1}",
                "service.drain_seconds",
                1,
                "expected seconds, 0 to 3600, not -1",
            ),
            ("service: {render_timeout_seconds: 0}", "service.render_timeout_seconds", 1, "above 0"),
            ("service: {keep_partial_days: .nan}", "service.keep_partial_days", 1, "expected days"),
            ("service: {render_workers: 0}", "service.render_workers", 1, "from 1 to 32"),
            ("service: {host: 127}", "service.host", 1, "expected text"),
            ("service: {state_dir: [a]}", "service.state_dir", 1, "expected a path, not a list"),
            ("service: {require_prompt_id: maybe}", "service.require_prompt_id", 1, "expected true or false"),
            ("service: {origins: ['*']}", "service.origins[0]", 1, "expected an origin"),
            (
                "service: {origins: ['https://a', 'https://b/']}",
                "service.origins[1]",
                1,
                "expected an origin",
            ),
            ("service: {database_url: lab.db}", "service.database_url", 1, "expected a database URL"),
            ("paths: {local_root: 5}", "paths.local_root", 1, "expected a path, not 5"),
            ("paths: {local_root: ~nobody-here/x}", "paths.local_root", 1, "no home folder is known"),
            ("paths: [a]", "paths", 1, "expected keys with values, not a list"),
            ("equipment: {id: A}", "equipment", 1, "expected a list, not keys with values"),
            ("equipment:\n  -\n", "equipment[0].id", 2, "is missing; expected a capital letter"),
            (EQUIPMENT.replace("CONFOCAL_01", "confocal"), "equipment[0].id", 1, "expected a capital letter"),
            (EQUIPMENT.replace("CONFOCAL_01", "A" * 33), "equipment[0].id", 1, "at most 31"),
            (EQUIPMENT.replace("CONFOCAL_01", "A/../B"), "equipment[0].id", 1, "expected a capital letter"),
            (
                EQUIPMENT.replace("label: Confocal, ", ""),
                "equipment[0].label",
                1,
                "is missing; expected text",
            ),
            (EQUIPMENT.replace("}", ", sync_mode: both}"), "equipment[0].sync_mode", 1, "one of nas, stage"),
            (EQUIPMENT.replace("}", ", transport: rclone}"), "equipment[0].transport", 1, "expected keys"),
            ("operators: {allowlist: [a, 5]}", "operators.allowlist[1]", 1, "expected text"),
            ("operators: {allowlist: [~]}", "operators.allowlist[0]", 1, "not nothing"),
            ("validator: {content_scan_max_mib: 0}", "validator.content_scan_max_mib", 1, "1 to 1024"),
            (
                "validator: {content_scan_extensions: [txt]}",
                "validator.content_scan_extensions[0]",
                1,
                "a dot",
            ),
            ("plugins: {allow_network: 2}", "plugins.allow_network", 1, "expected true or false, not 2"),
            ("plugins: {run_unlisted: [1]}", "plugins.run_unlisted", 1, "expected true or false, not a list"),
            ("plugins: {python: 3.11}", "plugins.python", 1, "expected a path, not 3.11"),
            (
                "readme: {defaults: [{id: Big, label: x}]}",
                "readme.defaults[0].id",
                1,
                "expected small letters",
            ),
            (
                "readme: {defaults: [{id: label, label: x}]}",
                "readme.defaults[0].id",
                1,
                "expected another id",
            ),
            ("readme: {defaults: [{id: a, label: ''}]}", "readme.defaults[0].label", 1, "not empty"),
            (
                "readme: {defaults: [{id: a, label: x, type: t}]}",
                "readme.defaults[0].type",
                1,
                "one of string,",
            ),
            (
                "readme: {defaults: [{id: a, label: x, type: choice}]}",
                "readme.defaults[0].options",
                1,
                "what can be chosen",
            ),
            ("- a", "file", 1, "expected keys with values, not a list"),
            ("a: [b\nc: d", "file", 2, "expected ',' or ']'"),
            ("a: 1\na: 2", "file", 2, "the key 'a' stands twice"),
            ('paths: {local_root: "C:\\data"}', "file", 1, "in single quotes"),
        ],
    )
    def test_a_mistake_names_key_line_and_what_was_expected(
        self, config: Path, text: str, key: str, line: int, message: str
    ) -> None:
        (mistake, *_) = mistakes(config, text)
        assert (mistake.key, mistake.line) == (key, line)
        assert re.search(message, mistake.message)

    def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines(self, config: Path) -> None:
        text = "service: {port: -1}\nequipment:\n  - id: a\n    label: ok\n  - label: 5\nplugins: {allow_network: 7}\n"
        assert [(mistake.line, mistake.key) for mistake in mistakes(config, text)] == [
            (1, "service.port"),
            (3, "equipment[0].id"),
            (3, "equipment[0].local_root"),
            (3, "equipment[0].nas_root"),
            (5, "equipment[1].label"),
            (5, "equipment[1].id"),
            (5, "equipment[1].local_root"),
            (5, "equipment[1].nas_root"),
            (6, "plugins.allow_network"),
        ]

    def test_two_instruments_cannot_have_one_id(self, config: Path) -> None:
        item = "  - {id: A, label: One, local_root: data, nas_root: //nas}\n"
        (mistake,) = mistakes(config, f"equipment:\n{item}{item}")
        assert (mistake.key, mistake.line) == ("equipment[1].id", 3)

    def test_two_fields_cannot_have_one_id(self, config: Path) -> None:
        (mistake,) = mistakes(
            config, "readme:\n  defaults:\n    - {id: a, label: A}\n    - {id: a, label: B}\n"
        )
        assert (mistake.key, mistake.line) == ("readme.defaults[1].id", 4)

    def test_a_password_is_refused_and_not_repeated(self, config: Path) -> None:
        text = EQUIPMENT.replace("}", ", transport: {type: rsync_ssh, password: hunter2}}")
        (mistake,) = mistakes(config, text)
        assert mistake.key == "equipment[0].transport.password"
        assert "hunter2" not in mistake.message

    def test_the_password_of_a_url_is_not_repeated(self, config: Path) -> None:
        (mistake,) = mistakes(config, "service: {database_url: 'Postgres://lab:hunter2@db/lab'}")
        assert "hunter2" not in mistake.message

    def test_what_is_told_of_a_strange_value_is_short_and_printable(self, config: Path) -> None:
        (mistake,) = mistakes(config, 'service: {port: "\\e[31m' + "x" * 1000 + '"}')
        assert mistake.message.isprintable()
        assert len(mistake.message) < 200


class TestAHostileFile:
    BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
        for before, after in zip("abcdefgh", "bcdefghi", strict=True)
    )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (BOMB, "holds more than 10000 values"),
            ("a: &a {b: *a}", "nested deeper"),
            ("a: &a {<<: *a}", "nested deeper"),
            ("&a {<<: [*a, *a]}", "nested deeper"),
            ("[" * 5000 + "]" * 5000, "nested deeper than 32 levels"),
            ("{a: " * 60_000, "nested deeper than 32 levels"),
            ("- " * 100_000, "nested deeper than 32 levels"),
            ("#" * 300_000, "larger than 256 KiB"),
            (b"paths: {local_root: '\xe4'}", "is not UTF-8"),
            (b"\xff\xfea\x00", "is not UTF-8"),
            ("a: \x00", "U\\+0000"),
            ('paths: {local_root: "\\0"}', "a text that cannot be used"),
            ('paths: {local_root: "\\ud800"}', "a text that cannot be used"),
            ("paths: {local_root: " + "x" * 5000 + "}", "at most 4096 characters"),
            ("a: " + "9" * 5000, "a whole number that cannot be used"),
            ("a: 99999999999999999999", "a whole number that cannot be used"),
            ("a: 1e999", "a number that cannot be used"),
            ("a: !!set {b}", "the tag .* means nothing here"),
            ("a: !!int x", "a whole number that cannot be used"),
            ("a: !!python/object/apply:os.system [id]", "the tag .* means nothing here"),
            ("? [a]\n: b", "a key must be text"),
            ("a: *nowhere", "undefined alias"),
            ("a: 1\n---\nb: 2", "expected a single document"),
            ("<<: 5", "<< takes a mapping"),
        ],
    )
    def test_is_refused_soon(self, config: Path, text: str | bytes, message: str) -> None:
        began = time.monotonic()
        (mistake, *_) = mistakes(config, text)
        assert re.search(message, mistake.message)
        assert time.monotonic() - began < 10

    def test_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigInvalid, match="cannot be read: No such file"):
            settings.load(tmp_path / "config.yaml")

    def test_that_is_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigInvalid, match="cannot be read: Is a directory"):
            settings.load(tmp_path)

    def test_that_is_a_pipe_without_an_end(self, config: Path) -> None:
        os.mkfifo(config)
        with pytest.raises(ConfigInvalid, match="is not a regular file"):
            settings.load(config)

    def test_that_may_not_be_read(self, public: Path) -> None:
        write(public / "config.yaml", "paths: {}", mode=0)
        with unprivileged(), pytest.raises(ConfigInvalid, match="cannot be read: Permission denied"):
            settings.load(public / "config.yaml")

    def test_that_may_not_be_read_is_not_taken_for_none(self, public: Path) -> None:
        write(public / "config.yaml", "paths: {}", mode=0)
        with unprivileged():
            file = settings.ConfigFile(public / "config.yaml")
        assert file.problem is not None
        assert file.status.missing == (settings.Missing("config.yaml", "cannot be read: Permission denied"),)

    def test_that_lies_in_a_folder_that_is_closed_is_not_taken_for_none(self, public: Path) -> None:
        (public / "closed").mkdir(mode=0)
        with unprivileged():
            assert settings.ConfigFile(public / "closed" / "config.yaml").problem is not None

    async def test_that_turns_out_not_to_be_there_is_no_problem(self, public: Path) -> None:
        (public / "closed").mkdir(mode=0)
        with unprivileged():
            file = settings.ConfigFile(public / "closed" / "config.yaml")
        (public / "closed").chmod(0o755)
        await file.refresh()
        assert file.problem is None

    def test_that_is_a_link_to_nowhere_is_not_taken_for_none(self, config: Path) -> None:
        config.symlink_to("nowhere")
        assert settings.ConfigFile(config).problem is not None


class TestTheSetupState:
    def paths(self, **changed: str | None) -> str:
        given = {"templates_dir": "templates", "plugin_dir": "plugins", "local_root": "data"} | changed
        return "paths: " + msgspec.json.encode(given).decode() + "\n"

    def test_without_a_config_file(self) -> None:
        assert msgspec.to_builtins(settings.setup_status(settings.defaults())) == {
            "state": "incomplete_no_config",
            "missing": ({"field": "config.yaml", "reason": "missing"},),
            "next_action": "set_paths",
            "ready": False,
        }

    def test_paths_come_before_equipment(self, config: Path) -> None:
        got = settings.setup_status(read(config, "equipment: []"))
        assert (got.state, got.next_action, got.ready) == ("incomplete_missing_paths", "set_paths", False)
        assert got.missing == tuple(
            settings.Missing(f"paths.{name}", "unset")
            for name in ("templates_dir", "plugin_dir", "local_root")
        )

    def test_equipment_comes_last(self, config: Path) -> None:
        got = settings.setup_status(read(config, self.paths()))
        assert (got.state, got.next_action, got.ready) == ("incomplete_no_equipment", "add_equipment", False)
        assert got.missing == (settings.Missing("equipment", "empty"),)

    def test_ready_lacks_nothing(self, config: Path) -> None:
        got = settings.setup_status(read(config, self.paths() + EQUIPMENT))
        assert got == settings.SetupStatus(state="ready", missing=(), next_action=None, ready=True)

    @pytest.mark.parametrize("name", ["templates_dir", "plugin_dir", "local_root"])
    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("gone", "{} does not exist"),
            ("config.yaml", "{} is not a folder"),
            ("config.yaml/below", "{} does not exist"),
            ("x" * 300, "{} cannot be looked at: File name too long"),
            ("loop", "{} cannot be looked at: Too many levels of symbolic links"),
        ],
    )
    def test_a_path_that_is_no_folder_is_missing(
        self, config: Path, name: str, path: str, reason: str
    ) -> None:
        (config.parent / "loop").symlink_to("loop")
        got = settings.setup_status(read(config, self.paths(**{name: path}) + EQUIPMENT))
        assert got.state == "incomplete_missing_paths"
        assert got.missing == (settings.Missing(f"paths.{name}", reason.format(config.parent / path)),)

    @pytest.mark.parametrize(
        ("name", "mode", "reason"),
        [
            ("templates", 0o311, "cannot be read"),
            ("plugins", 0o444, "cannot be read"),
            ("data", 0o555, "cannot be written to"),
        ],
    )
    def test_a_folder_without_the_permission_that_is_needed_is_missing(
        self, public: Path, name: str, mode: int, reason: str
    ) -> None:
        for folder in ("templates", "plugins", "data"):
            (public / folder).mkdir()
            (public / folder).chmod(mode if folder == name else 0o777)
        got = read(public / "config.yaml", self.paths() + EQUIPMENT)
        with unprivileged():
            (missing,) = settings.setup_status(got).missing
        assert missing.reason == f"{public}/{name} {reason}"


class TestConfigFile:
    async def test_leaves_the_incomplete_state_when_the_config_is_written(self, config: Path) -> None:
        file = settings.ConfigFile(config)
        assert (file.status.state, file.problem) == ("incomplete_no_config", None)
        write(config, OF_EXLAB_WIZARD)
        await file.refresh()
        assert file.status.ready
        assert file.current.source == config

    async def test_takes_up_a_change(self, config: Path) -> None:
        write(config, "service: {port: 1}")
        file = settings.ConfigFile(config)
        write(config, "service: {port: 2}")
        await file.refresh()
        assert file.current.service.port == 2

    async def test_reads_again_what_changed_so_recently_that_it_may_change_unseen(self, config: Path) -> None:
        config.write_text(OF_EXLAB_WIZARD)
        file = settings.ConfigFile(config)
        before = file.current
        await file.refresh()
        assert file.current is not before
        assert file.current == before

    async def test_does_not_read_again_what_did_not_change(self, config: Path) -> None:
        write(config, OF_EXLAB_WIZARD)
        file = settings.ConfigFile(config)
        before = file.current
        await file.refresh()
        assert file.current is before

    async def test_notices_folders_that_come_and_go(self, config: Path) -> None:
        write(config, OF_EXLAB_WIZARD)
        file = settings.ConfigFile(config)
        (config.parent / "data").rmdir()
        await file.refresh()
        assert file.status.state == "incomplete_missing_paths"
        (config.parent / "data").mkdir()
        await file.refresh()
        assert file.status.ready

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            ("service: {port: x}", "expected a port"),
            ("a: [", "expected"),
            ("", "is empty"),
            (None, "No such file"),
        ],
    )
    async def test_a_config_that_breaks_leaves_the_last_good_one_in_force(
        self, config: Path, broken: str | None, message: str
    ) -> None:
        write(config, OF_EXLAB_WIZARD)
        file = settings.ConfigFile(config)
        good = file.current
        config.unlink() if broken is None else write(config, broken)
        await file.refresh()
        assert file.current == good
        assert file.status.ready
        assert message in str(file.problem)

    async def test_a_config_that_is_mended_has_no_problem_left(self, config: Path) -> None:
        write(config, OF_EXLAB_WIZARD)
        file = settings.ConfigFile(config)
        write(config, "paths: 5")
        await file.refresh()
        assert file.problem
        write(config, OF_EXLAB_WIZARD.replace("CONFOCAL_01", "CONFOCAL_02"))
        await file.refresh()
        assert file.problem is None
        assert file.current.equipment[0].id == "CONFOCAL_02"

    async def test_a_config_that_is_broken_at_the_start_counts_as_none(self, config: Path) -> None:
        write(config, OF_EXLAB_WIZARD + "service: {port: x, drain_seconds: 3}\n")
        file = settings.ConfigFile(config)
        line = OF_EXLAB_WIZARD.count("\n") + 1
        (missing,) = file.status.missing
        assert file.status.state == "incomplete_no_config"
        assert missing.field == "service.port"
        assert missing.reason.startswith(f"line {line}: expected a port")
        assert file.current.source is None
        assert file.current.equipment == ()

    async def test_a_mistake_elsewhere_does_not_move_the_database(self, config: Path) -> None:
        write(config, "equipment: 5\nservice: {state_dir: state, port: 99}\n")
        got = settings.ConfigFile(config).current.service
        assert (got.state_dir, got.port) == (config.parent / "state", 99)

    async def test_a_config_that_was_broken_at_the_start_can_be_mended(self, config: Path) -> None:
        write(config, "equipment: 5")
        file = settings.ConfigFile(config)
        write(config, OF_EXLAB_WIZARD)
        await file.refresh()
        assert (file.problem, file.status.ready) == (None, True)

    async def test_without_a_path_it_is_the_users(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert (
            settings.ConfigFile(None).path == platformdirs.user_config_path("exlab-sessions") / "config.yaml"
        )


class TestTheInterpreterOfPlugins:
    def test_it_keeps_the_link_by_which_a_virtual_environment_is_known(self, config: Path) -> None:
        place = config.parent / "venv" / "bin"
        place.mkdir(parents=True)
        (place / "python").symlink_to(sys.executable)
        assert read(config, "plugins: {python: venv/bin/python}").plugins.python == place / "python"

    def test_it_may_be_left_out(self, config: Path) -> None:
        for text in ("plugins: {python: ''}", "plugins: {python: }", "plugins:"):
            assert read(config, text).plugins == settings.Plugins()


class TestTheDocs:
    def rows(self) -> dict[str, str]:
        """Key to default, from the tables."""
        return dict(re.findall(r"^\| `([a-z_.\[\]]+)` \| (.*?) \|", DOCS.read_text(), re.MULTILINE))

    @pytest.mark.parametrize(
        ("section", "kind"),
        [
            ("paths", settings.Paths),
            ("equipment[]", settings.Equipment),
            ("operators", settings.Operators),
            ("readme.defaults[]", settings.Field),
            ("plugins", settings.Plugins),
            ("service", settings.Service),
        ],
    )
    def test_every_key_is_documented_with_its_default(self, section: str, kind: type[msgspec.Struct]) -> None:
        rows = {
            key.removeprefix(f"{section}."): default
            for key, default in self.rows().items()
            if key.startswith(section)
        }
        fields = msgspec.structs.fields(kind)
        assert set(rows) == {field.name for field in fields}
        computed = {"state_dir": "the user's state folder, `exlab-sessions`"}
        computed["database_url"] = "`sqlite+aiosqlite:///<state_dir>/sessions.sqlite3`"
        for field in fields:
            plain = computed.get(field.name, "required") if field.required else self.told(field.default)
            assert rows[field.name] == plain, field.name

    def test_the_validator_is_documented_with_its_defaults(self) -> None:
        rows, default = self.rows(), settings.Validator()
        assert int(rows["validator.content_scan_max_mib"]) * 2**20 == default.content_scan_max_bytes
        assert tuple(rows["validator.content_scan_extensions"].split()) == default.content_scan_extensions

    @staticmethod
    def told(default: object) -> str:
        if default in (None, ()):
            return "none"
        return str(default).lower() if isinstance(default, bool) else str(default)

    def test_the_example_works_as_it_stands(self, config: Path) -> None:
        (example,) = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
        got = read(config, example)
        assert got.notes == ()
        assert got.service.keep_partial_days == 30
