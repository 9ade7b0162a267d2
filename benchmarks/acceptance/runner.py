"""Run each part in a process of its own, with its own limit of time. What a part finds is on disk at once."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.acceptance.check import Check, Setting, failure
from benchmarks.acceptance.parts import Part
from model.errors import first_line

RESULTS, LOG = "results.jsonl", "log.txt"
FINISHED = "finished"
_TO_DIE_S = 10  # a process that a driver holds does not die
# Imported once, in a server that the processes of all parts are forked from.
_SHARED = [
    "benchmarks.acceptance.runner",
    "matplotlib.figure",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
]


def run_parts(parts: Sequence[Part], device: str, preset: str, out: Path, total_s: float) -> Iterator[dict[str, Any]]:
    """Run parts one after the other, and yield each one's line of the results when it has ended.

    Args:
        parts: to run.
        device: cuda or cpu.
        preset: tiny or full.
        out: folder for `RESULTS` and `LOG`, which are appended to.
        total_s: after this many seconds no part is started, and the one that runs is ended.
    """
    end = time.monotonic() + total_s
    context = _context(device)
    for part in parts:
        start = time.monotonic()
        limit = min(part.limit_s, end - start)
        if limit <= 0:
            state = "not run: no time left; --parts runs it alone"
        else:
            with tempfile.TemporaryDirectory(prefix="acceptance-") as folder:
                arguments = (part, device, preset, Path(folder), out)
                state = _ended(context.Process(target=_run, args=arguments, name=part.name), limit)
        line = {"part": part.name, "state": state, "seconds": round(time.monotonic() - start, 1)}
        _append(out, line)
        yield line


def _context(device: str) -> BaseContext:
    """Return how processes are started: forked from a server with all imports, unless one of these uses the GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SHARED)
    if device == "cpu":
        return context
    probe = context.Process(target=_use, args=(device,))
    probe.start()
    probe.join()
    return context if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def _use(device: str) -> None:
    """End with exit code 0 if this process can use the device."""
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # no CUDA in this build; initialized before the fork
        sys.exit(first_line(error))


def _ended(process: BaseProcess, limit: float) -> str:
    """Start a process and wait until it has ended or its limit is over. Return in words how it ended."""
    process.start()
    try:
        process.join(limit)
        if process.exitcode is None:
            return f"ended after its limit of {limit:.0f} s"
    finally:
        _kill_with_children(process)
    if process.exitcode < 0:
        return f"ended by {signal.Signals(-process.exitcode).name}"
    return FINISHED if process.exitcode == 0 else f"ended with exit code {process.exitcode}"


def _kill_with_children(process: BaseProcess) -> None:
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        with contextlib.suppress(ProcessLookupError):  # it has ended, or has not made its group yet
            kill()
    process.join(_TO_DIE_S)


def _run(part: Part, device: str, preset: str, folder: Path, out: Path) -> None:
    """Write a line for each finding of a part, in a process of its own."""
    os.setsid()
    log = os.open(out / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"--- {part.name}", flush=True)
    logging.basicConfig(level=logging.INFO)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    setting = Setting(torch.device(device, 0) if device == "cuda" else torch.device(device), preset, folder)
    for check in _checks(part, setting):
        _append(out, {"part": part.name} | dataclasses.asdict(check))


def _checks(part: Part, setting: Setting) -> Iterator[Check]:
    try:
        yield from part.run(setting)
    except Exception as error:
        traceback.print_exc()
        yield failure("runs to its end", error)


def _append(out: Path, line: dict[str, Any]) -> None:
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")
