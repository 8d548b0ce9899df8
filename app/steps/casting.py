"""Values as Copier takes them.

Copier reads `copier.yml`, and the answers to questions of type `yaml`, as YAML 1.1: there `yes` and `off` are truth
values, and 1:30 is a number. Of a default, a choice or an answer it then makes what the question's type says. Both
are done here as Copier does them, within limits and without evaluating anything. Whether a value is wanted is left
to the callers.
"""

import datetime
from typing import Literal, get_args

import msgspec
import yaml

from app import yamltext
from app.yamltext import Unreadable

QuestionType = Literal["str", "int", "float", "bool", "yaml", "json", "path"]

TYPES: tuple[str, ...] = get_args(QuestionType)
YES = ("y", "yes", "t", "true", "on")
NO = ("", "n", "no", "f", "false", "off", "~", "null", "none")

_LONGEST_NUMBER = 100
_NOT_CONSTRUCTED = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


class _Loader(yaml.SafeLoader):
    """Copier's own reading, without its `!include`."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        # A number of 100,000 digits takes minutes where it is written 1:1:1... or 0xFFF...
        is_text = not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":str")
        if not is_text and len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, "a number with too many digits", node.start_mark
            )
        return str(super().construct_scalar(node))


def read(raw: bytes) -> object:
    """The values in a text; Unreadable where it is no YAML, or more than a text of this kind may be.

    The bounded reader judges size, depth and aliases. What passes it is read again, because the two disagree on
    what `no` means.
    """
    yamltext.parse(raw)
    try:
        return _Loader(raw).get_single_data()
    except _NOT_CONSTRUCTED as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise Unreadable(f"holds a value that cannot be read: {str(problem)[:80]}") from error


def plain(value: object) -> object:
    """Only what JSON has, so that it can be stored and shown; dates as ISO 8601 text. ValueError for the rest."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case datetime.date():
            return value.isoformat()
        case list():
            return [plain(item) for item in value]
        case dict():
            return {_key(key): plain(item) for key, item in value.items()}
    raise ValueError(f"holds a {type(value).__name__}, which means nothing there")


def _key(key: object) -> str:
    return key if isinstance(key, str) else str(plain(key))


def truth(value: object) -> bool:
    """What Copier makes of a value where it wants yes or no: every text that is not one of its words is a yes."""
    if not isinstance(value, str):
        return bool(value)
    try:
        return bool(float(value))
    except ValueError:
        return value.strip().lower() not in NO


def cast(kind: QuestionType, value: object) -> object:
    """What a question of this type makes of `value`; ValueError where Copier would fail."""
    if value is None and kind not in ("yaml", "json"):
        raise ValueError(f"null is no {kind}")
    try:
        return _cast(kind, value)
    except (
        *(ValueError, TypeError, OverflowError, RecursionError),
        *(msgspec.DecodeError, Unreadable),
    ) as error:
        raise ValueError(f"cannot be read as {kind}") from error


def _cast(kind: QuestionType, value: object) -> object:
    match kind, value:
        case "bool", _:
            return truth(value)
        case "path", _:
            return str(value)
        case "str", str() | int() | float():
            return str(value)
        case "int", str() | int() | float():
            return int(value)
        case "float", str() | int() | float():
            return float(value)
        case "yaml", str():
            return plain(read(value.encode()))
        case "json", str():
            return msgspec.json.decode(value)
        case (("yaml" | "json"), _):
            return plain(value)
    raise TypeError(f"{type(value).__name__} for {kind}")
