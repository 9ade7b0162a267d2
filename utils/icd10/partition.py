"""Dividing stays into train, val and test: no patient and no text on two sides, every chapter on all of them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from model.errors import UserError
from utils.icd10.codes import chapter
from utils.icd10.prepare import Stay
from utils.tables.splits import assign_splits

SPLITS = ("train", "val", "test")


def split_stays(
    stays: Sequence[Stay], patients: Mapping[str, str], texts: Sequence[str], fractions: Sequence[float], seed: int
) -> list[int]:
    """Gives each stay the number of a split, evenly over the chapters of the DP.

    Args:
        stays: what is divided; at least one.
        patients: by id of the stay, where known; stays of one patient stay together.
        texts: normalised, one per stay; stays of one text stay together.
        fractions: of the stays, per split; they sum to 1.
        seed: of the choice.

    Raises:
        UserError: a split would have no stay.
    """
    units = _units(
        [
            [f"text {text}", *([f"patient {patients[stay.id]}"] if stay.id in patients else [])]
            for stay, text in zip(stays, texts, strict=True)
        ]
    )
    chapters: list[list[str | None]] = [[] for _ in range(max(units) + 1)]  # of the stays of each unit
    for stay, unit in zip(stays, units):
        chapters[unit].append(chapter(stay.diagnoses[0].code))
    strata = [Counter(found).most_common(1)[0][0] for found in chapters]
    # Rare chapters first: the first units go to train, where a chapter's only stay is of use.
    order = {name: number for number, (name, _) in enumerate(reversed(Counter(strata).most_common()))}
    chosen = assign_splits([len(found) for found in chapters], fractions, seed, [order[name] for name in strata])
    for number in range(len(fractions)):
        if number not in chosen:
            raise UserError(
                f"The {SPLITS[number]} split would have no stay: {len(stays)} stays ({len(chapters)} that can be split "
                "from each other) are too few for these shares; give --ratios larger ones, or 1 for no split."
            )
    return [chosen[unit] for unit in units]


def _units(keys: Sequence[Sequence[str]]) -> list[int]:
    """Numbers the groups of rows that share a key, directly or through other rows."""
    above: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := above.setdefault(key, key)) != key:
            above[key] = above[parent]  # halves the path, so that long chains stay cheap
            key = parent
        return key

    for first, *others in keys:
        for other in others:
            above[root(other)] = root(first)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first, *_ in keys]
