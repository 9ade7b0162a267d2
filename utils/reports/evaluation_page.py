"""The evaluation as one HTML page that needs nothing else: no script, no font, no address."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from utils.reports.html import COLOURS, page, svg, svg_text, table

LEVEL_NAMES = {"exact": "exact code", "category": "category (3 characters)"}
RULE_NAMES = {
    "unknown": "codes that are not in the table",
    "category": "codes that have children and must be specified",
    "closed": "codes that are closed",
    "forbidden_DP": "main diagnoses that are forbidden as DP",
    "forbidden_DR": "related diagnoses that are forbidden as DR",
    "forbidden_DAS": "associated diagnoses that are forbidden as DAS",
    "no_DP": "notes without a DP",
    "several_DP": "notes with several DP",
    "several_DR": "notes with several DR",
}
COUNT_NAMES = {
    "notes": "notes",
    "missing_predictions": "notes without a prediction, which count as empty",
    "answers_without_code": "answers without any code",
    "codes_without_role": "codes whose answer does not tell their role",
    "repeated_codes": "codes given more than once, which count once",
    "unexpected_predictions": "predictions for no gold note, which were left out",
}

_NAMED = 20  # notes without prediction that the summary names


class Bar(NamedTuple):
    """A value between 0 and 1 with its interval."""

    value: float
    low: float
    high: float


def html_page(result: Mapping[str, Any], title: str) -> str:
    """The page of what `evaluate` of `utils.evaluate_icd10` returns."""
    counts = result["counts"]
    counted = "gold" if counts["training_notes"] is None else f"of {counts['training_notes']:,} training"
    parts = [
        f"<p>{counts['notes']:,} notes, {result['exact']['gold']:,} codes in gold, {result['exact']['predicted']:,} "
        f"predicted, {result['exact']['correct']:,} of them right. Intervals hold 95 % of bootstrap samples of the "
        "notes.</p>",
        _scores_table(result),
        _chart_section(result, "by_role", "F1 by role"),
        _chart_section(result, "by_chapter", "F1 by chapter of the CIM-10"),
        _chart_section(result, "by_frequency", f"F1 by how many {counted} notes hold the code"),
        *([_rules_table(result["rates"])] if result["rates"] else []),
        _errors_table(result["errors"]),
        _counts_table(counts),
    ]
    return page(title, parts)


def score_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The main scores with their intervals: a name, then a cell per level."""
    names = [(mean, name) for mean in ("micro", "macro") for name in ("precision", "recall", "f1")]
    rows = [
        (
            f"{mean} {name.replace('f1', 'F1')}",
            *(_cell(result[level][mean][name], result[level]["intervals"][mean][name]) for level in LEVEL_NAMES),
        )
        for mean, name in names
    ]
    exact = (_cell(result[level]["exact_match"], result[level]["intervals"]["exact_match"]) for level in LEVEL_NAMES)
    return [*rows, ("exact match of the set", *exact)]


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores should know, one sentence per fact."""
    counts = result["counts"]
    lines = [f"{name}: {counts[key]:,}" for key, name in COUNT_NAMES.items() if key != "notes" and counts[key]]
    if counts["missing_ids"]:
        lines.append(f"without a prediction: {', '.join(counts['missing_ids'][:_NAMED])}")
    rates = result["rates"].items()
    return lines + [f"{RULE_NAMES[name]}: {rate['count']:,} of {rate['of']:,}" for name, rate in rates if rate["count"]]


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _scores_table(result: Mapping[str, Any]) -> str:
    return table(("", *LEVEL_NAMES.values()), score_rows(result))


def _chart_section(result: Mapping[str, Any], key: str, title: str) -> str:
    bars: dict[str, list[Bar | None]] = {}
    groups = dict.fromkeys(
        group for level in LEVEL_NAMES for group, scores in result[level][key].items() if scores["gold"]
    )
    for group in groups:
        found = [result[level][key].get(group) for level in LEVEL_NAMES]
        gold = " / ".join(str(scores["gold"]) if scores else "0" for scores in found)
        bars[f"{group} ({gold})"] = [
            Bar(scores["micro"]["f1"], *scores["intervals"]["micro"]["f1"]) if scores else None for scores in found
        ]
    note = '<p class="small">Micro-F1; in parentheses how many codes gold holds, exact / category.</p>'
    return f"<h2>{escape(title)}</h2>\n{bar_chart(title, bars, tuple(LEVEL_NAMES.values()))}\n{note}"


def _rules_table(rates: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (RULE_NAMES[name], f"{rate['count']:,} of {rate['of']:,}", f"{rate['rate']:.1%}")
        for name, rate in rates.items()
    ]
    return f"<h2>Against the CIM-10 table</h2>\n{table(('', 'found', 'rate'), rows)}"


def _errors_table(errors: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    sections = []
    for kind, name in (("missed", "Codes most often missed"), ("added", "Codes most often added")):
        rows = [(f"{error['code']} {error['label']}", f"{error['notes']:,}") for error in errors[kind]]
        sections.append(f"<h2>{name}</h2>\n{table(('', 'notes'), rows)}" if rows else f"<h2>{name}</h2>\n<p>None.</p>")
    return "\n".join(sections)


def _counts_table(counts: Mapping[str, Any]) -> str:
    rows = [(name, f"{counts[key]:,}") for key, name in COUNT_NAMES.items()]
    named = ", ".join(counts["missing_ids"])
    missing = f'<p class="small">Without a prediction: {escape(named)}</p>' if named else ""
    return f"<h2>What was compared</h2>\n{table(('', 'count'), rows)}\n{missing}"


_LABEL, _PLOT, _VALUE = 190, 460, 60  # widths in px: names, bars, figures
_BAR, _GAP, _TOP, _AXIS = 13, 12, 28, 20  # heights in px: a bar, between groups, legend, axis


def bar_chart(title: str, groups: Mapping[str, Sequence[Bar | None]], series: Sequence[str]) -> str:
    """Horizontal bars with their intervals as an SVG element, from 0 to 1.

    Args:
        title: what screen readers say.
        groups: for each name a bar per series; None: no bar.
        series: names of the series, at most two.
    """
    bottom = _TOP + len(groups) * (len(series) * _BAR + _GAP)
    width, height = _LABEL + _PLOT + _VALUE, bottom + _AXIS
    parts = []
    for number, name in enumerate(series):
        left = _LABEL + number * 140
        parts.append(f'<rect x="{left}" y="4" width="12" height="12" fill="{COLOURS[number]}"/>')
        parts.append(svg_text(left + 18, 14, name))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = _LABEL + tick * _PLOT
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(svg_text(x, bottom + 14, f"{tick:g}", "middle"))
    top = _TOP
    for name, bars in groups.items():
        parts.append(svg_text(_LABEL - 8, top + len(series) * _BAR / 2 + 4, name, "end"))
        for number, bar in enumerate(bars):
            parts += _draw_bar(bar, top + number * _BAR, COLOURS[number]) if bar else []
        top += len(series) * _BAR + _GAP
    return svg(title, width, height, parts)


def _draw_bar(bar: Bar, top: float, colour: str) -> list[str]:
    value, low, high = (_LABEL + _PLOT * x for x in bar)
    middle = top + _BAR / 2
    return [
        f'<rect x="{_LABEL}" y="{top + 1}" width="{value - _LABEL:.1f}" height="{_BAR - 2}" fill="{colour}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6" '
        'stroke="#1c1c1c" fill="none"/>',
        svg_text(_LABEL + _PLOT + 10, middle + 4, f"{bar.value:.3f}"),
    ]
