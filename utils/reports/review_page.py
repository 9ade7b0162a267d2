"""The page on which people accept, refuse and replace proposed codes; their decisions are downloaded as a csv file.

The page has the data in it as JSON and needs nothing else. Its policy (CSP) forbids every request, and its script
writes text only as text, never as HTML.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from utils.icd10.codes import Cim10Table
from utils.icd10.decisions import ACCEPTED, ADDED, COLUMNS, REFUSED, REPLACED
from utils.icd10.review_items import Item, StayToReview
from utils.reports.pages import render_page

WORKLIST, SECOND_READING = "worklist", "second_reading"
ORDERS = {WORKLIST: "least sure main diagnosis first", SECOND_READING: "confidence × effect"}


def review_page(
    title: str,
    kind: str,
    stays: Iterable[StayToReview],
    about: dict[str, str],
    table: Cim10Table | None,
    groups: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {},
) -> str:
    """Return the page.

    Args:
        title: of the page.
        kind: WORKLIST or SECOND_READING.
        stays: to review, the first one on top.
        about: facts to show above.
        table: codes and labels to choose replacements from; None accepts every code.
        groups: tables to show closed above the stays: header and rows by title.
    """
    rows = [
        found._asdict() | {"items": list(map(_item, found.items)), "agreed": [code._asdict() for code in found.agreed]}
        for found in stays
    ]
    return render_page(
        "review.html",
        title=title,
        about=about,
        order=ORDERS[kind],
        facts=_facts(rows),
        groups=groups,
        data={"kind": kind, "columns": COLUMNS, "stays": rows},
        words={"accepted": ACCEPTED, "refused": REFUSED, "replaced": REPLACED, "added": ADDED},
        codes=[[entry.code, entry.label] for entry in table] if table is not None else [],
    )


def _item(item: Item) -> dict[str, Any]:
    return item._asdict() | {"evidence": [sentence._asdict() for sentence in item.evidence]}


def _facts(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the values of each fact that not all stays share."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row["facts"].items():
            values.setdefault(name, set()).add(value)
    return {name: sorted(found) for name, found in values.items() if len(found) > 1}
