"""Load a trained model for inference."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from model.args import LoraArgs
from model.errors import UserError
from model.lora import merge_lora
from model.peft_format import peft_folder
from model.transformer import Transformer

from .args import TrainArgs, read_train_args
from .data.args import DataArgs
from .data.tokenizer_files import load_instruct_tokenizer, tokenizer_warnings
from .distributed import World
from .hardware import choose_device, choose_hardware
from .preflight import check_inference_memory
from .run_dir import find_checkpoint, find_weights, run_of
from .wrapped_model import ADAPTER_NAME, build_model, open_base_model

logger = logging.getLogger("inference")


def load_trained(
    folder: Path, step: int | str | None = None, merge: bool = True
) -> tuple[Transformer, InstructTokenizerBase]:
    """Load a trained model and its tokenizer, on the GPU if there is one.

    Args:
        folder: a run folder, a checkpoint, or a model folder.
        step: which checkpoint of the run: a step number or "best"; None: the latest.
        merge: merge an adapter into its base model, unless that is quantized.

    Raises:
        UserError: the run, the checkpoint or the base model does not exist.
    """
    return _load(_args_of(find_weights(folder, step)), merge)


def load_base_of(folder: Path, step: int | str | None = None) -> tuple[Transformer, InstructTokenizerBase]:
    """Load the model that a run fine-tunes, as it was before; arguments and errors as for `load_trained`.

    Raises:
        UserError: the folder is not in a run.
    """
    run_dir = run_of(find_checkpoint(folder, step))
    if run_dir is None:
        raise UserError(f"{folder} is not in a run folder: the model that it was fine-tuned from is not recorded.")
    args = read_train_args(run_dir / "args.yaml")
    args.lora.enable = False
    return _load(args, merge=False)


def _load(args: TrainArgs, merge: bool) -> tuple[Transformer, InstructTokenizerBase]:
    base = open_base_model(args)
    base.require_intact()
    tokenizer = load_instruct_tokenizer(base.folder, base.args.vocab_size)
    for warning in tokenizer_warnings(base.folder, tokenizer, base.args.vocab_size):
        logger.warning(warning)
    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))  # several processes may answer shards of a file
    # The dtype is the run's; the attention engine is chosen again, since this may be another machine.
    hardware = choose_hardware(device, args.param_dtype, "auto", base.args)
    args = dataclasses.replace(args, checkpoint=False, compile=False, cpu_offload=False)
    check_inference_memory(base, args, hardware)
    model = build_model(base, args, hardware, World(0, 1, device), trains=False)
    if merge and args.base_dtype == "same":
        merge_lora(model)
    return model.eval(), tokenizer


def _args_of(weights: Path) -> TrainArgs:
    """Return the settings to build the model with: those of the run, or defaults for a plain model folder."""
    if peft_folder(weights):
        raise UserError(
            f"{weights} is a PEFT adapter; merge it into its base model first: python -m utils.merge_lora "
            f"--initial_model_ckpt BASE --lora_ckpt {weights} --dump_ckpt DIR."
        )
    run_dir = run_of(weights.parent)
    has_adapter = (weights / ADAPTER_NAME).is_file()
    if run_dir is None and has_adapter:
        raise UserError(f"Adapter {weights} is not in a run folder; merge it first (python -m utils.merge_lora).")
    if run_dir is None:
        return TrainArgs(DataArgs(), str(weights), run_dir="", lora=LoraArgs(enable=False))
    args = read_train_args(run_dir / "args.yaml")
    if has_adapter:
        args.lora.from_adapter = str(weights)
    else:
        args.model_id_or_path = str(weights)
        args.lora.enable = False
    return args


def token_bytes(tokenizer: InstructTokenizerBase) -> list[bytes | None]:
    """Return the bytes that each token decodes to; None for control tokens."""
    inner = tokenizer.tokenizer
    if isinstance(inner, Tekkenizer):
        specials = inner.num_special_tokens
        return [None] * specials + [inner.id_to_byte_piece(token) for token in range(specials, inner.n_words)]
    assert isinstance(inner, SentencePieceTokenizer)
    return [_sentencepiece_bytes(inner._model, token) for token in range(inner.n_words)]


def _sentencepiece_bytes(processor: Any, token: int) -> bytes | None:  # mistral-common's type lacks these methods
    if processor.is_control(token) or processor.is_unknown(token):
        return None
    piece: str = processor.id_to_piece(token)
    if processor.is_byte(token):  # <0xE9>
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("▁", " ").encode()
