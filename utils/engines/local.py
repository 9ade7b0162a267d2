"""This project's own generation, on a run as it is: no export is needed, and every adapter and base format works."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.inference import load_trained
from model.generate import collect, stream
from utils.engines.engine import DEFAULT_GENERATION, Generation, Reply, seed_of
from utils.engines.prompts import Prompt
from utils.engines.token_codec import TokenCodec
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError


class LocalEngine:
    """A trained model that answers prompts in batches.

    Args:
        folder: folder of a run, a checkpoint or a model.
        generation: length and sampling of the answers.
        table: codes that answers may contain; None for unconstrained answers.
        batch_size: prompts per batch.
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
        """Answer prompts, those of similar length together; see `Engine`."""
        return self._codec.answer_batches(prompts, self._batch_size, self._answer)

    def _answer(self, prompts: Sequence[Prompt], encoded: Sequence[list[int]]) -> list[Reply]:
        constraints = self._codec.constraints(len(prompts))
        max_tokens, sampling = self._generation
        seeds = [seed_of(prompt, sampling) for prompt in prompts]
        answers = collect(stream(self._model, encoded, max_tokens, self._codec.eos_id, sampling, seeds, constraints))
        tokens = [[step.token for step in answer] for answer in answers]
        log_probabilities = [[step.log_probability for step in answer] for answer in answers]
        return self._codec.replies(tokens, log_probabilities, constraints)
