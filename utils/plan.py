"""Estimate what a training run needs, before anything is loaded or downloaded: memory per GPU and hours.

`python -m utils.plan CONFIG.yaml [KEY=VALUE ...] [--model NAME] [--gpu h100 | --gpu_gb 80] [--gpus 8] [--json]`

Lists which settings of `base_dtype` and `checkpoint` fit, the longest `seq_len` that does, and the duration.
Memory is computed from shapes and settings (finetune/memory_estimate.py), speed from operations per token and the share
of a GPU's peak rate that is assumed to be reached (finetune/speed_estimate.py). All figures are estimates.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.args import CheckpointMode, TrainArgs, read_train_args
from finetune.cli import parse_config_args, run_cli
from finetune.speed_estimate import (
    GPUS,
    TYPICAL_SHARE,
    Gpu,
    find_gpu,
    flops_per_token,
    mean_context,
    memory_config,
    tokens_per_second,
    unlisted_gpu,
)
from model.args import BASE_DTYPES, ModelArgs, load_model_args
from model.errors import UserError
from utils.models.known_models import KNOWN_MODELS, RELEASES, known_shapes

_GIB = 1024**3
# Columns of the printed table, and the parts that each adds up; --json gives every part.
_COLUMNS = {
    "weights": ("frozen", "trained", "unsharded"),
    "optimizer": ("gradients", "moments"),
    "activations": ("activations",),
    "temporary": ("transient", "overhead"),
    "total": ("total",),
}
# A plan depends on these keys. Errors in others (data, folders, trackers) do not matter yet.
_PLANNED_KEYS = (
    *("epochs", "seq_len", "batch_size", "num_microbatches", "max_steps", "checkpoint", "param_dtype", "base_dtype"),
    *("attention", "sharding", "cpu_offload", "optim.name", "lora"),
)


def load_args(path: Path, overrides: Sequence[str] = ()) -> TrainArgs:
    """Read a training YAML whose data and folders need not exist yet.

    Raises:
        UserError: the file cannot be read, or settings that a plan depends on are invalid.
    """
    return read_train_args(
        path, lambda args: [found for found in args.problems() if found.is_about(*_PLANNED_KEYS)], overrides
    )


def find_model(args: TrainArgs, named: str | None) -> tuple[str, ModelArgs]:
    """Return the name and shapes of the model to plan for.

    Args:
        args: settings of the YAML.
        named: folder or name in `KNOWN_MODELS`, instead of the YAML's model.

    Raises:
        UserError: there is neither such a folder nor such a name.
    """
    wanted = named or args.model_id_or_path
    if shapes := known_shapes(wanted):
        return wanted.lower(), shapes
    if wanted and Path(wanted).is_dir():
        return wanted, load_model_args(Path(wanted))
    key = "--model" if named else "`model_id_or_path`"
    raise UserError(
        f"{key}: the folder {wanted!r} does not exist. Give --model with a model's folder or one of "
        f"{', '.join(KNOWN_MODELS)}, or a name of docs/models.md."
    )


def choose_gpu(name: str | None, gib: float | None) -> Gpu:
    """Return the GPU to plan for; if only its memory is known, its peak rate is assumed.

    Args:
        name: `--gpu`; a key of `GPUS` or a device's name.
        gib: `--gpu_gb`; memory that replaces the table's.

    Raises:
        UserError: the name is not in the table, and no memory is given.
    """
    if name is None:
        return unlisted_gpu(gib or 80.0)
    gpu = find_gpu(name)
    if gpu is None and gib:
        return unlisted_gpu(gib, name)
    if gpu is None:
        raise UserError(
            f"--gpu: {name!r} is not in the table of GPUs: {', '.join(GPUS)}. For another GPU give its memory with "
            "--gpu_gb and, if you know it, its speed with --tokens_per_second."
        )
    return dataclasses.replace(gpu, gib=gib or gpu.gib)


def expected(
    args: TrainArgs, model: ModelArgs, gpu: Gpu, options: argparse.Namespace, checkpoint: CheckpointMode
) -> dict[str, Any]:
    """Estimate speed and hours, and explain what they are based on."""
    tokens = args.max_steps * args.num_microbatches * args.batch_size * args.seq_len * options.gpus
    context = mean_context({args.seq_len: 1}, model.sliding_window)
    flops = flops_per_token(model, context, checkpoint, args.lora.enable, options.trained_share)
    if options.tokens_per_second:
        speed, basis = options.tokens_per_second, "as given"
    else:
        speed = options.gpus * tokens_per_second(gpu, model, flops, args.batch_size * args.seq_len, options.mfu)
        basis = f"estimated, not measured: {gpu.basis(options.mfu)}"
    return {
        "checkpoint": checkpoint,
        "tokens": None if args.epochs else tokens,
        "flops_per_token": flops,
        "tokens_per_second": speed,
        "basis": basis,
        "hours": None if args.epochs else tokens / speed / 3600,
    }


def make_plan(args: TrainArgs, options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is printed, in bytes, tokens and hours."""
    from finetune.memory_estimate import memory_rows  # loads torch

    name, model = find_model(args, options.model)
    gpu = choose_gpu(options.gpu, options.gpu_gb)
    config = memory_config(args, model, gpu, options.gpus, options.trained_share)
    rows = memory_rows(config, BASE_DTYPES if args.lora.enable else BASE_DTYPES[:1], gpu.usable_bytes)
    checkpoint = config.resolved_checkpoint(gpu.usable_bytes)
    trained, frozen = config.trained_and_frozen()
    return {
        "model": name,
        "parameters": trained + frozen,
        "trained": trained,
        "gpu": gpu.label,
        "gpus": options.gpus,
        "gpu_bytes": int(gpu.gib * _GIB),
        "usable_bytes": int(gpu.usable_bytes),
        "dtype": gpu.dtype if args.param_dtype == "auto" else args.param_dtype,
        "attention": config.attention,
        "base_dtype": args.base_dtype,
        "checkpoint": checkpoint,
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "hybrid": args.sharding == "hybrid",
        "rough": config.is_approximate,
        "memory": rows,
        "expected": expected(args, model, gpu, options, checkpoint),
    }


def as_text(plan: dict[str, Any]) -> str:
    """Return the plan for the terminal; `*` marks the YAML's own settings."""
    share = plan["trained"] / plan["parameters"]
    lines = [
        f"Model: {plan['model']}, {plan['parameters']:,} parameters, {plan['trained']:,} of them trained ({share:.2%})",
        *_download_line(plan["model"]),
        f"GPUs: {plan['gpus']} x {plan['gpu']} with {plan['gpu_bytes'] / _GIB:.1f} GiB, "
        f"{plan['usable_bytes'] / _GIB:.1f} GiB of it usable",
        f"Settings: {plan['dtype']}, attention: {plan['attention']}, seq_len {plan['seq_len']:,}, "
        f"batch_size {plan['batch_size']}",
        *(["`sharding: hybrid`: set --gpus to the number in one machine"] * plan["hybrid"]),
        "",
        "Estimated memory per GPU in GiB" + (", roughly, because layers keep their inputs" if plan["rough"] else ""),
        f"  {'base_dtype':10} {'checkpoint':10}"
        + "".join(f"{column:>12}" for column in _COLUMNS)
        + f"{'fits':>6}{'longest seq_len':>17}",
        *(_memory_line(row, plan) for row in plan["memory"]),
        "temporary: the peak on top of the rest, in a layer's backward pass or in the loss (whose logits need "
        f"{plan['memory'][0]['loss'] / _GIB:.2f}).",
        "",
        *_verdict(plan),
        "",
        *_expected_lines(plan["expected"]),
    ]
    return "\n".join(lines)


def _download_line(name: str) -> list[str]:
    """Say how to get a published model that is planned by its name."""
    if name not in RELEASES:
        return []
    release = RELEASES[name]
    command = f"python -m utils.fetch_model {name} --out DIR"
    return [f"Download: {release.gigabytes:.1f} GB, license {release.license}: {command}"]


def _is_own(row: dict[str, Any], plan: dict[str, Any]) -> bool:
    return (row["base_dtype"], row["checkpoint"]) == (plan["base_dtype"], plan["checkpoint"])


def _memory_line(row: dict[str, Any], plan: dict[str, Any]) -> str:
    cells = "".join(f"{sum(row[part] for part in parts) / _GIB:12.2f}" for parts in _COLUMNS.values())
    longest = f"{row['largest_seq_len']:,}" if row["largest_seq_len"] else "-"
    mark, mode = "*" if _is_own(row, plan) else " ", str(row["checkpoint"]).lower()
    return f"{mark} {row['base_dtype']:10} {mode:10}{cells}{'yes' if row['fits'] else 'no':>6}{longest:>17}"


def _verdict(plan: dict[str, Any]) -> list[str]:
    """Report whether the YAML's settings fit, and if not, which do."""
    own = next(row for row in plan["memory"] if _is_own(row, plan))
    needs = f"Your settings (*) need {own['total'] / _GIB:.1f} of {plan['usable_bytes'] / _GIB:.1f} usable GiB"
    if own["fits"]:
        return [f"{needs}: they fit."]
    lines = [f"{needs}: they do not fit."]
    longest = max(plan["memory"], key=lambda row: row["largest_seq_len"])
    if fitting := [row for row in plan["memory"] if row["fits"]]:
        lines.append(f"With seq_len {plan['seq_len']:,} these fit: {'; '.join(map(_setting, fitting))}.")
    elif longest["largest_seq_len"]:
        lines.append(
            f"Nothing fits with seq_len {plan['seq_len']:,}. The longest that does is {longest['largest_seq_len']:,}, "
            f"with {_setting(longest)}."
        )
    else:
        lines.append("Nothing fits, whatever the seq_len: use more GPUs (--gpus), `cpu_offload` or a smaller model.")
    if own["largest_seq_len"]:
        lines.append(f"Your settings fit with seq_len {own['largest_seq_len']:,} or less.")
    return lines


def _setting(row: dict[str, Any]) -> str:
    return f"base_dtype {row['base_dtype']}, checkpoint {str(row['checkpoint']).lower()}"


def _expected_lines(run: dict[str, Any]) -> list[str]:
    if run["tokens"]:
        lines = [f"Length: {run['tokens']:,} tokens."]
    else:
        lines = ["Length: `epochs` sets it; count the tokens with python -m utils.validate_data."]
    lines.append(f"Speed: {run['tokens_per_second']:,.0f} tokens/s on all GPUs ({run['basis']}).")
    if run["hours"]:
        lines.append(f"Time: {run['hours']:.1f} hours, without start-up, evaluation and checkpoints.")
    else:
        per_million = 1e6 / run["tokens_per_second"] / 60
        lines.append(
            f"Time: {per_million:.1f} minutes per million tokens, without start-up, evaluation and checkpoints."
        )
    mode = str(run["checkpoint"]).lower()
    lines.append(
        f"With `checkpoint: {mode}` a token needs {run['flops_per_token'] / 1e9:.1f} GFLOP if documents are as long as "
        "seq_len; shorter ones need less."
    )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder or a known name, instead of the YAML's model_id_or_path")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}; or another, with --gpu_gb")
    parser.add_argument("--gpu_gb", type=float, help="memory per GPU in GiB (default: that of --gpu, else 80)")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs that share the model (default: 1)")
    parser.add_argument(
        "--trained_share", type=float, default=1.0, help="share of tokens with a loss, 0 to 1 (default 1)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=TYPICAL_SHARE,
        help=f"share of the GPU's peak rate that is reached, 0 to 1 (default: {TYPICAL_SHARE})",
    )
    parser.add_argument("--tokens_per_second", type=float, help="speed of all GPUs together, if you know it")
    parser.add_argument("--json", action="store_true", help="print a JSON object, with sizes in bytes")
    return parser


def _options() -> argparse.Namespace:
    options = parse_config_args(_parser())
    for name in ("gpus", "gpu_gb", "tokens_per_second", "trained_share", "mfu"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} is {value}; it must be positive.")
        if name in ("trained_share", "mfu") and value > 1:
            raise UserError(f"--{name} is {value}; it is a share, at most 1.")
    return options


def main() -> None:
    options = _options()
    plan = make_plan(load_args(options.config, options.overrides), options)
    print(json.dumps(plan, indent=2) if options.json else as_text(plan))


if __name__ == "__main__":
    run_cli(main)
