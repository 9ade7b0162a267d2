"""The scores of an evaluation, as text and as an HTML page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model.wording import counted
from utils.icd10.codes import CHAPTER_NAMES
from utils.icd10.headline import HEADLINE
from utils.icd10.metrics import FREQUENCY_BANDS, NO_CHAPTER
from utils.icd10.predictions import NOTHING_MORE
from utils.icd10.rule_report import TITLES
from utils.icd10.rules_file import FORBIDDEN, TO_CHECK

if TYPE_CHECKING:
    from utils.reports.charts import Figure

LEVEL_NAMES = {"exact": "exact code", "category": "category (3 characters)"}
_CODE_RATES = {
    "unknown": "codes that are not in the table",
    "category": "codes with children, which must be more specific",
    "closed": "codes that are closed",
}
RULE_KINDS = {"rates": TITLES[FORBIDDEN], "to_check": TITLES[TO_CHECK]}
COUNT_NAMES = {
    "notes": "notes",
    "missing_predictions": "notes without a prediction (scored as no codes)",
    "answers_without_code": "answers without any code",
    "edited_predictions": "predictions whose codes differ from their answer (the codes are scored)",
    "gold_codes_without_role": "gold codes without a role",
    "codes_without_role": "predicted codes without a role (wrong in role-aware scores)",
    "repeated_codes": "codes given more than once (counted once)",
    "unexpected_predictions": "predictions without a gold note (ignored)",
}
_CHAPTER_TITLES = {key: f"{key}  {name}" for key, name in CHAPTER_NAMES.items()} | {NO_CHAPTER: "outside every chapter"}
ROLE_NAMES = {"DP": "DP, main diagnosis", "DR": "DR, related diagnosis", "DAS": "DAS, associated diagnoses"}

CONFIDENCE_ROLES = {"DP": "DP", "DR": "DR", "DAS": "DAS", "?": "no role", NOTHING_MORE: "nothing more to code"}
CONFIDENCE_KINDS = {"probability": "of the model", "confidence": "calibrated"}
STAY_FACT_NAMES = {
    "specialty": "specialty",
    "year": "year",
    "documents": "number of documents",
    "words": "length of the question in words",
}

_STAY_SCORES = ("dp_accuracy", "role_micro_f1", "micro_f1")
_NAMED = 20  # notes without a prediction that the summary names
_COUNTED = {"precision": "precision", "recall": "recall", "micro_f1": "micro F1", "macro_f1": "macro F1"}
_MEASURES = {"precision": "precision", "recall": "recall", "f1": "F1"}


def score_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the main table: a measure's name, then its score and interval for each level."""
    by_level = [result[level] for level in LEVEL_NAMES]
    head = result["headline"]
    rows = [(HEADLINE["dp_accuracy"], *(_headline(head[name]) for name in ("dp_accuracy", "dp_category_accuracy")))]
    if head["role_micro_f1"]["score"] is not None:
        in_roles = [level["role_aware"] for level in by_level]
        rows += [
            ("role-aware micro F1", *(_score(scores, "micro", "f1") for scores in in_roles)),
            ("role-aware exact match", *map(_exact_match, in_roles)),
            *(
                (f"{role} micro F1", *(_score(level["by_role"][role], "micro", "f1") for level in by_level))
                for role in ("DR", "DAS")
                if head[f"{role.lower()}_f1"]["score"] is not None
            ),
        ]
    return [
        *rows,
        ("roles ignored:", *("" for _ in by_level)),
        *(
            (f"{mean} {name}", *(_score(scores, mean, key) for scores in by_level))
            for mean in ("micro", "macro")
            for key, name in _MEASURES.items()
        ),
        ("exact match of the set", *map(_exact_match, by_level)),
        *(
            (f"{mean} F1 as in Edin et al. 2023", *(_score(level["edin_2023"], mean, "f1") for level in by_level))
            for mean in ("micro", "macro")
        ),
    ]


def uncertainty(result: Mapping[str, Any]) -> str:
    """Return what the intervals are of."""
    counts = result["counts"]
    notes = counted(counts["notes"], "stay")
    if counts["patients"] is None:
        return f"95 % intervals in brackets, bootstrap over {notes}: the patients are not known"
    unknown = f" (patient not known for {counts['notes_without_patient']:,})" if counts["notes_without_patient"] else ""
    return f"95 % intervals in brackets, bootstrap over {counted(counts['patients'], 'patient')} of {notes}{unknown}"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the scores should know, one sentence per fact."""
    counts = result["counts"]
    lines = [f"{name}: {counts[key]:,}" for key, name in COUNT_NAMES.items() if key != "notes" and counts[key]]
    if counts["missing_ids"]:
        lines.append(f"without a prediction: {', '.join(counts['missing_ids'][:_NAMED])}")
    titles = _rule_titles(result)
    for kind, title in RULE_KINDS.items():
        rates, of_gold = result[kind], result[f"gold_{kind}"]
        broken = [name for name in rates if rates[name]["count"] or of_gold[name]["count"]]
        found = [f"  {titles[name]}: {_share(rates[name])}, in gold {_share(of_gold[name])}" for name in broken]
        lines += [f"{title}:", *found] if found else []
    return lines


def _rule_titles(result: Mapping[str, Any]) -> Mapping[str, str]:
    """Return what each rate counts."""
    return {**_CODE_RATES, **result["rules"]["titles"]}


def _share(rate: Mapping[str, Any]) -> str:
    return f"{rate['count']:,} of {rate['of']:,}"


def _headline(found: Mapping[str, Any]) -> str:
    return "-" if found["score"] is None else _with_interval(found["score"], found["interval"])


def _exact_match(scores: Mapping[str, Any]) -> str:
    return _with_interval(scores["exact_match"], scores["intervals"]["exact_match"])


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
        uncertainty=uncertainty(result),
        charts=_charts(result),
        confidence=_confidence_charts(result.get("confidence", {})),
        tables=[*optional_tables(result), *_stay_tables(result)],
        rules=[
            {
                "title": title,
                "rows": [
                    (
                        _rule_titles(result)[name],
                        *(cell for found in (rate, of_gold[name]) for cell in _rate_cells(found)),
                    )
                    for of_gold in [result[f"gold_{kind}"]]
                    for name, rate in result[kind].items()
                ],
            }
            for kind, title in RULE_KINDS.items()
            if result[kind]
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


def _rate_cells(rate: Mapping[str, Any]) -> tuple[str, str]:
    return _share(rate), f"{100 * rate['rate']:.1f} %" if rate["of"] else "-"


def _cards(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the scores that sum up the evaluation."""
    return [
        {
            "name": name,
            "value": "-" if found["score"] is None else f"{found['score']:.3f}",
            "interval": "" if found["interval"] is None else _interval(found["interval"]),
        }
        for key, name in HEADLINE.items()
        for found in [result["headline"][key]]
    ]


def _stay_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of scores by group of stays."""
    header = ("", "stays", *(HEADLINE[key] for key in _STAY_SCORES))
    return [
        {
            "title": f"By {STAY_FACT_NAMES[fact]}",
            "header": header,
            "rows": [
                (name, f"{scores['notes']:,}", *(_headline(scores[key]) for key in _STAY_SCORES))
                for name, scores in groups.items()
            ],
        }
        for fact, groups in result["by_stay"].items()
    ]


def optional_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of confidences, depth-aware scores and the agreement with a second coder, if there are any."""
    tables = _confidence_tables(result["confidence"]) if result.get("confidence") else []
    if cophe := result.get("cophe"):
        rows = [(depth, *(_headline(scores[key]) for key in _MEASURES)) for depth, scores in cophe.items()]
        title = "Depth-aware scores (CoPHE): codes counted at each depth"
        tables.append({"title": title, "header": ("", *_MEASURES.values()), "rows": rows})
    if second := result.get("second_coder"):
        stays = counted(second["notes"], "stay")
        title = f"Second coder of {stays}: kappa, and scores with gold or the second coder as reference"
        sides = [second["gold_as_reference"], second["second_as_reference"]]
        rows = [
            (
                name,
                _number(second["kappa"].get(name)),
                *(_number(side[name][key]) for side in sides for key in _COUNTED),
            )
            for name in sides[0]
        ]
        header = ("", "kappa", *(f"{name}, {of}" for of in ("gold", "second") for name in _COUNTED.values()))
        tables.append({"title": title, "header": header, "rows": rows})
    return tables


def _confidence_tables(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of calibration and of what a person need not read."""
    calibrated = [
        (
            f"{CONFIDENCE_ROLES[role]}: {CONFIDENCE_KINDS[kind]}",
            f"{scores['codes']:,}",
            *(_number(scores[key]) for key in ("mean", "correct", "ece", "brier")),
        )
        for role in CONFIDENCE_ROLES
        for kind, of_roles in found["calibration"].items()
        for scores in [of_roles.get(role)]
        if scores
    ]
    ranking = [
        *((f"precision at {rank}", _headline(scores)) for rank, scores in found["precision_at"].items()),
        ("mean average precision", _headline(found["mean_average_precision"])),
    ]
    unread = [
        (f"{float(target):.0%} right main diagnoses", _headline(each), _number(each["from"]))
        for target, each in found.get("coding_curve", {"targets": {}})["targets"].items()
    ]
    auto = found.get("auto")
    marked = auto and [
        ("share of the stays", _headline(auto["share"])),
        ("DP accuracy", _headline(auto["dp_accuracy"])),
    ]
    tables = (
        ("Calibration", ("", "codes", "mean probability", "right", "ECE", "Brier score"), calibrated),
        ("Codes ranked by confidence (roles ignored)", ("", "score"), ranking),
        ("Coding curve: stays that need no reading", ("at", "share of the stays", "DP confidence from"), unread),
        (f"Stays marked auto: {auto['stays']:,}" if auto else "", ("", "score"), marked),
    )
    return [{"title": title, "header": header, "rows": rows} for title, header, rows in tables if rows]


def _confidence_charts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reliability diagram with its legend and the coding curve; {} if there are no confidences."""
    from utils.reports.charts import Curve, Figure, share_chart

    if not found or not any(found["calibration"].values()):
        return {}
    kind, of_roles = list(found["calibration"].items())[-1]
    roles = [role for role in CONFIDENCE_ROLES if role in of_roles]
    curves = []
    for series, role in enumerate(roles):
        name, bins = CONFIDENCE_ROLES[role], of_roles[role]["bins"]
        dots = [f"{name}, {counted(codes, 'code')}: {mean:.2f}, right {share:.2f}" for codes, mean, share in bins]
        curves.append(Curve(name, [(mean, share) for _, mean, share in bins], series, dots))
    names = ("mean probability in the bin", "share of right codes")
    svg = share_chart("reliability", "Reliability diagram", curves, names, diagonal=True)
    charts = [Figure("Reliability", f"probabilities {CONFIDENCE_KINDS[kind]}; on the line: calibrated", svg)]
    if curve := found.get("coding_curve"):
        points = [(share, accuracy) for share, accuracy in curve["points"]]
        names = ("share of the stays that are not read", "right main diagnoses among them")
        svg = share_chart("codingcurve", "Coding curve", [Curve("stays, the surest DP first", points, 0)], names)
        charts.append(Figure("Coding curve", "stays in the order of the confidence of their DP", svg))
    return {"legend": [CONFIDENCE_ROLES[role] for role in roles], "charts": charts}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _charts(result: Mapping[str, Any]) -> "dict[str, Figure]":
    training = result["counts"]["training_notes"]
    notes = "gold notes" if training is None else f"of {training:,} training notes"
    return {
        "by_chapter": _chart(result, "by_chapter", "F1 by chapter of the CIM-10", _CHAPTER_TITLES),
        "by_role": _chart(result, "by_role", "F1 by role", ROLE_NAMES),
        "by_frequency": _chart(
            result,
            "by_frequency",
            f"F1 by how many {notes} have the code",
            {band: f"{band} notes" for band in FREQUENCY_BANDS},
        ),
    }


def _chart(result: Mapping[str, Any], key: str, title: str, names: Mapping[str, str]) -> "Figure":
    """Return a chart of micro-F1 by group.

    Args:
        result: of the evaluation.
        key: of the groups in `result`.
        title: of the chart.
        names: of the groups, in the order of the chart.
    """
    from utils.reports.charts import Bar, BarGroup, Figure, bar_chart

    groups = []
    for group, name in names.items():
        found = [result[level][key].get(group) for level in LEVEL_NAMES]
        if not any(each and each["gold"] for each in found):
            continue
        bars = [Bar(each["micro"]["f1"], *each["intervals"]["micro"]["f1"]) if each else None for each in found]
        gold = " / ".join(dict.fromkeys(f"{each['gold']:,}" if each else "0" for each in found))
        groups.append(BarGroup(name, f"({gold})", bars))
    return Figure(title, "", bar_chart(key, title, groups))
