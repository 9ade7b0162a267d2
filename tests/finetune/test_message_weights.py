"""A `weight` between 0 and 1 scales the loss of an assistant message's tokens, from the row to the logged loss."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune import loss as loss_module
from finetune.data.args import DataArgs
from finetune.data.data_loader import build_data_loader
from finetune.data.exceptions import RowError
from finetune.data.tokenize import SampleEncoder, SampleType
from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.loss import batch_loss
from finetune.monitoring.metrics_logger import read_metrics
from model.transformer import Transformer
from tests.end_to_end.kill_runs import train_forked
from tests.end_to_end.test_training import CPU, build, loaders, run_here, small_config
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.run_trajectories import INPUTS, read_jsonl
from tests.support.tiny_tekken import load_tiny_tekken
from utils.validation.check_rows import RecordingEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = (0.25, 1, 0.5, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return load_instruct_tokenizer(Path("no folder"), 32768)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32, **SMALL)


def conversation(*weights: float | None) -> dict:
    """A question and an answer per weight."""
    messages = []
    for index, weight in enumerate(weights):
        answer = {"role": "assistant", "content": f"answer {index}"} | ({} if weight is None else {"weight": weight})
        messages += [{"role": "user", "content": f"question {index}"}, answer]
    return {"messages": messages}


@pytest.fixture
def weighted(tmp_path) -> Path:
    """Rows of golden/ whose answers have different weights."""
    rows = read_jsonl(INPUTS / "train_icd.jsonl")[:24]
    for index, row in enumerate(rows):
        for message in row["messages"]:
            message |= {"weight": WEIGHTS[index % 4]} if message["role"] == "assistant" else {}
    path = tmp_path / "weighted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("version", ["v3", "v7", "v13"])
def test_tokens_have_the_weight_of_their_message(version, tmp_path):
    encoder = SampleEncoder(load_tiny_tekken(tmp_path, version).instruct_tokenizer)
    plain = encoder.encode(conversation(None, None, None), SampleType.INSTRUCT)
    spans = np.split(np.array(plain.masks), np.flatnonzero(np.diff(plain.masks)) + 1)
    sample = encoder.encode(conversation(0.25, 1, 0), SampleType.INSTRUCT)
    assert sample.tokens == plain.tokens
    expected = np.concatenate([span * weight for span, weight in zip(spans, (0, 0.25, 0, 1, 0, 0), strict=True)])
    assert sample.masks == expected.tolist()


def test_weights_0_and_1_give_a_bool_mask(tokenizer):
    for row in (conversation(0, 1), conversation(None, 1.0), conversation(0.0, True)):
        masks = SampleEncoder(tokenizer).encode(row, SampleType.INSTRUCT).masks
        assert {type(trained) for trained in masks} == {bool}


@pytest.mark.parametrize("weight", [-0.5, 1.5, float("nan"), float("inf")])
def test_weights_out_of_range_are_an_error(weight, tokenizer):
    with pytest.raises(RowError, match=r"The `weight` of an assistant message is .*; expected 0 to 1"):
        SampleEncoder(tokenizer).encode(conversation(1, weight), SampleType.INSTRUCT)


def test_the_validator_counts_weighted_tokens_as_trained(tokenizer):
    encoder = RecordingEncoder(tokenizer, DataArgs(), 100, chunk=False)
    for weights in ((0.5, 0.25), (1, 1)):
        encoder.encode(conversation(*weights), SampleType.INSTRUCT)
    assert encoder.samples[0] == encoder.samples[1] and encoder.training == 2 and not encoder.warnings


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_weights_are_packed_with_their_tokens(packing, weighted, tokenizer):
    data = DataArgs(instruct_data=str(weighted), packing=packing)
    batches = build_data_loader(tokenizer, data, 1, 512, 0, 0, 1, is_eval=False)
    seen = set()
    for batch in itertools.islice(batches, 8):
        assert batch.trained_tokens == sum(batch.y_mask > 0)
        assert batch.loss_weight == pytest.approx(sum(batch.y_mask))
        starts = np.cumsum([0, *batch.sizes])
        for row, start, end in zip(batch.rows, starts, starts[1:]):
            line = int(row.rpartition(":")[2])
            found = set(batch.y_mask[start:end])
            assert found <= {0, WEIGHTS[(line - 1) % 4]}
            seen |= found
    batches.close()
    assert seen == {0, *WEIGHTS}


def losses(model: Transformer, batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive sums of the weighted losses and of the weights."""
    total, weight = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        each = F.cross_entropy(
            model(torch.from_numpy(batch.x), batch.sizes).double(), torch.from_numpy(batch.y), reduction="none"
        )
        weights = torch.from_numpy(np.asarray(batch.y_mask, dtype=np.float64))
        total, weight = total + (each * weights).sum(), weight + weights.sum()
    return total, weight


def test_loss_and_gradients_equal_those_of_the_weighted_mean(weighted, model, tmp_path, monkeypatch):
    config = small_config(tmp_path, model, data={"instruct_data": str(weighted)}, seq_len=512, lora={"enable": False})
    config.write_text(config.read_text() + "save_adapters: false\n")
    (source,) = loaders(config, world_size=1, is_eval=False)
    batch = next(source)
    source.close()
    parameters = build(config)
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK_ON_CPU", 7 * parameters.args.vocab_size)
    total, weight = losses(parameters, [batch])
    loss = batch_loss(parameters, batch, CPU.device)
    assert loss.item() == pytest.approx((total / weight).item(), rel=1e-6)
    trained = [p for p in parameters.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total / weight, trained)
    for found, reference in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-7)
    batch.y_mask = batch.y_mask > 0
    assert batch_loss(parameters, batch, CPU.device).item() != pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_normalization_by_tokens_uses_weights(ranks, weighted, model, tmp_path):
    config = small_config(
        tmp_path,
        model,
        data={"instruct_data": str(weighted), "eval_instruct_data": str(weighted)},
        seq_len=512,
        num_microbatches=2,
        loss_normalization="tokens",
        max_steps=1,
        no_eval=False,
        optim={"lr": 0.0},
    )
    if ranks == 1:
        run_here(config)
    else:
        train_forked(config, ranks)
    (step,), (evaluation,) = (read_metrics(config.with_suffix(""), tag) for tag in ("train", "eval"))
    start = build(config)
    sources = loaders(config, world_size=ranks, is_eval=False)
    batches = [next(source) for source in sources for _ in range(2)]
    for source in sources:
        source.close()
    with torch.no_grad():
        total, weight = losses(start, batches)
        assert step["loss"] == pytest.approx((total / weight).item(), rel=1e-5)
        total, weight = losses(start, [batch for source in loaders(config, ranks, is_eval=True) for batch in source])
        assert evaluation["eval_loss"] == pytest.approx((total / weight).item(), rel=1e-5)
