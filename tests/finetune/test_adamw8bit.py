"""bitsandbytes' AdamW: trains as PyTorch's with less memory, resumes exactly, and reports its requirements."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.args import OptimArgs
from finetune.optim import build_optimizer, check_optimizer
from model.errors import UserError
from tests.end_to_end.kill_runs import COMPARED, ForkedRun, curve, kill_test_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

STEPS = 20
# A rank with which most tensors of the tiny model have the 4,096 elements that 8-bit moments need.
SETTINGS = {"lora": {"rank": 256, "dropout": 0.1}, "max_steps": STEPS, "ckpt_freq": 10, "eval_freq": 10}
SETTINGS |= {"num_ckpt_keep": None}


def optim(name: str) -> dict[str, object]:
    return {"optim": {"lr": 2e-3, "name": name}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run folders by optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: kill_test_config(folder, name, **SETTINGS, **optim(name)) for name in ("adamw", "adamw8bit")}
    for config in configs.values():
        run = ForkedRun(config, 1)
        assert run.wait() == [0], run.log
    return {name: config.with_suffix("") for name, config in configs.items()}


def saved_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors in a checkpoint."""
    (file,) = (run_dir / "checkpoints" / f"checkpoint_{step:06d}" / "state").glob("*.safetensors")
    return {name: tensor for name, tensor in load_file(file).items() if name.startswith("optimizer.")}


def moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if re.search(r"\.(exp_avg|exp_avg_sq|state1|state2)$", name)}


def test_it_trains_as_adamw_does(runs):
    losses = {name: [row[1] for row in curve(run_dir)["train"]] for name, run_dir in runs.items()}
    assert len(losses["adamw8bit"]) == STEPS
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], abs=0.05)
    assert losses["adamw8bit"] != losses["adamw"]
    (_, first, _), (_, last, _) = curve(runs["adamw"])["eval"][0], curve(runs["adamw"])["eval"][-1]
    assert first - last > 0.1  # so the agreement is not trivial
    assert curve(runs["adamw8bit"])["eval"][-1][1] == pytest.approx(last, abs=0.05)


def test_its_state_is_a_quarter_as_large(runs):
    full, small = (saved_state(runs[name], STEPS) for name in ("adamw", "adamw8bit"))
    size = {name: sum(t.nbytes for t in state.values()) for name, state in (("full", full), ("small", small))}
    assert size["small"] < 0.35 * size["full"]
    assert len(moments(full)) == len(moments(small))
    for name, tensor in moments(small).items():
        assert tensor.dtype == (torch.uint8 if tensor.numel() >= 4096 else torch.float32), name
        assert tensor.float().std() > 0, name
    assert {int(tensor) for name, tensor in small.items() if name.endswith(".step")} == {STEPS}


def test_a_resumed_run_is_bit_identical(runs, tmp_path):
    checkpoint = runs["adamw8bit"] / "checkpoints" / "checkpoint_000010"
    settings = SETTINGS | {"resume": str(checkpoint), "model_id_or_path": str(runs["adamw8bit"].parent / "model")}
    later = kill_test_config(tmp_path, "later", **settings, **optim("adamw8bit"))
    run = ForkedRun(later, 1)
    assert run.wait() == [0], run.log
    expected, found = curve(runs["adamw8bit"]), curve(later.with_suffix(""))
    assert all(found[tag] == [row for row in expected[tag] if row[0] > 10] and found[tag] for tag in COMPARED)
    states = [saved_state(run_dir, STEPS) for run_dir in (runs["adamw8bit"], later.with_suffix(""))]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = ForkedRun(kill_test_config(tmp_path, "other", **settings, **optim("adamw")), 1)
    assert other.wait() == [1] and "- `optim.name` is 'adamw', it was 'adamw8bit'" in other.log


def test_several_processes_are_refused_before_anything_is_written(tmp_path):
    config = kill_test_config(tmp_path, "two", **optim("adamw8bit"))
    run = ForkedRun(config, 2)
    assert run.wait() == [1, 1]
    assert run.log.count("`optim.name: adamw8bit` works on one process, and this run has 2") == 1
    assert not config.with_suffix("").exists() and "Traceback" not in run.log


def test_a_missing_bitsandbytes_is_reported_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[bitsandbytes\]"'):
        check_optimizer(OptimArgs(name="adamw8bit"), 1, torch.device("cpu"))
    check_optimizer(OptimArgs(), 2, torch.device("cpu"))


def test_adamw_is_fused():
    optimizer, _ = build_optimizer([torch.nn.Parameter(torch.zeros(2))], OptimArgs(), 10)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["fused"]
