"""`tf32`: enabled where GPUs have it, a warning where it has no effect."""

import os

import pytest
import torch

from finetune.hardware import Hardware, choose_compile, choose_device, enable_tf32
from model.errors import UserError
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


# What torch.cuda.get_arch_list() returns for builds of PyTorch 2.11 to 2.14 from its own index, on x86-64.
CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that pretends a GPU and a build of PyTorch."""

    def pretended(name: str, capability: tuple[int, int], built: list[str]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
        return choose_device(0)

    return pretended


@pytest.mark.parametrize(
    "name, capability",
    [
        ("T4", (7, 5)),
        ("A100", (8, 0)),
        ("RTX 4090", (8, 9)),
        ("H100", (9, 0)),
        ("B200", (10, 0)),
        ("RTX 6090", (13, 0)),
    ],
)
def test_gpus_with_kernels_are_used(pretend, name, capability):
    assert pretend(name, capability, CUDA_130).type == "cuda"


@pytest.mark.parametrize("built", [["sm_90a"], ["sm_80"], ["sm_90"]])
def test_a_gpu_without_kernels_ends_with_what_the_build_has(pretend, built):
    with pytest.raises(UserError, match=f"RTX 5090 needs kernels for sm_120; PyTorch .* was built for {built[0]}"):
        pretend("RTX 5090", (12, 0), built)


def test_a_v100_needs_the_build_for_cuda_126(pretend):
    assert pretend("V100", (7, 0), CUDA_126).type == "cuda"
    with pytest.raises(UserError, match=r"V100 needs kernels for sm_70; .*download.pytorch.org/whl/cu126"):
        pretend("V100", (7, 0), CUDA_130)


def test_memory_is_not_fragmented_unless_the_user_has_chosen_otherwise(pretend, monkeypatch):
    pretend("H100", (9, 0), CUDA_130)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == ""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    choose_device(0)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("setting, device, works, expected", [
    ("auto", "cpu", True, False), (False, "cuda", True, False), (True, "cpu", True, True),
    ("auto", "cuda", True, True), ("auto", "cuda", False, False),
])  # fmt: skip
def test_compile_auto_is_for_gpus_where_it_works(monkeypatch, setting, device, works, expected):
    def compiled(*_: object) -> None:
        if not works:
            raise RuntimeError("Triton is missing")

    monkeypatch.setattr("finetune.hardware.SwiGLU.forward", compiled)
    monkeypatch.setattr("finetune.hardware.torch.ones", lambda *_, device: None)
    assert choose_compile(setting, torch.device(device)) is expected
