"""`eval_batch_size` computes more sequences at once; the evaluation loss stays that of batches of `batch_size`."""

import math

import numpy as np
import pytest
import torch

import finetune.eval
from finetune.data.data_loader import Batch
from finetune.distributed import World
from finetune.eval import evaluate
from finetune.loss import batch_loss
from model.args import load_model_args
from model.transformer import Transformer
from tests.end_to_end.test_training import run_here, small_config
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.run_trajectories import INPUTS, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def made_batches() -> list[Batch]:
    """Return batches of unequal numbers of trained tokens: all, some, none, and some with message weights."""
    numbers = np.random.default_rng(0)
    masks = [None, numbers.random(24) < 0.2, np.zeros(24, bool), (numbers.random(24) < 0.5).astype(np.float32) * 0.3]
    masks.append(numbers.random(10) < 0.7)  # an incomplete last batch
    batches = []
    for mask in masks:
        tokens = numbers.integers(0, 96, 25 if mask is None else len(mask) + 1)
        sizes = [7, len(tokens) - 8]
        batches.append(Batch(x=tokens[:-1], y=tokens[1:], sizes=sizes, y_mask=mask))
    return batches


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Transformer:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32, vocab_size=96, **SHAPES)
    torch.manual_seed(1)
    return Transformer(load_model_args(folder))


SHAPES = {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_joined_batches_have_the_same_mean(model, by_tokens, at_once, monkeypatch):
    alone = evaluate(model, made_batches(), WORLD, by_tokens)
    calls = []
    monkeypatch.setattr(finetune.eval, "batch_loss", lambda *args: calls.append(args) or batch_loss(*args))
    assert evaluate(model, made_batches(), WORLD, by_tokens, at_once=at_once) == pytest.approx(alone, rel=1e-6)
    assert len(calls) == math.ceil(len(made_batches()) / at_once)
    assert math.isfinite(alone)


def test_a_run_evaluates_more_sequences_at_once_to_the_same_loss(tmp_path, monkeypatch):
    base = make_tiny_checkpoint(tmp_path / "model", dtype=torch.float32, **SMALL)
    data = {
        "instruct_data": str(INPUTS / "train_icd.jsonl"),
        "eval_instruct_data": str(INPUTS / "eval_instruct.jsonl"),
    }
    lengths: list[int] = []
    monkeypatch.setattr(finetune.eval, "batch_loss", lambda *args: lengths.append(len(args[1].x)) or batch_loss(*args))
    losses, longest = [], []
    for name, keys in {"one": {}, "four": {"eval_batch_size": 4}}.items():
        lengths.clear()
        config = small_config(tmp_path, base, name, data=data, no_eval=False, max_steps=2, **keys)
        losses.append([row["eval_loss"] for row in read_jsonl(run_here(config) / "metrics.eval.jsonl")])
        longest.append(max(lengths))
    assert longest == [64, 256]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
