"""Dividing rows into train, eval and test, so that the rows of a group stay together."""

import math
import random
from array import array
from collections.abc import Sequence

from model.errors import UserError

SPLIT_NAMES = ("train", "eval", "test")


def parse_fractions(text: str, option: str = "--split") -> list[float]:
    """Reads "0.9,0.1", which a message says was given as `option`.

    Raises:
        UserError: not one to three positive numbers that sum to 1.
    """
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    usable = 1 <= len(fractions) <= len(SPLIT_NAMES) and min(fractions) > 0
    if not usable or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise UserError(
            f"{option} {text!r}: expected the shares of train, eval and test (or fewer of them), which sum to 1, "
            "such as 0.9,0.1 or 0.8,0.1,0.1 or 1."
        )
    return fractions


def split_rows(units: array, fractions: Sequence[float], seed: int) -> bytearray:
    """Gives each row a split.

    Args:
        units: per row, the number of the unit (the row alone, or its group) that must stay together; 0 to n - 1.
        fractions: of all rows, per split; they sum to 1.
        seed: of the choice.

    Returns:
        The number of a split per row.

    Raises:
        UserError: a split would have no row.
    """
    sizes = array("L", [0]) * (max(units) + 1)
    for unit in units:
        sizes[unit] += 1
    splits = assign_splits(sizes, fractions, seed)
    for split in range(len(fractions)):
        if split not in splits:
            raise UserError(
                f"The {SPLIT_NAMES[split]} split would have no row: {len(units)} rows ({len(sizes)} that can be split "
                "from each other) are too few for these shares; give --split larger ones, or 1 for no split."
            )
    return bytearray(splits[unit] for unit in units)


def assign_splits(
    sizes: Sequence[int], fractions: Sequence[float], seed: int, strata: Sequence[int] | None = None
) -> bytearray:
    """Gives each unit (a row, or all rows of a group) a split, so that the rows divide as `fractions` do.

    The largest units come first, in seeded order among equals; each goes where it overfills least (d'Hondt's rule). For
    rows without groups the counts are exact wherever they can be. With strata, units of one stratum come one after the
    other, so that each stratum divides as all rows do, give or take a unit or two.

    Args:
        sizes: rows per unit.
        fractions: of all rows, per split; they sum to 1.
        seed: of the order.
        strata: number of the stratum per unit, those of lower number first; None: all are one.

    Returns:
        The number of a split per unit.
    """
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda unit: (strata[unit] if strata else 0, -sizes[unit]))
    filled = [0] * len(fractions)
    splits = bytearray(len(sizes))
    for unit in order:
        size = sizes[unit]
        split = min(range(len(fractions)), key=lambda split: (filled[split] + size) / fractions[split])
        filled[split] += size
        splits[unit] = split
    return splits
