"""Fingerprints of what a run reads: its data files, base model and tokenizer.

A checkpoint records them, so that a run is not resumed on anything else. They depend on content alone: copying a file
or changing its modification time makes no difference.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError

from .args import TrainArgs
from .data.args import parse_sources
from .data.data_loader import TrainLoader
from .wrapped_model import BaseModel

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

Fingerprints = dict[str, Any]

_HASHED_WHOLE = 1 << 28  # bytes of weights of which every byte is hashed; of larger files, blocks are
_BLOCK, _STRIDE = 1 << 16, 1 << 22  # bytes of a block, and between the starts of two blocks


def fingerprints(
    args: TrainArgs, base: BaseModel, tokenizer: "InstructTokenizerBase", data: TrainLoader
) -> Fingerprints:
    """Return the fingerprints of a run's inputs, JSON-serializable.

    Raises:
        UserError: a file cannot be read.
    """
    files = sorted({location.file for location in base.weights.locations.values()})
    is_small = base.weights.size_bytes <= _HASHED_WHOLE
    inner = tokenizer.tokenizer
    evaluated = [file for source in parse_sources(args.data.eval_instruct_data) for file in source.files()]
    evaluated += [Path(args.eval_generation.file)] if args.eval_generation.file else []
    try:
        weights = {file.name: _hash(file, _BLOCK if is_small else _STRIDE) for file in files}
        vocabulary = _hash(Path(inner.file_path), _BLOCK)
        evaluation = {str(file): _hash(file, _BLOCK) for file in evaluated}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    shapes = json.dumps(dataclasses.asdict(base.args), sort_keys=True)
    return {
        "data": data.fingerprints(),
        "evaluation": evaluation,
        "weights": weights,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "tokenizer": f"{inner.version.value} {vocabulary}",
    }


def require_same_inputs(before: Fingerprints, now: Fingerprints, model_folder: Path) -> None:
    """Compare the fingerprints in a checkpoint with those of the inputs that are present now.

    Evaluation data may change: scores before and after are then not compared.

    Raises:
        UserError: an input has changed.
    """
    old, new = before["data"], now["data"]
    if changed := [path for path in {**old, **new} if old.get(path) != new.get(path)]:
        raise UserError(
            f"{', '.join(changed)} has changed since the checkpoint was saved, so the position in the data is no "
            "longer valid. Restore the file, or start a new run with another `run_dir`."
        )
    if changed := [key for key in ("weights", "shapes", "tokenizer") if before[key] != now[key]]:
        raise UserError(
            f"The model in {model_folder} has changed since the checkpoint was saved ({', '.join(changed)}), so the "
            "saved state does not belong to it. Restore the model, or start a new run with another `run_dir`."
        )


def _hash(file: Path, stride: int) -> str:
    """Return the hash of a file's size and of the block at each multiple of `stride`."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for start in range(0, size, stride):
            content.seek(start)
            digest.update(content.read(_BLOCK))
    return digest.hexdigest()
