"""`tf32`: enabled where GPUs have it, a warning where it has no effect."""

import pytest
import torch

from finetune.hardware import Hardware, enable_tf32
from tests.end_to_end.test_training import run_here, small_config
from tests.support.checkpoints import SMALL, make_tiny_checkpoint

GPU = torch.device("cuda", 0)


@pytest.fixture
def precision(monkeypatch):
    """The precisions that are set; the process keeps its own."""
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    return chosen


def test_fp32_on_a_gpu_multiplies_as_tf32(precision):
    assert enable_tf32(Hardware(GPU, torch.float32, "sdpa")) is None
    assert precision == ["high"]


def test_it_has_no_effect_elsewhere(precision, monkeypatch):
    assert enable_tf32(Hardware(torch.device("cpu"), torch.float32, "sdpa")) == "this run has no GPU"
    assert "`param_dtype` is bf16" in (enable_tf32(Hardware(GPU, torch.bfloat16, "sdpa")) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "V100 has no TF32" in (enable_tf32(Hardware(GPU, torch.float32, "sdpa")) or "")
    assert precision == []


def test_a_run_without_a_gpu_says_so_and_trains(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = make_tiny_checkpoint(tmp_path / "model", dtype=torch.float32, **SMALL)
    with caplog.at_level("WARNING"):
        run_here(small_config(tmp_path, base, max_steps=1, tf32=True))
    assert "`tf32: true` has no effect: this run has no GPU." in caplog.text
