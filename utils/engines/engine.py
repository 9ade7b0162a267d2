"""What every engine does: prompts in, answers with the probabilities of their tokens out. Imports nothing heavy."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from model.sampling import GREEDY, Sampling
from utils.tables.jsonl import SkippedRowError

if TYPE_CHECKING:
    from utils.engines.prompts import Prompt


class Generation(NamedTuple):
    """How answers are generated: maximum length, and choice of each token."""

    max_tokens: int = 512
    sampling: Sampling = GREEDY


DEFAULT_GENERATION = Generation()


class Reply(NamedTuple):
    """An answer.

    Attributes:
        text: without the token that ends it.
        log_probabilities: natural logarithm of the probability of each token, () if the engine does not give them.
        is_complete: whether the model ended it, rather than the maximum length.
        pieces: bytes that each of these tokens stands for, b"" for the token that ends the answer; () if not known.
    """

    text: str
    log_probabilities: tuple[float, ...]
    is_complete: bool
    pieces: tuple[bytes, ...] = ()


class Engine(Protocol):
    """Runs a model."""

    def answers(self, prompts: Sequence["Prompt"]) -> Iterator[tuple["Prompt", Reply | SkippedRowError]]:
        """Yield each prompt with its answer, or why it has none, in any order and as soon as it is known.

        Raises:
            UserError: no further prompt can be answered.
        """


def by_length(prompts: Sequence["Prompt"]) -> list["Prompt"]:
    """Return prompts in the order of their lengths, the shortest first."""
    return sorted(prompts, key=lambda prompt: len(str(prompt.messages[-1])))


def seed_of(prompt: "Prompt", sampling: Sampling) -> int:
    """Return the seed of a prompt's answer, which depends neither on the other prompts nor on interruptions."""
    return int.from_bytes(hashlib.sha256(f"{sampling.seed} {prompt.id}".encode()).digest()[:4])
