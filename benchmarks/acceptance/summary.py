"""The summary of a run, as a page and as Markdown, from the lines that its parts have written."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.acceptance.runner import FINISHED, RESULTS
from model.wording import counted
from utils.reports.pages import render_page

_GIB = 1 << 30
_RESULTS = {True: "passed", False: "FAILED", None: "–"}
Line = dict[str, Any]


class Table(NamedTuple):
    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Findings(NamedTuple):
    """The lines of a run: what each part found, and how it ended."""

    checks: list[Line]
    endings: list[Line]

    @property
    def failed(self) -> list[Line]:
        return [check for check in self.checks if check["passed"] is False]

    @property
    def unfinished(self) -> list[Line]:
        return [ending for ending in self.endings if ending["state"] != FINISHED]


def read_findings(out: Path) -> Findings:
    """Read the lines that a run has written so far."""
    lines = [json.loads(line) for line in (out / RESULTS).read_text(encoding="utf-8").splitlines()]
    return Findings([line for line in lines if "passed" in line], [line for line in lines if "state" in line])


def write_summary(out: Path) -> str:
    """Write summary.md and summary.html; return one sentence that sums them up."""
    found = read_findings(out)
    tables = [table for table in _tables(found) if table.rows]
    lead = _lead(found)
    parts = [f"# Acceptance run\n\n{lead}\n"]
    for name, header, rows in tables:
        lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
        parts.append(f"## {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    (out / "summary.md").write_text("\n".join(parts), encoding="utf-8")
    page = render_page("tables.html", title="Acceptance run", lead=lead, tables=tables)
    (out / "summary.html").write_text(page, encoding="utf-8")
    return lead


def _lead(found: Findings) -> str:
    passed = sum(check["passed"] is True for check in found.checks)
    seconds = sum(ending["seconds"] for ending in found.endings)
    done = len(found.endings) - len(found.unfinished)
    counts = (
        f"{counted(passed, 'check')} passed, {len(found.failed)} failed; {done} of {len(found.endings)} parts finished"
    )
    where = next((check["numbers"] for check in found.checks if check["name"] == "versions"), None)
    if where is None:  # without the part that records them
        return f"{counts}, in {seconds:.0f} s."
    device, transformers = where.get("gpu", where["cpu"]), where.get("transformers", "not installed")
    return f"{counts}, in {seconds:.0f} s. {device}, torch {where['torch']}, transformers {transformers}."


def _tables(found: Findings) -> Iterator[Table]:
    yield Table("Failed", ("part", "check", "reason"), [_reason(line) for line in [*found.failed, *found.unfinished]])
    yield Table(
        "Parts", ("part", "state", "passed", "failed", "seconds"), [_part(line, found) for line in found.endings]
    )
    header = (
        "preset",
        "implementation",
        "settings",
        "recomputed",
        "attention",
        "tokens/s",
        "MFU",
        "peak",
        "of PEFT's speed",
    )
    yield Table("Speed", header, list(_speeds(found.checks)))
    yield Table("Memory", ("preset", "settings", "planned", "peak", "error"), list(_memory(found.checks)))
    yield Table("Kernels", ("kernel", "calls", "ms"), list(_kernels(found.checks)))
    rows = [(line["part"], line["name"], _RESULTS[line["passed"]], _details(line)) for line in found.checks]
    yield Table("All checks", ("part", "check", "result", "details"), rows)


def _reason(line: Line) -> Sequence[str]:
    return line["part"], line.get("name", ""), line.get("message") or line.get("state", "")


def _part(ending: Line, found: Findings) -> Sequence[str]:
    own = [check["passed"] for check in found.checks if check["part"] == ending["part"]]
    return ending["part"], ending["state"], str(own.count(True)), str(own.count(False)), f"{ending['seconds']:.1f}"


def _speeds(checks: Sequence[Line]) -> Iterator[Sequence[str]]:
    measured = [check for check in checks if "tokens_per_second" in check["numbers"]]
    peers = {
        check["numbers"]["preset"]: check["numbers"]["tokens_per_second"]
        for check in measured
        if check["name"].endswith(", peft")
    }
    for check in measured:
        numbers = check["numbers"]
        speed, peer = numbers["tokens_per_second"], peers.get(numbers["preset"])
        yield (
            numbers["preset"],
            "this project" if check["name"].endswith(", ours") else "transformers + PEFT",
            " ".join(numbers["set"]),
            numbers["recomputed"],
            numbers["attention"],
            f"{speed:,.0f}",
            f"{100 * numbers['mfu']:.1f} %",
            f"{numbers['peak_bytes'] / _GIB:.2f} GiB",
            f"{speed / peer:.2f}" if peer else "",
        )


def _memory(checks: Sequence[Line]) -> Iterator[Sequence[str]]:
    for numbers in (check["numbers"] for check in checks if "planned_bytes" in check["numbers"]):
        settings = [f"seq_len={numbers['seq_len']}", f"checkpoint={numbers['checkpoint']}", *numbers["set"]]
        planned, peak = (f"{numbers[key] / _GIB:.2f} GiB" for key in ("planned_bytes", "peak_bytes"))
        yield numbers["preset"], " ".join(settings), planned, peak, f"{100 * numbers['error']:+.1f} %"


def _kernels(checks: Sequence[Line]) -> Iterator[Sequence[str]]:
    for check in checks:
        for kernel in check["numbers"].get("kernels", ()):
            yield kernel["kernel"], f"{kernel['calls']:,}", f"{kernel['ms']:.3f}"


def _details(line: Line) -> str:
    numbers = {key: value for key, value in line["numbers"].items() if key != "kernels"}
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()]
    return "; ".join([*([line["message"]] if line["message"] else []), *shown])
