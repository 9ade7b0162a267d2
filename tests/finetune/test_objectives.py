"""Loss normalization (per token or per micro-batch), and adapters for selected layers, including the head."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from finetune.args import load_train_args
from finetune.data.data_loader import Batch
from finetune.inference import load_trained
from finetune.loss import batch_loss
from finetune.manifest import MANIFEST_NAME, write_manifest
from finetune.optim import build_optimizer
from finetune.wrapped_model import trainable_parameters
from model.errors import UserError
from model.generate import collect_tokens, stream
from model.lora import merge_lora
from model.transformer import Transformer
from tests.end_to_end.kill_runs import COMPARED, ForkedRun, curve, kill_test_config, train_forked
from tests.end_to_end.test_training import build, loaders, logits_of, run_here, small_config, trained, weights_folder
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.run_trajectories import INPUTS, read_jsonl

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

TARGETS = ["wq", "w2", "gate", "output"]
EVERY_TOKEN = {
    "loss_normalization": "tokens",
    "num_microbatches": 2,
    "no_eval": False,
    "eval_freq": 2,
    "ckpt_freq": 2,
    "max_steps": 4,
    "max_norm": 0.1,
    "data": {
        "instruct_data": str(INPUTS / "train_icd.jsonl"),
        "eval_instruct_data": str(INPUTS / "eval_instruct.jsonl"),
    },
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, dtype=torch.float32, **SMALL)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("dense"), dtype=torch.float32, **SMALL)


@pytest.fixture(scope="module")
def by_tokens(moe, dense, tmp_path_factory) -> dict[int, Path]:
    """Run folders by number of ranks; the two ranks adapt selected layers, and evaluate two batches at once."""
    folder = tmp_path_factory.mktemp("by_tokens")
    adapter = {"rank": 4, "targets": TARGETS}
    two = small_config(folder, moe, "two", lora=adapter, eval_batch_size=2, **EVERY_TOKEN)
    return {1: run_here(small_config(folder, dense, "one", **EVERY_TOKEN)), 2: train_forked(two, 2)}


def summed_loss(model: Transformer, batches: Iterable[Batch]) -> tuple[torch.Tensor, int]:
    """Return the loss summed over all trained tokens, and their number."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        logits = model(torch.from_numpy(batch.x), batch.sizes)
        kept = slice(None) if batch.y_mask is None else torch.from_numpy(batch.y_mask)
        targets = torch.from_numpy(batch.y)[kept]
        total, count = total + F.cross_entropy(logits[kept], targets, reduction="sum"), count + len(targets)
    return total, count


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_trained_token_counts_the_same(ranks, by_tokens):
    """Reference: one loss over all tokens of all ranks and micro-batches, plain autograd, PyTorch's clipping."""
    run_dir = by_tokens[ranks]
    config = run_dir.with_suffix(".yaml")
    args = load_train_args(config)
    model = build(config)
    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
    sources = loaders(config, world_size=ranks, is_eval=False)
    differences = []
    for recorded in read_jsonl(run_dir / "metrics.train.jsonl"):
        batches = [next(source) for source in sources for _ in range(2)]
        means = [batch_loss(model, batch, torch.device("cpu")).item() for batch in batches]
        total, count = summed_loss(model, batches)
        differences.append(abs(sum(means) / len(means) - total.item() / count))
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable_parameters(model), args.max_norm)
        optimizer.step()
        if recorded["step"] < args.max_steps:
            schedule.step()
        assert recorded["loss"] == pytest.approx(total.item() / count, rel=1e-5)
        assert recorded["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for source in sources:
        source.close()
    assert max(differences) > 0.01  # so the two means differ
    saved = load_file(weights_folder(run_dir, args.max_steps) / "lora.safetensors")
    assert saved.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, model.get_parameter(name).data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_evaluated_token_counts_the_same(ranks, by_tokens):
    run_dir = by_tokens[ranks]
    config = run_dir.with_suffix(".yaml")
    batches = list(itertools.chain.from_iterable(loaders(config, world_size=ranks, is_eval=True)))
    evaluations = read_jsonl(run_dir / "metrics.eval.jsonl")
    assert [metrics["step"] for metrics in evaluations] == [2, 4]
    for metrics in evaluations:
        model = build(config, weights_folder(run_dir, metrics["step"]) / "lora.safetensors").eval()
        with torch.no_grad():
            total, count = summed_loss(model, batches)
        assert metrics["eval_loss"] == pytest.approx(total.item() / count, rel=1e-5)


def test_a_run_with_an_adapter_for_selected_layers_can_be_loaded(by_tokens):
    run_dir = by_tokens[2]
    saved = load_file(weights_folder(run_dir, 4) / "lora.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in saved} == set(TARGETS)
    assert json.loads((weights_folder(run_dir, 4) / "params.json").read_text())["lora"].keys() == {
        *("enable", "rank", "dropout", "scaling", "base_model")
    }
    adapted = build(run_dir.with_suffix(".yaml"), weights_folder(run_dir, 4))
    expected = logits_of(adapted)
    assert (expected - logits_of(build(run_dir.with_suffix(".yaml")))).abs().max() > 1e-3
    merged, _ = load_trained(run_dir)
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-4)


def test_answers_during_training_come_from_the_adapted_head(dense, tmp_path):
    _, model = trained(tmp_path, dense, lora={"rank": 4, "targets": ["output"], "dropout": 0.5, "scaling": 100.0})
    prompts = [[1, 3, 1027], [1, 17]]
    answers = collect_tokens(stream(model, prompts, 8, eos_id=2))
    merge_lora(model)
    assert collect_tokens(stream(model, prompts, 8, eos_id=2)) == answers
    assert collect_tokens(stream(build(tmp_path / "run.yaml"), prompts, 8, eos_id=2)) != answers


def test_targets_that_the_model_does_not_have_are_refused(dense, tmp_path):
    config = small_config(tmp_path, dense, lora={"targets": ["wq", "gate"]})
    with pytest.raises(UserError, match=r"`lora\.targets` names gate, which this model does not have"):
        run_here(config)
    assert not config.with_suffix("").exists()


def test_an_initial_adapter_for_other_layers_is_refused(by_tokens, tmp_path, moe):
    adapter = weights_folder(by_tokens[2], 4) / "lora.safetensors"
    config = small_config(tmp_path, moe, lora={"rank": 4, "targets": ["wq", "wk"], "from_adapter": str(adapter)})
    with pytest.raises(UserError, match=r"`lora.targets: \[wq, wk\]`: .*attention.wk.lora_A.weight is missing"):
        run_here(config)


@pytest.mark.parametrize("name, ranks", [("cosine", 1), ("linear", 1), ("constant", 2)])
def test_a_run_resumes_with_schedule_targets_and_normalization(name, ranks, tmp_path):
    settings = {
        "optim": {"lr": 0.01, "schedule": name, "pct_start": 0.3},
        "lora": {"rank": 4, "dropout": 0.1, "alpha": 6, "targets": ["wv", "output"]},
        "loss_normalization": "tokens",
        "num_microbatches": 2,
        "num_ckpt_keep": None,
    }
    whole = kill_test_config(tmp_path, "whole", **settings)
    assert ForkedRun(whole, ranks).wait() == [0] * ranks
    checkpoint = whole.with_suffix("") / "checkpoints" / "checkpoint_000004"
    later = kill_test_config(tmp_path, "later", resume=str(checkpoint), **settings)
    assert ForkedRun(later, ranks).wait() == [0] * ranks
    expected, found = curve(whole.with_suffix("")), curve(later.with_suffix(""))
    assert all(found[tag] == [row for row in expected[tag] if row[0] > 4] and found[tag] for tag in COMPARED)


def test_these_settings_must_not_change_but_may_be_missing_in_an_old_state(tmp_path):
    """A run saved before the settings existed has none of them in its state."""
    config = kill_test_config(tmp_path, "run", ckpt_freq=6)
    assert ForkedRun(config, 1).wait() == [0]
    checkpoint = config.with_suffix("") / "checkpoints" / "checkpoint_000006"
    changed = {
        "optim": {"lr": 0.01, "schedule": "linear"},
        "lora": {"rank": 4, "dropout": 0.1, "targets": ["wq"]},
        "loss_normalization": "tokens",
    }
    run = ForkedRun(kill_test_config(tmp_path, "changed", resume=str(checkpoint), **changed), 1)
    assert run.wait() == [1]
    assert set(re.findall(r"^  - `(.*?)` is", run.log, re.MULTILINE)) == {
        *("optim.schedule", "lora.targets", "loss_normalization")
    }
    state = checkpoint / "state" / "run.json"
    saved = json.loads(state.read_text())
    del saved["args"]["loss_normalization"], saved["args"]["optim"]["schedule"], saved["args"]["lora"]["targets"]
    state.write_text(json.dumps(saved))
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)
    later = kill_test_config(tmp_path, "later", resume=str(checkpoint))
    run = ForkedRun(later, 1)
    assert run.wait() == [0], run.log
    assert [row[0] for row in curve(later.with_suffix(""))["train"]] == [7, 8]
