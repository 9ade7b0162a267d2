"""What is wrong with data, and what is in it, as text."""

import contextlib
import dataclasses
import json
import os
import tempfile
import textwrap
from collections.abc import Iterator
from typing import Any, TextIO

from .data_statistics import RECOMMENDED_EPOCHS, DataStatistics, RunPlan
from .packing_forecast import PackingFigures

SHOWN = 20  # findings of a kind that are shown on screen
_WIDTH = 400  # characters of a finding that are
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclasses.dataclass
class _Kind:
    hint: str
    spool: TextIO  # every finding, one a line
    count: int = 0
    shown: list[str] = dataclasses.field(default_factory=list)


class Findings:
    """Sentences about rows and files, grouped by kind. All but the first of a kind wait on disk, not in memory."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._spools = contextlib.ExitStack()

    def __enter__(self) -> "Findings":
        return self

    def __exit__(self, *_: object) -> None:
        self._spools.close()

    def __len__(self) -> int:
        return sum(group.count for group in self._kinds.values())

    def add(self, kind: str, hint: str, text: str) -> None:
        if kind not in self._kinds:
            spool = self._spools.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            self._kinds[kind] = _Kind(hint, spool)
        group = self._kinds[kind]
        group.count += 1
        if group.count <= SHOWN:
            group.shown.append(textwrap.shorten(text, _WIDTH, placeholder=" ..."))
        group.spool.write(" ".join(text.splitlines()) + "\n")

    def summary(self) -> str:
        """The first findings of each kind."""
        parts = []
        for name, group in self._kinds.items():
            more = [f"... and {group.count - SHOWN:,} more"] if group.count > SHOWN else []
            parts.append("\n".join([_heading(name, group), *group.shown, *more]))
        return "\n\n".join(parts)

    def lines(self) -> Iterator[str]:
        """All findings."""
        for name, group in self._kinds.items():
            yield _heading(name, group) + "\n"
            group.spool.seek(0)
            yield from group.spool
            group.spool.seek(0, os.SEEK_END)
            yield "\n"


def _heading(name: str, group: _Kind) -> str:
    return f"{name}: {group.count:,}\n({group.hint})"


def title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def describe_expected(expected: dict[str, Any]) -> str:
    """mistral-finetune's block of statistics."""
    return "Train States\n --------------------\n" + json.dumps(expected, indent=4, ensure_ascii=False)


def describe_data(name: str, statistics: DataStatistics, seq_len: int) -> str:
    """How many rows there are, and how long they are."""
    chunks = f" (and {statistics.chunks:,} shorter conversations of those with tools)" if statistics.chunks else ""
    lengths = ", ".join(f"{name} {statistics.percentile(share):,}" for name, share in _PERCENTILES.items())
    longer = statistics.longer_than(seq_len + 1)
    return _table(
        title(name),
        ("rows", f"{statistics.rows:,}{chunks}"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained tokens", _share(statistics.trained, statistics.tokens)),
        ("tokens per row", lengths),
        (f"rows longer than seq_len ({seq_len:,})", _share(longer, statistics.rows)),
    )


def describe_packing(statistics: DataStatistics, packing: str, seq_len: int) -> str:
    """What `concat` severs, and what `best_fit` does instead."""
    positions = statistics.tokens - statistics.rows
    columns: list[list[str]] = []
    for name, figures in statistics.packings.items():
        columns.append(
            [
                f"{name} (configured)" if name == packing else name,
                _share(figures.severed, figures.samples),
                _share(figures.blind, statistics.trained),
                _share(figures.lost, positions),
                f"{figures.shortened:,} / {figures.left_out:,}" if name == "best_fit" else "-",
                f"{100 * figures.fill:.1f} %",
                f"{figures.sequences:,.1f}",
            ]
        )
    labels = [
        "",
        "samples severed from their prompt",
        "trained tokens that see less than half of it",
        "tokens left out",
        "samples shortened / left out",
        "positions filled",
        "sequences per epoch",
    ]
    return _table(title(f"Packing into sequences of {seq_len:,}"), *zip(labels, *columns, strict=True))
