"""benchmarks.train: both implementations compute the same losses, and the reported numbers are correct."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import measure, train
from benchmarks.training.peer import build_peft
from benchmarks.training.presets import PRESETS
from benchmarks.training.report import draw, latest, print_results
from benchmarks.training.session import BUILDERS, packed_batches, train_args
from benchmarks.training.work import Work, model_flops, recomputed_flops
from finetune.data.data_loader import Batch
from model.args import ModelArgs
from model.errors import UserError
from model.transformer import Transformer
from tests.support.forked_python import forked_python

TINY = {
    "preset": "tiny",
    "device": "cpu",
    "checkpoint": "false",
    "dtype": "fp32",
    "attention": "auto",
    "threads": 1,
    "seq_len": 1024,
    "warmup": 0,
    "steps": 1,
    "vocab_size": 32768,
    "set": [],
}


def small_vocabulary(batch: Batch, size: int) -> Batch:
    return dataclasses.replace(batch, x=batch.x % size, y=batch.y % size)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ours_and_the_peer_have_the_same_losses(batch_size):
    """From the same weights, over several steps, on packed documents, which must not attend to each other."""
    settings = [f"batch_size={batch_size}", "optim.lr=0.01", "optim.pct_start=0.5"]
    args = train_args(PRESETS["tiny"], TINY | {"steps": 3, "seq_len": 640, "set": settings})
    shapes = dataclasses.replace(PRESETS["tiny"].shapes, vocab_size=512)
    batches = packed_batches(args)
    steps = [[small_vocabulary(batch, 512) for batch in itertools.islice(batches, 2)] for _ in range(3)]
    batches.close()
    assert all(len(batch.sizes) > batch_size for batch in itertools.chain(*steps))  # packed
    losses = {}
    for impl, build in BUILDERS.items():
        trainee = build(args, shapes, torch.device("cpu"))
        losses[impl] = [trainee.step(micro_batches).item() for micro_batches in steps]
    assert losses["ours"][0] != pytest.approx(losses["ours"][2], rel=1e-3)  # the loss changes
    np.testing.assert_allclose(losses["ours"], losses["peft"], rtol=2e-5)


def test_the_paired_mode_ends_with_the_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    options = "--preset tiny --device cpu --checkpoint false --warmup 0 --steps 1 --threads 1 --rounds 1 --paired peft"
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    with forked_python(tmp_path / "programs") as programs, monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(programs / "python"))
        train.main()
    record, ratios = map(json.loads, capsys.readouterr().out.splitlines())
    result = record["results"][0]
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [record]
    for ratio, key in (("speed_ratio", "tokens_per_second"), ("memory_ratio", "peak_bytes")):
        assert ratios[ratio] == pytest.approx(result[f"ours.{key}"][1] / result[f"peft.{key}"][1], rel=1e-3)
        assert ratios[f"{ratio}_range"] == [ratios[ratio]] * 2
    assert result["ours.first_loss"] == pytest.approx(result["peft.first_loss"], rel=1e-4)
    assert {"transformers", "peft"} <= set(record["versions"])

    monkeypatch.setattr("benchmarks.training.report.RESULTS", tmp_path)
    print_results(latest())
    assert len(capsys.readouterr().out.splitlines()) == 4  # header, separator, one line per implementation
    draw(latest())
    assert (tmp_path / "train.png").stat().st_size > 10_000


def test_fresh_process_prints_its_measurements():
    numbers = train.in_fresh_process("ours", TINY | {"seq_len": 512, "checkpoint": "true", "set": ["lora.rank=2"]})
    assert numbers["tokens"] == 2 * 512
    assert numbers["tokens_per_second"] == pytest.approx(numbers["tokens"] / numbers["seconds"])
    assert 0 < numbers["mfu"] < numbers["hfu"]  # checkpoint: true
    assert numbers["import_bytes"] < numbers["peak_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps is 0; it must be at least 1"),
        (("--set", "lora.rank"), "--set lora.rank: expected KEY=VALUE"),
        (("--set", "lora.rnak=4"), "`lora.rnak` is not a known setting; did you mean `lora.rank`?"),
        (("--vocab_size", "100"), "--vocab_size is 100; the tokenizer has 32768 tokens"),
    ],
)
def test_invalid_options_are_reported(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--preset", "tiny", "--device", "cpu", "--unrecorded", *options])
    with pytest.raises(UserError, match=message):
        train.main()


def test_peer_rejects_unsupported_settings():
    args = train_args(PRESETS["tiny"], TINY)
    args.checkpoint = "selective"
    with pytest.raises(UserError, match="--checkpoint is selective; transformers supports true and false"):
        build_peft(args, PRESETS["tiny"].shapes, torch.device("cpu"))


def test_larger_vocabulary_does_not_change_the_batches():
    case = TINY | {"vocab_size": 40000, "set": ["lora.rank=4"]}
    batches = packed_batches(train_args(PRESETS["tiny"], case))
    assert next(batches).x.max() < 32768
    batches.close()


def test_work_counts_documents_pairs_and_complete_samples():
    work = Work()
    x = np.array([1, 7, 8, 9, 1, 5, 0, 0])  # the document ending in 9 is cut; padding is not a document
    y = np.array([7, 8, 9, 4, 5, 2, 0, 0])
    work.add(
        Batch(
            x,
            y,
            sizes=[4, 2, 2],
            y_mask=np.array([False, True, True, True, False, True, False, False]),
            rows=["a", "b"],
        )
    )
    assert work == Work(positions=8, trained=4, pairs=10 + 3 + 3, documents=2, complete=1)


def test_flops_match_pytorchs_counter():
    """With all positions trained and a single document, the formula must match PyTorch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes = ModelArgs(32, 2, 8, 48, 4, 2, 1e-5, 64)
    model, tokens = Transformer(shapes), 20
    work = Work(positions=tokens, trained=tokens, pairs=0, documents=1, complete=1)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens), [tokens])
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    head = 2 * tokens * 32 * 64
    assert recomputed_flops(shapes, 0, work) == products - head
    assert model_flops(shapes, 0, work) == 2 * products
    seen = Work(positions=tokens, trained=tokens, pairs=tokens**2, documents=1, complete=1)
    scores = 2 * 2 * (2 * 4 * tokens * tokens * 8)  # layers, two products, each of 4 heads
    assert recomputed_flops(shapes, 0, seen) - recomputed_flops(shapes, 0, work) == scores
    assert model_flops(shapes, 0, seen) - model_flops(shapes, 0, work) == 3 * scores
