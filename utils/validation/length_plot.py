"""The plot of row lengths, in the style of a run's loss plot."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.monitoring.plot import BAD, EVAL, TRAIN, new_figure, tidy
from model.wording import counted
from utils.validation.data_report import PERCENTILES
from utils.validation.data_statistics import DataStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 50
_LOG_SCALE_FROM = 10  # the token axis is logarithmic if the longest row is this many times longer than the median
_NEAR = 1.5  # the axis extends to a seq_len up to this many times longer than the longest row


def plot_lengths(training: DataStatistics, evaluation: DataStatistics | None, seq_len: int, path: Path) -> None:
    """Plot the distribution of row lengths to a PNG file."""
    from matplotlib.ticker import StrMethodFormatter

    figure = new_figure("Tokens per row", height=4.6)
    axes = figure.subplots()
    lengths = training.lengths + evaluation.lengths if evaluation else training.lengths
    end = max(lengths) + 1
    is_log = end > _LOG_SCALE_FROM * training.percentile(0.5)
    bins = np.geomspace(min(lengths), end, _BINS + 1) if is_log else np.linspace(0, end, _BINS + 1)
    _draw_rows(axes, "training", training, bins, color=TRAIN, alpha=0.8)
    if evaluation:
        _draw_rows(axes, "evaluation", evaluation, bins, color=EVAL, histtype="step", linewidth=1.6)
    _mark_seq_len(axes, seq_len, end)
    axes.set_xscale("log") if is_log else axes.set_xlim(left=0)
    axes.set(xlabel="tokens", ylabel="share of rows (%)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    tidy(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _draw_rows(axes: "Axes", name: str, data: DataStatistics, bins: np.ndarray, **style: Any) -> None:
    percentiles = ", ".join(f"{label} {data.percentile(share):,}" for label, share in PERCENTILES.items())
    label = f"{name}: {counted(data.rows, 'row')}, {percentiles}"
    shares = [100 * rows / data.rows for rows in data.lengths.values()]
    axes.hist(list(data.lengths), bins=bins.tolist(), weights=shares, label=label, **style)


def _mark_seq_len(axes: "Axes", seq_len: int, end: int) -> None:
    if seq_len <= _NEAR * end:
        axes.axvline(seq_len, color=BAD, linestyle="--", linewidth=1.2, label=f"seq_len {seq_len:,}")
    else:
        axes.text(1, 1.02, f"seq_len {seq_len:,} \N{RIGHTWARDS ARROW}", color=BAD, ha="right", transform=axes.transAxes)
