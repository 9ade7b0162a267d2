"""The scores of an evaluation, as text and as an HTML page."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.icd10.codes import CHAPTER_NAMES
from utils.icd10.metrics import NO_CHAPTER

if TYPE_CHECKING:
    from utils.reports.charts import Figure

LEVEL_NAMES = {"exact": "exact code", "category": "category (3 characters)"}
RULE_NAMES = {
    "unknown": "codes that are not in the table",
    "category": "codes with children, which must be more specific",
    "closed": "codes that are closed",
    "forbidden_DP": "main diagnoses that are not allowed as DP",
    "forbidden_DR": "related diagnoses that are not allowed as DR",
    "forbidden_DAS": "associated diagnoses that are not allowed as DAS",
    "no_DP": "notes without a DP",
    "several_DP": "notes with several DP",
    "several_DR": "notes with several DR",
}
COUNT_NAMES = {
    "notes": "notes",
    "missing_predictions": "notes without a prediction (scored as no codes)",
    "answers_without_code": "answers without any code",
    "codes_without_role": "predicted codes without a role",
    "repeated_codes": "codes given more than once (counted once)",
    "unexpected_predictions": "predictions without a gold note (ignored)",
}
_CHAPTER_TITLES = CHAPTER_NAMES | {NO_CHAPTER: "Outside every chapter"}
ROLE_NAMES = {"DP": "DP, main diagnosis", "DR": "DR, related diagnosis", "DAS": "DAS, associated diagnoses"}

_NAMED = 20  # notes without a prediction that the summary names
_MEASURES = {"precision": "precision", "recall": "recall", "f1": "F1"}


def score_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the main table: a measure's name, then its score and interval for each level."""
    rows = [
        (f"{mean} {name}", *(_score(result[level], mean, key) for level in LEVEL_NAMES))
        for mean in ("micro", "macro")
        for key, name in _MEASURES.items()
    ]
    exact = (
        _with_interval(result[level]["exact_match"], result[level]["intervals"]["exact_match"]) for level in LEVEL_NAMES
    )
    return [*rows, ("exact match of the set", *exact)]


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the scores should know, one sentence per fact."""
    counts = result["counts"]
    lines = [f"{name}: {counts[key]:,}" for key, name in COUNT_NAMES.items() if key != "notes" and counts[key]]
    if counts["missing_ids"]:
        lines.append(f"without a prediction: {', '.join(counts['missing_ids'][:_NAMED])}")
    rates = result["rates"].items()
    return lines + [f"{RULE_NAMES[name]}: {rate['count']:,} of {rate['of']:,}" for name, rate in rates if rate["count"]]


def _score(scores: Mapping[str, Any], mean: str, name: str) -> str:
    return _with_interval(scores[mean][name], scores["intervals"][mean][name])


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} {_interval(interval)}"


def _interval(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def html_page(result: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Return the page of an evaluation.

    Args:
        result: what `evaluate` of `utils.evaluate_icd10` returns.
        about: facts to show above the scores, such as the files and the checkpoint.
    """
    from utils.reports.pages import render_page  # loads matplotlib and jinja2

    counts, exact = result["counts"], result["exact"]
    codes = f"{exact['gold']:,} in gold, {exact['predicted']:,} predicted, {exact['correct']:,} of them correct"
    return render_page(
        "evaluation.html",
        title="ICD-10 coding: evaluation",
        about={**about, "Notes": f"{counts['notes']:,}", "Codes": codes},
        cards=_cards(result),
        levels=list(LEVEL_NAMES.values()),
        score_header=("", *LEVEL_NAMES.values()),
        score_rows=score_rows(result),
        charts=_charts(result),
        rules=[
            (RULE_NAMES[name], f"{rate['count']:,} of {rate['of']:,}", f"{100 * rate['rate']:.1f} %")
            for name, rate in result["rates"].items()
        ],
        errors=[
            {"title": title, "rows": [(error["code"], error["label"], f"{error['notes']:,}") for error in errors]}
            for title, errors in (
                ("Codes most often missed", result["errors"]["missed"]),
                ("Codes most often added", result["errors"]["added"]),
            )
        ],
        counts=[(name, f"{counts[key]:,}") for key, name in COUNT_NAMES.items()],
        missing=", ".join(counts["missing_ids"]),
    )


def _cards(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the four scores that sum up the evaluation."""
    exact, category = result["exact"], result["category"]
    chosen = (
        ("Micro-F1, exact code", exact["micro"]["f1"], exact["intervals"]["micro"]["f1"]),
        ("Micro-F1, category", category["micro"]["f1"], category["intervals"]["micro"]["f1"]),
        ("Precision, exact code", exact["micro"]["precision"], exact["intervals"]["micro"]["precision"]),
        ("Recall, exact code", exact["micro"]["recall"], exact["intervals"]["micro"]["recall"]),
        ("Notes with all codes right", exact["exact_match"], exact["intervals"]["exact_match"]),
    )
    return [{"name": name, "value": f"{value:.3f}", "interval": _interval(bounds)} for name, value, bounds in chosen]


def _charts(result: Mapping[str, Any]) -> "dict[str, Figure]":
    training = result["counts"]["training_notes"]
    notes = "gold notes" if training is None else f"of {training:,} training notes"
    return {
        "by_chapter": _chart(
            result, "by_chapter", "F1 by chapter of the CIM-10", lambda key: f"{key}  {_CHAPTER_TITLES[key]}"
        ),
        "by_role": _chart(result, "by_role", "F1 by role", ROLE_NAMES.__getitem__),
        "by_frequency": _chart(
            result,
            "by_frequency",
            f"F1 by how many {notes} have the code",
            lambda key: f"{key} notes",
        ),
    }


def _chart(result: Mapping[str, Any], key: str, title: str, name: Callable[[str], str]) -> "Figure":
    """Return a chart of micro-F1 by group.

    Args:
        result: of the evaluation.
        key: of the groups in `result`.
        title: of the chart.
        name: turns a group's key into its name.
    """
    from utils.reports.charts import Bar, BarGroup, Figure, bar_chart

    # In the order of the exact codes' groups, then of those that only categories have.
    keys = dict.fromkeys(
        group for level in LEVEL_NAMES for group, scores in result[level][key].items() if scores["gold"]
    )
    groups = []
    for group in keys:
        found = [result[level][key].get(group) for level in LEVEL_NAMES]
        bars = [Bar(each["micro"]["f1"], *each["intervals"]["micro"]["f1"]) if each else None for each in found]
        gold = " / ".join(dict.fromkeys(f"{each['gold']:,}" if each else "0" for each in found))
        groups.append(BarGroup(name(group), f"({gold})", bars))
    return Figure(title, "", bar_chart(key, title, groups))
