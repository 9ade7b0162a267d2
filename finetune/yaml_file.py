"""Strict reading of a YAML configuration as plain data: no Python tags, no duplicate keys, bounded size and depth.

Messages give the line of a mistake and never quote it, because it may contain an API key.
"""

import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError
from model.file_kinds import looks_like

_MAX_BYTES = 1 << 18
_MAX_VALUES = 10_000  # values and blocks, those of an alias (`*name`) counted at each use
_MAX_DEPTH = 50
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"  # merge: `<<: *name`


_PLAIN = re.compile(r"[\w./~$@+-]([\w ./~$@+,:{}-]*[\w./~$@+,{}-])?")


def as_yaml(value: Any) -> str:
    """Return a value as it is written in a YAML file, on one line."""
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and ": " not in value
        read = yaml.safe_load(value) if is_plain else None
        # A number such as 2.0e-4 stays as it is spelled, see `_is_respelled`.
        return value if read == value or isinstance(read, float) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_in_brackets(key)}: {_in_brackets(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_brackets, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _in_brackets(value: Any) -> str:
    """Return a value as it is written inside of brackets, where a comma or brace would end a string without quotes."""
    quote = isinstance(value, str) and set(value) & set(",{}")
    return json.dumps(value, ensure_ascii=False) if quote else as_yaml(value)


def parse_value(text: str) -> Any:
    """Return the value that `key: TEXT` has in a YAML file.

    Raises:
        UserError: it is not valid YAML.
    """
    try:
        return _parse(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError("it is not valid YAML") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the `key: value` pairs of a YAML file.

    Raises:
        UserError: the file cannot be read, is not valid YAML, or contains anything else.
    """
    text = _read_text(path)
    try:
        raw = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{path} is not valid YAML: {what}{where}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path} is not valid YAML: line {line} contains a control character.") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: its blocks are nested too deeply.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must contain `key: value` pairs, found {type(raw).__name__}.")
    return raw


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"The configuration {path} does not exist (or is not a file).")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path} is too large for a configuration: over {_MAX_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = f"; it looks like {kind}" if (kind := looks_like(content)) else ""
        raise UserError(f"{path} is not valid UTF-8 (byte {error.start + 1}){kind}.") from None


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, token: type) -> None:
        if self.flow_level == _MAX_DEPTH:  # PyYAML checks all open brackets at each token
            raise yaml.MarkedYAMLError(problem="blocks are nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            return node.value if _is_respelled(value, node) else value
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of any type, depending on the constructor: `2024-13-45`, `!!int abc`
            kind = node.tag.rpartition(":")[2]
            is_date = kind == "timestamp" and isinstance(error, ValueError)
            problem = str(error) if is_date else f"the value is not a valid {kind}"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark) from None


def _is_respelled(value: Any, node: yaml.Node) -> bool:
    """Return whether a number or date is not written as Python writes it; it then stays a string.

    YAML 1.1 reads `010` as 8 and `1:30` as 90, and `run_name: 1.10` would become 1.1. Where a number is expected,
    model.settings converts the string.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | datetime.date):
        return False
    try:
        in_range = math.isfinite(value) if isinstance(value, int | float) else True
    except OverflowError:  # an integer that no float can hold
        in_range = False
    return in_range and str(value) != node.value


def _parse(text: str) -> Any:
    loader = _Loader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    _count_values(root, {})
    return loader.construct_document(root)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values in a node, and raise an error for too many, or for an invalid or duplicate key."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = _MAX_VALUES  # for an alias to a block that contains it
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        inner = [value for _, value in node.value]
    count = 1 + sum(_count_values(value, counts) for value in inner)
    if count > _MAX_VALUES:
        raise yaml.MarkedYAMLError(problem=f"over {_MAX_VALUES:,} values", problem_mark=node.start_mark)
    counts[id(node)] = count
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in seen:
            problem = "a key is given twice" if isinstance(key, yaml.ScalarNode) else "a key is not a string"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in key.value):
            raise yaml.MarkedYAMLError(problem="a key has an unpaired surrogate", problem_mark=key.start_mark)
        if key.tag != _MERGE:
            key.tag = _TEXT  # YAML 1.1 reads `on` as true
        seen.add(key.value)
