"""Read gold and predicted codes from jsonl files and tables.

Rows of jsonl: `{"id", "messages"}` (an instruct row, whose last message contains the codes), `{"id", "answer"}` or
`{"id", "codes"}`, with codes as `"I10"` or `{"role": "DAS", "code": "I10"}`. `codes` take precedence over `answer`: a
person edited them. Rows without id are identified by their line number, from 1; predictions may count from 0.

Tables (csv, tsv, parquet, xlsx): codes as `utils.prepare_icd10_data` reads them, or as `utils.predict_icd10` writes
them (`id`, `role`, `code`), or one row per stay with `id` and `answer`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from finetune.data.keys import key_names
from finetune.data.rows import is_identifier
from model.errors import UserError
from utils.icd10.answers import Diagnosis, parse_answer
from utils.icd10.cells import identifier
from utils.icd10.codes import CODE_PATTERN, ROLES, normalize_code, respell, split_codes
from utils.icd10.headline import labels
from utils.icd10.mapping import TableMapping, find_columns, matching_columns, read_mapping
from utils.icd10.people import People
from utils.icd10.roles import UNIT_DP, read_statuses
from utils.icd10.stays import WITHOUT_CODE, LeftOut, read_codes, read_header
from utils.tables.encodings import AUTO
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.read_table import counts_lines, has_fixed_columns, read_table
from utils.tables.rows_by_id import last_answer, read_by_id

NOT_RECORDED = "not recorded"
NOTHING_MORE = "nothing_more"  # the key, next to the codes, of the probability that there is no other code
ID_COLUMNS = ("id", "visit_occurence_id", "visit_occurrence_id", "stay")
NO_MAPPING = read_mapping(None)
_LONGEST_CODE = 20  # characters of a malformed one; more is text
_NO_ROLE = "none"  # of a blank status
_NOT_A_CODE = 'a code that is neither "I10" nor {"role": "DP", "code": "I10"}'
FACT_COLUMNS = {  # of gold
    "patient": ("patient", "patient_id", "person_id", "ipp"),
    "specialty": ("specialty", "unit"),
    "year": ("year", "discharge", "date"),
    "documents": ("documents",),
    "sex": ("sex",),  # for the rules
    "age": ("age",),
}


class Prediction(NamedTuple):
    """The diagnoses of a stay.

    `repeated` is the number of repetitions of codes, `edited` whether the codes of the row differ from its answer, and
    `facts` are what gold says about the stay: keys of FACT_COLUMNS, and `words`, the length of its question.
    `probability` is the model's for each code and NOTHING_MORE, `confidence` the calibrated one, and `decision` what
    `utils.predict_icd10 --auto` decided; all of them where they are known.
    """

    diagnoses: list[Diagnosis]
    repeated: int = 0
    edited: bool = False
    facts: Mapping[str, str] = MappingProxyType({})
    probability: Mapping[str, float] = MappingProxyType({})
    confidence: Mapping[str, float] = MappingProxyType({})
    decision: str | None = None

    def chances(self, which: "Probability") -> Mapping[str, float]:
        """Return the probabilities of one kind, by code."""
        return self.probability if which == "probability" else self.confidence

    @classmethod
    def of_answer(cls, answer: str) -> "Prediction":
        """Parse a model's answer."""
        diagnoses = parse_answer(answer)
        mentions = Counter(
            normalize_code(found) for found in re.findall(rf"\b{CODE_PATTERN}(?!\w)", respell(answer), re.IGNORECASE)
        )
        return cls(diagnoses, sum(max(0, mentions[item.code] - 1) for item in diagnoses))

    @classmethod
    def of_codes(cls, diagnoses: Sequence[Diagnosis]) -> "Prediction":
        """Build a prediction from a list of codes."""
        return cls(list(diagnoses), len(diagnoses) - len({item.code for item in diagnoses}))


Probability = Literal["probability", "confidence"]


def gold_has(gold: Prediction, item: Diagnosis) -> bool:
    """Return whether gold has a code in the role of `item`, or without naming a role."""
    return not {(item.role, item.code), (None, item.code)}.isdisjoint((own.role, own.code) for own in gold.diagnoses)


def read_gold(path: Path, encoding: str = AUTO, mapping: TableMapping = NO_MAPPING) -> dict[str, Prediction]:
    """Return the diagnoses of each stay by id.

    Args:
        path: jsonl file or table.
        encoding: of a table.
        mapping: columns and roles of a table that the user gave.

    Raises:
        UserError: a stay has no code, an id appears twice, or the file cannot be read.
    """
    if not has_fixed_columns(path):
        return read_by_id(path, _gold_row)
    gold = _read_table(path, encoding, mapping)
    if empty := [stay for stay, coding in gold.items() if not coding.diagnoses]:
        raise UserError(f"{path}: no code for stay {empty[0]!r}; expected at least one per stay.")
    return gold


def read_predictions(path: Path, encoding: str = AUTO, mapping: TableMapping = NO_MAPPING) -> dict[str, Prediction]:
    """Return the prediction of each stay by id; `codes` take precedence over `answer`. Arguments as in `read_gold`.

    Raises:
        UserError: a row has neither `answer` nor `codes`, an id appears twice, or the file cannot be read.
    """
    return _read_table(path, encoding, mapping) if has_fixed_columns(path) else read_by_id(path, _prediction)


def require_columns(mapping: TableMapping, paths: Sequence[Path], encoding: str) -> None:
    """Raise UserError if no table has a column that the user gave."""
    tables = {path: read_header(path, encoding) for path in paths if has_fixed_columns(path)}
    for field, pattern in mapping.both.items():
        if not any(matching_columns(pattern, header) for header in tables.values()):
            where = " or ".join(map(str, tables)) or "a table: rows of jsonl have fixed keys"
            raise UserError(f"--columns: no column {pattern!r} for {field} in {where}.")


def origin_path(predictions: Path) -> Path:
    """Return the path of the JSON file in which `utils.predict_icd10` records the checkpoint and the settings."""
    return predictions.with_suffix(".about.json")


def read_origin(predictions: Path) -> dict[str, Any]:
    """Return the recorded origin of a predictions file, or an empty dict if there is none."""
    try:
        origin = json.loads(origin_path(predictions).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def describe_origin(predictions: Path) -> dict[str, str]:
    """Return the run, checkpoint and date of predictions, and whether their codes were constrained to the CIM-10 table.

    The run is left out if the model is not of one.
    """
    origin = read_origin(predictions)
    answers = NOT_RECORDED
    if "cim10" in origin:
        answers = f"{'not ' if origin['cim10'] is None else ''}constrained to codes of the CIM-10 table"
    run = {"Run": str(origin["run_name"])} if origin.get("run_name") else {}
    checkpoint, date = (str(origin.get(key, NOT_RECORDED)) for key in ("checkpoint", "answered"))
    return run | {"Checkpoint": checkpoint, "Answers": answers, "Answered": date}


def _gold_row(row: Row) -> Prediction:
    coding = _prediction(row if row.keys() & {"answer", "codes"} else {"answer": last_answer(row)})
    if not coding.diagnoses:
        raise SkippedRowError(
            "no code in the last message; expected the assistant's answer, such as `... : label (I10)`"
        )
    facts = _facts(row)
    if "messages" in row:
        asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
        facts["words"] = str(sum(len(text.split()) for text in asked if isinstance(text, str)))
    return coding._replace(facts=facts)


def _facts(row: Row) -> dict[str, str]:
    """Return what scores can be grouped by, without any text of the note."""
    facts = {}
    for fact, columns in FACT_COLUMNS.items():
        value = next((row[name] for name in columns if row.get(name) not in (None, "")), None)
        if isinstance(value, str | int | float):
            facts[fact] = str(value).strip()
    if year := re.search(r"(?<!\d)(?:19|20)\d{2}(?!\d)", facts.get("year", "")):
        facts["year"] = year[0]
    return facts


def _prediction(row: Row) -> Prediction:
    answer, codes = row.get("answer"), row.get("codes")
    if isinstance(codes, list):
        given = Prediction.of_codes([found for code in codes for found in _diagnoses(code)])
        given = given._replace(**_chances(codes, row.get(NOTHING_MORE), row.get("decision")))
        if not isinstance(answer, str):
            return given
        answered = Prediction.of_answer(answer)
        same = labels(answered.diagnoses) == labels(given.diagnoses)
        return given._replace(repeated=answered.repeated, edited=not same)
    if isinstance(answer, str):
        return Prediction.of_answer(answer)
    if "messages" in row:
        return Prediction.of_answer(last_answer(row))
    raise SkippedRowError("neither an `answer` string nor a `codes` list", f"keys: {key_names(row)}")


def _chances(codes: Sequence[Any], nothing_more: Any, decision: Any) -> dict[str, Any]:
    """Return the fields `probability`, `confidence` and `decision` of a prediction.

    Args:
        codes: rows with a `code` and what `utils.predict_icd10` writes about it, or only codes.
        nothing_more: the same about NOTHING_MORE.
        decision: about the stay.

    Raises:
        SkippedRowError: a probability is not a number from 0 to 1.
    """
    of_codes = [(normalize_code(respell(str(row["code"]))), row) for row in codes if isinstance(row, dict)]
    named = [*of_codes, (NOTHING_MORE, nothing_more if isinstance(nothing_more, dict) else {})]
    chances = {
        kind: {code: _chance(row[kind]) for code, row in named if row.get(kind) not in (None, "")}
        for kind in get_args(Probability)
    }
    return {**chances, "decision": str(decision) if decision else None}


def _chance(value: Any) -> float:
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise SkippedRowError("a probability or confidence that is not a number from 0 to 1")
    return number


def _diagnoses(item: Any) -> list[Diagnosis]:
    role, code = (item.get("role"), item.get("code")) if isinstance(item, dict) else (None, item)
    codes = split_codes(code) if isinstance(code, str) else []
    if not codes or any(len(found) > _LONGEST_CODE for found in codes):
        raise SkippedRowError(_NOT_A_CODE)
    return [Diagnosis(_role(role), found) for found in codes]


def _role(text: Any) -> str | None:
    """Return the role of a status such as DA or "Diagnostic principal", or None for an empty one."""
    status = "" if text is None else str(text).strip()
    if status in ("", "?"):
        return None
    try:
        role = read_statuses({status: 1}, {}, False)[status]
    except UserError:
        role = ""
    if role not in ROLES:
        found = f"role {status!r}; " if is_identifier(status) else ""
        raise SkippedRowError(_NOT_A_CODE, f"{found}the role is {', '.join(ROLES)} or nothing")
    return role


def _read_table(path: Path, encoding: str, mapping: TableMapping) -> dict[str, Prediction]:
    header = read_header(path, encoding)
    if not header:
        raise UserError(f"{path} is empty.")
    if "answer" in header and "codes" in header:
        raise UserError(f"{path} has columns `answer` and `codes`; remove one, or name the codes `role` and `code`.")
    if "answer" in header and "code" not in header:
        return _read_answers(path, encoding)
    columns = find_columns(path, "codes", header, mapping, rows_are_stays=True)
    left_out: list[LeftOut] = []
    people = People()
    codes, _, found = read_codes(path, columns, {"": _NO_ROLE} | mapping.roles, encoding, left_out, people)
    if unusable := [row for row in left_out if row.reason != WITHOUT_CODE]:
        raise UserError(f"{unusable[0].where}: {unusable[0].reason}; expected a code of a stay.")
    facts: dict[str, dict[str, str]] = {}
    confident: dict[str, list[dict[str, Any]]] = {}  # lines of `utils.predict_icd10`
    for _, row in read_table(path, encoding):
        if isinstance(row, dict):
            stay = identifier(columns.get(row, "stay"))
            facts.setdefault(stay, _facts(row))
            lines = confident.setdefault(stay, [])
            if "confidence" in row and not columns.is_wide:
                code = {"code": columns.get(row, "code")}
                lines.append(code | {key: row.get(key) for key in ("confidence", "decision")})
    stays = {}
    for stay, rows in codes.items():
        if any(row.role == UNIT_DP for row in rows):
            raise UserError(f"{path}: stay {stay!r} has main diagnoses of units; use utils.prepare_icd10_data's rows.")
        diagnoses = [
            Diagnosis(None if row.role == _NO_ROLE else row.role, row.code)
            for row in rows
            if row.role in (*ROLES, _NO_ROLE)
        ]
        if any(len(item.code) > _LONGEST_CODE for item in diagnoses):
            raise UserError(f"{path}: stay {stay!r} has text in place of a code; name the columns with --columns.")
        try:
            chances = _chances(confident[stay], None, next((row["decision"] for row in confident[stay]), None))
        except SkippedRowError as skip:
            raise UserError(f"{path}: stay {stay!r}: {skip.reason}.") from None
        known = facts[stay]
        if stay in found.discharges:
            known["year"] = found.discharges[stay][:4]
        if stay in found.patients:
            known["patient"] = next(iter(found.patients[stay]))
        known |= {fact: str(value) for fact, value in people.facts(stay, found.discharges.get(stay)).items()}
        stays[stay] = Prediction.of_codes(diagnoses)._replace(facts=known, **chances)
    return stays


def _read_answers(path: Path, encoding: str) -> dict[str, Prediction]:
    """Read a table with one row per stay: `id` and `answer`."""
    stays: dict[str, Prediction] = {}
    for number, row in read_table(path, encoding):
        try:
            if not isinstance(row, dict):
                raise row
            stay = identifier(next((row[name] for name in ID_COLUMNS if name in row), None))
            if stay in stays:
                raise SkippedRowError(f"duplicate id {stay!r}; each row needs its own")
            stays[stay] = Prediction.of_answer(str(row["answer"] or ""))
        except SkippedRowError as skip:
            where = f"{path}, {'line' if counts_lines(path) else 'row'} {number}"
            raise UserError(f"{where}: {skip.reason}{f' ({skip.detail})' if skip.detail else ''}.") from None
    return stays
