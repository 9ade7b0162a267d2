"""Keys that are not settings of the training YAML, and values as other tools write them: what to write instead."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import Problem, quoted
from model.settings import Setting

from .redaction import redacted
from .translations import Advice, Translation, find_translation
from .yaml_file import as_yaml

Leaf = tuple[tuple[str, ...], Any]  # the parts of a dotted key, and its value

MAY_HOLD_SECRETS = ("wandb", "wandb.key")  # an API key may be here, where it belongs or by mistake: never quoted
_LONGEST_KEY = 100  # characters of an unknown key that a message quotes
_LONGEST_VALUE = 300  # characters of a value that a message suggests


def replace_unknown(
    leaves: Sequence[Leaf], known: Mapping[str, Setting], problems: list[Problem]
) -> tuple[list[Leaf], list[str]]:
    """Add a problem for each unknown key and each value of another tool, and replace them as the problem suggests.

    Args:
        leaves: keys and values as they are written.
        known: every setting by its dotted key.
        problems: to add to.

    Returns:
        Keys and values without unknown ones; and the known keys, in a line for each block in which an unknown key has
        no suggestion.
    """
    settings = {path[-1].lower(): value for path, value in leaves}
    given = {".".join(path): ".".join(path) for path, _ in leaves}  # settings, and the key that sets each
    kept: list[Leaf] = []
    unexplained: dict[str, None] = {}  # blocks
    for path, value in leaves:
        key = ".".join(path)
        is_known = _is_known(key, known)
        translation = None if is_known and _is_block(key, value, known) else find_translation(path, exact=is_known)
        advice = _advise(translation, value, settings)
        if is_known and advice in (None, {key: value}):
            kept.append((path, value))
            continue
        if isinstance(advice, dict):
            given.pop(key, None)
            advice = _without_given(advice, given)
        if isinstance(advice, dict):
            kept += [(tuple(name.split(".")), item) for name, item in advice.items()]
            given |= dict.fromkeys(advice, _shortened(key))
        if translation:
            found = f"is {quoted(redacted(value))}" if is_known else "is not a known setting"
            message = f"`{_shortened(key)}` {found}; {_remedy(translation, advice, known)}."
            problems.append(Problem(key, message))
        elif similar := _similar(path, known):
            message = f"`{_shortened(key)}` is not a known setting; did you mean {_listed(similar)}?"
            problems.append(Problem(key, message))
        else:
            block = ".".join(path[:-1])
            unexplained[block if block in known else ""] = None
            # `key:0123`, without a space after the colon, is a key, too.
            what = f"A key of `{block}`" if block in MAY_HOLD_SECRETS else f"`{_shortened(key)}`"
            problems.append(Problem(key, f"{what} is not a known setting."))
    return kept, [_known_keys(block, known) for block in unexplained]


def _is_known(key: str, known: Mapping[str, Setting]) -> bool:
    """Return whether a key is a setting, or is by mistake inside of a setting that is not a block."""
    return key in known or any(key.startswith(f"{name}.") for name in known if not known[name].is_block)


def _is_block(key: str, value: Any, known: Mapping[str, Setting]) -> bool:
    """Return whether a value is a block, or an empty one, of keys that are known."""
    return key in known and known[key].is_block and (value is None or isinstance(value, dict))


def _advise(translation: Translation | None, value: Any, settings: Mapping[str, Any]) -> Advice:
    try:
        return translation.advise(value, settings) if translation else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # a value that has no equivalent
        return None


def _without_given(advice: dict[str, Any], given: Mapping[str, str]) -> Advice:
    """Return the settings that no other key sets; or why none is to be written."""
    if all(value is None for value in advice.values()):
        return "it is empty"
    left = {name: value for name, value in advice.items() if name not in given}
    name = next(iter(advice))
    return left or (f"`{name}` is given, too" if given[name] == name else f"`{given[name]}` sets `{name}`, too")


def _remedy(translation: Translation, advice: Advice, known: Mapping[str, Setting]) -> str:
    """Return what to do about a key of another tool."""
    if isinstance(advice, str):
        return f"remove it: {advice}"
    remark = f" ({translation.remark})" if translation.remark else ""
    lines = {name: _line(name, value) for name, value in (advice or {}).items()}
    if lines and all(lines.values()):
        return f"write {' and '.join(f'`{line}`' for line in lines.values())}{remark}"
    name = next(iter(lines or translation.ours))
    return f"use `{name}` instead{remark or f' ({known[name].expected})'}"


def _line(key: str, value: Any) -> str | None:
    """Return a line of YAML; None if the value is too long for a message."""
    try:
        text = as_yaml(redacted(value))
    except (RecursionError, ValueError):  # ValueError: an integer of over 4,300 digits
        return None
    return f"{key}: {text}" if len(text) <= _LONGEST_VALUE else None


def _similar(path: tuple[str, ...], known: Mapping[str, Setting]) -> list[str]:
    """Return settings of the same name in another case or in other blocks, or a similar one in the same block."""
    *blocks, name = path
    if same := [other for other in known if other.lower() == ".".join(path).lower()]:
        return same
    prefix = "".join(f"{block}." for block in blocks)
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    siblings = [other.removeprefix(prefix) for other in known if other.rpartition(".")[0] == ".".join(blocks)]
    return elsewhere or [prefix + sibling for sibling in difflib.get_close_matches(name, siblings, n=1)]


def _known_keys(block: str, known: Mapping[str, Setting]) -> str:
    names = sorted(key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == block)
    return f"Known keys{f' of `{block}`' if block else ''}: {', '.join(names)}."


def _listed(keys: Sequence[str] | Mapping[str, Any]) -> str:
    return " or ".join(f"`{key}`" for key in keys)


def _shortened(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]} ..."
