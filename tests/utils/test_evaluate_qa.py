"""Word recall and containment: manual calculation, normalization, and the command."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from model.args import LoraArgs
from tests.support.chat_server import chat_server
from tests.support.checkpoints import make_tiny_checkpoint
from utils import evaluate_qa
from utils.evaluate_qa import contains, evaluate, normalize_text, word_recall
from utils.icd10.calibration import Calibration


def question(answer, name=None):
    messages = [{"role": "user", "content": "Quoi ?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({"id": name} if name else {})


@pytest.fixture
def command(run_command):
    return functools.partial(run_command, evaluate_qa)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower, a\tTOWER!", "eiffel tower tower"),
        ("l'eau, «\u00a0l’Été\u00a0» : $5", "leau lété 5"),
        ("Anthem theatre banana", "anthem theatre banana"),  # articles only as words
        ("e\u0301te\u0301", "été"),  # accents stay, however they are written
        (" ...the?! ", ""),
    ],
)
def test_normalization(text, expected):
    assert normalize_text(text) == expected
    assert normalize_text(normalize_text(text)) == expected


@pytest.mark.parametrize(
    ("reference", "answer", "recall", "contained"),
    [
        ("Chief of Protocol", "She was the Chief of Protocol.", 1, True),
        ("Chief of Protocol", "The protocol of her chief", 1, False),  # all words, in another order
        ("Animorphs book series", "the animorphs", 1 / 3, False),
        ("yes", "no", 0, False),
        ("été", "ete", 0, False),
        ("12", "about 120", 0, True),  # characters, not words
        ("de la fièvre et de la toux", "de la fièvre et de la toux", 1, True),  # a repeated word is one word
        ("42", "", 0, False),
    ],
)
def test_scores_match_manual_calculation(reference, answer, recall, contained):
    assert word_recall(reference, answer) == pytest.approx(recall)
    assert contains(reference, answer) is contained


def test_means_intervals_and_unmatched_rows():
    references = {"a": "Victor Hugo", "b": "1802", "c": "Besançon", "d": "Les Misérables"}
    answers = {"a": "Hugo", "b": "En 1802.", "c": "Paris", "z": "?"}
    result = evaluate(references, answers)
    assert result["word_recall"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert result["contains"] == 1 / 4
    expected = {"rows": 4, "missing_predictions": 1, "unexpected_predictions": 1, "missing_ids": ["d"]}
    assert result["counts"] == expected
    for name, (low, high) in result["intervals"].items():
        assert 0 <= low < result[name] < high <= 1
    assert evaluate(references, references)["intervals"] == {"word_recall": [1, 1], "contains": [1, 1]}


def test_command_matches_rows_by_id_or_number(jsonl, command, tmp_path):
    out = tmp_path / "out" / "qa.json"
    named = jsonl("g.jsonl", [question("Victor Hugo", "x"), question("1802", "y")])
    answers = jsonl("p.jsonl", [{"id": "y", "answer": "en 1802"}, {"id": "x", "answer": "Victor"}])
    code, output = command("--gold", named, "--predictions", answers, "--json", out)
    assert code == 0 and "word recall           0.750 [" in output and "contains reference    0.500 [" in output
    assert json.loads(out.read_text(encoding="utf-8"))["word_recall"] == 0.75
    numbered = jsonl("n.jsonl", [question("Victor Hugo"), question("1802")])
    from_zero = jsonl("z.jsonl", [{"id": 1, "answer": "1802"}, {"id": 0, "answer": "Victor Hugo"}])
    assert "contains reference    1.000" in command("--gold", numbered, "--predictions", from_zero)[1]


@pytest.mark.parametrize(
    ("gold", "predictions", "expected"),
    [
        ([question("?!", "a")], [{"id": "a", "answer": "x"}], "g.jsonl, line 1: no words in the last message"),
        ([{"text": "x", "id": "a"}], [{"id": "a", "answer": "x"}], "g.jsonl, line 1: "),
        ([question("x", "a")], [{"id": "a", "codes": []}], "p.jsonl, line 1: no `answer` string (keys: id, c"),
        ([question("x", "a")], [{"id": "b", "answer": "x"}], "No prediction has the id of a gold row"),
        ([question("x", "a"), question("y", "a")], [{"id": "a", "answer": "x"}], "g.jsonl, line 2: duplicate id 'a'"),
    ],
)
def test_invalid_rows_are_reported(gold, predictions, expected, jsonl, command, tmp_path):
    files = ("--gold", jsonl("g.jsonl", gold), "--predictions", jsonl("p.jsonl", predictions))
    code, message = command(*files, "--json", tmp_path / "out.json")
    assert code == 1 and message.startswith("error: ") and expected in message, message
    assert not (tmp_path / "out.json").exists()


def test_inputs_are_not_overwritten(jsonl, command):
    gold = jsonl("g.jsonl", [question("x", "a")])
    code, message = command(
        "--gold", gold, "--predictions", jsonl("p.jsonl", [{"id": "a", "answer": "x"}]), "--json", gold
    )
    assert code == 1 and "g.jsonl is an output and also another file" in message


def test_a_servers_answers_are_scored(jsonl, command, tmp_path):
    gold = jsonl("g.jsonl", [question("Victor Hugo", "a"), question("1802", "b")])
    out = tmp_path / "p.jsonl"
    with chat_server(lambda _: "Hugo, en 1802") as server:
        options = ("--gold", gold, "--engine", "server", "--server", server.url, "--out", out)
        code, output = command(*options)
        assert code == 0 and "word recall           0.750 [" in output and len(server.requests) == 2
        assert "2 answers (2 from an earlier call)" in command(*options)[1] and len(server.requests) == 2
        assert "different max_tokens; delete it or choose another --out" in command(*options, "--max_tokens", 9)[1]
    assert command("--gold", gold, "--predictions", out)[1] in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "give --predictions, or a model that answers --gold: --run, or --engine server"),
        (["--engine", "server", "--server", "http://127.0.0.1:1/v1"], "--engine server needs --out FILE"),
        (["--predictions", "p.jsonl", "--max_tokens", 9], "--max_tokens is for a model that answers --gold"),
        (["--predictions", "p.jsonl", "--out", "q.jsonl"], "--out is for a model that answers --gold"),
        (["--run", ".", "--predictions", "p.jsonl"], "not allowed with"),
    ],
)
def test_options_without_effect_are_refused(options, expected, command):
    code, message = command("--gold", "g.jsonl", *options)
    assert code == 2 and expected in message


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
def test_run_answers_the_questions(jsonl, command, tmp_path, capsys):
    gold = jsonl("g.jsonl", [question("Victor Hugo", "a"), question("1802", "b")])
    args = TrainArgs(
        data=DataArgs(instruct_data=str(gold), packing="best_fit"),
        model_id_or_path=str(make_tiny_checkpoint(tmp_path / "model", dim=16, hidden_dim=24)),
        run_dir=str(tmp_path / "run"),
        lora=LoraArgs(rank=2),
        seq_len=64,
        max_steps=1,
    )
    train.run_training(args, World(0, 1, torch.device("cpu")))
    capsys.readouterr()  # log lines of training, if other tests have configured logging
    calibration = tmp_path / "run/calibration/checkpoint_000001.json"  # of codes, with a table
    calibration.parent.mkdir()
    calibration.write_text(Calibration("platt", {}, [], {"cim10": "x"}).to_json(), encoding="utf-8")
    code, output = command("--gold", gold, "--run", tmp_path / "run")
    assert "calibrat" not in output and "--cim10" not in output
    (answers,) = (tmp_path / "run" / "predictions").glob("*.jsonl")
    assert code == 0 and "without a prediction" not in output
    assert command("--gold", gold, "--predictions", answers)[1] in output and "Answering 2 of 2 rows" in output


def test_scores_need_no_torch():
    code = "import sys, utils.evaluate_qa; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
