"""benchmarks.acceptance on a CPU: every check of the GPU run, small; parts that fail or hang do not end the others."""

import dataclasses
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import measured
from benchmarks.acceptance.check import Check, Setting, within
from benchmarks.acceptance.kernels import kernels
from benchmarks.acceptance.parts import SPEED, Part, all_parts
from benchmarks.acceptance.runner import run_parts
from benchmarks.acceptance.summary import read_findings, write_summary
from benchmarks.plan import estimated_bytes
from benchmarks.training import inputs, session
from benchmarks.training.presets import PRESETS
from model.attention import ENGINES
from tests.support.patience import PATIENCE_S

CPU = ("--device", "cpu", "--preset", "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a complete run."""
    out = tmp_path_factory.mktemp("acceptance")
    parts = [dataclasses.replace(part, limit_s=PATIENCE_S) for part in all_parts("tiny")]
    endings = list(run_parts(parts, "cpu", "tiny", out, PATIENCE_S))
    assert [ending["state"] for ending in endings] == ["finished"] * len(endings), (out / "log.txt").read_text()
    return out


def test_every_check_passes_on_a_cpu(finished):
    found = read_findings(finished)
    assert found.failed == []
    assert {check["part"] for check in found.checks} == {part.name for part in all_parts("tiny")}
    passed = {check["name"] for check in found.checks if check["passed"]}
    assert {
        *("attention sdpa, bfloat16, head_dim 16", "nf4, bf16", "fp8, fp16", "mixture of experts, bf16"),
        *("losses after resuming are bit-equal", "the adapter after resuming is bit-equal"),
        *("one process with FSDP2 and cpu_offload", "a full memory is reported with advice", "tiny, planned memory"),
    } <= passed


def test_engines_of_gpus_are_not_claimed_to_work(finished):
    varlen = [check for check in read_findings(finished).checks if check["name"].startswith("attention varlen")]
    assert varlen and all(check["passed"] is None and check["message"] for check in varlen)


def test_the_summary_has_every_part_the_speeds_and_the_memory(finished):
    lead = write_summary(finished)
    assert " 0 failed; 11 of 11 parts finished" in lead
    for name in ("summary.md", "summary.html"):
        text = (finished / name).read_text()
        assert lead in text and "transformers + PEFT" in text and "planned" in text
        assert all(part.name in text for part in all_parts("tiny"))
    assert "## Failed" not in (finished / "summary.md").read_text()


def raises(setting: Setting) -> Iterator[Check]:
    yield Check("before", True)
    raise ValueError("a reason")


def crashes(setting: Setting) -> Iterator[Check]:
    yield Check("before", True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(setting: Setting) -> Iterator[Check]:
    yield Check("before", True)
    time.sleep(3600)


def works(setting: Setting) -> Iterator[Check]:
    print("a line of the log")
    yield within("too large", 1.0, {"error": 2.0}, of="error")


def test_parts_that_fail_crash_or_hang_do_not_end_the_others(tmp_path):
    parts = [
        Part("1", raises, PATIENCE_S),
        Part("2", crashes, PATIENCE_S),
        Part("3", hangs, 5),
        Part("4", works, PATIENCE_S),
    ]
    endings = list(run_parts(parts, "cpu", "tiny", tmp_path, PATIENCE_S))
    states = [ending["state"] for ending in endings]
    assert states == ["finished", "ended by SIGSEGV", "ended after its limit of 5 s", "finished"]
    found = read_findings(tmp_path)
    assert [check["part"] for check in found.checks if check["name"] == "before"] == ["1", "2", "3"]
    assert [(check["part"], check["message"]) for check in found.failed] == [
        ("1", "ValueError: a reason"),
        ("4", "error is 2"),
    ]
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log and "a line of the log" in log
    write_summary(tmp_path)
    failed = (tmp_path / "summary.md").read_text().split("## Parts")[0]
    assert all(reason in failed for reason in ("ValueError: a reason", "error is 2", *states[1:3]))


def test_no_part_starts_after_the_limit_of_the_whole_run(tmp_path):
    [ending] = run_parts([Part("late", works, PATIENCE_S)], "cpu", "tiny", tmp_path, total_s=0)
    assert ending["state"] == "not run: no time left; --parts runs it alone"
    assert read_findings(tmp_path).unfinished == [ending]


def test_a_wrong_engine_fails_its_check(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "sdpa", lambda q, k, v, documents: q * 1.0 + 0 * (k.sum() + v.sum()))
    checks = kernels(Setting(torch.device("cpu"), "tiny", tmp_path))
    engines = itertools.takewhile(lambda check: check.name.startswith("attention"), checks)
    failed = [check.name for check in engines if check.passed is False]
    assert failed == [f"attention sdpa, {dtype}, head_dim 16" for dtype in ("float32", "bfloat16", "float16")]


def test_a_model_that_does_not_fit_is_not_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "free_bytes", lambda device, processes: 1 << 20)
    setting = Setting(torch.device("cpu"), "tiny", tmp_path)
    checks = [*measured.measured(setting, "ours", "tiny"), *measured.profile(setting, "tiny")]
    assert [check.passed for check in checks] == [None, None]
    assert all(re.fullmatch(r"needs about 0\.\d GiB, of which 0\.0 are free", check.message) for check in checks)


@pytest.mark.parametrize(
    "part", [part for part in SPEED["full"] if part.run.func is measured.measured], ids=lambda part: part.name
)
def test_settings_of_the_full_run_are_valid(part, tmp_path, monkeypatch):
    """A CPU cannot train these models, but can read their YAML and plan their memory."""
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    monkeypatch.setattr(inputs, "rows_file", lambda kind, megabytes: rows)
    monkeypatch.setattr(measured, "free_bytes", lambda device, processes: 1 << 40)

    def plan(impl: str, case: dict[str, Any]) -> dict[str, Any]:
        args = session.train_args(PRESETS[case["preset"]], case)
        recomputed = "false" if args.checkpoint == "auto" else str(args.checkpoint).lower()
        peak = estimated_bytes(case | {"checkpoint": recomputed}, 1.0)
        numbers = dict.fromkeys(measured.REPORTED, 1.0) | {"peak_bytes": peak, "trained_share": 1.0}
        return numbers | {"recomputed": recomputed}

    monkeypatch.setattr(measured, "measure_training", plan)
    first, *planned = part.run(Setting(torch.device("cpu"), "full", tmp_path))
    assert first.passed is None and not first.message
    assert [check.passed for check in planned] == ([] if first.name.endswith("peft") else [True])


def test_nan_is_not_within_a_limit():
    assert within("error", 1.0, {"error": float("nan")}, of="error").passed is False


def test_a_failed_check_is_an_error_of_the_command(tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(acceptance, "all_parts", lambda preset: [Part("works", works, PATIENCE_S)])
    code, output = run_command(acceptance, "--out", tmp_path / "out", *CPU)
    assert code == 1 and "not all checks passed: works: too large" in output and "Traceback" not in output
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])["state"] == "finished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu"), "--preset full trains 7B models, which a CPU cannot"),
        ((*CPU, "--parts", "speeds"), "--parts speeds does not exist with --preset tiny; the parts are: environment"),
        (CPU, "has the results of another run; choose another --out"),
    ],
)
def test_impossible_options_are_refused(options, message, tmp_path, run_command):
    (tmp_path / "results.jsonl").touch()
    code, output = run_command(acceptance, "--out", tmp_path, *options)
    assert code == 1 and message in output and "Traceback" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path, run_command):
    code, output = run_command(acceptance, "--out", tmp_path)
    assert code == 1 and "PyTorch finds no GPU; on a CPU: --preset tiny --device cpu" in output
