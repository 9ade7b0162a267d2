"""What the README and the examples promise."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from finetune.args import read_train_args

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "example").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def help_text(module: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    output = io.StringIO()
    with redirect_stdout(output), pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    assert not exit.value.code
    return output.getvalue()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m (utils\.\w+[^`\n]*)`", README))))
def test_readme_commands_exist_with_their_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, arguments = command.partition(" ")
    text = help_text(module, monkeypatch)
    for flag in re.findall(r"--\w+", arguments):
        assert flag in text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    problems: list[str] = []
    read_train_args(path, lambda args: problems.extend(args.problems()) or [])
    # What an example cannot know is where its user's model and data lie.
    to_fill = r"does not exist|are both empty|`run_dir` is empty"
    assert [problem for problem in problems if not re.search(to_fill, problem)] == []


def test_requirements_are_those_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == declared


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the commands of `make demo` in a folder of its own."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    commands = [line.strip() for line in recipe.splitlines() if "$(BIN)" in line]
    assert any("torchrun" in command for command in commands)
    folder = tmp_path_factory.mktemp("demo")
    (folder / "example").symlink_to(ROOT / "example")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in commands:
        command = command.replace("$(BIN)", str(Path(sys.executable).parent))
        result = subprocess.run(
            command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    return folder


def test_demo_learns(demo: Path) -> None:
    lines = (demo / "demo/run/metrics.train.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] / 2


def test_demo_leaves_a_complete_run_folder(demo: Path) -> None:
    run = demo / "demo/run"
    names = {path.name for path in run.iterdir()}
    assert names == {"args.yaml", "checkpoints", "loss.png", "metrics.eval.jsonl", "metrics.train.jsonl", "tb"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["checkpoint_000020", "checkpoint_000040", "checkpoint_000060"]
    for name in saved:
        files = {path.name for path in (run / "checkpoints" / name / "consolidated").iterdir()}
        assert files == {"lora.safetensors", "params.json", "tokenizer.model.v3"}


def test_demo_closes_with_a_summary(demo: Path) -> None:
    output = (demo / "output.txt").read_text(encoding="utf-8")
    assert "Training finished" in output
    assert "checkpoint_000060" in output
