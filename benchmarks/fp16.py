"""What loss scaling and the check of gradients prevent: the demo's training in fp16 at far too high a learning rate.

`python -m benchmarks.fp16 [--steps 40] [--lr 1]` trains with them, and without them as a loop that clips and updates
whatever the gradient is, and appends to results/fp16.jsonl; `--show` prints the table again. The first use pretrains
the demo's base model, which takes minutes.
"""

import math
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.small_runs import Case, base_model, data_settings, experiment_parser, run_experiment, train_demo
from finetune.cli import run_cli
from finetune.monitoring.metrics_logger import read_metrics
from model.errors import UserError

COLUMNS = {
    "loss and gradient": lambda result: "scaled and checked" if result["checked"] else "neither",
    "steps taken": lambda result: f"{result['steps_taken'][1]:.0f}",
    "of these skipped": lambda result: f"{result['skipped'][1]:.0f}",
    "first loss that is NaN": lambda result: f"step {result['first_nan'][1]:.0f}" if result["first_nan"][1] else "none",
    "NaN among the trained weights": lambda result: "yes" if result["weights_nan"][1] else "no",
    "end": lambda result: result["end"],
}


def unchecked_step(model, batches, optimizer, schedule, scaler, max_norm, device, tokens_per_rank=None):
    """Take one step as `train.train_step` does, without loss scaling and whatever the gradient is."""
    import torch

    from finetune.loss import batch_loss
    from finetune.schedules import step_schedule
    from train import StepResult

    optimizer.zero_grad(set_to_none=True)
    losses = [batch_loss(model, batch, device) / len(batches) for batch in batches]
    sum(losses).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    optimizer.step()
    lr = schedule.get_last_lr()[0]
    step_schedule(schedule)
    return StepResult(sum(losses).detach(), norm, lr, skipped=False)


def learn(case: Case, folder: Path) -> dict[str, Any]:
    """Train in this process and describe how the run went."""
    import train

    step = train.train_step if case["checked"] else unchecked_step
    end = "all steps taken"
    with mock.patch("train.train_step", step), mock.patch("train.training_loop", wraps=train.training_loop) as loop:
        try:
            train_demo(
                folder,
                data=data_settings(100),
                model_id_or_path=str(base_model()),
                param_dtype="fp16",
                max_steps=case["steps"],
                batch_size=1,
                no_eval=True,
                seed=case["seed"],
                optim={"lr": case["lr"], "pct_start": 0.5},
            )
        except UserError as error:
            end = str(error).partition(":")[0]
    (run,) = loop.call_args.args
    losses = [line["loss"] for line in read_metrics(folder / "run", "train")]
    nan = [step for step, loss in enumerate(losses, 1) if loss is None or math.isnan(loss)]
    weights = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    return {
        "steps_taken": run.state.step,
        "skipped": run.state.skipped_steps,
        "first_nan": nan[0] if nan else 0,
        "weights_nan": sum(not parameter.isfinite().all() for parameter in weights),
        "end": end,
    }


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of each run (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.0, help="peak learning rate (default: %(default)s)")
    options = parser.parse_args()
    cases = [{"checked": checked, "steps": options.steps, "lr": options.lr} for checked in (True, False)]
    run_experiment("fp16", options, cases, learn, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
