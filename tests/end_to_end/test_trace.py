"""Steps on a pretended GPU: all run, wait for the GPU as often as documented, and need the memory that is planned."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.documents import ROOT
from tests.support.patience import PATIENCE_S

LOADER = "from the host, pinned memory, at finetune/batch_tensors.py"
STEP, ROUTING, EVALUATION = "item at train.py", "tolist at model/moe.py", "item at finetune/eval.py"


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


def test_the_host_waits_as_often_as_documented(traced):
    for line in steps(traced):
        case = line["case"]
        routers = 2 if case.startswith("8x7B") else 1 if case.startswith("moe") else 0  # one per layer
        micro_batches = 2 if line["peak"] else 1
        passes = 1 if "checkpoint=False" in case else 2
        expected = {ROUTING: routers * micro_batches * passes, STEP: 1}
        if "cpu_offload" in case:
            expected[STEP] = 0  # the gradients are on the host
        assert Counter(line["waits"]) == Counter(expected), case
        assert Counter(line["evaluation_waits"]) == Counter({ROUTING: routers, EVALUATION: 1}), case


def test_batches_are_copied_from_pinned_memory(traced):
    for line in steps(traced):
        assert not [place for place in line["copies"] if "from the host, pageable" in place], line["case"]
        assert line["copies"][LOADER] in (4, 5, 8), line["case"]


def test_answers_wait_for_each_token(traced):
    answers = [line for line in traced.values() if line["case"].endswith("answers")]
    assert len(answers) == 3
    assert all(line["waits"]["tolist at model/generate.py"] == 6 for line in answers)


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
from benchmarks.trace import matrix
from benchmarks.traced.steps import trace
from model import transformer
case = dict(matrix())["dense varlen checkpoint=False"]
forward = transformer.FeedForward.forward

def planted(self, x, norm=None):
    result = forward(self, x, norm)
    {line}
    return result

transformer.FeedForward.forward = planted
try:
    print(json.dumps(dict(trace(case).step.waits)))
except Exception as error:
    print(json.dumps({{"error": str(error)}}))
"""


def test_a_planted_wait_is_found():
    [waits] = lines("-c", PLANTED.format(line="result.sum().item()"))
    assert sum(waits.values()) == 2  # that of the step, too


def test_a_planted_tensor_on_the_cpu_is_found():
    [found] = lines("-c", PLANTED.format(line="result = result + torch.ones(result.shape[1])"))
    assert "device" in found["error"]
