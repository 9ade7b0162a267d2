"""The speed estimate: operations per token, the table of GPUs, and published speeds."""

import dataclasses

import pytest

from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.speed_estimate import (
    GPUS,
    active_parameters,
    find_gpu,
    flops_per_token,
    mean_context,
    memory_config,
    tokens_per_second,
)
from utils.models.known_models import KNOWN_MODELS

MISTRAL_7B = KNOWN_MODELS["mistral-7b"]
BLOCKS = 7_248_023_552 - 2 * 32768 * 4096  # weights of all layers, norms included


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX5090", "rtx5090"),
        ("A100-40", "a100-40"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
    ],
)
def test_gpus_are_found_by_the_names_of_devices(name, key):
    assert find_gpu(name) == (GPUS[key] if key else None)


def test_memory_of_a_gpu_is_less_than_its_label():
    for key, gpu in GPUS.items():
        assert gpu.gib < 192 and gpu.tflops > 50, key
        assert gpu.usable_bytes == pytest.approx(0.9 * gpu.gib * 1024**3)
    assert GPUS["a100"].gib < 80 and GPUS["a100-40"].gib < 40 and GPUS["v100-16"].gib < 16


def test_only_gpus_before_ampere_compute_in_fp16():
    assert {key for key, gpu in GPUS.items() if gpu.dtype == "fp16"} == {"v100", "v100-16", "t4"}


def test_mean_context_counts_a_token_and_its_predecessors():
    assert mean_context({4: 1}) == (1 + 2 + 3 + 4) / 4
    assert mean_context({4: 1, 2: 3}) == (10 + 3 * 3) / 10
    assert mean_context({4: 1}, window=2) == (1 + 2 + 2 + 2) / 4
    assert mean_context({4: 1}, window=9) == mean_context({4: 1})


def test_flops_without_attention_are_four_to_eight_per_weight():
    def flops(checkpoint, **options):
        return flops_per_token(MISTRAL_7B, 0, checkpoint, trained_share=0, **options)

    assert flops(False) == pytest.approx(4 * BLOCKS, rel=1e-3)
    assert flops(True) == pytest.approx(6 * BLOCKS, rel=1e-3)
    assert flops(False, lora=False) == pytest.approx(6 * BLOCKS, rel=1e-3)
    assert flops(True, lora=False) == pytest.approx(8 * BLOCKS, rel=1e-3)
    assert flops(False) < flops("selective") < flops(True)
    trained = flops_per_token(MISTRAL_7B, 0, False)
    assert trained - flops(False) == pytest.approx(4 * 32768 * 4096)


def test_attention_costs_three_forward_passes_and_a_fourth_where_it_is_recomputed():
    of_one = 4 * 32 * 32 * 128  # layers, heads and their width: the products with one key and one value
    for checkpoint, passes in ((False, 3), ("selective", 3), (True, 4)):
        none, some = (flops_per_token(MISTRAL_7B, context, checkpoint) for context in (0, 100))
        assert some - none == pytest.approx(passes * 100 * of_one)


def test_a_mixture_counts_the_experts_that_a_token_uses():
    assert active_parameters(KNOWN_MODELS["mixtral-8x7b"]) == pytest.approx(12.88e9, rel=0.01)


@pytest.mark.parametrize(("gpu", "published"), [("v100", 1202), ("a100-40", 3653), ("h100", 5720), ("h100", 8800)])
def test_estimates_are_near_published_speeds(gpu, published):
    """Of Mistral 7B, adapters only, all recomputed, short documents; 8,800 is a count of this code's kernels."""
    flops = flops_per_token(MISTRAL_7B, 600, True)
    assert tokens_per_second(GPUS[gpu], MISTRAL_7B, flops) == pytest.approx(published, rel=0.6)


def test_speed_is_a_share_of_the_peak_rate():
    assert tokens_per_second(GPUS["h100"], MISTRAL_7B, 1e9, share=0.5) == pytest.approx(0.5 * 989e12 / 1e9)


def test_a_tiny_model_has_no_estimate():
    tiny = dataclasses.replace(MISTRAL_7B, n_layers=1, dim=64)
    assert tokens_per_second(GPUS["h100"], tiny, 1e9) is None


@pytest.mark.parametrize(("gib", "mode"), [(20, True), (24, "selective"), (80, False), (1, True)])
def test_auto_checkpoint_is_the_fastest_that_fits(gib, mode):
    gpu = dataclasses.replace(GPUS["h100"], gib=gib)
    args = TrainArgs(data=DataArgs(), model_id_or_path="x", run_dir="y", seq_len=4096, checkpoint="auto")
    assert memory_config(args, MISTRAL_7B, gpu, 1).resolved_checkpoint(gpu.usable_bytes) == mode
    args = dataclasses.replace(args, checkpoint=True)
    assert memory_config(args, MISTRAL_7B, gpu, 1).resolved_checkpoint(gpu.usable_bytes) is True
