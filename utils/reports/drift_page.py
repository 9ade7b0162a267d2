"""The page that shows whether this month's stays are still those that the model was trained on."""

from collections.abc import Mapping, Sequence

from utils.icd10.codes import Cim10Table
from utils.icd10.drift import RECENT_WEEKS, Period, Shift
from utils.reports.charts import Figure, Line, line_chart
from utils.reports.pages import render_page

TRAINING = "training"
_HEADER = (
    "",
    "stays",
    "codes per stay",
    "DP confidence",
    "accepted",
    "to review",
    "unknown codes",
    "chapter distance",
)
_CHARTED = {"confidence": "DP confidence", "accepted": "accepted proposals", "to_review": "to review"}


def drift_page(
    weeks: Mapping[str, Period], training: Period, shifts: Sequence[Shift], about: Mapping[str, str], table: Cim10Table
) -> str:
    """Return the page.

    Args:
        weeks: figures by week, in order.
        training: figures of the training stays.
        shifts: codes whose frequency changed.
        about: facts to show above.
        table: labels of the codes.
    """
    rows = [(TRAINING, *_cells(training)), *((week, *_cells(period)) for week, period in weeks.items())]
    codes = [
        (found.code, table.label(found.code) or "", f"{found.before:.1%}", f"{found.now:.1%}", f"{found.z:+.1f}")
        for found in shifts
    ]
    return render_page(
        "drift.html",
        title="Drift",
        about=about,
        header=_HEADER,
        rows=rows,
        codes=codes,
        recent=RECENT_WEEKS,
        charts=_charts(weeks),
        names=list(_CHARTED.values()),
    )


def _cells(period: Period) -> list[str]:
    shares = (period.confidence, period.accepted, period.to_review, period.unknown)
    codes = "-" if period.codes is None else f"{period.codes:.1f}"
    distance = "-" if period.distance is None else f"{period.distance:.2f}"
    return [f"{period.stays:,}", codes, *("-" if share is None else f"{share:.1%}" for share in shares), distance]


def _charts(weeks: Mapping[str, Period]) -> list[Figure]:
    lines = []
    for series, (field, name) in enumerate(_CHARTED.items()):
        points = [(number, getattr(period, field)) for number, period in enumerate(weeks.values(), start=1)]
        if known := [(number, value) for number, value in points if value is not None]:
            lines.append(Line(name, known, series, marked=True))
    if not lines:
        return []
    first, last = next(iter(weeks)), list(weeks)[-1]
    return [
        Figure(
            "By week",
            f"share, week 1 is {first}, the last one {last}",
            line_chart("weeks", "By week", lines, from_zero=True, unit="week"),
        )
    ]
