"""What a run says when it ends."""

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path


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
    """Returns the closing block of a run, one aligned line per fact; facts that do not apply are left out.

    Args:
        steps, max_steps: steps done and steps asked for.
        skipped_steps: steps whose gradients overflowed and changed nothing (fp16).
        tokens: tokens that went through the model, all ranks together.
        trained_tokens: those of them that carried loss.
        wall_seconds: from start to end of the command.
        train_seconds: of which training steps took.
        first_loss, last_loss: training loss of the first and the last step.
        eval_losses: evaluation loss by step, in the order of evaluation.
        peak_bytes: most accelerator memory ever allocated; 0 on CPU.
        checkpoint: folder of the last checkpoint.
        packing: the numbers of `finetune.data.packing.PackingCounts`, all ranks together.
    """
    facts = {
        "steps": f"{steps:,} of {max_steps:,}" + (f", {skipped_steps:,} skipped" if skipped_steps else ""),
        "tokens": f"{tokens:,}" + (f", {trained_tokens / tokens:.1%} of them with loss" if tokens else ""),
        "packing": _packing(**packing) if packing else "",
        "time": f"{_duration(wall_seconds)}, of which training {_duration(train_seconds)}",
        "speed": f"{tokens / train_seconds:,.0f} tokens/s" if train_seconds else "",
        "train loss": _change(first_loss, last_loss),
        "eval loss": _evaluations(eval_losses),
        "peak memory": f"{peak_bytes / 1024**3:.1f} GiB" if peak_bytes else "",
        "checkpoint": str(checkpoint) if checkpoint else "none saved",
    }
    width = max(map(len, facts))
    return "\n".join(["Training finished", *(f"  {name:<{width}}  {fact}" for name, fact in facts.items() if fact)])


def _packing(samples: int, shortened: int, dropped: int, removed_tokens: int, positions: int, filled: int) -> str:
    facts = []
    if filled < positions:
        facts.append(f"{filled / positions:.1%} of positions filled")
    if removed_tokens:
        facts.append(
            f"of {samples:,} samples read {shortened:,} shortened, {dropped:,} dropped ({removed_tokens:,} tokens)"
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
    text = f"{losses[last_step]:.3f}"
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    best_step = min(finite, key=finite.__getitem__, default=last_step)
    if best_step != last_step:
        text += f" (best {losses[best_step]:.3f} at step {best_step:,})"
    return text
