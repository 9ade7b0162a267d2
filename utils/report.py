"""Training runs as one HTML page: `python -m utils.report RUN [RUN...] --out report.html`.

Summary, curves, configurations and where they differ, and answers before and after training where the runs kept
them. Reads `metrics.train.jsonl`, and of the rest of a run folder what there is; a run that still trains may be looked
at, too. The page needs no network. Kept answers may quote notes, and then so does the page.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune.cli import run_cli
from finetune.monitoring.metrics_logger import metrics_path, read_metrics
from finetune.redaction import redacted
from finetune.run_dir import saved_checkpoints
from model.errors import UserError
from utils.reports.html import page, table
from utils.reports.line_chart import Line, Point, line_chart, number_text, swatch
from utils.tables.jsonl import SkippedRowError, load_row, read_lines, save

MOST_SAMPLES = 8  # answers shown of each run
NONE = "–"
_SECRET_KEYS = ("key", "api_key", "token", "password")  # configurations of other tools keep theirs
_STYLE = """
body { max-width: 74rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: .5rem 2rem; }
figure { margin: 0; break-inside: avoid; } figure.wide { grid-column: 1 / -1; } figcaption { font-weight: 600; }
.legend span { margin-right: 1.5rem; white-space: nowrap; }
svg.swatch { width: 30px; height: 8px; margin-right: .4rem; vertical-align: middle; }
td, th { overflow-wrap: break-word; } tr { break-inside: avoid; } thead th { vertical-align: bottom; }
.settings { columns: 22rem; font-size: .85rem; } .settings div { overflow-wrap: anywhere; break-inside: avoid; }
.texts { table-layout: fixed; font-size: .85rem; }
.texts td, .texts th { text-align: left; vertical-align: top; white-space: pre-wrap; }
@media print { body { margin: 0; font-size: 11px; } * { print-color-adjust: exact; }
  .charts { grid-template-columns: 1fr 1fr; } }
"""


class Chart(NamedTuple):
    """What is drawn: (metrics file, key) in the order of drawing; those of `eval` have dots.

    Lines of zeros are left out where `not_zero`: they say that nothing was measured.
    """

    title: str
    keys: Sequence[tuple[str, str]]
    from_zero: bool = False
    smooth: bool = False
    wide: bool = False
    not_zero: bool = False


_LOSSES = (("train", "loss"), ("eval", "eval_loss"))
CHARTS = (
    Chart("Loss, nats per token (line: training; dots: evaluation)", _LOSSES, smooth=True, wide=True),
    Chart("Micro F1 of the answers", (("eval", "micro_f1"),), from_zero=True),
    Chart("Learning rate", (("train", "lr"),), from_zero=True),
    Chart("Gradient norm, before clipping", (("train", "grad_norm"),), smooth=True),
    Chart("Tokens per second", (("train", "wps"),), from_zero=True, smooth=True),
    Chart("Memory, peak, GiB", (("train", "peak_allocated_mem"),), from_zero=True, not_zero=True),
)


class Run(NamedTuple):
    """What a run folder tells; the settings are flat, by dotted keys, and empty where there is no args.yaml."""

    name: str
    folder: Path
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    settings: Mapping[str, str]
    checkpoint: Path | None

    def points(self, tag: str, key: str) -> list[Point]:
        """Steps and values of what was logged under `key`."""
        return [(record["step"], record[key]) for record in self.metrics[tag] if key in record]

    def best(self, tag: str, key: str, choose: Callable[[list[tuple[float, int]]], tuple[float, int]]) -> str:
        """The lowest or highest value, by `min` or `max`, and its step."""
        finite = [(value, -step) for step, value in self.points(tag, key) if value is not None]
        if not finite:
            return NONE
        value, step = choose(finite)
        return f"{value:.3f} (step {-step:,})"

    def last(self, key: str) -> float | None:
        """The last value of the training metrics; None where there is none."""
        return self.metrics["train"][-1].get(key) if self.metrics["train"] else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders; those of one name are named by their paths.

    Raises:
        UserError: a folder without metrics.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    return [_read_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names)]


def _read_run(folder: Path, name: str) -> Run:
    if not any(metrics_path(folder, tag).is_file() for tag in ("train", "eval")):
        raise UserError(f"{folder} is no run folder: expected one that holds metrics.train.jsonl.")
    metrics = {tag: read_metrics(folder, tag) for tag in ("train", "eval")}
    checkpoints = saved_checkpoints(folder / "checkpoints")
    return Run(name, folder, metrics, read_settings(folder / "args.yaml"), checkpoints[-1] if checkpoints else None)


def read_settings(path: Path) -> dict[str, str]:
    """Settings by dotted keys, secrets hidden; empty where the file is missing or cannot be read."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    return dict(_flat(redacted(settings))) if isinstance(settings, dict) else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key in _SECRET_KEYS and value:
            yield f"{prefix}{key}", "***"
        else:
            text = isinstance(value, str) and value
            yield f"{prefix}{key}", value if text else json.dumps(value, ensure_ascii=False, default=str)


def html_report(runs: Sequence[Run]) -> str:
    """The page."""
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"
    parts = [_summary(runs), _curves(runs), _differences(runs), _settings(runs), *map(_samples, runs)]
    return page(title, parts, _STYLE)


def _summary(runs: Sequence[Run]) -> str:
    header = ("run", "steps", "last training loss", "best evaluation loss", "best F1", "tokens/s", "peak memory")
    rows = [(*_facts(run), run.checkpoint.name if run.checkpoint else NONE) for run in runs]
    folders = "".join(f"<div>{escape(run.name)}: {escape(str(run.checkpoint or run.folder))}</div>" for run in runs)
    return f'{table((*header, "checkpoint"), rows)}\n<div class="small">{folders}</div>'


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


def _curves(runs: Sequence[Run]) -> str:
    legend = "".join(f"<span>{swatch(number)}{escape(run.name)}</span>" for number, run in enumerate(runs))
    figures = "\n".join(filter(None, (_figure(chart, runs) for chart in CHARTS)))
    charts = (
        f'<p class="legend">{legend}</p>\n<div class="charts">\n{figures}\n</div>' if figures else "<p>None yet.</p>"
    )
    return f"<h2>Curves</h2>\n{charts}"


def _figure(chart: Chart, runs: Sequence[Run]) -> str:
    """A chart; empty where nothing of it was measured, as memory without an accelerator."""
    lines = [
        Line(f"{run.name}, {key}", points, number, marked=tag == "eval")
        for number, run in enumerate(runs)
        for tag, key in chart.keys
        if (points := run.points(tag, key))
    ]
    values = [value for line in lines for _, value in line.points if value is not None]
    if not (any(values) if chart.not_zero else values):
        return ""
    kind, size = ("wide", (1080, 330)) if chart.wide else ("", (520, 270))
    drawn = line_chart(chart.title, lines, size, chart.from_zero, chart.smooth)
    return f'<figure class="{kind}"><figcaption>{escape(chart.title)}</figcaption>\n{drawn}</figure>'


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys whose values are not the same in all runs that have settings."""
    settings = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({each.get(key, NONE) for each in settings}) > 1]


def _differences(runs: Sequence[Run]) -> str:
    if sum(bool(run.settings) for run in runs) < 2:
        return ""
    rows = [(key, *(run.settings.get(key, NONE) for run in runs)) for key in differing_keys(runs)]
    found = table(("", *(run.name for run in runs)), rows, "texts") if rows else "<p>None.</p>"
    return f"<h2>Settings that differ</h2>\n{found}"


def _settings(runs: Sequence[Run]) -> str:
    missing = [run.name for run in runs if not run.settings]
    note = f'<p class="small">No args.yaml that can be read: {escape(", ".join(missing))}.</p>' if missing else ""
    known = [run.settings for run in runs if run.settings]
    differing = set(differing_keys(runs))
    shared = {key: value for key, value in (known[0] if known else {}).items() if key not in differing}
    lines = "\n".join(f"<div><b>{escape(key)}</b> {escape(value)}</div>" for key, value in shared.items())
    title = "Configuration" if len(runs) == 1 else "Settings of all runs"
    return f'<h2>{title}</h2>\n{note}\n<div class="settings">\n{lines}\n</div>'


def _samples(run: Run) -> str:
    """Expected answers, and those before and after training; empty where none were kept."""
    files = sorted((run.folder / "answers").glob("step_*.jsonl"), key=_step)
    if not files:
        return ""
    shown = [files[0], files[-1]][: len(files)]
    answers = [_read_answers(file) for file in shown]
    samples = [rows for rows in zip(*answers) if len({row.get("expected") for row in rows}) == 1]
    header = ("expected", *(f"step {_step(file):,}" for file in shown))
    texts = [(_text(rows[0], "expected"), *(_text(row, "answer") for row in rows)) for rows in samples[:MOST_SAMPLES]]
    of = f"{len(texts)} of {len(samples)} samples; all stand in {run.folder / 'answers'}."
    return f'<h2>Answers of {escape(run.name)}</h2>\n{table(header, texts, "texts")}\n<p class="small">{escape(of)}</p>'


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of training runs")
    parser.add_argument("--out", type=Path, required=True, help="the page, replaced where it exists")
    options = parser.parse_args()
    if options.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{options.out}: expected a name that ends in .html.")
    save({options.out: html_report(read_runs(options.runs))})
    print(f"{options.out}")


if __name__ == "__main__":
    run_cli(main)
