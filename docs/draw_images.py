"""Draw the plots of the documentation: `python -m docs.draw_images` writes precision.png, learning_rate.png and, from
benchmarks/results, learning_curve.png to docs/images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.measure import RESULTS
from benchmarks.small_runs import latest_results
from finetune.args import OptimArgs, read_train_args
from finetune.monitoring.plot import EVAL, LR, RAW, TRAIN, new_figure, tidy
from finetune.optim import build_optimizer
from finetune.schedules import step_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = Path(__file__).with_name("images")
EXAMPLE = Path(__file__).parents[1] / "example/instruct_icd_v1_v100.yaml"
_TEXT = 13  # points; still readable on a phone


@dataclasses.dataclass(frozen=True)
class Format:
    """A floating-point format of 1 sign bit, `exponent` and `mantissa` bits, as IEEE 754 defines them."""

    name: str
    exponent: int
    mantissa: int

    @property
    def largest(self) -> float:
        return float(2 ** (2 ** (self.exponent - 1)) - 2 ** (2 ** (self.exponent - 1) - 1 - self.mantissa))

    @property
    def smallest(self) -> float:
        """The smallest number with all digits; those below lose them (subnormal numbers)."""
        return 2.0 ** (2 - 2 ** (self.exponent - 1))

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next number."""
        return 2.0**-self.mantissa


FORMATS = (Format("fp32", 8, 23), Format("tf32", 8, 10), Format("bf16", 8, 7), Format("fp16", 5, 10))


def learning_rates(args: OptimArgs, steps: int) -> list[float]:
    """Return the learning rate of each step, from the optimizer and the schedule that training builds."""
    optimizer, schedule = build_optimizer([torch.nn.Parameter(torch.zeros(1))], args, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        step_schedule(schedule)
    return rates


def _settings(args: OptimArgs) -> str:
    return ", ".join(f"{name} {getattr(args, name):g}" for name in ("pct_start", "div_factor", "final_div_factor"))


def draw_formats() -> "Figure":
    """Draw the bits of each format, and what they can represent."""
    from matplotlib.patches import Rectangle

    figure = new_figure("Bits of a number", height=4.6)
    axes = figure.subplots()
    for row, form in enumerate(FORMATS):
        colors = [LR] + form.exponent * [EVAL] + form.mantissa * [RAW]
        for bit, color in enumerate(colors):
            axes.add_patch(Rectangle((bit, -row), 0.9, 0.5, color=color))
        facts = f"up to {form.largest:.1e}, from {form.smallest:.1e}, steps of {form.epsilon:.1e} at 1"
        axes.text(0, 0.56 - row, f"{form.name}: {facts}", fontsize=_TEXT)
    for place, color, label in ((0, LR, "sign"), (7, EVAL, "exponent (range)"), (20, RAW, "mantissa (digits)")):
        axes.add_patch(Rectangle((place, -3.75), 0.9, 0.3, color=color))
        axes.text(place + 1.2, -3.72, label, fontsize=_TEXT)
    axes.set(xlim=(-0.2, 32.5), ylim=(-3.9, 0.95))
    axes.axis("off")
    return figure


def draw_learning_rates(steps: int = 300) -> "Figure":
    """Draw the rate of each schedule, and OneCycleLR with several `div_factor`s and `final_div_factor`s."""
    figure = new_figure(f"Learning rate of {steps} steps", height=7.6)
    panels = figure.subplots(3, 1, sharex=True)
    base = OptimArgs(lr=6e-5, pct_start=0.1)
    v100 = read_train_args(EXAMPLE, lambda args: []).optim
    curves: Sequence[dict[str, OptimArgs]] = (
        {name: dataclasses.replace(base, schedule=name) for name in ("onecycle", "cosine", "linear", "constant")},
        {f"div_factor: {factor:g}": dataclasses.replace(base, div_factor=factor) for factor in (25, 5, 1.25)},
        {
            f"{EXAMPLE.name}: {_settings(v100)}": v100,
            f"final_div_factor {base.final_div_factor:,.0f}": dataclasses.replace(
                v100, final_div_factor=base.final_div_factor
            ),
        },
    )
    for axes, panel in zip(panels, curves, strict=True):
        for (label, args), color, style in zip(panel.items(), (TRAIN, EVAL, LR, RAW), ("-", "--", "-.", ":")):
            axes.plot(range(1, steps + 1), learning_rates(args, steps), style, color=color, linewidth=2, label=label)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.tick_params(labelsize=_TEXT - 2)
        axes.set_ylim(bottom=0)
        tidy(axes)
        columns = 4 if len(panel) > 2 else 1
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=_TEXT - 2)
    panels[-1].set_xlabel("step", fontsize=_TEXT)
    return figure


def draw_learning_curve() -> "Figure":
    """Draw scores and losses by the number of notes, from the results of benchmarks.learning_curve."""
    results = latest_results("learning_curve")["results"]
    notes = [result["notes"] for result in results]
    figure = new_figure(f"Fictional notes trained on, {results[0]['steps']} steps each", height=4.6)
    scores, losses = figure.subplots(1, 2)
    lines = (
        (scores, "dp_accuracy", "main diagnosis correct", TRAIN, "-"),
        (scores, "role_micro_f1", "role-aware micro-F1", EVAL, "--"),
        (losses, "eval_loss", "held-out notes", EVAL, "--"),
        (losses, "train_loss", "notes trained on", TRAIN, "-"),
    )
    for axes, key, label, color, style in lines:
        medians = [result[key][1] for result in results]
        axes.plot(notes, medians, style, color=color, marker="o", linewidth=2, label=label)
    for axes, title in (
        (scores, f"scores of {results[0]['answered']} held-out notes"),
        (losses, "loss (nats per token)"),
    ):
        axes.set_xscale("log")
        axes.set_xticks(notes, [f"{count:,}" for count in notes], minor=False, fontsize=_TEXT - 2)
        axes.minorticks_off()
        axes.set_title(title, fontsize=_TEXT, loc="left")
        axes.tick_params(axis="y", labelsize=_TEXT - 2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("notes", fontsize=_TEXT)
        tidy(axes)
        axes.legend(frameon=False, fontsize=_TEXT - 1)
    return figure


def main() -> None:
    drawn = {"precision": draw_formats, "learning_rate": draw_learning_rates}
    if (RESULTS / "learning_curve.jsonl").is_file():
        drawn["learning_curve"] = draw_learning_curve
    for name, draw in drawn.items():
        draw().savefig(IMAGES / f"{name}.png", metadata={"Software": None})
        print(f"Wrote {IMAGES / name}.png")


if __name__ == "__main__":
    main()
