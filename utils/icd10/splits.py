"""Split stays into train, val and test, by patient and text, stratified by chapter."""

from collections import Counter
from collections.abc import Mapping, Sequence

from model.errors import UserError
from utils.icd10.codes import chapter
from utils.icd10.corpus import CodedStay
from utils.tables.splits import assign_splits

SPLITS = ("train", "val", "test")


def split_stays(
    stays: Sequence[CodedStay],
    patients: Mapping[str, str],
    texts: Sequence[str],
    fractions: Sequence[float],
    seed: int,
) -> list[int]:
    """Return the number of the split of each stay, stratified by the chapter of the DP.

    Args:
        stays: at least one stay.
        patients: patient by id of the stay, where known; all stays of a patient get the same split.
        texts: normalized text of each stay; stays with the same text get the same split.
        fractions: fraction of the stays per split; they sum to 1.
        seed: seed of the assignment.

    Raises:
        UserError: a split would be empty.
    """
    groups = _connected_groups(
        [
            [f"text {text}", *([f"patient {patients[stay.id]}"] if stay.id in patients else [])]
            for stay, text in zip(stays, texts, strict=True)
        ]
    )
    chapters: list[list[str | None]] = [[] for _ in range(max(groups) + 1)]  # of the stays of each group
    for stay, group in zip(stays, groups):
        chapters[group].append(chapter(stay.diagnoses[0].code))
    strata = [Counter(found).most_common(1)[0][0] for found in chapters]
    # Rare chapters first: the first groups go to train, the only split where a chapter's single stay is useful.
    order = {name: number for number, (name, _) in enumerate(reversed(Counter(strata).most_common()))}
    chosen = assign_splits([len(found) for found in chapters], fractions, seed, [order[name] for name in strata])
    for number in range(len(fractions)):
        if number not in chosen:
            raise UserError(
                f"The {SPLITS[number]} split would be empty: {len(stays)} stays are too few for these fractions "
                f"({len(chapters)} groups that cannot be separated). Raise the smallest fraction in --ratios, or give "
                "--ratios 1 for no split."
            )
    return [chosen[group] for group in groups]


def _connected_groups(keys: Sequence[Sequence[str]]) -> list[int]:
    """Number the groups of rows that share a key, directly or through other rows (union-find)."""
    above: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := above.setdefault(key, key)) != key:
            above[key] = above[parent]  # path halving keeps long chains cheap
            key = parent
        return key

    for first, *others in keys:
        for other in others:
            above[root(other)] = root(first)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first, *_ in keys]
