"""The speed estimate: operations per token, the table of GPUs, and published speeds."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import speed_estimate
from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.data.data_loader import Batch
from finetune.loss import batch_loss
from finetune.speed_estimate import (
    GPUS,
    expected_time,
    find_gpu,
    flops_per_token,
    mean_context,
    memory_config,
    tokens_per_second,
    unlisted_gpu,
    visible_gpu,
)
from model.args import LoraArgs, ModelArgs, MoeArgs
from model.lora import add_lora
from model.transformer import Transformer
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
        ("NVIDIA L40", "l40"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA A30", "a30"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4080", "rtx4080"),
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
    flops = flops_per_token(KNOWN_MODELS["mixtral-8x7b"], 0, False)
    assert flops / 4 == pytest.approx(12.88e9 - 32000 * 4096, rel=0.01)  # without the embeddings, which are looked up


@pytest.mark.parametrize(("gpu", "published"), [("v100", 1202), ("a100-40", 3653), ("h100", 5720), ("h100", 8800)])
def test_estimates_are_near_published_speeds(gpu, published):
    """Of Mistral 7B, adapters only, all recomputed, short documents; 8,800 is a count of this code's kernels."""
    flops = flops_per_token(MISTRAL_7B, 600, True)
    assert tokens_per_second(GPUS[gpu], MISTRAL_7B, flops, 8192) == pytest.approx(published, rel=0.6)


def test_speed_is_a_share_of_the_peak_rate():
    speed = tokens_per_second(GPUS["h100"], MISTRAL_7B, 1e9, 10**6, share=0.5)
    assert speed == pytest.approx(0.5 * 989e12 / 1e9)


def test_a_small_model_waits_for_kernel_launches():
    tiny = dataclasses.replace(MISTRAL_7B, n_layers=2, dim=64)
    flops = flops_per_token(tiny, 0, False)
    speed = tokens_per_second(GPUS["h100"], tiny, flops, 1000)
    assert tokens_per_second(GPUS["b200"], tiny, flops, 1000) == speed  # arithmetic does not matter
    assert tokens_per_second(GPUS["h100"], tiny, flops, 2000) == pytest.approx(2 * speed)
    mixture = dataclasses.replace(tiny, moe=MoeArgs(8, 2))
    assert tokens_per_second(GPUS["h100"], mixture, flops, 1000) < speed / 2


class CountOperations(TorchDispatchMode):
    """Count what PyTorch computes, views not included: on a GPU most of it is one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not is_view
        return func(*args, **(kwargs or {}))


def operations(layers: int, moe: MoeArgs | None) -> int:
    shapes = {"dim": 32, "n_layers": layers, "head_dim": 16, "hidden_dim": 32, "n_heads": 2, "n_kv_heads": 1}
    model = Transformer(ModelArgs(**shapes, norm_eps=1e-5, vocab_size=16, rope_theta=1e4, moe=moe))
    add_lora(model, LoraArgs(rank=2))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_("lora" in name)
    tokens = np.arange(16)
    batch = Batch(x=tokens, y=tokens, sizes=[16])
    with CountOperations() as counted:
        batch_loss(model, batch, torch.device("cpu")).backward()
    return counted.count


@pytest.mark.parametrize("moe", [None, MoeArgs(2, 2), MoeArgs(8, 2)])
def test_the_assumed_launches_are_near_the_operations_of_a_layer(moe):
    assumed = speed_estimate._LAYER_LAUNCHES + speed_estimate._NETWORK_LAUNCHES * (moe.num_experts if moe else 1)
    assert operations(3, moe) - operations(2, moe) == pytest.approx(assumed, rel=0.35)


@pytest.mark.parametrize(
    ("gib", "peer"),
    [(8, "RTX 3090"), (23.5, "RTX 3090"), (48, "A40"), (80, "A100 80 GB"), (141, "H200"), (288, "B200")],
)
def test_an_unlisted_gpu_is_as_fast_as_the_slowest_with_its_memory(gib, peer):
    gpu = unlisted_gpu(gib)
    (listed,) = (gpu for gpu in GPUS.values() if gpu.label == peer)
    assert (gpu.tflops, gpu.gib, gpu.dtype) == (listed.tflops, gib, "bf16")
    assert f"the {peer}'s 16-bit peak" in gpu.basis() and "only the memory is known" in gpu.basis()


def test_a_visible_gpu_is_found_or_assumed():
    assert visible_gpu("Tesla T4", 15 * 1024**3) == dataclasses.replace(GPUS["t4"], label="Tesla T4")
    assert visible_gpu("AMD Instinct", 64 * 1024**3) == unlisted_gpu(64, "AMD Instinct")


def test_the_log_of_a_run_starts_with_the_expected_time():
    args = TrainArgs(data=DataArgs(), model_id_or_path="x", run_dir="y", seq_len=8192, batch_size=2)
    args.num_microbatches, args.checkpoint = 3, True
    one, two = (expected_time(args, MISTRAL_7B, GPUS["v100"], gpus, 1000) for gpus in (1, 2))
    flops = flops_per_token(MISTRAL_7B, mean_context({8192: 1}), True)
    speed = tokens_per_second(GPUS["v100"], MISTRAL_7B, flops, 16384)
    hours = 1000 * 3 * 16384 / speed / 3600
    assert f"Expected time: {hours:.1f} hours for 1,000 steps" in one and f"at {speed:,.0f} tokens/s" in one
    assert f"Expected time: {hours:.1f} hours" in two  # each GPU has as many tokens as before
    assert "40% of the V100 32 GB's 16-bit peak of 125 TFLOP/s" in one


@pytest.mark.parametrize(("gib", "mode"), [(20, True), (24, "selective"), (80, False), (1, True)])
def test_auto_checkpoint_is_the_fastest_that_fits(gib, mode):
    gpu = dataclasses.replace(GPUS["h100"], gib=gib)
    args = TrainArgs(data=DataArgs(), model_id_or_path="x", run_dir="y", seq_len=4096, checkpoint="auto")
    assert memory_config(args, MISTRAL_7B, gpu, 1).resolved_checkpoint(gpu.usable_bytes) == mode
    args = dataclasses.replace(args, checkpoint=True)
    assert memory_config(args, MISTRAL_7B, gpu, 1).resolved_checkpoint(gpu.usable_bytes) is True
