"""How many notes are needed: the demo's training on 100, 300, 1,000 and 3,000 fictional notes, scored on others.

`python -m benchmarks.learning_curve [--notes 100 300 1000 3000] [--steps 300] [--batch_size 3] [--answered 150]` trains
and appends to results/learning_curve.jsonl; `--show` prints the table again. Every run takes the same number of steps:
fewer notes are seen more often. The first use pretrains the demo's base model, which takes minutes.
"""

from pathlib import Path

from benchmarks.measure import spread
from benchmarks.small_runs import (
    Case,
    base_model,
    data_settings,
    epochs_seen,
    eval_losses,
    experiment_parser,
    notes_file,
    run_experiment,
    train_demo,
)
from finetune.cli import run_cli
from finetune.monitoring.metrics_logger import read_metrics

EVALUATIONS = 3  # per run
COLUMNS = {
    "notes": lambda result: f"{result['notes']:,}",
    "each seen": lambda result: f"{spread(result['epochs'], 1.0, 1)} times",
    "main diagnosis correct, %": lambda result: spread(result["dp_accuracy"], 0.01, 0),
    "role-aware micro-F1": lambda result: spread(result["role_micro_f1"], 1.0, 3),
    "training loss": lambda result: spread(result["train_loss"], 1.0, 3),
    "held-out loss": lambda result: spread(result["eval_loss"], 1.0, 3),
    "lowest held-out loss": lambda result: spread(result["best_eval_loss"], 1.0, 3),
    "each seen by then": lambda result: f"{spread(result['best_epochs'], 1.0, 1)} times",
}


def learn(case: Case, folder: Path) -> dict[str, float]:
    """Train on the first `notes` notes; return losses and scores after the last step, and the lowest loss."""
    freq = max(1, case["steps"] // EVALUATIONS)
    answered = notes_file(case["answered"], seed=2)
    run_dir = train_demo(
        folder,
        data=data_settings(case["notes"]),
        model_id_or_path=str(base_model()),
        max_steps=case["steps"],
        batch_size=case["batch_size"],
        seed=case["seed"],
        eval_freq=freq,
        eval_generation={"file": str(answered), "n_samples": case["answered"], "batch_size": 75, "max_tokens": 200},
    )
    losses = eval_losses(run_dir)
    best = min(losses, key=losses.__getitem__)
    train_losses = [line["loss"] for line in read_metrics(run_dir, "train")][-freq:]
    last = read_metrics(run_dir, "eval")[-1]
    epochs = epochs_seen(run_dir)
    return {
        "epochs": epochs,
        "dp_accuracy": last["dp_accuracy"],
        "role_micro_f1": last["role_micro_f1"],
        "train_loss": sum(train_losses) / len(train_losses),
        "eval_loss": losses[case["steps"]],
        "best_eval_loss": losses[best],
        "best_epochs": epochs * best / case["steps"],
    }


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--notes", type=int, nargs="+", default=[100, 300, 1000, 3000], help="numbers of notes")
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=3, help="sequences of 1,024 tokens (default: %(default)s)")
    parser.add_argument("--answered", type=int, default=150, help="notes answered (default: %(default)s)")
    options = parser.parse_args()
    size = {"steps": options.steps, "batch_size": options.batch_size, "answered": options.answered}
    cases = [{"notes": notes} | size for notes in options.notes]
    run_experiment("learning_curve", options, cases, learn, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
