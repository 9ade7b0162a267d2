"""Table and plot of the results of benchmarks.train."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import RESULTS, spread

from .session import BUILDERS

_COLUMNS = ("preset", "device", "dtype", "checkpoint", "seq_len", "vocab_size", "set", "threads", "attention")
_RATIOS = ("speed_ratio", "memory_ratio")
_LABELS = {"ours": "this project", "peft": "transformers + PEFT"}
Result = dict[str, Any]


def latest() -> list[tuple[dict[str, Any], Result]]:
    """Return the latest record and result of each setting on each machine, oldest first."""
    found = {}
    for line in (RESULTS / "train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for result in record["results"]:
            setting = (_machine(record), implementations(result), *(str(result[key]) for key in _COLUMNS))
            found.pop(setting, None)
            found[setting] = record, result
    return list(found.values())


def implementations(result: Result) -> tuple[str, ...]:
    """Return the implementations measured in a result."""
    return tuple(impl for impl in BUILDERS if f"{impl}.tokens_per_second" in result)


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return machine["gpus"][0] if machine["gpus"] else f"{machine['cores']} cores of {machine['cpu']}"


def _setting(result: Result) -> str:
    parts = [result["preset"], result["dtype"], f"checkpoint {result['checkpoint']}", f"seq_len {result['seq_len']}"]
    return ", ".join([*parts, *result["set"]])


def print_results(records: Sequence[tuple[dict[str, Any], Result]]) -> None:
    """Print a Markdown table, one line per implementation: medians with the lowest and highest of the rounds."""
    print(
        "| machine | setting | impl | tokens/s | samples/s | peak, GB | MFU, % | HFU, % | speed ratio | memory ratio |"
    )
    print("|" + " --- |" * 10)
    for record, result in records:
        for impl in implementations(result):
            keys = (("tokens_per_second", 1, 0), ("samples_per_second", 1, 2), ("peak_bytes", 1e9, 2))
            cells = [spread(result[f"{impl}.{key}"], scale, digits) for key, scale, digits in keys]
            cells += [spread(result[f"{impl}.{key}"], 0.01, 1) for key in ("mfu", "hfu")]
            ratios = [spread(result[key]) if key in result and impl == "ours" else "" for key in _RATIOS]
            print("| " + " | ".join([_machine(record), _setting(result), impl, *cells, *ratios]) + " |")


def draw(records: Sequence[tuple[dict[str, Any], Result]]) -> None:
    """Plot speed and memory of each setting to results/train.png: a bar per implementation, whiskers for ranges."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.7 * len(records)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [f"{_setting(result)}\n{_machine(record)}" for record, result in records]
    for axes, key, title, scale in zip(
        panels, ("tokens_per_second", "peak_bytes"), ("tokens per second", "peak memory (GB)"), (1, 1e9), strict=True
    ):
        for index, impl in enumerate(BUILDERS):
            bars = [
                (row, result[f"{impl}.{key}"]) for row, (_, result) in enumerate(records) if f"{impl}.{key}" in result
            ]
            rows = [row + 0.38 * (index - 0.5) for row, _ in bars]
            low, median, high = ([values[place] / scale for _, values in bars] for place in range(3))
            errors = [[b - a for a, b in zip(low, median)], [b - a for a, b in zip(median, high)]]
            axes.barh(rows, median, height=0.36, xerr=errors, label=_LABELS[impl], capsize=2)
        axes.set(title=title, yticks=range(len(names)), yticklabels=names)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[1].legend()
    figure.savefig(RESULTS / "train.png", dpi=120)
