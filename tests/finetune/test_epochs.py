"""`epochs` instead of `max_steps`: number of steps, identical training, resuming."""

import json
import math
import sys
from pathlib import Path

import pytest
import yaml

from finetune.args import load_train_args, read_train_args
from finetune.data.args import DataArgs
from finetune.data.data_loader import TrainLoader, build_data_loader
from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.monitoring.metrics_logger import read_metrics
from finetune.run_dir import checkpoint_name, saved_checkpoints, step_of
from finetune.utils import TrainState
from model.errors import UserError
from tests.end_to_end.kill_runs import COMPARED, ForkedRun, curve, kill_test_config, train_forked
from tests.support.run_trajectories import INPUTS, write_config
from utils import validate_data

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SEQ_LEN = 512
ICD, TOOLS = INPUTS / "train_icd.jsonl", INPUTS / "function_calling.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return load_instruct_tokenizer(Path("no folder"), 32768)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, object]:
    """The settings of data with 30 rows to train on, which make short epochs, and one to evaluate."""
    rows, folder = ICD.read_text(encoding="utf-8").splitlines(keepends=True), tmp_path_factory.mktemp("data")
    some, one = folder / "some.jsonl", folder / "one.jsonl"
    some.write_text("".join(rows[:30]), encoding="utf-8")
    one.write_text(rows[30], encoding="utf-8")
    return {"instruct_data": str(some), "eval_instruct_data": str(one), "shuffle": True, "packing": "best_fit"}


def loader(tokenizer, sources: object, rank: int = 0, world_size: int = 1, **settings) -> TrainLoader:
    data = DataArgs(instruct_data=str(sources), **settings)
    return build_data_loader(tokenizer, data, 1, SEQ_LEN, 3, rank, world_size, is_eval=False)


def rows_of(batches: TrainLoader, sequences: int) -> list[str]:
    rows = [row for _ in range(sequences) for row in next(batches).rows]
    batches.close()
    return rows


@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("path", [ICD, TOOLS], ids=["icd", "tools"])
def test_an_epoch_ends_when_every_row_has_been_packed(path, rank, world_size, tokenizer):
    settings = (tokenizer, path, rank, world_size)
    sequences = math.ceil(loader(*settings).count_epoch(show_progress=False) / SEQ_LEN)
    lines = range(rank, len(path.read_bytes().splitlines()), world_size)
    everything = {f"{path}:{line + 1}" for line in lines}
    assert set(rows_of(loader(*settings), sequences)) == everything
    counts = loader(*settings)
    rows_of(counts, sequences - 1)
    assert counts.counts.samples <= len(counts._stream) < rows_read(loader(*settings), sequences + 2)


def rows_read(batches: TrainLoader, sequences: int) -> int:
    rows_of(batches, sequences)
    return batches.counts.samples


def test_complete_samples_are_seen_once_per_epoch(tokenizer):
    settings = {"packing": "best_fit", "overlong": "drop"}
    positions = loader(tokenizer, ICD, **settings).count_epoch(show_progress=False)
    rows = rows_of(loader(tokenizer, ICD, **settings), round(20 * positions / SEQ_LEN))
    assert len(rows) == pytest.approx(20 * len(set(rows)), rel=0.05)
    assert positions > 4 * SEQ_LEN


def test_the_length_of_an_epoch_is_the_sum_over_sources_for_any_weights(tokenizer):
    alone = [loader(tokenizer, path).count_epoch(show_progress=False) for path in (ICD, TOOLS)]
    both = loader(tokenizer, f"{ICD}:1,{TOOLS}:7").count_epoch(show_progress=False)
    assert both == sum(alone) and both % SEQ_LEN != 0


def test_counting_does_not_change_the_data_position(tokenizer):
    counted, fresh = (loader(tokenizer, f"{ICD},{TOOLS}") for _ in range(2))
    before = counted.state_dict()
    counted.count_epoch(show_progress=False)
    assert counted.state_dict() == before == fresh.state_dict()
    assert rows_of(counted, 12) == rows_of(fresh, 12)


def steps_of(config: Path, tokenizer, ranks: int) -> float:
    """Return the steps of an epoch."""
    args = read_train_args(config)
    parts = (tokenizer, args.data, args.batch_size, args.seq_len, args.seed)
    loaders = (build_data_loader(*parts, rank, ranks, is_eval=False) for rank in range(ranks))
    positions = sum(loader.count_epoch(show_progress=False) for loader in loaders)
    return positions / (args.batch_size * args.num_microbatches * args.seq_len * ranks)


def test_epochs_train_like_that_many_steps_and_resume(tmp_path, tokenizer, data):
    settings = {"num_ckpt_keep": None, "num_microbatches": 2, "data": data}
    by_epochs = {"epochs": 0.6, "max_steps": None} | settings
    epochs = without_max_steps(kill_test_config(tmp_path, "epochs", **by_epochs))
    run = ForkedRun(epochs, 1)
    assert run.wait() == [0], run.log
    one = steps_of(epochs, tokenizer, ranks=1)
    steps = math.ceil(0.6 * one)
    assert f"Epochs: 0.6, which is max_steps: {steps} (an epoch takes {one:.1f} steps)" in run.log
    written = epochs.with_suffix("") / "args.yaml"
    assert yaml.safe_load(written.read_text())["max_steps"] == steps != load_train_args(epochs).max_steps
    assert load_train_args(written).max_steps == steps

    stepped = kill_test_config(tmp_path, "stepped", max_steps=steps, **settings)
    assert ForkedRun(stepped, 1).wait() == [0]
    expected = curve(stepped.with_suffix(""))
    assert curve(epochs.with_suffix("")) == expected and expected["train"][-1][0] == steps

    checkpoint = str(epochs.with_suffix("") / "checkpoints" / "checkpoint_000004")
    rest = {tag: [row for row in expected[tag] if row[0] > 4] for tag in COMPARED}
    later = without_max_steps(kill_test_config(tmp_path, "later", resume=checkpoint, **by_epochs))
    run = ForkedRun(later, 1)
    assert run.wait() == [0] and curve(later.with_suffix("")) == rest
    assert "Epochs:" not in run.log and "Counting" not in run.log  # the checkpoint has the number of steps
    by_steps = kill_test_config(tmp_path, "by_steps", resume=checkpoint, max_steps=steps, **settings)
    assert ForkedRun(by_steps, 1).wait() == [0] and curve(by_steps.with_suffix("")) == rest

    more = without_max_steps(kill_test_config(tmp_path, "more", resume=checkpoint, **by_epochs | {"epochs": 0.9}))
    run, longer = ForkedRun(more, 1), math.ceil(0.9 * one)
    assert run.wait() == [0] and curve(more.with_suffix(""))["train"][-1][0] == longer > steps, run.log
    assert f"The run now ends after step {longer} instead of {steps}" in run.log
    less = without_max_steps(kill_test_config(tmp_path, "less", resume=checkpoint, **by_epochs | {"epochs": 0.05}))
    run = ForkedRun(less, 1)
    assert run.wait() == [1] and f"has taken 4 of {steps} steps already and would now end after" in run.log, run.log


def without_max_steps(config: Path) -> Path:
    settings = yaml.safe_load(config.read_text())
    del settings["max_steps"]
    config.write_text(yaml.safe_dump(settings))
    return config


def test_all_ranks_take_the_same_number_of_steps(tmp_path, tokenizer, data):
    config = without_max_steps(kill_test_config(tmp_path, "two", epochs=0.5, data=data, no_eval=True))
    run = ForkedRun(config, 2)
    assert run.wait() == [0, 0], run.log
    steps = [metrics["step"] for metrics in read_metrics(config.with_suffix(""), "train")]
    assert steps == list(range(1, math.ceil(steps_of(config, tokenizer, ranks=2) / 2) + 1))


def test_a_bad_row_is_found_while_counting(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(ICD.read_bytes() + b"{}\n")
    config = kill_test_config(tmp_path, "run", epochs=1, data={"instruct_data": str(data)}, no_eval=True)
    run = ForkedRun(without_max_steps(config), 2)
    assert run.wait() == [1, 1]
    assert run.log.count(f"line {len(ICD.read_bytes().splitlines()) + 1} of dataset {data} is incorrectly") == 1
    assert not config.with_suffix("").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 3, "max_steps": 100}, "`epochs` and `max_steps` both set the length of the run; give one of them."),
        ({"epochs": 0}, "`epochs` is 0; expected a number greater than 0"),
        ({"epochs": "three"}, "`epochs` is 'three'; expected a number greater than 0 or null"),
    ],
)
def test_invalid_lengths_of_a_run_are_refused(settings, message, tmp_path):
    config = write_config(tmp_path, "run", settings | {"data": {"instruct_data": str(ICD)}, "model_id_or_path": "."})
    with pytest.raises(UserError) as caught:
        load_train_args(config)
    assert str(caught.value).startswith(f"{config} cannot be used:\n  - {message}")


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_validate_data_estimates_the_steps_of_the_epochs(packing, tmp_path, tokenizer, monkeypatch, capsys):
    data = {"instruct_data": str(ICD), "packing": packing, "overlong": "drop"}
    data["instruct"] = {"shuffle": False, "dynamic_chunk_fn_call": False}
    settings = {"epochs": 4, "data": data, "seq_len": SEQ_LEN, "model_id_or_path": str(tmp_path / "model")}
    config = write_config(tmp_path, "run", settings)
    stats = tmp_path / "stats.json"
    command = ["validate_data", "--train_yaml", str(config), "--train_stats_json", str(stats), "--num_gpus", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--num_workers", "1"])
    validate_data.main()
    expected = math.ceil(4 * steps_of(config, tokenizer, ranks=1))
    assert abs(json.loads(stats.read_text())["expected"]["max_steps"] - expected) <= (packing == "best_fit")
    assert "`epochs`: training counts its steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("freq", "max_steps", "expected"),
    [
        (0, 7, []),
        (3, 7, [3, 6]),
        (0.1, 30, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),  # 0.1 * 30 is 3.0000000000000004
        (0.1, 25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]),
        (0.3, 10, [3, 6, 9]),
        (0.01, 5, [1, 2, 3, 4, 5]),
        ("epoch", 8, [3, 5, 8]),
        (0.999999, 5, [5]),
    ],
)
def test_frequencies_are_reached_at_the_end_of_each_period(freq, max_steps, expected):
    state = TrainState(max_steps, epoch_steps=2.5)
    reached, due = [], []
    for state.step in range(1, max_steps + 1):
        reached += [state.step] * state.reaches(freq)
        due += [state.step] * state.due(freq)
    assert reached == expected and due == sorted({*expected, max_steps})


def test_an_epoch_saves_and_a_share_of_the_run_evaluates(tmp_path, tokenizer):
    settings = {"epochs": 1.7, "ckpt_freq": "epoch", "eval_freq": 0.25, "log_freq": 0.5, "num_ckpt_keep": None}
    few, one = tmp_path / "few.jsonl", tmp_path / "one.jsonl"
    rows = ICD.read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(rows[:12]), encoding="utf-8")
    one.write_text(rows[12], encoding="utf-8")
    settings["data"] = {"instruct_data": str(few), "eval_instruct_data": str(one)}
    config = without_max_steps(kill_test_config(tmp_path, "epochs", **settings))
    run_dir = train_forked(config, 1)
    epoch = steps_of(config, tokenizer, ranks=1)
    steps = math.ceil(1.7 * epoch)
    assert 4 < math.ceil(epoch) < steps < 20
    saved = [step_of(path) for path in saved_checkpoints(run_dir / "checkpoints")]
    assert saved == [math.ceil(epoch), steps]
    assert [row["step"] for row in read_metrics(run_dir, "eval")] == [math.ceil(k * steps / 4) for k in (1, 2, 3, 4)]
    assert [row["step"] for row in read_metrics(run_dir, "train")] == [math.ceil(steps / 2), steps]
    recorded = yaml.safe_load((run_dir / "args.yaml").read_text())
    assert [recorded[key] for key in ("ckpt_freq", "eval_freq", "log_freq")] == ["epoch", 0.25, 0.5]

    checkpoint = run_dir / "checkpoints" / checkpoint_name(saved[0])
    resumed = kill_test_config(tmp_path, "resumed", resume=str(checkpoint), **settings)
    resumed_dir = train_forked(without_max_steps(resumed), 1)
    expected = curve(run_dir)
    assert curve(resumed_dir) == {tag: [row for row in expected[tag] if row[0] > saved[0]] for tag in expected}
    assert [step_of(path) for path in saved_checkpoints(resumed_dir / "checkpoints")] == [steps]
