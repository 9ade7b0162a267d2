"""The validator reports every invalid row and describes the data. V1 to V11: see ../shared/DEFECTS.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetune.cli import run_cli
from finetune.data.args import DataArgs
from finetune.data.dataset import JsonlFile
from finetune.data.shorten import FittingEncoder
from finetune.data.tokenize import SampleEncoder, SampleType
from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.data.word_cache import cache_words
from finetune.monitoring.plot import new_figure
from finetune.speed_estimate import visible_gpu
from model.errors import UserError
from tests.support.forked import run_forked
from tests.support.golden import GOLDEN, fixture
from tests.support.patience import PATIENCE_S
from tests.support.tiny_tekken import write_tiny_tekken
from utils import plan, validate_data
from utils.validation import check_rows, length_plot, validator

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2}
TOKENIZER = load_instruct_tokenizer(Path("no such folder"), 32768)


cache_words(TOKENIZER)


def load_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def row(*contents: str, **keys) -> str:
    """Return a conversation that alternates between user and assistant."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return json.dumps({"messages": messages} | keys, ensure_ascii=False)


GOOD = row("Quel est le code de l'asthme ?", "J459.")
OTHER = row("Et de l'hypertension ?", "Le code est I10.")
PING = {"type": "function", "function": {"name": "ping", "description": "", "parameters": {}}}


def calls(name: str = "ping", answers: str = "aB3dE6gH9", call_id: str = "aB3dE6gH9", tools: tuple = (PING,)) -> str:
    """A conversation with one tool call and its answer."""
    call = {"id": call_id, "function": {"name": name, "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Question ?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": answers, "content": "pong"},
        {"role": "assistant", "content": "Réponse."},
    ]
    return json.dumps({"messages": messages, "tools": list(tools)})


def write(path: Path, *lines: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


class Command:
    """`python -m utils.validate_data` in this process, in a temporary folder."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *flags: str, train: str = "", **keys) -> int:
        """Run it with a YAML of these keys; return the exit code."""
        keys = {"model_id_or_path": "open-mistral-7b", "run_dir": "run", "data": {"instruct_data": train}} | keys
        write(self.folder / "train.yaml", yaml.safe_dump(keys))
        self._monkeypatch.setattr(sys, "argv", ["validate_data", "--train_yaml", "train.yaml", *flags])
        code = 0
        try:
            run_cli(validate_data.main)
        except SystemExit as stop:
            code = stop.code
        self.out, self.err = self._capsys.readouterr()
        return code

    def bad_lines(self) -> list[tuple[str, int]]:
        return [(path, int(line)) for line, path in re.findall(r"line (\d+) of dataset (\S+) is incorr", self.out)]

    def expected(self) -> dict:
        text = self.out.partition("Train States\n --------------------\n")[2]
        return json.JSONDecoder().raw_decode(text)[0]["expected"]

    def figure(self, label: str) -> str:
        """Return the rest of the report's line that starts with this label."""
        return next(line[len(label) :].strip() for line in self.out.splitlines() if line.startswith(label))


def load_tokenizer(folder: Path, vocab_size: int):
    """Load the default tokenizer only once."""
    return load_instruct_tokenizer(folder, vocab_size) if folder.is_dir() else TOKENIZER


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validator, "visible_gpus", list)
    monkeypatch.setattr(validator, "load_instruct_tokenizer", load_tokenizer)
    return Command(tmp_path, monkeypatch, capsys)


# --- invalid rows ---

BAD_ROWS = {
    "not JSON": ("{", "Data load errors", "Expecting property name"),
    "blank line": ("", "Data load errors", ""),
    "no object": ("[1]", "Data load errors", "found a list"),
    "key twice": ('{"messages": [], "messages": []}', "Data load errors", "'messages' is repeated"),
    "Latin-1": (GOOD.replace("J459", "é").encode("latin-1"), "Data load errors", "not valid UTF-8"),
    "unpaired surrogate": (row("a", "b").replace('"b"', '"\\ud800"'), "Data load errors", "surrogate"),
    "too deep": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "Data load errors", "nested too deeply"),
    "no messages": ('{"dialogue": []}', "Conversation format errors", "dialogue"),
    "last role user": (row("a", "b", "c"), "Conversation format errors", "Expected last role"),  # V11
    "unknown role": (GOOD.replace("assistant", "gpt"), "Message format errors", "role 'gpt'"),  # V2
    "no role": (GOOD.replace("role", "from"), "Message format errors", "'role'"),
    "content is null": (GOOD.replace('"J459."', "null"), "Message format errors", "content"),
    "content is a number": (GOOD.replace('"J459."', "459"), "Message format errors", "found a number"),
    "weight 2": (GOOD.replace('"J459."', '"J459.", "weight": 2'), "Conversation format errors", "weight"),
    "weight a string": (GOOD.replace('"J459."', '"J459.", "weight": "x"'), "Message format errors", "weight"),
    "answer to no call": (calls(answers="zzzzzzzzz"), "Conversation format errors", "zzzzzzzzz"),  # V9
    "bad call id": (calls("ping", "a-b", "a-b"), "Conversation format errors", "a-b"),
    "id with a line end": (calls("ping", "aB3dE6gH9\n", "aB3dE6gH9\n"), "Conversation format errors", "id"),  # V9
    "bad function name": (calls("p ng"), "Conversation format errors", "Function name was a string of 4 characters"),
    "retrieval": (calls(tools=(PING | {"type": "retrieval"},)), "Conversation format errors", "retrieval"),  # V9
    "no call before": (
        GOOD.replace('"user", ', '"tool", "tool_call_id": "aB3dE6gH9", '),
        "Conversation format errors",
        "",
    ),  # V9
}


@pytest.mark.parametrize(("bad", "kind", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_reported_with_its_line(command, bad, kind, reason):
    write(command.folder / "a.jsonl", GOOD, bad, OTHER)
    assert command(train="a.jsonl") == 1
    assert command.bad_lines() == [("a.jsonl", 2)]
    assert f"{kind}: 1\n(" in command.out
    line = next(line for line in command.out.splitlines() if line.startswith("The data in line 2"))
    assert reason in line
    assert "No errors!" not in command.out
    assert not command.err


@pytest.mark.parametrize(
    "bad", ['{"body": "x"}', '{"text": null}', '{"text": 3}', GOOD, '"x"', "", '{"text": "\\ud83d"}']
)
def test_bad_pretrain_row_is_reported_with_its_line(command, bad):  # V3
    write(command.folder / "p.jsonl", '{"text": "Un texte."}', bad, '{"content": "Un autre."}')
    assert command(data={"data": "p.jsonl"}) == 1
    assert command.bad_lines() == [("p.jsonl", 2)]


# Accepted by mistral-finetune or by mistral-common, or read by us: text chunks in any role, OpenAI's tools.
ACCEPTED = {
    "assistant_content_list",
    "system_content_list",
    "tool_function_missing",
    "tool_parameters_missing",
    "tool_parameters_null",
    "system_content_empty",
    "only_last_null",
    "tool_call_parallel_then_answer",
    "file_crlf",
    "file_no_final_newline",
    "user_after_tool",
}
BAD_LINES_OF_FILES = {
    "file_empty": [],
    "file_all_masked": [],
    "file_only_newlines": [1, 2, 3],
    "file_trailing_blank_line": [3],
    "file_invalid_utf8": [2],
}


def test_every_golden_bad_file_is_reported(command):
    kinds = load_json(GOLDEN / "inputs/bad/KINDS.json") if GOLDEN else {}
    results = load_json(GOLDEN / "expected/validate/bad_files.json")["files"] if GOLDEN else {}
    same_reasons = 0
    for name, kind in kinds.items():
        (command.folder / "a.jsonl").write_bytes((GOLDEN / f"inputs/bad/{name}.jsonl").read_bytes())
        (command.folder / "a.jsonl.corrected").unlink(missing_ok=True)
        key = "data" if kind["kind"] == "pretrain" else "instruct_data"
        assert command("--create_corrected", data={key: "a.jsonl"}) == (name not in ACCEPTED), name
        assert not command.err, name
        lines = [line for _, line in command.bad_lines()]
        if name in ("file_json_array", "file_pretty_printed"):
            assert lines == list(range(1, 21)), name  # all rows are bad, the first ones are shown
        else:
            default = [] if name in ACCEPTED else [kind.get("bad_line")]
            assert lines == BAD_LINES_OF_FILES.get(name, default), name
        original = results[name]
        if lines and original["create_corrected"].get("kept_lines_1based") == [1, 3]:
            corrected = (command.folder / "a.jsonl.corrected").read_bytes()
            assert len(corrected) == original["create_corrected"]["corrected_bytes"], name
        reason = re.search(r"is incorrectly formatted\.(.*?) *\n", original["validate"]["stdout"])
        same_reasons += reason is not None and reason[1] in command.out
    assert same_reasons >= 9 or not kinds  # of the JSON parser, and of mistral-common where they quote nothing


def test_errors_of_all_files_are_reported(command):  # V1, V8
    write(command.folder / "bad1.jsonl", "{", GOOD)
    write(command.folder / "bad2.jsonl", GOOD, "[]", OTHER)
    write(command.folder / "good.jsonl", GOOD, OTHER)
    assert command(train="bad1.jsonl,good.jsonl") == 1
    assert command.bad_lines() == [("bad1.jsonl", 1)]
    assert command(train="good.jsonl,bad1.jsonl") == 1
    assert command.bad_lines() == [("bad1.jsonl", 1)]
    assert command(train="bad1.jsonl,bad2.jsonl") == 1
    assert command.bad_lines() == [("bad1.jsonl", 1), ("bad2.jsonl", 2)]
    assert command(data={"instruct_data": "bad1.jsonl", "eval_instruct_data": "good.jsonl"}) == 1
    assert command.bad_lines() == [("bad1.jsonl", 1)]
    assert command(data={"instruct_data": "good.jsonl", "eval_instruct_data": "bad2.jsonl"}) == 1
    assert command.bad_lines() == [("bad2.jsonl", 2)]
    assert "Train States" not in command.out


def test_a_file_used_for_training_and_evaluation_is_reported_once(command):
    write(command.folder / "bad.jsonl", GOOD, "{")
    assert command("--create_corrected", data={"instruct_data": "bad.jsonl", "eval_instruct_data": "bad.jsonl"}) == 1
    assert command.bad_lines() == [("bad.jsonl", 2)]
    assert "bad.jsonl is used for both training and evaluation." in command.out
    assert command.out.count("Saved bad.jsonl.corrected.") == 1
    write(command.folder / "bad.jsonl")
    assert command(data={"instruct_data": "bad.jsonl", "eval_instruct_data": "bad.jsonl"}) == 1
    assert command.out.count("bad.jsonl contains no rows") == 1


def test_many_errors_are_abbreviated_on_screen_only(command):
    write(command.folder / "bad.jsonl", *["[]"] * 300, row("a", "b", "c"))
    assert command("--error_report_txt", "all.txt", train="bad.jsonl") == 1
    assert [line for _, line in command.bad_lines()] == [*range(1, 21), 301]
    assert "... and 280 more" in command.out
    report = (command.folder / "all.txt").read_text(encoding="utf-8")
    assert [int(line) for line in re.findall(r"line (\d+) of", report)] == list(range(1, 302))


# --- files and folders ---


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "contains no rows"),
        (GOOD.replace('"J459."', '"J459.", "weight": 0').encode(), "No row of the dataset a.jsonl has a trained token"),
    ],
)
def test_a_file_without_trained_tokens_is_an_error(command, content, sentence):
    (command.folder / "a.jsonl").write_bytes(content)
    write(command.folder / "good.jsonl", GOOD)
    assert command(train="good.jsonl,a.jsonl") == 1
    assert sentence in command.out


def test_a_folder_is_searched(command):  # V5
    write(command.folder / "folder/b.jsonl", GOOD, "{")
    write(command.folder / "folder/sub/a.jsonl", "{", GOOD)
    write(command.folder / "folder/readme.txt", "{")
    assert command(train="folder") == 1
    assert command.bad_lines() == [("folder/b.jsonl", 2), ("folder/sub/a.jsonl", 1)]
    (command.folder / "folder/b.jsonl").unlink()
    write(command.folder / "folder/sub/a.jsonl", GOOD, OTHER)
    assert command(train="folder") == 0
    assert list(command.expected()["data_tokens_per_dataset"]) == ["folder"]


def test_byte_order_mark_and_line_ends(command):
    lines = b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + OTHER.encode() + b"\r" + GOOD.encode()
    (command.folder / "a.jsonl").write_bytes(lines)
    assert command(train="a.jsonl") == 0
    assert command.figure("rows  ") == "3"


def test_too_few_rows_for_the_gpus_is_an_error(command):
    write(command.folder / "a.jsonl", GOOD, OTHER)
    assert command("--num_gpus", "3", train="a.jsonl") == 1
    assert "has 2 rows, too few for one on each of 3 GPUs" in command.out
    assert command("--num_gpus", "2", train="a.jsonl") == 0


# --- warnings ---


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (calls(tools=(PING | {"function": PING["function"] | {"name": "other"}},)), "calls the function 'ping'"),
        (GOOD.replace('"J459."', '"J459.", "weight": 0'), "has no trained token"),
        (
            calls().replace(
                '{"role": "assistant", "content"', '{"role": "user", "content": "?"}, {"role": "assistant", "content"'
            ),
            "A user message follows",
        ),
    ],
)
def test_probable_mistakes_are_warnings(command, odd, sentence):  # V9
    write(command.folder / "a.jsonl", GOOD, odd)
    assert command("--save_reports", train="a.jsonl") == 0
    warning = next(
        line for line in command.out.splitlines() if line.startswith("The data in line 2 of dataset a.jsonl")
    )
    assert sentence in warning
    assert warning in (command.folder / "data_errors.txt").read_text(encoding="utf-8")
    assert "No errors!" in command.out


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (row("Fièvre", "   "), "An assistant message is blank"),
        (row("Fièvre", "\n", "Toux", "R05"), "An assistant message is blank"),
        (row("", "R50"), "A user message is empty or blank"),
        (row(" \u00a0\n", "R50"), "A user message is empty or blank"),
        (calls().replace('"{}"', '"ping it"'), "The 'arguments' of a tool call must be"),  # not trained: only context
    ],
)
def test_blank_messages_and_odd_context_are_warnings(command, odd, sentence):
    write(command.folder / "a.jsonl", GOOD, odd)
    assert command(train="a.jsonl") == 0
    assert "Check these: 1\n" in command.out
    assert f"The data in line 2 of dataset a.jsonl: {sentence}" in command.out
    write(command.folder / "a.jsonl", GOOD, calls(), row("a", "b", system_prompt=""))
    assert command(train="a.jsonl") == 0
    assert "Check these" not in command.out


def test_keys_that_are_not_read_are_counted_once_per_file(command):
    other = json.dumps(
        {"messages": [{"role": m["role"], "content": "x", "name": "y"} for m in json.loads(GOOD)["messages"]]}
    )
    write(command.folder / "a.jsonl", *[row("a", "b", number=i, source="x") for i in range(1200)], GOOD, other)
    write(command.folder / "b.jsonl", row("a", "b", **{"Mme DURAND a de la fièvre": 1}))
    write(command.folder / "c.jsonl", GOOD, OTHER)
    write(command.folder / "p.jsonl", '{"text": "Un texte.", "url": "x"}')
    data = {"instruct_data": "a.jsonl,b.jsonl,c.jsonl", "data": "p.jsonl"}
    assert command(data=data) == 0
    lines = [line for line in command.out.splitlines() if "not read" in line]
    assert lines == [
        "p.jsonl: 1 row has keys that are not read: `url`.",
        "a.jsonl: 1,201 rows have keys that are not read: `messages.name`, `number`, `source`.",
        "b.jsonl: 1 row has keys that are not read: `...`.",
    ]
    assert "Warnings" not in command.out and "No errors!" in command.out


def test_keys_of_our_preparation_are_not_reported(command):
    facts = {"id": "s1", "patient": "p1", "year": "2024", "documents": 2, "sex": 2, "age": 71}
    write(command.folder / "a.jsonl", row("a", "b", **facts), row("a", "b", **facts, unit="x"))
    assert command(train="a.jsonl") == 0
    assert [line for line in command.out.splitlines() if "not read" in line] == [
        "a.jsonl: 1 row has keys that are not read: `unit`."
    ]


def test_refused_keys_are_errors_with_their_line(command):
    misspelled = GOOD.replace('"J459."', '"J459.", "wieght": 0')
    write(command.folder / "a.jsonl", GOOD, *[misspelled] * 300, row("a", "b", images=["a.png"]))
    assert command(train="a.jsonl") == 1
    assert command.bad_lines() == [("a.jsonl", line) for line in (*range(2, 22), 302)]
    assert "has the key `wieght`: it is not read; did you mean `weight`?" in command.out
    assert "The row has the key `images`" in command.out
    assert len(command.out) < 8000


def test_parallel_calls_and_empty_system_messages_are_accepted(command):
    conversation = json.loads(calls())
    _, asked, answered, _ = conversation["messages"]
    asked["tool_calls"].append(asked["tool_calls"][0] | {"id": "aB3dE6gH8"})
    conversation["messages"].insert(3, answered | {"tool_call_id": "aB3dE6gH8"})
    write(
        command.folder / "a.jsonl",
        json.dumps(conversation),
        GOOD.replace("[{", '[{"role": "system", "content": ""}, {'),
    )
    assert command(train="a.jsonl") == 0
    assert "Warnings" not in command.out


# --- corrected files and reports ---


def test_the_corrected_file_contains_the_good_rows_byte_for_byte(command):
    odd = GOOD.replace(" ", "  ").encode()
    content = b"\xef\xbb\xbf{\r\n" + odd + b"\r\n\r\n" + OTHER.encode() + b"\n[]\n" + GOOD.encode()
    (command.folder / "a.jsonl").write_bytes(content)
    write(command.folder / "good.jsonl", GOOD)
    assert command("--create_corrected", train="a.jsonl,good.jsonl") == 1
    corrected = (command.folder / "a.jsonl.corrected").read_bytes()
    assert corrected == odd + b"\r\n" + OTHER.encode() + b"\n" + GOOD.encode()
    assert (command.folder / "a.jsonl.corrected").stat().st_mode & 0o777 == 0o600
    assert (command.folder / "a.jsonl").read_bytes() == content
    assert "good.jsonl has no errors; it needs no corrected version." in command.out
    assert sorted(os.listdir(command.folder)) == ["a.jsonl", "a.jsonl.corrected", "good.jsonl", "train.yaml"]
    (command.folder / "a.jsonl").write_bytes(corrected)
    assert command(train="a.jsonl") == 0


def test_no_corrected_file_without_a_good_row(command):
    write(command.folder / "a.jsonl", "{", "[]")
    assert command("--create_corrected", train="a.jsonl") == 1
    assert not (command.folder / "a.jsonl.corrected").exists()


def test_save_reports(command):  # V4
    write(command.folder / "bad.jsonl", "{", GOOD)
    assert command("--save_reports", train="bad.jsonl") == 1
    assert "line 1 of dataset bad.jsonl" in (command.folder / "data_errors.txt").read_text(encoding="utf-8")
    assert not (command.folder / "train_stats.json").exists()
    (command.folder / "data_errors.txt").unlink()
    write(command.folder / "good.jsonl", GOOD)
    assert command("--save_reports", "--train_stats_json", "s.json", train="good.jsonl") == 0
    stats = json.loads((command.folder / "s.json").read_text(encoding="utf-8"))
    assert stats == {"expected": command.expected()}
    assert sorted(os.listdir(command.folder)) == ["bad.jsonl", "good.jsonl", "s.json", "train.yaml"]


@pytest.mark.parametrize("flag", ["--error_report_txt", "--train_stats_json", "--plot"])
def test_an_unwritable_report_is_an_error_before_validation(command, flag):
    write(command.folder / "a.jsonl", GOOD)
    assert command(flag, "absent/file", train="a.jsonl") == 1
    assert "the folder absent does not exist" in command.err
    assert "Validating" not in command.out


# --- the YAML and the model ---


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"nonsense": 3}, "`nonsense` is not a known setting"),  # V10
        ({"data": {"instruct_data": ""}}, "name at least one training source"),
        ({"data": {"instruct_data": "absent.jsonl"}}, "absent.jsonl does not exist"),
        ({"data": {"instruct_data": "a.jsonl:0"}}, "must be positive"),
        ({"data": {"instruct_data": "E:/notes.jsonl"}}, "E:/notes.jsonl does not exist"),  # a drive, not a weight
        ({"model_id_or_path": ""}, "`model_id_or_path` is empty"),
    ],
)
def test_an_invalid_yaml_gives_one_message(command, keys, message):
    write(command.folder / "a.jsonl", GOOD)
    assert command(train="a.jsonl", **keys) == 1
    assert command.err.startswith("error: ")
    assert message in command.err


def test_a_missing_model_folder_is_a_warning(command):
    write(command.folder / "a.jsonl", GOOD)
    assert command(train="a.jsonl", model_id_or_path="models/mistral-7B-v0.3") == 0
    warning = command.out.splitlines()[-1]
    assert warning.startswith("Warning: `model_id_or_path`: the folder models/mistral-7B-v0.3 does not exist")
    assert "mistral-common's v3 tokenizer" in warning
    assert command.expected()["eta"] == "unknown"
    assert "unknown: the model's shapes are unknown until its folder exists. Give a measured speed" in command.out
    assert command(train="a.jsonl", model_id_or_path="mistral-7b") == 0 and "unknown" not in command.out


def test_unused_evaluation_data_is_a_warning(command):
    write(command.folder / "a.jsonl", GOOD)
    write(command.folder / "b.jsonl", OTHER)
    data = {"instruct_data": "a.jsonl", "eval_instruct_data": "b.jsonl"}
    sentence = "Warning: `data.eval_instruct_data` is not used, because `no_eval` is true"
    assert command(data=data) == 0 and sentence in command.out and "set `no_eval: false`" in command.out
    assert command(data=data, no_eval=False) == 0 and sentence not in command.out


def test_tokens_are_counted_with_the_models_own_tokenizer(command):  # V6
    write(command.folder / "m/params.json", json.dumps(SHAPES | {"norm_eps": 1e-5, "vocab_size": 131072}))
    data = str(fixture("inputs/train_icd.jsonl"))
    assert command(train=data, model_id_or_path="m") == 0
    assert command.expected()["data_tokens"] == 13761  # tekken; with v3 they are 16592
    write_tiny_tekken(command.folder / "m/tekken.json", "v7")
    assert command(train=data, model_id_or_path="m") == 0
    assert command.expected()["data_tokens"] > 30000  # one token per byte
    assert "does not exist" not in command.out


# --- statistics ---


def golden_run(command: Command, data: dict, **keys) -> dict:
    for path in fixture("inputs").glob("*.jsonl"):
        (command.folder / path.name).write_bytes(path.read_bytes())
    assert command("--num_gpus", "8", data=data, **keys) == 0, command.out
    return command.expected()


def test_estimate_of_a_mixture(command):
    data = {"instruct_data": "instruct.jsonl:5.,function_calling.jsonl:1."}
    assert golden_run(command, data, max_steps=10) == {
        "eta": "00:05:03",
        "data_tokens": 28834,
        "train_tokens": 163840,
        "epochs": "5.68",
        "max_steps": 10,
        "data_tokens_per_dataset": {"instruct.jsonl": "18081.0", "function_calling.jsonl": "10753.0"},
        "train_tokens_per_dataset": {"instruct.jsonl": "136533.3", "function_calling.jsonl": "27306.7"},
        "epochs_per_dataset": {"instruct.jsonl": "7.6", "function_calling.jsonl": "2.5"},
    }


@pytest.mark.parametrize(
    ("name", "duration"),
    [
        ("open-mistral-7b", "00:33:38"),
        ("open-mistral-nemo", "00:54:05"),
        ("open-mixtral-8x7b", "01:00:14"),
        ("open-mixtral-8x22b", "02:47:42"),
        ("mistral-large-latest", "04:53:57"),
    ],
)
def test_eta_on_eight_h100_equals_that_of_mistral_finetune(command, name, duration):
    data = {"instruct_data": "train_icd.jsonl"}
    expected = golden_run(command, data, model_id_or_path=name, seq_len=32768, max_steps=300)
    assert (expected["eta"], expected["data_tokens"], expected["epochs"]) == (duration, 16592, "4739.83")


def test_golden_runs(command):
    """mistral-finetune's numbers, computed with a mistral-common that tokenizes like the current one."""
    name = "expected/validate/runs_env_mc1.5.4_pydantic2.14.json"
    cases = load_json(GOLDEN / name)["cases"] if GOLDEN else {}
    for name, case in cases.items():
        if name.startswith("good_") and "bad" not in name:
            expected = golden_run(command, **case["yaml"])
            blocks = re.findall(r"^ ({\n.*?^})", case["stdout"], re.MULTILINE | re.DOTALL)
            assert expected == json.loads(blocks[0])["expected"], name


def test_a_small_model_has_an_estimate_too(command):  # V7
    params = SHAPES | {"norm_eps": 1e-5, "vocab_size": 32768}
    write(command.folder / "m/params.json", json.dumps(params))
    write(command.folder / "a.jsonl", GOOD)
    assert command(train="a.jsonl", model_id_or_path="m") == 0
    assert re.fullmatch(r"\d\d:\d\d:\d\d", command.expected()["eta"]) and "unknown" not in command.out
    assert "1 x A100 80 GB: 40% of the A100 80 GB's 16-bit peak of 312 TFLOP/s." in command.out
    assert command("--wps", "100", train="a.jsonl", model_id_or_path="m", max_steps=10) == 0
    assert command.expected()["eta"] == "00:08:24"  # 20,480 tokens plus five minutes


def test_an_unlisted_gpu_has_an_estimate_too(command, monkeypatch):
    monkeypatch.setattr(validator, "visible_gpus", lambda: [visible_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 << 30)])
    write(command.folder / "a.jsonl", GOOD)
    assert command(train="a.jsonl", model_id_or_path="open-mistral-7b") == 0
    assert command.expected()["eta"] != "unknown"
    assert "MIG 1g.10gb: 40% of the RTX 3090's 16-bit peak of 71 TFLOP/s, the slowest listed GPU" in command.out


def test_train_tokens_count_gpus_and_micro_batches(command):  # V7
    write(command.folder / "a.jsonl", GOOD, OTHER)
    keys = {"seq_len": 64, "batch_size": 3, "num_microbatches": 5, "max_steps": 7}
    assert command("--num_gpus", "2", train="a.jsonl", **keys) == 0
    assert command.expected()["train_tokens"] == 7 * 5 * 3 * 64 * 2
    assert "Tokens per step: 1,920" in command.out


def test_duration_on_the_visible_gpu_is_that_of_the_plan(command, run_command, monkeypatch):
    monkeypatch.setattr(validator, "visible_gpus", lambda: [visible_gpu("Tesla V100-SXM2-32GB", 32 << 30)] * 2)
    write(command.folder / "a.jsonl", *[row("Codez : " + "toux et fièvre, " * 2000, "R05, R509.")] * 2)
    assert command(train="a.jsonl", seq_len=1202, max_steps=100) == 0
    assert "2 x Tesla V100-SXM2-32GB" in command.out
    expected = command.expected()
    assert expected["train_tokens"] == 240400
    options = ("--gpu", "v100", "--gpus", 2, "--trained_share", 0.001, "--json")
    speed = json.loads(run_command(plan, "train.yaml", *options)[1])["expected"]["tokens_per_second"]
    hours, minutes, seconds = map(int, expected["eta"].split(":"))
    assert 3600 * hours + 60 * minutes + seconds - 300 == pytest.approx(240400 / speed, rel=0.01)


def icd_like(folder: Path, notes: int) -> Path:
    """Rows of very different lengths, a long note with a short answer each."""
    lengths = np.random.RandomState(0).lognormal(4.5, 0.7, notes).astype(int)
    return write(
        folder / "notes.jsonl", *(row("Codez : " + "toux et fièvre, " * int(n), "R05, R509.") for n in lengths)
    )


def sample_lengths(path: Path) -> list[int]:
    encoder, file = SampleEncoder(TOKENIZER), JsonlFile(path, SampleType.INSTRUCT, False, 0, 1)
    with path.open("rb") as handle:
        return [len(file.encode(handle, entry, encoder).tokens) for entry in range(len(file))]


def test_lengths_and_shares(command):
    lengths = sample_lengths(icd_like(command.folder, 101))
    seq_len = sorted(lengths)[70] - 1  # this row just fits
    assert command(train="notes.jsonl", seq_len=seq_len) == 0
    p50, p90, p99, longest = (f"{np.quantile(lengths, q, method='inverted_cdf'):,}" for q in (0.5, 0.9, 0.99, 1))
    assert command.figure("tokens per row") == f"p50 {p50}, p90 {p90}, p99 {p99}, max {longest}"
    longer = sum(n > seq_len + 1 for n in lengths)
    assert command.figure(f"rows longer than seq_len ({seq_len:,})").startswith(f"{longer} (")
    assert command.figure("tokens  ") == f"{sum(lengths):,}"
    answer = len(SampleEncoder(TOKENIZER).encode_text("R05, R509.").tokens) - 1  # no BOS
    assert command.figure("trained tokens  ").startswith(f"{101 * answer:,} (")


def test_best_fit_splits_no_sample_where_concat_does(command):
    icd_like(command.folder, 300)
    data = {"instruct_data": "notes.jsonl", "packing": "best_fit"}
    assert command(data=data, seq_len=4096) == 0
    split = re.findall(r"([\d,]+) \(", command.figure("samples split"))
    assert int(split[0]) > 30
    assert split[1] == "0"
    assert command.figure("positions filled").split()[-2:] > ["97.0", "%"]
    assert "best_fit (configured)" in command.out
    assert "`data.packing: concat`" not in command.out
    assert command(train="notes.jsonl", seq_len=4096) == 0
    assert f"Warning: `data.packing: concat` (the default) splits {split[0]} of 300 samples" in command.out


@pytest.mark.parametrize("overlong", ["shorten", "drop"])
def test_overlong_samples_are_counted_as_training_treats_them(command, overlong):
    path = icd_like(command.folder, 60)
    encoder = FittingEncoder(SampleEncoder(TOKENIZER), 600, overlong, [])
    file = JsonlFile(path, SampleType.INSTRUCT, False, 0, 1)
    with path.open("rb") as handle:
        samples = [file.encode(handle, entry, encoder) for entry in range(len(file))]
    dropped = [n for n, sample in enumerate(samples, 1) if not sample.tokens]
    shortened = sum(sample.removed > 0 for sample in samples) - len(dropped)
    data = {"instruct_data": "notes.jsonl", "packing": "best_fit", "overlong": overlong}
    assert command(data=data, seq_len=600) == 0
    assert (
        command.figure("samples shortened, samples dropped").split("  ")[-1].strip() == f"{shortened}, {len(dropped)}"
    )
    assert [int(n) for n in re.findall(r"line (\d+) of dataset notes.jsonl: It is dropped", command.out)] == dropped[
        :20
    ]


@pytest.mark.parametrize(
    ("overlong", "remedy"), [("shorten", "edit the row."), ("drop", "set `data.overlong: shorten`.")]
)
def test_dropped_samples_are_warnings_with_a_remedy(command, overlong, remedy):
    write(command.folder / "a.jsonl", GOOD, row("Codez.", "J459, " * 300))
    data = {"instruct_data": "a.jsonl", "packing": "best_fit", "overlong": overlong}
    assert command(data=data, seq_len=100) == 0
    warning = next(line for line in command.out.splitlines() if line.startswith("The data in line 2"))
    assert "It is dropped" in warning and "Increase `seq_len`" in warning and warning.endswith(remedy)


def test_overlong_error_is_an_error(command):
    write(command.folder / "a.jsonl", GOOD, row("très " * 100, "J459."))
    data = {"instruct_data": "a.jsonl", "packing": "best_fit", "overlong": "error"}
    assert command(data=data, seq_len=50) == 1
    assert command.bad_lines() == [("a.jsonl", 2)]
    assert command(data=data, seq_len=500) == 0


def test_recommended_steps_are_three_epochs(command):
    icd_like(command.folder, 300)
    data = {"instruct_data": "notes.jsonl", "packing": "best_fit"}
    assert command(data=data, seq_len=2048, num_microbatches=2) == 0
    steps = int(command.figure("recommended").split()[0])
    assert command(data=data, seq_len=2048, num_microbatches=2, max_steps=steps) == 0
    assert 3 <= float(command.figure("configured").split()[1]) < 3.1
    assert float(command.expected()["epochs"]) == pytest.approx(3, abs=0.2)


def test_shorter_conversations_of_rows_with_tools_are_counted(command):
    data = {"instruct_data": str(fixture("inputs/function_calling.jsonl"))}
    assert command(data=data) == 0
    rows, chunks = map(int, re.findall(r"\d+", command.figure("rows  ")))
    file = JsonlFile(fixture("inputs/function_calling.jsonl"), SampleType.INSTRUCT, True, 0, 1)
    assert (rows, rows + chunks) == (file.total_rows, len(file))
    lazy = data | {"instruct": {"shuffle": False, "dynamic_chunk_fn_call": False}}
    assert command(data=lazy) == 0
    assert command.figure("rows  ") == str(rows)


@pytest.fixture
def figures(monkeypatch) -> list:
    """Return the figures that are drawn."""
    drawn = []
    monkeypatch.setattr(
        length_plot, "new_figure", lambda *args, **keys: drawn.append(new_figure(*args, **keys)) or drawn[-1]
    )
    return drawn


def test_plot_shows_training_and_evaluation_rows(command, figures):
    icd_like(command.folder, 300)
    write(command.folder / "eval.jsonl", GOOD, OTHER)
    data = {"instruct_data": "notes.jsonl", "eval_instruct_data": "eval.jsonl"}
    assert command("--plot", "lengths.png", data=data, seq_len=1024) == 0
    assert (command.folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    lengths = re.search(r"tokens per row +(p50 .*)", command.out)[1]
    labels = [text.get_text() for text in legend.get_texts()]
    assert f"training: 300 rows, {lengths}" in labels and "seq_len 1,024" in labels
    assert any(label.startswith("evaluation: 2 rows, p50 ") for label in labels)
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_plot_does_not_stretch_to_a_distant_seq_len(command, figures):
    icd_like(command.folder, 300)
    longest = max(sample_lengths(command.folder / "notes.jsonl"))
    assert command("--plot", "lengths.png", train="notes.jsonl", seq_len=32768) == 0
    (axes,) = figures[0].axes
    assert axes.get_xlim()[1] < 1.5 * longest < 32768
    assert [text.get_text() for text in axes.texts] == ["seq_len 32,768 →"]


# --- processes ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_find_the_same_as_one(command, monkeypatch, method):
    icd_like(command.folder, 700)
    write(command.folder / "bad.jsonl", *[GOOD, "{", OTHER, "[]"] * 100)
    flags, train = ("--create_corrected", "--error_report_txt", "e.txt"), "notes.jsonl,bad.jsonl"
    assert command(*flags, "--num_workers", "1", train=train) == 1
    alone = command.out, (command.folder / "e.txt").read_bytes()
    monkeypatch.setattr(check_rows, "_SMALL", 0)
    monkeypatch.setattr(check_rows, "_ROWS_AT_ONCE", 20)
    monkeypatch.setattr(check_rows, "_START_METHOD", method)
    assert command(*flags, "--num_workers", "2", train=train) == 1
    assert (command.out, (command.folder / "e.txt").read_bytes()) == alone
    (command.folder / "bad.jsonl").unlink()
    assert command("--num_workers", "2", train="notes.jsonl") == 0
    together = command.out
    assert command("--num_workers", "1", train="notes.jsonl") == 0
    assert command.out == together


def test_a_killed_process_gives_a_clear_error(monkeypatch):
    file = check_rows.FileToCheck(JsonlFile(fixture("inputs/train_icd.jsonl"), SampleType.INSTRUCT, False, 0, 1))
    checker = check_rows.RowChecker([file], TOKENIZER, DataArgs(), 2048)
    monkeypatch.setattr(check_rows, "_SMALL", 0)
    monkeypatch.setattr(check_rows, "_START_METHOD", "fork")
    monkeypatch.setattr(check_rows.RowChecker, "check", lambda *_: os._exit(9))
    with pytest.raises(UserError, match="num_workers 1"):
        list(checker.check_all(2))


def test_an_interruption_leaves_no_files(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write(command.folder / "a.jsonl", GOOD, "{")
    monkeypatch.setattr(check_rows.RowChecker, "check_all", interrupted)
    assert command("--create_corrected", "--save_reports", train="a.jsonl") == 130
    assert sorted(os.listdir(command.folder)) == ["a.jsonl", "train.yaml"]


# --- command line ---


@pytest.mark.slow
def test_real_command(tmp_path):
    data = write(tmp_path / "a.jsonl", GOOD, "{", OTHER)
    keys = {"data": {"instruct_data": str(data)}, "model_id_or_path": "m", "run_dir": "run"}
    config = write(tmp_path / "train.yaml", yaml.safe_dump(keys))
    bad = run_forked(validate_data, "--train_yaml", str(config), "--create_corrected")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert f"The data in line 2 of dataset {data} is incorrectly formatted. Expecting" in bad.stdout
    os.replace(tmp_path / "a.jsonl.corrected", data)
    good = run_forked(validate_data, str(config))
    assert (good.returncode, good.stderr) == (0, "")
    assert "No errors! Data is correctly formatted!" in good.stdout
    missing = run_forked(validate_data, "--train_yaml", str(tmp_path / "absent.yaml"))
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("flags", [(), ("a.yaml", "--train_yaml", "a.yaml")])
def test_exactly_one_yaml_is_expected(tmp_path, flags):
    failed = run_forked(validate_data, *flags)
    assert failed.returncode == 2
    assert "give one training YAML: CONFIG.yaml or --train_yaml CONFIG.yaml" in failed.stderr


@pytest.mark.parametrize("command", ["validate_data", "reformat_data", "reformat_data_glaive", "import_data"])
def test_help_loads_neither_torch_nor_mistral_common(command):
    code = (
        f"import runpy, sys; sys.argv = ['{command}', '--help']\n"
        f"try: runpy.run_module('utils.{command}', run_name='__main__')\n"
        "finally: assert not {'torch', 'mistral_common', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
