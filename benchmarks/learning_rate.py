"""Which learning rate suits which batch size: the demo's training with both varied, on the same number of tokens.

`python -m benchmarks.learning_rate [--tokens 250000] [--seeds 1]` trains and appends to results/learning_rate.jsonl;
`--show` prints the table again. A batch of 1 takes four times the steps of a batch of 4. The first use pretrains the
demo's base model, which takes minutes.
"""

import itertools
from pathlib import Path

from benchmarks.measure import spread
from benchmarks.small_runs import (
    Case,
    base_model,
    data_settings,
    eval_losses,
    experiment_parser,
    run_experiment,
    train_demo,
)
from finetune.cli import run_cli
from finetune.monitoring.metrics_logger import read_metrics

NOTES, SEQ_LEN = 1000, 1024
COLUMNS = {
    "batch_size": lambda result: str(result["batch_size"]),
    "steps": lambda result: spread(result["steps"], 1.0, 0),
    "optim.lr": lambda result: f"{result['lr']:g}",
    "held-out loss": lambda result: spread(result["eval_loss"], 1.0, 3),
    "highest training loss after the warm-up": lambda result: spread(result["highest_loss"], 1.0, 2),
}


def learn(case: Case, folder: Path) -> dict[str, float]:
    """Train on `tokens` tokens; return the held-out loss, and the highest loss of a step after the warm-up."""
    steps = case["tokens"] // (case["batch_size"] * SEQ_LEN)
    run_dir = train_demo(
        folder,
        data=data_settings(NOTES),
        model_id_or_path=str(base_model()),
        max_steps=steps,
        seq_len=SEQ_LEN,
        batch_size=case["batch_size"],
        loss_normalization="tokens",  # so that the held-out loss does not depend on the batch size
        optim={"lr": case["lr"], "weight_decay": 0.1, "pct_start": 0.1},
        seed=case["seed"],
        eval_freq=steps,
    )
    losses = [line["loss"] for line in read_metrics(run_dir, "train")]
    return {"steps": steps, "eval_loss": eval_losses(run_dir)[steps], "highest_loss": max(losses[steps // 10 :])}


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="default: %(default)s")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=250_000, help="of each run (default: %(default)s)")
    options = parser.parse_args()
    pairs = itertools.product(options.batch_sizes, options.rates)
    cases = [{"batch_size": size, "lr": rate, "tokens": options.tokens} for size, rate in pairs]
    run_experiment("learning_rate", options, cases, learn, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
