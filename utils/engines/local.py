"""This project's own generation, on a run as it is: no export is needed, and every adapter and base format works."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.inference import load_trained
from model.generate import Request, answers, stream_requests
from utils.engines.engine import DEFAULT_GENERATION, Generation, Reply, by_length, seed_of
from utils.engines.prompts import Prompt
from utils.engines.token_codec import Refused, TokenCodec
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError

_Begun = tuple[Prompt, list[AnswerConstraint] | None]


class LocalEngine:
    """A trained model that answers prompts, a fixed number of them at once.

    Args:
        folder: folder of a run, a checkpoint or a model.
        generation: length and sampling of the answers.
        table: codes that answers may contain; None for unconstrained answers.
        batch_size: prompts at once; when one is answered, the next takes its place.
        rules: coding rules that answers with a table follow; None for those of the guide.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        generation: Generation = DEFAULT_GENERATION,
        table: Cim10Table | None = None,
        batch_size: int = 16,
        rules: RuleSet | None = None,
    ) -> None:
        self._model, tokenizer = load_trained(folder)
        self._generation = generation
        self._batch_size = batch_size
        self._codec = TokenCodec(tokenizer, table, rules)

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer prompts, those of similar length one after another; see `Engine`."""
        begun: dict[int, _Begun] = {}
        refused: list[Refused] = []
        requests = self._requests(prompts, begun, refused)
        steps = stream_requests(
            self._model, requests, self._codec.eos_id, self._generation.sampling, places=self._batch_size
        )
        for index, answer in answers(steps):
            yield from refused
            refused.clear()
            prompt, constraints = begun.pop(index)
            tokens = [step.token for step in answer]
            log_probabilities = [step.log_probability for step in answer]
            yield prompt, self._codec.replies([tokens], [log_probabilities], constraints)[0]
        yield from refused

    def _requests(
        self, prompts: Sequence[Prompt], begun: dict[int, _Begun], refused: list[Refused]
    ) -> Iterator[Request]:
        """Yield what the model continues, one prompt at a time, so that encoding them all is not waited for.

        Args:
            prompts: to answer.
            begun: receives each prompt that is continued, by the number of its request.
            refused: receives the others.
        """
        numbers, (max_tokens, sampling) = itertools.count(), self._generation
        for prompt in by_length(prompts):
            _, encoded, others = self._codec.encode([prompt])
            refused += others
            for tokens in encoded:
                constraints = self._codec.constraints(1)
                begun[next(numbers)] = prompt, constraints
                yield Request(tokens, max_tokens, seed_of(prompt, sampling), constraints[0] if constraints else None)
