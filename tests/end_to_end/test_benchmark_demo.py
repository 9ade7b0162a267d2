"""The benchmark of the demo's scores, except the runs themselves, which take minutes."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.demo import prepare, summarize
from benchmarks.measure import ROOT


def test_a_seed_is_that_of_the_base_model_and_of_fine_tuning(tmp_path: Path) -> None:
    make, *arguments = prepare(tmp_path, 7)
    printed = subprocess.run([make, "-n", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    base_model = next(line for line in printed.splitlines() if "utils.make_demo_model" in line)
    assert base_model.endswith("--seed 7")
    configs = [
        yaml.safe_load((folder / "example/demo.yaml").read_text(encoding="utf-8")) for folder in (ROOT, tmp_path)
    ]
    assert configs[0]["seed"] == 0 and configs[1] == configs[0] | {"seed": 7}


def test_the_table_has_mean_and_range_over_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{notes}_{score}" for notes in ("tuned", "unseen") for score in ("f1", "precision", "recall")]
    names += [f"{notes}_{score}" for notes in ("tuned", "unseen") for score in ("role_blind_f1", "dp_accuracy")]
    results = [
        {"seed": seed, "seconds": [200.0] * 3} | {name: [value] * 3 for name in names}
        for seed, value in enumerate((0.9, 0.92, 0.97))
    ]
    record = json.loads((ROOT / "benchmarks/results/fp16.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    summarize(record | {"results": results})
    assert "| recall | 0.930 (0.900 to 0.970) | 0.930 (0.900 to 0.970) |" in capsys.readouterr().out
