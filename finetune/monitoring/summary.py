"""The summary printed at the end of a run."""

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from finetune.next_commands import aligned


def summary(
    *,
    steps: int,
    max_steps: int,
    skipped_steps: int,
    tokens: int,
    trained_tokens: int,
    wall_seconds: float,
    train_seconds: float,
    first_loss: float | None,
    last_loss: float | None,
    eval_losses: Mapping[int, float],
    peak_bytes: int,
    checkpoint: Path | None,
    packing: Mapping[str, int] | None = None,
) -> str:
    """Return the summary of a run, one aligned line per fact; facts that do not apply are omitted.

    Args:
        steps, max_steps: steps done, and steps configured.
        skipped_steps: steps skipped because the gradient was not finite (fp16).
        tokens: tokens processed, of all ranks.
        trained_tokens: tokens with loss, of all ranks.
        wall_seconds: duration of the command.
        train_seconds: duration of the training steps.
        first_loss, last_loss: training loss of the first and the last step.
        eval_losses: evaluation loss by step, in the order of evaluation.
        peak_bytes: peak GPU memory allocated; 0 on CPU.
        checkpoint: folder of the last checkpoint.
        packing: the fields of `finetune.data.packing.PackingCounts`, of all ranks.
    """
    facts = {
        "steps": f"{steps:,} of {max_steps:,}" + (f", {skipped_steps:,} skipped" if skipped_steps else ""),
        "tokens": f"{tokens:,}" + (f" ({trained_tokens / tokens:.1%} with loss)" if tokens else ""),
        "packing": _packing(**packing) if packing else "",
        "time": f"{_duration(wall_seconds)} (training steps {_duration(train_seconds)})",
        "speed": f"{tokens / train_seconds:,.0f} tokens/s" if train_seconds else "",
        "train loss": _change(first_loss, last_loss),
        "eval loss": _evaluations(eval_losses),
        "peak memory": f"{peak_bytes / 1024**3:.1f} GiB" if peak_bytes else "",
        "checkpoint": str(checkpoint) if checkpoint else "none saved",
    }
    return "\n".join(["Training finished", *aligned({name: fact for name, fact in facts.items() if fact})])


def _packing(samples: int, shortened: int, dropped: int, removed_tokens: int, positions: int, filled: int) -> str:
    facts = []
    if filled < positions:
        facts.append(f"{filled / positions:.1%} of positions filled")
    if removed_tokens:
        facts.append(
            f"{shortened:,} of {samples:,} samples shortened, {dropped:,} dropped ({removed_tokens:,} tokens removed)"
        )
    return "; ".join(facts)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _change(first: float | None, last: float | None) -> str:
    return "" if first is None or last is None else f"{first:.3f} -> {last:.3f}"


def _evaluations(losses: Mapping[int, float]) -> str:
    if not losses:
        return ""
    last_step = next(reversed(list(losses)))
    last = f"{losses[last_step]:.3f}"
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    best_step = min(finite, key=finite.__getitem__, default=last_step)
    return last if best_step == last_step else f"{last} (best {losses[best_step]:.3f} at step {best_step:,})"
