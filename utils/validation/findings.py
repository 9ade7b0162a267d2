"""Errors and warnings about rows and files, grouped by kind."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import TextIO

SHOWN = 20  # findings of a kind that a summary shows
_WIDTH = 400  # characters of a finding that a summary shows


@dataclasses.dataclass
class _Kind:
    hint: str
    spool: TextIO  # every finding, one a line
    count: int = 0
    shown: list[str] = dataclasses.field(default_factory=list)


class Findings:
    """Sentences grouped by kind. Only the first ones of a kind are kept in memory, all of them on disk."""

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
            spool = self._spools.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
            self._kinds[kind] = _Kind(hint, spool)
        group = self._kinds[kind]
        line = " ".join(text.splitlines())
        group.count += 1
        if group.count <= SHOWN:
            group.shown.append(line if len(line) <= _WIDTH else f"{line[:_WIDTH]} ...")
        group.spool.write(line + "\n")

    def summary(self) -> str:
        """Return the first findings of each kind."""
        parts = []
        for name, group in self._kinds.items():
            more = [f"... and {group.count - SHOWN:,} more"] if group.count > SHOWN else []
            parts.append("\n".join([_heading(name, group), *group.shown, *more]))
        return "\n\n".join(parts)

    def lines(self) -> Iterator[str]:
        """Yield the lines of all findings."""
        for name, group in self._kinds.items():
            yield _heading(name, group) + "\n"
            group.spool.seek(0)
            yield from group.spool
            group.spool.seek(0, os.SEEK_END)
            yield "\n"


def _heading(name: str, group: _Kind) -> str:
    return f"{name}: {group.count:,}\n({group.hint})"
