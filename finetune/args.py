"""The training YAML: its keys, their defaults and accepted values, and how it is read.

docs/configuration.md is generated from these classes.
"""

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from model.args import AttentionEngine, BaseDtype, LoraArgs, ParamDtype
from model.errors import Problem, UserError, quoted
from model.settings import (
    Bool,
    Frequency,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PathStr,
    PositiveFloat,
    PositiveFrequency,
    PositiveInt,
    Setting,
    Settings,
    at_most,
    list_settings,
)

from .data.args import DataArgs
from .monitoring.args import MLFlowArgs, WandbArgs
from .redaction import redacted, without_user_info
from .unknown_keys import MAY_HOLD_SECRETS, Leaf, replace_unknown
from .yaml_file import parse_value, read_yaml

_MOST_TOKENS = 1 << 20  # of a sequence
_MOST_STEP_TOKENS = 1 << 27  # of a process: all batches of a step are in memory at once

_FINAL_DIV_FACTOR = 1e4

CheckpointMode = Bool | Literal["selective", "auto"]


ShardedOptimizer = Literal["adamw", "sgd", "adagrad", "rmsprop"]
UnshardedOptimizer = Literal[
    "adafactor",
    "lion",
    "lion8bit",
    "adamw8bit",
    "paged_adamw",
    "paged_adamw8bit",
    "paged_lion",
    "paged_lion8bit",
]
SHARDED_OPTIMIZERS: tuple[str, ...] = get_args(ShardedOptimizer)

# Names that Hugging Face gives to the same optimizers and schedules.
_SYNONYMS = {
    "adamw_hf": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw8bit",
    "lion_32bit": "lion",
    "lion_8bit": "lion8bit",
    "paged_lion_32bit": "paged_lion",
    "paged_lion_8bit": "paged_lion8bit",
    "constant_with_warmup": "constant",
}
_Synonym = BeforeValidator(lambda value: _SYNONYMS.get(value, value) if isinstance(value, str) else value)


@dataclasses.dataclass(frozen=True)
class _Option:
    """A setting that one optimizer or one schedule reads."""

    key: str  # name or schedule
    reader: str  # the value of `key` that reads it
    default: float


_OPTIONS = {
    "momentum": _Option("name", "sgd", 0.9),
    "num_cycles": _Option("schedule", "cosine_with_restarts", 2),
    "power": _Option("schedule", "polynomial", 1.0),
    "factor": _Option("schedule", "reduce_lr_on_plateau", 0.1),
    "patience": _Option("schedule", "reduce_lr_on_plateau", 10),
}


@dataclasses.dataclass
class OptimArgs(Settings):
    """Optimizer and learning-rate schedule: lr / div_factor -> lr -> lr / div_factor / final_div_factor."""

    # optimizer. The first four can be sharded over several processes, the others run on one. Those from `lion` on are
    # of bitsandbytes: `8bit` keeps their state in 8 bits, `paged` in pages that move to host memory when a GPU is full.
    # Hugging Face's names for these, such as `paged_adamw_32bit`, are accepted
    name: Annotated[ShardedOptimizer | UnshardedOptimizer, _Synonym] = "adamw"
    # shape of the learning-rate curve. `onecycle`: PyTorch's OneCycleLR, which for AdamW also varies beta1; the others:
    # that decay (or none) after a linear warm-up, with a beta1 of 0.9. `reduce_lr_on_plateau`: each time that the
    # evaluation loss stops improving
    schedule: Annotated[
        Literal[
            "onecycle",
            "cosine",
            "cosine_with_restarts",
            "linear",
            "polynomial",
            "inverse_sqrt",
            "constant",
            "reduce_lr_on_plateau",
        ],
        _Synonym,
    ] = "onecycle"
    lr: NonNegativeFloat = 1e-4  # highest learning rate. 1e-5 to 6e-5 suit 7B models, 1e-5 in fp16
    # weight decay. Decoupled for AdamW, Lion and Adafactor; `sgd`, `adagrad` and `rmsprop` add it to the gradient
    weight_decay: NonNegativeFloat = 0.1
    pct_start: Annotated[float, Field(ge=0, le=1), Number] = 0.05  # fraction of the steps spent warming up
    div_factor: PositiveFloat = 25.0  # the learning rate starts at `lr` / `div_factor`
    # the learning rate ends at `lr` / `div_factor` / `final_div_factor`. `constant` and `inverse_sqrt` do not read it
    final_div_factor: PositiveFloat = _FINAL_DIV_FACTOR
    momentum: Annotated[float, Field(ge=0, lt=1), Number] | None = None  # momentum of `sgd`. null: 0.9
    num_cycles: PositiveInt | None = None  # how often `cosine_with_restarts` decays. null: 2
    power: PositiveFloat | None = None  # exponent of `polynomial`. null: 1, which is linear
    # what `reduce_lr_on_plateau` multiplies the learning rate by. null: 0.1
    factor: Annotated[float, Field(gt=0, lt=1), Number] | None = None
    # evaluations without improvement that `reduce_lr_on_plateau` tolerates before that. null: 10
    patience: NonNegativeInt | None = None

    def option(self, name: str) -> float:
        """Return the value of a setting that may be null, or the default that null stands for."""
        value: float | None = getattr(self, name)
        return _OPTIONS[name].default if value is None else value

    def problems(self) -> list[Problem]:
        return [
            Problem(
                f"optim.{name}",
                f"`optim.{name}` has no effect: `optim.{option.key}` is {getattr(self, option.key)}, and only "
                f"{option.reader} reads it. Remove it, or set `optim.{option.key}: {option.reader}`.",
            )
            for name, option in _OPTIONS.items()
            if getattr(self, name) is not None and getattr(self, option.key) != option.reader
        ]


@dataclasses.dataclass
class GenerationArgs(Settings):
    """Answers generated greedily during training to a fixed sample of questions, and scored as ICD-10 coding."""

    file: PathStr = ""  # instruct jsonl file with the questions; empty: no generation
    n_samples: PositiveInt = 32  # number of rows to answer, from the start of the file
    max_tokens: Annotated[int, Field(ge=1), Number, at_most(_MOST_TOKENS)] = 256  # longest answer, in tokens
    # number of answers that each process generates at a time
    batch_size: Annotated[int, Field(ge=1), Number, at_most(65_536)] = 16
    # steps between generations, a share of the run such as 0.1, or `epoch`; 0: only before the first step and after the
    # last
    freq: Frequency = 0
    keep_answers: Bool = True  # write the answers to `run_dir`/answers; they may quote notes

    def problems(self) -> list[Problem]:
        if self.file and not os.path.isfile(self.file):
            message = f"`eval_generation.file`: {self.file} does not exist (or is not a file)."
            return [Problem("eval_generation.file", message)]
        return []


@dataclasses.dataclass
class EarlyStoppingArgs(Settings):
    """When to stop early, and the metric that `patience` and `keep_best` compare."""

    # metric to compare. `eval_loss`: lower is better; the others: scores of `eval_generation`. `micro_f1` and
    # `exact_match` ignore the roles of codes, the rest does not
    metric: Literal[
        "eval_loss",
        "micro_f1",
        "exact_match",
        "dp_accuracy",
        "dp_category_accuracy",
        "role_micro_f1",
        "role_exact_match",
        "dr_f1",
        "das_f1",
    ] = "eval_loss"
    patience: NonNegativeInt = 0  # stop after this many evaluations without improvement; 0: never


@dataclasses.dataclass
class GuardArgs(Settings):
    """When to stop a run that goes wrong: non-finite gradients and loss spikes."""

    # stop after this many steps in a row with a non-finite gradient. fp16 needs some to find its loss scale
    max_skipped_steps: PositiveInt = 25
    spike_factor: NonNegativeFloat = 4.0  # report a loss of more than this many times the running median; 0: never
    # number of logged losses in the running median
    spike_window: Annotated[int, Field(ge=10), Number, at_most(1_000_000)] = 100
    stop_on_spike: Bool = False  # stop at a loss spike instead of reporting it

    def problems(self) -> list[Problem]:
        if 0 < self.spike_factor <= 1:
            message = f"`guards.spike_factor` is {self.spike_factor}; expected more than 1, or 0 for no check."
            return [Problem("guards.spike_factor", message)]
        return []


@dataclasses.dataclass
class TrainArgs(Settings):
    """The training YAML."""

    data: DataArgs
    model_id_or_path: PathStr  # folder with params.json and consolidated.safetensors, or a Hugging Face model's folder
    run_dir: PathStr  # folder to create for checkpoints, metrics and logs

    lora: LoraArgs = dataclasses.field(default_factory=LoraArgs)
    optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)
    # what to resume. `never`: nothing; `auto`: the run in `run_dir` if there is one; a folder: this checkpoint
    resume: PathStr = "never"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), Number] = 0  # random seed of adapter weights, data order, dropout
    # number of batches whose gradients are averaged for a step
    num_microbatches: Annotated[int, Field(ge=1), Number, at_most(1_000_000)] = 1
    # how the loss of a step or an evaluation is averaged. `microbatch`: mean of the batches' means; `tokens`: mean over
    # all trained tokens of all batches and processes, so that every token counts the same
    loss_normalization: Literal["microbatch", "tokens"] = "microbatch"
    seq_len: Annotated[int, Field(ge=1), Number, at_most(_MOST_TOKENS)] = 2048  # tokens per packed sequence
    batch_size: Annotated[int, Field(ge=1), Number, at_most(65_536)] = 1  # sequences per process and micro-batch
    max_norm: PositiveFloat = 1.0  # gradients are clipped to this norm
    # length of the run in epochs, such as 3 or 0.5, instead of `max_steps`. An epoch is as many sequences as packing
    # all rows once yields
    epochs: Annotated[PositiveFloat, at_most(1_000_000)] | None = None
    # length of the run in steps. A step sees `num_microbatches` * `batch_size` * `seq_len` tokens per process
    max_steps: PositiveInt = 100
    log_freq: PositiveFrequency = 1  # steps between log lines, a share of the run such as 0.01, or `epoch`

    # steps between checkpoints, a share of the run such as 0.1, or `epoch`: at the end of each; 0: only after the last
    # step
    ckpt_freq: Frequency = 0
    save_adapters: Bool = True  # save the adapter alone; false: the full model, with the adapter merged
    no_ckpt: Bool = False  # save nothing
    num_ckpt_keep: PositiveInt | None = 3  # number of latest checkpoints to keep; null: all

    # steps between evaluations, a share of the run such as 0.1, or `epoch`: at the end of each; 0: only after the last
    # step
    eval_freq: Frequency = 0
    no_eval: Bool = True  # do not evaluate on `data.eval_instruct_data`
    # sequences per process that an evaluation computes at once, a multiple of `batch_size`; null: `batch_size`. It
    # changes speed and memory, not the loss
    eval_batch_size: Annotated[int, Field(ge=1), Number, at_most(65_536)] | None = None

    eval_generation: GenerationArgs = dataclasses.field(default_factory=GenerationArgs)
    early_stopping: EarlyStoppingArgs = dataclasses.field(default_factory=EarlyStoppingArgs)
    # save a checkpoint at each evaluation that improves `early_stopping.metric`; checkpoints/best links to it
    keep_best: Bool = False

    # activation checkpointing: what the backward pass recomputes. `true`: all of each block, for the least memory;
    # `selective`: the feed-forward networks; `false`: nothing; `auto`: the fastest of these that fits in memory
    checkpoint: CheckpointMode = "auto"
    # dtype of computation and of frozen weights. `auto`: bf16 on GPUs from Ampere on, fp16 on older ones; measured on a
    # CPU: bf16 where its products are at least 1.5 times as fast as those in fp32, else fp32
    param_dtype: Literal["auto", ParamDtype] = "auto"
    # multiply fp32 matrices as TF32, which keeps 10 of 23 bits: faster on GPUs from Ampere on. Only `param_dtype: fp32`
    # has such products
    tf32: Bool = False
    # format of the blocks' frozen weights. `same`: that of `param_dtype`; `nf4`: 4 bits, as in QLoRA; `nf4-dq`: with
    # double quantization; `fp8`: 8 bits, and fp8 matrix products on GPUs that have them, from Hopper on
    base_dtype: BaseDtype = "same"
    # attention engine. `auto`: the first of these that runs here, except `cudnn`
    attention: Literal["auto", AttentionEngine] = "auto"
    # compile element-wise operations with torch.compile, which takes about a minute. `auto`: on GPUs
    compile: Bool | Literal["auto"] = "auto"
    # how weights are sharded. `full`: over all processes; `hybrid`: over those of each node, so that only the adapter's
    # gradients cross the network. No difference on a single node
    sharding: Literal["full", "hybrid"] = "full"
    cpu_offload: Bool = False  # keep weights and optimizer in host memory: for small GPUs, slower

    # number of processes, recorded in args.yaml. It has no effect here: set it with torchrun's `--nproc-per-node` and
    # `--nnodes`
    world_size: Int | None = None

    guards: GuardArgs = dataclasses.field(default_factory=GuardArgs)
    wandb: WandbArgs = dataclasses.field(default_factory=WandbArgs)
    mlflow: MLFlowArgs = dataclasses.field(default_factory=MLFlowArgs)

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the settings as plain data, without API keys and without passwords in URLs."""
        plain: dict[str, Any] = without_user_info(super().to_dict(*args, **kwargs))
        return plain

    def problems(self) -> list[Problem]:
        found = [*self._path_problems(), *self._precision_problems(), *self._saving_problems(), *self._size_problems()]
        for field in dataclasses.fields(self):
            if isinstance(block := getattr(self, field.name), Settings):
                found += block.problems()
        return found

    @property
    def acts_each_epoch(self) -> bool:
        """Whether something is done at the end of each epoch, so that its steps must be counted."""
        return "epoch" in (self.log_freq, self.ckpt_freq, self.eval_freq, self.eval_generation.freq)

    def warnings(self, world_size: int | None = None) -> list[str]:
        """Return a sentence for each setting that has no effect.

        Args:
            world_size: number of processes of this run; None: not known.
        """
        found = []
        if self.no_eval and self.data.eval_instruct_data.strip():
            found.append(
                "`data.eval_instruct_data` is not used, because `no_eval` is true (the default): "
                "set `no_eval: false` to evaluate on it."
            )
        if self.no_eval and self.eval_batch_size is not None:
            found.append("`eval_batch_size` is not used, because `no_eval` is true (the default).")
        if self.optim.schedule in ("constant", "inverse_sqrt") and self.optim.final_div_factor != _FINAL_DIV_FACTOR:
            found.append(f"`optim.final_div_factor` has no effect with `optim.schedule: {self.optim.schedule}`.")
        if None not in (self.world_size, world_size) and self.world_size != world_size:
            found.append(
                f"`world_size: {self.world_size}` has no effect: this run has {world_size} processes. "
                "Set their number with torchrun's --nproc-per-node and --nnodes."
            )
        return found

    def _path_problems(self) -> Iterator[Problem]:
        if not self.model_id_or_path.strip():
            yield Problem("model_id_or_path", "`model_id_or_path` is empty; name the folder of a model.")
        elif not os.path.isdir(self.model_id_or_path):
            message = f"`model_id_or_path`: the folder {self.model_id_or_path} does not exist."
            yield Problem("model_id_or_path", message)
        if not self.run_dir.strip():
            yield Problem("run_dir", "`run_dir` is empty; name a folder to create.")
        if self.resume not in ("never", "auto") and not os.path.isdir(self.resume):
            message = f"`resume` is {quoted(self.resume)}; expected never, auto, or the folder of a checkpoint."
            yield Problem("resume", message)

    def _precision_problems(self) -> Iterator[Problem]:
        if self.base_dtype != "same" and not self.lora.enable:
            message = f"`base_dtype: {self.base_dtype}` is for frozen weights, but `lora.enable` is false."
            yield Problem("base_dtype", message)
        elif self.base_dtype != "same" and not self.save_adapters:
            message = (
                f"`base_dtype: {self.base_dtype}` rounds the base, so `save_adapters: false` would save a worse model: "
                "save the adapter and merge it into the base with `python -m utils.merge_lora`."
            )
            yield Problem("base_dtype", message)
        if self.tf32 and self.param_dtype in ("bf16", "fp16"):
            message = (
                f"`tf32: true` is for fp32, but `param_dtype` is {self.param_dtype}, which multiplies in 16 bits: "
                "remove `tf32`."
            )
            yield Problem("tf32", message)
        if self.cpu_offload and self.optim.name not in SHARDED_OPTIMIZERS:
            message = (
                f"`cpu_offload: true` needs `optim.name: adamw`, or another of {', '.join(SHARDED_OPTIMIZERS)}; "
                f"{self.optim.name} cannot update parameters in host memory."
            )
            yield Problem("cpu_offload", message)

    def _size_problems(self) -> Iterator[Problem]:
        if (tokens := self.num_microbatches * self.batch_size * self.seq_len) > _MOST_STEP_TOKENS:
            message = (
                f"`num_microbatches` * `batch_size` * `seq_len` is {tokens:,} tokens per step and process; expected at "
                f"most {_MOST_STEP_TOKENS:,}."
            )
            yield Problem("num_microbatches", message)

        if self.eval_batch_size is not None and self.eval_batch_size % self.batch_size:
            message = (
                f"`eval_batch_size` is {self.eval_batch_size}; expected a multiple of `batch_size`, which is "
                f"{self.batch_size}: the evaluation loss is the mean of batches of that size."
            )
            yield Problem("eval_batch_size", message)

    def _saving_problems(self) -> Iterator[Problem]:
        if self.save_adapters and not self.lora.enable and not self.no_ckpt:
            message = (
                "`save_adapters` is true but `lora.enable` is false: there is no adapter to save. "
                "Set `save_adapters: false` to save the full weights."
            )
            yield Problem("save_adapters", message)
        if not self.no_eval and not self.data.eval_instruct_data.strip():
            message = "`no_eval` is false but `data.eval_instruct_data` is empty: name data or set `no_eval: true`."
            yield Problem("no_eval", message)
        metric = self.early_stopping.metric
        if self.keep_best or self.early_stopping.patience > 0:
            if metric == "eval_loss" and self.no_eval:
                message = "`keep_best` or `early_stopping` compares eval_loss, but `no_eval` is true."
                yield Problem("keep_best", message)
            if metric != "eval_loss" and not self.eval_generation.file:
                message = f"`early_stopping.metric` is {metric} but `eval_generation.file` is empty."
                yield Problem("early_stopping.metric", message)
        if self.optim.schedule == "reduce_lr_on_plateau" and (self.no_eval or not self.eval_freq):
            found = (
                "`no_eval` is true" if self.no_eval else "`eval_freq` is 0, which evaluates after the last step only"
            )
            message = f"`optim.schedule: reduce_lr_on_plateau` needs the evaluation loss, but {found}. Set "
            message += "`no_eval: false`, `eval_freq` and `data.eval_instruct_data`, or choose another schedule."
            yield Problem("optim.schedule", message)
        if self.keep_best and self.no_ckpt:
            yield Problem("keep_best", "`keep_best` and `no_ckpt` are both true: there is no checkpoint to keep.")


# ---- Reading

_PLAIN_NUMBER = "Write a plain decimal number, such as 10 or 0.5"  # not `010`, `0b101`, `1:30` or `0,5`
_MAX_LISTED = 50  # problems in one message
_PLACEHOLDER = re.compile(r"\{(\w*)\}")  # in `run_dir`
_OTHER_LENGTH = {"epochs": "max_steps", "max_steps": "epochs"}  # only one of the two may be set


def load_train_args(path: Path, overrides: Sequence[str] = ()) -> TrainArgs:
    """Read a training YAML and check that it can be trained on here.

    Args:
        path: the file.
        overrides: `KEY=VALUE` strings that replace settings of the file.

    Raises:
        UserError: the file cannot be read, or the settings have problems; all of them are in one message.
    """
    return read_train_args(path, TrainArgs.problems, overrides)


def read_train_args(
    path: Path, find_problems: Callable[[TrainArgs], list[Problem]] = lambda args: [], overrides: Sequence[str] = ()
) -> TrainArgs:
    """Read a training YAML.

    Args:
        path: the file.
        find_problems: returns what is wrong with settings that are valid one by one.
        overrides: `KEY=VALUE` strings that replace settings of the file.

    Raises:
        UserError: the file cannot be read, or the settings have problems; all of them are in one message.
    """
    problems: list[Problem] = []
    leaves, known_keys = replace_unknown(_overridden(read_yaml(path), overrides), known_settings(), problems)
    raw = _nested(leaves, problems)
    if raw.get("epochs") is not None and "max_steps" in raw:
        message = "`epochs` and `max_steps` both set the length of the run; give one of them."
        problems.append(Problem("epochs", message))
    args = _convert(raw, problems)
    try:
        args.run_dir = _name_run_dir(args, path)
    except UserError as error:
        problems.append(Problem("run_dir", str(error)))
    # A missing or invalid key has been reported; what _convert put in its place may be a problem, too.
    reported = {problem.key for problem in problems}
    problems += [problem for problem in find_problems(args) if not problem.is_about(*reported)]
    if problems:
        lines = [problem.message for problem in problems[:_MAX_LISTED]]
        if len(problems) > _MAX_LISTED:
            lines.append(f"... and {len(problems) - _MAX_LISTED:,} more")
        if Path(args.model_id_or_path).parts[:1] == ("demo",) and not os.path.isdir(args.model_id_or_path):
            known_keys.append("`make demo` creates the folder demo, with its model and data.")
        raise UserError("\n".join([f"{path} cannot be used:", *(f"  - {line}" for line in lines), *known_keys]))
    return args


@functools.cache
def known_settings() -> dict[str, Setting]:
    """Return every setting of the training YAML by its dotted key."""
    return list_settings(TrainArgs)


def _overridden(raw: dict[str, Any], overrides: Iterable[str]) -> list[Leaf]:
    """Return the keys and values of a file, replaced by those of `KEY=VALUE` strings.

    Raises:
        UserError: an override is not `KEY=VALUE`.
    """
    new: list[Leaf] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"`{override}` is not a setting; expected KEY=VALUE, such as optim.lr=1e-4.")
        # `{name}` is a placeholder here; only blocks have keys in braces.
        is_text = text.lstrip().startswith("{") and key in known_settings() and not known_settings()[key].is_block
        try:
            new += _leaves({key: text if is_text else parse_value(text)})
        except UserError as error:
            raise UserError(f"`{key}=...` cannot be used: {error}.") from None
    replaced = [path for path, _ in new]
    replaced += [(_OTHER_LENGTH[path[0]],) for path, value in new if path[0] in _OTHER_LENGTH and value is not None]
    return [leaf for leaf in _leaves(raw) if not any(leaf[0][: len(path)] == path for path in replaced)] + new


def _nested(leaves: Iterable[Leaf], problems: list[Problem]) -> dict[str, Any]:
    """Turn dotted keys into blocks: `wandb.project: x` is `project: x` inside `wandb:`, at any depth."""
    nested: dict[str, Any] = {}
    for path, value in leaves:
        *blocks, name = path
        block = nested
        key = ".".join(path)
        for index, outer in enumerate(blocks, 1):
            inner = block.setdefault(outer, {})
            setting = known_settings().get(".".join(blocks[:index]))
            if not isinstance(inner, dict) and setting and not setting.is_block:
                message = f"`{key}` is given, and `{'.'.join(blocks[:index])}` as a value; give one of them."
                problems.append(Problem(key, message))
            block = inner if isinstance(inner, dict) else {}  # a value in place of a block is reported by _convert
        if name in block:
            problems.append(Problem(key, f"`{key}` is given twice; give it once."))
        is_empty_block = value is None and key in known_settings() and known_settings()[key].is_block
        block[name] = {} if is_empty_block else value
    return nested


def _leaves(raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    for key, value in raw.items():
        inner = (*path, *key.split("."))
        if isinstance(value, dict) and value:
            yield from _leaves(value, inner)
        else:
            yield inner, value


def _name_run_dir(args: TrainArgs, config: Path) -> str:
    """Return `run_dir` with its placeholders replaced, unless it exists as it is written.

    `{date}` and `{time}` are those of now, as 2026-01-31 and 23-59-59; `{name}` is `wandb.run_name` or else the file
    name of the configuration without its ending; `{seed}` is `seed`.

    Raises:
        UserError: there is no such placeholder, or `resume: auto` could not find the folder again.
    """
    pattern = args.run_dir
    if os.path.lexists(pattern):
        return pattern
    values = {"date": time.strftime("%Y-%m-%d"), "time": time.strftime("%H-%M-%S")}
    values |= {"name": args.wandb.run_name or config.stem, "seed": str(args.seed)}
    used = _PLACEHOLDER.findall(pattern)
    if unknown := [name for name in used if name not in values]:
        raise UserError(
            f"`run_dir` contains {{{unknown[0]}}}; expected one of {', '.join(f'{{{name}}}' for name in values)}."
        )
    if args.resume == "auto" and (changing := [name for name in used if name in ("date", "time")]):
        raise UserError(
            f"`run_dir` contains {{{changing[0]}}}, so that `resume: auto` would start another run instead of resuming "
            "this one; leave it out, or set `resume` to the folder of the run to resume."
        )
    return _PLACEHOLDER.sub(lambda match: values[match[1]], pattern)


@functools.cache
def settings_adapter() -> TypeAdapter[TrainArgs]:
    """Return what converts YAML values to settings; building it takes a tenth of a second."""
    return TypeAdapter(TrainArgs)


def _convert(raw: dict[str, Any], problems: list[Problem]) -> TrainArgs:
    """Convert YAML values to settings, and add what is wrong to `problems`.

    Invalid values are replaced by their defaults, or by empty ones, so that the other settings can be checked, too.
    """
    adapter = settings_adapter()
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        found = _describe(error, raw)
    problems += found
    for problem in found:
        _remove(raw, problem.key.split("."))
    return adapter.validate_python({"data": {}, "model_id_or_path": "", "run_dir": ""} | raw)


def _remove(raw: Any, path: list[str]) -> None:
    *blocks, name = path
    for key in blocks:
        raw = raw.get(key, {})
    raw.pop(name, None)


def _describe(error: ValidationError, raw: dict[str, Any]) -> list[Problem]:
    found: dict[Problem, None] = {}  # without duplicates: pydantic reports each alternative of a union
    details = error.errors(include_url=False, include_input=False)
    # An alternative that gives a reason of its own hides the others.
    specific = {_key(detail["loc"]) for detail in details if _reason(detail)}
    for detail in details:
        key, reason = _key(detail["loc"]), _reason(detail)
        if key in specific and not reason:
            continue
        value: Any = raw
        for name in key.split("."):
            value = value.get(name)
        indices = [part for part in detail["loc"] if isinstance(part, int)]
        for index in indices:
            value = value[index]
        setting = known_settings()[key]
        expected = reason or f"expected {setting.expected}"
        about = "" if setting.is_block else f" ({setting.description.partition('. ')[0]})"
        if detail["type"] == "missing":
            message = f"`{key}` is missing; it must be given{about}."
        else:
            if isinstance(value, str) and value.lstrip("+-")[:1].isdecimal() and "number" in setting.expected:
                about += "" if reason else f". {_PLAIN_NUMBER}"
            message = f"`{key}` {'contains' if indices else 'is'} {_shown(key, value)}; {expected}{about}."
        found[Problem(key, message)] = None
    return list(found)


def _key(location: Iterable[str | int]) -> str:
    """Return the setting at a location of pydantic's, which continues with indices and alternatives of a union."""
    key = ""
    for part in location:
        if (longer := f"{key}.{part}".lstrip(".")) in known_settings():
            key = longer
    return key


def _reason(detail: ErrorDetails) -> str | None:
    """Return what is expected if it is more than the setting's description says."""
    if detail["type"] == "undefined_variable":
        return f"expected a path, but {detail['msg']}"
    if detail["type"] == "ambiguous":
        return f"expected {detail['msg']}"
    key = _key(detail["loc"])
    if detail["type"] == "less_than_equal" and "between" not in known_settings()[key].expected:
        return f"expected at most {detail['ctx']['le']:,}"  # of model.settings.at_most
    return None


def _shown(key: str, value: Any) -> str:
    nested = key.startswith("wandb.") and isinstance(value, dict | list)  # `key` with the wrong indentation
    is_hidden = nested or key in MAY_HOLD_SECRETS
    if value is None:
        return "empty (null)"
    return f"{type(value).__name__} (not shown)" if is_hidden else quoted(redacted(value))
