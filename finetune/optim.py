"""Optimizers of PyTorch and bitsandbytes: which there are, how they are built, and the memory of their state."""

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop

from model.errors import UserError, first_line

from .args import SHARDED_OPTIMIZERS, OptimArgs
from .schedules import Plan, Schedule, build_schedule

logger = logging.getLogger("optim")

_FP32 = 4  # bytes
_EIGHT_BIT_SIZE = 4096  # elements from which bitsandbytes keeps a state in 8 bits
_NOT_PAGED = "Paged optimizers are not supported on CPU"  # a warning of bitsandbytes

Parameters = list[torch.nn.Parameter]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One value of `optim.name`."""

    build: Callable[[Parameters, OptimArgs], Optimizer]
    state_bytes: float  # per trained parameter


_ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


def _bitsandbytes(kind: str, **options: Any) -> Callable[[Parameters, OptimArgs], Optimizer]:
    """Return how to build an optimizer of bitsandbytes, with its whole state in separate tensors for checkpoints."""

    def build(parameters: Parameters, args: OptimArgs) -> Optimizer:
        settings = {"lr": args.lr, "weight_decay": args.weight_decay} | options
        optimizer = getattr(_import_bitsandbytes(args.name).optim, kind)(parameters, **settings)
        optimizer.non_castable_tensor_keys = set()  # so that state_dict() does not nest these tensors in another dict
        optimizer.register_state_dict_post_hook(_without_maps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NOT_PAGED)  # check_optimizer has reported it
            for group_index, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    optimizer.init_state(group, parameter, group_index, index)
                    optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.int64)  # bitsandbytes sets an int
        # Else its first step would move the step counts to the GPU, and every step would wait for them.
        optimizer.initialized = True
        return optimizer

    return build


def _plain(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """Return a class of PyTorch's optimizers without the wrappers that torch.compile needs around its methods.

    They have no effect outside of a compiled function, but import the compiler, seconds of a run's start.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


def _pytorch(kind: type[Optimizer], **options: Any) -> Callable[[Parameters, OptimArgs], Optimizer]:
    """Return how to build an optimizer of PyTorch."""
    plain = _plain(kind)
    return lambda parameters, args: plain(parameters, lr=args.lr, weight_decay=args.weight_decay, **options)


def _sgd(parameters: Parameters, args: OptimArgs) -> Optimizer:
    return _pytorch(SGD, momentum=args.option("momentum"))(parameters, args)


_CHOICES = {
    # Fused: on a CPU 3 to 6 times as fast as PyTorch's default, which updates one tensor at a time.
    "adamw": _Choice(_pytorch(AdamW, fused=True, **_ADAM), 2 * _FP32),
    "sgd": _Choice(_sgd, _FP32),
    "adagrad": _Choice(_pytorch(Adagrad), _FP32),
    "rmsprop": _Choice(_pytorch(RMSprop), _FP32),
    "adafactor": _Choice(_pytorch(Adafactor), _FP32),
    "adamw8bit": _Choice(_bitsandbytes("AdamW8bit", **_ADAM), 2),
    "paged_adamw": _Choice(_bitsandbytes("PagedAdamW32bit", **_ADAM), 2 * _FP32),
    "paged_adamw8bit": _Choice(_bitsandbytes("PagedAdamW8bit", **_ADAM), 2),
    "lion": _Choice(_bitsandbytes("Lion32bit"), _FP32),
    "lion8bit": _Choice(_bitsandbytes("Lion8bit"), 1),
    "paged_lion": _Choice(_bitsandbytes("PagedLion32bit"), _FP32),
    "paged_lion8bit": _Choice(_bitsandbytes("PagedLion8bit"), 1),
}


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], args: OptimArgs, max_steps: int, plan: Plan | None = None
) -> tuple[Optimizer, Schedule]:
    """Build the optimizer and its schedule.

    Args:
        parameters: those to train.
        args: which optimizer and schedule.
        max_steps: length of the run.
        plan: the steps that the schedule spans; None: all.

    Raises:
        UserError: the optimizer is one of bitsandbytes, which is not installed.
    """
    optimizer = _CHOICES[args.name].build(list(parameters), args)
    return optimizer, build_schedule(optimizer, args, plan or Plan(0, max_steps), max_steps)


def optimizer_bytes(args: OptimArgs, rows: int, columns: int) -> float:
    """Return the bytes of the optimizer's state for a trained matrix; a vector has one column."""
    if args.name == "adafactor" and columns > 1:
        return _FP32 * (rows + columns)
    if args.name == "sgd" and args.option("momentum") == 0:
        return 0
    return _CHOICES[args.name].state_bytes * rows * columns


def initialize_state(optimizer: Optimizer) -> None:
    """Give the optimizer's state to parameters that have none yet, because no step was taken or all were skipped.

    Before the first step it is zero for every optimizer; its tensors are those of a step on a copy of the parameter.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            copy = torch.nn.Parameter(parameter.detach().clone())
            copy.grad = torch.zeros_like(copy)
            kind: Any = type(optimizer)
            other = kind([group | {"params": [copy]}])
            other.step()
            optimizer.state[parameter] = {name: torch.zeros_like(value) for name, value in other.state[copy].items()}


def check_optimizer(args: OptimArgs, world_size: int, device: torch.device) -> None:
    """Raise UserError if the chosen optimizer cannot run here."""
    name = args.name
    if name in SHARDED_OPTIMIZERS:
        return
    if world_size > 1:
        raise UserError(
            f"`optim.name: {name}` works on one process, and this run has {world_size}: it cannot update parameters "
            f"that are sharded. Use one of {', '.join(SHARDED_OPTIMIZERS)}, whose state is sharded too, or one process."
        )
    if name == "adafactor":
        return
    version = _import_bitsandbytes(name).__version__
    try:
        parameter = torch.nn.Parameter(torch.zeros(_EIGHT_BIT_SIZE, device=device))
        parameter.grad = torch.zeros_like(parameter)
        _CHOICES[name].build([parameter], args).step()
    except Exception as error:  # of any kind: a missing kernel, a library that does not load
        raise UserError(
            f"`optim.name: {name}`: bitsandbytes {version} cannot run it on this {device.type} "
            f"({first_line(error)}). Use one of {', '.join(SHARDED_OPTIMIZERS)}."
        ) from error
    if name.startswith("paged_") and device.type == "cpu":
        logger.warning("`optim.name: %s` is not paged on a CPU, where its state is in host memory anyway.", name)


def _import_bitsandbytes(name: str) -> Any:
    # On a CPU its import warns of a kernel for 4-bit products, which no optimizer uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise UserError(f'`optim.name: {name}` needs bitsandbytes: pip install -e ".[bitsandbytes]".') from error
    return bitsandbytes


def _without_maps(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Drop the quantization maps from a state dict: they are constants, the same for all parameters."""
    states = {
        number: {name: value for name, value in state.items() if not name.startswith("qmap")}
        for number, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}
