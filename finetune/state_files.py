"""Reading `run.json` and `rank_*.json`: what they may contain, checked before anything is restored from them."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import UserError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Word = Annotated[int, Field(ge=0, lt=2**32)]  # of a random number generator
Digests = dict[str, str]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Progress(_Strict):
    step: Count
    tokens: Count
    seconds: NonNegative
    trained_tokens: Count
    skipped_steps: Count
    first_loss: float | None
    last_loss: float | None
    eval_losses: list[tuple[Count, float]]
    evaluation_pending: bool = False  # earlier versions did not interrupt evaluations


class _BestSoFar(_Strict):
    metric: str
    best: Finite | None
    worse_since: Count


class _Scaler(_Strict):
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: Count


class _Guards(_Strict):
    skipped: list[Count]
    losses: list[Finite]


class _Plan(_Strict):
    start: Count
    end: Count
    rate: NonNegative | None


class _Plateau(_Strict):
    best: Finite | None
    worse_since: Count


class _Schedule(_Strict):
    last_epoch: Count
    last_lr: Annotated[list[NonNegative], Field(min_length=1)]
    plan: _Plan | None = None  # earlier versions had no other than all steps of the run
    plateau: _Plateau | None = None  # of `reduce_lr_on_plateau` only


class _Group(_Strict):
    """Settings of one group of the optimizer; PyTorch's versions differ in the others."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, bool | int | Finite | list[Finite | None] | str | None]

    lr: NonNegative
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    eps: NonNegative | list[NonNegative | None] = 0.0  # two numbers of Adafactor
    weight_decay: NonNegative
    initial_lr: NonNegative = 0.0
    max_lr: NonNegative = 0.0
    min_lr: NonNegative = 0.0
    base_momentum: NonNegative = 0.0
    max_momentum: NonNegative = 0.0


class _Fingerprints(_Strict):
    data: Digests
    evaluation: Digests
    weights: Digests
    shapes: str
    tokenizer: str


class RunRecord(_Strict):
    """`run.json`. The settings in `args` are checked as those of a YAML are."""

    progress: _Progress
    best_so_far: _BestSoFar
    scaler: _Scaler
    guards: _Guards
    schedule: _Schedule
    groups: Annotated[list[_Group], Field(min_length=1)]
    world_size: Annotated[int, Field(ge=1, le=1_000_000)]
    args: dict[str, Any]
    best: bool
    fingerprints: _Fingerprints | None = None  # earlier versions recorded none


class _Counts(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid")

    samples: Count
    shortened: Count
    dropped: Count
    removed_tokens: Count
    positions: Count
    filled: Count


class _Position(_Strict):
    epoch: Count
    file: Count
    place: Count
    offset: Count
    waiting: list[tuple[Count, Count, Count]]
    counts: _Counts


_Mersenne = tuple[
    Literal["MT19937"],
    Annotated[list[Word], Field(min_length=624, max_length=624)],
    Annotated[int, Field(ge=0, le=624)],
    Annotated[int, Field(ge=0, le=1)],
    Finite,
]


class _Data(_Strict):
    sources: list[_Position]
    layouts: list[list[Word]]
    random: _Mersenne


class _Random(_Strict):
    python: tuple[Literal[3], Annotated[list[Word], Field(min_length=625, max_length=625)], Finite | None]
    numpy: _Mersenne
    torch: str
    cuda: str | None


class RankRecord(_Strict):
    """`rank_*.json`."""

    data: _Data
    random: _Random


Record = TypeVar("Record", bound=BaseModel)


def read_state_file(path: Path, kind: type[Record]) -> dict[str, Any]:
    """Return the content of a state file as plain data.

    Raises:
        UserError: the file cannot be read, or contains anything but the state of a run.
    """
    try:
        content = path.read_bytes()
        kind.model_validate_json(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise UserError(
            f"{path} does not contain the state of a run: {_describe(error)}. Resume from another checkpoint."
        ) from None
    state: dict[str, Any] = json.loads(content)  # lists and numbers as before: the models are for checking only
    return state


def _describe(error: ValidationError) -> str:
    """Return the first problem as `key: reason`, without the value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"]))
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return f"`{key}`: {reason}" if key else reason
