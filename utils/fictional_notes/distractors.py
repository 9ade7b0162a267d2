"""Distractors: diagnoses that a note mentions but that must not be coded (ruled out, resolved, or of a relative)."""

import random
from dataclasses import dataclass

from utils.fictional_notes.catalogue import Catalogue, Condition
from utils.fictional_notes.scenarios import FictionalStay

# Possible numbers of distractors by length of the note: ruled out, resolved, of relatives.
_COUNTS = {
    "short": ((0, 1, 1), (0, 0, 1), (0, 0, 0, 1)),
    "long": ((1, 2, 3), (0, 1, 2), (0, 1)),
}
# Relative to 1 for diagnoses that are commonly ruled out: those that this stay rules out, or that go with it.
_RULED_OUT_WEIGHT, _ASSOCIATED_WEIGHT = 25, 5
# Minimum number of years between the first age of a disease and the age of a patient for whom it is resolved.
_YEARS_TO_RESOLVE = 5


@dataclass(frozen=True)
class Distractors:
    """The distractors of a note; their groups differ from each other's and from those of the coded diagnoses."""

    absent: list[Condition]
    past: list[Condition]
    family: list[Condition]


def choose_distractors(rng: random.Random, stay: FictionalStay, catalogue: Catalogue, length: str) -> Distractors:
    """Draw the distractors of a note of this length ("short" or "long")."""
    taken = {condition.group for condition in stay.conditions}
    absent_count, past_count, family_count = (rng.choice(numbers) for numbers in _COUNTS[length])
    anyone = list(catalogue.common.values())
    own = [item for item in anyone if stay.sex in item.sex]
    weights = [_absence_weight(stay, item) for item in own]
    past = [item for item in own if item.past and stay.age > item.age[0] + _YEARS_TO_RESOLVE]
    family = [item for item in anyone if item.family]
    return Distractors(
        absent=_draw(rng, own, weights, absent_count, taken),
        past=_draw(rng, past, [1] * len(past), past_count, taken),
        family=_draw(rng, family, [1] * len(family), family_count, taken),
    )


def _absence_weight(stay: FictionalStay, item: Condition) -> int:
    if any(item.code in reason.rule_out for reason in stay.reasons):
        return _RULED_OUT_WEIGHT
    if item.absent and any(item.code in reason.associated for reason in stay.reasons):
        return _ASSOCIATED_WEIGHT
    # Diagnoses that only occur with others, such as metastases, are not reported as absent without them.
    return 1 if item.absent and (item.das or item.dp) else 0


def _draw(
    rng: random.Random, pool: list[Condition], weights: list[int], count: int, taken: set[str]
) -> list[Condition]:
    """Draw at most `count` diagnoses whose groups are not in `taken`, and add their groups to it."""
    chosen: list[Condition] = []
    for item in rng.choices(pool, weights, k=count) if any(weights) else ():
        if item.group not in taken:
            taken.add(item.group)
            chosen.append(item)
    return chosen
