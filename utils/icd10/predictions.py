"""Read gold and predicted codes from jsonl files.

Gold rows are instruct rows whose last message contains the codes. Prediction rows are `{"id", "answer"}` or
`{"id", "codes"}`, with codes as `"I10"` or `{"role": "DAS", "code": "I10"}`. Rows without id are identified by their
line number, from 1; predictions may count from 0.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.icd10.answers import Diagnosis, parse_answer
from utils.icd10.codes import CODE_PATTERN, ROLES, normalize_code
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rows_by_id import last_answer, read_by_id

NOT_RECORDED = "not recorded"


class Prediction(NamedTuple):
    """The predicted diagnoses of a note; `repeated` is the number of repetitions of codes in the answer."""

    diagnoses: list[Diagnosis]
    repeated: int = 0

    @classmethod
    def of_answer(cls, answer: str) -> "Prediction":
        """Parse a model's answer."""
        diagnoses = parse_answer(answer)
        mentions = Counter(
            normalize_code(found) for found in re.findall(rf"\b{CODE_PATTERN}(?!\w)", answer, re.IGNORECASE)
        )
        return cls(diagnoses, sum(max(0, mentions[item.code] - 1) for item in diagnoses))

    @classmethod
    def of_codes(cls, diagnoses: Sequence[Diagnosis]) -> "Prediction":
        """Build a prediction from a list of codes."""
        return cls(list(diagnoses), len(diagnoses) - len({item.code for item in diagnoses}))


def read_gold(path: Path) -> dict[str, list[Diagnosis]]:
    """Return the diagnoses of each instruct row by row id.

    Raises:
        UserError: the answer of a row contains no code, or an id appears twice.
    """
    return read_by_id(path, _gold_diagnoses)


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Return the prediction of each row by row id; `answer` takes precedence over `codes`.

    Raises:
        UserError: a row has neither `answer` nor `codes`, or an id appears twice.
    """
    return read_by_id(path, _prediction)


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
    """Return the checkpoint of a predictions file and whether its codes were constrained to the CIM-10 table."""
    origin = read_origin(predictions)
    answers = NOT_RECORDED
    if "cim10" in origin:
        answers = f"{'not ' if origin['cim10'] is None else ''}constrained to codes of the CIM-10 table"
    return {"Checkpoint": str(origin.get("checkpoint", NOT_RECORDED)), "Answers": answers}


def _gold_diagnoses(row: Row) -> list[Diagnosis]:
    diagnoses = parse_answer(last_answer(row))
    if not diagnoses:
        raise SkippedRowError(
            "no code in the last message; expected the assistant's answer, such as `... : label (I10)`"
        )
    return diagnoses


def _prediction(row: Row) -> Prediction:
    answer, codes = row.get("answer"), row.get("codes")
    if isinstance(answer, str):
        return Prediction.of_answer(answer)
    if isinstance(codes, list):
        return Prediction.of_codes([_diagnosis(code) for code in codes])
    raise SkippedRowError("neither an `answer` string nor a `codes` list", f"keys: {', '.join(row)}")


def _diagnosis(item: Any) -> Diagnosis:
    role, code = (item.get("role"), item.get("code")) if isinstance(item, dict) else (None, item)
    if not isinstance(code, str) or not normalize_code(code) or role not in (*ROLES, None):
        raise SkippedRowError('a code that is neither "I10" nor {"role": "DP", "code": "I10"}', json.dumps(item)[:80])
    return Diagnosis(role, normalize_code(code))
