"""Write the table of docs/hardware.md that says how often the host waits for the GPU, from a trace: `make docs`."""

import dataclasses
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("hardware.md")
_BEGIN, _END = "<!-- waits, from a trace: make docs -->\n", "<!-- end of waits -->\n"
_TIMES = {0: "never", 1: "once", 2: "twice"}
Line = dict[str, Any]  # of benchmarks.trace.trace_matrix


@dataclasses.dataclass(frozen=True)
class _Row:
    """Waits that are counted together.

    Attributes:
        what: what the host waits for.
        phase: key of a trace's line.
        places: keys of that phase's counts.
        unit: what there is one wait per.
        units: how many of them a line has.
        condition: the setting on which the waits of a line depend; empty for the usual one.
    """

    what: str
    phase: str
    places: tuple[str, ...]
    unit: str
    units: Callable[[Line], int] = lambda line: 1
    condition: Callable[[Line], str] = lambda line: ""


def _routers(line: Line) -> int:
    return int(line["routers"])


def _offload(line: Line) -> str:
    return "`cpu_offload`" if line["cpu_offload"] else ""


_ROUTER = "router of a mixture of experts"
_ROUTING = ("tolist at model/moe.py",)
_ANSWERING = ("tolist at model/generate.py", "copy from the host at model/generate.py")
_SAVING = ("copy to the host at finetune/checkpointing.py", "copy to the host at model/weights.py")
_ROWS = [
    _Row("gradient norm", "waits", ("item at train.py",), "step", condition=_offload),
    _Row(
        "gradients, with `cpu_offload`",
        "waits",
        ("synchronize at outside of the project",),  # by PyTorch, in the thread of the backward pass
        "trained tensor and micro-batch",
        lambda line: int(line["cpu_offload"] * line["trained"] * line["micro_batches"]),
    ),
    _Row(
        _ROUTER,
        "waits",
        _ROUTING,
        "layer and micro-batch",
        lambda line: int(line["routers"] * line["micro_batches"]),
        lambda line: f"`checkpoint: {str(line['checkpoint']).lower()}`",
    ),
    _Row("evaluation", "evaluation_waits", ("item at finetune/eval.py",), "batch"),
    _Row(f"{_ROUTER}, in evaluation", "evaluation_waits", _ROUTING, "layer and batch", _routers),
    _Row("common prefix of the prompts", "prompt_waits", _ANSWERING, "file of prompts"),
    _Row(f"{_ROUTER}, for the prefix", "prompt_waits", _ROUTING, "layer and file of prompts", _routers),
    _Row("generated answers", "token_waits", _ANSWERING, "token"),
    _Row(f"{_ROUTER}, for answers", "token_waits", _ROUTING, "layer and token", _routers),
    _Row(
        "checkpoint: state and exported weights",
        "save_waits",
        _SAVING,
        "tensor",
        lambda line: int(line["tensors"] + line["exported"]),
        _offload,
    ),
    _Row(
        "resumed state",
        "resume_waits",
        ("copy from the host at finetune/resume.py",),
        "tensor",
        lambda line: int(line["tensors"]),
        _offload,
    ),
]


def hardware_page(lines: Iterable[Line]) -> str:
    """Return the page with the table of this trace; the text around it is kept."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    return before + _BEGIN + _waits_table(list(lines)) + _END + rest.partition(_END)[2]


def _waits_table(lines: list[Line]) -> str:
    """Return the table.

    Raises:
        ValueError: a case failed, or the host waits somewhere that has no row, or not equally often in every case.
    """
    known = {(row.phase, place) for row in _ROWS for place in row.places}
    for line in lines:
        if "error" in line:
            raise ValueError(f"{line['case']}: {line['error']}")
        for phase in {row.phase for row in _ROWS} & line.keys():
            if unknown := [place for place in line[phase] if (phase, place) not in known]:
                raise ValueError(f"{line['case']}: the host waits at {unknown[0]}, which has no row in {__file__}.")
    rows = [f"| {row.what} | {_how_often(row, lines)} |\n" for row in _ROWS]
    return "".join(["| the host waits for | how often |\n", "| --- | --- |\n", *rows])


def _how_often(row: _Row, lines: list[Line]) -> str:
    found: dict[str, Fraction] = {}
    for line in lines:
        if row.phase not in line:
            continue
        waits, units = sum(line[row.phase].get(place, 0) for place in row.places), row.units(line)
        condition = row.condition(line)
        expected = found.setdefault(condition, Fraction(waits, units)) * units if units else 0
        if waits != expected:
            finding = f"the host waits {waits} times, not {expected} as other cases imply"
            raise ValueError(f"{line['case']}: {row.what}: {finding} (per {row.unit}).")
    conditions: dict[Fraction, list[str]] = {}
    for condition in sorted(found, key=lambda condition: (condition != "", found[condition], condition)):
        conditions.setdefault(found[condition], []).append(condition)
    parts = [
        f"{_TIMES.get(int(times), f'{times} times')}{f' per {row.unit}' if i == 0 else ''}{_with(named)}"
        for i, (times, named) in enumerate(conditions.items())
    ]
    return ", ".join(parts)


def _with(conditions: list[str]) -> str:
    return "" if "" in conditions else f" with {' and '.join(conditions)}"


if __name__ == "__main__":
    import benchmarks.traced.device  # noqa: F401  before torch
    from benchmarks.trace import trace_matrix

    PAGE.write_text(hardware_page(trace_matrix()), encoding="utf-8")
