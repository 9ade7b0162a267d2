"""Split rows into train, eval and test, keeping the rows of a group together."""

import math
import random
from array import array
from collections.abc import Sequence

from model.errors import UserError

SPLIT_NAMES = ("train", "eval", "test")


def parse_fractions(text: str, option: str = "--split") -> list[float]:
    """Parse "0.9,0.1", the value of the command-line option `option`.

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
    """Assign a split to each row.

    Args:
        units: per row, the number of its unit (the row itself, or its group), 0 to n - 1. A unit is not divided.
        fractions: share of all rows per split; they sum to 1.
        seed: of the assignment.

    Returns:
        The split number of each row.

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
    """Assign a split to each unit (a row, or all rows of a group), so that the rows are divided by `fractions`.

    Units are assigned largest first, in seeded order among equals, each to the split that it overfills least (d'Hondt's
    method). Without groups the counts are exact up to rounding. With strata, the units of a stratum are assigned one
    after the other, so that each stratum is divided like all rows, up to a unit or two.

    Args:
        sizes: rows per unit.
        fractions: share of all rows per split; they sum to 1.
        seed: of the order.
        strata: stratum number of each unit, assigned in ascending order; None: a single stratum.

    Returns:
        The split number of each unit.
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
