"""Fixtures shared by all tests, and the hypothesis profile that `make fuzz` uses."""

import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from finetune.cli import run_cli

# No limits of time for one input: they would fail on a busy machine.
settings.register_profile("short", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("short"), max_examples=10_000)
settings.load_profile("short")

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, here and in the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # starting more compilers takes longer than compiling
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else, each process compiles programs that try the CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark end-to-end tests as slow, and run them first, so that no worker of pytest-xdist is left with one at the end.

    A module runs in one worker (`--dist loadfile`), so that its fixtures are built once.
    """
    end_to_end = [item for item in items if "end_to_end" in item.path.parts]
    for item in end_to_end:
        item.add_marker(pytest.mark.slow)
    items[:] = end_to_end + [item for item in items if "end_to_end" not in item.path.parts]


def pytest_configure() -> None:
    """Collect no garbage while modules are imported: nearly all of their objects stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Exempt modules and tests from garbage collection, which would search them again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def restored_process() -> Iterator[None]:
    """Restore what a module leaves changed in the process: the root logger, and the number of threads.

    With a training's log still on, later tests would read other libraries' lines. With more threads than cores, as a
    benchmark sets, they wait for each other in loops: later tests would use four times as much CPU time.
    """
    import torch

    root, threads = logging.getLogger(), torch.get_num_threads()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def runs_without_plot() -> Iterator[None]:
    """Let runs in this process and in forked ones draw no loss.png, which takes longer than most of their steps.

    Commands draw it: those of `make demo`, of the documentation and of the tutorials.
    """
    train = sys.modules.get("train")  # a test that trains imports it
    with pytest.MonkeyPatch.context() as patch:
        if train is not None:
            patch.setattr(train, "draw_loss_curve", lambda run_dir: None)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: tiny matrices gain nothing from more, and sums are the same on every machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our engine stop after 8 tokens: an untrained model would reach the limit of 512."""
    from utils.engines import local

    original = local.Request
    monkeypatch.setattr(local, "Request", lambda prompt, _, *rest: original(prompt, 8, *rest))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Iterable[Any]], Path]:
    """Return a function that writes rows to a file of this name in the test's folder."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command in this process; it returns the exit code and the output."""

    def run(module: ModuleType, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__.rpartition(".")[2], *map(str, arguments)])
        code = 0
        try:
            run_cli(module.main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
