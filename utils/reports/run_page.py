"""Training runs, read from their folders and shown as an HTML page."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.monitoring.metrics_logger import metrics_path, read_metrics
from finetune.redaction import redacted
from finetune.run_dir import saved_checkpoints
from finetune.yaml_file import read_yaml
from model.errors import UserError
from utils.reports.charts import Figure, Line, Point, line_chart, number_text
from utils.reports.pages import render_page
from utils.tables.jsonl import SkippedRowError, load_row, read_lines

MOST_SAMPLES = 8  # answers shown of each run
NONE = "–"
_SECRET_KEYS = ("key", "api_key", "token", "password")  # configurations of other tools keep theirs


class Chart(NamedTuple):
    """What a chart shows: (metrics file, key) in the order of drawing; those of `eval` have dots."""

    name: str
    title: str
    unit: str
    keys: Sequence[tuple[str, str]]
    from_zero: bool = False
    smooth: bool = False


CHARTS = (
    Chart("loss", "Loss", "nats per token", (("train", "loss"), ("eval", "eval_loss")), smooth=True),
    Chart("f1", "Micro-F1 of the answers", "0 to 1", (("eval", "micro_f1"),), from_zero=True),
    Chart("lr", "Learning rate", "", (("train", "lr"),), from_zero=True),
    Chart("gradient", "Gradient norm", "before clipping", (("train", "grad_norm"),), smooth=True),
    Chart("speed", "Speed", "tokens per second", (("train", "wps"),), from_zero=True, smooth=True),
    Chart("memory", "Peak memory", "GiB", (("train", "peak_allocated_mem"),), from_zero=True),
)
_MEASURED_IF_NOT_ZERO = ("memory",)  # without an accelerator it is logged as 0
_TAG_NAMES = {"train": "training", "eval": "evaluation"}
_SUMMARY = ("run", "steps", "last training loss", "best evaluation loss", "best F1", "tokens/s", "peak memory")


class Run(NamedTuple):
    """Contents of a run folder. Settings are flat, by dotted keys, and empty without a readable args.yaml."""

    name: str
    folder: Path
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    settings: Mapping[str, str]
    checkpoint: Path | None

    def points(self, tag: str, key: str) -> list[Point]:
        """Return steps and values that were logged under `key`."""
        return [(record["step"], record[key]) for record in self.metrics[tag] if key in record]

    def best(self, tag: str, key: str, choose: Callable[[list[tuple[float, float]]], tuple[float, float]]) -> str:
        """Return the lowest or highest value (`choose` is `min` or `max`) and its step."""
        finite = [(value, -step) for step, value in self.points(tag, key) if value is not None]
        if not finite:
            return NONE
        value, step = choose(finite)
        return f"{value:.3f} (step {-step:,.0f})"

    def last(self, key: str) -> float | None:
        """Return the last value of the training metrics, if there is one."""
        return self.metrics["train"][-1].get(key) if self.metrics["train"] else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; those with equal names are named by their paths.

    Raises:
        UserError: a folder has no metrics.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    return [_read_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names)]


def _read_run(folder: Path, name: str) -> Run:
    if not any(metrics_path(folder, tag).is_file() for tag in ("train", "eval")):
        raise UserError(f"{folder} is not a run folder: expected one with metrics.train.jsonl.")
    metrics = {tag: read_metrics(folder, tag) for tag in ("train", "eval")}
    checkpoints = saved_checkpoints(folder / "checkpoints")
    return Run(name, folder, metrics, read_settings(folder / "args.yaml"), checkpoints[-1] if checkpoints else None)


def read_settings(path: Path) -> dict[str, str]:
    """Read settings by dotted keys, with secrets hidden; empty if the file is missing or invalid."""
    try:
        return dict(_flat(redacted(read_yaml(path))))
    except UserError:
        return {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key in _SECRET_KEYS and value:
            yield f"{prefix}{key}", "***"
        else:
            is_text = isinstance(value, str) and value
            yield f"{prefix}{key}", value if is_text else json.dumps(value, ensure_ascii=False, default=str)


def html_report(runs: Sequence[Run]) -> str:
    """Return the page: summary, curves, settings and where they differ, answers before and after training."""
    known = [run.settings for run in runs if run.settings]
    differing = differing_keys(runs)
    differences = [(key, *(run.settings.get(key, NONE) for run in runs)) for key in differing]
    return render_page(
        "runs.html",
        title=f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs",
        runs=runs,
        summary_header=(*_SUMMARY, "checkpoint"),
        summary=[(*_facts(run), run.checkpoint.name if run.checkpoint else NONE) for run in runs],
        legend=list(_TAG_NAMES.values()) if len(runs) == 1 else [run.name for run in runs],
        charts=[drawn for chart in CHARTS if (drawn := _draw(chart, runs))],
        differences=differences if len(known) > 1 else None,
        settings={key: value for key, value in (known[0] if known else {}).items() if key not in differing},
        unreadable=", ".join(run.name for run in runs if not run.settings),
        samples=[answers for run in runs if (answers := _samples(run))],
    )


def _facts(run: Run) -> tuple[str, ...]:
    step, done, loss = (run.last(key) for key in ("step", "percent_done", "loss"))
    skipped = run.last("skipped_steps")
    speed, memory = run.last("avg_wps"), run.last("peak_allocated_mem")
    steps = f"{step:,}" + (f" of {round(100 * step / done):,}" if done else "") if step else NONE
    return (
        run.name,
        steps + (f", {skipped:,} skipped" if skipped else ""),
        NONE if loss is None else f"{loss:.3f}",
        run.best("eval", "eval_loss", min),
        run.best("eval", "micro_f1", max),
        number_text(speed) if speed else NONE,
        f"{memory:.1f} GiB" if memory else NONE,
    )


def _draw(chart: Chart, runs: Sequence[Run]) -> Figure | None:
    """Return a chart; None if nothing of it was measured.

    Runs have one color each. A single run has one for training and one for evaluation, as in loss.png.
    """
    lines = []
    for number, run in enumerate(runs):
        for tag, key in chart.keys:
            if points := run.points(tag, key):
                series = number if len(runs) > 1 else list(_TAG_NAMES).index(tag)
                lines.append(Line(f"{run.name}, {key}", points, series, marked=tag == "eval"))
    values = [value for line in lines for _, value in line.points if value is not None]
    if not (any(values) if chart.name in _MEASURED_IF_NOT_ZERO else values):
        return None
    has_both = len({tag for tag, _ in chart.keys}) > 1 and len(runs) > 1
    detail = chart.unit + "; line: training, dots: evaluation" * has_both
    svg = line_chart(chart.name, chart.title, lines, chart.from_zero, chart.smooth)
    return Figure(chart.title, detail, svg)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys whose values are not the same in all runs that have settings."""
    settings = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({each.get(key, NONE) for each in settings}) > 1]


def _samples(run: Run) -> dict[str, Any] | None:
    """Return expected answers and those before and after training; None if the run kept none."""
    files = sorted((run.folder / "answers").glob("step_*.jsonl"), key=_step)
    if not files:
        return None
    shown = [files[0], files[-1]][: len(files)]
    answers = [_read_answers(file) for file in shown]
    samples = [rows for rows in zip(*answers) if len({row.get("expected") for row in rows}) == 1]
    rows = [(_text(each[0], "expected"), *(_text(row, "answer") for row in each)) for each in samples[:MOST_SAMPLES]]
    return {
        "run": run.name,
        "header": ("expected", *(f"step {_step(file):,}" for file in shown)),
        "rows": rows,
        "shown": len(rows),
        "total": len(samples),
        "folder": run.folder / "answers",
    }


def _step(file: Path) -> int:
    digits = file.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def _read_answers(file: Path) -> list[dict[str, Any]]:
    rows = []
    for _, line in read_lines(file, errors="replace"):
        try:
            rows.append(load_row(line))
        except SkippedRowError:  # cut short while it was written
            continue
    return rows


def _text(row: Mapping[str, Any], key: str) -> str:
    return str(row.get(key, NONE))
