"""Why several processes end is printed once and in full, before torchrun ends them all."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

import train
from finetune.checkpointing import Checkpointer
from model.errors import UserError
from tests.end_to_end.kill_runs import ForkedRun, kill_test_config
from tests.end_to_end.reasons import MISTAKES
from tests.support.slow_console.sitecustomize import make_slow

DEFECT = "ZeroDivisionError: a defect"
pytestmark = pytest.mark.usefixtures("one_thread")


class SupervisedRun(ForkedRun):
    """Forked processes under what torchrun does: once one has failed, it ends the others."""

    def __init__(self, config: Path, ranks: int, slow: int) -> None:
        self._slow = slow
        self._reports = config.with_suffix("")
        super().__init__(config, ranks)

    def _report(self, rank: int) -> Path:
        return self._reports.with_suffix(f".{rank}.error.json")

    def _prepare(self, rank: int) -> None:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(self._report(rank))
        if rank == self._slow:
            make_slow()

    def wait(self) -> list[int]:
        codes: dict[int, int] = {}
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid] != 0:
                        for other in set(self.pids) - codes.keys():
                            os.kill(other, signal.SIGTERM)
            time.sleep(0.02)
        return [codes[pid] for pid in self.pids]

    def reasons(self) -> list[str]:
        """Return what torchrun would report for each process."""
        return [json.loads(self._report(rank).read_text())["message"]["message"] for rank in range(len(self.pids))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reasons")


def end(config: Path, ranks: int, slow: int, reason: str) -> str:
    """Train, and assert that the reason is printed once and in every rank's report. Return the output."""
    run = SupervisedRun(config, ranks, slow)
    assert run.wait() == [1] * ranks, run.log
    assert run.log.count(reason) == 1, run.log
    assert all(reason in report for report in run.reasons())
    return run.log


@pytest.mark.parametrize(
    "ranks, slow, mistake",
    [*((2, 0, mistake) for mistake in MISTAKES), (4, 3, "malformed value"), (2, 1, "malformed row of one rank")],
)
def test_a_mistake_is_printed_once_whichever_console_is_slow(ranks, slow, mistake, folder):
    write, reason = MISTAKES[mistake]
    log = end(write(folder, f"{mistake.replace(' ', '_')}_{ranks}_{slow}"), ranks, slow, reason)
    assert log.count("error: ") == 1 and "Traceback" not in log
    assert ("error: [rank " in log) == (mistake == "malformed row of one rank")


@pytest.mark.parametrize("slow", [0, 1])
def test_a_refused_save_is_printed_once(slow, folder, monkeypatch):
    def refuse(*_):
        raise UserError("The checkpoint could not be saved")

    monkeypatch.setattr(Checkpointer, "_on_master", refuse)
    end(kill_test_config(folder, f"refused_{slow}", no_eval=True), 2, slow, "The checkpoint could not be saved")


@pytest.mark.parametrize("slow, failing", [(1, 1), (2, 0)])
def test_a_defect_on_one_rank_names_it(slow, failing, folder, monkeypatch):
    original = train.log_step

    def fail(run, result):
        if run.world.rank == failing and run.state.step == 2:
            raise ZeroDivisionError("a defect")
        original(run, result)

    monkeypatch.setattr(train, "log_step", fail)
    log = end(kill_test_config(folder, f"defect_{slow}", max_steps=1000, no_ckpt=True), 3, slow, DEFECT)
    assert log.count("Traceback") == 1 and f"[rank {failing} on " in log


def test_a_lost_process_is_named_with_the_checkpoint_to_continue_from(folder, monkeypatch):
    original = train.log_step

    def die(run, result):
        original(run, result)
        if run.state.step == 3:
            run.checkpointer.finish()  # of step 2
            if run.world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(train, "log_step", die)
    config = kill_test_config(folder, "lost", max_steps=1000, no_eval=True)
    run = SupervisedRun(config, 3, slow=0)
    assert run.wait() == [1, -signal.SIGKILL, 1], run.log
    (message,) = (line for line in run.log.splitlines() if line.startswith("error: "))
    assert f"error: Rank 1 on {socket.gethostname()} was lost after step " in message and "Traceback" not in run.log
    checkpoint = config.with_suffix("") / "checkpoints" / "checkpoint_000002"
    expected = f"The latest checkpoint is {checkpoint}. Rerun the same command with `resume: auto` to continue."
    assert message.endswith(expected)
