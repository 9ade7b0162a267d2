"""What a fictional note tells and a coder must not keep: diagnoses ruled out, resolved long ago, or of a relative."""

import random
from dataclasses import dataclass

from utils.fictional_notes.catalogue import Catalogue, Condition
from utils.fictional_notes.scenarios import Stay

# Numbers to draw from, by length of the note: ruled out, resolved, relatives'.
_COUNTS = {
    "short": ((0, 1, 1), (0, 0, 1), (0, 0, 0, 1)),
    "long": ((1, 2, 3), (0, 1, 2), (0, 1)),
}
# What such a stay rules out is told more often than what is commonly absent.
_RULED_OUT_WEIGHT, _ASSOCIATED_WEIGHT = 25, 5
# A resolved episode lies this many years at least behind the age at which one gets the disease.
_YEARS_TO_RESOLVE = 5


@dataclass(frozen=True)
class Distractors:
    """Diagnoses that the note mentions and that are not coded, of groups of their own."""

    absent: list[Condition]
    past: list[Condition]
    family: list[Condition]


def choose_traps(rng: random.Random, stay: Stay, catalogue: Catalogue, length: str) -> Distractors:
    """Draws diagnoses of other groups than the coded ones."""
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


def _absence_weight(stay: Stay, item: Condition) -> int:
    if any(item.code in reason.rule_out for reason in stay.reasons):
        return _RULED_OUT_WEIGHT
    if item.absent and any(item.code in reason.associated for reason in stay.reasons):
        return _ASSOCIATED_WEIGHT
    # Complications that only come with others (metastases) are not told absent without them.
    return 1 if item.absent and (item.das or item.dp) else 0


def _draw(
    rng: random.Random, pool: list[Condition], weights: list[int], count: int, taken: set[str]
) -> list[Condition]:
    """Up to `count` draws, none of a group already taken; theirs are added to `taken`."""
    chosen: list[Condition] = []
    for item in rng.choices(pool, weights, k=count) if any(weights) else ():
        if item.group not in taken:
            taken.add(item.group)
            chosen.append(item)
    return chosen
