"""Read and validate a file of coding rules (TOML); docs/icd10.md documents the format."""

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from model.errors import UserError
from utils.icd10.answers import Diagnosis
from utils.icd10.code_sets import CodeSet
from utils.icd10.codes import CODE_PATTERN, ROLES, Cim10Entry, Cim10Table
from utils.icd10.people import FEMALE, MALE
from utils.icd10.rule_kinds import (
    Ancestors,
    Case,
    Condition,
    Count,
    Dagger,
    Distinct,
    Exclude,
    Listed,
    Needs,
    NotAs,
    Person,
    PersonCase,
    Selection,
    Types,
)

GUIDE = Path(__file__).with_name("guide_rules.toml")
FORBIDDEN, TO_CHECK = SEVERITIES = ("forbidden", "to check")
_CODES = 'codes such as "A34 C51-C58 E11?0", or an entry of [sets] such as "@name"'
_EXAMPLE = '"ROLE:CODE ..." and perhaps sex=M, age=40, such as "DP:Z511 DR:C509 DAS:W19/2 sex=F"'
_ITEM = re.compile(rf"({'|'.join(ROLES)}):({CODE_PATTERN})(?:/([0-4-]))?")
_Value = TypeVar("_Value")


class Example(NamedTuple):
    """A stay: its diagnoses, `sex` and `age` if given, and the entries of its codes that the table has."""

    text: str
    coding: list[Diagnosis]
    facts: dict[str, str]
    entries: list[Cim10Entry]


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule of a file.

    Attributes:
        name: its key in the file.
        condition: what it checks.
        severity: FORBIDDEN or TO_CHECK.
        title: what breaks it (the plural, for tables of counts).
        reference: where it is documented.
        years: first and last year of discharge; None for no end.
        breaks: a stay that breaks it.
        passes: a stay to which it applies and that does not break it.
    """

    name: str
    condition: Condition
    severity: str
    title: str
    reference: str
    years: tuple[int, int | None]
    breaks: Example
    passes: Example

    def is_valid(self, year: int | None) -> bool:
        """Return whether the rule is valid in a year; for None, whether it has no end."""
        first, last = self.years
        return last is None if year is None else first <= year <= (last or year)

    def example_table(self) -> Cim10Table:
        """Return a table of the codes of both examples."""
        return Cim10Table({entry.code: entry for entry in (*self.breaks.entries, *self.passes.entries)}.values())


def read_rules(path: Path) -> tuple[str, list[Rule]]:
    """Return the version and the rules of a file.

    Raises:
        UserError: the file cannot be read, an entry is wrong, or an example is not what it is an example of.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--rules {path}: cannot be read ({error.strerror}); check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeError, RecursionError) as error:
        raise UserError(f"--rules {path} is not a valid TOML file: {' '.join(str(error).split())[:200]}.") from None
    file = _Block(str(path), content, {})
    version = file.take("version", 'a text such as "2026.1"', _text)
    sets: dict[str, CodeSet] = {}
    no_sets: dict[str, Any] = {}
    for name, text in file.take("sets", "a table of sets of codes", _mapping, no_sets).items():
        sets[name] = _Block(f"{path}, [sets]", {name: text}, {}).codes(name)
    rules = file.take("rules", "a table for each rule, [rules.NAME]", _mapping)
    file.finish()
    return version, [_read_rule(_Block(f"{path}, rule {name}", block, sets), name) for name, block in rules.items()]


class _Block:
    """The keys of a table of the file, each of which is taken once.

    Args:
        where: the file and the rule, for messages.
        content: what the file has here.
        sets: named sets of codes.
        prefix: of the keys in messages.
    """

    def __init__(self, where: str, content: Any, sets: Mapping[str, CodeSet], prefix: str = "") -> None:
        if not isinstance(content, dict):
            raise UserError(f"{where}: found {_shown(content)}, expected a table of keys.")
        self._where, self._content, self._sets, self._prefix = where, dict(content), sets, prefix
        self._taken: list[str] = []

    def error(self, key: str, found: str, expected: str) -> UserError:
        return UserError(f"{self._where}, key {self._prefix}{key}: found {found}, expected {expected}.")

    def take(self, key: str, expected: str, read: Callable[[Any], _Value], *default: _Value) -> _Value:
        """Return the value of a key; `read` raises ValueError for a wrong one."""
        self._taken.append(key)
        if key not in self._content:
            if default:
                return default[0]
            raise self.error(key, "nothing", expected)
        value = self._content.pop(key)
        try:
            return read(value)
        except ValueError as error:
            wrong = str(error)  # the part of the text that is wrong
            part = (
                f" ({wrong} is neither a code nor a range)"
                if wrong and isinstance(value, str) and value != wrong
                else ""
            )
            raise self.error(key, _shown(value) + part, expected) from None

    def choice(self, key: str, options: tuple[str, ...], *default: str | None) -> Any:
        return self.take(key, " or ".join(f'"{option}"' for option in options), _one_of(options), *default)

    def codes(self, key: str, *default: CodeSet | None) -> Any:
        return self.take(key, _CODES, self._code_set, *default)

    def _code_set(self, value: Any) -> CodeSet:
        name = _text(value)
        return self._sets[_one_of(tuple(self._sets))(name[1:])] if name.startswith("@") else CodeSet(name)

    def pair(self, value: Any) -> tuple[CodeSet, CodeSet]:
        one, other = map(self._code_set, _list(value))
        return one, other

    def block(self, key: str, value: Any) -> "_Block":
        return _Block(self._where, value, self._sets, f"{self._prefix}{key}.")

    def finish(self) -> None:
        """Raise UserError if a key was not taken."""
        if self._content:
            key = next(iter(self._content))
            near = difflib.get_close_matches(key, self._taken, 1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise self.error(key, "a key that is not known here", f"one of {', '.join(self._taken)}{hint}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _one_of(options: tuple[Any, ...]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or value not in options:
            raise ValueError
        return value

    return read


def _several(read: Callable[[Any], _Value]) -> Callable[[Any], tuple[_Value, ...]]:
    return lambda value: tuple(map(read, _list(value)))


def _years(value: Any) -> tuple[int, int | None]:
    found = re.fullmatch(r"(\d{4})-(\d{4})?", _text(value))
    if not found or (found[2] and found[2] < found[1]):
        raise ValueError
    return int(found[1]), int(found[2]) if found[2] else None


def _age(value: Any) -> int:
    return int(_one_of(tuple(range(131)))(value))


def _example(value: Any) -> Example:
    coding, facts, entries = [], {}, []
    for part in _text(value).split():
        if fact := re.fullmatch(r"(sex)=([MF])|(age)=(\d{1,3})", part):
            facts[fact[1] or fact[3]] = fact[2] or fact[4]
        elif item := _ITEM.fullmatch(part):
            coding.append(Diagnosis(item[1], item[2], item[2]))
            entries += [Cim10Entry(item[2], int(item[3] or 0), item[2])] if item[3] != "-" else []
        else:
            raise ValueError(part)
    return Example(value, coding, facts, entries)


def _read_rule(block: _Block, name: str) -> Rule:
    kind = block.choice("kind", tuple(_KINDS))
    rule = Rule(
        name,
        _KINDS[kind](block),
        block.choice("severity", SEVERITIES),
        block.take("title", "a text", _text),
        block.take("reference", "the text where the rule is documented", _text),
        block.take("years", '"FIRST-" or "FIRST-LAST", such as "2009-2018"', _years),
        block.take("breaks", _EXAMPLE, _example),
        block.take("passes", _EXAMPLE, _example),
    )
    block.finish()
    table = rule.example_table()
    for key, example, expected in (
        ("breaks", rule.breaks, "a stay that breaks the rule"),
        ("passes", rule.passes, "a stay to which the rule applies and that does not break it"),
    ):
        codes = rule.condition.check(Case.build(example.coding, table, example.facts))
        if codes is None or bool(codes) != (key == "breaks"):
            raise block.error(key, _shown(example.text), expected)
    return rule


# --- Parameters of the kinds ------------------------------------------------------------------------------------------


def _count(block: _Block) -> Count:
    role = block.choice("role", ROLES[:2])
    at_least = block.take("at_least", "1", _one_of((1,)), 0)
    at_most = block.take("at_most", "1", _one_of((1,)), None)
    if (at_least == 0) == (at_most is None):
        raise block.error("at_least", "both or none of at_least and at_most", "one of them")
    return Count(role, at_least, at_most)


def _needs(block: _Block) -> Needs:
    needed = block.block("needs", block.take("needs", 'a table such as { role = "DR" }', _mapping))
    condition = Needs(_selection(block), _selection(needed), block.codes("if_table_has", None))
    needed.finish()
    return condition


def _selection(block: _Block) -> Selection:
    role = block.choice("role", ROLES, None)
    codes, exceptions = block.codes("codes", None), block.codes("except", None)
    if role is None and codes is None:
        raise block.error("codes", "neither a role nor codes", _CODES)
    return Selection(role, codes, exceptions)


def _person(block: _Block) -> Person:
    cases = []
    for number, content in enumerate(block.take("cases", "a list of tables { sex or age, codes }", _list), start=1):
        case = block.block(f"cases {number}", content)
        sex = case.choice("sex", (MALE, FEMALE), None)
        ages = [case.take(key, "an age in years", _age, None) for key in ("age_from", "age_below")]
        if sex is None and ages == [None, None]:
            raise case.error("sex", "nothing", 'a sex ("M" or "F"), age_from or age_below')
        cases.append(PersonCase(case.codes("codes"), sex, *ages))
        case.finish()
    return Person(tuple(cases))


_PAIRS = f"a list of pairs of sets of codes, each of {_CODES}"
_KINDS: dict[str, Callable[[_Block], Condition]] = {
    "listed": lambda block: Listed(),
    "types": lambda block: Types(
        block.choice("role", ROLES),
        frozenset(block.take("types", "a list of types 0 to 4", _several(_one_of(tuple(range(5)))))),
    ),
    "count": _count,
    "needs": _needs,
    "distinct": lambda block: Distinct(
        block.choice("role", ROLES), block.take("others", "a list of roles", _several(_one_of(ROLES)))
    ),
    "ancestors": lambda block: Ancestors(),
    "exclude": lambda block: Exclude(block.take("pairs", _PAIRS, _several(block.pair))),
    "person": _person,
    "not_as": lambda block: NotAs(block.choice("role", ROLES), block.codes("codes")),
    "dagger": lambda block: Dagger(block.codes("codes"), block.codes("causes")),
}
