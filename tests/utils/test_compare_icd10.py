"""Comparison of the scores of several evaluations."""

import json
from pathlib import Path

import pytest

from model.errors import UserError
from utils.compare_icd10 import comparison, read_scores


def test_table_shows_the_scores_of_each_file(tmp_path: Path) -> None:
    micro = {"f1": 0.5, "precision": 0.25, "recall": 0.75}
    result = {"exact": {"micro": micro, "exact_match": 0.1}, "category": {"micro": {"f1": 0.625}}}
    (tmp_path / "a.json").write_text(json.dumps(result), encoding="utf-8")
    header, base, tuned = comparison({"base": read_scores(tmp_path / "a.json"), "b": [1.0] * 5}).splitlines()
    assert header.split("  ")[-5:] == ["micro-F1", "precision", "recall", "category F1", "exact match"]
    assert base.split() == ["base", "0.500", "0.250", "0.750", "0.625", "0.100"]
    assert tuned.split() == ["b"] + ["1.000"] * 5
    assert len(header) == len(base) == len(tuned)


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"exact": {"micro": 1}, "category": {}}'])
def test_file_without_scores_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json"):
        read_scores(tmp_path / "a.json")
