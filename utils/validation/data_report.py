"""The validator's report on data without errors: lengths, packing, and the length of the run."""

import json
from typing import Any

from utils.validation.data_statistics import RECOMMENDED_EPOCHS, DataStatistics, RunPlan
from utils.validation.throughput import OVERHEAD_SECONDS, Speed, eta

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def describe_expected(expected: dict[str, Any]) -> str:
    """Return mistral-finetune's block of statistics."""
    return "Train States\n --------------------\n" + json.dumps(expected, indent=4, ensure_ascii=False)


def describe_data(name: str, statistics: DataStatistics, seq_len: int) -> str:
    """Return the number of rows, of tokens, and their lengths."""
    chunks = f" (and {statistics.chunks:,} shorter conversations of rows with tools)" if statistics.chunks else ""
    lengths = ", ".join(f"{name} {statistics.percentile(share):,}" for name, share in PERCENTILES.items())
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
    """Compare what `concat` and `best_fit` do to the samples."""
    labels = (
        "samples split from (part of) their prompt",
        "trained tokens that see less than half of their context",
        "tokens dropped",
        "samples shortened, samples dropped",
        "positions filled",
        "sequences per epoch",
    )
    columns = [
        (
            f"{name} (configured)" if name == packing else name,
            _share(figures.split_samples, figures.samples),
            _share(figures.truncated_context_tokens, figures.trained),
            _share(figures.lost, figures.positions),
            f"{figures.shortened:,}, {figures.dropped:,}",
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
    """Compare steps, epochs and duration of the configured run with the recommended number of epochs."""
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
    lines = [
        _table(title("Run"), ("", "max_steps", "epochs as packed", *(speed.where for speed in speeds)), *rows),
        f"Tokens per step: {plan.tokens_per_step:,} (seq_len {args.seq_len:,} x batch_size {args.batch_size} x "
        f"num_microbatches {args.num_microbatches} x {plan.num_gpus} GPU{'s' if plan.num_gpus > 1 else ''}).",
    ]
    lines.append("`epochs` above is train_tokens / data_tokens; epochs as packed allow for dropped tokens and padding.")
    if args.epochs is not None:
        lines.append(
            "`epochs`: training counts its steps on each process's shuffled rows, so they may differ slightly."
        )
    lines.append(f"Times are estimates and include {OVERHEAD_SECONDS // 60} minutes for start-up, loading and saving.")
    lines += [f"{speed.where}: {speed.basis}." for speed in speeds if speed.basis]
    if not all(speed.tokens_per_second for speed in speeds):
        lines.append(
            "unknown: the model's shapes are unknown until its folder exists. Give a measured speed with --wps, or one "
            "of the names of `python -m utils.plan` as `model_id_or_path`."
        )
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole if whole else 0:.1f} %)"


def _table(heading: str, *rows: tuple[str, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([heading, *lines])
