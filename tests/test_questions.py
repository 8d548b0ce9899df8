"""What is told of a template's questions is what Copier does with them: every case here is rendered by Copier."""

import json
from pathlib import Path

import copier
import pytest

from app.errors import Failure
from app.steps import fields, templates
from app.steps.templates import Question

MANIFEST = '_exlab_type: project\n_exlab_version: "1"\nasked: '
NOTHING = object()
WORDS = (
    "yes", "no", "on", "off", "y", "n", "t", "f", "true", "false", "True", "False", "Yes", "NO", "~", "null",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "template"
    made.mkdir()
    (made / "answer.json.jinja").write_text("{{ asked|tojson }}")
    return made


def told(folder: Path, question: str) -> Question:
    (folder / "copier.yml").write_text(f"{MANIFEST}{question}\n")
    found = templates.load(folder)
    assert not isinstance(found, Failure), found
    return found.questions[0]


def rendered(folder: Path, **answers: object) -> object:
    """What Copier makes of the answers; NOTHING where it fails."""
    target = folder.parent / "out"
    try:
        copier.run_copy(str(folder), str(target), data=answers, defaults=True, quiet=True, overwrite=True)
    except (ValueError, TypeError):
        return NOTHING
    return json.loads((target / "answer.json").read_text())


@pytest.mark.parametrize(
    "question",
    [
        "yes", "off", "y", "'yes'", "{default: no}", "{default: 'no'}", "{type: str, default: no}",
        "{type: str, default: 'no'}", "{type: str, default: On}", "{type: path, default: on}",
        "{type: int, default: yes}", "{type: int, default: 'yes'}", "{type: float, default: off}",
        "{type: bool, default: no}", "{type: bool, default: 'no'}", "{type: bool, default: 'OFF'}",
        "{type: bool, default: 'perhaps'}", "{type: bool, default: '0.0'}", "{type: bool, default: ''}",
        "{type: bool, default: 2}", "{type: bool, default: null}", "{type: json, default: no}",
        "{type: json, default: 'no'}", "{type: yaml, default: no}", "{choices: [yes, no], default: no}",
        "{type: str, choices: [yes, no], default: yes}", "{type: str, choices: ['yes', 'no'], default: 'yes'}",
        "{type: str, choices: ['yes', 'no'], default: yes}", "{type: str, choices: [y, n], default: y}",
        "{type: str, choices: ['True', 'no'], default: yes}", "{type: int, choices: [0, 1], default: yes}",
        "{type: bool, choices: {'On': 'yes', 'Off': 'no'}, default: off}",
        "{type: str, choices: [yes, no], multiselect: true, default: [yes]}",
        "{type: str, choices: ['yes', 'no'], multiselect: true, default: [yes]}",
        "{type: str, choices: ['yes', 'no'], multiselect: 'yes', default: ['no']}",
        "{type: str, choices: ['yes', 'no'], multiselect: true, default: yes}",
        "{type: str, choices: ['yes', 'no'], multiselect: true, default: null}",
        "{type: str, default: 12:30}", "{type: str, default: 2026-04-17}", "{default: x, secret: 'on'}",
    ],
)  # fmt: skip
def test_a_default_is_told_as_copier_takes_it(folder: Path, question: str) -> None:
    asked = told(folder, question)
    taken = rendered(folder)
    assert (NOTHING if asked.required else asked.default) == taken
    assert asked.required or isinstance(asked.default, bool) == isinstance(taken, bool)


@pytest.mark.parametrize(
    ("question", "default"), [("{type: yaml, default: 'no'}", "no"), ("{type: json, default: '[1]'}", "[1]")]
)
def test_a_default_that_copier_reads_itself_is_told_as_the_text_that_may_come_back(
    folder: Path, question: str, default: object
) -> None:
    assert told(folder, question).default == default
    assert rendered(folder) == rendered(folder, asked=default) != default


CHOICES = [
    "{choices: [yes, no]}", "{choices: ['yes', 'no']}", "{choices: [on, 'off', x]}", "{type: str, choices: [yes, no]}",
    "{type: str, choices: ['yes', 'no']}", "{type: str, choices: {yes: on, no: off}}", "{type: str, choices: [y, n]}",
    "{type: str, choices: {yes: 'yes', no: 'no'}}", "{type: bool, choices: [yes, no]}",
    "{type: bool, choices: {'On': 'yes', 'Off': 'no'}}", "{type: int, choices: [yes, 0]}",
    "{type: path, choices: [yes, 'no']}", "{type: json, choices: [yes, 'null', 'false']}",
    "{choices: [[Yes, {value: yes}], [No, {value: 'no'}]]}", "{choices: ['''yes''', 'no']}", "{choices: [1:30, 90]}",
]  # fmt: skip


@pytest.mark.parametrize("question", CHOICES)
def test_every_choice_that_is_told_can_be_chosen(folder: Path, question: str) -> None:
    asked = told(folder, question)
    assert asked.choices
    for choice in asked.choices:
        assert fields.wrong_answer(asked, choice.value) is None
        assert rendered(folder, asked=choice.value) is not NOTHING


@pytest.mark.parametrize("question", CHOICES)
def test_a_word_is_refused_as_an_answer_where_copier_would_refuse_it(folder: Path, question: str) -> None:
    asked = told(folder, question)
    accepted = {word for word in WORDS if fields.wrong_answer(asked, word) is None}
    assert accepted == {word for word in WORDS if rendered(folder, asked=word) is not NOTHING}


@pytest.mark.parametrize("kind", ["str", "int", "float", "bool", "json", "yaml", "path"])
def test_a_word_that_passes_is_taken_by_copier(folder: Path, kind: str) -> None:
    asked = told(folder, f"{{type: {kind}}}")
    accepted = [word for word in (*WORDS, "1", "0") if fields.wrong_answer(asked, word) is None]
    assert accepted
    assert not [word for word in accepted if rendered(folder, asked=word) is NOTHING]


@pytest.mark.parametrize(
    "question",
    [
        "x\non: {type: str}", "x\nyes: 5", "{default: x, help: no}", "{default: x, help: }",
        "{default: x, placeholder: yes}", "{default: x, secret: maybe}", "{default: x, multiselect: maybe}",
        "{type: no, default: x}", "{default: x, when: }", "{type: int, choices: [yes, 'no']}",
        "{type: str, choices: [yes, null]}", "{type: json, choices: [yes, 'no']}",
    ],
)  # fmt: skip
def test_what_would_break_copier_is_a_failure(folder: Path, question: str) -> None:
    (folder / "copier.yml").write_text(f"{MANIFEST}{question}\n")
    assert isinstance(templates.load(folder), Failure)
    target = folder.parent / "out"
    with pytest.raises((ValueError, TypeError, AttributeError)):
        copier.run_copy(str(folder), str(target), data={"asked": "x"}, defaults=True, quiet=True)


@pytest.mark.parametrize(
    "when", ["no", "'no'", "'OFF'", "''", "'0.0'", "'~'", "yes", "'maybe'", "'nan'", "'2'"]
)
def test_a_condition_in_words_holds_when_copier_says_so(folder: Path, when: str) -> None:
    asked = told(folder, f"{{type: str, when: {when}}}")
    (folder / "answer.json.jinja").write_text("{{ asked is defined|tojson }}")
    assert asked.when is asked.required is (rendered(folder) is NOTHING)
