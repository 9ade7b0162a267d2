"""Every optimizer and schedule: builds, resumes exactly, and reports what it needs and what it does not read."""

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.fsdp import fully_shard

from finetune.anomalies import AnomalyDetector
from finetune.args import (
    SHARDED_OPTIMIZERS,
    EarlyStoppingArgs,
    OptimArgs,
    TrainArgs,
    UnshardedOptimizer,
    load_train_args,
)
from finetune.data.args import DataArgs
from finetune.distributed import World, init_world
from finetune.eval import EarlyStopping
from finetune.mixed_precision import LossScaler
from finetune.optim import build_optimizer, check_optimizer, initialize_state, optimizer_bytes
from finetune.resume import RUN_NAME, RunState, SavedState
from finetune.resume import _open as open_saved
from finetune.schedules import OPEN_ENDED, Plan, PlateauSchedule, step_schedule
from finetune.state_files import RunRecord, read_state_file
from finetune.utils import TrainState
from model.errors import UserError
from tests.end_to_end.kill_runs import kill_test_config

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
UNSHARDED = UnshardedOptimizer.__args__
OPTIMIZERS = (*SHARDED_OPTIMIZERS, *UNSHARDED)
SCHEDULES = {
    "onecycle": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "linear": {},
    "polynomial": {"power": 2},
    "inverse_sqrt": {},
    "constant": {},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0},
}
FINGERPRINTS = {"data": {}, "evaluation": {}, "weights": {}, "shapes": "", "tokenizer": ""}
LOSSES = [3.0, 2.0, 2.5, 2.4, 1.0, 1.5, 1.4, 1.3]  # evaluation losses after each step


class TinyRun:
    """A run on a model of two layers, one of which is large enough for a state in 8 bits."""

    def __init__(
        self, folder: Path, optim: OptimArgs, max_steps: int = 8, plan: Plan | None = None, world: World = ALONE
    ) -> None:
        self.args = TrainArgs(DataArgs(), "", str(folder / "run"), optim=optim, max_steps=max_steps)
        self.world = world
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 4, bias=False))
        if world.size > 1:
            fully_shard(self.model)
        plan = plan or Plan(0, max_steps)
        optimizer, schedule = build_optimizer(self.model.parameters(), optim, max_steps, plan)
        self.state = RunState(
            model=self.model,
            optimizer=optimizer,
            schedule=schedule,
            plan=plan,
            scaler=LossScaler(torch.float32),
            state=TrainState(max_steps, evaluation_pending=False),
            early_stopping=EarlyStopping(self.args.early_stopping),
            anomalies=AnomalyDetector(self.args.guards, folder, 0),
            data_loader=None,
            fingerprints=FINGERPRINTS,
        )

    def train(self, steps: int) -> list[float]:
        """Return the learning rate of each step."""
        rates = []
        for _ in range(steps):
            step = self.state.state.step
            inputs = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
            self.state.optimizer.zero_grad()
            self.model(inputs).square().mean().backward()
            rates.append(self.state.optimizer.param_groups[0]["lr"])
            assert self.state.schedule.get_last_lr() == rates[-1:]
            self.state.optimizer.step()
            step_schedule(self.state.schedule)
            self.state.state.step += 1
            if isinstance(self.state.schedule, PlateauSchedule):
                self.state.schedule.record_evaluation(LOSSES[step])
        return rates

    def save(self, folder: Path) -> SavedState:
        """Save as finetune.checkpointing does. Return what a resumed run reads."""
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(self.state.tensors(), storage_writer=writer, no_dist=self.world.size == 1)
        # As if saved by other ranks: then the files of ranks, with data and random numbers, are not read.
        run = self.state.of_run(self.args, self.world) | {"world_size": 99, "best": False}
        if self.world.is_master:
            (folder / RUN_NAME).write_text(json.dumps(run))
        self.world.gather(None)  # a barrier
        return SavedState(folder, read_state_file(folder / RUN_NAME, RunRecord))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of what a checkpoint has: this rank's shards."""
        return {name: getattr(t, "_local_tensor", t).detach().clone() for name, t in self.state.tensors().items()}


def resumed(folder: Path, saved: SavedState, optim: OptimArgs, max_steps: int = 8, world: World = ALONE) -> TinyRun:
    """Return a run that continues `saved`."""
    args = TrainArgs(DataArgs(), "", str(folder / "run"), optim=optim, max_steps=max_steps)
    run = TinyRun(folder, optim, max_steps, saved.next_plan(args), world)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()  # so that nothing is right that was not restored
    run.state.restore(saved, run.args, run.world)
    return run


def assert_equal(found: TinyRun, expected: TinyRun) -> None:
    ours, theirs = found.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found.state.of_run(expected.args, expected.world) == expected.state.of_run(expected.args, expected.world)


@pytest.mark.parametrize("saved_after", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_is_bit_identical(name, saved_after, tmp_path):
    args = OptimArgs(name=name, lr=0.01)
    expected = TinyRun(tmp_path, args)
    start = {key: tensor.clone() for key, tensor in expected.model.state_dict().items()}
    expected.train(saved_after)
    saved = expected.save(tmp_path / "state")
    expected.train(8 - saved_after)
    assert all(not torch.equal(start[key], tensor) for key, tensor in expected.model.state_dict().items())
    run = resumed(tmp_path, saved, args)
    run.train(8 - saved_after)
    assert_equal(run, expected)
    moments = [tensor for key, tensor in run.tensors().items() if key.startswith("optimizer.") and tensor.dim()]
    assert moments and all(tensor.count_nonzero() for tensor in moments)


def resume_sharded(folder: Path, rank: int, port: int) -> None:
    """Resume each optimizer that shards, as one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with init_world() as world:
        for name in SHARDED_OPTIMIZERS:
            args = OptimArgs(name=name, lr=0.01)
            expected = TinyRun(folder, args, world=world)
            expected.train(3)
            saved = expected.save(folder / name)
            expected.train(5)
            run = resumed(folder, saved, args, world=world)
            run.train(5)
            assert_equal(run, expected)
            assert run.model[0].weight._local_tensor.shape == (32, 96)


def test_resumed_optimizers_are_bit_identical_when_sharded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [
        multiprocessing.get_context("fork").Process(target=resume_sharded, args=(tmp_path, r, port)) for r in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {*SHARDED_OPTIMIZERS}


@pytest.mark.parametrize("saved_after", [1, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_is_bit_identical(name, saved_after, tmp_path):
    args = OptimArgs(schedule=name, lr=0.01, pct_start=0.3, **SCHEDULES[name])
    expected = TinyRun(tmp_path, args)
    expected.train(saved_after)
    saved = expected.save(tmp_path / "state")
    rates = expected.train(8 - saved_after)
    run = resumed(tmp_path, saved, args)
    assert run.train(8 - saved_after) == rates
    assert_equal(run, expected)


def test_a_state_of_8_bits_is_one_for_large_tensors_only(tmp_path):
    run = TinyRun(tmp_path, OptimArgs(name="lion8bit", lr=0.01))
    run.train(2)
    states = {key: tensor.dtype for key, tensor in run.tensors().items() if key.endswith("state1")}
    large, small = states["optimizer.state.0.weight.state1"], states["optimizer.state.1.weight.state1"]
    assert (large, small) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("name", SHARDED_OPTIMIZERS + ("adafactor",))
def test_the_state_before_the_first_step_is_that_of_a_first_step(name, tmp_path):
    """A gradient that is not finite skips steps; a checkpoint saved before the first step must not change training."""
    plain, saved_first = (TinyRun(tmp_path, OptimArgs(name=name, lr=0.01)) for _ in range(2))
    weights = {key: tensor.clone() for key, tensor in saved_first.model.state_dict().items()}
    initialize_state(saved_first.state.optimizer)
    assert all(torch.equal(weights[key], tensor) for key, tensor in saved_first.model.state_dict().items())
    for run in (plain, saved_first):
        run.train(3)
    assert_equal(saved_first, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_estimate_knows_the_bytes_of_each_state(name, tmp_path):
    args = OptimArgs(name=name)
    large = torch.nn.Parameter(torch.zeros(128, 512))
    optimizer, _ = build_optimizer([large], args, 4)
    large.grad = torch.ones_like(large)
    optimizer.step()
    held = sum(tensor.nbytes for tensor in optimizer.state[large].values() if torch.is_tensor(tensor) and tensor.dim())
    maps = sum(tensor.nbytes for key, tensor in optimizer.state[large].items() if key.startswith("qmap"))
    assert optimizer_bytes(args, 128, 512) == pytest.approx(held - maps, rel=0.02)  # without scales of blocks


def test_sgd_without_momentum_has_no_state_and_resumes(tmp_path):
    args = OptimArgs(name="sgd", lr=0.01, momentum=0.0)
    expected = TinyRun(tmp_path, args)
    expected.train(3)
    saved = expected.save(tmp_path / "state")
    assert not any(key.startswith("optimizer.") for key in expected.tensors()) and optimizer_bytes(args, 5, 5) == 0
    expected.train(5)
    run = resumed(tmp_path, saved, args)
    run.train(5)
    assert_equal(run, expected)


def test_options_reach_the_optimizer():
    parameter = torch.nn.Parameter(torch.zeros(2))
    groups = {
        name: build_optimizer([parameter], OptimArgs(name=name, weight_decay=0.3, **more), 4)[0].param_groups[0]
        for name, more in {"sgd": {"momentum": 0.7}, "adagrad": {}, "rmsprop": {}, "adafactor": {}, "lion": {}}.items()
    }
    assert {group["weight_decay"] for group in groups.values()} == {0.3} and groups["sgd"]["momentum"] == 0.7
    assert groups["lion"]["betas"] == (0.9, 0.99)  # not cycled by onecycle


# --- What cannot run here


@pytest.mark.parametrize("name", UNSHARDED)
def test_an_optimizer_that_cannot_shard_refuses_several_processes_by_name(name):
    with pytest.raises(UserError, match=rf"`optim.name: {name}` works on one process, and this run has 2: .*rmsprop"):
        check_optimizer(OptimArgs(name=name), 2, CPU)


@pytest.mark.parametrize("name", SHARDED_OPTIMIZERS)
def test_optimizers_of_pytorch_run_on_several_processes(name):
    check_optimizer(OptimArgs(name=name), 2, CPU)


def test_an_optimizer_that_the_library_cannot_run_here_is_refused(monkeypatch):
    from bitsandbytes.optim import Lion8bit

    def fail(*_):
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(Lion8bit, "update_step", fail)
    with pytest.raises(UserError, match=r"`optim.name: lion8bit`: bitsandbytes [\d.]+ cannot run it .*\(no kernel\)"):
        check_optimizer(OptimArgs(name="lion8bit"), 1, CPU)
    check_optimizer(OptimArgs(name="lion"), 1, CPU)


def test_paged_states_are_reported_as_not_paged_on_a_cpu(caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        check_optimizer(OptimArgs(name="paged_lion"), 1, CPU)
    assert [record.message for record in caplog.records] == [
        "`optim.name: paged_lion` is not paged on a CPU, where its state is in host memory anyway."
    ]


# --- Settings


def load(folder: Path, **settings: object) -> TrainArgs:
    return load_train_args(kill_test_config(folder, "settings", **settings))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_bnb_8bit", "adamw8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("paged_adamw_8bit", "paged_adamw8bit"),
        ("lion_8bit", "lion8bit"),
        ("paged_lion_32bit", "paged_lion"),
        ("sgd", "sgd"),
    ],
)
def test_names_of_hugging_face_are_understood(theirs, ours, tmp_path):
    args = load(tmp_path, optim={"name": theirs, "schedule": "constant_with_warmup"})
    assert (args.optim.name, args.optim.schedule) == (ours, "constant")
    assert yaml.safe_load(yaml.safe_dump(args.to_dict()))["optim"]["name"] == ours  # as args.yaml records it


@pytest.mark.parametrize(
    "optim, expected",
    [
        ({"momentum": 0.9}, "`optim.momentum` has no effect: `optim.name` is adamw, and only sgd reads it."),
        ({"power": 2}, "`optim.power` has no effect: `optim.schedule` is onecycle, and only polynomial reads it."),
        ({"schedule": "cosine", "num_cycles": 3}, "only cosine_with_restarts reads it"),
        ({"factor": 0.5}, "only reduce_lr_on_plateau reads it"),
        ({"patience": 0}, "only reduce_lr_on_plateau reads it"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(optim, expected, tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, optim=optim)
    assert expected in str(error.value)


@pytest.mark.parametrize("missing", [{"no_eval": True}, {"eval_freq": 0}])
def test_reduce_lr_on_plateau_needs_evaluations(missing, tmp_path):
    schedule = {"optim": {"schedule": "reduce_lr_on_plateau"}}
    assert load(tmp_path, **schedule).optim.option("patience") == 10
    with pytest.raises(UserError, match=r"`optim\.schedule: reduce_lr_on_plateau` needs the evaluation loss, but"):
        load(tmp_path, **schedule | missing)


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_final_rate_that_a_schedule_does_not_reach_is_reported(schedule, tmp_path):
    reported = [f"`optim.final_div_factor` has no effect with `optim.schedule: {schedule}`."]
    assert load(tmp_path, optim={"schedule": schedule, "final_div_factor": 10}).warnings() == reported
    assert load(tmp_path, optim={"schedule": schedule}).warnings() == []
    assert load(tmp_path, optim={"final_div_factor": 10}).warnings() == []


# --- Schedules


def rates(folder: Path, optim: OptimArgs, steps: int) -> list[float]:
    return TinyRun(folder, dataclasses.replace(optim, name="sgd"), steps).train(steps)


def test_each_schedule_has_its_shape_after_the_warm_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LOSSES", [1.0] * 41)
    args = {"lr": 1.0, "pct_start": 0.275, "div_factor": 10.0, "final_div_factor": 100.0}  # peak at step 10 of 40
    last, done = 0.001, [step / 29 for step in range(30)]

    def after_peak(schedule: str, **more: float) -> list[float]:
        found = rates(tmp_path, OptimArgs(schedule=schedule, **args, **more), 40)
        assert found[:11] == pytest.approx([0.1 + 0.09 * step for step in range(11)])
        return found[10:]

    power = [last + (1 - last) * (1 - share) ** 3 for share in done]
    assert after_peak("polynomial", power=3) == pytest.approx(power)
    assert after_peak("polynomial") == pytest.approx(after_peak("linear"))
    assert after_peak("inverse_sqrt") == pytest.approx([math.sqrt(10 / (10 + step)) for step in range(30)])
    waves = [(1 + math.cos(math.pi * (3 * share % 1))) / 2 for share in done[:-1]] + [0]
    assert after_peak("cosine_with_restarts", num_cycles=3) == pytest.approx([last + (1 - last) * w for w in waves])
    assert after_peak("cosine_with_restarts", num_cycles=1) == pytest.approx(after_peak("cosine"))
    # The evaluation before the peak step is the first that counts; two later ones that are no better lower the rate.
    plateau = after_peak("reduce_lr_on_plateau", factor=0.1, patience=1)
    assert plateau == pytest.approx([1] * 2 + [0.1] * 2 + [0.01] * 2 + [0.001] * 24)


def test_inverse_sqrt_without_a_warm_up_hardly_decays(tmp_path):
    assert rates(tmp_path, OptimArgs(schedule="inverse_sqrt", lr=1.0, pct_start=0.0), 3) == pytest.approx(
        [math.sqrt(1e4 / (1e4 + step)) for step in range(3)]
    )


# --- Another length


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_a_longer_run_is_continuous_and_its_own_resume_bit_identical(name, finished, tmp_path):
    optim = OptimArgs(schedule=name, lr=0.01, pct_start=0.3, **SCHEDULES[name])
    first = TinyRun(tmp_path, optim, 4)
    before = first.train(4 if finished else 2)
    longer = resumed(tmp_path, first.save(tmp_path / "first"), optim, 8)
    after = longer.train(2)
    saved = longer.save(tmp_path / "second")
    after += longer.train(8 - len(before) - 2)
    again = resumed(tmp_path, saved, optim, 8)
    assert again.train(8 - len(before) - 2) == after[2:]
    assert_equal(again, longer)

    whole = TinyRun(tmp_path, optim, 4)
    if name in OPEN_ENDED:
        assert longer.state.plan == whole.state.plan and max(after) <= before[-1]
        assert before + after == open_ended(tmp_path, optim)
    else:
        assert after[0] == (before[-1] if finished else whole.train(4)[2])  # the present rate
        assert after[1] == pytest.approx(0.01) and after[-1] == pytest.approx(0.01 / 25 / 1e4)
        assert longer.state.plan == Plan(len(before), 8, after[0])


def open_ended(folder: Path, optim: OptimArgs) -> list[float]:
    """Return the rates of 8 steps whose warm-up is that of 4."""
    return TinyRun(folder, optim, 8, Plan(0, 4)).train(8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_longer_run_may_have_another_rate(name, tmp_path):
    optim = OptimArgs(schedule=name, lr=0.01, pct_start=0.3, **SCHEDULES[name])
    first = TinyRun(tmp_path, optim, 8)
    first.train(4)
    saved = first.save(tmp_path / "first")
    changed = dataclasses.replace(optim, lr=0.002, weight_decay=0.7)
    longer = resumed(tmp_path, saved, changed, 14)
    assert longer.state.optimizer.param_groups[0]["weight_decay"] == 0.7
    after = longer.train(4)
    assert after[0] == saved.run["schedule"]["last_lr"][0]
    assert after[2] == pytest.approx(0.002)  # the end of its warm-up


def test_a_run_can_end_with_the_step_after_it_was_resumed(tmp_path):
    first = TinyRun(tmp_path, OptimArgs(lr=0.01), 4)
    rate = first.train(4)[-1]
    longer = resumed(tmp_path, first.save(tmp_path / "state"), OptimArgs(lr=0.01), 5)
    assert longer.train(1) == [rate]


def test_a_run_cannot_end_before_its_present_step(tmp_path):
    first = TinyRun(tmp_path, OptimArgs(lr=0.01), 8)
    first.train(4)
    saved = first.save(tmp_path / "state")
    assert resumed(tmp_path, saved, OptimArgs(lr=0.01), 5).train(1)  # shorter than planned
    for max_steps in (3, 4):
        with pytest.raises(UserError, match=rf"has taken 4 of 8 steps already and would now end after {max_steps}: "):
            resumed(tmp_path, saved, OptimArgs(lr=0.01), max_steps)


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_a_shorter_run_resumes_and_may_be_longer_again(name, tmp_path):
    optim = OptimArgs(schedule=name, lr=0.01, pct_start=0.3, **SCHEDULES[name])
    first = TinyRun(tmp_path, optim, 8)
    first.train(2)
    shorter = resumed(tmp_path, first.save(tmp_path / "first" / "state"), optim, 4)
    rates = shorter.train(1)
    saved = shorter.save(tmp_path / "shorter" / "state")
    assert open_saved(tmp_path / "shorter").plan == Plan(0, 8)
    again = resumed(tmp_path, saved, optim, 7)
    rates += again.train(3)
    assert rates == first.train(4)
    assert_equal(again, first)


@pytest.mark.parametrize("plan", [{"start": 5, "end": 8}, {"start": 2, "end": 2}, {"start": 0, "end": 9}])
def test_a_plan_that_no_run_has_is_refused(plan, tmp_path):
    run = TinyRun(tmp_path, OptimArgs(lr=0.01), 8)
    run.train(4)
    saved = run.save(tmp_path / "state")
    content = saved.run | {"schedule": saved.run["schedule"] | {"plan": plan | {"rate": None}}}
    (tmp_path / "state" / RUN_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match="corrupt: it has more steps than its run"):
        open_saved(tmp_path)  # of the checkpoint that contains `state`


def test_a_run_that_stopped_early_says_how_to_train_on(tmp_path, caplog):
    run = TinyRun(tmp_path, OptimArgs(lr=0.01), 8)
    run.train(4)
    saved = run.save(tmp_path / "run" / "state")
    stopped = {"metric": "eval_loss", "best": 1.0, "worse_since": 2}
    saved = dataclasses.replace(saved, run=saved.run | {"best_so_far": stopped})
    for patience, warned in ((2, True), (3, False)):
        caplog.clear()
        again = TinyRun(tmp_path, OptimArgs(lr=0.01), 8, saved.plan)
        early_stopping = EarlyStopping(EarlyStoppingArgs(patience=patience))
        dataclasses.replace(again.state, early_stopping=early_stopping).restore(saved, again.args, again.world)
        assert ("Early stopping has ended this run after step 4" in caplog.text) == warned
