"""The training YAML: every key, its default, and what is refused."""

import contextlib
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simple_parsing.helpers import Serializable

from model.args import ATTENTION_ENGINES, BASE_DTYPES, PARAM_DTYPES, LoraArgs
from model.errors import Problem, UserError, quoted

from .data.args import DataArgs
from .monitoring.args import MLFlowArgs, WandbArgs
from .yaml_file import read_yaml

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("onecycle", "cosine", "linear", "constant")
LOSS_NORMALIZATIONS = ("microbatch", "tokens")
CHECKPOINT_MODES = ("selective", "auto")  # beside true and false
SHARDINGS = ("full", "hybrid")


@dataclasses.dataclass
class OptimArgs(Serializable):
    """AdamW, whose rate goes lr / div_factor -> lr -> lr / div_factor / final_div_factor."""

    name: str = "adamw"  # or adamw8bit: bitsandbytes' AdamW, whose moments take 2 bytes a parameter in place of 8
    schedule: str = "onecycle"  # PyTorch's OneCycleLR, which moves beta1 too; or, behind a straight warm-up and with a
    # beta1 of 0.9 throughout, the way down from lr: cosine, linear, or constant (none)
    lr: float = 1e-4  # highest learning rate; 1e-5 to 6e-5 suit 7B models, 1e-5 in fp16
    weight_decay: float = 0.1
    pct_start: float = 0.05  # share of the steps spent warming up, 0 to 1
    div_factor: float = 25.0  # lr / div_factor is the first step's rate; at least 1
    final_div_factor: float = 1e4  # the first rate / final_div_factor is the last step's

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        found = []
        if self.name not in OPTIMIZERS:
            found.append(
                Problem("optim.name", f"`optim.name` is {quoted(self.name)}; expected {', '.join(OPTIMIZERS)}.")
            )
        if self.schedule not in SCHEDULES:
            found.append(
                Problem(
                    "optim.schedule", f"`optim.schedule` is {quoted(self.schedule)}; expected {', '.join(SCHEDULES)}."
                )
            )
        if not 0 <= self.pct_start <= 1:
            found.append(
                Problem(
                    "optim.pct_start",
                    f"`optim.pct_start` is {self.pct_start}; it is a share of the steps, between 0 and 1.",
                )
            )
        if not self.lr >= 0:
            found.append(Problem("optim.lr", f"`optim.lr` is {self.lr}; it cannot be negative."))
        if not self.weight_decay >= 0:
            found.append(
                Problem("optim.weight_decay", f"`optim.weight_decay` is {self.weight_decay}; it cannot be negative.")
            )
        for key in ("div_factor", "final_div_factor"):
            if not getattr(self, key) > 0:
                found.append(Problem(f"optim.{key}", f"`optim.{key}` is {getattr(self, key)}; it must be positive."))
        return found


@dataclasses.dataclass
class GenerationArgs(Serializable):
    """Answers written during training, greedily, to a fixed sample of questions, and scored as ICD-10 coding."""

    file: str = ""  # instruct jsonl; unset: no generation
    n_samples: int = 32  # its first rows
    max_tokens: int = 256  # longest answer
    batch_size: int = 16  # answers written at a time on each process
    freq: int = 0  # steps between; 0: only before the first step and after the last
    keep_answers: bool = True  # write them to run_dir/answers; they may quote notes

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        found = []
        if self.file and not os.path.isfile(self.file):
            found.append(
                Problem("eval_generation.file", f"`eval_generation.file`: {self.file} does not exist (or is no file).")
            )
        for key in ("n_samples", "max_tokens", "batch_size"):
            if getattr(self, key) < 1:
                found.append(
                    Problem(
                        f"eval_generation.{key}",
                        f"`eval_generation.{key}` is {getattr(self, key)}; it must be at least 1.",
                    )
                )
        if self.freq < 0:
            found.append(
                Problem("eval_generation.freq", f"`eval_generation.freq` is {self.freq}; it must be 0 or more.")
            )
        return found


@dataclasses.dataclass
class EarlyStoppingArgs(Serializable):
    """What "better" means, for `patience` and `keep_best`."""

    metric: str = "eval_loss"  # eval_loss (lower is better), micro_f1 or exact_match (of eval_generation)
    patience: int = 0  # stop after so many evaluations without a better one; 0: never

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        found = []
        if self.metric not in METRICS:
            found.append(
                Problem(
                    "early_stopping.metric",
                    f"`early_stopping.metric` is {self.metric!r}; expected {', '.join(METRICS)}.",
                )
            )
        if self.patience < 0:
            found.append(
                Problem(
                    "early_stopping.patience",
                    f"`early_stopping.patience` is {self.patience}; it must be 0 (never stop) or more.",
                )
            )
        return found


@dataclasses.dataclass
class GuardArgs(Serializable):
    """When a run that goes wrong is stopped."""

    max_skipped_steps: int = 25  # in a row, whose gradient is not finite; fp16 needs some to find its loss scale
    spike_factor: float = 4.0  # a loss so many times the running median is reported; 0: never
    spike_window: int = 100  # logged losses the median is taken of
    stop_on_spike: bool = False  # stop there, instead of reporting it

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        found = []
        if self.max_skipped_steps < 1:
            found.append(
                Problem(
                    "guards.max_skipped_steps",
                    f"`guards.max_skipped_steps` is {self.max_skipped_steps}; it must be at least 1.",
                )
            )
        if self.spike_factor and self.spike_factor <= 1:
            found.append(
                Problem(
                    "guards.spike_factor",
                    f"`guards.spike_factor` is {self.spike_factor}; it must be more than 1, or 0 for no guard.",
                )
            )
        if self.spike_window < 10:
            found.append(
                Problem("guards.spike_window", f"`guards.spike_window` is {self.spike_window}; it must be at least 10.")
            )
        return found


_LONGEST_KEY = 100  # characters of an unknown key that a message quotes
_MAX_NAMED = 50  # problems in one message
_SECRETS = ("wandb", "wandb.key")  # where a key may stand, put there rightly or by mistake; never quoted
METRICS = ("eval_loss", "micro_f1", "exact_match")


@dataclasses.dataclass
class TrainArgs(Serializable):
    data: DataArgs
    model_id_or_path: str  # folder with params.json and consolidated.safetensors (or consolidated.00.pth)
    run_dir: str  # folder to create for checkpoints, metrics and logs

    optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)
    resume: str = "never"  # never; auto: go on with the run in run_dir where there is one; or a checkpoint's folder
    seed: int = 0  # adapter initialisation, data order, dropout; 0 to 2**32 - 1
    num_microbatches: int = 1  # batches whose gradients are averaged before a step
    loss_normalization: str = "microbatch"  # what a step's and an evaluation's loss is: the mean of the batches' means,
    # or, with tokens, the mean over all trained tokens of all batches and processes, so that each counts the same
    seq_len: int = 2048  # tokens per packed sequence
    batch_size: int = 1  # sequences per process and micro-batch
    max_norm: float = 1.0  # the gradient's norm is clipped to this
    epochs: float | None = None  # in place of max_steps: so often as many sequences as it takes to pack every row once
    max_steps: int = 100  # tokens seen: max_steps * num_microbatches * batch_size * seq_len * processes
    log_freq: int = 1  # steps between log lines

    ckpt_freq: int = 0  # steps between checkpoints; 0: only after the last step
    save_adapters: bool = True  # checkpoints hold the adapter alone; false: adapter merged into the base
    no_ckpt: bool = False  # save nothing
    num_ckpt_keep: int | None = 3  # newest checkpoints to keep; null: all

    eval_freq: int = 0  # steps between evaluations; 0: only after the last step
    no_eval: bool = True

    eval_generation: GenerationArgs = dataclasses.field(default_factory=GenerationArgs)
    early_stopping: EarlyStoppingArgs = dataclasses.field(default_factory=EarlyStoppingArgs)
    keep_best: bool = False  # save the best model at each evaluation that finds one; checkpoints/best points at it

    # What the backward pass computes anew instead of keeping it. true: all of each block, for the least memory;
    # selective: the feed-forward networks; false: nothing; auto: the fastest of these that fits
    checkpoint: bool | str = True
    param_dtype: str = "auto"  # auto, bf16, fp16 or fp32; auto: bf16 from Ampere on, fp16 before, fp32 on CPU
    # How the blocks' frozen weights are stored: same (as param_dtype), nf4 (4 bits, as QLoRA), nf4-dq (its scales
    # quantised, too) or fp8 (8 bits; also multiplied in fp8 where the card can, from Hopper on)
    base_dtype: str = "same"
    attention: str = "auto"  # auto, xformers, varlen or sdpa; auto takes the first that runs on the card
    compile: bool = False  # torch.compile what lies between matrix products: pays in long runs, starts a minute later
    sharding: str = "full"  # full: the processes of all machines hold one model together; hybrid: those of each machine
    # do, so that weights do not cross the network, only the adapter's gradients. On one machine there is no difference
    cpu_offload: bool = False  # weights and optimizer in host memory: smaller GPUs, slower steps; nothing on a CPU

    world_size: int | None = None  # set by the launcher and recorded in args.yaml; read from there, never from here

    guards: GuardArgs = dataclasses.field(default_factory=GuardArgs)
    wandb: WandbArgs = dataclasses.field(default_factory=WandbArgs)
    mlflow: MLFlowArgs = dataclasses.field(default_factory=MLFlowArgs)
    lora: LoraArgs = dataclasses.field(default_factory=LoraArgs)

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; looks at paths, reads no weights and no rows."""
        found = []
        for key in ("seq_len", "batch_size", "num_microbatches", "max_steps", "log_freq"):
            if getattr(self, key) < 1:
                found.append(Problem(f"{key}", f"`{key}` is {getattr(self, key)}; it must be at least 1."))
        for key in ("ckpt_freq", "eval_freq"):
            if getattr(self, key) < 0:
                found.append(
                    Problem(
                        f"{key}", f"`{key}` is {getattr(self, key)}; it must be 0 (only after the last step) or more."
                    )
                )
        if self.num_ckpt_keep is not None and self.num_ckpt_keep < 1:
            found.append(
                Problem(
                    "num_ckpt_keep",
                    f"`num_ckpt_keep` is {self.num_ckpt_keep}; it must be at least 1, or null to keep all.",
                )
            )
        if self.epochs is not None and not self.epochs > 0:
            found.append(Problem("epochs", f"`epochs` is {self.epochs}; it must be positive."))
        if not self.max_norm > 0:
            found.append(Problem("max_norm", f"`max_norm` is {self.max_norm}; it must be positive."))
        if not 0 <= self.seed < 2**32:
            found.append(Problem("seed", f"`seed` is {self.seed}; it must lie between 0 and 2**32 - 1."))
        if self.loss_normalization not in LOSS_NORMALIZATIONS:
            expected = ", ".join(LOSS_NORMALIZATIONS)
            found.append(
                Problem(
                    "loss_normalization",
                    f"`loss_normalization` is {quoted(self.loss_normalization)}; expected {expected}.",
                )
            )
        if self.param_dtype != "auto" and self.param_dtype not in PARAM_DTYPES:
            found.append(
                Problem(
                    "param_dtype", f"`param_dtype` is {self.param_dtype!r}; expected auto, {', '.join(PARAM_DTYPES)}."
                )
            )
        if self.base_dtype not in BASE_DTYPES:
            found.append(
                Problem("base_dtype", f"`base_dtype` is {quoted(self.base_dtype)}; expected {', '.join(BASE_DTYPES)}.")
            )
        elif self.base_dtype != "same" and not self.lora.enable:
            found.append(
                Problem(
                    "base_dtype", f"`base_dtype: {self.base_dtype}` is for frozen weights, but `lora.enable` is false."
                )
            )
        elif self.base_dtype != "same" and not self.save_adapters:
            found.append(
                Problem(
                    "base_dtype",
                    f"`base_dtype: {self.base_dtype}` rounds the base, so `save_adapters: false` would save a worse "
                    "model: save the adapter and merge it into the base with `python -m utils.merge_lora`.",
                )
            )
        if self.attention != "auto" and self.attention not in ATTENTION_ENGINES:
            found.append(
                Problem(
                    "attention", f"`attention` is {self.attention!r}; expected auto, {', '.join(ATTENTION_ENGINES)}."
                )
            )
        if isinstance(self.checkpoint, str) and self.checkpoint not in CHECKPOINT_MODES:
            found.append(
                Problem(
                    "checkpoint", f"`checkpoint` is {quoted(self.checkpoint)}; expected true, false, selective or auto."
                )
            )
        if self.sharding not in SHARDINGS:
            found.append(
                Problem("sharding", f"`sharding` is {quoted(self.sharding)}; expected {', '.join(SHARDINGS)}.")
            )
        if self.cpu_offload and self.optim.name == "adamw8bit":
            found.append(
                Problem(
                    "cpu_offload",
                    "`cpu_offload: true` needs `optim.name: adamw`; adamw8bit keeps its state on the GPU.",
                )
            )
        if self.save_adapters and not self.lora.enable and not self.no_ckpt:
            found.append(
                Problem(
                    "save_adapters",
                    "`save_adapters` is true but `lora.enable` is false: there is no adapter to save. "
                    "Set `save_adapters: false` to save the full weights.",
                )
            )
        if not self.no_eval and not self.data.eval_instruct_data.strip():
            found.append(
                Problem(
                    "no_eval",
                    "`no_eval` is false but `data.eval_instruct_data` is empty: name data or set `no_eval: true`.",
                )
            )
        if not os.path.isdir(self.model_id_or_path):
            found.append(
                Problem("model_id_or_path", f"`model_id_or_path`: the folder {self.model_id_or_path} does not exist.")
            )
        if not self.run_dir.strip():
            found.append(Problem("run_dir", "`run_dir` is empty; name a folder to create."))
        if self.resume not in ("never", "auto") and not Path(self.resume).is_dir():
            found.append(
                Problem("resume", f"`resume` is {self.resume!r}; expected never, auto, or the folder of a checkpoint.")
            )
        found += self._evaluation_problems()
        blocks = (self.data, self.optim, self.lora, self.wandb, self.mlflow)
        for block in (*blocks, self.eval_generation, self.early_stopping, self.guards):
            found += block.problems()
        return found

    def remarks(self) -> list[str]:
        """Says what is given in vain, one sentence each."""
        if self.no_eval and self.data.eval_instruct_data.strip():
            return [
                "`data.eval_instruct_data` is not used, since `no_eval` is true (the default): "
                "set `no_eval: false` to evaluate on it."
            ]
        return []

    def _evaluation_problems(self) -> list[Problem]:
        found = []
        metric = self.early_stopping.metric
        if self.keep_best or self.early_stopping.patience > 0:
            if metric == "eval_loss" and self.no_eval:
                found.append(
                    Problem("keep_best", "`keep_best` or `early_stopping` goes by eval_loss, but `no_eval` is true.")
                )
            if metric in METRICS[1:] and not self.eval_generation.file:
                found.append(
                    Problem(
                        "early_stopping.metric",
                        f"`early_stopping.metric` is {metric} but `eval_generation.file` is empty.",
                    )
                )
        if self.keep_best and self.no_ckpt:
            found.append(Problem("keep_best", "`keep_best` is true but `no_ckpt` is too: there is nothing to keep."))
        return found


def load_train_args(path: Path) -> TrainArgs:
    """Reads a training YAML and checks that it can be trained on here.

    Raises:
        UserError: the file cannot be read, or everything that is wrong with it, in one message.
    """
    return read_train_args(path, TrainArgs.problems)


def read_train_args(path: Path, find_problems: Callable[[TrainArgs], list[Problem]] = lambda args: []) -> TrainArgs:
    """Reads a training YAML; what else is wrong with the settings is for `find_problems` to say.

    Raises:
        UserError: the file cannot be read, or every unknown, missing or mistyped key in one message.
    """
    problems: list[Problem] = []
    raw = _nested(read_yaml(path), problems)
    if raw.get("epochs") is not None and "max_steps" in raw:
        problems.append(Problem("epochs", "`epochs` and `max_steps` both say how long the run is; give one of them."))
    args = _build(TrainArgs, raw, "", problems)
    # What stands in for a key that is missing or faulty may be wrong, too: that key has been named already.
    named = {problem.key for problem in problems}
    problems += [problem for problem in find_problems(args) if not problem.is_about(*named)]
    if problems:
        more = [f"... and {len(problems) - _MAX_NAMED:,} more"] if len(problems) > _MAX_NAMED else []
        listed = "\n".join(f"  - {line}" for line in [*(problem.message for problem in problems[:_MAX_NAMED]), *more])
        raise UserError(f"{path} cannot be used:\n{listed}")
    return args


def _nested(raw: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """`wandb.project: x` means the same as `project: x` inside `wandb:`, at any depth; who says both is told so."""
    nested: dict[str, Any] = {}
    for path, value in _leaves(raw):
        *blocks, name = path
        block = nested
        for key in blocks:
            inner = block.setdefault(key, {})
            block = inner if isinstance(inner, dict) else {}  # what is no block is reported where it is built
        if name in block:
            key = ".".join(path)
            problems.append(Problem(key, f"`{key}` is given twice; give it once."))
        block[name] = value
    return nested


def _leaves(raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in raw.items():
        inner = (*path, *key.split("."))
        if isinstance(value, dict) and value:
            yield from _leaves(value, inner)
        else:
            yield inner, value


def _build(cls: type, raw: Any, prefix: str, problems: list[Problem]) -> Any:
    """Builds a dataclass from YAML values, converting texts and numbers where nothing is lost.

    Adds one sentence per fault to `problems`. A default, or an empty value where there is none, stands in for a faulty
    value or a missing one, so that the others are checked too. A block without keys has its defaults.
    """
    if not isinstance(raw, dict | None):
        name = prefix.rstrip(".")
        problems.append(Problem(name, f"`{name}` is {_shown(name, raw)}; expected a block of keys."))
    raw = raw if isinstance(raw, dict) else {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in fields:
            problems.append(Problem(prefix + key, _unknown(prefix, key, list(fields))))
    values = {}
    for name, field in fields.items():
        if name in raw:
            value = _convert(hints[name], raw[name], prefix + name, problems)
            if value is not None or _is_optional(hints[name]):
                values[name] = value
        elif _is_required(field):
            problems.append(Problem(prefix + name, f"`{prefix}{name}` is missing; it must be given."))
        if name not in values and _is_required(field):
            values[name] = hints[name]()
    return cls(**values)


def _unknown(prefix: str, key: str, known: list[str]) -> str:
    if close := difflib.get_close_matches(key, known, n=1):
        return f"`{prefix}{key}` is no setting; did you mean `{close[0]}`?"
    # `key:0123` without a blank is a key, too.
    what = f"A key of `{prefix.rstrip('.')}`" if prefix.rstrip(".") in _SECRETS else f"`{prefix}{key[:_LONGEST_KEY]}`"
    return f"{what} is no setting; expected one of {', '.join(sorted(known))}."


def _shown(name: str, value: Any) -> str:
    return f"{type(value).__name__} (not shown)" if name in _SECRETS and value is not None else quoted(value)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _convert(hint: Any, value: Any, name: str, problems: list[Problem]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.", problems)
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in hints:
        return None
    expected = [option for option in hints if option is not type(None)]
    for option in expected:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return _CONVERTERS[option](value)
    kinds = " or ".join(_EXPECTED[kind] for kind in expected)
    problems.append(Problem(name, f"`{name}` is {_shown(name, value)}; expected {kinds}."))
    return None


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise ValueError


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)  # also of a text: YAML 1.1 reads 1e-4, without a dot, as one
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError
    return number


def _to_int(value: Any) -> int:
    number = _to_float(value)
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, int) else int(number)


def _to_str(value: Any) -> str:
    if isinstance(value, bool | dict | list) or value is None:
        raise ValueError
    text = str(value)
    text.encode()  # half of a surrogate pair is no character
    if "\0" in text:
        raise ValueError
    return text


def _to_texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError
    return [_to_str(item) for item in value]


_CONVERTERS = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str, list[str]: _to_texts}
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of texts",
}
