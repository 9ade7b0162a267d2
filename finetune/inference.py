"""A trained model, ready to answer."""

import dataclasses
from pathlib import Path

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from model.args import LoraArgs
from model.errors import UserError
from model.lora import merge_lora
from model.transformer import Transformer

from .args import TrainArgs, read_train_args
from .data.args import DataArgs
from .data.tokenize import load_instruct_tokenizer
from .distributed import World
from .hardware import choose_device, choose_hardware
from .utils import saved_checkpoints, step_of
from .wrapped_model import ADAPTER_NAME, build_model, open_base_model


def load_trained(folder: Path, step: int | None = None) -> tuple[Transformer, InstructTokenizerBase]:
    """Loads the model that a run trained, its adapter merged, on the GPU where there is one.

    Args:
        folder: of the run; or of a model, which is loaded as it stands.
        step: which checkpoint of the run; None: the newest.

    Raises:
        UserError: no run, no such checkpoint, or the base model has moved.
    """
    args = _model_args(folder) if is_model_folder(folder) else _run_args(folder, step)
    base = open_base_model(args)
    device = choose_device(0)
    # The dtype of the run; the engine is chosen anew, since this may be another machine.
    hardware = choose_hardware(device, args.param_dtype, "auto", base.args)
    model = build_model(base, dataclasses.replace(args, checkpoint=False), hardware, World(0, 1, device))
    merge_lora(model)
    model.requires_grad_(False).to(hardware.dtype)
    return model.eval(), load_instruct_tokenizer(base.folder, base.args.vocab_size)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model and is no run."""
    return not (folder / "args.yaml").is_file() and (folder / "params.json").is_file()


def _model_args(folder: Path) -> TrainArgs:
    return TrainArgs(DataArgs(), str(folder), run_dir="", lora=LoraArgs(enable=False))


def _run_args(run_dir: Path, step: int | None) -> TrainArgs:
    checkpoint = find_checkpoint(run_dir, step) / "consolidated"
    args = read_train_args(run_dir / "args.yaml")
    if (checkpoint / ADAPTER_NAME).is_file():
        args.lora.from_adapter = str(checkpoint / ADAPTER_NAME)
    else:
        args.model_id_or_path = str(checkpoint)
        args.lora.enable = False
    return args


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """A checkpoint's folder.

    Args:
        run_dir: folder of the run.
        step: which one; None: the newest.

    Raises:
        UserError: no run, or no such checkpoint.
    """
    if not run_dir.is_dir():
        raise UserError(f"The run folder {run_dir} does not exist.")
    if not (run_dir / "args.yaml").is_file():
        raise UserError(f"{run_dir} is no run folder: it holds no args.yaml.")
    saved = saved_checkpoints(run_dir / "checkpoints")
    if step is not None:
        saved = [path for path in saved if step_of(path) == step]
    if not saved:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{run_dir} holds no {which}; train it first, or name another folder.")
    return saved[-1]


def token_bytes(tokenizer: InstructTokenizerBase) -> list[bytes | None]:
    """What each token writes; None for control tokens."""
    inner = tokenizer.tokenizer
    if isinstance(inner, Tekkenizer):
        specials = inner.num_special_tokens
        return [None] * specials + [inner.id_to_byte_piece(token) for token in range(specials, inner.n_words)]
    return [_sentencepiece_bytes(inner._model, token) for token in range(inner.n_words)]


def _sentencepiece_bytes(model: object, token: int) -> bytes | None:
    if model.is_control(token) or model.is_unknown(token):
        return None
    piece = model.id_to_piece(token)
    if model.is_byte(token):  # <0xE9>
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("▁", " ").encode()
