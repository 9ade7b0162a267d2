"""Mixture of experts: sorted slots against a plain loop over experts, and the benchmark's FLOP counts."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.training.presets import PRESETS
from benchmarks.training.work import Work, model_flops, recomputed_flops
from model.args import LoraArgs, ModelArgs, MoeArgs
from model.lora import Linear, add_lora
from model.moe import MoeLayer, slots_by_expert
from model.transformer import FeedForward, Transformer

EXPERTS = 5
SHAPES = ModelArgs(32, 2, 8, 48, 4, 2, 1e-5, 64, moe=MoeArgs(EXPERTS, 2))
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def loop_over_experts(layer: MoeLayer, x: torch.Tensor) -> torch.Tensor:
    """Run each expert on the tokens routed to it, and add up the weighted outputs."""
    scores, chosen = torch.topk(layer.gate(x), layer.num_experts_per_tok)
    weights = torch.softmax(scores.float(), dim=-1).to(x.dtype)
    mixed = torch.zeros_like(x)
    for index, expert in enumerate(layer.experts):
        token, slot = torch.where(chosen == index)
        mixed = mixed.index_add(0, token, weights[token, slot, None] * expert(x[token]))
    return mixed


def moe_layer(k: int, dtype: torch.dtype = torch.float32, targets: list[str] | None = None) -> MoeLayer:
    """Return a random layer: with `targets`, only adapters are trainable, otherwise everything."""
    torch.manual_seed(0)
    experts: list[nn.Module] = [FeedForward(SHAPES) for _ in range(EXPERTS)]
    layer = MoeLayer(experts, Linear(SHAPES.dim, EXPERTS), MoeArgs(EXPERTS, k))
    if targets is not None:
        add_lora(layer, LoraArgs(rank=3, targets=targets))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if not parameter.requires_grad:
            parameter.data = parameter.to(dtype)
    return layer


def trainable(layer: MoeLayer) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("targets", [None, ["w1", "w2", "w3"], ["w2", "gate"]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_sorted_slots_match_the_loop_over_experts(tokens, k, dtype, targets):
    layer = moe_layer(k, dtype, targets)
    x, grad = (torch.randn(tokens, SHAPES.dim).to(dtype) for _ in range(2))
    x.requires_grad_()
    mixed, expected = layer(x), loop_over_experts(layer, x)
    assert mixed.dtype == dtype
    gradients, expected_gradients = (torch.autograd.grad(y, [x, *trainable(layer)], grad) for y in (mixed, expected))
    for actual, reference in zip((mixed, *gradients), (expected, *expected_gradients), strict=True):
        error = (actual.double() - reference.double()).norm()
        assert error <= TOLERANCES[dtype] * reference.double().norm()


def test_adapters_of_unused_experts_get_zero_gradients():
    """Zero, not None: all ranks must have the same set of gradients."""
    layer = moe_layer(k=2, targets=["w1", "w2", "w3"])
    layer(torch.randn(1, SHAPES.dim)).sum().backward()
    gradients = [[parameter.grad for parameter in trainable(expert)] for expert in layer.experts]
    assert all(gradient is not None for expert in gradients for gradient in expert)
    assert sum(any(gradient.any() for gradient in expert) for expert in gradients) == 2


@pytest.mark.parametrize("tokens, k", [(1, 1), (1, 3), (40, 2)])
def test_slots_are_sorted_by_expert_then_token(tokens, k):
    chosen = torch.rand(tokens, EXPERTS + 2).argsort()[:, :k]
    order, ends = slots_by_expert(chosen, EXPERTS + 2)
    pairs = [(expert, slot) for slot, expert in enumerate(chosen.flatten().tolist())]
    assert order.tolist() == [slot for _, slot in sorted(pairs)]
    assert ends.tolist() == [sum(e <= last for e, _ in pairs) for last in range(EXPERTS + 2)]


@pytest.mark.parametrize("rank", [0, 3])
def test_benchmark_counts_the_active_weights_of_a_token(rank):
    with torch.device("meta"):
        model = Transformer(SHAPES)
        if rank:
            add_lora(model, LoraArgs(rank=rank))
    layers = [(name, p.numel()) for name, p in model.layers.named_parameters() if p.ndim == 2]
    experts = sum(size for name, size in layers if ".experts." in name)
    others = sum(size for name, size in layers if ".experts." not in name)
    work = Work(positions=20, trained=20, pairs=0, documents=1, complete=1)
    active = others + experts * SHAPES.moe.num_experts_per_tok // EXPERTS
    assert recomputed_flops(SHAPES, rank, work) == 2 * work.positions * active


def test_dense_and_moe_presets_have_the_same_active_parameters():
    moe, dense = PRESETS["moe-cpu"], PRESETS["cpu-60m"]
    work = Work(positions=100, trained=10, pairs=1000, documents=1, complete=1)
    gates = 4 * work.positions * moe.shapes.n_layers * moe.shapes.dim * moe.shapes.moe.num_experts
    assert model_flops(moe.shapes, 0, work) - gates == model_flops(dense.shapes, 0, work)
    other_settings = {"shapes": None, "steps": 0}
    assert dataclasses.replace(moe, **other_settings) == dataclasses.replace(dense, **other_settings)
