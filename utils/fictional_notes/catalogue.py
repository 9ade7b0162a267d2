"""The diagnoses of fictional stays and the wordings that clinicians use for them (`common_codes.toml`)."""

import functools
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from utils.icd10.codes import Cim10Entry, Cim10Table, category, chapter
from utils.icd10.rules import guide_rules

_COMMON_CODES = Path(__file__).with_name("common_codes.toml")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A diagnosis with its wordings and findings in a note; the fields are documented in `common_codes.toml`."""

    code: str
    label: str
    written: tuple[str, ...]
    unseen: tuple[str, ...]
    kind: str
    type: int = 0
    sex: str = "FM"
    age: tuple[int, int] = (18, 95)
    group: str = ""
    dp: float = 0
    das: float = 0
    associated: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    absent: bool = False
    past: bool = False
    family: bool = False
    managed: tuple[str, ...] = ()
    drugs: tuple[str, ...] = ()
    measures: tuple[tuple[str, float, float], ...] = ()
    systems: tuple[str, ...] = ()
    service: str = "médecine polyvalente"
    scheduled: bool = False
    stay: tuple[int, int] = (3, 7)
    complaints: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    exam: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    care: tuple[str, ...] = ()
    rule_out: tuple[str, ...] = ()

    def may_be(self, role: str) -> bool:
        """Return whether the PMSI accepts its type as DP, DR or DAS."""
        return _is_allowed(role, self.code, self.type)


@functools.cache
def _is_allowed(role: str, code: str, kind: int) -> bool:
    return guide_rules().allows(role, Cim10Entry(code, kind, code))


@dataclass(frozen=True)
class Catalogue:
    """`common`: diagnoses by code. `others`: further main diagnoses of a table, of which only the label is known."""

    common: dict[str, Condition]
    others: tuple[Condition, ...] = ()


def load_catalogue(table: Cim10Table | None = None) -> Catalogue:
    """Load the common diagnoses. With a table, keep those in it with its labels and types, and add its other diagnoses.

    Raises:
        UserError: the table allows none of the common main diagnoses as DP.
    """
    common = {condition.code: condition for condition in _read_common_codes()}
    if table is None:
        return Catalogue(common)
    listed = {code: (condition, table.get(code)) for code, condition in common.items()}
    kept = {
        code: replace(condition, label=entry.label, type=entry.type)
        for code, (condition, entry) in listed.items()
        if entry and entry.type != 3
    }
    if not any(condition.dp and condition.may_be("DP") for condition in kept.values()):
        raise UserError(
            f"The CIM-10 table ({len(table)} codes) allows none of the common main diagnoses of fictional stays "
            "(J189, I639, S7200...) as DP; give the complete table of ATIH."
        )
    return Catalogue(kept, _others(table, common))


def _read_common_codes() -> list[Condition]:
    with _COMMON_CODES.open("rb") as file:
        records = tomllib.load(file)
    return [_condition(code, record) for code, record in records.items()]


def _condition(code: str, record: dict[str, Any]) -> Condition:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    fields["measures"] = tuple((name, *span) for name, span in record.get("measures", {}).items())
    return Condition(code=code, **{"group": category(code), **fields})


# --- Main diagnoses of a table that are not common codes --------------------------------------------------------------

# Chapters whose codes suit any adult, so that the label alone is enough to write a note.
_CHAPTERS = {"I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XVIII"}
# Labels that are vague or specific to children and pregnancy; `(G01*)`, `(A18.0)`: manifestations of another disease.
_EXCLUDED_LABEL = re.compile(
    r"autre|ailleurs| -|\([A-Z]\d|\*|sièges? |précisée?s\b"
    r"|nouveau-né|enfan|infanti|juvéni|congénit|néonat|foet|gross|puerp|obstétr|matern",
    re.IGNORECASE,
)
_SEX_OF_RANGES = (
    ("C51", "C58", "F"),
    ("C60", "C63", "M"),
    ("D06", "D06", "F"),
    ("D25", "D28", "F"),
    ("D29", "D29", "M"),
    ("E28", "E28", "F"),
    ("E29", "E29", "M"),
    ("N40", "N51", "M"),
    ("N70", "N98", "F"),
)
_MAX_LABEL = 90  # characters


def _others(table: Cim10Table, common: dict[str, Condition]) -> tuple[Condition, ...]:
    groups = {category(condition.code): condition.group for condition in common.values()}
    phrases = [_words(bare(wording)) for item in common.values() for wording in (*item.written, *item.unseen)]
    others = []
    for entry in table:
        if entry.code not in common and _label_is_usable(entry):
            label = _words(entry.label)
            # A label that contains the wording of a common diagnosis would be read as that diagnosis.
            if not any(phrase in label for phrase in phrases):
                others.append(_condition_of_label(entry, groups))
    return tuple(others)


def _words(text: str) -> str:
    """Return the lower-case words with a space before and after each, so that `in` matches whole words only."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def _label_is_usable(entry: Cim10Entry) -> bool:
    return (
        entry.type == 0
        and chapter(entry.code) in _CHAPTERS
        and len(entry.label) <= _MAX_LABEL
        and not _EXCLUDED_LABEL.search(entry.label)
    )


def _condition_of_label(entry: Cim10Entry, groups: dict[str, str]) -> Condition:
    code = category(entry.code)
    phrase = re.sub(r"\s*(\([^)]*\)|\[[^]]*\])|, sans précision", "", entry.label).rstrip(" ,")
    if not phrase[:2].isupper():
        phrase = phrase[:1].lower() + phrase[1:]
    return Condition(
        code=entry.code,
        label=entry.label,
        written=(phrase,),
        unseen=(phrase,),
        kind="event",
        sex=next((sex for first, last, sex in _SEX_OF_RANGES if first <= code <= last), "FM"),
        age=(30, 90),
        group=groups.get(code, code),
        sessions=("Z511", "Z5101") if "C00" <= code <= "C97" else (),
        history=(
            "Symptomatologie évoluant depuis {2-10} jours, sans traitement spécifique avant l'admission.",
            "Aggravation progressive malgré le traitement prescrit en ville il y a {3-9} jours.",
        ),
        tests=("Explorations réalisées selon le protocole du service, résultats joints au dossier.",),
        care=("Traitement adapté débuté dès l'admission.", "Surveillance clinique et biologique régulière."),
    )


# --- Wordings ---------------------------------------------------------------------------------------------------------

_ARTICLES = ("un", "une", "des")


def bare(written: str) -> str:
    """Return a wording without its article: `une HTA` -> `HTA`."""
    article, _, rest = written.partition(" ")
    return rest if article in _ARTICLES else written


def wording_forms(written: str) -> dict[str, str]:
    """Return the forms used by the templates: nu (HTA), un (une HTA), d_un (d'une HTA), de (d'HTA)."""
    phrase = bare(written)
    # "hernie" is the only wording with an aspirated h.
    elided = phrase[0].lower() in "aàâeéèêiîoôœuûh" and not phrase.startswith("hernie")
    without_article = ("d'" if elided else "de ") + phrase
    counted = written.startswith(("un ", "une "))
    return {
        "nu": phrase,
        "un": written,
        "d_un": f"d'{written}" if counted else without_article,
        "de": without_article,
    }
