"""Systems and interpreters other than the one the tests run on, simulated: what they lack is taken away."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.end_to_end.test_imports import ROOT, imported, source_files

# What native Windows lacks. torch and the other libraries are loaded before: they have their own guards.
WITHOUT_POSIX = """
import os, signal, sys
import fire, mistral_common.tokens.tokenizers.mistral, multiprocessing.synchronize, pydantic, torch, tqdm, yaml

for name in ("fork", "getppid", "killpg", "pread", "pwrite", "sched_getaffinity", "getuid"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGSTOP", "alarm", "pause"):
    delattr(signal, name)
ABSENT = ("fcntl", "grp", "pwd", "resource", "termios")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in ABSENT:
    sys.modules.pop(name, None)
"""


IMPORT_AND_RUN = """
import importlib
from finetune.preemption import stop_requests

with stop_requests() as stop:
    print(bool(stop))
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported")
sys.platform = "win32"
sys.modules["train"].run_cli(lambda: print("ran"))
"""


@pytest.fixture(scope="module")
def without_posix() -> subprocess.CompletedProcess[str]:
    """A process that handles signals, imports every module and starts a command."""
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in source_files()]
    command = [sys.executable, "-c", WITHOUT_POSIX + IMPORT_AND_RUN, *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_signals_that_a_system_lacks_are_not_handled(without_posix: subprocess.CompletedProcess[str]) -> None:
    assert without_posix.stdout.startswith("False\n"), without_posix.stderr


def test_every_module_can_be_imported_without_posix(without_posix: subprocess.CompletedProcess[str]) -> None:
    assert "imported" in without_posix.stdout, without_posix.stderr


def test_native_windows_is_refused_in_one_sentence(without_posix: subprocess.CompletedProcess[str]) -> None:
    """Before anything is read or written, whatever the command."""
    assert without_posix.returncode == 1 and "ran" not in without_posix.stdout
    (message,) = without_posix.stderr.splitlines()
    assert message.startswith("error: Native Windows is not supported: use WSL2")


def test_memory_is_unknown_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS."""
    import builtins

    import torch

    from finetune import hardware

    def absent(path, *arguments, **options):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return original(path, *arguments, **options)

    original = builtins.open
    monkeypatch.setattr(builtins, "open", absent)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: absent(path))
    monkeypatch.setattr(sys, "platform", "darwin")
    peak, now = hardware.memory_bytes(torch.device("cpu"))
    assert peak == now > 10_000  # getrusage gives bytes there
    assert hardware.free_bytes(torch.device("cpu"), 1) is None


# Of the standard library of 3.11, removed in 3.12 or 3.13.
REMOVED = "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis nntplib"
REMOVED += " ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"


def test_sources_use_nothing_that_newer_pythons_removed() -> None:
    for file in source_files():
        assert not {name.partition(".")[0] for name in imported(file)} & set(REMOVED.split()), file


def test_sources_compile_without_warnings() -> None:
    """3.12 turned deprecated escapes into warnings that users see."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in source_files():
            compile(file.read_text(encoding="utf-8"), str(file), "exec", dont_inherit=True)
