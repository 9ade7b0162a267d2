"""The direction of imports: train.py -> finetune -> model; utils -> finetune, model; never back."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {  # no file of the folder imports any of these, at any place
    "model": ("finetune", "utils", "train", "torch.distributed"),
    "finetune": ("utils", "train"),
    "finetune/data": ("torch",),
    "finetune/monitoring": ("torch.distributed", "model.transformer"),
    "utils": ("train",),
    "utils/icd10": ("torch",),
    "utils/fictional_notes": ("torch",),
}
ONLY_IN = {"torch.distributed.fsdp.fully_shard": "wrapped_model.py", "torch.distributed": "distributed.py"}


def source_files(folder: str = "") -> list[Path]:
    names = [folder] if folder else ["model", "finetune", "utils", "train.py"]
    return [file for name in names for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    """Return the absolute names of what a file imports: `a.b` and `a.b.c` for `from a.b import c`."""
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder):
    for file in source_files(folder):
        for name in imported(file):
            assert not f"{name}.".startswith(tuple(f"{module}." for module in FORBIDDEN[folder])), f"{file}: {name}"


@pytest.mark.parametrize("name", ONLY_IN)
def test_one_file_shards_and_one_calls_collectives(name):
    assert {file.name for file in source_files() if name in imported(file)} == {ONLY_IN[name]}


def test_imports_form_no_cycle():
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in source_files()}
    graphlib.TopologicalSorter({name: imported(file) & set(modules) for name, file in modules.items()}).prepare()


def test_functions_have_at_most_60_lines():
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"


def test_time_limits_of_tests_come_from_one_place():
    """See tests/support/patience.py. The settings of trackers, `WandbArgs(timeout=2)`, are not limits of a test."""
    limit = re.compile(r"\b(timeout=|wait\(|join\(|mark\.timeout\(|alarm\()[0-9]|monotonic\(\) - ")
    for file in (ROOT / "tests").rglob("test_*.py"):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert "Args(" in line or not limit.search(line), f"{file}:{number}: {line}"


@pytest.mark.parametrize(
    "package",
    [
        "utils.icd10",
        "utils.fictional_notes",
        "finetune.data",
        "finetune.monitoring",
        "finetune.args",
        "utils.validate_data",
    ],
)
def test_text_tools_do_not_load_torch(package):
    """Text tools start at once, and the processes that read rows stay small."""
    files = source_files(package.replace(".", "/"))
    modules = [f"{package}.{file.stem}" for file in files if file.stem != "__init__"] or [package]
    code = f"import {', '.join(modules)}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_commands_load_torch_and_mistral_common_only_when_they_run():
    """Their --help is quick."""
    names = ", ".join(f"utils.{file.stem}" for file in (ROOT / "utils").glob("*.py"))
    code = f"import {names}, sys; sys.exit('torch' in sys.modules or 'mistral_common' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


HEAVY = ["torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
HEAVY += ["torch.distributed.tensor", "torch.utils.tensorboard", "jinja2", "matplotlib", "sympy", "wandb"]


def test_importing_train_prints_nothing_and_imports_heavy_modules_only_when_they_are_used(tmp_path):
    """They would more than double the time that `import torch` needs. torch itself may load some of them."""
    code = "import sys, torch; before = set(sys.modules); import train; imported = set(sys.modules) - before; "
    code += "open('imported', 'w').write(' '.join(imported))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    imported = (tmp_path / "imported").read_text(encoding="utf-8").split()
    assert "finetune.run" in imported and [name for name in HEAVY if name in imported] == []
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]
