"""Answers generated and scored during training, the best checkpoint, early stopping."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune.eval
import train
from finetune.args import EarlyStoppingArgs, GenerationArgs, TrainArgs
from finetune.data.args import DataArgs
from finetune.data.tokenize import SampleEncoder
from finetune.distributed import World
from finetune.eval import EarlyStopping, GenerationEval
from finetune.monitoring.args import WandbArgs
from finetune.run_dir import saved_checkpoints
from model.args import LoraArgs
from model.errors import UserError
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.golden import instruct_tokenizer
from tests.support.wandb_reader import read_offline_run
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.metrics import answer_scores
from utils.icd10.prompts import instruct_row

pytestmark = pytest.mark.slow

WORLD = World(0, 1, torch.device("cpu"))
LINKS = ("best", "last")
NOTE = "Patient xylophonique de 70 ans, zibeline."  # words that must not appear outside of answers/
ANSWER = build_answer([Diagnosis("DP", "I10", "Hypertension essentielle (primitive)")])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = (json.dumps(instruct_row(NOTE, ANSWER, str(index)), ensure_ascii=False) for index in range(4))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def run(tmp_path: Path, model_folder: Path, rows: Path, **settings: Any) -> Path:
    args = TrainArgs(
        data=DataArgs(instruct_data=str(rows), eval_instruct_data=str(rows), packing="best_fit"),
        model_id_or_path=str(model_folder),
        run_dir=str(tmp_path / "run"),
        lora=LoraArgs(rank=4),
        seq_len=512,
        no_eval=False,
        **settings,
    )
    train.run_training(args, WORLD)
    return tmp_path / "run"


def eval_records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.eval.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_are_scored_and_saved_in_their_folder_only(tmp_path: Path, model_folder: Path, rows: Path) -> None:
    generation = GenerationArgs(file=str(rows), n_samples=3, max_tokens=4, batch_size=2, freq=2)
    wandb = WandbArgs(project="icd", offline=True)
    run_dir = run(tmp_path, model_folder, rows, max_steps=4, eval_generation=generation, wandb=wandb)
    from wandb import teardown  # slow to import

    teardown()  # else processes that other tests start would find wandb's service in their environment
    records = eval_records(run_dir)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all({"micro_f1", "exact_match", "ended"} <= record.keys() for record in records)
    assert "eval_loss" in records[-1]
    answers = sorted(path.name for path in (run_dir / "answers").iterdir())
    assert answers == ["step_000000.jsonl", "step_000002.jsonl", "step_000004.jsonl"]
    assert {path.stat().st_mode & 0o777 for path in (run_dir / "answers").iterdir()} == {0o600}
    kept = [json.loads(line) for line in (run_dir / "answers" / answers[0]).read_text(encoding="utf-8").splitlines()]
    assert [row["expected"] for row in kept] == [ANSWER] * 3
    (tracked,) = (read_offline_run(path) for path in run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert any("eval.micro_f1" in step for step in tracked.history)
    assert all(isinstance(value, int | float) for step in tracked.history for value in step.values())
    assert "xylophonique" not in str(tracked) and "Hypertension" not in str(tracked)
    for path in run_dir.rglob("*"):
        if path.is_file() and path.parent.name != "answers":
            content = path.read_bytes()
            assert b"xylophonique" not in content, path
            assert b"Hypertension" not in content or path.name.startswith("tokenizer"), path


def test_saving_answers_can_be_disabled(tmp_path: Path, model_folder: Path, rows: Path) -> None:
    generation = GenerationArgs(file=str(rows), n_samples=1, max_tokens=2, keep_answers=False)
    run_dir = run(tmp_path, model_folder, rows, max_steps=1, eval_generation=generation)
    assert not (run_dir / "answers").exists()
    assert len(eval_records(run_dir)) == 2


def test_generating_answers_does_not_change_training(tmp_path: Path, model_folder: Path, rows: Path) -> None:
    generation = GenerationArgs(file=str(rows), n_samples=2, max_tokens=3, freq=1)
    losses = []
    for name, settings in (("with", {"eval_generation": generation}), ("without", {})):
        run_dir = run(tmp_path / name, model_folder, rows, max_steps=3, **settings)
        lines = (run_dir / "metrics.train.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name not in ("at", "wps", "avg_wps")} for record in records
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, rows: Path) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run that evaluates before the first step, after the second and after the last; its settings."""
    generation = GenerationArgs(file=str(rows), n_samples=2, max_tokens=3, freq=2)
    settings = {"max_steps": 4, "eval_freq": 2, "ckpt_freq": 0, "keep_best": True, "eval_generation": generation}
    return run(tmp_path_factory.mktemp("evaluated"), model_folder, rows, **settings), settings


@pytest.mark.parametrize(
    ("interrupted", "step"), [("batch_loss", 2), ("stream", 2), ("batch_loss", 4), ("stream", 4), ("stream", 0)]
)
def test_a_signal_interrupts_an_evaluation_which_the_resumed_run_repeats(
    interrupted: str,
    step: int,
    evaluated: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    model_folder: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, settings = evaluated
    original, calls = getattr(finetune.eval, interrupted), []

    def signaling(*args: Any, **kwargs: Any) -> Any:
        if tmp_path.joinpath("cut/run/metrics.train.jsonl").read_text(encoding="utf-8").count("\n") == step:
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append(args)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.eval, interrupted, signaling)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "cut", model_folder, rows, **settings)
    cut = tmp_path / "cut" / "run"
    assert stopped.value.code == 75 and (cut / "interrupted").exists()
    assert len(calls) == 1, "the batch or the answers during which the signal arrives are the last"
    assert all(record["step"] < step for record in eval_records(cut)), "no half result"
    saved = [path.name for path in saved_checkpoints(cut / "checkpoints")]
    assert saved[-1:] == ([f"checkpoint_{step:06d}"] if step else [])

    run(tmp_path / "cut", model_folder, rows, resume="auto", **settings)
    assert without_times(eval_records(cut)) == without_times(eval_records(whole))
    assert [record["step"] for record in eval_records(cut)] == [0, 2, 4]
    best, last = (tuple((folder / "checkpoints" / name).resolve().name for folder in (cut, whole)) for name in LINKS)
    assert best[0] == best[1] and last[0] == last[1] == "checkpoint_000004"
    adapters = (load_file(folder / "checkpoints/last/consolidated/lora.safetensors") for folder in (cut, whole))
    assert all(tensor.equal(other) for tensor, other in zip(*(each.values() for each in adapters), strict=True))
    assert not (cut / "interrupted").exists()


def test_a_stopped_run_without_checkpoints_says_that_its_steps_are_lost(
    tmp_path: Path, model_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = train.log_step
    monkeypatch.setattr(train, "log_step", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), original(*args)))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, model_folder, rows, max_steps=4, no_ckpt=True)
    assert stopped.value.code == 75
    (message,) = (record.message for record in caplog.records if record.levelname == "WARNING" and "Stop" in record.msg)
    expected = "Stopped by SIGTERM after step 1. Nothing was saved (`no_ckpt: true`): the steps of this run are lost."
    assert message == expected
    assert not (tmp_path / "run" / "interrupted").exists(), "requeueing would start from the beginning each time"


def test_the_best_checkpoint_is_linked_and_never_pruned(
    tmp_path: Path, model_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr("finetune.eval.evaluate", lambda *_: next(losses))
    run_dir = run(tmp_path, model_folder, rows, max_steps=6, eval_freq=1, ckpt_freq=1, keep_best=True, num_ckpt_keep=1)
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "best").resolve().name == "checkpoint_000002"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best",
        "checkpoint_000002",
        "checkpoint_000006",
        "last",
    ]
    assert (checkpoints / "best" / "consolidated" / "lora.safetensors").is_file()


def test_early_stopping_saves_a_checkpoint(
    tmp_path: Path, model_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.5])
    monkeypatch.setattr("finetune.eval.evaluate", lambda *_: next(losses))
    early = EarlyStoppingArgs(patience=2)
    run_dir = run(tmp_path, model_folder, rows, max_steps=20, eval_freq=1, early_stopping=early)
    assert eval_records(run_dir)[-1]["step"] == 4
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["checkpoint_000004", "last"]


@pytest.mark.parametrize(
    ("metric", "values"), [("eval_loss", [2.0, 1.0, 1.0, 0.5]), ("micro_f1", [0.1, 0.2, 0.2, 0.3])]
)
def test_a_lower_loss_or_a_higher_score_is_better(metric: str, values: list[float]) -> None:
    early_stopping = EarlyStopping(EarlyStoppingArgs(metric=metric, patience=1))
    assert [early_stopping.update({metric: value}) for value in values[:2]] == [True, True]
    assert not early_stopping.should_stop
    assert not early_stopping.update({})  # a step without this metric does not count
    assert not early_stopping.should_stop
    assert not early_stopping.update({metric: values[2]})
    assert early_stopping.should_stop
    assert early_stopping.update({metric: values[3]})
    assert not early_stopping.should_stop


def test_a_row_without_an_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Bonjour"}]}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1 of .*rows\.jsonl does not end with an answer"):
        GenerationEval(GenerationArgs(file=str(path)), SampleEncoder(instruct_tokenizer("v3")))


def test_answer_scores() -> None:
    other = build_answer([Diagnosis("DP", "E119", "Diabète"), Diagnosis("DAS", "I10", "HTA")])
    # Of 1 + 2 gold codes 2 are found, among 2 predicted: precision 1, recall 2/3.
    scores = answer_scores([ANSWER, other], [ANSWER, ANSWER])
    assert scores["micro_f1"] == pytest.approx(0.8)
    assert scores["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep_best": True}, "compares eval_loss, but `no_eval` is true"),
        ({"early_stopping": EarlyStoppingArgs("micro_f1", 2)}, "is micro_f1 but `eval_generation.file` is empty"),
        ({"eval_generation": GenerationArgs("/nowhere.jsonl")}, "/nowhere.jsonl does not exist"),
        ({"keep_best": True, "no_ckpt": True}, "there is no checkpoint to keep"),
    ],
)
def test_contradictory_settings_are_reported(
    settings: dict[str, Any], sentence: str, model_folder: Path, rows: Path
) -> None:
    args = TrainArgs(DataArgs(instruct_data=str(rows)), str(model_folder), "run", **settings)
    assert any(sentence in problem.message for problem in args.problems())
