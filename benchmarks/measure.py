"""Shared by the benchmarks: fresh processes, machine information, result files and tables."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

# Packages whose versions are recorded, if installed.
_PACKAGES = ("torch", "mistral-common", "sentencepiece", "safetensors", "numpy", "xformers")
_PEERS = ("transformers", "peft", "trl", "flash-attn")


def peak_rss() -> int:
    """Return this process's peak memory in bytes (Linux). Unlike getrusage's, it does not include the parent's."""
    return _kilobytes("/proc/self/status", "VmHWM:") * 1024


def seconds_since_start() -> float:
    """Return the age of this process, to a hundredth of a second (Linux)."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()  # from the third on
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")


def _kilobytes(file: str, key: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def run_json(*command: str, root: Path = ROOT) -> dict[str, Any]:
    """Run a command of the project, or of another checkout; return the JSON object in its last line of output."""
    environment = os.environ | ({} if root == ROOT else {"PYTHONPATH": str(root)})
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def checkouts(before: Path | None) -> dict[str, Path]:
    """Return the folders to measure by version: this project, and another checkout before it if there is one."""
    return ({"before": before.resolve()} if before else {}) | {"now": ROOT}


def measure(
    name: str, cases: Sequence[dict[str, Any]], rounds: int, run: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Measure each case once per round, so that other load affects all cases equally, and append the record to a file.

    After Ctrl-C the record has the cases measured until then.

    Args:
        name: of the benchmark; its results are in results/NAME.jsonl.
        cases: settings of each case.
        rounds: number of measurements per case.
        run: measures a case.

    Returns:
        The record: its "results" hold each case with [lowest, median, highest] of every measured number, and the
        strings of its last round.
    """
    load = [os.getloadavg()[0]]
    measured: list[list[dict[str, Any]]] = [[] for _ in cases]
    with tqdm(total=rounds * len(cases), desc=name, disable=None) as bar, contextlib.suppress(KeyboardInterrupt):
        for _ in range(rounds):
            for case, runs in zip(cases, measured, strict=True):
                runs.append(run(case))
                bar.update()
    load.append(os.getloadavg()[0])
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load_before_and_after": [round(value, 2) for value in load]},
        "versions": versions(),
        "rounds": rounds,
        "results": [case | _spreads(runs) for case, runs in zip(cases, measured, strict=True) if runs],
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def machine() -> dict[str, Any]:
    """Return the processor, the GPUs, the cores of this process and the memory."""
    return {
        "cpu": _cpu_model(),
        "gpus": _gpu_names(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(_kilobytes("/proc/meminfo", "MemTotal:") * 1024 / 1e9, 1),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, as far as they are installed."""
    packages = (*_PACKAGES, *_PEERS)
    installed = [package for package in packages if importlib.util.find_spec(package.replace("-", "_"))]
    found = {package: importlib.metadata.version(package) for package in installed}
    return {"python": platform.python_version()} | found


def _spreads(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = dict(runs[-1])
    for key, value in runs[-1].items():
        if isinstance(value, int | float):
            values = [run[key] for run in runs]
            middle = (min(values), statistics.median(values), max(values))
            found[key] = [float(f"{number:.5g}") for number in middle]
    return found


def _gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return re.findall(r"GPU \d+: (.+?) \(UUID", listing)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def last_record(name: str) -> dict[str, Any]:
    """Return the last record of a benchmark's result file."""
    return json.loads((RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def print_table(record: dict[str, Any], columns: dict[str, Callable[[dict[str, Any]], str]]) -> None:
    """Print a line about the machine, then a Markdown table of a record's results with the given columns."""
    machine = record["machine"]
    before, after = machine["load_before_and_after"]
    print(
        f"{record['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, Python {record['versions']['python']}, "
        f"torch {record['versions']['torch']}, {record['rounds']} rounds, load average {before} before, {after} after\n"
    )
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for result in record["results"]:
        print("| " + " | ".join(column(result) for column in columns.values()) + " |")


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Format as `median (lowest-highest)`, or as one number if all are equal."""
    low, median, high = (f"{value / scale:,.{digits}f}" for value in values)
    return median if low == high else f"{median} ({low}-{high})"
