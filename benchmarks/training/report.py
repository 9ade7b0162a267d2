"""Table and plot of the results of benchmarks.train."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import RESULTS, spread

from .presets import PRESETS
from .session import IMPLEMENTATIONS, RATIOS

_SETTING = ("preset", "device", "dtype", "checkpoint", "seq_len", "vocab_size", "set", "threads", "attention")
_LABELS = {"ours": "this project", "peft": "transformers + PEFT", "trl": "TRL", "original": "mistral-finetune"}
# Title, number of a result, scale, digits.
_COLUMNS = (
    ("tokens/s", "tokens_per_second", 1, 0),
    ("of whole samples", "whole_tokens_per_second", 1, 0),
    ("samples/s", "samples_per_second", 1, 2),
    ("peak, GB", "peak_bytes", 1e9, 2),
    ("first step, s", "first_step_seconds", 1, 1),
    ("MFU, %", "mfu", 0.01, 1),
    ("HFU, %", "hfu", 0.01, 1),
)
_PANELS = (
    ("tokens_per_second", "tokens per second", 1),
    ("whole_tokens_per_second", "of whole samples", 1),
    ("peak_bytes", "peak memory (GB)", 1e9),
)
Result = dict[str, Any]


def latest() -> list[tuple[dict[str, Any], Result]]:
    """Return the latest record and result of each setting on each machine, oldest first."""
    found = {}
    for line in (RESULTS / "train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for result in record["results"]:
            values = (*(result[key] for key in _SETTING), _packing(result))
            setting = (_machine(record), implementations(result), *map(str, values))
            found.pop(setting, None)
            found[setting] = record, result
    return list(found.values())


def implementations(result: Result) -> tuple[str, ...]:
    """Return the implementations measured in a result."""
    return tuple(impl for impl in IMPLEMENTATIONS if f"{impl}.tokens_per_second" in result)


def _packing(result: Result) -> str:
    return result.get("packing", PRESETS[result["preset"]].packing)  # older results do not have it


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return machine["gpus"][0] if machine["gpus"] else f"{machine['cores']} cores of {machine['cpu']}"


def _setting(result: Result) -> str:
    parts = [result["preset"], result["dtype"], f"checkpoint {result['checkpoint']}", f"seq_len {result['seq_len']}"]
    return ", ".join([*parts, _packing(result), *result["set"]])


def print_results(records: Sequence[tuple[dict[str, Any], Result]]) -> None:
    """Print a Markdown table, one line per implementation: medians with the lowest and highest of the rounds.

    The last columns are ours / peer, in the lines of peers: speed, that of whole samples, memory, time to first step.
    """
    ratios = [f"ours / it: {ratio.removesuffix('_ratio')}" for ratio in RATIOS]
    titles = ["machine", "setting", "impl", *(title for title, *_ in _COLUMNS), *ratios]
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for record, result in records:
        for impl in implementations(result):
            cells = [_cell(result, f"{impl}.{key}", scale, digits) for _, key, scale, digits in _COLUMNS]
            cells += [_cell(result, _ratio_key(result, impl, ratio)) for ratio in RATIOS]
            print("| " + " | ".join([_machine(record), _setting(result), impl, *cells]) + " |")


def _ratio_key(result: Result, impl: str, ratio: str) -> str:
    """Return the name of a ratio: in older results, which have one peer, it lacks the peer's."""
    return ratio if impl != "ours" and ratio in result else f"{impl}.{ratio}"


def _cell(result: Result, key: str, scale: float = 1.0, digits: int = 2) -> str:
    return spread(result[key], scale, digits) if key in result else ""


def draw(records: Sequence[tuple[dict[str, Any], Result]]) -> None:
    """Plot speed and memory of each setting to results/train.png: a bar per implementation, whiskers for ranges."""
    from matplotlib.figure import Figure

    sizes = [len(implementations(result)) for _, result in records]
    tops = list(itertools.accumulate((size + 0.5 for size in sizes), initial=0))  # of each setting; a bar is 1 high
    figure = Figure(figsize=(14, 1.5 + 0.4 * tops[-1]), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (key, title, scale) in zip(panels, _PANELS, strict=True):
        for index, impl in enumerate(IMPLEMENTATIONS):
            bars = [
                (top + implementations(result).index(impl), result[f"{impl}.{key}"])
                for top, (_, result) in zip(tops, records)
                if f"{impl}.{key}" in result
            ]
            if not bars:
                continue
            rows = [row for row, _ in bars]
            low, median, high = ([values[place] / scale for _, values in bars] for place in range(3))
            errors = [[b - a for a, b in zip(low, median)], [b - a for a, b in zip(median, high)]]
            axes.barh(rows, median, height=0.9, xerr=errors, color=f"C{index}", label=_LABELS[impl], capsize=2)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    names = [f"{_setting(result)}\n{_machine(record)}" for record, result in records]
    panels[0].set_yticks([top + (size - 1) / 2 for top, size in zip(tops, sizes)], names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(IMPLEMENTATIONS))
    figure.savefig(RESULTS / "train.png", dpi=120)
