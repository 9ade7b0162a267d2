"""The schedule step by step as the original runs it, its corners, and the fp16 loss scale."""

import json
import math
import warnings

import pytest
import torch

from finetune.args import OptimArgs
from finetune.mixed_precision import LossScaler, choose_dtype
from finetune.optim import build_optimizer
from tests.golden import fixture, load_json_gz

SCHEDULES = json.loads(fixture("expected/lr/one_cycle.json").read_text(encoding="utf-8"))["schedules"]
RUNS = load_json_gz(fixture("expected/train/trajectories.json.gz"))


def simulate(args: OptimArgs, max_steps: int) -> list[tuple[float, float]]:
    """(lr, beta1) that the optimizer uses at each step; warnings are errors."""
    optimizer, schedule = build_optimizer([torch.nn.Parameter(torch.zeros(1))], args, max_steps)
    used = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(max_steps):
            group = optimizer.param_groups[0]
            assert schedule.get_last_lr() == [group["lr"]]
            used.append((group["lr"], group["betas"][0]))
            optimizer.step()
            if step < max_steps - 1:
                schedule.step()
    return used


def optim_args(schedule) -> OptimArgs:
    values = {key: schedule[key] for key in ("pct_start", "div_factor", "final_div_factor")}
    return OptimArgs(lr=schedule["max_lr"], **values)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if "lr" in s], ids=lambda s: f"{s['max_steps']}-{s['pct_start']}")
def test_rates_and_betas_are_the_originals_at_every_step(schedule):
    used = simulate(optim_args(schedule), schedule["max_steps"])
    assert [lr for lr, _ in used] == pytest.approx(schedule["lr"], rel=1e-9)
    assert [beta for _, beta in used] == pytest.approx(schedule["beta1"], rel=1e-9)
