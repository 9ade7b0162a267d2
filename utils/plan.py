"""Says what a training will need, before anything is loaded: memory of each GPU, longest sequences, hours.

`python -m utils.plan --train_yaml CONFIG.yaml [--model FOLDER_OR_NAME] [--gpu h100 | --gpu_gb 80] [--gpus 8] [--json]`

Memory is computed from shapes and settings (see finetune/memory_estimate.py), speed from the operations that a token
takes and the share of the card's peak that is assumed to do them.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from finetune.args import TrainArgs, read_train_args
from finetune.cli import run_cli
from finetune.memory_estimate import CHECKPOINTS, RESERVE, MemoryConfig, largest_seq_len
from finetune.mixed_precision import DTYPES
from model.args import BASE_DTYPES, ModelArgs, load_model_args
from model.errors import UserError
from utils.models.known_models import KNOWN_MODELS
from utils.validation.throughput import active_parameters

_GIB = 1024**3
_PARTS = ("frozen", "trained", "gradients", "moments", "unsharded", "activations", "transient", "overhead", "total")
# Keys whose faults would make a plan wrong; those of data, folders and trackers do not matter yet.
_PLANNED_KEYS = (
    *(
        "epochs",
        "seq_len",
        "batch_size",
        "num_microbatches",
        "max_steps",
        "checkpoint",
        "param_dtype",
        "base_dtype",
        "attention",
    ),
    *("sharding", "cpu_offload", "optim.name", "lora"),
)


@dataclasses.dataclass(frozen=True)
class Gpu:
    gb: float  # GiB of memory
    peak: float  # FLOP/s of dense 16-bit products, as its maker states them
    dtype: str = "bf16"  # what `param_dtype: auto` is there
    attention: str = "varlen"


GPUS = {
    "b200": Gpu(178, 2.25e15),
    "h200": Gpu(139, 9.89e14),
    "h100": Gpu(79, 9.89e14),
    "a100": Gpu(79, 3.12e14),
    "a100-40": Gpu(39, 3.12e14),
    "l40s": Gpu(44, 3.62e14),
    "rtx4090": Gpu(23.5, 1.65e14),
    "v100": Gpu(31, 1.25e14, dtype="fp16", attention="xformers"),
}


def load_args(path: Path) -> TrainArgs:
    """Reads a training YAML whose data and folders need not be there yet.

    Raises:
        UserError: the file cannot be read, or what is wrong with the settings that a plan depends on.
    """
    return read_train_args(path, lambda args: [found for found in args.problems() if found.is_about(*_PLANNED_KEYS)])


def find_model(args: TrainArgs, named: str | None) -> tuple[str, ModelArgs]:
    """The name and the shapes of the model to plan for.

    Args:
        args: of the training.
        named: a folder or a name of KNOWN_MODELS, in place of the YAML's.

    Raises:
        UserError: there is no such folder and no such name.
    """
    wanted = named or args.model_id_or_path
    if wanted.lower() in KNOWN_MODELS:
        return wanted.lower(), KNOWN_MODELS[wanted.lower()]
    if wanted and Path(wanted).is_dir():
        return wanted, load_model_args(Path(wanted))
    key = "--model" if named else "`model_id_or_path`"
    raise UserError(
        f"{key}: there is no folder {wanted!r}. Give --model with the folder of a model, or one of "
        f"{', '.join(KNOWN_MODELS)}."
    )


def memory_rows(training: MemoryConfig, formats: tuple[str, ...], room: float) -> list[dict[str, Any]]:
    """Bytes of every way to store the base and to recompute, and the longest sequence that fits into `room` bytes."""
    rows = []
    for base_dtype in formats:
        if base_dtype != training.base_dtype and not _can_store(base_dtype, training):
            continue
        for checkpoint in CHECKPOINTS:
            setting = dataclasses.replace(training, base_dtype=base_dtype, checkpoint=checkpoint)
            memory = setting.memory()
            row = {"base_dtype": base_dtype, "checkpoint": checkpoint}
            row |= {part: int(getattr(memory, part)) for part in (*_PARTS, "loss")}
            rows.append(row | {"fits": memory.total <= room, "largest_seq_len": largest_seq_len(setting, room)})
    return rows


def _can_store(base_dtype: str, training: MemoryConfig) -> bool:
    try:
        dataclasses.replace(training, base_dtype=base_dtype).memory()
    except UserError:  # its shapes do not fit the format
        return False
    return True


def flops_per_token(model: ModelArgs, seq_len: int, checkpoint: bool | str, trained_share: float) -> float:
    """Operations of LoRA training per position; documents as long as the sequence, so attention takes the most it can.

    Two per weight for the forward pass, two for the input's gradient, and those of what is recomputed.
    """
    head = model.vocab_size * model.dim
    blocks = active_parameters(model) - 2 * head
    experts = model.moe.num_experts_per_tok if model.moe else 1
    feed_forward = model.n_layers * experts * 2 * model.dim * model.hidden_dim
    attention = 4 * model.n_layers * model.n_heads * model.head_dim * (seq_len + 1) / 2
    again = {False: 0.0, "selective": 2 * feed_forward, True: 2 * blocks + attention}
    return 4 * (blocks + head * trained_share) + 3 * attention + again[checkpoint]


def expected(args: TrainArgs, model: ModelArgs, options: argparse.Namespace, checkpoint: bool | str) -> dict[str, Any]:
    """Speed and hours of the run, and what they rest on."""
    tokens = args.max_steps * args.num_microbatches * args.batch_size * args.seq_len * options.gpus
    flops = flops_per_token(model, args.seq_len, checkpoint, options.trained_share)
    if not args.lora.enable:
        flops *= 1.5  # the weights' gradients
    speed, basis = options.tokens_per_second, "as given"
    if speed is None and options.gpu:
        speed = options.gpus * options.mfu * GPUS[options.gpu].peak / flops
        basis = f"an estimate: {options.mfu:.0%} of the {options.gpu}'s 16-bit peak, assumed and not measured"
    return {
        "checkpoint": checkpoint,
        "tokens": None if args.epochs else tokens,
        "flops_per_token": flops,
        "tokens_per_second": speed,
        "basis": basis if speed else "unknown: name the card with --gpu or give --tokens_per_second",
        "hours": tokens / speed / 3600 if speed and not args.epochs else None,
    }


def make_plan(args: TrainArgs, options: argparse.Namespace) -> dict[str, Any]:
    """All that is printed, in bytes, tokens and hours."""
    name, model = find_model(args, options.model)
    gpu = GPUS.get(options.gpu) or Gpu(options.gpu_gb, 0.0)
    dtype = gpu.dtype if args.param_dtype == "auto" else args.param_dtype
    attention = gpu.attention if args.attention == "auto" else args.attention
    training = MemoryConfig.of(args, model, DTYPES[dtype], "cuda", attention, options.gpus, options.trained_share)
    room = (options.gpu_gb or gpu.gb) * _GIB * (1 - RESERVE)
    rows = memory_rows(training, BASE_DTYPES if args.lora.enable else BASE_DTYPES[:1], room)
    own = [row for row in rows if row["base_dtype"] == args.base_dtype]
    chosen = args.checkpoint
    if chosen == "auto":
        chosen = next((row["checkpoint"] for row in own if row["fits"]), True)
    trained, frozen = training.trained_and_frozen()
    return {
        "model": name,
        "parameters": trained + frozen,
        "trained": trained,
        "gpus": options.gpus,
        "gpu_bytes": int((options.gpu_gb or gpu.gb) * _GIB),
        "usable_bytes": int(room),
        "dtype": dtype,
        "attention": attention,
        "base_dtype": args.base_dtype,
        "checkpoint": chosen,
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "hybrid": args.sharding == "hybrid",
        "rough": training.is_approximate,
        "memory": rows,
        "expected": expected(args, model, options, chosen),
    }


def as_text(plan: dict[str, Any]) -> str:
    """The plan as a table for the terminal; `*` marks the YAML's own settings."""
    share = plan["trained"] / plan["parameters"]
    lines = [
        f"{plan['model']}: {plan['parameters']:,} parameters in all, {plan['trained']:,} of them trained ({share:.2%})",
        f"{plan['gpus']} x {plan['gpu_bytes'] / _GIB:.1f} GiB, of which {plan['usable_bytes'] / _GIB:.1f} are planned "
        f"with; {plan['dtype']}, attention: {plan['attention']}, seq_len {plan['seq_len']:,} x {plan['batch_size']}",
        *(["sharding: hybrid: as if all GPUs were in one machine; give --gpus those of one"] * plan["hybrid"]),
        "",
        "GiB per GPU" + (" (roughly: layers keep their inputs)" if plan["rough"] else ""),
        f"  {'base_dtype':10} {'checkpoint':10}" + "".join(f"{part:>12}" for part in _PARTS) + f"{'longest seq':>13}",
    ]
    for row in plan["memory"]:
        cells = "".join(f"{row[part] / _GIB:12.2f}" for part in _PARTS)
        longest = f"{row['largest_seq_len']:,}" if row["largest_seq_len"] else "none"
        mode = str(row["checkpoint"]).lower()
        lines.append(f"{'*' if _is_own(row, plan) else ' '} {row['base_dtype']:10} {mode:10}{cells}{longest:>13}")
    own = next(
        row
        for row in plan["memory"]
        if (row["base_dtype"], row["checkpoint"]) == (plan["base_dtype"], plan["checkpoint"])
    )
    verdict = "fit" if own["fits"] else "do not fit: see which others do, or lower `seq_len` or `batch_size`"
    loss = plan["memory"][0]["loss"] / _GIB
    lines += [
        "",
        f"* the YAML's own settings, which {verdict}.",
        "transient: the most that lives beside what is kept, in a block's backward pass or in the loss (whose chunk of "
        f"logits takes {loss:.2f}).",
        "",
    ]
    return "\n".join(lines + _expected_lines(plan["expected"]))


def _is_own(row: dict[str, Any], plan: dict[str, Any]) -> bool:
    return (row["base_dtype"], row["checkpoint"]) == (plan["base_dtype"], plan["checkpoint"])


def _expected_lines(run: dict[str, Any]) -> list[str]:
    length = (
        f"{run['tokens']:,} tokens"
        if run["tokens"]
        else "as many tokens as `epochs` come to (python -m utils.validate_data counts them)"
    )
    if not run["tokens_per_second"]:
        return [f"The run: {length}. Speed: {run['basis']}."]
    hours = f", {run['hours']:.1f} hours without evaluations" if run["hours"] else ""
    mode = str(run["checkpoint"]).lower()
    return [
        f"The run: {length}{hours}, at {run['tokens_per_second']:,.0f} tokens/s ({run['basis']}).",
        f"With `checkpoint: {mode}` a token takes {run['flops_per_token'] / 1e9:.1f} GFLOP, if documents are as long "
        "as the sequence; shorter ones are faster.",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_yaml", type=Path, required=True)
    parser.add_argument("--model", help="a model's folder or a known name, in place of the YAML's model_id_or_path")
    parser.add_argument("--gpu", choices=GPUS, help="memory, dtype and speed of a known card")
    parser.add_argument("--gpu_gb", type=float, help="memory of a card, GiB (default: the --gpu's, or 80)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the model (default: 1)")
    parser.add_argument("--trained_share", type=float, default=1.0, help="of the positions that carry a loss; 0 to 1")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of the card's peak that is assumed; 0 to 1")
    parser.add_argument("--tokens_per_second", type=float, help="of all GPUs, where it is known")
    parser.add_argument("--json", action="store_true", help="print a JSON object; sizes in bytes")
    return parser


def _options() -> argparse.Namespace:
    options = _parser().parse_args()
    if options.gpu is None and options.gpu_gb is None:
        options.gpu_gb = 80.0
    for name in ("gpus", "gpu_gb", "tokens_per_second", "trained_share", "mfu"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} is {value}; it must be positive.")
        if name in ("trained_share", "mfu") and value > 1:
            raise UserError(f"--{name} is {value}; it is a share, at most 1.")
    return options


def main() -> None:
    options = _options()
    plan = make_plan(load_args(options.train_yaml), options)
    print(json.dumps(plan, indent=2) if options.json else as_text(plan))


if __name__ == "__main__":
    run_cli(main)
