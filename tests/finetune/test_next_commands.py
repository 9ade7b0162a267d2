"""Commands that other commands print: they exist, with their options, and a shell reads the paths as they are."""

import shlex
from pathlib import Path

import pytest

from finetune.next_commands import after_training, next_commands
from tests.support.run_module import run_module


def printed(text):
    """Return the arguments of each printed command, by its name."""
    names_and_commands = [line.split(maxsplit=1) for line in text.splitlines()[1:]]
    return {name: shlex.split(command) for name, command in names_and_commands}


def test_commands_after_training_exist_with_their_options(tmp_path, monkeypatch):
    run, gold = Path("my runs/l'an 1"), tmp_path / "val rows.jsonl"
    gold.touch()
    commands = printed(after_training(run, [gold]))
    assert list(commands) == ["chat", "predict", "report", "export", "evaluate"]
    for python, _, module, *arguments in commands.values():
        documented = run_module(module, ["--help"], monkeypatch)
        assert python == "python" and str(run) in arguments
        assert all(f"{argument} " in documented for argument in arguments if argument.startswith("--"))
    assert commands["evaluate"][commands["evaluate"].index("--gold") + 1] == str(gold)


def test_evaluation_is_printed_if_there_is_eval_data(tmp_path):
    assert "evaluate" not in printed(after_training(tmp_path, []))
    for paths in ([tmp_path], [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]):
        assert "EVAL.jsonl" in printed(after_training(tmp_path, paths))["evaluate"]


@pytest.mark.parametrize(("names", "title"), [("a", "Next command"), ("ab", "Next commands")])
def test_lines_are_aligned(names, title):
    lines = next_commands({name * 3: ("module", "a b") for name in names}).splitlines()
    assert lines == [title, *(f"  {name * 3}  python -m module 'a b'" for name in names)]
