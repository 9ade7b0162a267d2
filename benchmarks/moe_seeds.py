"""Whether mixtures of experts vary more between seeds than dense models: the demo's training of both, over seeds.

`python -m benchmarks.moe_seeds [--seeds 5] [--steps 100] [--base_steps 500]` trains and appends to
results/moe_seeds.jsonl; `--show` prints the table again. The dense model and the mixture (8 experts of half the width,
2 per token) have the same number of active parameters, are pretrained on the same notes, and are fine-tuned on the same
300. A seed determines the adapter and the order of the notes. The first use pretrains both models.
"""

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

NOTES = 300
COLUMNS = {
    "model": lambda result: f"mixture of {result['experts']} experts" if result["experts"] else "dense",
    "held-out loss": lambda result: spread(result["eval_loss"], 1.0, 3),
    "highest / lowest": lambda result: f"{result['eval_loss'][2] / result['eval_loss'][0]:.2f}",
}


def learn(case: Case, folder: Path) -> dict[str, float]:
    """Train with one seed; return the held-out loss after the last step."""
    steps = case["steps"]
    run_dir = train_demo(
        folder,
        data=data_settings(NOTES),
        model_id_or_path=str(base_model(case["base_steps"], case["experts"])),
        max_steps=steps,
        batch_size=1,
        eval_freq=steps,
        seed=case["seed"],
    )
    return {"eval_loss": eval_losses(run_dir)[steps]}


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.set_defaults(seeds=5)
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: %(default)s)")
    parser.add_argument("--base_steps", type=int, default=500, help="of pretraining (default: %(default)s)")
    options = parser.parse_args()
    cases = [{"experts": experts, "steps": options.steps, "base_steps": options.base_steps} for experts in (0, 8)]
    run_experiment("moe_seeds", options, cases, learn, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
