"""What is wrong with data, and what is in it, as text."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from utils.validation.data_statistics import RECOMMENDED_EPOCHS, DataStatistics, RunPlan
from utils.validation.throughput import OVERHEAD_SECONDS, Speed, eta

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
            spool = self._spools.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
            self._kinds[kind] = _Kind(hint, spool)
        group = self._kinds[kind]
        line = " ".join(text.splitlines())
        group.count += 1
        if group.count <= SHOWN:
            group.shown.append(line if len(line) <= _WIDTH else f"{line[:_WIDTH]} ...")
        group.spool.write(line + "\n")

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
    labels = (
        "samples split from (part of) their prompt",
        "trained tokens that see less than half of their context",
        "tokens left out",
        "samples shortened, samples left out",
        "positions filled",
        "sequences per epoch",
    )
    columns = [
        (
            f"{name} (configured)" if name == packing else name,
            _share(figures.split_samples, figures.samples),
            _share(figures.truncated_context_tokens, figures.trained),
            _share(figures.lost, figures.positions),
            f"{figures.shortened:,}, {figures.left_out:,}",
            f"{100 * figures.fill:.1f} %",
            f"{figures.sequences:,.1f}",
        )
        for name, figures in statistics.packings.items()
    ]
    text = _table(title(f"Packing into sequences of {seq_len:,} tokens"), *zip(("", *labels), *columns, strict=True))
    configured = statistics.packings[packing]
    if packing == "concat" and configured.split_samples:
        text += (
            f"\nWarning: `data.packing: concat` (the default) splits {configured.split_samples:,} of "
            f"{configured.samples:,} samples, so that their answers are trained without their complete prompts; "
            "`data.packing: best_fit` splits none."
        )
    return text


def describe_run(plan: RunPlan, statistics: DataStatistics, speeds: list[Speed]) -> str:
    """How often the run goes through the data, how often is usual, and how long both take."""
    args = plan.args
    choices = {"configured": args.max_steps, "recommended": plan.steps_of(RECOMMENDED_EPOCHS, statistics)}
    rows = [
        (
            name,
            f"{max_steps:,}",
            f"{plan.epochs_of(max_steps, statistics):.2f}",
            *(eta(max_steps * plan.tokens_per_step, speed) for speed in speeds),
        )
        for name, max_steps in choices.items()
    ]
    known = all(speed.tokens_per_second for speed in speeds)
    counted = "The run itself counts its epochs' steps as its processes shuffle and pack: perhaps a few more or less."
    return "\n".join(
        [
            _table(title("Run"), ("", "max_steps", "epochs as packed", *(speed.where for speed in speeds)), *rows),
            f"A step takes {plan.tokens_per_step:,} tokens: seq_len {args.seq_len:,} x batch_size {args.batch_size} x "
            f"num_microbatches {args.num_microbatches} x {plan.num_gpus} GPU{'s' if plan.num_gpus > 1 else ''}.",
            *([] if args.epochs is None else [counted]),
            f"Times are estimates and include {OVERHEAD_SECONDS // 60} minutes for start-up, loading and saving."
            + ("" if known else " No speed can be estimated for this model on this GPU: give your own with --wps."),
        ]
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole if whole else 0:.1f} %)"


def _table(heading: str, *rows: tuple[str, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([heading, *lines])


def plot_lengths(lengths: Mapping[int, int], seq_len: int, path: Path) -> None:
    """Draws how many rows have which length.

    Args:
        lengths: tokens of a row -> number of rows.
        seq_len: marked by a line.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(list(lengths), weights=list(lengths.values()), bins=60, color="tab:blue", label="rows")
    axes.axvline(seq_len, color="tab:red", linestyle="--", label=f"seq_len {seq_len:,}")
    axes.set(xlabel="tokens", ylabel="rows", title="Length of the training rows")
    axes.legend()
    figure.savefig(path, format="png")
