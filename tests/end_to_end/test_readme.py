"""What the README and the examples promise, but for the commands (see test_readme_commands)."""

import ast
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from finetune.args import read_train_args
from tests.end_to_end.test_readme_commands import ELSEWHERE, one_that_begins
from tests.support.no_network import without_network

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "example").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def output_of(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command prints that succeeds, run here."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.chdir(ROOT)
    output, code = io.StringIO(), None
    with redirect_stdout(output):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    assert not code
    return output.getvalue()


@pytest.mark.parametrize("mention", sorted(set(re.findall(r"`(utils\.\w+[^`\n]*)`", README))))
def test_modules_exist_with_the_flags_that_are_mentioned(mention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, arguments = mention.partition(" ")
    text = output_of(module, ["--help"], monkeypatch)
    for flag in re.findall(r"--\w+", arguments):
        assert flag in text


@pytest.mark.parametrize("name", sorted({*re.findall(r"`(test_\w+\.py::\w+)`", README), *ELSEWHERE.values()}))
def test_tests_that_are_named_exist(name: str) -> None:
    file, _, function = name.partition("::")
    if function:
        path = next((ROOT / "tests").rglob(file))
        assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_models_fit_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+?) billion \| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
    assert len(rows) >= 8
    options = shlex.split(one_that_begins("python -m utils.plan"))[3:]
    for column, gb in enumerate(("15", "23.5", "39", "79")):
        for model in dict.fromkeys(row[0] for row in rows):
            arguments = [model if option == "mistral-7b" else option for option in options] + ["--gpu_gb", gb]
            plan = json.loads(output_of("utils.plan", [*arguments, "--json"], monkeypatch))
            longest = {row["base_dtype"]: row["largest_seq_len"] for row in plan["memory"] if row["checkpoint"] is True}
            for _, billions, base_dtype, cells in (row for row in rows if row[0] == model):
                assert float(billions) == pytest.approx((plan["parameters"] - plan["trained"]) / 1e9, abs=0.05)
                said = cells.split(" | ")[column].replace(",", "").replace("–", "0")
                assert int(said) == pytest.approx(longest[base_dtype], rel=0.05, abs=1000), (model, base_dtype, gb)


def texts_of_the_code() -> Iterator[str]:
    """Every string that stands in the sources, with … in place of what is filled in."""
    for path in [
        ROOT / "train.py",
        *(p for name in ("finetune", "model", "utils") for p in (ROOT / name).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_code() -> None:
    table = README[README.index("## Troubleshooting") :].partition("\n## ")[0]
    messages = [quote for _, quote in re.findall(r"^\| (``?) ?(.+?) ?\1 \|", table, re.MULTILINE)]
    texts = list(texts_of_the_code())
    assert len(messages) >= 12
    assert [message for message in messages if not any(message.strip(" …") in text for text in texts)] == []


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
    """Runs `make demo` in a folder of its own, with few notes and steps: it cannot code well after them.

    Only connections within the machine are allowed; what else was tried stands in `sockets.txt`.
    """
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "example", folder / "example")
    config = folder / "example/demo.yaml"
    text = re.sub(r"max_steps: \d+", "max_steps: 4", config.read_text(encoding="utf-8"))
    config.write_text(re.sub(r"(eval|ckpt)_freq: \d+", r"\1_freq: 2", text), encoding="utf-8")
    fewer = ["DEMO_NOTES=120", "DEMO_HELD_OUT=4", "DEMO_BASE_STEPS=8"]
    environment, _ = without_network(folder, ROOT, loopback=True)
    result = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "-o", "setup", "demo", f"BIN={Path(sys.executable).parent}", *fewer],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (folder / "output.txt").write_text(result.stdout + result.stderr, encoding="utf-8")
    return folder


def test_demo_asks_nobody_outside_this_machine(demo: Path) -> None:
    assert not (demo / "sockets.txt").exists(), (demo / "sockets.txt").read_text(encoding="utf-8")


def test_demo_leaves_a_complete_run_folder(demo: Path) -> None:
    run = demo / "demo/run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"args.yaml", "checkpoints", "loss.png", "metrics.eval.jsonl", "metrics.train.jsonl", "tb"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("checkpoint_000002", "checkpoint_000004"):
        files = {path.name for path in (run / "checkpoints" / name / "consolidated").iterdir()}
        assert files == {"lora.safetensors", "params.json", "tokenizer.model.v3"}


def test_demo_scores_base_and_tuned_model_on_seen_and_unseen_wordings(demo: Path) -> None:
    for name, notes in (("base", "held_out"), ("tuned", "held_out"), ("unseen", "unseen")):
        scores = json.loads((demo / f"demo/{name}.json").read_text(encoding="utf-8"))
        assert scores["counts"]["notes"] == 4 and scores["counts"]["missing_predictions"] == 0
        assert (demo / f"demo/{name}.html").is_file() and (demo / f"demo/{notes}/text.csv").is_file()
    output = (demo / "output.txt").read_text(encoding="utf-8")
    assert "Training finished" in output
    table = output[output.index("micro-F1") :]
    assert re.search(r"^base model +0\.\d{3}", table, re.MULTILINE)
    assert re.search(r"^fine-tuned, unseen wordings +0\.\d{3}", table, re.MULTILINE)


def test_sample_data_are_notes_and_codes_in_three_splits(tmp_path: Path) -> None:
    command = ["make", "-f", ROOT / "Makefile", "-o", "setup", "sample-data", f"BIN={Path(sys.executable).parent}"]
    for notes in ("20", "30"):  # a second call replaces what the first wrote
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*command, f"SAMPLE_NOTES={notes}"], cwd=tmp_path, env=environment, check=True)
    sizes = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (tmp_path / "sample_data").iterdir()}
    splits = {name: sizes[f"{name}_instruct.jsonl"] for name in ("train", "eval", "test")}
    assert splits == {"train": 24, "eval": 3, "test": 3}
    assert sizes.keys() >= {"text.csv", "codes.csv", "cim10.tsv", "notes_instruct.jsonl"}


def test_demo_notes_are_held_out(demo: Path) -> None:
    train, held_out = (
        {json.loads(line)["messages"][1]["content"] for line in (demo / "demo" / file).open(encoding="utf-8")}
        for file in ("data/notes_instruct.jsonl", "held_out/notes_instruct.jsonl")
    )
    assert not train & held_out
