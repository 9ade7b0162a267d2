"""What a step asks of a GPU, traced without one: kernels, bytes, waits of the host, memory. No time is measured.

`python -m benchmarks.trace [--presets A B]` traces a micro-batch and the optimizer's step of presets of
benchmarks.train on a pretended H100, in this process, and appends to results/trace.jsonl; `--show` prints the table
again. `--matrix` traces every combination of model, base, engine, precision and recomputation on small shapes instead,
and prints a JSON line for each. Needs a CPU build of PyTorch and g++.
"""

import argparse
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.measure import last_record, measure, print_table, spread
from finetune.cli import run_cli
from model.errors import UserError

if TYPE_CHECKING:
    from benchmarks.traced.steps import Case
    from model.args import ModelArgs

_PRODUCTS = ("mm", "attn", "attention", "linear")  # in names of operators that are not elementwise
# Traced settings; the first of preset A are mistral-finetune's, and were the defaults here until version 0.2.
_CASES: list[dict[str, Any]] = [
    {"preset": "A", "checkpoint": True, "compile": False, "base_dtype": "same"},
    {"preset": "A", "checkpoint": True, "compile": True, "base_dtype": "same"},
    {"preset": "A", "checkpoint": False, "compile": True, "base_dtype": "same"},
    {"preset": "A", "checkpoint": True, "compile": False, "base_dtype": "fp8"},
    {"preset": "A", "checkpoint": False, "compile": True, "base_dtype": "fp8"},
    {"preset": "A", "checkpoint": False, "compile": True, "base_dtype": "nf4"},
    {"preset": "B", "checkpoint": "selective", "compile": True, "base_dtype": "same"},
]
COLUMNS = {
    "preset": lambda result: result["preset"],
    "`base_dtype`": lambda result: result["base_dtype"],
    "`checkpoint`": lambda result: str(result["checkpoint"]).lower(),
    "`compile`": lambda result: str(result["compile"]).lower(),
    "attention": lambda result: result["attention"],
    "kernels": lambda result: spread(result["kernels"], digits=0),
    "elementwise, GB": lambda result: spread(result["elementwise_bytes"], 1e9, 0),
    "waits": lambda result: spread(result["waits"], digits=0),
    "peak, GiB": lambda result: spread(result["peak_bytes"], 1 << 30),
    "planned, GiB": lambda result: spread(result["planned_bytes"], 1 << 30),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = sorted({case["preset"] for case in _CASES})
    parser.add_argument("--presets", nargs="+", choices=presets, default=presets, help="default: all")
    parser.add_argument("--matrix", action="store_true", help="trace small shapes in every combination")
    parser.add_argument("--show", action="store_true", help="print the last table again")
    options = parser.parse_args()
    if options.show:
        return print_table(last_record("trace"), COLUMNS)
    try:
        import benchmarks.traced.device  # noqa: F401  before torch
    except ImportError as error:
        raise UserError(str(error)) from error
    if options.matrix:
        for line in trace_matrix():
            print(json.dumps(line), flush=True)
        return None
    cases = [case for case in _CASES if case["preset"] in options.presets]
    return print_table(measure("trace", cases, 1, _trace_preset), COLUMNS)


def _trace_preset(case: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.traced.steps import Case, trace
    from benchmarks.training.presets import PRESETS
    from model.args import LoraArgs

    settings = dict(case)
    preset = PRESETS[settings.pop("preset")]
    settings |= {"seq_len": preset.seq_len, "batch_size": preset.batch_size}
    settings |= {"lora": LoraArgs(rank=preset.rank, scaling=2.0)}
    documents = max(1, preset.seq_len * preset.batch_size // 1200)
    traced = trace(Case(preset.shapes, settings, documents=documents, steps_before=True))
    moved = traced.step.moved.items()
    return {
        "attention": traced.hardware.attention,
        "kernels": sum(traced.step.kernels.values()),
        "elementwise_bytes": sum(count for kernel, count in moved if not any(each in kernel for each in _PRODUCTS)),
        "waits": sum(traced.step.waits.values()),
        "peak_bytes": traced.step.peak,
        "planned_bytes": traced.planned,
    }


def matrix() -> "Iterator[tuple[str, Case]]":
    """Yield a name and a case for every combination on a small model, dense and as a mixture."""
    from benchmarks.traced.device import A100, V100
    from benchmarks.traced.steps import Case
    from model.args import LoraArgs, ModelArgs, MoeArgs

    shapes = ModelArgs(
        dim=256, n_layers=1, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=1024
    )
    base = {"lora": LoraArgs(rank=16, scaling=2.0), "seq_len": 256, "checkpoint": True, "compile": False}
    full = base | {"lora": LoraArgs(enable=False)}
    head = LoraArgs(rank=8, scaling=2.0, targets=["wq", "w2", "output"])
    for model in (shapes, dataclasses.replace(shapes, moe=MoeArgs(2, 1))):
        name = "moe" if model.moe else "dense"
        for mode in (True, "selective", False):
            for engine in ("varlen", "xformers", "sdpa"):
                yield (
                    f"{name} {engine} checkpoint={mode}",
                    Case(model, base | {"attention": engine, "checkpoint": mode}),
                )
            yield f"{name} compiled checkpoint={mode}", Case(model, base | {"compile": True, "checkpoint": mode})
        for storage, dtype in itertools.product(("nf4", "nf4-dq", "fp8"), ("bf16", "fp16")):
            yield f"{name} {storage} {dtype}", Case(model, base | {"base_dtype": storage, "param_dtype": dtype})
        yield f"{name} fp8 compiled", Case(model, base | {"base_dtype": "fp8", "compile": True})
        yield f"{name} fp8 on an A100", Case(model, base | {"base_dtype": "fp8"}, gpu=A100)
        yield f"{name} on a V100", Case(model, base, gpu=V100)
        for dtype in ("bf16", "fp16", "fp32"):
            yield f"{name} full {dtype}", Case(model, full | {"param_dtype": dtype})
        yield f"{name} dropout", Case(model, base | {"lora": LoraArgs(rank=8, dropout=0.1, scaling=2.0)})
        yield f"{name} adapter on the head", Case(model, base | {"lora": head})
        yield f"{name} an eighth trained", Case(model, base, trained_share=0.125)
        yield f"{name} window", Case(dataclasses.replace(model, sliding_window=10_000), base)
        for ranks in (8, 64):
            yield f"{name} {ranks} ranks", Case(model, base, ranks=ranks)
        yield f"{name} 64 ranks hybrid", Case(model, base | {"sharding": "hybrid"}, ranks=64)
        yield f"{name} nf4 8 ranks", Case(model, base | {"base_dtype": "nf4"}, ranks=8)
        yield f"{name} full 8 ranks", Case(model, full, ranks=8)
        yield f"{name} cpu_offload", Case(model, base | {"cpu_offload": True})


def memory_cases() -> "Iterator[tuple[str, Case]]":
    """Yield a name and a case for each way to hold a 7B or 8x7B model, with a few of its layers."""
    from benchmarks.traced.steps import Case
    from benchmarks.training.presets import PRESETS
    from model.args import LoraArgs

    dense = dataclasses.replace(PRESETS["A"].shapes, n_layers=2)
    mixture = dataclasses.replace(PRESETS["E"].shapes, n_layers=2)
    base = {"lora": LoraArgs(rank=64, scaling=2.0), "seq_len": 8192, "checkpoint": True, "compile": True}
    base |= {"num_microbatches": 2}
    cases: dict[str, tuple[ModelArgs, dict[str, Any], int]] = {
        "7B": (dense, {}, 1),
        "7B checkpoint=False": (dense, {"checkpoint": False}, 1),
        "7B checkpoint=selective": (dense, {"checkpoint": "selective"}, 1),
        "7B nf4": (dataclasses.replace(dense, n_layers=3), {"base_dtype": "nf4"}, 1),
        "7B fp8": (dense, {"base_dtype": "fp8"}, 1),
        "7B full": (dense, {"lora": LoraArgs(enable=False)}, 1),
        "7B 8 ranks": (dense, {}, 8),
        "8x7B": (mixture, {}, 1),
    }
    for name, (shapes, settings, ranks) in cases.items():
        yield name, Case(shapes, base | settings, ranks=ranks, steps_before=True)


_ANSWERING = ("dense varlen checkpoint=True", "moe varlen checkpoint=True", "dense on a V100")
_RESUMED = (
    *("dense varlen checkpoint=True", "dense on a V100", "dense full bf16", "dense full fp32", "dense nf4 fp16"),
    *("moe full fp16", "moe nf4 bf16", "dense 8 ranks", "dense nf4 8 ranks", "moe full 8 ranks", "dense cpu_offload"),
)


def trace_matrix() -> Iterator[dict[str, Any]]:
    """Trace every case of `matrix` and `memory_cases`; yield its counts, or the error that ended it."""
    traced = [(name, case, _step_line) for name, case in itertools.chain(matrix(), memory_cases())]
    cases = {name: case for name, case, _ in traced}
    traced += [(f"{name}, answers", cases[name], _answers_line) for name in _ANSWERING]
    traced += [(f"{name}, resumed", cases[name], resumed_line) for name in _RESUMED]
    for name, case, trace_line in traced:
        try:
            yield {"case": name} | _units(case) | trace_line(case)
        except Exception as error:
            yield {"case": name, "error": f"{type(error).__name__}: {error}"}


def _units(case: "Case") -> dict[str, Any]:
    """Return what waits are counted per."""
    args = case.args()
    routers = case.shapes.n_layers if case.shapes.moe else 0  # one per layer
    return {"routers": routers, "checkpoint": args.checkpoint, "cpu_offload": args.cpu_offload}


def _step_line(case: "Case") -> dict[str, Any]:
    from benchmarks.traced.steps import trace

    traced = trace(case)
    return {
        "attention": traced.hardware.attention,
        "micro_batches": case.args().num_microbatches,
        "trained": traced.trained,
        "waits": _without_lines(traced.step.waits),
        "copies": _without_lines(traced.step.copies),
        "evaluation_waits": _without_lines(traced.evaluation.waits),
        "peak": traced.step.peak if case.steps_before else None,
        "planned": traced.planned,
    }


def _answers_line(case: "Case") -> dict[str, Any]:
    from benchmarks.traced.steps import trace_answers

    shorter, longer = (Counter(_without_lines(trace_answers(case, tokens=tokens).waits)) for tokens in (1, 2))
    return {"prompt_waits": dict(shorter - (longer - shorter)), "token_waits": dict(longer - shorter)}


def resumed_line(case: "Case") -> dict[str, Any]:
    """Return what a run's state is before it is saved and after it is restored, and the waits of both."""
    from benchmarks.traced.resumed import trace_resume

    resumed = trace_resume(case)
    after = resumed.after
    misplaced = [f"{name}: {after[name]}, not {old}" for name, old in resumed.before.items() if after[name] != old]
    return {
        "devices": sorted({tensor.device for tensor in resumed.before.values()}),
        "dtypes": sorted({tensor.dtype for tensor in resumed.before.values()}),
        "misplaced": misplaced,
        "copies_of_a_tensor": sorted(set(resumed.copies.values())),
        "tensors": len(resumed.before),
        "exported": resumed.exported,
        "restored": resumed.restored,
        "scales": resumed.scales,
        "random_restored": resumed.random_restored,
        "micro_batches": 1,
        "trained": resumed.exported,
        "waits": _without_lines(resumed.step.waits),
        "save_waits": _without_lines(resumed.save.waits),
        "resume_waits": _without_lines(resumed.resume.waits),
    }


def _without_lines(counts: Counter[str]) -> dict[str, int]:
    """Return counts by kind and file, summed over its lines."""
    summed: Counter[str] = Counter()
    for place, count in counts.items():
        summed[place.partition(":")[0]] += count
    return dict(summed)


if __name__ == "__main__":
    run_cli(main)
