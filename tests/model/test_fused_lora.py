"""Fused linear layers against plain autograd, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from model.args import LoraArgs
from model.frozen_weights import FP8Weight
from model.fused_lora import SwiGLU
from model.lora import Linear, LoRALinear, fused_linear
from model.rope import Rotary, rotary_phases
from model.transformer import RMSNorm

T, WIDTH, OUT = 7, 12, (5, 8, 3)
INPUT_FNS = {"identity": 1, "norm": 1, "swiglu": 2}  # number of tensors each takes


def make_layers(adapted: tuple[bool, ...]) -> list[Linear]:
    lora = LoraArgs(rank=2, scaling=1.5)
    layers = [LoRALinear(WIDTH, out, lora) if has else Linear(WIDTH, out) for has, out in zip(adapted, OUT)]
    for layer in layers:
        for name, parameter in layer.double().named_parameters():
            torch.nn.init.normal_(parameter)
            parameter.requires_grad_("lora" in name)
    return layers


def make_input_fn(kind: str) -> tuple[object, object]:
    """Return an input function, and the same function as plain differentiable operations."""
    if kind == "norm":
        norm = RMSNorm(WIDTH, 1e-3)
        torch.nn.init.normal_(norm.weight)
        norm.requires_grad_(False)
        scale = norm.weight.double()
        return norm, lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * scale
    return (None, lambda x: x) if kind == "identity" else (SwiGLU(), lambda gate, up: F.silu(gate) * up)


def unfused(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    y = x @ layer.weight.T
    return y + 1.5 * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T if isinstance(layer, LoRALinear) else y


@pytest.mark.parametrize("adapted", [*itertools.product((True, False), repeat=3), (True,), (False,)])
@pytest.mark.parametrize("kind", INPUT_FNS)
@pytest.mark.parametrize("rows", [T, 0])
def test_outputs_and_gradients_match_autograd(adapted, kind, rows):
    torch.manual_seed(0)
    layers = make_layers(adapted)
    input_fn, plain_fn = make_input_fn(kind)
    tensors = [torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(INPUT_FNS[kind])]
    trained = [*tensors, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    results = []
    for outputs in (
        fused_linear(layers, *tensors, input_fn=input_fn),
        [unfused(layer, plain_fn(*tensors)) for layer in layers],
    ):
        loss = sum((i + 1) * output.sin().sum() for i, output in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, trained)])
    # The norm computes in fp32.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if kind == "norm" else {}
    torch.testing.assert_close(*results, **tolerance)


def test_unused_output_and_input_without_gradient():
    layers = make_layers((True, True))
    x = torch.randn(T, WIDTH, dtype=torch.float64)  # as after frozen embeddings
    first, _ = fused_linear(layers, x)
    first.sum().backward()
    assert layers[0].lora_A.weight.grad.any() and not layers[1].lora_A.weight.grad.any()


def test_input_is_not_saved_for_backward():
    layers = make_layers((True, True))
    gate, up = (torch.randn(50, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused_linear(layers, gate, up, input_fn=SwiGLU())
    large = [x for x in saved if x.numel() >= gate.numel()]
    assert {x.data_ptr() for x in large} == {gate.data_ptr(), up.data_ptr()}


def test_skipping_the_output_keeps_the_gradients():
    layers = make_layers((True, True))
    x = torch.randn(T, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = [torch.randn(T, out, dtype=torch.float64) for out in OUT[:2]]
    trained = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    outputs = [fused_linear(layers, x, needs_output=needed) for needed in (True, False)]
    assert [y.shape for y in outputs[0]] == [y.shape for y in outputs[1]]
    torch.testing.assert_close(*(torch.autograd.grad(y, trained, upstream) for y in outputs), rtol=0, atol=0)


def test_trainable_layer_uses_plain_autograd():
    layer = Linear(WIDTH, 4).double()
    x = torch.randn(T, WIDTH, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad((x @ layer.weight.T).square().sum(), (x, layer.weight))
    torch.testing.assert_close((x.grad, layer.weight.grad), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision_is_close_to_float64(dtype, tolerance):
    torch.manual_seed(0)
    layers = make_layers((True, False, True))
    x = torch.randn(T, WIDTH, dtype=torch.float64, requires_grad=True)
    sum(y.sum() for y in fused_linear(layers, x)).backward()
    for layer in layers:
        layer.weight.data = layer.weight.data.to(dtype)
        if isinstance(layer, LoRALinear):  # trainable parameters are fp32
            layer.lora_A.float(), layer.lora_B.float()
    half = x.detach().to(dtype).requires_grad_()
    outputs = fused_linear(layers, half)
    assert all(y.dtype == dtype for y in outputs)
    sum(y.sum() for y in outputs).backward()
    assert layers[0].lora_A.weight.grad.dtype == torch.float32
    assert (half.grad.double() - x.grad).norm() / x.grad.norm() < tolerance


@pytest.mark.slow
def test_compiled_kernels_match_eager_for_any_number_of_tokens():
    torch.manual_seed(0)
    norm = RMSNorm(WIDTH, 1e-3).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    compiled_norm = RMSNorm(WIDTH, 1e-3).requires_grad_(False)
    compiled_norm.weight, compiled_norm.compiled = norm.weight, True
    for rows in (5, 9):
        grad, gate, up = (torch.randn(rows, WIDTH) for _ in range(3))
        for plain, compiled, tensors in (
            (SwiGLU(), SwiGLU(compiled=True), (gate, up)),
            (norm, compiled_norm, (gate,)),
        ):
            torch.testing.assert_close(compiled.forward(*tensors), plain.forward(*tensors))
            torch.testing.assert_close(
                compiled.gradients(grad.clone(), *tensors), plain.gradients(grad.clone(), *tensors)
            )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_are_quantized_alike_when_compiled(dtype):
    torch.manual_seed(0)
    stored = FP8Weight.quantize(torch.randn(32, 16))
    plain, compiled = FP8Weight(**stored), FP8Weight.compiled_version()(**stored)
    assert compiled.compiled and not plain.compiled
    for rows in (5, 9):
        x, grad = torch.randn(rows, 16).to(dtype), torch.randn(rows, 32).to(dtype)
        assert torch.equal(compiled.product(x), plain.product(x))
        assert torch.equal(compiled.input_gradient(grad), plain.input_gradient(grad))


@pytest.mark.slow
def test_compiled_rotation_is_the_complex_product():
    torch.manual_seed(0)
    for rows in (5, 9):
        x, grad = torch.randn(rows, 3, 8), torch.randn(rows, 3, 8)
        phases = rotary_phases(torch.arange(rows), 8, 1e4)
        found = []
        for rotary in (Rotary(), Rotary(compiled=True)):
            turned = x.clone().requires_grad_()
            out = rotary(turned, phases)
            found.append((out, *torch.autograd.grad(out, turned, grad)))
        torch.testing.assert_close(*found)
