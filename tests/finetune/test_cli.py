"""What a command prints when it fails, to an output in any encoding."""

import argparse
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.cli import run_cli
from model.errors import UserError

ROOT = Path(__file__).parents[2]


def redirect(monkeypatch):
    """Replace stdout and stderr as Windows redirects them."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    return streams


def written(stream):
    stream.flush()
    return stream.buffer.getvalue().decode("cp1252")


def fail():
    raise UserError("Le rôle 患者 est inconnu.")


@pytest.mark.parametrize("lines", [1, 10_000], ids=["less than a buffer", "more"])
def test_a_pipe_that_is_closed_early_ends_the_command_silently(lines):
    code = f"from finetune.cli import run_cli; run_cli(lambda: print('x\\n' * {lines}))"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_reported(capfd):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert stop.value.code == 1 and "BrokenPipeError" in capfd.readouterr().err


def show_help():
    argparse.ArgumentParser("患者", description="Codes → 患者").parse_args(["--help"])


def crash():
    raise RuntimeError("患者")


@pytest.mark.parametrize(
    ("command", "stream", "expected"),
    [
        (lambda: print("fièvre, \u20ac, 患者 \udcff"), "stdout", "fièvre, \u20ac, \\u60a3\\u8005 \\udcff"),
        (fail, "stderr", "error: Le rôle \\u60a3\\u8005 est inconnu."),
        (show_help, "stdout", "Codes \\u2192 \\u60a3\\u8005"),
        (crash, "stderr", "RuntimeError: \\u60a3\\u8005"),
    ],
)
def test_what_a_stream_cannot_encode_is_escaped(command, stream, expected, monkeypatch):
    streams = redirect(monkeypatch)
    try:
        run_cli(command)
    except SystemExit as stop:
        assert stop.code == (0 if command is show_help else 1)
    assert expected in written(streams[stream])
    assert "UnicodeEncodeError" not in written(streams["stderr"])


def test_streams_that_are_no_files_are_left_alone(monkeypatch):
    """As in notebooks, or without a console."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    run_cli(lambda: print("患者"))
    assert sys.stdout.getvalue() == "患者\n"


@pytest.mark.parametrize("file", ["train.py", *sorted(f"utils/{path.name}" for path in (ROOT / "utils").glob("*.py"))])
def test_every_command_starts_through_run_cli(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not text or text.rstrip().splitlines()[-1].startswith("    run_cli(")


class PanicException(BaseException):
    """What a panic in Rust becomes in Python."""


def outcome(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(fail)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no such file"), "error: no such file\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "report.html"),
            "error: report.html cannot be written: No space left on device. Free some space and try again.\n",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "error: A file cannot be written: Disk quota exceeded. Free some space and try again.\n",
        ),
        (
            MemoryError("Unable to allocate 8.00 GiB."),
            "error: Out of memory: Unable to allocate 8.00 GiB. Use a smaller batch or model.\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            "error: Out of GPU memory: CUDA out of memory. Use a smaller batch or model.\n",
        ),
    ],
)
def test_a_mistake_or_a_lack_of_space_is_one_message(error, message, capsys):
    assert outcome(error, capsys) == (1, message)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied"), ValueError("bug"), PanicException("unwrap")]
)
def test_a_bug_keeps_its_traceback(error, capsys):
    code, printed = outcome(error, capsys)
    assert code == 1
    assert printed.startswith("Traceback") and str(error) in printed.splitlines()[-1]
