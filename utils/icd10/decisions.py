"""What reviewers decided about proposed codes: the csv file that a review page downloads, and what becomes of it.

Each line is about one code of a stay: `role`, the code that a coder gave (`coded`, empty in a worklist), the one that
the model proposes (`proposed`, empty to remove the coder's), the `decision`, and the code that holds after it
(`final`, empty for none). The page writes stays of which every code is decided.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError
from model.wording import counted
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.cells import optional_text
from utils.icd10.codes import ROLES, Cim10Table, normalize_code, respell
from utils.icd10.corpus import OF_DROPPED_STAY, build_corpus
from utils.icd10.journal import Key
from utils.icd10.prompts import instruct_row
from utils.icd10.rules import RuleSet
from utils.icd10.stays import CodeRow, Document, StayNotes, read_header
from utils.tables.jsonl import Row, SkippedRowError, file_errors, read_journal, save
from utils.tables.read_table import counts_lines, read_table

ACCEPTED, REFUSED, REPLACED, ADDED = "accepted", "refused", "replaced", "added"
DECISIONS = (ACCEPTED, REFUSED, REPLACED, ADDED)
_SHOWN = 5  # stays and codes that a warning names
COLUMNS = ("stay", "note", "role", "coded", "proposed", "decision", "final", "reviewer", "time")


class Decision(NamedTuple):
    """What was decided about one code of a stay; see the module."""

    role: str
    coded: str
    proposed: str
    decision: str
    final: str

    @property
    def subject(self) -> tuple[str, str, str]:
        """What was decided on: the role, the coder's code and the proposed one."""
        return self.role, self.coded, self.proposed


class Review(NamedTuple):
    """The decisions about a stay, who took them and when, as the page wrote it."""

    decisions: list[Decision]
    reviewer: str
    time: str

    def facts(self) -> Row:
        """Return the review as an event of a journal has it."""
        codes = [decision._asdict() for decision in self.decisions]
        return {"codes": codes, "reviewer": self.reviewer, "reviewed_at": self.time}


def read_reviews(paths: Iterable[Path], encoding: str, table: Cim10Table) -> dict[Key, Review]:
    """Return the reviews of files by stay and note; where several have the same, the latest one by its `time`.

    Args:
        paths: files that a review page downloaded.
        encoding: of the files.
        table: from which a reviewer chose other codes.

    Raises:
        UserError: a file is not one that a review page downloaded, or an entry is wrong.
    """
    reviews: dict[Key, Review] = {}
    for path in paths:
        for key, review in _read_decisions(path, encoding, table).items():
            if key not in reviews or not is_earlier(review.time, reviews[key].time):
                reviews[key] = review
    return reviews


def is_earlier(one: str, other: str) -> bool:
    """Return whether a time of a review is before another; False if one of them is not a time."""
    try:
        return datetime.fromisoformat(one).timestamp() < datetime.fromisoformat(other).timestamp()
    except (ValueError, OverflowError):
        return False


def _read_decisions(path: Path, encoding: str, table: Cim10Table) -> dict[Key, Review]:
    header = read_header(path, encoding)
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(f"{path}: no column {', '.join(missing)}; expected the decisions that a review page downloads.")
    reviews: dict[Key, Review] = {}
    for number, row in read_table(path, encoding):
        try:
            if isinstance(row, SkippedRowError):
                raise row
            cells = {name: optional_text(row[name]) for name in COLUMNS}
            key = Key(cells["stay"], cells["note"])
            decisions = reviews.setdefault(key, Review([], cells["reviewer"], cells["time"])).decisions
            decision = _decision(cells, table)
            if decision.decision != ADDED and decision.subject in [found.subject for found in decisions]:
                raise SkippedRowError("a code that is decided twice; give each file of a page as it was downloaded")
            decisions.append(decision)
        except SkippedRowError as skip:
            where = f"{path}, {'line' if counts_lines(path) else 'row'} {number}"
            raise UserError(f"{where}: {skip.reason}.") from None
    return reviews


def plain_code(text: str) -> str:
    """Return a code as tables of codes have it."""
    return normalize_code(respell(text))


def _decision(cells: Mapping[str, str], table: Cim10Table) -> Decision:
    """Return the decision of a line.

    Raises:
        SkippedRowError: a cell is not what it should be.
    """
    role, decision = cells["role"], cells["decision"]
    coded, proposed, final = (plain_code(cells[name]) for name in ("coded", "proposed", "final"))
    if decision not in DECISIONS:
        raise SkippedRowError(f"decision {decision[:20]!r}; expected {', '.join(DECISIONS)}")
    if role not in (*ROLES, ""):
        raise SkippedRowError(f"role {role[:20]!r}; expected {', '.join(ROLES)} or nothing")
    expected = {ACCEPTED: proposed, REFUSED: coded}.get(decision, final)
    if final != expected or (decision in (REPLACED, ADDED) and not final):
        raise SkippedRowError(f"{decision}, with final code {final[:20]!r}; expected {expected[:20] or 'a code'!r}")
    if decision in (REPLACED, ADDED) and final not in table:
        raise SkippedRowError(f"{decision}, with final code {final[:20]!r}, which is not in the CIM-10 table")
    return Decision(role, coded, proposed, decision, final)


def count_decisions(reviews: Iterable[Iterable[Decision]]) -> dict[str, Counter[str]]:
    """Return how often each decision was taken, by role."""
    counts: dict[str, Counter[str]] = {}
    for review in reviews:
        for found in review:
            counts.setdefault(found.role or "?", Counter())[found.decision] += 1
    return {role: counts[role] for role in (*ROLES, "?") if role in counts}


def describe_counts(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line per role: what was decided, and the share of the proposals that were accepted."""
    lines = []
    for role, of_role in counts.items():
        proposals = sum(of_role.get(name, 0) for name in (ACCEPTED, REFUSED, REPLACED))
        share = f" ({of_role.get(ACCEPTED, 0) / proposals:.1%} of the proposals accepted)" if proposals else ""
        lines.append(f"  {role:<3}  " + ", ".join(f"{of_role.get(name, 0):,} {name}" for name in DECISIONS) + share)
    return lines


def final_codes(decisions: Iterable[Decision], coded: Iterable[Diagnosis] = ()) -> list[Diagnosis]:
    """Return the codes of a stay after its review.

    Args:
        decisions: of the stay.
        coded: the coder's codes; those that no decision names stay.
    """
    decisions = list(decisions)
    judged = {(found.role, found.coded) for found in decisions}
    kept = [item for item in coded if (item.role, item.code) not in judged]
    return [*kept, *(Diagnosis(found.role, found.final) for found in decisions if found.final)]


def add_corrections(
    path: Path,
    codes: Mapping[str, Sequence[Diagnosis]],
    notes: Mapping[str, str],
    table: Cim10Table,
    rules: RuleSet,
) -> str:
    """Add reviewed stays to a file of rows to train on, as preparation would write them; return what was done.

    Rows of the same stays are replaced.

    Args:
        path: .jsonl file, created if missing.
        codes: of each reviewed stay, with roles.
        notes: of the stays that can be trained on.
        table: labels of the codes.
        rules: coding rules.

    Raises:
        UserError: the file is something else.
    """
    texts = StayNotes()
    for stay in codes.keys() & notes.keys():
        texts.add(Document(stay, notes[stay]))
    rows = {stay: [CodeRow(item.role or "", item.code) for item in codes[stay]] for stay in codes if stay in texts}
    corpus = build_corpus(texts, rows, lambda stay: table, unit="first", rules_of=lambda stay: rules)
    added = {stay.id: instruct_row(texts[stay.id], build_answer(stay.diagnoses), stay.id) for stay in corpus.stays}
    with file_errors():
        merged = read_journal(path) | added
    save({path: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in merged.values())})
    reasons = [f"{stay}: no note, or not the one that was reviewed" for stay in codes if stay not in texts]
    reasons += [
        " ".join(filter(None, (f"{found.stay}:", found.role, found.code, found.reason)))
        for found in corpus.left_out
        if found.reason != OF_DROPPED_STAY  # the stay is named, too
    ]
    warning = f"\nwarning: left out of it: {'; '.join(reasons[:_SHOWN])}" if reasons else ""
    return f"{counted(len(added), 'row')} to train on, {len(merged):,} in all: {path}{warning}"
