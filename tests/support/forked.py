"""Commands in forked processes: what new processes do, without importing torch in each of them."""

import faulthandler
import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from finetune.cli import run_cli
from tests.support.documents import ROOT
from tests.support.patience import PATIENCE_S


@functools.cache
def import_before_forking() -> None:
    """Import and cache once what every run needs, so that the forked processes share it: half of a short run's time."""
    import torch._dynamo  # by the first optimizer
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401

    from finetune.args import known_settings, settings_adapter
    from finetune.monitoring.plot import draw_loss_curve

    known_settings()
    settings_adapter()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.train.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n')
        draw_loss_curve(Path(folder))  # reads the fonts


def fork(command: Callable[[], object], stdout: Path, stderr: Path) -> int:
    """Start a process that calls a function and ends as Python would. Return its process id.

    Args:
        command: what to do; its exceptions and SystemExit end the process.
        stdout, stderr: files that the output is appended to; may be the same.
    """
    import_before_forking()
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (stdout, stderr)]
    pid = os.fork()
    for stream, file in enumerate(files, start=1):
        if pid == 0:
            os.dup2(file, stream)
        os.close(file)
    return pid or end_as_python(command)


def end_as_python(command: Callable[[], object], report: Callable[[int], object] = lambda code: None) -> NoReturn:
    """Call a function in this process, a forked one, and end it as Python would.

    Args:
        command: what to do; its exceptions and SystemExit end the process.
        report: called with the exit code.
    """
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP would wait for the parent's threads, which are not copied
        gc.freeze()  # what the parent has is not searched for garbage again
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=2)  # a hang ends, and says where
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # pytest replaces them
        command()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # `| head` has read enough
        code = 120
    finally:
        report(code)
        os._exit(code)


def finished(command: Callable[[], object]) -> subprocess.CompletedProcess[str]:
    """Call a function in a forked process and wait for its end."""
    with tempfile.TemporaryDirectory() as outside:
        outputs = [Path(outside, name) for name in ("stdout", "stderr")]
        code = os.waitstatus_to_exitcode(os.waitpid(fork(command, *outputs), 0)[1])
        return subprocess.CompletedProcess([], code, *(path.read_text(encoding="utf-8") for path in outputs))


def run_forked(
    module: ModuleType, *arguments: object, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a forked process to its end, as `python -m MODULE ARGUMENT ...` would.

    Args:
        module: the command.
        arguments: its arguments.
        folder: current folder of the process.
        environment: variables to add or replace.
    """

    def command() -> None:
        sys.argv = [module.__name__.rpartition(".")[2], *map(str, arguments)]
        os.chdir(folder)
        os.environ.update(environment or {})
        run_cli(module.main)

    return finished(command)
