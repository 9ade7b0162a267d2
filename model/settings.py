"""The types of settings: which YAML values are accepted, checked by pydantic, and how messages and docs describe them.

A block of the training YAML is a dataclass that derives from `Settings`. The comment above or next to a field is its
description, in error messages and in docs/configuration.md.
"""

import dataclasses
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError
from simple_parsing.docstring import get_attribute_docstring
from simple_parsing.helpers import Serializable

from .errors import Problem


def _number(value: object) -> int | float:
    """Accept strings, too: YAML 1.1 reads `1e-4`, which has no dot, as a string."""
    number = _parse_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError
    if not abs(number) <= sys.float_info.max:  # NaN, infinity, or an integer that no float can hold
        raise ValueError
    return number


def _parse_number(text: str) -> int | float:
    """Convert a decimal or hexadecimal number; refuse `010`, which is octal in YAML 1.1 and decimal in YAML 1.2."""
    digits = text.strip().lstrip("+-")
    if digits.startswith("0x"):
        return int(text, 16)
    if digits[:1] == "0" and digits[1:].replace("_", "").isdecimal():
        raise ValueError
    try:
        return int(text)
    except ValueError:
        return float(text)


def at_most(limit: int) -> AfterValidator:
    """Return an upper limit, beyond which memory would not suffice or a number overflow.

    Messages and docs mention it only when it is exceeded.
    """

    def check(value: int | float) -> int | float:
        if value > limit:
            raise PydanticKnownError("less_than_equal", {"le": limit})
        return value

    return AfterValidator(check)


def _boolean(value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError
    return value


def _string(value: object) -> str:
    """Accept what YAML reads as a number or a date: `run_dir: 2024-12-19`."""
    if value is None or isinstance(value, bool | dict | list):
        raise ValueError
    text = str(value)
    text.encode()  # rejects an unpaired surrogate
    if "\0" in text:
        raise ValueError
    return text


_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\})", re.ASCII)


def expand_path(path: str) -> str:
    """Replace `~` at the start of a path, and `$NAME` and `${NAME}`, unless the path exists as it is written.

    Raises:
        pydantic_core.PydanticCustomError: an environment variable is not defined.
    """
    if os.path.lexists(path):
        return path

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]  # of `${NAME:-default}` all, which is not defined
        if name not in os.environ:
            raise PydanticCustomError(
                "undefined_variable", "the environment variable {name} is not defined", {"name": name}
            )
        return os.environ[name]

    return _string(os.path.expanduser(_VARIABLE.sub(value_of, path)))


Number = BeforeValidator(_number)
_COUNT = at_most(1_000_000_000)
Int = Annotated[int, Number, _COUNT]
PositiveInt = Annotated[int, Field(ge=1), Number, _COUNT]
NonNegativeInt = Annotated[int, Field(ge=0), Number, _COUNT]
PositiveFloat = Annotated[float, Field(gt=0), Number]
NonNegativeFloat = Annotated[float, Field(ge=0), Number]
Bool = Annotated[bool, BeforeValidator(_boolean)]
Str = Annotated[str, BeforeValidator(_string)]
PathStr = Annotated[Str, AfterValidator(expand_path)]


def _steps_or_share(value: object) -> object:
    """Refuse 1.0, which is every step as a number of steps and once as a share; 5.0 can only be 5 steps."""
    is_float = isinstance(value, float) or (isinstance(value, str) and "." in value)
    if is_float and _number(value) == 1:
        raise PydanticCustomError("ambiguous", "1 for every step, a share of the run below 1, or epoch: 1.0 is unclear")
    return value


# How often: a number of steps, a share of the run, or once in each epoch.
Share = Annotated[float, Field(gt=0, lt=1), Number]
_Unambiguous = BeforeValidator(_steps_or_share)
Frequency = Annotated[NonNegativeInt | Share | Literal["epoch"], _Unambiguous]
PositiveFrequency = Annotated[PositiveInt | Share | Literal["epoch"], _Unambiguous]


class Settings(Serializable):
    """A block of the training YAML.

    Values are checked where they are read from YAML or by `from_dict`; constructing a block in Python checks nothing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @classmethod
    def from_dict(cls, obj: Mapping[str, Any], drop_extra_fields: bool | None = None) -> Self:
        """Convert plain data by the rules of the training YAML; unknown keys cannot be dropped.

        Raises:
            pydantic.ValidationError: a key is unknown or missing, or a value is of the wrong type or out of range.
        """
        if drop_extra_fields:
            raise NotImplementedError
        try:
            return TypeAdapter(cls).validate_python(obj)
        except ValidationError as error:
            details = cast(list[InitErrorDetails], error.errors())
            raise ValidationError.from_exception_data(error.title, details, hide_input=True) from None

    def problems(self) -> list[Problem]:
        """Return what is wrong with values that are valid one by one; look at paths, read no weights and no rows."""
        return []


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a block, for messages and docs."""

    expected: str  # the accepted values in words
    default: Any  # dataclasses.MISSING: the key is required
    is_block: bool
    block: type  # the key's own, or else the block that has it
    name: str  # the last part of the key

    @property
    def description(self) -> str:
        """The comment on the field; of a block, its docstring. Read from the source only where it is shown."""
        return inspect.cleandoc(self.block.__doc__ or "") if self.is_block else _comment(self.block, self.name)


def list_settings(block: type[Settings], prefix: str = "") -> dict[str, Setting]:
    """Return the keys of a block and of the blocks in it, by dotted path."""
    found: dict[str, Setting] = {}
    hints = typing.get_type_hints(block, include_extras=True)
    for field in dataclasses.fields(block):
        hint, default = hints[field.name], field.default
        if dataclasses.is_dataclass(hint):
            inner = cast(type[Settings], hint)
            found[prefix + field.name] = Setting("a block of keys", field.default_factory, True, inner, field.name)
            found |= list_settings(inner, f"{prefix}{field.name}.")
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[prefix + field.name] = Setting(_in_words(hint), default, False, block, field.name)
    return found


def _comment(block: type, name: str) -> str:
    comments = get_attribute_docstring(block, name)
    return " ".join(f"{comments.comment_above} {comments.comment_inline}".split())


def _in_words(hint: Any) -> str:
    *others, last = _alternatives(hint)
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any) -> list[str]:
    base, *metadata = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if typing.get_origin(base) in (types.UnionType, typing.Union):
        return [words for option in typing.get_args(base) for words in _alternatives(option)]
    if typing.get_origin(base) is Literal:
        return [str(choice) for choice in typing.get_args(base)]
    if typing.get_origin(base) is list:
        [item] = typing.get_args(base)
        return [f"a list of {_in_words(item)}" if typing.get_origin(item) is Literal else "a list of strings"]
    if base is bool:
        return ["true", "false"]
    name = {int: "a whole number", float: "a number", str: "a string", types.NoneType: "null"}[base]
    return [name + _range(metadata)]


def _range(metadata: list[Any]) -> str:
    limits: dict[str, Any] = {}
    for info in metadata:
        for limit in info.metadata if isinstance(info, FieldInfo) else ():
            limits |= {name: getattr(limit, name) for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)}
    if limits.keys() == {"ge", "le"}:
        return f" between {limits['ge']} and {limits['le']}"
    words = {"ge": "of at least", "gt": "greater than", "le": "of at most", "lt": "less than"}
    return " and".join(f" {words[name]} {limit}" for name, limit in limits.items())
