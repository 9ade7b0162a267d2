"""Learning rate schedules compared step by step with the original's, edge cases, and the fp16 loss scale."""

import dataclasses
import inspect
import itertools
import json
import logging
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from finetune import mixed_precision
from finetune.args import OptimArgs
from finetune.mixed_precision import DTYPES, LossScaler, choose_dtype
from finetune.optim import build_optimizer
from finetune.schedules import step_schedule
from model.args import PARAM_DTYPES, ModelArgs
from tests.support.golden import fixture, load_json_gz

ROOT = Path(__file__).parents[2]
SCHEDULES = json.loads(fixture("expected/lr/one_cycle.json").read_text(encoding="utf-8"))["schedules"]
CPU = torch.device("cpu")
WIDE = ModelArgs(512, 1, 64, 768, 8, 8, 1e-5, 32768)
RUNS = load_json_gz(fixture("expected/train/trajectories.json.gz"))


def simulate(args: OptimArgs, max_steps: int) -> list[tuple[float, float]]:
    """Return the (lr, beta1) that the optimizer uses at each step; warnings are errors."""
    optimizer, schedule = build_optimizer([torch.nn.Parameter(torch.zeros(1))], args, max_steps)
    used = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(max_steps):
            group = optimizer.param_groups[0]
            assert schedule.get_last_lr() == [group["lr"]]
            used.append((group["lr"], group["betas"][0]))
            optimizer.step()
            step_schedule(schedule)
    return used


def optim_args(schedule) -> OptimArgs:
    values = {key: schedule[key] for key in ("pct_start", "div_factor", "final_div_factor")}
    return OptimArgs(lr=schedule["max_lr"], **values)


def describe(schedule) -> str:
    return f"{schedule['max_steps']} steps, {schedule['pct_start']}"


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if "lr" in schedule], ids=describe)
def test_rates_and_betas_are_the_originals_at_every_step(schedule):
    used = simulate(optim_args(schedule), schedule["max_steps"])
    used = [used[step] for step in schedule.get("step_index_0based", range(len(used)))]
    assert [lr for lr, _ in used] == pytest.approx(schedule["lr"], rel=1e-9)
    assert [beta for _, beta in used] == pytest.approx(schedule["beta1"], rel=1e-9)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if not name.startswith("fork")])
def test_rates_and_betas_are_those_of_the_recorded_runs(name):
    run = RUNS[name]
    used = simulate(OptimArgs(**run["settings"]["optim"]), run["settings"]["max_steps"])
    for step in run["steps"]:
        assert used[step["step"] - 1][0] == pytest.approx(step["lr"], rel=1e-8)
        assert [used[step["step"] - 1][1], 0.95] == pytest.approx(step["betas"], rel=1e-8)


EDGE_CASES = [schedule for schedule in SCHEDULES if "crash" in schedule]


@pytest.mark.parametrize("schedule", EDGE_CASES, ids=describe)
def test_settings_that_divide_by_zero_in_the_original_give_a_regular_schedule(schedule):
    args, max_steps = optim_args(schedule), schedule["max_steps"]
    rates, betas = zip(*simulate(args, max_steps))
    if max_steps == 1:
        assert rates == pytest.approx([args.lr / args.div_factor / args.final_div_factor])  # as at any other pct_start
        return
    peak = max_steps - 1 if args.pct_start == 1 else 1
    assert rates[0] == pytest.approx(args.lr / args.div_factor) and betas[0] == pytest.approx(0.95)
    assert list(rates[:peak]) == sorted(rates[:peak]) and list(rates[peak:]) == sorted(rates[peak:], reverse=True)
    if max_steps > 2:
        assert rates[peak] == pytest.approx(args.lr, rel=0.01)


def test_a_skipped_first_step_moves_the_schedule_without_a_warning():
    optimizer, schedule = build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimArgs(lr=1e-3), 20)
    first_rate = optimizer.param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_schedule(schedule)  # without optimizer.step()
    assert optimizer.param_groups[0]["lr"] != first_rate


def test_without_warm_up_the_rate_only_decreases():
    rates = [rate for rate, _ in simulate(OptimArgs(lr=1e-3, pct_start=0.0), 10)]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.9e-3


def test_div_factors_set_the_first_and_the_last_rate():
    """The 24p11 fork declared them and never used them."""
    args = OptimArgs(lr=1e-3, pct_start=0.2, div_factor=250.0, final_div_factor=10.0)
    rates = [rate for rate, _ in simulate(args, 20)]
    assert (rates[0], max(rates), rates[-1]) == pytest.approx((1e-3 / 250, 1e-3, 1e-3 / 250 / 10))


def plain_rate(args: OptimArgs, max_steps: int, step: int) -> float:
    """Return the learning rate as finetune/args.py documents it, at a step counted from 0."""
    first, peak = args.lr / args.div_factor, max(args.pct_start * max_steps - 1, 0)
    if step < peak:
        return first + (args.lr - first) * step / peak
    if args.schedule == "constant" or max_steps - 1 == peak:
        return args.lr
    done, last = (step - peak) / (max_steps - 1 - peak), first / args.final_div_factor
    decayed = done if args.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return args.lr * (1 - decayed) + last * decayed


@pytest.mark.parametrize("max_steps, pct_start", [(1, 0.05), (2, 1), (20, 0), (20, 0.05), (20, 0.33), (50, 1)])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_other_schedules_warm_up_linearly_and_keep_beta1_constant(name, max_steps, pct_start):
    args = OptimArgs(schedule=name, lr=1e-3, pct_start=pct_start, div_factor=10.0, final_div_factor=5.0)
    rates, betas = zip(*simulate(args, max_steps))
    assert rates == pytest.approx([plain_rate(args, max_steps, step) for step in range(max_steps)])
    assert set(betas) == {0.9} and max(rates) <= args.lr * (1 + 1e-12)


def test_cosine_decays_as_one_cycle():
    one_cycle, cosine = (OptimArgs(schedule=name, pct_start=0.25) for name in ("onecycle", "cosine"))
    ours, theirs = ([rate for rate, _ in simulate(args, 40)] for args in (cosine, one_cycle))
    assert ours[9:] == pytest.approx(theirs[9:]) and ours[0] == pytest.approx(theirs[0])
    assert ours[5] != pytest.approx(theirs[5])


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimArgs)["schedule"]))
def test_a_restored_schedule_continues_from_its_step(name):
    """finetune.resume saves last_epoch, last_lr and the groups' settings."""
    args = OptimArgs(schedule=name, lr=1e-3, pct_start=0.3)
    optimizer, schedule = build_optimizer([torch.nn.Parameter(torch.zeros(1))], args, 20)
    schedule.last_epoch, expected = 11, simulate(args, 20)
    optimizer.param_groups[0]["lr"] = expected[11][0]
    rates = []
    for _ in range(12, 20):
        optimizer.step()
        schedule.step()
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
    assert rates == expected[12:]


def test_the_optimizer_is_adamw_with_the_yamls_weight_decay():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, _ = build_optimizer([weight], OptimArgs(lr=1e-2, weight_decay=0.5, pct_start=0.0), 10)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["betas"][1], group["eps"], group["weight_decay"]) == (0.95, 1e-8, 0.5)
    rate, weight.grad = group["lr"], torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((3,), 1 - rate * 0.5))  # decoupled: no gradient, only decay


def test_the_loss_scale_halves_on_overflow_and_doubles_after_consecutive_good_steps():
    scaler = LossScaler(torch.float16, scale=1024.0, growth_interval=3)
    scales = []
    for finite in (True, True, False, True, True, True, True, True, False, False):
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [1024, 1024, 512, 512, 512, 1024, 1024, 1024, 512, 256]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_are_not_scaled(dtype):
    scaler = LossScaler(dtype, growth_interval=1)
    scaler.update(True)
    scaler.update(False)
    assert not scaler.enabled and scaler.scale == 1.0


@pytest.mark.parametrize(
    "capability, expected", [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_is_bf16_on_ampere_and_later_and_fp16_before(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda"), WIDE) == expected
    assert choose_dtype("fp32", torch.device("cuda"), WIDE) == torch.float32


@pytest.mark.parametrize("speedup, expected", [(0.03, torch.float32), (1.4, torch.float32), (1.5, torch.bfloat16)])
def test_auto_on_a_cpu_is_bf16_where_its_products_are_faster(monkeypatch, speedup, expected):
    monkeypatch.setattr(mixed_precision, "bf16_speedup", lambda *shape: speedup)
    assert choose_dtype("auto", CPU, WIDE) == expected
    assert choose_dtype("fp32", CPU, WIDE) == torch.float32
    assert choose_dtype("bf16", CPU, WIDE) == torch.bfloat16


def test_a_cpu_is_measured_with_a_product_of_the_models_shape_unless_that_is_narrow(monkeypatch):
    measured = []
    monkeypatch.setattr(mixed_precision, "bf16_speedup", lambda *shape: measured.append(shape) or 9.0)
    assert choose_dtype("auto", CPU, dataclasses.replace(WIDE, dim=128)) == torch.float32
    assert choose_dtype("auto", CPU, dataclasses.replace(WIDE, dim=4096)) == torch.bfloat16
    assert measured == [(1024, 768)]


def test_slow_bf16_products_are_reported(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mixed_precision, "bf16_speedup", lambda *shape: 0.2)
    choose_dtype("bf16", CPU, WIDE)
    choose_dtype("auto", CPU, WIDE)
    slow, chosen = caplog.records
    assert slow.levelname == "WARNING" and "0.2 times as fast" in slow.message
    assert chosen.levelname == "INFO" and chosen.message.endswith("computing in fp32")


def test_the_speedup_is_measured_by_the_fastest_product_of_each_dtype(monkeypatch):
    clock = 0.0
    costs = {torch.float32: itertools.cycle([9.0, 5.0, 4.0]), torch.bfloat16: itertools.cycle([5.0, 2.0, 3.0])}

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        nonlocal clock
        assert x.shape[1] == weight.shape[1] == 300 and len(weight) == 500
        clock += next(costs[x.dtype])

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(mixed_precision.time, "perf_counter", lambda: clock)
    assert mixed_precision.bf16_speedup.__wrapped__(300, 500) == 2.0


def test_every_dtype_is_a_setting():
    assert tuple(DTYPES) == PARAM_DTYPES


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_steps_are_those_of_pytorchs_own_class(name):
    kinds = {"adamw": "AdamW", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adafactor": "Adafactor"}
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2)]
    ours, _ = build_optimizer(weights[:1], OptimArgs(name=name, lr=0.1), 10)
    theirs_class = getattr(torch.optim, kinds[name])
    group, accepted = ours.param_groups[0], inspect.signature(theirs_class).parameters.keys() - {"params"}
    theirs = theirs_class(weights[1:], **{key: value for key, value in group.items() if key in accepted})
    for _ in range(3):
        for optimizer, weight in zip((ours, theirs), weights, strict=True):
            optimizer.zero_grad()
            (weight**3).sum().backward()
            optimizer.step()
        assert weights[0].equal(weights[1])
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def test_a_run_does_not_wait_for_pytorchs_compiler():
    """Its import takes longer than everything else that a small run does before its first step."""
    code = """
import sys, torch
from finetune.args import OptimArgs
from finetune.optim import build_optimizer
from model.args import ModelArgs
from model.transformer import Transformer
args = ModelArgs(dim=8, n_layers=1, head_dim=4, hidden_dim=8, n_heads=2, n_kv_heads=1, norm_eps=1e-5, vocab_size=16)
before = set(sys.modules)
with torch.device("meta"):
    Transformer(args)
model = Transformer(args)
optimizer, _ = build_optimizer(model.parameters(), OptimArgs(), 2)
model(torch.tensor([1, 2, 3]), [3]).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print(*sorted({"torch._dynamo", "sympy"} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "\n"
