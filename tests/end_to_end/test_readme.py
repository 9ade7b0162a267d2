"""What README.md and docs/ promise, except their commands (test_readme_commands.py), and the demo."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.test_readme_commands import ELSEWHERE, with_places
from tests.support.documents import PAGES, ROOT, TEXT, command_starting_with
from tests.support.in_turn import run_in_turn
from tests.support.run_module import run_module

README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS_README = (ROOT / "tests/README.md").read_text(encoding="utf-8")
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "tests/README.md", "example/README.md"))]
# GiB that the columns "16 GB", "24 GB", ... of the tables of models mean.
GPU_GIB = {"16 GB": 15, "24 GB": 23.5, "40 GB": 39, "80 GB": 79}
MODELS = {"Mistral 7B": "mistral-7b", "Nemo 12B": "nemo-12b", "Small 24B": "small-24b", "Mixtral 8x7B": "mixtral-8x7b"}


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("mention", sorted(set(re.findall(r"`(utils\.\w+[^`\n]*)`", TEXT))))
def test_mentioned_modules_exist_with_the_mentioned_flags(mention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, arguments = mention.partition(" ")
    help_text = run_module(module, ["--help"], monkeypatch)
    assert all(flag in help_text for flag in re.findall(r"--\w+", arguments))


@pytest.mark.parametrize("name", sorted({*re.findall(r"`(test_\w+\.py::\w+)`", TESTS_README), *ELSEWHERE.values()}))
def test_named_tests_exist(name: str) -> None:
    file, _, function = name.partition("::")
    if function:
        path = next((ROOT / "tests").rglob(file))
        assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def rows(text: str, columns: int) -> list[list[str]]:
    """Return the cells of the table rows with this many columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns]


def test_migration_guide_and_tests_have_the_same_rows() -> None:
    guide = (ROOT / "docs/migration.md").read_text(encoding="utf-8").partition("## Names")[0]
    promised = [name for name, _ in rows(guide, 2)[2:]]
    tested = [name for name, _ in rows(TESTS_README[TESTS_README.index("## What the migration") :], 2)[2:]]
    assert promised == tested


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_a_target(page: Path) -> None:
    for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)\s\"]+)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_in_the_table_of_pages() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))
    assert linked >= {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pytest.fixture(scope="module")
def longest_sequences() -> dict[tuple[str, str], dict[str, dict]]:
    """Return what utils.plan prints for each model, column and `base_dtype`: the row with `checkpoint: true`."""
    monkeypatch = pytest.MonkeyPatch()
    plans = {}
    named = re.findall(r"^\| `([\w.-]+)` \| .+? billion", TEXT, re.MULTILINE)
    for model in dict.fromkeys([*MODELS.values(), *named]):
        for column, gib in GPU_GIB.items():
            options = ["example/7B.yaml", "--model", model, "--gpu_gb", str(gib), "--json"]
            plan = json.loads(run_module("utils.plan", options, monkeypatch))
            found = {row["base_dtype"]: row for row in plan["memory"] if row["checkpoint"] is True}
            plans[model, column] = found | {"frozen": plan["parameters"] - plan["trained"]}
    monkeypatch.undo()
    return plans


def assert_longest(text: str, row: dict) -> None:
    """Compare a number of tokens in a table, or a dash, with the plan's."""
    number = 0 if text == "–" else int(text.replace(",", ""))
    assert number == pytest.approx(row["largest_seq_len"], rel=0.05, abs=1000)


def test_memory_table_follows_the_plan(longest_sequences: dict) -> None:
    page = (ROOT / "docs/hardware.md").read_text(encoding="utf-8")
    header, _, *table = rows(page, 3 + len(GPU_GIB))
    assert len(table) >= 8 and header[3:] == list(GPU_GIB)
    for model, billions, base_dtype, *cells in table:
        for column, cell in zip(GPU_GIB, cells):
            plan = longest_sequences[model.strip("`"), column]
            assert float(billions.split()[0]) == pytest.approx(plan["frozen"] / 1e9, abs=0.05)
            assert_longest(cell, plan[base_dtype.strip("`")])


def test_readme_names_what_fits_as_the_plan_does(longest_sequences: dict) -> None:
    header, _, *table = rows(README, 1 + len(MODELS))
    assert header[1:] == list(MODELS) and [row[0] for row in table] == list(GPU_GIB)
    for column, *cells in table:
        for name, cell in zip(MODELS.values(), cells):
            plan = longest_sequences[name, column]
            for base_dtype, tokens in re.findall(r"`(\w+)` ([\d,]+\d)", cell) or [("nf4", "–")]:
                assert_longest(tokens, plan[base_dtype])


def test_first_screen_names_what_fits_24_gb(longest_sequences: dict) -> None:
    command = shlex.split(command_starting_with("python -m utils.plan example"))
    assert command[command.index("--gpu") + 1] == "rtx4090"  # 23.5 GiB, as the table's column
    (tokens,) = re.findall(r"sequences of ([\d,]+) tokens in 24 GB", README)
    assert_longest(tokens, longest_sequences["mistral-7b", "24 GB"]["nf4"])


def strings_of_the_code() -> Iterator[str]:
    """Yield every string of the sources, with … for what is filled in."""
    sources = (path for name in ("finetune", "model", "utils") for path in (ROOT / name).rglob("*.py"))
    for path in [ROOT / "train.py", *sources]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    table = page[page.index("## Error messages") :].partition("\n## ")[0]
    messages = [quote for _, quote in re.findall(r"^\| (``?) ?(.+?) ?\1 \|", table, re.MULTILINE)]
    strings = list(strings_of_the_code())
    assert len(messages) >= 12
    assert [message for message in messages if not any(message.strip(" …") in string for string in strings)] == []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the commands of `make demo` in a new folder and one process, with too few notes and steps to learn much.

    Only connections within the machine are allowed; `sockets.txt` records other attempts.
    """
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "example", folder / "example")
    config = folder / "example/demo.yaml"
    text = re.sub(r"max_steps: \d+", "max_steps: 4", config.read_text(encoding="utf-8"))
    config.write_text(re.sub(r"(eval|ckpt)_freq: \d+", r"\1_freq: 2", text), encoding="utf-8")
    fewer = ["DEMO_NOTES=120", "DEMO_HELD_OUT=4", "DEMO_BASE_STEPS=8"]
    make = ["make", "-n", "-f", ROOT / "Makefile", "-o", "setup", "demo", "BIN=bin", *fewer]
    printed = subprocess.run(make, cwd=folder, capture_output=True, text=True, check=True).stdout
    commands = {line: with_places(line, {}) for line in printed.splitlines() if line.startswith("bin/")}
    assert len(commands) == 13
    outcomes = run_in_turn(commands, folder, loopback=True, forking=False).values()
    output = "".join(text for _, text in outcomes)
    assert all(code == 0 for code, _ in outcomes), output[-4000:]
    (folder / "output.txt").write_text(output, encoding="utf-8")
    return folder


def test_demo_connects_to_no_other_host(demo: Path) -> None:
    assert not (demo / "sockets.txt").exists(), (demo / "sockets.txt").read_text(encoding="utf-8")


def test_demo_writes_a_complete_run_folder(demo: Path) -> None:
    run = demo / "demo/run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"args.yaml", "checkpoints", "loss.png", "metrics.eval.jsonl", "metrics.train.jsonl", "tb"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("checkpoint_000002", "checkpoint_000004"):
        files = {path.name for path in (run / "checkpoints" / name / "consolidated").iterdir()}
        assert files == {"lora.safetensors", "params.json", "tokenizer.model.v3"}


def test_demo_scores_base_and_tuned_model(demo: Path) -> None:
    for name, notes in (("base", "held_out"), ("tuned", "held_out"), ("unseen", "unseen")):
        scores = json.loads((demo / f"demo/{name}.json").read_text(encoding="utf-8"))
        assert scores["counts"]["notes"] == 4 and scores["counts"]["missing_predictions"] == 0
        assert (demo / f"demo/{name}.html").is_file() and (demo / f"demo/{notes}/text.csv").is_file()
    output = (demo / "output.txt").read_text(encoding="utf-8")
    assert "Training finished" in output
    table = output[output.index("fine-tuned - base model") :]
    assert re.search(r"^role-blind micro F1 +[+-]0\.\d{3}", table, re.MULTILINE)
    assert len(re.findall(r"^DP accuracy +0\.\d{3} \[", output, re.MULTILINE)) == 3


def test_sample_data_has_three_splits(tmp_path: Path) -> None:
    command = ["make", "-f", ROOT / "Makefile", "-o", "setup", "sample-data", f"BIN={Path(sys.executable).parent}"]
    for notes in ("20", "30"):  # the second call replaces the first one's files
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*command, f"SAMPLE_NOTES={notes}"], cwd=tmp_path, env=environment, check=True)
    sizes = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (tmp_path / "sample_data").iterdir()}
    splits = {name: sizes[f"{name}_instruct.jsonl"] for name in ("train", "eval", "test")}
    assert splits == {"train": 24, "eval": 3, "test": 3}
    assert sizes.keys() >= {"text.csv", "codes.csv", "cim10.tsv", "notes_instruct.jsonl"}


def test_demo_scores_held_out_notes(demo: Path) -> None:
    train, held_out = (
        {json.loads(line)["messages"][1]["content"] for line in (demo / "demo" / file).open(encoding="utf-8")}
        for file in ("data/notes_instruct.jsonl", "held_out/notes_instruct.jsonl")
    )
    assert not train & held_out
