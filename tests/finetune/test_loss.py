"""The chunked head compared with plain cross-entropy over all logits: the loss and both gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import loss as loss_module
from finetune.data.data_loader import Batch
from finetune.loss import batch_loss, cross_entropy_head
from model.args import LoraArgs, ModelArgs
from model.lora import LoRALinear
from model.transformer import Transformer

V, D = 37, 8


def problem(tokens: int, dtype=torch.float32, weight_dtype=None, vocab=V):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, D, generator=generator).to(weight_dtype or dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)


def plain(hidden, weight, targets, trained=None):
    """Return loss and gradients, computed in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    kept = slice(None) if trained is None else trained
    loss = F.cross_entropy((hidden @ weight.T)[kept], targets[kept])
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.fixture
def rows_per_chunk(monkeypatch):
    return lambda rows, vocab=V: monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK_ON_CPU", rows * vocab)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 7, 30])
@pytest.mark.parametrize("mask", ["one", "some", "all"])
def test_loss_and_gradients_equal_the_plain_ones(rows_per_chunk, rows, tokens, mask):
    rows_per_chunk(rows)
    hidden, weight, targets = problem(tokens)
    every = torch.arange(tokens)
    trained = {"one": every[-1:], "some": every[::2], "all": every}[mask]
    loss = cross_entropy_head(targets[trained])(hidden[trained], weight)
    (loss * 3).backward()
    expected, expected_hidden, expected_weight = plain(hidden, weight, targets, trained)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=1e-6)  # fp32 rounds at 1.2e-7
    torch.testing.assert_close(hidden.grad.double(), 3 * expected_hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), 3 * expected_weight, rtol=1e-4, atol=1e-6)


def test_a_chunk_has_at_least_one_row(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK_ON_CPU", 1)
    hidden, weight, targets = problem(5)
    loss = cross_entropy_head(targets)(hidden, weight)
    torch.testing.assert_close(loss.detach().double(), plain(hidden, weight, targets)[0])


def test_nothing_to_train_on_gives_zero_loss_and_gradients():
    hidden, weight, targets = problem(5)
    loss = cross_entropy_head(targets[:0])(hidden[:0], weight)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_tensors_get_no_gradient(frozen):
    hidden, weight, targets = problem(5)
    expected = dict(zip(("hidden", "weight"), plain(hidden, weight, targets)[1:]))
    tensors = {"hidden": hidden, "weight": weight}
    tensors[frozen].requires_grad_(False)
    cross_entropy_head(targets)(hidden, weight).backward()
    for name, tensor in tensors.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, targets = problem(7)
    head = cross_entropy_head(targets)
    with torch.no_grad():
        loss = head(hidden, weight)
    assert not loss.requires_grad and loss.equal(head(hidden, weight).detach())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["frozen head", "fp32 master"])
def test_half_precision_stays_close(rows_per_chunk, dtype, tolerance, weight_dtype):
    rows_per_chunk(3)
    hidden, weight, targets = problem(30, dtype, weight_dtype)
    loss = cross_entropy_head(targets)(hidden, weight)
    loss.backward()
    assert hidden.grad.dtype == dtype and weight.grad.dtype == weight.dtype
    for actual, expected in zip((loss.detach(), hidden.grad, weight.grad), plain(hidden, weight, targets), strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize(
    "speedup, dtype, expected",
    [(3.0, torch.bfloat16, torch.bfloat16), (0.2, torch.bfloat16, torch.float32), (3.0, torch.float16, torch.float32)],
)
def test_a_cpu_multiplies_in_the_dtype_in_which_it_is_fast(monkeypatch, speedup, dtype, expected):
    monkeypatch.setattr("finetune.mixed_precision.bf16_speedup", lambda *shape: speedup)
    used, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: used.append((x.dtype, weight.dtype)) or linear(x, weight))
    hidden, weight, targets = problem(5, dtype)
    cross_entropy_head(targets)(hidden, weight).backward()
    assert used == [(expected, expected)]
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_small_fp16_gradients_do_not_underflow_in_a_large_batch(rows_per_chunk):
    """Divided by the number of tokens before the backward pass they would all round to zero."""
    tokens, scale = 20_000, 2.0**16
    rows_per_chunk(5000)
    generator = torch.Generator().manual_seed(0)
    # Confident and correct predictions have tiny gradients.
    targets = torch.randint(V, (tokens,), generator=generator)
    hidden = (F.one_hot(targets, V) * 14 + torch.randn(tokens, V, generator=generator)).half().requires_grad_()
    weight = (torch.eye(V) * 0.5).half()
    (cross_entropy_head(targets)(hidden, weight) * scale).backward()
    expected = plain(hidden, weight, targets)[1]
    assert expected.abs().max() < 2.0**-15 and expected.abs().median() < 2.0**-24  # below fp16's range
    error = (hidden.grad.double() / scale - expected).norm() / expected.norm()
    assert error < 0.01


@pytest.mark.parametrize("rows", [2, 1000])
def test_loss_and_gradients_of_an_adapted_head(rows_per_chunk, rows):
    rows_per_chunk(rows)
    hidden, weight, targets = problem(9)
    layer = LoRALinear(D, V, LoraArgs(rank=2, scaling=3.0))
    layer.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    for factor in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(factor.weight, generator=generator)
    trained = torch.arange(0, 9, 2)
    tensors = (hidden, layer.lora_A.weight, layer.lora_B.weight)
    loss = cross_entropy_head(targets[trained])(*layer.as_product(hidden[trained]))
    x, a, b = (tensor.detach().double().requires_grad_() for tensor in tensors)
    expected = F.cross_entropy((x @ weight.detach().double().T + 3 * x @ a.T @ b.T)[trained], targets[trained])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    ours, plain_ones = torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, (x, a, b))
    for gradient, plain_one in zip(ours, plain_ones, strict=True):
        torch.testing.assert_close(gradient.double(), plain_one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_the_factors_of_an_adapted_layer_multiply_to_its_output(training):
    layer = LoRALinear(D, V, LoraArgs(rank=2, dropout=0.5, scaling=3.0)).train(training)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, D)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)  # for the same dropout
    factor, matrix = layer.as_product(x)
    torch.testing.assert_close(factor @ matrix.T, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert layer.as_product(x)[0].equal(factor) is not training


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("full", [False, True], ids=["frozen head", "all trains"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_never_materializes_all_logits(rows_per_chunk, full, masked):
    vocab, tokens, rows = 2000, 96, 4
    rows_per_chunk(rows, vocab)
    args = ModelArgs(
        dim=D, n_layers=1, head_dim=4, hidden_dim=16, n_heads=2, n_kv_heads=1, norm_eps=1e-5, vocab_size=vocab
    )
    model = Transformer(args)
    model.output.weight.requires_grad_(full)
    ids = np.arange(tokens) % vocab
    batch = Batch(x=ids, y=ids, sizes=[tokens // 2] * 2, y_mask=ids % 3 > 0 if masked else None)
    with LargestTensor() as largest:
        batch_loss(model, batch, torch.device("cpu")).backward()
    assert largest.numel == D * vocab  # the head itself; T * V is 12 times as many
    logits = model(torch.from_numpy(ids), batch.sizes)
    kept = slice(None) if batch.y_mask is None else torch.from_numpy(batch.y_mask)
    expected = F.cross_entropy(logits[kept], torch.from_numpy(ids)[kept])
    torch.testing.assert_close(batch_loss(model, batch, torch.device("cpu")), expected)
