"""What a command prints at its end: the commands to run next, with its paths."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path


def next_commands(commands: Mapping[str, Sequence[str | Path]]) -> str:
    """Return commands, one aligned line each, quoted for a shell.

    Args:
        commands: module and arguments by the purpose; arguments in capitals are for the user to replace.
    """
    lines = {name: shell_command(parts) for name, parts in commands.items()}
    return "\n".join([f"Next command{'s' * (len(lines) != 1)}", *aligned(lines)])


def shell_command(parts: Sequence[str | Path]) -> str:
    """Return the command of a module and its arguments, quoted for a shell."""
    return f"python -m {shlex.join(map(str, parts))}"


def aligned(lines: Mapping[str, str]) -> list[str]:
    """Return names and texts as indented columns."""
    width = max(map(len, lines))
    return [f"  {name:<{width}}  {line}" for name, line in lines.items()]


def after_training(run: Path, eval_paths: Sequence[Path]) -> str:
    """Return the commands that use a finished run; `eval_paths` are the files and folders of its evaluation data."""
    commands: dict[str, Sequence[str | Path]] = {
        "chat": ("utils.chat", run),
        "predict": ("utils.predict_icd10", "--run", run, "--notes", "NOTES.csv", "--out", run / "predictions.csv"),
        "report": ("utils.report", run, "--out", run / "report.html"),
        "export": ("utils.export", run, "--to", "hf", "--merged", "--out", run / "merged"),
    }
    if eval_paths:
        gold = eval_paths[0] if len(eval_paths) == 1 and eval_paths[0].is_file() else "EVAL.jsonl"
        scores = ("--json", run / "scores.json", "--html", run / "scores.html")
        commands["evaluate"] = ("utils.evaluate_icd10", "--run", run, "--gold", gold, *scores)
    return next_commands(commands)
