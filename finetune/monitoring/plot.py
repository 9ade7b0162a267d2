"""Plot of a run: losses above, learning rate below."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.atomic import new_file
from model.errors import UserError

from .metrics_logger import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH_FROM = 50  # with more points than this, a smoothed curve is drawn over a thin raw one
LOG_SCALE_FROM = 50.0  # the loss axis is logarithmic if the ratio of largest to smallest loss is greater than this
_TOO_LARGE = 1e300  # matplotlib's margins around such a value would overflow

RAW, TRAIN, EVAL, LR, BAD = "#9dbbd8", "#1f5f99", "#d9622b", "#5b6b73", "#b3261e"


def draw_loss_curve(run_dir: Path) -> Path:
    """Plot the metrics of a run to `run_dir/loss.png` and return its path.

    If nothing has been logged yet, the plot states that.

    Raises:
        UserError: `run_dir` is not a folder, or the plot cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run folder; expected a folder with metrics.train.jsonl.")
    train, evals = read_metrics(run_dir, "train"), read_metrics(run_dir, "eval")
    figure = new_figure(f"Loss of {run_dir.resolve().name}", height=5.6)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(loss_axes, train, evals)
    _draw_learning_rate(lr_axes, train)

    path = run_dir / "loss.png"
    try:
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def new_figure(title: str, height: float) -> "Figure":
    """Return an empty figure in the style of all plots, `height` inches high."""
    from matplotlib.figure import Figure  # slow to import; used without pyplot: no display, no global state

    figure = Figure(figsize=(9, height), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def tidy(axes: "Axes") -> None:
    """Remove what distracts from the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_losses(axes: "Axes", train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    steps, losses = _series(train, "loss")
    eval_steps, eval_losses = _series(evals, "eval_loss")
    if len(steps) > SMOOTH_FROM:
        axes.plot(steps, losses, color=RAW, linewidth=0.7, label="train, logged steps")
        axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=1.9, label="train, smoothed")
    elif len(steps):
        axes.plot(steps, losses, color=TRAIN, linewidth=1.5, marker="o", markersize=3, label="train")
    if len(eval_steps):
        axes.plot(eval_steps, eval_losses, color=EVAL, linewidth=1.2, marker="o", markersize=5, label="eval")
    _mark_non_finite(axes, np.concatenate([steps[np.isnan(losses)], eval_steps[np.isnan(eval_losses)]]))
    values = np.concatenate([losses, eval_losses])
    _scale_losses(axes, values[~np.isnan(values)])
    axes.set_ylabel("loss (nats per token)")
    tidy(axes)
    if len(values):
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9)


def _mark_non_finite(axes: "Axes", steps: np.ndarray) -> None:
    if len(steps):
        bottom = axes.get_xaxis_transform()  # x in steps, y from 0 to 1 over the panel
        axes.plot(
            steps, np.full(len(steps), 0.02), "x", color=BAD, transform=bottom, label=f"not finite ({len(steps)})"
        )


def _scale_losses(axes: "Axes", finite: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not len(finite):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite loss logged", transform=axes.transAxes, ha="center", va="center", color=LR)
    elif finite.min() > 0 and finite.max() / finite.min() > LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_learning_rate(axes: "Axes", train: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, rates = _series(train, "lr")
    axes.plot(steps, rates, color=LR, linewidth=1.4, marker="o" if len(steps) == 1 else None, markersize=3)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    tidy(axes)


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [N] and values [N]; NaN if a value was not finite, or too large to be drawn."""
    found = [record for record in records if key in record and abs(record["step"]) < _TOO_LARGE]
    steps = np.array([record["step"] for record in found], dtype=float)
    values = np.array([math.nan if record[key] is None else record[key] for record in found], dtype=float)
    return steps, np.where(np.abs(values) < _TOO_LARGE, values, math.nan)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the centered moving average [N] of `values` [N], weighted by a Hann window; NaN values are ignored.

    The window covers about a tenth of the curve and is truncated at both ends. Where a value is NaN, so is its average.
    """
    window = np.hanning(max(7, len(values) // 10) | 1)
    known = ~np.isnan(values)
    weights = np.convolve(known.astype(float), window, mode="same")
    sums = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.divide(sums, weights, out=np.full(len(values), math.nan), where=known)
