"""Steps on a pretended GPU: all run, wait for the GPU as often as documented, and need the memory that is planned."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from docs.generate_waits import PAGE, hardware_page
from tests.support.documents import ROOT
from tests.support.patience import PATIENCE_S

LOADER = "from the host, pinned memory, at finetune/batch_tensors.py"
ROUTING = "tolist at model/moe.py"


def lines(*command: str) -> list[dict[str, Any]]:
    """Return the JSON lines that a fresh process prints: the pretended GPU must be there before torch is imported."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    if "No GPU can be pretended" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def traced() -> dict[str, dict[str, Any]]:
    return {line["case"]: line for line in lines("-m", "benchmarks.trace", "--matrix")}


def steps(traced: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (line for line in traced.values() if "planned" in line)


def test_every_combination_runs(traced):
    assert [line["error"] for line in traced.values() if "error" in line] == []
    assert len(list(steps(traced))) >= 60


def test_the_table_of_waits_is_that_of_the_trace(traced):
    assert PAGE.read_text(encoding="utf-8") == hardware_page(traced.values()), "run `make docs`"


def test_a_wait_without_a_row_or_at_another_rate_is_refused(traced):
    line = traced["moe varlen checkpoint=True"]
    elsewhere = line | {"waits": line["waits"] | {"item at model/lora.py": 1}}
    with pytest.raises(ValueError, match=r"moe varlen checkpoint=True: .* item at model/lora.py, which has no row"):
        hardware_page([elsewhere])
    oftener = line | {"case": "one more", "waits": {ROUTING: line["waits"][ROUTING] + 1}}
    with pytest.raises(ValueError, match=r"one more: .* waits 3 times, not 2 as other cases imply"):
        hardware_page([line, oftener | {"waits": line["waits"] | oftener["waits"]}])
    with pytest.raises(ValueError, match="failed: no kernel"):
        hardware_page([{"case": "failed", "error": "no kernel"}])


def test_the_state_of_a_run_leaves_the_gpu_once_and_returns_to_it(traced):
    resumed = {line["case"]: line for line in traced.values() if line["case"].endswith(", resumed")}
    assert len(resumed) == 11
    for case, line in resumed.items():
        offload, full_fp32 = "cpu_offload" in case, "full fp32" in case
        assert line["devices"] == (["cpu"] if offload else ["cuda"]), case
        assert line["dtypes"] == ["torch.float32"], case  # trained parameters and moments, whatever the base has
        assert line["misplaced"] == [], case
        # Weights in fp32 are exported as they are, while others are cast first, and the copies copied.
        assert line["copies_of_a_tensor"] == ([0] if offload else [1, 2] if full_fp32 else [1]), case
        assert line["restored"] == line["tensors"] == 4 * line["exported"], case  # weights, moments, number of steps
        assert line["random_restored"], case
        scaled = "fp16" in case or "V100" in case
        assert line["scales"] == ([2.0**10] * 2 if scaled else [1.0, 1.0]), case


def test_batches_are_copied_from_pinned_memory(traced):
    for line in steps(traced):
        assert not [place for place in line["copies"] if "from the host, pageable" in place], line["case"]
        assert line["copies"][LOADER] in (4, 5, 8), line["case"]


def test_the_planned_memory_is_that_of_the_trace(traced):
    measured = [line for line in steps(traced) if line["peak"]]
    assert len(measured) == 8
    for line in measured:
        assert line["planned"] / line["peak"] == pytest.approx(1, abs=0.05), line["case"]


def test_engines_are_those_of_the_gpu(traced):
    chosen = {line["case"]: line["attention"] for line in steps(traced)}
    assert chosen["dense on a V100"] == chosen["dense full fp32"] == "xformers"
    assert chosen["dense fp8 on an A100"] == chosen["dense 8 ranks"] == "varlen"


PLANTED = """
import benchmarks.traced.device, json, torch
from benchmarks.trace import matrix, resumed_line
from benchmarks.traced.resumed import trace_resume
from benchmarks.traced.steps import trace
from finetune import resume
from finetune.resume import RunState
from model.transformer import FeedForward
from unittest import mock

forward, restore, tensors = FeedForward.forward, RunState.restore, RunState.tensors

def waiting(self, x, norm=None):
    result = forward(self, x, norm)
    result.sum().item()
    return result

def misplaced(self, x, norm=None):
    result = forward(self, x, norm)
    return result + torch.ones(result.shape[1])

def left_on_the_cpu(self, saved, args, world):
    restore(self, saved, args, world)
    for state in self.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].cpu()

def rounded(self, saved, args, world):
    restore(self, saved, args, world)
    for state in self.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].bfloat16()

def copied_twice(self):
    for tensor in tensors(self).values():
        tensor.cpu()
    return tensors(self)

PLANTS = {
    "waiting": (FeedForward, "forward", waiting, lambda case: dict(trace(case).step.waits)),
    "misplaced": (FeedForward, "forward", misplaced, trace),
    "left on the cpu": (RunState, "restore", left_on_the_cpu, trace_resume),
    "rounded": (RunState, "restore", rounded, lambda case: resumed_line(case)["misplaced"]),
    "copied twice": (RunState, "tensors", copied_twice, lambda case: sorted(set(trace_resume(case).copies.values()))),
    "random numbers": (resume, "_set_random_state", lambda *_: None, lambda case: trace_resume(case).random_restored),
}
case = dict(matrix())["dense varlen checkpoint=False"]
for name, (target, attribute, value, traced) in PLANTS.items():
    with mock.patch.object(target, attribute, value):
        try:
            print(json.dumps({"plant": name, "found": traced(case)}))
        except Exception as error:
            print(json.dumps({"plant": name, "found": str(error)}))
"""


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """Return what a trace finds of each planted mistake."""
    return {line["plant"]: line["found"] for line in lines("-c", PLANTED)}


def test_a_planted_wait_is_found(planted):
    assert sum(planted["waiting"].values()) == 2  # that of the step, too


def test_a_planted_tensor_on_the_cpu_is_found(planted):
    assert "device" in planted["misplaced"]


def test_planted_mistakes_of_saving_and_resuming_are_found(planted):
    assert "device" in planted["left on the cpu"]
    assert len(planted["rounded"]) == 14
    assert all("bfloat16" in each for each in planted["rounded"])
    assert planted["copied twice"] != [1]
    assert planted["random numbers"] is False
