"""Gold and predicted codes of notes, as files give them.

Gold rows are instruct rows, whose last message holds the codes. Prediction rows are `{"id", "answer"}` or
`{"id", "codes"}`, codes as `"I10"` or `{"role": "DAS", "code": "I10"}`. Rows without id are named by their line, from
1; predictions may count from 0 instead.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.icd10.answers import Diagnosis, parse_answer
from utils.icd10.codes import CODE_PATTERN, ROLES, normalise_code
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.named_rows import last_answer, read_named_rows

NOT_RECORDED = "not recorded"


class Prediction(NamedTuple):
    """What was predicted for a note; `repeated` is how many codes were given again."""

    diagnoses: list[Diagnosis]
    repeated: int = 0

    @classmethod
    def of_answer(cls, answer: str) -> "Prediction":
        """Reads a model's answer."""
        diagnoses = parse_answer(answer)
        mentions = Counter(
            normalise_code(found) for found in re.findall(rf"\b{CODE_PATTERN}(?!\w)", answer, re.IGNORECASE)
        )
        return cls(diagnoses, sum(max(0, mentions[item.code] - 1) for item in diagnoses))

    @classmethod
    def of_codes(cls, diagnoses: Sequence[Diagnosis]) -> "Prediction":
        """Takes a list of codes."""
        return cls(list(diagnoses), len(diagnoses) - len({item.code for item in diagnoses}))


def describe_origin(predictions: Path) -> dict[str, str]:
    """Return the checkpoint of a predictions file and whether its codes were limited to the CIM-10 table.

    `utils.predict_icd10` records both in `NAME.about.json`; without that file they are "not recorded".
    """
    try:
        about = json.loads(predictions.with_suffix(".about.json").read_text(encoding="utf-8"))
        checkpoint, limited = about.get("checkpoint", NOT_RECORDED), about["cim10"] is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"Checkpoint": NOT_RECORDED, "Answers": NOT_RECORDED}
    answers = "constrained to codes of the CIM-10 table" if limited else "not constrained to codes of the CIM-10 table"
    return {"Checkpoint": str(checkpoint), "Answers": answers}


def read_gold(path: Path) -> dict[str, list[Diagnosis]]:
    """The diagnoses of each instruct row, by its name.

    Raises:
        UserError: a row whose answer holds no code, or a name that stands twice.
    """
    return read_named_rows(path, _gold_diagnoses)


def read_predictions(path: Path) -> dict[str, Prediction]:
    """The predictions of each row, by its name; of a row with both, the answer counts.

    Raises:
        UserError: a row with neither answer nor codes, or a name that stands twice.
    """
    return read_named_rows(path, _prediction)


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
    raise SkippedRowError("neither an `answer` that is a text nor `codes` that are a list", f"keys: {', '.join(row)}")


def _diagnosis(item: Any) -> Diagnosis:
    role, code = (item.get("role"), item.get("code")) if isinstance(item, dict) else (None, item)
    if not isinstance(code, str) or not normalise_code(code) or role not in (*ROLES, None):
        raise SkippedRowError('a code that is neither "I10" nor {"role": "DP", "code": "I10"}', json.dumps(item)[:80])
    return Diagnosis(role, normalise_code(code))
