"""benchmarks.train: all implementations compute the same losses, and the reported numbers are correct."""

import dataclasses
import itertools
import json
import os
import sys

import numpy as np
import pytest
import torch

from benchmarks import measure, train
from benchmarks.training import original, original_loop, sft
from benchmarks.training.inputs import packed_batches, train_args
from benchmarks.training.ours import build_ours
from benchmarks.training.peer import build_peft
from benchmarks.training.presets import PRESETS
from benchmarks.training.report import draw, latest, print_results
from benchmarks.training.session import RATIOS
from benchmarks.training.trial import timed
from benchmarks.training.weights import RandomWeights
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
    "packing": "concat",
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
    for impl, build in {"ours": build_ours, "peft": build_peft}.items():
        trainee = build(args, shapes, torch.device("cpu"))
        losses[impl] = [trainee.step(micro_batches).item() for micro_batches in steps]
    assert losses["ours"][0] != pytest.approx(losses["ours"][2], rel=1e-3)  # the loss changes
    np.testing.assert_allclose(losses["ours"], losses["peft"], rtol=2e-5)


def test_the_paired_mode_ends_with_the_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    options = "--preset tiny --device cpu --checkpoint false --packing best_fit --warmup 0 --steps 1 --threads 1"
    options += " --rounds 1 --paired peft"
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    with forked_python(tmp_path / "programs") as programs, monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(programs / "python"))
        train.main()
    record, by_peer = map(json.loads, capsys.readouterr().out.splitlines())
    result, ratios = record["results"][0], by_peer["peft"]
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [record]
    for ratio, key in RATIOS.items():
        assert ratios[ratio] == pytest.approx(result[f"ours.{key}"][1] / result[f"peft.{key}"][1], rel=1e-3)
        assert ratios[f"{ratio}_range"] == [ratios[ratio]] * 2
    assert result["ours.first_loss"] == pytest.approx(result["peft.first_loss"], rel=1e-4)
    assert {"transformers", "peft"} <= set(record["versions"])

    monkeypatch.setattr("benchmarks.training.report.RESULTS", tmp_path)
    print_results(latest())
    assert len(capsys.readouterr().out.splitlines()) == 4  # header, separator, one line per implementation


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
    with pytest.raises(UserError, match="--checkpoint is selective; peers support true and false"):
        build_peft(args, PRESETS["tiny"].shapes, torch.device("cpu"))


def samples_as_batch(samples):
    """Return whole samples as one batch of ours, without padding."""
    tokens = [np.array(sample["input_ids"]) for sample in samples]
    return Batch(
        x=np.concatenate([each[:-1] for each in tokens]),
        y=np.concatenate([each[1:] for each in tokens]),
        sizes=[len(each) - 1 for each in tokens],
        y_mask=np.concatenate([np.array(sample["completion_mask"][1:], bool) for sample in samples]),
        rows=[""] * len(tokens),
    )


def test_trl_packs_the_same_samples_and_has_our_loss(monkeypatch):
    """Three samples fit into its first sequence, so its loss before training is ours on them, in any order."""
    pytest.importorskip("trl", reason='needs the extra "peers"')
    args = train_args(PRESETS["tiny"], TINY | {"steps": 2, "seq_len": 2048, "set": ["num_microbatches=1"]})
    samples = sft.whole_samples(args)[:3]
    assert all(sample["input_ids"][0] == 1 and sample["input_ids"][-1] == 2 for sample in samples)
    expected = samples_as_batch(samples)
    assert 0 < expected.trained_tokens < len(expected.x) <= 2048
    monkeypatch.setattr(sft, "whole_samples", lambda args: samples)
    shapes, cpu = PRESETS["tiny"].shapes, torch.device("cpu")
    trial = sft.train_trl(args, shapes, cpu, warmup=1)
    work = Work()
    work.add(expected)
    assert trial.work == work and trial.tokens == work.complete_positions  # of the timed step only
    assert trial.seconds > 0 and trial.first_step_seconds > 0
    args = train_args(PRESETS["tiny"], TINY | {"seq_len": len(expected.x)})
    assert trial.losses[0] == pytest.approx(build_ours(args, shapes, cpu).step([expected]).item(), rel=2e-5)
    assert trial.losses[1] < trial.losses[0]  # the same samples again


def naive_attention(q, k, v, sizes):
    """Return causal attention within documents, computed from the scores of all pairs: [1, T, heads, head_dim]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    visible = torch.ones(len(document), len(document)).tril().bool() & (document[:, None] == document)
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)[None]


def test_attention_of_mistral_finetune_is_replaced_by_an_equal_one():
    q, k, v = torch.randn(3, 1, 9, 2, 4, dtype=torch.float64)
    found = original_loop.attention_by_document(q, k, v, [4, 1, 4])
    torch.testing.assert_close(found, naive_attention(q, k, v, [4, 1, 4]))
    assert found.view(9, 8).shape == (9, 8)  # as its model continues


# What `original_loop` uses of mistral-finetune, as small as possible: embeddings, one attention, the head.
CHECKOUT = {
    "model/__init__.py": "",
    "model/args.py": "LoraArgs = dict",
    "model/transformer.py": """
import torch


class Transformer(torch.nn.Module):
    def __init__(self, args, checkpoint):
        super().__init__()
        assert args["lora"] == {"rank": 4, "scaling": 2.0, "dropout": 0.0} and checkpoint is False
        self.tok_embeddings = torch.nn.Embedding(args["vocab_size"], args["dim"])
        self.lora = torch.nn.Linear(args["dim"], args["dim"], bias=False)
        self.output = torch.nn.Linear(args["dim"], args["vocab_size"], bias=False)

    def forward(self, input_ids, seqlens):
        h = self.tok_embeddings(input_ids)
        heads = h.view(1, len(h), 2, -1)
        mask = BlockDiagonalCausalMask.from_seqlens(seqlens)
        h = memory_efficient_attention(heads, heads, heads, mask).view(h.shape)
        return self.output(h + self.lora(h))
""",
    "finetune/__init__.py": "",
    "finetune/loss.py": """
import torch


def compute_loss_with_mask(logits, target, mask):
    return torch.nn.functional.cross_entropy(logits[mask], target[mask])
""",
    "finetune/mixed_precision.py": """
def prepare_mixed_precision(parameters, param_dtype, optim_dtype): ...
def upcast_mixed_precision(parameters, optim_dtype): ...
def downcast_mixed_precision(parameters, param_dtype): ...
""",
    "finetune/wrapped_model.py": """
import json
import torch
from safetensors.torch import load_file


def load_args(folder, lora):
    return json.loads((folder / "params.json").read_text()) | {"lora": lora}


def load_state_dict(folder, dtype):
    weights = load_file(folder / "consolidated.safetensors")
    kept = {name: weights[name] for name in ("tok_embeddings.weight", "output.weight")}
    width = weights["tok_embeddings.weight"].shape[1]
    return kept | {"lora.weight": torch.full((width, width), torch.nan, dtype=dtype)}


def initialize_lora_parameters(model, dtype):
    torch.nn.init.zeros_(model.lora.weight)
""",
}


def test_a_checkout_gets_our_weights_and_batches(tmp_path, monkeypatch):
    """A model with the interface of mistral-finetune's, in a process that must import it instead of ours."""
    for name, source in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setenv(original.VARIABLE, str(tmp_path))
    args = train_args(PRESETS["tiny"], TINY | {"seq_len": 640, "warmup": 1})
    shapes = PRESETS["tiny"].shapes
    trial = original.train_original(args, shapes, torch.device("cpu"), warmup=1)
    batches = packed_batches(args)
    first, second = ([next(batches), next(batches)] for _ in range(2))
    batches.close()
    weights, losses = RandomWeights(shapes, torch.device("cpu"), torch.float32), []
    for batch in first:
        heads = weights.read("tok_embeddings.weight")[batch.x].view(1, 640, 2, -1)
        h = naive_attention(heads, heads, heads, batch.sizes).reshape(640, -1)
        logits = h @ weights.read("output.weight").T
        losses.append(torch.nn.functional.cross_entropy(logits[batch.y_mask], torch.from_numpy(batch.y[batch.y_mask])))
    assert trial.losses[0] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    work = Work()
    work.add(*second)
    assert len(trial.losses) == 2 and trial.work == work and trial.tokens == 2 * 640
    assert trial.seconds > 0 and trial.first_step_seconds > 0
    assert 0 < trial.memory["import_bytes"] < trial.memory["peak_bytes"]


@pytest.mark.skipif(original.VARIABLE not in os.environ, reason=f"{original.VARIABLE} names no checkout")
def test_mistral_finetune_has_our_losses():
    case = TINY | {"steps": 3, "seq_len": 640, "set": ["optim.lr=0.01", "optim.pct_start=0.5"]}
    shapes, cpu = PRESETS["tiny"].shapes, torch.device("cpu")
    losses = [
        train(train_args(PRESETS["tiny"], case), shapes, cpu, warmup=0).losses
        for train in (timed(build_ours), original.train_original)
    ]
    assert losses[0][0] != pytest.approx(losses[0][2], rel=1e-3)
    np.testing.assert_allclose(*losses, rtol=2e-5)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (None, "--impl original needs a checkout of mistral-finetune: clone .*/mistral-finetune and set MISTRAL_FIN"),
        (measure.ROOT, "MISTRAL_FINETUNE is .*, which is not a checkout of mistral-finetune: clone "),
        ("missing", "MISTRAL_FINETUNE is missing, which is not a checkout of mistral-finetune: clone "),
    ],
)
def test_a_missing_checkout_is_reported(folder, message, monkeypatch):
    monkeypatch.delenv(original.VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(original.VARIABLE, str(folder))
    with pytest.raises(UserError, match=message):
        original.find_checkout()


def test_results_of_one_and_of_several_peers_are_printed(tmp_path, monkeypatch, capsys):
    """The first ones are in results that are committed, without the peer's name in that of the ratio."""
    lines = (measure.RESULTS / "train.jsonl").read_text().splitlines()
    older = json.loads(lines[0])
    newer = json.loads(lines[0])
    result = newer["results"][0]
    for number, peer in enumerate(("peft", "trl", "original"), start=2):
        result |= {key.replace("peft.", f"{peer}."): value for key, value in result.items() if "peft." in key}
        result |= {f"{peer}.{ratio}": [number - 0.25, number, number + 0.25] for ratio in RATIOS}
        result[f"{peer}.whole_tokens_per_second"] = [99, 100, 101]
    del result["speed_ratio"], result["memory_ratio"]
    (tmp_path / "train.jsonl").write_text(json.dumps(older) + "\n" + json.dumps(newer) + "\n")
    monkeypatch.setattr("benchmarks.training.report.RESULTS", tmp_path)
    print_results(latest())
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in table] == ["ours", "peft", "ours", "peft", "trl", "original"]
    speed = measure.spread(older["results"][0]["speed_ratio"])
    assert speed in table[1] and speed not in table[0]
    for number, row in enumerate(table[3:], start=2):
        assert row[-4:] == [f"{number}.00 ({number - 0.25}-{number + 0.25})"] * 4 and "100 (99-101)" in row
    draw(latest())
    assert (tmp_path / "train.png").stat().st_size > 10_000


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
    assert work == Work(positions=8, trained=4, pairs=10 + 3 + 3, documents=2, complete=1, complete_positions=2)


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
