"""How much reduced-precision runs differ between versions of PyTorch and from mistral-finetune.

    python -m tests.end_to_end.trajectory_spread run FILE.pt          # in an environment of each version
    python -m tests.end_to_end.trajectory_spread compare FILE.pt ...

The runs of `test_training.py` in bf16 and fp16 are trained again (with GOLDEN_RUNS=all, every recorded one). The
largest relative differences are the reason for the tolerances of that test.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import train
from tests.end_to_end.test_training import ONE_RANK, TWO_RANKS, recorded_weights
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.run_trajectories import RUNS, golden_config, read_jsonl, torchrun


@dataclass
class Outcome:
    """What a run computed: the metrics of each step, and the tensors of each checkpoint that is recorded."""

    steps: list[dict[str, float]]
    checkpoints: dict[str, dict[str, Tensor]]


def run_all() -> dict[str, Outcome]:
    """Train the runs in bf16 and fp16. Return their outcomes by name."""
    torch.set_num_threads(1)
    one_rank, two_ranks = (
        [name for name in names if RUNS[name]["param_dtype"] != "float32"] for names in (ONE_RANK, TWO_RANKS)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "tiny_dense": make_tiny_checkpoint(folder / "tiny_dense"),
            "tiny_moe": make_tiny_checkpoint(folder / "tiny_moe", moe=True),
        }
        configs = [golden_config(name, models, folder) for name in two_ranks]
        torchrun("tests.support.run_trajectories", *configs).check_returncode()
        for name in one_rank:
            train.train(str(golden_config(name, models, folder)))
        return {name: _outcome(name, folder / name) for name in one_rank + two_ranks}


def _outcome(name: str, run_dir: Path) -> Outcome:
    files = {
        checkpoint: run_dir / "checkpoints" / checkpoint / "consolidated" / saved["safetensors_file"]
        for checkpoint, saved in RUNS[name]["checkpoints"].items()
    }
    return Outcome(
        read_jsonl(run_dir / "metrics.train.jsonl"), {checkpoint: load_file(file) for checkpoint, file in files.items()}
    )


def original(name: str) -> Outcome:
    """Return what mistral-finetune computed; without the tensors that were not kept."""
    kept = {checkpoint: recorded_weights(saved) for checkpoint, saved in RUNS[name]["checkpoints"].items()}
    return Outcome(RUNS[name]["steps"], {checkpoint: load_file(file) for checkpoint, file in kept.items() if file})


def differences(ours: Outcome, theirs: Outcome) -> Iterator[tuple[str, float]]:
    """Yield what differs by how much, relatively."""
    for key in ("loss", "grad_norm"):
        for one, other in zip(ours.steps, theirs.steps, strict=True):
            yield key, abs(one[key] / other[key] - 1)
    for checkpoint in ours.checkpoints.keys() & theirs.checkpoints.keys():
        for name, other in theirs.checkpoints[checkpoint].items():
            one, other = ours.checkpoints[checkpoint][name].double(), other.double()
            yield "norm of a tensor", float(abs(one.norm() / other.norm() - 1))
            yield "error of a tensor", float((one - other).norm() / other.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "compare"))
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args()
    if options.command == "run":
        runs = {name: asdict(outcome) for name, outcome in run_all().items()}
        torch.save({"torch": str(torch.__version__), "runs": runs}, options.files[0])
        return
    found = {}
    for file in options.files:
        measured = torch.load(file)
        found[f"torch {measured['torch']}"] = {name: Outcome(**facts) for name, facts in measured["runs"].items()}
    found["mistral-finetune"] = {name: original(name) for name in measured["runs"]}
    for (first, ours), (second, theirs) in itertools.combinations(found.items(), 2):
        print(f"{first}, {second}:")
        for name in ours:
            worst: dict[str, float] = {}
            for what, difference in differences(ours[name], theirs[name]):
                worst[what] = max(difference, worst.get(what, 0.0))
            print(f"  {name}: " + ", ".join(f"{what} {difference:.2%}" for what, difference in worst.items()))


if __name__ == "__main__":
    main()
